// SPDX-License-Identifier: GPL-2.0

//! Processes that end during their work, killed or with a core dump, leave nothing on the device.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, PAGES, Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::threads;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("kill.migrate", loops::<PRIVATE, MIGRATE>),
    test("kill.fault", loops::<PRIVATE, FAULT>),
    test("kill.exclusive", loops::<PRIVATE, EXCLUSIVE>),
    test("kill.snapshot", loops::<PRIVATE, SNAPSHOT>),
    test("kill.huge", loops::<PRIVATE, HUGE>),
    test("kill.threads", threads),
    test("kill.core", core::<PRIVATE>),
    test("kill.core_huge", core_huge::<PRIVATE>),
    test("kill.core_in_loops", core_in_loops),
    test("kill_coherent.migrate", loops::<COHERENT, MIGRATE>),
    test("kill_coherent.huge", loops::<COHERENT, HUGE>),
    test("kill_coherent.core", core::<COHERENT>),
    test("kill_coherent.core_huge", core_huge::<COHERENT>),
    test("kill_generic.migrate", loops::<GENERIC, MIGRATE>),
    test("kill_generic.huge", loops::<GENERIC, HUGE>),
    test("kill_generic.core", core::<GENERIC>),
    test("kill_generic.core_huge", core_huge::<GENERIC>),
];

/// The kinds of work that a process does until it is killed.
const MIGRATE: usize = 0;
const FAULT: usize = 1;
const EXCLUSIVE: usize = 2;
const SNAPSHOT: usize = 3;
const HUGE: usize = 4;

const ROUNDS: usize = 10;
/// The range of the times at which processes are killed, in microseconds.
const SPREAD: u64 = 20_000;

/// Works without end, after writing a byte to say that it has begun.
fn work(target: &Target, what: usize, news: &fs::File) -> Outcome {
    let n = if what == HUGE { HUGE_PAGES } else { PAGES };
    let buf = match what {
        HUGE => huge_filled(1, 490)?,
        _ => Buffer::filled(n, 490)?,
    };
    for round in 0.. {
        match what {
            MIGRATE => {
                target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
                target.to_system(&buf, 0, n).or_fail("MIGRATE_TO_SYS")?;
            }
            FAULT => {
                target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
                buf.check(0, n, 490)?;
            }
            EXCLUSIVE => {
                target.exclusive(&buf, 0, n).or_fail("EXCLUSIVE")?;
                buf.set(round % n, 5, buf.get(round % n, 5));
            }
            SNAPSHOT => {
                target
                    .to_device(&buf, round % n, 1)
                    .or_fail("MIGRATE_TO_DEV")?;
                target.snapshot(&buf, 0, n).or_fail("SNAPSHOT")?;
                target.read(&buf, 0, n).or_fail("READ")?;
            }
            _ => {
                target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
                // Also migrate in pieces: a part splits the huge page.
                match round % 3 {
                    0 => drop(target.to_system(&buf, 0, n).or_fail("MIGRATE_TO_SYS")?),
                    1 => drop(target.to_system(&buf, 64, 64).or_fail("MIGRATE_TO_SYS")?),
                    _ => buf.check(n / 2, 1, 490)?,
                }
            }
        }
        if round == 0 {
            std::io::Write::write_all(&mut &*news, b"n").or_fail("pipe")?;
        }
    }
    Ok(())
}

/// A pseudo-random time within the range, the same in each run.
fn delay(round: usize) -> Duration {
    Duration::from_micros((round as u64 + 1).wrapping_mul(2_654_435_761) % SPREAD)
}

/// Starts a process, lets it work for a while, and ends it with a signal.
fn end_amid(
    ctx: &Ctx,
    node: usize,
    round: usize,
    signal: i32,
    body: impl FnOnce(&Target, &fs::File) -> Outcome,
) -> Outcome {
    let (news, say) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        let target = Target::open(ctx, node)?;
        body(&target, &say)
    })?;
    drop(say);
    let begun = sys::readable(&news, Duration::from_secs(20)).or_fail("poll")?;
    std::thread::sleep(delay(round));
    let exit = child.end(signal)?;
    check!(begun, "the process: expected news, found none");
    check_eq!(exit, Exit::Signal(signal), "end in round {round}");
    Ok(())
}

/// Kills ten processes; with the five kinds of work these are more than forty.
fn loops<const NODE: usize, const WHAT: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let before = target.stats()?;
    for round in 0..ROUNDS {
        end_amid(ctx, NODE, round, libc::SIGKILL, |target, news| {
            work(target, WHAT, news)
        })?;
        target.expect_empty()?;
    }
    let after = target.stats()?;
    let got = match WHAT {
        EXCLUSIVE => after.exclusive.wrapping_sub(before.exclusive),
        _ => after.to_device.wrapping_sub(before.to_device),
    };
    check!(
        got >= ROUNDS as u64,
        "pages of all rounds: expected some, found {got}"
    );
    Ok(())
}

/// Two threads with one file, each working on memory of its own.
fn threads(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    for round in 0..ROUNDS {
        end_amid(ctx, PRIVATE, round, libc::SIGKILL, |target, news| {
            std::thread::scope(|scope| {
                let other = scope.spawn(|| work(target, FAULT, news));
                let what = if round % 2 == 0 { MIGRATE } else { HUGE };
                let outcome = work(target, what, news);
                outcome.and(threads::join(other))
            })
        })?;
        target.expect_empty()?;
    }
    Ok(())
}

const PATTERN: &str = "/proc/sys/kernel/core_pattern";
const CORE: &str = "/tmp/zdm-selftests.core";

/// The pattern of core dump files. Dropping it restores the old pattern.
struct CorePattern(String);

impl CorePattern {
    fn set() -> Outcome<Self> {
        let old = fs::read_to_string(PATTERN).or_fail(PATTERN)?;
        fs::create_dir_all("/tmp").or_fail("mkdir /tmp")?;
        // The file may not exist.
        let _ = fs::remove_file(CORE);
        fs::write(PATTERN, CORE).or_fail(PATTERN)?;
        Ok(Self(old))
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        // An unrestored pattern does no harm here.
        let _ = fs::write(PATTERN, &self.0);
        let _ = fs::remove_file(CORE);
    }
}

/// Checks that a core dump has all pages of a buffer, in order.
fn core_has(seed: u64, n: usize) -> Outcome {
    let core = fs::read(Path::new(CORE)).or_fail(CORE)?;
    let first = pattern_bytes(seed, 0, 1);
    // Memory begins at a multiple of the page size in the file.
    let at = core.chunks(PAGE).position(|page| page == &first[..]);
    let Some(at) = at.map(|page| page * PAGE) else {
        return Err(Fail::failed(format!(
            "the first page in {} bytes of core: expected it, found none",
            core.len()
        )));
    };
    match core.get(at..at + n * PAGE) {
        Some(pages) => check_bytes(pages, seed, 0, "data in the core"),
        None => Err(Fail::failed(
            "pages in the core: expected all, found the end",
        )),
    }
}

/// A process dumps core with a whole buffer on the device.
fn dump(ctx: &Ctx, node: usize, seed: u64, n: usize, make: fn(u64) -> Outcome<Buffer>) -> Outcome {
    let _pattern = CorePattern::set()?;
    let target = Target::open(ctx, node)?;
    let child = Child::spawn(|| {
        sys::allow_core_dumps().or_fail("setrlimit")?;
        let target = Target::open(ctx, node)?;
        let buf = make(seed)?;
        target.move_all(&buf, seed)?;
        sys::kill(sys::pid(), libc::SIGABRT).or_fail("kill")?;
        Err(Fail::failed("SIGABRT: expected an end, found none"))
    })?;
    check_eq!(child.exit()?, Exit::Signal(libc::SIGABRT), "end");
    core_has(seed, n)?;
    target.expect_empty()
}

fn core<const NODE: usize>(ctx: &Ctx) -> Outcome {
    dump(ctx, NODE, 491, PAGES, |seed| Buffer::filled(PAGES, seed))
}

fn core_huge<const NODE: usize>(ctx: &Ctx) -> Outcome {
    dump(ctx, NODE, 492, HUGE_PAGES, |seed| huge_filled(1, seed))
}

/// Core dumps at random points.
fn core_in_loops(ctx: &Ctx) -> Outcome {
    let _pattern = CorePattern::set()?;
    let target = Target::open(ctx, PRIVATE)?;
    let mut dumps = 0;
    for round in 0..8 {
        let what = [MIGRATE, FAULT, EXCLUSIVE, HUGE][round % 4];
        end_amid(ctx, PRIVATE, round, libc::SIGQUIT, |target, news| {
            sys::allow_core_dumps().or_fail("setrlimit")?;
            work(target, what, news)
        })?;
        dumps += usize::from(Path::new(CORE).exists());
        // The file may not exist.
        let _ = fs::remove_file(CORE);
        target.expect_empty()?;
    }
    note(&format!("{dumps} of 8 left a core"));
    check_eq!(dumps, 8, "core dumps");
    Ok(())
}
