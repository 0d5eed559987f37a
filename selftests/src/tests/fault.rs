// SPDX-License-Identifier: GPL-2.0

//! The CPU touches pages that are on the device.

use std::io::Read;

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, expect_present, freed_since, test};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, PAGE, check_bytes, pattern_bytes};
use crate::sys;
use crate::threads;
use crate::uapi::Stats;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("fault.cpu_read", cpu_read::<PRIVATE>),
    test("fault.cpu_write", cpu_write::<PRIVATE>),
    test("fault.every_other_page", every_other_page::<PRIVATE>),
    test("fault.from_threads", from_threads::<PRIVATE>),
    test("fault.syscall_access", syscall_access::<PRIVATE>),
    test("fault_generic.cpu_read", cpu_read::<GENERIC>),
    test("fault_generic.cpu_write", cpu_write::<GENERIC>),
    test(
        "fault_generic.every_other_page",
        every_other_page::<GENERIC>,
    ),
    test("fault_generic.from_threads", from_threads::<GENERIC>),
    test("fault_generic.syscall_access", syscall_access::<GENERIC>),
];

/// Checks that CPU faults alone have brought `n` pages back; or, where the CPU maps device pages,
/// that there was no fault and the pages have stayed.
#[track_caller]
fn faulted_back(device: &Target, before: &Stats, buf: &Buffer, n: usize) -> Outcome {
    let faults = device.stats()?.cpu_faults.wrapping_sub(before.cpu_faults);
    if device.cpu_maps() {
        check_eq!(faults, 0, "growth of stats.cpu_faults");
        return device.expect(buf, 0, n, n);
    }
    // A driver may bring neighbours along, so there may be fewer faults.
    check!(
        (1..=n as u64).contains(&faults),
        "growth of stats.cpu_faults: expected 1..={n}, found {faults}"
    );
    expect_present(buf, 0, n)?;
    freed_since(device, before, n)
}

fn cpu_read<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 20)?;
    device.move_all(&buf, 20)?;
    let before = device.stats()?;
    buf.check(0, PAGES, 20)?;
    faulted_back(&device, &before, &buf, PAGES)?;
    // The pages are writable, not read-only copies.
    buf.fill(0, PAGES, 21);
    buf.check(0, PAGES, 21)
}

fn cpu_write<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 22)?;
    device.move_all(&buf, 22)?;
    let before = device.stats()?;
    // The CPU writes one word of each page: the rest must have come from the device.
    for page in 0..PAGES {
        buf.set(page, 100, page as u64);
    }
    faulted_back(&device, &before, &buf, PAGES)?;
    let good = pattern_bytes(22, 0, PAGES);
    for page in 0..PAGES {
        check_eq!(
            buf.get(page, 100),
            page as u64,
            "word written to page {page}"
        );
        let word = &good[page * PAGE + 800..][..8];
        let value = word.iter().rev().fold(0, |n, b| (n << 8) | u64::from(*b));
        buf.set(page, 100, value);
    }
    buf.check(0, PAGES, 22)
}

fn every_other_page<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 23)?;
    device.move_all(&buf, 23)?;
    for page in (0..PAGES).step_by(2) {
        buf.check(page, 1, 23)?;
        device.bring_back(&buf, page, 1)?;
        expect_present(&buf, page, 1)?;
    }
    // The device reads both halves of a mixed range.
    let read = device
        .read(&buf, 0, PAGES)
        .or_fail("READ of a mixed range")?;
    check_bytes(&read.data, 23, 0, "READ of a mixed range")?;
    for page in (1..PAGES).step_by(2) {
        buf.check(page, 1, 23)?;
        device.bring_back(&buf, page, 1)?;
    }
    expect_present(&buf, 0, PAGES)?;

    // Half of them migrate again and lie between the others.
    for page in (1..PAGES).step_by(2) {
        device.to_device(&buf, page, 1).or_fail("MIGRATE_TO_DEV")?;
        device.expect(&buf, page, 1, 1)?;
    }
    buf.check(0, PAGES, 23)
}

fn from_threads<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const THREADS: usize = 4;
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 24)?;
    for round in 0..5 {
        device.move_all(&buf, 24)?;
        let before = device.stats()?;
        let start = std::sync::Barrier::new(THREADS);
        threads::run(THREADS, |_| {
            start.wait();
            buf.check(0, PAGES, 24)
        })?;
        if device.cpu_maps() {
            faulted_back(&device, &before, &buf, PAGES)?;
            device.bring_back(&buf, 0, PAGES)?;
            continue;
        }
        expect_present(&buf, 0, PAGES)?;
        let back = device.stats()?.to_system.wrapping_sub(before.to_system);
        check_eq!(back, PAGES as u64, "pages that came back in round {round}");
        freed_since(&device, &before, PAGES)?;
    }
    Ok(())
}

/// The kernel itself faults when the buffer of a system call is on the device.
fn syscall_access<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 25)?;

    device.move_all(&buf, 25)?;
    let file = sys::memfd("zdm-syscall").or_fail("memfd_create")?;
    let n = buf.write_to(&file, 0, PAGES).or_fail("write to a memfd")?;
    check_eq!(n, PAGES * PAGE, "bytes written");
    let mut data = vec![0; n];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut data, 0).or_fail("pread")?;
    check_bytes(&data, 25, 0, "data in the memfd")?;
    expect_present(&buf, 0, PAGES)?;
    device.bring_back(&buf, 0, PAGES)?;

    // A pipe of the default size takes 16 pages.
    device.move_all(&buf, 25)?;
    let (mut read, write) = sys::pipe().or_fail("pipe")?;
    let n = buf.write_to(&write, 0, 8).or_fail("write to a pipe")?;
    check_eq!(n, 8 * PAGE, "bytes written to the pipe");
    let mut data = vec![0; n];
    read.read_exact(&mut data).or_fail("read from the pipe")?;
    check_bytes(&data, 25, 0, "data in the pipe")?;

    // In the other direction the kernel writes to pages on the device.
    buf.check(0, PAGES, 25)?;
    device.bring_back(&buf, 0, PAGES)?;
    device.move_all(&buf, 25)?;
    let other = Buffer::filled(PAGES, 26)?;
    let file = sys::memfd("zdm-syscall").or_fail("memfd_create")?;
    other.write_to(&file, 0, PAGES).or_fail("write")?;
    std::io::Seek::rewind(&mut &file).or_fail("lseek")?;
    let n = buf.read_from(&file, 0, PAGES).or_fail("read")?;
    check_eq!(n, PAGES * PAGE, "bytes read");
    buf.check(0, PAGES, 26)
}
