// SPDX-License-Identifier: GPL-2.0

//! Pages that other tasks hold, and waits of other tasks.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, PAGE, check_bytes};
use crate::harness::{Child, note};
use crate::sys;
use crate::tests::target::{COHERENT, GENERIC, PRIVATE, Target};
use crate::tests::{Ctx, Test, test, with};
use crate::uapi::*;
use crate::{check, check_eq, vsock};

pub const TESTS: &[Test] = &[
    test(
        "hostile.audit_while_others_migrate",
        audit_while_others_migrate::<PRIVATE>,
    ),
    test(
        "hostile_coherent.audit_while_others_migrate",
        audit_while_others_migrate::<COHERENT>,
    ),
    test(
        "hostile_coherent.pins_outlive_the_file",
        pins_outlive_the_file::<COHERENT>,
    ),
    test(
        "hostile_coherent.splice_outlives_the_file",
        splice_outlives_the_file::<COHERENT>,
    ),
    test(
        "hostile_coherent.socket_outlives_the_file",
        socket_outlives_the_file::<COHERENT>,
    ),
    test(
        "hostile_generic.socket_outlives_the_file",
        socket_outlives_the_file::<GENERIC>,
    ),
    test("hostile.socket_gets_pages_back", socket_gets_pages_back),
    test(
        "hostile_generic.audit_while_others_migrate",
        audit_while_others_migrate::<GENERIC>,
    ),
    test(
        "hostile_generic.pins_outlive_the_file",
        pins_outlive_the_file::<GENERIC>,
    ),
    test(
        "hostile_generic.splice_outlives_the_file",
        splice_outlives_the_file::<GENERIC>,
    ),
];

/// A reference that nobody explains makes a search wait.
pub const INJECTING: &[Test] = &[with(
    "inject=1",
    test(
        "hostile.close_does_not_wait_for_others",
        close_does_not_wait_for_others,
    ),
)];

/// A scan of a small device is short.
pub const SMALL: &[Test] = &[with(
    "devmem_chunk_mb=2",
    test("hostile.starved_migrations", starved_migrations),
)];

/// Runs `body` while threads migrate pages to the device and back.
fn while_others_migrate(target: &Target, body: impl FnOnce() -> Outcome) -> Outcome {
    let stop = AtomicBool::new(false);
    let buffers: Vec<Buffer> = (0..3)
        .map(|_| Buffer::filled(256, 1604))
        .collect::<Outcome<_>>()?;
    std::thread::scope(|scope| {
        for buf in &buffers {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = target.to_device(buf, 0, buf.pages());
                    let _ = target.to_system(buf, 0, buf.pages());
                }
            });
        }
        let result = body();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    buffers
        .iter()
        .try_for_each(|buf| buf.check(0, buf.pages(), 1604))
}

/// Closing a file that has used no device memory does not wait: neither for the migrations of others, nor
/// in a search for references that others have leaked.
fn close_does_not_wait_for_others(ctx: &Ctx) -> Outcome {
    const N: usize = 20;
    let target = Target::open(ctx, PRIVATE)?;
    let close = || -> Outcome<Duration> {
        let device = Device::open(0)?;
        let start = Instant::now();
        drop(device);
        Ok(start.elapsed())
    };
    let median = || -> Outcome<Duration> {
        let mut times = (0..N).map(|_| close()).collect::<Outcome<Vec<_>>>()?;
        times.sort();
        // Up to half of the closes may have lost their processor.
        Ok(times[N / 2])
    };
    let leaking = Target::open(ctx, PRIVATE)?;
    leaking
        .inject(ZDM_INJECT_PAGEMAP_GET, 0)
        .or_fail("ZDM_INJECT")?;
    let waited = median();
    let migrating = while_others_migrate(&target, || {
        let time = median()?;
        note(&format!("closes while others migrate took {time:?}"));
        check!(
            time < Duration::from_millis(200),
            "time of a close while others migrate: expected less than 200 ms, found {time:?}"
        );
        Ok(())
    });
    leaking
        .inject(ZDM_INJECT_PAGEMAP_PUT, 0)
        .or_fail("ZDM_INJECT")?;
    // What the search finds is a violation. A file that has used device memory searches.
    drop(leaking);
    target.try_audit(ZDM_AUDIT_CLEAR).or_fail("ZDM_AUDIT")?;
    let waited = waited?;
    note(&format!("closes beside a leak took {waited:?}"));
    check!(
        waited < Duration::from_millis(100),
        "time of a close beside a leak: expected less than 100 ms, found {waited:?}"
    );
    migrating
}

/// Scans during migrations find no violation, however many there are.
fn audit_while_others_migrate<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let before = target.audit()?.0.total;
    while_others_migrate(&target, || {
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
            check_eq!(audit.total, before, "violations, {records:x?}");
            check_eq!(audit.found, 0, "violations that this scan found");
        }
        Ok(())
    })
}

/// Moves a buffer through a file of its own, makes `hold` take references, and closes the file. The
/// pages stay, and no violation is reported. In the end `let_go` drops the holder.
fn held_at_close<T>(
    ctx: &Ctx,
    node: usize,
    hold: impl FnOnce(&Buffer) -> Outcome<T>,
    let_go: impl FnOnce(T) -> Outcome,
) -> Outcome {
    let observer = Target::open(ctx, node)?;
    let before = observer.audit()?.0.total;
    let buf = Buffer::filled(4, 1605)?;
    let holder = {
        let target = Target::open(ctx, node)?;
        target.move_all(&buf, 1605)?;
        hold(&buf)?
    };
    // The scan is one that any user may ask for.
    let (audit, records) = observer.try_audit(0).or_fail("ZDM_AUDIT")?;
    check_eq!(
        audit.total,
        before,
        "violations after the close, {records:x?}"
    );
    check_eq!(audit.found, 0, "violations that the scan found");
    expect_errno(observer.release(), &[libc::EBUSY], "RELEASE of held pages")?;
    let (audit, records) = observer.try_audit(0).or_fail("ZDM_AUDIT")?;
    check_eq!(
        audit.total,
        before,
        "violations after RELEASE, {records:x?}"
    );
    buf.check(0, 4, 1605)?;
    let_go(holder)?;
    observer.release().or_fail("RELEASE when nothing is held")?;
    buf.check(0, 4, 1605)?;
    observer.expect(&buf, 0, 4, 0)
}

/// Pins of another device's file are the holder.
fn pins_outlive_the_file<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let hold = |buf: &Buffer| {
        let pinner = Device::open(0)?;
        pinner.pin(buf, 0, 1, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
        pinner.pin(buf, 2, 1, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
        Ok(pinner)
    };
    held_at_close(ctx, NODE, hold, |pinner| {
        drop(pinner);
        Ok(())
    })
}

/// A pipe is the holder.
fn splice_outlives_the_file<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let hold = |buf: &Buffer| {
        let (reader, writer) = sys::pipe().or_fail("pipe")?;
        buf.vmsplice_to(&writer, 0, 2).or_fail("vmsplice")?;
        Ok((reader, writer))
    };
    held_at_close(ctx, NODE, hold, |(reader, _writer)| {
        expect_from(&reader, 1605, 0, 2)
    })
}

fn vsock_pair() -> Outcome<(File, File)> {
    vsock::pair().map_err(|e| Fail::Skip(format!("no vsock: {e}")))
}

/// Reads `n` pages of a pattern from a socket or a pipe.
fn expect_from(file: &File, seed: u64, first: usize, n: usize) -> Outcome {
    let mut data = vec![0; n * PAGE];
    let there = sys::readable(file, Duration::from_secs(5)).or_fail("poll")?;
    check!(there, "data: expected some in 5 s");
    std::io::Read::read_exact(&mut &*file, &mut data).or_fail("read")?;
    check_bytes(&data, seed, first, "data that was read")
}

/// A socket is the holder, which has not been read from. What is read at last was not copied before.
fn socket_outlives_the_file<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let hold = |buf: &Buffer| {
        let (one, other) = vsock_pair()?;
        let sent = vsock::send(&one, buf, 1, 2).or_fail("send with MSG_ZEROCOPY")?;
        check_eq!(sent, 2 * PAGE, "bytes sent");
        Ok((one, other))
    };
    held_at_close(ctx, NODE, hold, |(_one, other)| {
        expect_from(&other, 1605, 1, 2)
    })
}

/// A socket that is to send PRIVATE pages gets them back to system memory, and holds them there: they do
/// not go to the device until they are read.
fn socket_gets_pages_back(ctx: &Ctx) -> Outcome {
    const N: usize = 8;
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(N, 1607)?;
    target.move_all(&buf, 1607)?;
    let (one, other) = vsock_pair()?;
    let sent = vsock::send(&one, &buf, 2, 4).or_fail("send with MSG_ZEROCOPY")?;
    check_eq!(sent, 4 * PAGE, "bytes sent");
    target.expect(&buf, 2, 4, 0)?;
    let held = target.to_device(&buf, 0, N);
    expect_errno(held, &[libc::ENOENT], "MIGRATE_TO_DEV of held pages")?;
    target.expect(&buf, 2, 4, 0)?;
    let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
    check_eq!(audit.found, 0, "violations, {records:x?}");
    expect_from(&other, 1607, 2, 4)?;
    drop((one, other));
    target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
    target.move_all(&buf, 1607)?;
    // A message that nobody reads ends with its sockets.
    let (one, other) = vsock_pair()?;
    let sent = vsock::send(&one, &buf, 0, N).or_fail("send with MSG_ZEROCOPY")?;
    check_eq!(sent, N * PAGE, "bytes sent");
    drop(target);
    buf.check(0, N, 1607)?;
    drop(one);
    drop(other);
    let target = Target::open(ctx, PRIVATE)?;
    let moved = sys::wait_until(Duration::from_secs(5), || {
        target.to_device(&buf, 0, N).is_ok()
    });
    check!(
        moved,
        "pages that nobody holds: expected them to move in 5 s"
    );
    buf.check(0, N, 1607)
}

/// A task that loses its processor in the midst of a migration, for longer than a scan looks, is no
/// violation: any user can see to that by many threads on one processor.
fn starved_migrations(ctx: &Ctx) -> Outcome {
    const WORKERS: usize = 48;
    const N: usize = 16;
    let target = Target::open(ctx, PRIVATE)?;
    let before = target.audit()?.0.total;
    if sys::run_on(1).is_err() {
        return Err(Fail::Skip("only one processor".into()));
    }
    let workers = (0..WORKERS)
        .map(|_| {
            Child::spawn(|| {
                sys::run_on(0).or_fail("sched_setaffinity")?;
                let device = Device::open(0)?;
                let buf = Buffer::filled(N, 1606)?;
                for round in 0.. {
                    // A page may stay where it is.
                    let _ = device.to_device(&buf, 0, N);
                    if round % 2 == 0 {
                        let _ = device.to_system(&buf, 0, N);
                    }
                    buf.check(0, N, 1606)?;
                }
                Ok(())
            })
        })
        .collect::<Outcome<Vec<_>>>()?;
    let end = Instant::now() + Duration::from_secs(10);
    let (mut scans, mut used) = (0, 0);
    while Instant::now() < end {
        let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
        check_eq!(audit.found, 0, "violations that a scan found, {records:x?}");
        check_eq!(audit.total, before, "violations, {records:x?}");
        used = used.max(audit.used);
        scans += 1;
    }
    for worker in workers {
        check!(worker.is_running()?, "a process: expected it to run");
        worker.kill()?;
    }
    note(&format!("{scans} scans, {used} pages in use at most"));
    check!(used > 0, "pages in use: expected some");
    target.expect_empty()?;
    target.expect_violations(before)?;
    Ok(())
}
