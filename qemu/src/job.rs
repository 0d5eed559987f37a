// SPDX-License-Identifier: GPL-2.0
//! Child processes that do not outlive this program, whether a signal ends it or it dies.

use std::ffi::OsStr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// The number of the signal that asked this program to stop, 0 if none did.
static STOP: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Makes SIGINT, SIGTERM and SIGHUP ask for an orderly end from now on.
pub fn watch_signals() -> Result<()> {
    for signal in [2_i32, 15, 1] {
        let number = usize::try_from(signal)?;
        signal_hook::flag::register_usize(signal, Arc::clone(&STOP), number)
            .context("watching for signals")?;
    }
    Ok(())
}

/// Returns an error once a signal has come.
pub fn check_signals() -> Result<()> {
    match STOP.load(Ordering::SeqCst) {
        0 => Ok(()),
        n => Err(Interrupted(n).into()),
    }
}

/// A signal asked this program to stop.
#[derive(Debug)]
pub struct Interrupted(pub usize);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted by signal {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// A command that the kernel kills when this program dies. setpriv sets the parent-death signal and
/// then executes the program, so the process id stays the same.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).process_group(0);
    command
}

/// The shell script that runs a build. A build is many processes, and killing make leaves its
/// compilers and sub-makes running. SIGTERM comes from this program or, if it dies, from the
/// kernel. The script then sends SIGTERM to the whole group, so that no half-written file stays,
/// and kills what is left after three seconds.
const GUARD: &str = "\
trap 'trap \"\" TERM INT HUP; kill -TERM 0; (sleep 3; kill -KILL 0) & wait $child; kill -KILL 0' TERM INT HUP
\"$@\" & child=$!
wait $child";

/// A command that ends, together with all processes that it started, when this program ends for any
/// reason.
pub fn build(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--", "sh", "-c", GUARD, "zdvm-guard"]);
    command.arg(program).process_group(0);
    command
}

/// A running child in a process group of its own; dropping the job ends the whole group.
#[derive(Debug)]
pub struct Job {
    child: Child,
    name: String,
    status: Option<ExitStatus>,
    /// Whether the child has a process group of its own.
    has_group: bool,
}

impl Job {
    /// Starts the command.
    pub fn spawn(command: &mut Command, name: &str) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { child, name: name.to_owned(), status: None, has_group: true })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The child's status, if it has ended.
    pub fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Ends the child and all processes that it started.
    pub fn kill(&mut self) {
        if matches!(self.poll(), Ok(Some(_))) {
            return;
        }
        let pid = i32::try_from(self.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // SIGTERM lets make and ccache remove half-written files, and QEMU restore the terminal.
            let _ = match self.has_group {
                true => kill_process_group(pid, Signal::TERM),
                false => kill_process(pid, Signal::TERM),
            };
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end && matches!(self.poll(), Ok(None)) {
                thread::sleep(Duration::from_millis(10));
            }
            if self.has_group {
                let _ = kill_process_group(pid, Signal::KILL);
            }
        }
        if self.status.is_none() {
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }

    /// Waits for the child's end and calls `tick` meanwhile; a signal to this program ends the
    /// child.
    pub fn wait(&mut self, mut tick: impl FnMut() -> Result<()>) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.poll()? {
                return Ok(status);
            }
            check_signals()?;
            tick()?;
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the child, and returns an error unless it succeeded.
    pub fn success(&mut self, tick: impl FnMut() -> Result<()>) -> Result<()> {
        let status = self.wait(tick)?;
        if status.success() {
            return Ok(());
        }
        match status.signal() {
            Some(n) => bail!("{} was killed by signal {n}", self.name),
            None => bail!("{} failed ({status})", self.name),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command on this terminal, in our own process group, to which the terminal's keys go. A signal
/// to this program ends the command.
pub fn attached(command: &mut Command, name: &str) -> Result<ExitStatus> {
    let mut job = Job::spawn(command, name)?;
    job.has_group = false;
    let status = job.wait(|| Ok(()))?;
    // The terminal's keys reach the command, too, which may be the first to end.
    check_signals().map(|()| status)
}

/// Returns the standard output of a short command.
pub fn output(command: &mut Command, name: &str) -> Result<String> {
    let out = command.output().with_context(|| format!("starting {name}"))?;
    if !out.status.success() {
        bail!("{name} failed ({}): {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
