// SPDX-License-Identifier: GPL-2.0

//! ZDM_FAULT: the device faults a range in, as for an access, but copies nothing.

use super::target::{COHERENT, GENERIC, PRIVATE, Target, expect_huge, huge_filled};
use super::{Ctx, PAGES, Test, expect_present, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("fault_ioctl.read", read),
    test("fault_ioctl.write", write),
    test("fault_ioctl.read_only", read_only),
    test("fault_ioctl.hole", hole),
    test("fault_ioctl.invalidated", invalidated),
    test("fault_ioctl.huge", huge),
    test("fault_ioctl.migrated", migrated::<PRIVATE>),
    test("fault_ioctl.bad", bad),
    test("fault_ioctl.size", size),
    test("fault_ioctl_coherent.migrated", migrated::<COHERENT>),
    test("fault_ioctl_generic.migrated", migrated::<GENERIC>),
];

/// Faults pages in; all of them must succeed.
#[track_caller]
fn fault(device: &Device, buf: &Buffer, first: usize, n: usize, flags: u32) -> Outcome {
    let mapped = device
        .fault(buf.at(first), n as u64, flags)
        .or_fail("ZDM_FAULT")?;
    match mapped == n as u64 {
        true => Ok(()),
        false => Err(crate::check::Fail::failed(format!(
            "pages that ZDM_FAULT mapped: expected {n}, found {mapped}"
        ))),
    }
}

/// Checks that the device reads pages without a fault.
#[track_caller]
fn reads_at_once(device: &Device, buf: &Buffer, n: usize, seed: u64) -> Outcome {
    let read = device.read(buf, 0, n).or_fail("READ")?;
    check_bytes(&read.data, seed, 0, "READ")?;
    match read.faults {
        0 => Ok(()),
        faults => Err(crate::check::Fail::failed(format!(
            "faults of a READ after ZDM_FAULT: expected 0, found {faults}"
        ))),
    }
}

fn read(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 340)?;
    let before = device.stats()?.device_faults;
    fault(&device, &buf, 0, PAGES, 0)?;
    let counted = device.stats()?.device_faults.wrapping_sub(before);
    check!(
        counted >= 1,
        "growth of stats.device_faults: expected some, found 0"
    );
    reads_at_once(&device, &buf, PAGES, 340)?;

    // Missing pages are made, and read as zeroes.
    let buf = Buffer::anon(PAGES)?;
    fault(&device, &buf, 0, PAGES, 0)?;
    expect_present(&buf, 0, PAGES)?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_eq!(read.faults, 0, "faults of a READ after ZDM_FAULT");
    let nonzero = read.data.iter().position(|b| *b != 0);
    check_eq!(nonzero, None, "first byte that is not 0");
    // The right to read does not include writing: a write takes a fault, and replaces the zero
    // page.
    let data = pattern_bytes(341, 0, 8);
    let cmd = device.write(&buf, 0, &data).or_fail("WRITE")?;
    check!(cmd.faults >= 1, "faults of a WRITE: expected some, found 0");
    buf.check(0, 8, 341)?;
    buf.check_zero(8, PAGES - 8)?;
    Buffer::anon(4)?.check_zero(0, 4)
}

fn write(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::anon(PAGES)?;
    fault(&device, &buf, 0, PAGES, ZDM_FAULT_WRITE)?;
    expect_present(&buf, 0, PAGES)?;
    let data = pattern_bytes(342, 0, PAGES);
    let cmd = device.write(&buf, 0, &data).or_fail("WRITE")?;
    check_eq!(cmd.faults, 0, "faults of a WRITE after ZDM_FAULT");
    buf.check(0, PAGES, 342)?;
    // The right to write includes reading.
    reads_at_once(&device, &buf, PAGES, 342)?;
    // Only the requested pages are faulted in.
    let buf = Buffer::anon(PAGES)?;
    fault(&device, &buf, 8, 8, ZDM_FAULT_WRITE)?;
    check_eq!(proc::present(&buf, 0, PAGES)?, 8, "present pages");
    expect_present(&buf, 8, 8)
}

fn read_only(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 343)?;
    buf.protect(8, 8, libc::PROT_READ)?;
    for (first, n) in [(8, 1), (8, 8), (0, PAGES)] {
        let result = device.fault(buf.at(first), n as u64, ZDM_FAULT_WRITE);
        let what = format!("ZDM_FAULT for writing of {n} pages from {first}");
        expect_errno(result, &[libc::EPERM], &what)?;
    }
    fault(&device, &buf, 0, PAGES, 0)?;
    reads_at_once(&device, &buf, PAGES, 343)?;
    fault(&device, &buf, 16, PAGES - 16, ZDM_FAULT_WRITE)?;
    buf.check(0, PAGES, 343)
}

fn hole(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 344)?;
    buf.unmap(40, 2)?;
    buf.protect(50, 2, libc::PROT_NONE)?;
    for flags in [0, ZDM_FAULT_WRITE] {
        for (first, n) in [(40, 1), (50, 1), (0, PAGES), (39, 2), (49, 2)] {
            let result = device.fault(buf.at(first), n as u64, flags);
            let what = format!("ZDM_FAULT of {n} pages from {first}, flags {flags}");
            expect_errno(result, &[libc::EFAULT], &what)?;
        }
    }
    // A huge range without mappings also ends soon.
    let result = device.fault(buf.at(40), 1 << 20, 0);
    expect_errno(result, &[libc::EFAULT], "ZDM_FAULT of a huge hole")?;
    fault(&device, &buf, 0, 40, ZDM_FAULT_WRITE)?;
    buf.check(0, 40, 344)?;
    buf.check(42, 8, 344)
}

/// The device has to fault again after a change by the CPU's side.
fn invalidated(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 345)?;
    fault(&device, &buf, 0, PAGES, ZDM_FAULT_WRITE)?;
    buf.advise(8, 8, libc::MADV_DONTNEED)?;
    let read = device.read(&buf, 8, 8).or_fail("READ")?;
    check!(
        read.faults >= 1,
        "faults after MADV_DONTNEED: expected some, found 0"
    );
    let nonzero = read.data.iter().position(|b| *b != 0);
    check_eq!(nonzero, None, "first byte that is not 0");

    fault(&device, &buf, 0, PAGES, ZDM_FAULT_WRITE)?;
    buf.protect(0, PAGES, libc::PROT_READ)?;
    let data = pattern_bytes(346, 0, 8);
    let result = device.write(&buf, 0, &data);
    expect_errno(result, &[libc::EPERM], "WRITE after mprotect")?;
    buf.check(0, 8, 345)?;
    buf.check_zero(8, 8)?;
    buf.check(16, PAGES - 16, 345)
}

/// A huge page, and an empty place for one.
fn huge(_: &Ctx) -> Outcome {
    const N: usize = HUGE_PAGES;
    let device = Device::open(0)?;
    let buf = huge_filled(1, 347)?;
    fault(&device, &buf, 0, N, ZDM_FAULT_WRITE)?;
    expect_huge(&buf, 0, N, N)?;
    reads_at_once(&device, &buf, N, 347)?;
    let empty = Buffer::anon_huge_aligned(N)?;
    empty.advise(0, N, libc::MADV_HUGEPAGE)?;
    fault(&device, &empty, 100, 40, ZDM_FAULT_WRITE)?;
    let data = pattern_bytes(348, 100, 40);
    let cmd = device.write(&empty, 100, &data).or_fail("WRITE")?;
    check_eq!(cmd.faults, 0, "faults of a WRITE after ZDM_FAULT");
    empty.check_zero(0, 100)?;
    empty.check(100, 40, 348)?;
    empty.check_zero(140, N - 140)
}

/// The device's own pages stay; pages of another PRIVATE device come back.
fn migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 349)?;
    target.move_all(&buf, 349)?;
    let before = target.stats()?;
    // The file has not mapped the pages before.
    let device = Device::open(NODE)?;
    fault(&device, &buf, 0, PAGES, ZDM_FAULT_WRITE)?;
    reads_at_once(&device, &buf, PAGES, 349)?;
    check_eq!(target.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
    target.expect(&buf, 0, PAGES, PAGES)?;
    // An unused right to write is no violation.
    check_eq!(target.audit()?.0.found, 0, "violations");

    let other = Target::open(ctx, NODE + 1)?;
    fault(&other, &buf, 0, PAGES, 0)?;
    let left = if target.cpu_maps() { PAGES } else { 0 };
    target.expect(&buf, 0, PAGES, left)?;
    reads_at_once(&other, &buf, PAGES, 349)?;
    buf.check(0, PAGES, 349)
}

fn bad(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(4, 350)?;
    let good = (buf.at(0), 4);
    let task_end = 1 << 56;
    for (addr, npages) in [
        (good.0 + 1, 1),
        (good.0 + 2048, 1),
        (good.0, 0),
        (good.0, u64::MAX),
        (good.0, 1 << 52),
        (good.0, (1 << 52) + 1),
        (u64::MAX - 4095, 1),
        (u64::MAX - 4095, 2),
        (task_end, 1),
        (0xffff_8000_0000_0000, 1),
        (good.0, 1 << 44),
    ] {
        for flags in [0, ZDM_FAULT_WRITE] {
            let what = format!("ZDM_FAULT of {npages:#x} pages at {addr:#x}");
            let result = device.fault(addr, npages, flags);
            expect_errno(result, &[libc::EINVAL], &what)?;
        }
    }
    for flags in [2, 3, 1 << 31, u32::MAX] {
        let what = format!("ZDM_FAULT with flags {flags:#x}");
        let result = device.fault(good.0, good.1, flags);
        expect_errno(result, &[libc::EINVAL], &what)?;
    }
    let mut arg = request(good.0, good.1, 0);
    arg[20] = 1;
    let result = device.ioctl_bytes(ZDM_FAULT, &mut arg);
    expect_errno(result, &[libc::EINVAL], "ZDM_FAULT with reserved set")?;
    let result = device.ioctl_nowhere(ZDM_FAULT);
    let what = "ZDM_FAULT with a bad argument pointer";
    expect_errno(result, &[libc::EFAULT], what)?;
    fault(&device, &buf, 0, 4, ZDM_FAULT_WRITE)?;
    buf.check(0, 4, 350)
}

/// The structure as bytes, with room behind it.
fn request(addr: u64, npages: u64, flags: u32) -> [u8; 48] {
    let mut arg = [0; 48];
    arg[..8].copy_from_slice(&addr.to_ne_bytes());
    arg[8..16].copy_from_slice(&npages.to_ne_bytes());
    arg[16..20].copy_from_slice(&flags.to_ne_bytes());
    arg
}

/// The size of the structure is its version.
fn size(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::anon(8)?;
    let number = |size| ioc(IOC_READ_WRITE, ZDM_FAULT_NUMBER, size);

    // Shorter structures have no result field, or no flags, which then count as 0.
    for (i, size) in [24, 16].into_iter().enumerate() {
        let mut arg = request(buf.at(4 * i), 4, 0);
        arg[size..].fill(0xa5);
        device
            .ioctl_bytes(number(size), &mut arg)
            .or_fail(&format!("ZDM_FAULT of {size} bytes"))?;
        expect_present(&buf, 4 * i, 4)?;
        check!(
            arg[size..].iter().all(|b| *b == 0xa5),
            "bytes behind a shorter structure: expected unchanged, found {:x?}",
            &arg[size..]
        );
    }
    // A structure without a length cannot name a range.
    let result = device.ioctl_bytes(number(8), &mut request(buf.at(0), 4, 0));
    expect_errno(result, &[libc::EINVAL], "ZDM_FAULT of 8 bytes")?;

    let mut arg = request(buf.at(0), 8, ZDM_FAULT_WRITE);
    device
        .ioctl_bytes(number(48), &mut arg)
        .or_fail("ZDM_FAULT of a longer structure")?;
    check_eq!(&arg[24..32], &8u64.to_ne_bytes()[..], "mapped");
    for at in [32, 47] {
        let mut arg = request(buf.at(0), 8, 0);
        arg[at] = 1;
        let result = device.ioctl_bytes(number(48), &mut arg);
        expect_errno(result, &[libc::E2BIG], "ZDM_FAULT with unknown bytes")?;
    }
    Ok(())
}
