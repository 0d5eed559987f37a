// SPDX-License-Identifier: GPL-2.0

//! Memory that RELEASE cannot get, and faults that cannot succeed.

use std::time::{Duration, Instant};

use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES};
use crate::harness::Child;
use crate::sys::{self, KernelLog};
use crate::tests::target::{PRIVATE, Target, huge_filled};
use crate::tests::{Ctx, Test, test, with};
use crate::uapi::*;
use crate::{check, check_eq};

/// The chunks are small enough to fill.
pub const INJECTING: &[Test] = &[
    with(
        "inject=1 devmem_chunk_mb=2",
        test("hostile.release_of_many_chunks", release_of_many_chunks),
    ),
    with(
        "inject=1 devmem_chunk_mb=2",
        test("hostile.nobody_waits_for_release", nobody_waits_for_release),
    ),
    with(
        "inject=1 devmem_chunk_mb=2",
        test("hostile.fault_on_a_tail", fault_on_a_tail),
    ),
    with(
        "inject=1 devmem_chunk_mb=2",
        test("hostile.log_is_limited", log_is_limited),
    ),
];

/// Fills `n` chunks of 2 MiB, and holds the folio in each of them through a file of its own.
fn hold_chunks(ctx: &Ctx, n: usize) -> Outcome<Vec<(Target, Buffer)>> {
    (0..n)
        .map(|_| {
            let target = Target::open(ctx, PRIVATE)?;
            let buf = huge_filled(1, 1610)?;
            target.move_all(&buf, 1610)?;
            target
                .inject(ZDM_INJECT_EXTRA_GET, buf.at(0))
                .or_fail("ZDM_INJECT")?;
            Ok((target, buf))
        })
        .collect()
}

/// Releases the folios, and clears the violations that they were.
fn let_go(observer: &Target, held: Vec<(Target, Buffer)>) -> Outcome {
    for (target, _) in &held {
        target
            .inject(ZDM_INJECT_UNDO_GET, 0)
            .or_fail("ZDM_INJECT")?;
    }
    for (target, buf) in held {
        drop(target);
        buf.check(0, HUGE_PAGES, 1610)?;
    }
    observer
        .try_audit(ZDM_AUDIT_CLEAR)
        .or_fail("ZDM_AUDIT")
        .map(drop)
}

/// RELEASE waits for all busy chunks at the same time.
fn release_of_many_chunks(ctx: &Ctx) -> Outcome {
    const CHUNKS: usize = 16;
    let observer = Target::open(ctx, PRIVATE)?;
    let held = hold_chunks(ctx, CHUNKS)?;
    let start = Instant::now();
    let result = observer.release();
    let took = start.elapsed();
    let found = observer.audit()?.0.total;
    let_go(&observer, held)?;
    expect_errno(result, &[libc::EBUSY], "RELEASE of held chunks")?;
    check!(
        found > 0,
        "violations of held pages: expected some, found none"
    );
    check!(
        took < Duration::from_secs(10),
        "time of RELEASE of {CHUNKS} held chunks: expected less than 10 s, found {took:?}"
    );
    Ok(())
}

/// Neither a migration that needs memory nor a signal waits for RELEASE.
fn nobody_waits_for_release(ctx: &Ctx) -> Outcome {
    let observer = Target::open(ctx, PRIVATE)?;
    let held = hold_chunks(ctx, 3)?;
    let child = Child::spawn(|| {
        // Repeat it, so that a RELEASE is in progress whenever the parent measures.
        loop {
            let _ = observer.release();
        }
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let buf = Buffer::filled(4, 1612)?;
    let start = Instant::now();
    let moved = observer.move_all(&buf, 1612);
    let migration = start.elapsed();
    let start = Instant::now();
    let end = child.kill()?;
    let kill = start.elapsed();
    let_go(&observer, held)?;
    moved?;
    check_eq!(
        end,
        sys::Exit::Signal(libc::SIGKILL),
        "end of the process in RELEASE"
    );
    check!(
        migration < Duration::from_millis(700),
        "time of a migration during RELEASE: expected less than 700 ms, found {migration:?}"
    );
    // Memory that RELEASE is just unregistering is unregistered first.
    check!(
        kill < Duration::from_millis(2500),
        "time that a killed process stays in RELEASE: expected less than 2.5 s, found {kill:?}"
    );
    buf.check(0, 4, 1612)
}

/// A fault on a tail page is judged by the counts of its folio.
fn fault_on_a_tail(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = huge_filled(1, 1611)?;
    target.move_all(&buf, 1611)?;
    target
        .inject(ZDM_INJECT_EXTRA_GET, buf.at(0))
        .or_fail("ZDM_INJECT")?;
    let before = target.audit()?.0.total;
    let exit = Child::spawn(|| {
        // Now the folio is shared and mapped by small entries.
        let _ = buf.get(5, 0);
        Ok(())
    })?
    .exit()?;
    check_eq!(
        exit,
        sys::Exit::Signal(libc::SIGBUS),
        "end of a process whose fault cannot be met"
    );
    let (_, records) = target.audit()?;
    let found = records.iter().filter(|v| v.invariant == 3);
    check!(
        records.len() as u64 > before && found.clone().count() > 0,
        "records of I3: expected some, found {records:x?}"
    );
    // The folio has its mappings, the fault's reference, and the injected one.
    check!(
        found.clone().all(|v| v.found == v.expected + 1),
        "references in the records: expected one too many, found {records:x?}"
    );
    target
        .inject(ZDM_INJECT_UNDO_GET, 0)
        .or_fail("ZDM_INJECT")?;
    target.try_audit(ZDM_AUDIT_CLEAR).or_fail("ZDM_AUDIT")?;
    buf.check(0, HUGE_PAGES, 1611)
}

/// The number of log lines that a caller can cause is limited.
fn log_is_limited(ctx: &Ctx) -> Outcome {
    const ROUNDS: usize = 40;
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(4, 1615)?;
    let mut log = KernelLog::open().or_fail("/dev/kmsg")?;
    let start = Instant::now();
    for _ in 0..ROUNDS {
        target.to_device(&buf, 0, 4).or_fail("MIGRATE_TO_DEV")?;
        target.release().or_fail("RELEASE")?;
    }
    let lines = log.rest().or_fail("/dev/kmsg")?;
    let added = lines.iter().filter(|l| l.contains("MB of device memory"));
    // Ten lines in five seconds; a window may have begun before this test.
    let most = 10 * (2 + start.elapsed().as_secs() as usize / 5);
    let found = added.count();
    check!(
        (1..=most).contains(&found),
        "lines of memory that was added {ROUNDS} times: expected 1 to {most}, found {found}"
    );
    buf.check(0, 4, 1615)
}
