// SPDX-License-Identifier: GPL-2.0

//! Runs tests. Each runs in a process of its own with a time limit and with the module loaded as
//! the test needs it; an audit of every device follows.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use crate::check::{Fail, OrFail, Outcome};
use crate::check_eq;
use crate::device::Device;
use crate::ktap;
use crate::module::{self, Module};
use crate::sys::{self, Exit};
use crate::tests::{Ctx, Needs, Test, Then};
use crate::uapi::{Audit, ZDM_AUDIT_CLEAR};

/// How long a killed process may take to end.
const DEATH: Duration = Duration::from_secs(5);
/// Exit and RCU free pages shortly after the last user has left.
const QUIESCENCE: Duration = Duration::from_secs(2);

/// The pipe to which a test process reports; -1 in the harness itself.
static REPORT: AtomicI32 = AtomicI32::new(-1);

/// Sends a line to the harness. A line is shorter than PIPE_BUF, so that the lines of several
/// processes do not mix.
fn report(kind: &str, text: &str) {
    let fd = REPORT.load(Ordering::Relaxed);
    if fd < 0 {
        return;
    }
    let text: String = text.replace('\n', " ").chars().take(900).collect();
    // The write end stays open for the life of a test process.
    let line = format!("{kind} {text}\n");
    if let Ok(mut file) = dup(fd) {
        // If the harness has gone, no process reads the report: ignore the error.
        let _ = file.write_all(line.as_bytes());
    }
}

fn dup(fd: i32) -> io::Result<File> {
    sys::borrow(fd, |fd: BorrowedFd<'_>| fd.try_clone_to_owned()).map(File::from)
}

/// Adds a diagnostic line to the running test's report.
pub fn note(text: &str) {
    report("note", text);
}

/// A process that a test starts; its failure is a failure of the test.
pub struct Child {
    pid: i32,
}

impl Child {
    /// Runs `body` in a new process, which must end with SIGSEGV.
    #[track_caller]
    pub fn expect_segv(body: impl FnOnce(), what: &str) -> Outcome {
        let child = Self::spawn(|| {
            body();
            Ok(())
        })?;
        check_eq!(child.exit()?, Exit::Signal(libc::SIGSEGV), "{what}");
        Ok(())
    }

    /// Runs `body` in a new process.
    #[track_caller]
    pub fn spawn(body: impl FnOnce() -> Outcome) -> Outcome<Self> {
        let pid = sys::fork(|| conclude(body())).or_fail("fork")?;
        Ok(Self { pid })
    }

    /// Waits for the end of the process and returns how it ended.
    #[track_caller]
    pub fn exit(self) -> Outcome<Exit> {
        let (_, exit) = sys::wait(self.pid, true)
            .or_fail("waitpid")?
            .ok_or_else(|| Fail::failed("waitpid: expected a process, found none"))?;
        Ok(exit)
    }

    /// Whether the process is still running.
    #[track_caller]
    pub fn is_running(&self) -> Outcome<bool> {
        sys::is_running(self.pid).or_fail("waitid")
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for the process, which must succeed.
    #[track_caller]
    pub fn join(self) -> Outcome {
        match self.exit()? {
            Exit::Code(0) => Ok(()),
            exit => Err(Fail::failed(format!(
                "end of the child process: expected Code(0), found {exit:?}"
            ))),
        }
    }

    #[track_caller]
    pub fn kill(self) -> Outcome<Exit> {
        self.end(libc::SIGKILL)
    }

    /// Sends a signal and waits for the end of the process.
    #[track_caller]
    pub fn end(self, signal: i32) -> Outcome<Exit> {
        sys::kill(self.pid, signal).or_fail("kill")?;
        self.exit()
    }
}

/// Reports an outcome and turns it into an exit status.
fn conclude(outcome: Outcome) -> i32 {
    match outcome {
        Ok(()) => 0,
        Err(Fail::Skip(why)) => {
            report("skip", &why);
            0
        }
        Err(fail) => {
            report("fail", &fail.to_string());
            1
        }
    }
}

/// How a contained function ended.
struct Contained {
    result: ktap::Result,
    notes: Vec<String>,
    /// The process does not die, so it still holds its resources.
    stuck: bool,
}

/// The part of a limit that is left to a test once the kernel has oopsed: a task has died, and whatever
/// waits for a lock that it held waits for ever. The run has failed in any case.
const AFTER_OOPS: u32 = 8;

/// How often the kernel has oopsed.
fn oopses() -> u64 {
    let count = std::fs::read_to_string("/sys/kernel/oops_count");
    count.ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Runs `body` in a process of its own for at most `limit`.
fn contain(limit: Duration, body: impl FnOnce() -> Outcome) -> io::Result<Contained> {
    let (mut pipe, write) = sys::pipe()?;
    let pid = sys::fork(|| {
        REPORT.store(write.as_raw_fd(), Ordering::Relaxed);
        std::panic::set_hook(Box::new(|info| report("fail", &info.to_string())));
        // The harness may have done so already; then the call has no effect.
        let _ = sys::new_process_group();
        conclude(body())
    })?;
    drop(write);

    let start = Instant::now();
    let before = oopses();
    let mut limit = limit;
    let mut look = Duration::from_secs(1);
    let mut text = Vec::new();
    let mut exit = None;
    let mut open = true;
    while exit.is_none() && start.elapsed() < limit {
        if start.elapsed() > look {
            look = start.elapsed() + Duration::from_secs(1);
            if oopses() > before {
                limit = limit.min(start.elapsed() + limit / AFTER_OOPS);
                look = limit;
            }
        }
        if open {
            open = drain(&mut pipe, &mut text, Duration::from_millis(20))?;
        } else {
            std::thread::sleep(Duration::from_millis(5));
        }
        exit = sys::wait(pid, false)?.map(|(_, exit)| exit);
    }
    let timed_out = exit.is_none();
    let mut place = String::new();
    if timed_out {
        place = where_is(pid);
    }
    // Kill the processes that the test left behind, too. The group may be empty.
    let _ = sys::kill(-pid, libc::SIGKILL);
    let mut stuck = false;
    if timed_out {
        stuck = !sys::wait_until(DEATH, || !matches!(sys::wait(pid, false), Ok(None)));
    }
    stuck |= !reap_all();
    while open && sys::readable(&pipe, Duration::ZERO)? {
        open = drain(&mut pipe, &mut text, Duration::ZERO)?;
    }

    let mut notes = Vec::new();
    let (mut failed, mut skipped) = (false, None);
    for line in String::from_utf8_lossy(&text).lines() {
        match line.split_once(' ') {
            Some(("fail", t)) => {
                failed = true;
                notes.push(t.to_string());
            }
            Some(("skip", t)) => skipped = Some(t.to_string()),
            Some((_, t)) => notes.push(t.to_string()),
            None => {}
        }
    }
    if stuck {
        notes.push(format!("process {pid} or a child of it does not die"));
    }
    let result = match exit {
        None => {
            notes.push(format!("killed after {} s; {place}", limit.as_secs()));
            ktap::Result::Fail(Some("timed out".into()))
        }
        Some(Exit::Signal(n)) => {
            notes.push(format!("the test process was killed by signal {n}"));
            ktap::Result::Fail(None)
        }
        Some(Exit::Code(0)) if !failed => match skipped {
            Some(why) => ktap::Result::Skip(why),
            None => ktap::Result::Pass,
        },
        Some(Exit::Code(_)) if failed => ktap::Result::Fail(None),
        Some(Exit::Code(n)) => {
            notes.push(format!("exit status of the test process was {n}"));
            ktap::Result::Fail(None)
        }
    };
    Ok(Contained {
        result,
        notes,
        stuck,
    })
}

/// Reads the available data. Returns whether more may come.
fn drain(pipe: &mut File, text: &mut Vec<u8>, wait: Duration) -> io::Result<bool> {
    let mut chunk = [0; 4096];
    if !sys::readable(pipe, wait)? {
        return Ok(true);
    }
    let n = pipe.read(&mut chunk)?;
    text.extend_from_slice(&chunk[..n]);
    Ok(n > 0)
}

/// The kernel function in which a process hangs, for the report.
fn where_is(pid: i32) -> String {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
    match read("stack") {
        Ok(stack) if !stack.trim().is_empty() => format!("stack: {}", stack.replace('\n', "; ")),
        _ => format!("wchan: {}", read("wchan").unwrap_or_default()),
    }
}

/// Reaps every child and orphan. Returns whether all of them ended in time.
fn reap_all() -> bool {
    sys::wait_until(DEATH, || {
        loop {
            match sys::wait(-1, false) {
                Ok(Some(_)) => {}
                Ok(None) => return false,
                // ECHILD: all children are reaped.
                Err(_) => return true,
            }
        }
    })
}

/// Marks the kernel log, so that splats can be attributed to a test.
fn kmsg(text: &str) {
    // The marks are optional: a failure to write them fails no test.
    if let Ok(mut file) = File::options().write(true).open("/dev/kmsg") {
        let _ = file.write_all(format!("<6>zdm-selftests: {text}\n").as_bytes());
    }
}

/// The state between tests.
pub struct Harness {
    pub ctx: Ctx,
    pub limit: Duration,
    /// The parameters of the module, if the harness has loaded it.
    loaded: Option<&'static str>,
    /// The state of the module may no longer be what a test needs: reload it.
    dirty: bool,
    /// For each device the pages in use and the violations that an earlier test left for good, so
    /// that one leak fails only one test.
    left: Vec<(u64, u64)>,
}

impl Harness {
    pub fn new(module: Module, limit: Duration) -> Self {
        let left = vec![(0, 0); module.nodes().len()];
        Self {
            ctx: Ctx { module },
            limit,
            loaded: None,
            // A module that was loaded before has unknown parameters.
            dirty: true,
            left,
        }
    }

    /// Runs tests in this order. Returns whether all passed.
    pub fn run(&mut self, tests: &[&Test], out: impl Write) -> io::Result<bool> {
        sys::become_subreaper()?;
        let mut ktap = ktap::Writer::start(out, tests.len())?;
        for test in tests {
            kmsg(&format!("begin {}", test.name));
            let done = self.run_one(test);
            kmsg(&format!("end {}", test.name));
            let done = done?;
            for line in &done.notes {
                ktap.note(&format!("{}: {line}", test.name))?;
            }
            ktap.result(test.name, &done.result)?;
            if done.stuck {
                ktap.bail_out("a process hangs in the kernel, see above")?;
                return Ok(false);
            }
        }
        Ok(ktap.failed() == 0)
    }

    fn run_one(&mut self, test: &Test) -> io::Result<Contained> {
        let prepared = self.prepare(test.needs)?;
        if prepared.result != ktap::Result::Pass {
            return Ok(Contained {
                result: ktap::Result::Fail(Some("module".into())),
                ..prepared
            });
        }
        let ctx = &self.ctx;
        let mut done = contain(self.limit, || (test.run)(ctx))?;
        done.notes.splice(0..0, prepared.notes);
        if done.stuck {
            return Ok(done);
        }
        let after = self.settle(test)?;
        done.notes.extend(after.notes);
        done.stuck |= after.stuck;
        if after.result != ktap::Result::Pass && !matches!(done.result, ktap::Result::Fail(_)) {
            done.result = after.result;
        }
        Ok(done)
    }

    /// Brings the module into the state that a test needs.
    fn prepare(&mut self, needs: Needs) -> io::Result<Contained> {
        let want = match needs {
            Needs::Loaded(parameters) => Some(parameters),
            Needs::Any => Some(self.loaded.unwrap_or("")),
            Needs::Absent => None,
        };
        if want == self.loaded && !self.dirty {
            return Ok(Contained {
                result: ktap::Result::Pass,
                notes: Vec::new(),
                stuck: false,
            });
        }
        let ctx = &self.ctx;
        let unloaded = contain(self.limit, || {
            match crate::proc::module_loaded(module::NAME)? {
                true => ctx.module.unload(),
                false => Ok(()),
            }
        })?;
        if unloaded.result != ktap::Result::Pass {
            // Invariant I7 keeps the module loaded after a leak. Tests that need no other state
            // continue with it.
            if want.is_some() && want == self.loaded && !unloaded.stuck {
                self.dirty = false;
                self.note_what_is_left()?;
                return Ok(Contained {
                    result: ktap::Result::Pass,
                    ..unloaded
                });
            }
            return Ok(unloaded);
        }
        self.loaded = None;
        self.left.fill((0, 0));
        let Some(parameters) = want else {
            self.dirty = false;
            return Ok(unloaded);
        };
        let loaded = contain(self.limit, || ctx.module.load(parameters))?;
        if loaded.result == ktap::Result::Pass {
            self.loaded = Some(parameters);
            self.dirty = false;
        }
        Ok(loaded)
    }

    /// Checks the state after a test.
    fn settle(&mut self, test: &Test) -> io::Result<Contained> {
        let (ctx, left) = (&self.ctx, &self.left);
        let gone = test.then == Then::Gone || test.needs == Needs::Absent;
        let after = match gone {
            true => contain(self.limit, || ctx.module.check_gone())?,
            false => contain(self.limit, || {
                for (n, left) in ctx.module.nodes().into_iter().zip(left) {
                    audit_clean(n, *left)?;
                }
                Ok(())
            })?,
        };
        if gone {
            self.loaded = None;
        }
        if after.result != ktap::Result::Pass {
            self.dirty = true;
        }
        Ok(after)
    }

    /// Records the state that cannot be cleaned up. No process is needed for it: an audit has
    /// returned before.
    fn note_what_is_left(&mut self) -> io::Result<()> {
        for (n, left) in self.ctx.module.nodes().into_iter().zip(&mut self.left) {
            if let Ok(device) = Device::try_open(n) {
                device.try_audit(ZDM_AUDIT_CLEAR)?;
                let (audit, _) = device.try_audit(ZDM_AUDIT_CLEAR)?;
                *left = (audit.used, audit.found);
            }
        }
        Ok(())
    }
}

/// Whether the result of an audit is right for a device without users, apart from the pages in use
/// and the violations that an earlier test left.
///
/// Where the kernel keeps a reference on free pages, every scan finds one violation per free page,
/// and nothing else. `ZDM_STATS` says whether the kernel does; the tests of the group generic_rule
/// check that this is true.
fn clean(audit: &Audit, free_refs: u64, (used, found): (u64, u64)) -> bool {
    let violations = match free_refs {
        0 => audit.found == found && (audit.total == 0 || found > 0),
        _ => audit.found == audit.free && audit.total > 0,
    };
    violations && audit.used == used && audit.free.checked_add(audit.used) == Some(audit.pages)
}

/// Checks that device `n` is as clean as a device without users must be.
fn audit_clean(n: usize, (used, found): (u64, u64)) -> Outcome {
    let device = Device::open(n)?;
    // A scan during frees may report and count a page that is just being freed. Wait until the
    // statistics show that the frees are done; if they never are, the audit below reports the pages
    // in use.
    sys::wait_until(QUIESCENCE, || {
        let stats = device.stats();
        stats.is_ok_and(|s| s.allocated.wrapping_sub(s.freed) == used)
    });
    let free_refs = device.stats()?.free_refs;
    let mut seen = device.audit()?;
    // Every scan may find, and count, the leftovers of an earlier test.
    let as_left = |a: &Audit| clean(a, free_refs, (used, found));
    if !as_left(&seen.0) {
        sys::wait_until(QUIESCENCE, || {
            // The check below reports an error again.
            if let Ok(again) = device.try_audit(0) {
                seen = again;
            }
            as_left(&seen.0)
        });
    }
    let (audit, records) = seen;
    if as_left(&audit) {
        return Ok(());
    }
    for v in &records {
        note(&format!("device {n}: {v:x?}"));
    }
    let (found, total) = match free_refs {
        0 => (found.to_string(), "0"),
        _ => ("all that are free".to_string(), "some"),
    };
    Err(Fail::failed(format!(
        "audit of device {n} after the test: expected used {used}, found {found}, \
         total {total}, free + used == pages, found {audit:?}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_an_audit_must_say() {
        let idle = Audit {
            pages: 10,
            free: 10,
            ..Audit::default()
        };
        assert!(clean(&idle, 0, (0, 0)));
        let used = Audit {
            free: 9,
            used: 1,
            ..idle
        };
        assert!(!clean(&used, 0, (0, 0)) && clean(&used, 0, (1, 0)));
        let broken = Audit {
            found: 1,
            total: 3,
            ..idle
        };
        assert!(!clean(&broken, 0, (0, 0)) && clean(&broken, 0, (0, 1)));
        assert!(!clean(&Audit { free: 9, ..idle }, 0, (0, 0)), "lost page");
        // The old rule: one violation for every free page.
        let old = Audit {
            found: 10,
            total: 20,
            ..idle
        };
        assert!(clean(&old, 1, (0, 0)) && !clean(&old, 0, (0, 0)));
        for wrong in [
            idle,
            Audit { found: 9, ..old },
            Audit { found: 11, ..old },
            Audit { total: 0, ..old },
            Audit { used: 1, ..old },
        ] {
            assert!(!clean(&wrong, 1, (0, 0)), "{wrong:?}");
        }
    }

    // These checks are one test, because the processes of two concurrent tests would reap each
    // other's children. A thread forks here; the children execute only these lines.
    #[test]
    fn containment() {
        let pass = contain(SECOND, || Ok(())).unwrap();
        assert_eq!(pass.result, ktap::Result::Pass);
        assert!(pass.notes.is_empty() && !pass.stuck);

        let fail = contain(SECOND, || Err(Fail::failed("broken"))).unwrap();
        assert_eq!(fail.result, ktap::Result::Fail(None));
        assert!(fail.notes[0].ends_with("broken"), "{:?}", fail.notes);

        let skip = contain(SECOND, || Err(Fail::Skip("no".into()))).unwrap();
        assert_eq!(skip.result, ktap::Result::Skip("no".into()));

        let crash = contain(SECOND, || sys::exit_now(3)).unwrap();
        assert_eq!(crash.result, ktap::Result::Fail(None));

        let hang = contain(SECOND / 4, || {
            let _child = Child::spawn(|| {
                loop {
                    std::thread::sleep(SECOND)
                }
            })?;
            loop {
                std::thread::sleep(SECOND)
            }
        })
        .unwrap();
        assert_eq!(hang.result, ktap::Result::Fail(Some("timed out".into())));
        assert!(!hang.stuck);

        let child = contain(SECOND, || {
            Child::spawn(|| Err(Fail::failed("inner")))?.join()
        })
        .unwrap();
        assert_eq!(child.result, ktap::Result::Fail(None));
        assert_eq!(child.notes.len(), 2, "{:?}", child.notes);
    }
}
