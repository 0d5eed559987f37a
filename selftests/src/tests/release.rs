// SPDX-License-Identifier: GPL-2.0

//! HMM_DMIRROR_RELEASE: the device gives up its memory, and the processes keep their data.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, PAGES, Test, expect_present, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, check_bytes};
use crate::harness::{Child, note};
use crate::sys;
use crate::uapi::{HMM_RELEASE, IOC_READ_WRITE, ioc};
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("release.own", own::<PRIVATE>),
    test("release.idle", idle),
    test("release.others", others::<PRIVATE>),
    test("release.one_device", one_device),
    test("release.race", race::<PRIVATE>),
    test("release_coherent.own", own::<COHERENT>),
    test("release_coherent.others", others::<COHERENT>),
    test("release_coherent.race", race::<COHERENT>),
    test("release_generic.own", own::<GENERIC>),
    test("release_generic.others", others::<GENERIC>),
    test("release_generic.race", race::<GENERIC>),
];

/// Small and huge pages come back, and can migrate again, repeatedly.
fn own<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let small = Buffer::filled(PAGES, 360)?;
    for round in 0..3 {
        let huge = huge_filled(1, 361)?;
        target.move_all(&small, 360)?;
        target.move_huge(&huge, 361)?;
        let before = target.stats()?;
        target.release().or_fail("RELEASE")?;
        for buf in [&small, &huge] {
            target.expect(buf, 0, buf.pages(), 0)?;
            expect_present(buf, 0, buf.pages())?;
        }
        let after = target.stats()?;
        check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults");
        let freed = after.freed.wrapping_sub(before.freed);
        check_eq!(
            freed,
            (PAGES + HUGE_PAGES) as u64,
            "growth of stats.freed in round {round}"
        );
        target.expect_empty()?;
        // The device must not use its old mappings any more.
        let read = target.read(&small, 0, PAGES).or_fail("READ")?;
        check_bytes(&read.data, 360, 0, "READ after RELEASE")?;
        small.check(0, PAGES, 360)?;
        huge.check(0, HUGE_PAGES, 361)?;
    }
    target.move_all(&small, 360)?;
    small.check(0, PAGES, 360)
}

/// RELEASE without pages, twice, and with a bad range, which is refused like any other.
fn idle(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    for _ in 0..3 {
        target.release().or_fail("RELEASE of nothing")?;
        target.expect_empty()?;
    }
    let mut arg = [0u8; 40];
    arg[..8].copy_from_slice(&1u64.to_ne_bytes());
    arg[16..24].copy_from_slice(&1u64.to_ne_bytes());
    let result = target.ioctl_bytes(HMM_RELEASE, &mut arg);
    expect_errno(result, &[libc::EINVAL], "RELEASE with an unaligned address")?;
    let result = target.ioctl_bytes(ioc(IOC_READ_WRITE, 0x07, 24), &mut arg);
    let errnos = [libc::ENOTTY, libc::EINVAL];
    expect_errno(result, &errnos, "RELEASE of another size")?;
    let buf = Buffer::filled(4, 362)?;
    target.move_all(&buf, 362)?;
    buf.check(0, 4, 362)
}

/// Pages of another process may come back; its data must stay the same, and its file must still
/// work.
fn others<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let (mut ready, there) = sys::pipe().or_fail("pipe")?;
    let (mut wait, go) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        let target = Target::open(ctx, NODE)?;
        let small = Buffer::filled(PAGES, 363)?;
        let huge = huge_filled(1, 364)?;
        target.move_all(&small, 363)?;
        target.move_huge(&huge, 364)?;
        (&there).write_all(b"r").or_fail("pipe")?;
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        let left = target.on_device(&small, 0, PAGES)?;
        note(&format!(
            "{left} of {PAGES} pages left after another's RELEASE"
        ));
        let read = target.read(&small, 0, PAGES).or_fail("READ")?;
        check_bytes(&read.data, 363, 0, "READ after another's RELEASE")?;
        small.check(0, PAGES, 363)?;
        huge.check(0, HUGE_PAGES, 364)?;
        target.bring_back(&small, 0, PAGES)?;
        target.move_all(&small, 363)?;
        small.check(0, PAGES, 363)
    })?;
    // The end of the child also ends this read.
    check_eq!(
        ready.read(&mut [0]).or_fail("pipe")?,
        1,
        "news of the child"
    );
    let buf = Buffer::filled(PAGES, 365)?;
    target.move_all(&buf, 365)?;
    target.release().or_fail("RELEASE")?;
    target.expect(&buf, 0, PAGES, 0)?;
    buf.check(0, PAGES, 365)?;
    (&go).write_all(b"g").or_fail("pipe")?;
    child.join()?;
    target.expect_empty()
}

/// The other device keeps its memory.
fn one_device(ctx: &Ctx) -> Outcome {
    let zero = Target::open(ctx, PRIVATE)?;
    let one = Target::open(ctx, PRIVATE + 1)?;
    let (a, b) = (Buffer::filled(PAGES, 366)?, Buffer::filled(PAGES, 367)?);
    zero.move_all(&a, 366)?;
    one.move_all(&b, 367)?;
    zero.release().or_fail("RELEASE")?;
    zero.expect(&a, 0, PAGES, 0)?;
    one.expect(&b, 0, PAGES, PAGES)?;
    check_eq!(one.audit()?.0.found, 0, "violations on the other device");
    a.check(0, PAGES, 366)?;
    b.check(0, PAGES, 367)
}

/// Other processes migrate faster than the device can evict: all make progress, and no data is
/// lost.
fn race<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const ROUNDS: usize = 10;
    const OTHERS: usize = 3;
    const LIMIT: Duration = Duration::from_secs(20);
    let target = Target::open(ctx, NODE)?;
    let (mut ready, there) = sys::pipe().or_fail("pipe")?;
    let (stop, mut stopped) = sys::pipe().or_fail("pipe")?;
    let before = target.stats()?;
    let other = || {
        let target = Target::open(ctx, NODE)?;
        let buf = Buffer::filled(PAGES, 368)?;
        let mut said = false;
        while !sys::readable(&stop, Duration::ZERO).or_fail("poll")? {
            match target.to_device(&buf, 0, PAGES) {
                Ok(moved) => check_bytes(&moved.data, 368, 0, "data in a race")?,
                // The pages moved away before the data was read, or there was no memory for a
                // moment.
                Err(e) => check_eq!(
                    e.raw_os_error(),
                    Some(libc::ENOENT),
                    "errno of MIGRATE_TO_DEV in a race"
                ),
            }
            buf.check(0, PAGES, 368)?;
            if !said {
                (&there).write_all(b"r").or_fail("pipe")?;
                said = true;
            }
        }
        buf.check(0, PAGES, 368)
    };
    let children = (0..OTHERS)
        .map(|_| Child::spawn(other))
        .collect::<Outcome<Vec<_>>>()?;
    for _ in 0..OTHERS {
        let read = ready.read(&mut [0]).or_fail("pipe")?;
        check_eq!(read, 1, "news of a child");
    }
    let begun = Instant::now();
    let mut refused = 0;
    for round in 0..ROUNDS {
        // Pages that are moving at that time may cause an error, but no hang.
        if let Err(e) = target.release() {
            check_eq!(e.raw_os_error(), Some(libc::EBUSY), "errno of RELEASE");
            refused += 1;
        }
        check!(
            begun.elapsed() < LIMIT,
            "round {round}: expected within {LIMIT:?}, found {:?}",
            begun.elapsed()
        );
        std::thread::sleep(Duration::from_millis(3));
    }
    stopped.write_all(b"s").or_fail("pipe")?;
    children.into_iter().try_for_each(Child::join)?;
    note(&format!("{refused} of {ROUNDS} times EBUSY"));
    let went = target.stats()?.to_device.wrapping_sub(before.to_device);
    check!(went > 0, "pages that went: expected some, found none");
    target.release().or_fail("RELEASE at rest")?;
    target.expect_empty()
}
