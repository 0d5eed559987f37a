// SPDX-License-Identifier: GPL-2.0
//! Runs suites: load, start, forward every line, end.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, waitpid};
use zdvm_guest::plan::{Kind, MODULE, Plan, Suite};
use zdvm_guest::wire::Message;

use crate::sys::{self, Link};

/// An interactive shell on the console, the module loaded.
pub fn shell(plan: &Plan) -> Result<()> {
    let _ = Command::new("/bin/busybox").args(["--install", "-s", "/bin"]).status();
    if std::path::Path::new(MODULE).exists() {
        match sys::insmod(MODULE) {
            Ok(()) => println!("zdvm: {} is loaded; `exit` powers off", plan.module),
            Err(e) => println!("zdvm: {e:#}"),
        }
    }
    Command::new("/bin/busybox")
        .args(["setsid", "cttyhack", "sh"])
        .env("PATH", "/bin")
        .env("HOME", "/tmp")
        .env("PS1", "guest# ")
        .status()
        .context("starting the shell")?;
    Ok(())
}

/// Runs one suite; an error is about the suite as a whole, not about a test.
pub fn suite(link: &mut Link, plan: &Plan, suite: &Suite) -> Result<()> {
    match suite.kind {
        Kind::Kunit => kunit(link, plan, suite),
        Kind::Ktap => {
            let mut command = Command::new(&suite.program);
            command.args(&suite.tests);
            // The binary brackets and times its own tests; the host watches over the whole.
            match child(link, command, None)? {
                None => Ok(()),
                Some(why) => bail!("{why}"),
            }
        }
        Kind::Harness => harness(link, plan, suite),
    }
}

fn kunit(link: &mut Link, plan: &Plan, suite: &Suite) -> Result<()> {
    let before = sys::kunit_suites();
    sys::kmsg(&format!("zdvm-guest: begin {}", suite.name));
    let loaded = sys::insmod(MODULE);
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
    sys::insmod(MODULE)?;
    for test in &suite.tests {
        link.send(&Message::TestStart(test.clone()))?;
        sys::kmsg(&format!("zdvm-guest: begin {test}"));
        let mut command = Command::new(&suite.program);
        command.args(["-r", test]);
        let why = child(link, command, Some(Duration::from_secs(suite.timeout)))?;
        sys::kmsg(&format!("zdvm-guest: end {test}"));
        link.send(&Message::TestEnd(test.clone(), why))?;
    }
    sys::rmmod(&plan.module)
}

fn describe(status: ExitStatus) -> Option<String> {
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(format!("exit status {code}")),
        (None, Some(signal)) => Some(format!("killed by signal {signal}")),
        (None, None) => Some("ended in an unknown way".to_owned()),
    }
}

/// Forwards lines until the sender is gone or `until` has passed; true if it is gone.
fn forward(link: &mut Link, lines: &Receiver<String>, until: Instant) -> Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(line) => link.send(&Message::Ktap(line))?,
            Err(RecvTimeoutError::Disconnected) => return Ok(true),
            Err(RecvTimeoutError::Timeout) => return Ok(false),
        }
    }
}

/// Runs a program to its end, forwarding its standard output; says how it ended badly.
fn child(link: &mut Link, mut command: Command, limit: Option<Duration>) -> Result<Option<String>> {
    let mut child = command
        .env("PATH", "/bin")
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // What a test says on standard error is shown, but is not KTAP.
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    let (send, lines) = channel();
    if let Some(out) = child.stdout.take() {
        let send = send.clone();
        thread::spawn(move || pump(out, "", &send));
    }
    if let Some(err) = child.stderr.take() {
        thread::spawn(move || pump(err, "# stderr: ", &send));
    }
    let start = Instant::now();
    let tick = Duration::from_millis(10);
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if limit.is_some_and(|l| start.elapsed() > l) {
            sys::kmsg("zdvm-guest: test timed out, all stacks follow");
            sys::dump_stacks();
            timed_out = true;
            child.kill()?;
            break child.wait()?;
        }
        if forward(link, &lines, Instant::now() + tick)? {
            thread::sleep(tick);
        }
    };
    // Whatever the test started must not outlive it (it could hold the pipe open, or the
    // module). Process group 1 to kill(2) is -1: everything but process 1.
    let _ = kill_process_group(Pid::INIT, Signal::KILL);
    forward(link, &lines, Instant::now() + Duration::from_secs(5))?;
    while let Ok(Some(_)) = waitpid(None, WaitOptions::NOHANG) {}
    if timed_out {
        let limit = limit.unwrap_or_default().as_secs();
        return Ok(Some(format!("timed out after {limit} s")));
    }
    Ok(describe(status))
}

fn pump(from: impl std::io::Read, prefix: &str, to: &std::sync::mpsc::Sender<String>) {
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
