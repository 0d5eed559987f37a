// SPDX-License-Identifier: GPL-2.0

//! Device files are closed and processes end while pages are on the device.

use std::io::{Read, Write};

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, check_bytes};
use crate::harness::{Child, note};
use crate::sys;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("close.while_migrated", while_migrated::<PRIVATE>),
    test("close.other_opener_keeps", other_opener_keeps::<PRIVATE>),
    test("close.after_fork", after_fork::<PRIVATE>),
    test("close.fd_outlives_mm", fd_outlives_mm::<PRIVATE>),
    test("close.in_each_place", in_each_place::<PRIVATE>),
    test("close_generic.while_migrated", while_migrated::<GENERIC>),
    test(
        "close_generic.other_opener_keeps",
        other_opener_keeps::<GENERIC>,
    ),
    test("close_generic.after_fork", after_fork::<GENERIC>),
    test("close_generic.fd_outlives_mm", fd_outlives_mm::<GENERIC>),
    test("close_generic.in_each_place", in_each_place::<GENERIC>),
];

fn while_migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 60)?;
    device.move_all(&buf, 60)?;
    drop(device);
    // The data is right wherever the pages are now.
    buf.check(0, PAGES, 60)?;
    buf.fill(0, PAGES, 61);

    // A new file is independent of the old one.
    let device = Target::open(ctx, NODE)?;
    device.move_all(&buf, 61)?;
    buf.check(0, PAGES, 61)
}

/// Closing a file evicts only its own pages; the C driver evicts the pages of all files.
fn other_opener_keeps<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let mine = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 62)?;
    mine.move_all(&buf, 62)?;

    // The other file belongs to another process.
    Child::spawn(|| {
        let device = Target::open(ctx, NODE)?;
        let buf = Buffer::filled(PAGES, 63)?;
        device.move_all(&buf, 63)?;
        drop(device);
        buf.check(0, PAGES, 63)
    })?
    .join()?;
    let left = mine.on_device(&buf, 0, PAGES)?;
    note(&format!(
        "{left} of {PAGES} pages left after another process closed"
    ));
    let read = mine.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 62, 0, "READ after another process closed")?;

    // The other file belongs to the same process.
    buf.check(0, PAGES, 62)?;
    mine.bring_back(&buf, 0, PAGES)?;
    mine.move_all(&buf, 62)?;
    let other = Target::open(ctx, NODE)?;
    let second = Buffer::filled(PAGES, 64)?;
    other.move_all(&second, 64)?;
    drop(other);
    let read = mine.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 62, 0, "READ after another file was closed")?;
    second.check(0, PAGES, 64)?;
    buf.check(0, PAGES, 62)
}

/// A file that fork shares mirrors the process that opened it.
fn after_fork<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 65)?;
    let before = device.stats()?;
    let (mut wait, go) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        // If the child asks for a migration, the parent's pages move, or the driver refuses.
        match device.to_device(&buf, 0, PAGES) {
            Ok(moved) => check_bytes(&moved.data, 65, 0, "returned data")?,
            Err(e) => note(&format!("MIGRATE_TO_DEV by a child: {e}")),
        }
        buf.check(0, PAGES, 65)?;
        // Wait until the parent has closed its file.
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        buf.check(0, PAGES, 65)
    })?;
    // The parent uses the file at the same time.
    match device.to_device(&buf, 0, PAGES) {
        Ok(moved) => check_bytes(&moved.data, 65, 0, "returned data")?,
        // The parent shares its pages with the child, which may be holding one.
        Err(e) => note(&format!("MIGRATE_TO_DEV by the parent: {e}")),
    }
    let went = device.stats()?.to_device.wrapping_sub(before.to_device);
    check!(went > 0, "pages that went: expected some, found none");
    // The child still has the file, so this is not the last close.
    drop(device);
    buf.check(0, PAGES, 65)?;
    (&go).write_all(b"g").or_fail("pipe")?;
    child.join()?;
    buf.fill(0, PAGES, 66);
    buf.check(0, PAGES, 66)
}

/// The last holder of the file is not the process whose memory it mirrors, and that memory no
/// longer exists.
fn fd_outlives_mm<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let (mut done, held) = sys::pipe().or_fail("pipe")?;
    let (mut gone, go) = sys::pipe().or_fail("pipe")?;
    let middle = Child::spawn(|| {
        let device = Target::open(ctx, NODE)?;
        let buf = Buffer::filled(PAGES, 67)?;
        device.move_all(&buf, 67)?;
        Child::spawn(|| {
            // This pipe ends when the test has seen the end of the child.
            gone.read_exact(&mut [0]).or_fail("pipe")?;
            let what = "on a file whose process is gone";
            let n = PAGES;
            let result = device.read(&buf, 0, n);
            expect_errno(result, &[libc::EFAULT], &format!("READ {what}"))?;
            let result = device.to_device(&buf, 0, n);
            expect_errno(result, &[libc::EINVAL], &format!("MIGRATE_TO_DEV {what}"))?;
            let result = device.to_system(&buf, 0, n);
            expect_errno(result, &[libc::EINVAL], &format!("MIGRATE_TO_SYS {what}"))?;
            drop(device);
            buf.check(0, n, 67)
        })?;
        Ok(())
    })?;
    drop(held);
    middle.join()?;
    (&go).write_all(b"g").or_fail("pipe")?;
    // The grandchild reports its own failures; its end closes the pipe.
    done.read_to_end(&mut Vec::new()).or_fail("pipe")?;
    Ok(())
}

/// All pages of a file that is closed come back, wherever they are mapped: where they were written first, at
/// another place, in an area that nobody may read, in a child too, and between pages of another file, which stay.
fn in_each_place<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const N: usize = 48;
    let observer = Target::open(ctx, NODE)?;
    let device = Target::open(ctx, NODE)?;
    let filled = || {
        let buf = Buffer::filled(N, 68)?;
        device.move_all(&buf, 68)?;
        Ok(buf)
    };
    let (first, hidden, shared) = (filled()?, filled()?, filled()?);
    let moved = filled()?.move_to_another_place()?;
    hidden.protect(0, N, libc::PROT_NONE)?;
    // Each second page is one of another file.
    let between = Buffer::filled(N, 68)?;
    for page in 0..N {
        let file = if page % 2 == 0 { &device } else { &observer };
        let moved = file.to_device(&between, page, 1);
        check_eq!(
            moved.or_fail("MIGRATE_TO_DEV")?.cpages,
            1,
            "pages that went"
        );
    }
    let (mut wait, go) = sys::pipe().or_fail("pipe")?;
    let (mut closed, tell) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        // The parent has the last descriptor of the file.
        device.close_under_all().or_fail("dup3")?;
        (&tell).write_all(b"c").or_fail("pipe")?;
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        shared.check(0, N, 68)
    })?;
    closed.read_exact(&mut [0]).or_fail("pipe")?;
    let before = observer.stats()?.evicted;
    drop(device);
    let evicted = observer.stats()?.evicted.wrapping_sub(before);
    check_eq!(
        evicted,
        4 * N as u64 + N as u64 / 2,
        "growth of stats.evicted"
    );
    for (buf, what) in [
        (&first, "where they were written"),
        (&hidden, "that nobody may read"),
        (&shared, "that a child has"),
        (&moved, "that were moved"),
    ] {
        let left = observer.on_device(buf, 0, N)?;
        check_eq!(left, 0, "device pages {what}");
    }
    let left = observer.on_device(&between, 0, N)?;
    check_eq!(left, N / 2, "device pages of the other file");
    (&go).write_all(b"g").or_fail("pipe")?;
    child.join()?;
    hidden.protect(0, N, libc::PROT_READ | libc::PROT_WRITE)?;
    for buf in [&first, &hidden, &shared, &moved, &between] {
        buf.check(0, N, 68)?;
    }
    Ok(())
}
