// SPDX-License-Identifier: GPL-2.0
//! Runs suites: loads the module, starts the program, forwards every line, cleans up.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, waitpid};
use zdvm_guest::plan::{AUDIT, Kind, MODULE, PARAMS_ENV, Plan, Suite};
use zdvm_guest::wire::Message;

use crate::sys::{self, Link};

/// Prints the addresses of the module's sections for a debugger, if one is expected.
fn sections(module: &str) {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if !cmdline.split_whitespace().any(|w| w == "nokaslr") {
        return;
    }
    for name in [".text", ".rodata", ".data", ".bss"] {
        if let Ok(address) = fs::read_to_string(format!("/sys/module/{module}/sections/{name}")) {
            println!("zdvm: section {name} {}", address.trim());
        }
    }
}

/// Runs an interactive shell on the console, with the module loaded.
pub fn shell(plan: &Plan) -> Result<()> {
    let _ = Command::new("/bin/busybox").args(["--install", "-s", "/bin"]).status();
    if std::path::Path::new(MODULE).exists() {
        match sys::insmod(MODULE, &plan.params) {
            Ok(()) => {
                println!("zdvm: {} is loaded; `exit` powers off", plan.module);
                sections(&plan.module);
            }
            Err(e) => println!("zdvm: {e:#}"),
        }
    }
    Command::new("/bin/busybox")
        .args(["setsid", "cttyhack", "sh"])
        .env("PATH", "/bin")
        .env("HOME", "/tmp")
        .env("PS1", "guest# ")
        .env(PARAMS_ENV, &plan.params)
        .status()
        .context("starting the shell")?;
    Ok(())
}

/// Runs one suite. An error concerns the suite as a whole, not a test.
pub fn suite(link: &mut Link, plan: &Plan, suite: &Suite) -> Result<()> {
    let mut before = Vec::new();
    let mut end = apply(suite, &mut before).and_then(|()| tests(link, plan, suite));
    for (file, old) in before {
        end = end.and(sys::set(file, &old).map(drop));
    }
    end
}

/// Applies the suite's settings. Stores the previous values in `before`, also if a later setting
/// fails.
fn apply<'a>(suite: &'a Suite, before: &mut Vec<(&'a str, String)>) -> Result<()> {
    for (file, value) in &suite.settings {
        if let Some(old) = sys::set(file, value)? {
            before.push((file, old));
        }
    }
    Ok(())
}

fn tests(link: &mut Link, plan: &Plan, suite: &Suite) -> Result<()> {
    match suite.kind {
        Kind::Kunit => kunit(link, plan, suite),
        Kind::Ktap => {
            let mut command = Command::new(&suite.program);
            command.args(&suite.tests).env(PARAMS_ENV, &plan.params);
            // The program prints brackets and times its own tests; the host applies the limits.
            whole(link, command)
        }
        Kind::Script => {
            let mut command = Command::new(&suite.program);
            command.args(&suite.tests);
            sys::kmsg(&format!("zdvm-guest: begin {}", suite.name));
            let end = whole(link, command);
            sys::kmsg(&format!("zdvm-guest: end {}", suite.name));
            end
        }
        Kind::Harness => harness(link, plan, suite),
    }
}

/// Runs a program that is a suite by itself.
fn whole(link: &mut Link, command: Command) -> Result<()> {
    match child(link, command, None)? {
        End::Well => Ok(()),
        End::Ill(why) | End::Late(why) | End::Stuck(why) => bail!("{why}"),
    }
}

fn kunit(link: &mut Link, plan: &Plan, suite: &Suite) -> Result<()> {
    let before = sys::kunit_suites();
    sys::kmsg(&format!("zdvm-guest: begin {}", suite.name));
    let loaded = sys::insmod(MODULE, &plan.params);
    let mut seen = 0;
    for name in sys::kunit_suites() {
        if before.contains(&name) {
            continue;
        }
        seen += 1;
        let path = format!("{}/{name}/results", sys::KUNIT);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        for line in text.lines() {
            link.send(&Message::Ktap(line.to_owned()))?;
        }
    }
    loaded?;
    let unloaded = sys::rmmod(&plan.module);
    sys::kmsg(&format!("zdvm-guest: end {}", suite.name));
    unloaded?;
    if seen == 0 {
        bail!("the module brought no KUnit suite");
    }
    Ok(())
}

fn harness(link: &mut Link, plan: &Plan, suite: &Suite) -> Result<()> {
    sys::insmod(MODULE, &plan.params)?;
    let taint = sys::taint()?;
    for test in &suite.tests {
        link.send(&Message::TestStart(test.clone()))?;
        sys::kmsg(&format!("zdvm-guest: begin {test}"));
        let mut command = Command::new(&suite.program);
        command.args(["-r", test]);
        let end = child(link, command, Some(Duration::from_secs(suite.timeout)))?;
        // An audit cannot be quiescent while a process is stuck in the kernel.
        let audit = match end {
            End::Stuck(_) => None,
            _ => audit(plan)?,
        };
        sys::kmsg(&format!("zdvm-guest: end {test}"));
        let why: Vec<String> = end.why().into_iter().chain(audit).collect();
        let why = (!why.is_empty()).then(|| why.join("; "));
        link.send(&Message::TestEnd(test.clone(), why))?;
        if let End::Stuck(why) = end {
            bail!("{test} {why}: what follows is not run");
        }
        if plan.while_sound && (matches!(end, End::Late(_)) || sys::taint()? != taint) {
            // What the module waits for may be lost.
            return Ok(());
        }
    }
    sys::rmmod(&plan.module)
}

/// Audits the module after a test, if the plan names a program for that.
fn audit(plan: &Plan) -> Result<Option<String>> {
    if plan.audit.is_empty() {
        return Ok(None);
    }
    // The program itself waits for pages that are being freed.
    let mut said = Vec::new();
    let end = watched(Command::new(&plan.audit), Some(Duration::from_secs(60)), |line| {
        said.push(line);
        Ok(())
    })?;
    Ok(match end.why() {
        None => None,
        Some(why) if said.is_empty() => Some(format!("{AUDIT}{} {why}", plan.audit)),
        Some(_) => Some(format!("{AUDIT}{}", said.join(", "))),
    })
}

fn describe(status: ExitStatus) -> End {
    match (status.code(), status.signal()) {
        (Some(0), _) => End::Well,
        (Some(code), _) => End::Ill(format!("exit status {code}")),
        (None, Some(signal)) => End::Ill(format!("killed by signal {signal}")),
        (None, None) => End::Ill("ended in an unknown way".to_owned()),
    }
}

/// The way in which a program ended.
enum End {
    /// By itself, with status 0.
    Well,
    /// In another way, with a description.
    Ill(String),
    /// The program was killed at its time limit.
    Late(String),
    /// The program did not end even when it was killed.
    Stuck(String),
}

impl End {
    fn why(&self) -> Option<String> {
        match self {
            Self::Well => None,
            Self::Ill(why) | Self::Late(why) | Self::Stuck(why) => Some(why.clone()),
        }
    }
}

/// Takes lines until the sender is gone or `until` has passed. Returns true if the sender is gone.
fn forward(
    line: &mut impl FnMut(String) -> Result<()>,
    lines: &Receiver<String>,
    until: Instant,
) -> Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(text) => line(text)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(true),
            Err(RecvTimeoutError::Timeout) => return Ok(false),
        }
    }
}

/// Waits for the end of a process, up to a limit.
fn wait_for(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let until = Instant::now() + limit;
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() > until {
            return Ok(status);
        }
        thread::sleep(TICK);
    }
}

const TICK: Duration = Duration::from_millis(10);
/// How long a killed process may take to end: unmapping migrated memory takes time.
const DEATH: Duration = Duration::from_secs(20);

/// Runs a program to its end and forwards its standard output.
fn child(link: &mut Link, command: Command, limit: Option<Duration>) -> Result<End> {
    let mut flood = Flood::default();
    watched(command, limit, |line| {
        for line in flood.pass(line) {
            link.send(&Message::Ktap(line))?;
        }
        Ok(())
    })
}

/// Keeps diagnostics from flooding the stream: a test that compares byte by byte and does not stop
/// at a difference writes hundreds of megabytes. Results and plans always pass.
#[derive(Default)]
struct Flood {
    lines: usize,
}

impl Flood {
    /// Number of diagnostic lines that may pass between two results.
    const LIMIT: usize = 1000;

    /// The lines to send for a line that came.
    fn pass(&mut self, line: String) -> Vec<String> {
        let text = line.trim_start();
        let result = ["ok ", "not ok ", "1..", "KTAP ", "TAP ", "# Totals:"];
        if result.iter().any(|r| text.starts_with(r)) {
            let left_out = self.lines.saturating_sub(Self::LIMIT);
            self.lines = 0;
            let said = (left_out > 0).then(|| format!("# zdvm: {left_out} lines left out"));
            return said.into_iter().chain([line]).collect();
        }
        self.lines += 1;
        if self.lines > Self::LIMIT { Vec::new() } else { vec![line] }
    }
}

/// The part of a limit that is left to a program once the kernel has oopsed: a task has died, and whatever
/// waits for a lock that it held waits for ever. The run has failed in any case.
const AFTER_OOPS: u32 = 8;

/// How often the kernel has oopsed.
fn oopses() -> u64 {
    let count = std::fs::read_to_string("/sys/kernel/oops_count");
    count.ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Runs a program to its end and calls `line` for every line of its standard output.
fn watched(
    mut command: Command,
    limit: Option<Duration>,
    mut line: impl FnMut(String) -> Result<()>,
) -> Result<End> {
    let mut child = command
        .env("PATH", "/bin")
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A test's standard error is shown, but is no KTAP.
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    // The channel is bounded: a program that writes faster than the host reads must wait.
    let (send, lines) = sync_channel(256);
    if let Some(out) = child.stdout.take() {
        let send = send.clone();
        thread::spawn(move || pump(out, "", &send));
    }
    if let Some(err) = child.stderr.take() {
        thread::spawn(move || pump(err, "# stderr: ", &send));
    }
    let start = Instant::now();
    let before = oopses();
    let mut limit = limit;
    let mut look = Duration::from_secs(1);
    let mut end = loop {
        if let Some(full) = limit.filter(|_| start.elapsed() > look) {
            look = start.elapsed() + Duration::from_secs(1);
            if oopses() > before {
                limit = Some(full.min(start.elapsed() + full / AFTER_OOPS));
                look = full;
            }
        }
        if let Some(status) = child.try_wait()? {
            break describe(status);
        }
        if let Some(limit) = limit.filter(|l| start.elapsed() > *l) {
            sys::kmsg("zdvm-guest: test timed out, all stacks follow");
            sys::dump_stacks();
            child.kill()?;
            let why = format!("timed out after {} s", limit.as_secs());
            break match wait_for(&mut child, DEATH)? {
                Some(_) => End::Late(why),
                None => End::Stuck(format!("{why} and cannot be killed")),
            };
        }
        if forward(&mut line, &lines, Instant::now() + TICK)? {
            thread::sleep(TICK);
        }
    };
    // Processes that the test started must not outlive it: they could hold the pipe open, or the
    // module. kill(2) takes process group 1 as -1, which is every process but process 1.
    let _ = kill_process_group(Pid::INIT, Signal::KILL);
    if !matches!(end, End::Stuck(_)) && !reap()? {
        end = End::Stuck(format!(
            "{}left a process that cannot be killed",
            end.why().map_or(String::new(), |w| format!("{w}; "))
        ));
    }
    forward(&mut line, &lines, Instant::now() + Duration::from_secs(5))?;
    Ok(end)
}

/// Waits until all processes that a program left behind are gone. Returns false if one stays.
fn reap() -> Result<bool> {
    let until = Instant::now() + DEATH;
    loop {
        match waitpid(None, WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) if Instant::now() > until => return Ok(false),
            Ok(None) => thread::sleep(TICK),
            Err(rustix::io::Errno::CHILD) => return Ok(true),
            Err(e) => return Err(e).context("waiting for processes"),
        }
    }
}

fn pump(from: impl std::io::Read, prefix: &str, to: &SyncSender<String>) {
    let mut reader = BufReader::new(from);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
        let line = String::from_utf8_lossy(&bytes);
        if to.send(format!("{prefix}{}", line.trim_end_matches(['\r', '\n']))).is_err() {
            break;
        }
        bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_pass_a_flood() {
        let mut flood = Flood::default();
        let mut sent: Vec<String> = Vec::new();
        for n in 0..Flood::LIMIT + 5 {
            sent.extend(flood.pass(format!("# line {n}")));
        }
        assert_eq!(sent.len(), Flood::LIMIT);
        let end = flood.pass("not ok 1 a".to_owned());
        assert_eq!(end, ["# zdvm: 5 lines left out", "not ok 1 a"]);
        assert_eq!(flood.pass("# next".to_owned()), ["# next"]);
        for line in ["TAP version 13", "1..2", "    ok 1 b", "# Totals: pass:1"] {
            assert_eq!(flood.pass(line.to_owned()), [line]);
        }
    }
}
