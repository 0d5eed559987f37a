// SPDX-License-Identifier: GPL-2.0

//! The device reads and writes the process's memory.

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, PAGE, check_bytes, pattern_bytes};
use crate::uapi::HMM_READ;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("device.read", read::<PRIVATE>),
    test("device.write", write::<PRIVATE>),
    test("device.read_migrated", read_migrated::<PRIVATE>),
    test("device.write_migrated", write_migrated::<PRIVATE>),
    test("device.read_unmapped", read_unmapped::<PRIVATE>),
    test("device.write_read_only", write_read_only::<PRIVATE>),
    test("device_generic.read", read::<GENERIC>),
    test("device_generic.write", write::<GENERIC>),
    test("device_generic.read_migrated", read_migrated::<GENERIC>),
    test("device_generic.write_migrated", write_migrated::<GENERIC>),
    test("device_generic.read_unmapped", read_unmapped::<GENERIC>),
    test("device_generic.write_read_only", write_read_only::<GENERIC>),
];

fn read<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 30)?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_eq!(read.cpages, PAGES as u64, "copied pages");
    check!(read.faults >= 1, "device faults: expected some, found 0");
    check_bytes(&read.data, 30, 0, "READ")?;

    // The next write of the CPU must invalidate the device's mapping.
    buf.fill(0, PAGES, 31);
    let read = device.read(&buf, 0, PAGES).or_fail("second READ")?;
    check_bytes(&read.data, 31, 0, "second READ")?;

    // Memory that was never touched reads as zeroes.
    let fresh = Buffer::anon(4)?;
    let read = device.read(&fresh, 0, 4).or_fail("READ of fresh memory")?;
    let nonzero = read.data.iter().position(|b| *b != 0);
    check_eq!(nonzero, None, "first byte of fresh memory that is not 0");

    // After munmap and mmap the same address has other memory.
    buf.unmap(0, PAGES)?;
    buf.map_again(0, PAGES)?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ of new memory")?;
    let nonzero = read.data.iter().position(|b| *b != 0);
    check_eq!(nonzero, None, "first byte of new memory that is not 0");
    Ok(())
}

fn write<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 32)?;
    let data = pattern_bytes(33, 0, PAGES);
    let cmd = device.write(&buf, 0, &data).or_fail("WRITE")?;
    check_eq!(cmd.cpages, PAGES as u64, "copied pages");
    check!(cmd.faults >= 1, "device faults: expected some, found 0");
    buf.check(0, PAGES, 33)?;

    // The device writes to a part of the range, and its pages do not exist yet.
    let fresh = Buffer::anon(PAGES)?;
    let part = pattern_bytes(34, 8, 8);
    device.write(&fresh, 8, &part).or_fail("WRITE to a part")?;
    fresh.check_zero(0, 8)?;
    fresh.check(8, 8, 34)?;
    fresh.check_zero(16, PAGES - 16)
}

/// The device reads its own memory, and no page moves.
fn read_migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 35)?;
    device.move_all(&buf, 35)?;
    let before = device.stats()?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 35, 0, "READ of the device's own pages")?;
    let after = device.stats()?;
    check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults");
    check_eq!(
        after.to_system,
        before.to_system,
        "pages moved to the system"
    );
    device.expect(&buf, 0, PAGES, PAGES)?;

    // The device's page table of another file is empty: the driver has to look the pages up, and
    // finds that they are the device's own.
    let other = Target::open(ctx, NODE)?;
    let read = other.read(&buf, 0, PAGES).or_fail("READ by another file")?;
    check_bytes(&read.data, 35, 0, "READ by another file")?;
    check_eq!(device.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
    device.expect(&buf, 0, PAGES, PAGES)
}

fn write_migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 36)?;
    device.move_all(&buf, 36)?;
    let before = device.stats()?;
    let data = pattern_bytes(37, 0, PAGES);
    device.write(&buf, 0, &data).or_fail("WRITE")?;
    check_eq!(device.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
    device.expect(&buf, 0, PAGES, PAGES)?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 37, 0, "READ of what the device wrote")?;
    buf.check(0, PAGES, 37)
}

fn read_unmapped<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 38)?;
    buf.unmap(16, 8)?;
    let errnos = [libc::EFAULT, libc::ENOENT, libc::EINVAL];
    expect_errno(device.read(&buf, 16, 8), &errnos, "READ of a hole")?;
    expect_errno(device.read(&buf, 0, PAGES), &errnos, "READ across a hole")?;
    let mut into = vec![0xa5; 8 * PAGE];
    let result = device.command(HMM_READ, buf.at(16), 8, Data::Into(&mut into));
    expect_errno(result, &errnos, "READ of a hole")?;
    let touched = into.iter().position(|b| *b != 0xa5);
    check_eq!(touched, None, "first byte written by a READ that failed");
    let data = vec![0; 8 * PAGE];
    expect_errno(device.write(&buf, 16, &data), &errnos, "WRITE to a hole")?;
    buf.check(0, 16, 38)?;
    buf.check(24, PAGES - 24, 38)
}

/// The device has no more rights than the process.
fn write_read_only<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 39)?;
    let data = pattern_bytes(40, 0, PAGES);
    // The device writes once while it may, so that there is a stale right to revoke.
    device.write(&buf, 0, &data).or_fail("WRITE while it may")?;
    buf.protect(0, PAGES, libc::PROT_READ)?;
    let worse = pattern_bytes(41, 0, PAGES);
    let result = device.write(&buf, 0, &worse);
    expect_errno(result, &[libc::EPERM], "WRITE to read-only memory")?;
    buf.check(0, PAGES, 40)?;

    // Repeats the test with the pages on the device.
    device.move_all(&buf, 40)?;
    let result = device.write(&buf, 0, &worse);
    expect_errno(
        result,
        &[libc::EPERM],
        "WRITE to read-only memory on the device",
    )?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 40, 0, "READ after a WRITE that failed")?;
    buf.check(0, PAGES, 40)
}
