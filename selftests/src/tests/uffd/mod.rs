// SPDX-License-Identifier: GPL-2.0

//! Ranges whose missing pages the process itself provides, by userfaultfd.

pub mod device;
pub mod held;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::{Ctx, PAGES, Test, expect_on_device, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, check_bytes};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::threads;
use crate::uffd::Uffd;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("uffd.missing", missing),
    test("uffd.present", present),
    test("uffd.unlocked", unlocked),
    test("uffd.dontneed", dontneed),
    test("uffd.killed", killed),
];

/// Memory of which a part is registered.
fn registered(first: usize, n: usize) -> Outcome<(Buffer, Uffd)> {
    let buf = Buffer::anon(PAGES)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register(&buf, first, n).or_fail("UFFDIO_REGISTER")?;
    Ok((buf, uffd))
}

/// Provides missing pages from a buffer until it is told to stop, and counts them.
fn answer(
    uffd: &Uffd,
    buf: &Buffer,
    from: &Buffer,
    count: &AtomicUsize,
    stop: &AtomicBool,
) -> Outcome {
    while !stop.load(Ordering::SeqCst) {
        let event = uffd
            .next(Duration::from_millis(20))
            .or_fail("userfaultfd")?;
        let Some(address) = event else { continue };
        let page = (address - buf.at(0)) as usize / 4096;
        match uffd.copy(address, from, page) {
            // Another fault on the same page has already been answered.
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            result => result.or_fail("UFFDIO_COPY")?,
        }
        count.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// Runs `body` while a thread answers. Returns the number of pages that the thread provided.
fn answered(
    uffd: &Uffd,
    buf: &Buffer,
    from: &Buffer,
    body: impl FnOnce() -> Outcome,
) -> Outcome<usize> {
    let (count, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (outcome, thread) = std::thread::scope(|scope| {
        let thread = scope.spawn(|| answer(uffd, buf, from, &count, &stop));
        let outcome = body();
        stop.store(true, Ordering::SeqCst);
        (outcome, threads::join(thread))
    });
    outcome?;
    thread?;
    Ok(count.into_inner())
}

/// Missing pages of a registered range stay missing: a migration never faults, and the device
/// cannot wait for the process.
fn missing(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    // A huge page does not fill a hole for which the process is asked, either.
    let huge = Buffer::anon_huge_aligned(HUGE_PAGES)?;
    huge.advise(0, HUGE_PAGES, libc::MADV_HUGEPAGE)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register(&huge, 0, HUGE_PAGES)
        .or_fail("UFFDIO_REGISTER")?;
    let result = device.to_device(&huge, 0, HUGE_PAGES);
    expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of a huge hole")?;
    check_eq!(
        proc::on_device(&huge, 0, HUGE_PAGES)?.len(),
        0,
        "device pages of a huge hole"
    );
    check_eq!(
        proc::present(&huge, 0, HUGE_PAGES)?,
        0,
        "present pages of a huge hole"
    );
    drop((huge, uffd));
    let (buf, uffd) = registered(0, PAGES)?;
    let before = device.stats()?;
    let result = device.to_device(&buf, 0, PAGES);
    expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of missing pages")?;
    check_eq!(proc::on_device(&buf, 0, PAGES)?.len(), 0, "device pages");
    let after = device.stats()?;
    check_eq!(after.to_device, before.to_device, "pages that went");
    let freed = after.freed.wrapping_sub(before.freed);
    let allocated = after.allocated.wrapping_sub(before.allocated);
    check_eq!(freed, allocated, "pages freed again");
    let result = device.read(&buf, 0, 4);
    expect_errno(result, &[libc::EFAULT], "READ of missing pages")?;
    let result = device.fault(buf.at(0), 4, 0);
    expect_errno(result, &[libc::EFAULT], "ZDM_FAULT of missing pages")?;
    check_eq!(proc::present(&buf, 0, PAGES)?, 0, "present pages");
    let event = uffd.next(Duration::ZERO).or_fail("userfaultfd")?;
    check_eq!(event, None, "event");
    Ok(())
}

/// Present pages migrate and come back without an event, because a page on the device is not
/// missing.
fn present(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 450)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register(&buf, 0, PAGES).or_fail("UFFDIO_REGISTER")?;
    device.move_all(&buf, 450)?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 450, 0, "READ")?;
    buf.check(0, PAGES / 2, 450)?;
    device.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
    buf.check(0, PAGES, 450)?;
    let event = uffd.next(Duration::ZERO).or_fail("userfaultfd")?;
    check_eq!(event, None, "event");

    // The rest beside a registered part is not affected.
    let (buf, _uffd) = registered(8, 8)?;
    buf.fill(0, 8, 451);
    let result = device.to_device(&buf, 0, PAGES);
    expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of a mixture")?;
    expect_on_device(&buf, 8, 8, 0)?;
    expect_on_device(&buf, 0, PAGES, PAGES - 8)?;
    buf.check(0, 8, 451)?;
    buf.check_zero(16, PAGES - 16)
}

/// A device that can wait gets its pages from the process, and so does the CPU.
fn unlocked(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let (buf, uffd) = registered(0, PAGES)?;
    let from = Buffer::filled(PAGES, 452)?;
    let pages = answered(&uffd, &buf, &from, || {
        let read = device.read_unlocked(&buf, 0, 40).or_fail("READ_UNLOCKED")?;
        check_eq!(read.cpages, 40, "copied pages");
        check!(read.faults >= 1, "device faults: expected some, found 0");
        check_bytes(&read.data, 452, 0, "READ_UNLOCKED")?;
        buf.check(40, PAGES - 40, 452)
    })?;
    check!(
        (PAGES..=2 * PAGES).contains(&pages),
        "pages asked for: expected {PAGES}, found {pages}"
    );
    // Now that the pages exist, everything works without an event.
    device.move_all(&buf, 452)?;
    let read = device
        .read_unlocked(&buf, 0, PAGES)
        .or_fail("READ_UNLOCKED")?;
    check_bytes(&read.data, 452, 0, "READ_UNLOCKED of device pages")?;
    expect_on_device(&buf, 0, PAGES, PAGES)?;
    buf.check(0, PAGES, 452)?;
    let event = uffd.next(Duration::ZERO).or_fail("userfaultfd")?;
    check_eq!(event, None, "event");
    Ok(())
}

/// A page that is dropped on the device is missing again.
fn dontneed(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 453)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register(&buf, 0, PAGES).or_fail("UFFDIO_REGISTER")?;
    device.move_all(&buf, 453)?;
    let before = device.stats()?;
    buf.advise(8, 8, libc::MADV_DONTNEED)?;
    super::freed_since(&device, &before, 8)?;
    let result = device.to_device(&buf, 0, PAGES);
    expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of missing pages")?;
    expect_on_device(&buf, 8, 8, 0)?;
    let from = Buffer::filled(PAGES, 454)?;
    let pages = answered(&uffd, &buf, &from, || {
        let read = device
            .read_unlocked(&buf, 0, PAGES)
            .or_fail("READ_UNLOCKED")?;
        check_bytes(&read.data[8 * 4096..16 * 4096], 454, 8, "new pages")?;
        check_bytes(&read.data[16 * 4096..], 453, 16, "old pages")
    })?;
    check!(
        (8..=16).contains(&pages),
        "pages asked for: expected 8, found {pages}"
    );
    buf.check(0, 8, 453)?;
    buf.check(8, 8, 454)?;
    buf.check(16, PAGES - 16, 453)
}

/// A process that waits for an answer that never comes can be killed.
fn killed(_: &Ctx) -> Outcome {
    for round in 0..4 {
        let (ready, go) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            let device = Device::open(0)?;
            let (buf, _uffd) = registered(0, PAGES)?;
            let near = Buffer::filled(PAGES, 455)?;
            device.move_all(&near, 455)?;
            std::io::Write::write_all(&mut &go, b"g").or_fail("pipe")?;
            match round % 2 {
                0 => drop(device.read_unlocked(&buf, 0, PAGES)),
                _ => check_eq!(buf.get(0, 0), 0, "a word that never comes"),
            }
            Err(Fail::failed(
                "waiting for an answer: expected no end, found one",
            ))
        })?;
        drop(go);
        let begun = sys::readable(&ready, Duration::from_secs(20)).or_fail("poll")?;
        std::thread::sleep(Duration::from_millis(30));
        let exit = child.kill()?;
        check!(begun, "the child: expected news, found none");
        check_eq!(exit, Exit::Signal(libc::SIGKILL), "end in round {round}");
    }
    Ok(())
}
