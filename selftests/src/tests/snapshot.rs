// SPDX-License-Identifier: GPL-2.0

//! The device's view of the CPU's page table without a fault. The kinds are those that the kernel's
//! hmm-tests expect.

use super::target::{COHERENT, GENERIC, PRIVATE, Target, expect_huge, huge_filled, open};
use super::{Ctx, Test, expect_present, test};
use crate::check;
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, Data, Device, HUGE_PAGES};
use crate::proc;
use crate::uapi::*;

pub const TESTS: &[Test] = &[
    test("snapshot.kinds", kinds::<PRIVATE>),
    test("snapshot.huge", huge::<PRIVATE>),
    test("snapshot.batches", batches),
    test("snapshot.changes", changes),
    test("snapshot.touches_nothing", touches_nothing),
    test("snapshot.bad", bad),
    test("snapshot_coherent.kinds", kinds::<COHERENT>),
    test("snapshot_coherent.huge", huge::<COHERENT>),
    test("snapshot_generic.kinds", kinds::<GENERIC>),
    test("snapshot_generic.huge", huge::<GENERIC>),
];

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Checks every entry of a snapshot.
#[track_caller]
fn expect(device: &Device, buf: &Buffer, first: usize, expected: &[u8]) -> Outcome {
    let found = device
        .snapshot(buf, first, expected.len())
        .or_fail("SNAPSHOT")?;
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(Fail::failed(format!(
            "SNAPSHOT of page {}: expected {:#04x}, found {:#04x}",
            first + i,
            expected[i],
            found[i]
        ))),
    }
}

/// One page of every kind.
fn kinds<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let (zero, one) = (Target::open(ctx, NODE)?, Target::open(ctx, NODE + 1)?);
    let buf = Buffer::anon(9)?;
    buf.protect(0, 1, libc::PROT_NONE)?;
    buf.unmap(1, 1)?;
    buf.protect(2, 1, libc::PROT_READ)?;
    check_eq!(buf.get(2, 0), 0, "first word of fresh memory");
    buf.fill(3, 5, 300);
    buf.protect(3, 1, libc::PROT_READ)?;
    // Page 4 is plain, 5 to 7 are on a device, page 8 was never touched.
    for (device, page) in [(&zero, 5), (&one, 6), (&zero, 7)] {
        device.to_device(&buf, page, 1).or_fail("MIGRATE_TO_DEV")?;
    }
    buf.protect(7, 1, libc::PROT_READ)?;

    let local = zero.local();
    let remote = |rights| zero.remote(rights);
    let expected = |five, six, seven| {
        [
            PROT_ERROR,
            PROT_ERROR,
            PROT_ZERO | PROT_READ,
            PROT_READ,
            PROT_WRITE,
            five,
            six,
            seven,
            PROT_NONE,
        ]
    };
    let by_zero = expected(local | PROT_WRITE, remote(PROT_WRITE), local | PROT_READ);
    let by_one = expected(remote(PROT_WRITE), local | PROT_WRITE, remote(PROT_READ));
    expect(&zero, &buf, 0, &by_zero)?;
    expect(&one, &buf, 0, &by_one)?;
    // A page inspected alone gives the same as among its neighbours.
    for page in 0..9 {
        expect(&zero, &buf, page, &by_zero[page..=page])?;
    }
    buf.check(3, 5, 300)
}

/// Parts of huge pages have the PMD flag.
fn huge<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const N: usize = HUGE_PAGES;
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(1, 301)?;
    expect(&target, &buf, 0, &[PROT_WRITE | PROT_PMD; N])?;
    expect(&target, &buf, 77, &[PROT_WRITE | PROT_PMD; 100])?;
    buf.protect(0, N, libc::PROT_READ)?;
    expect(&target, &buf, 0, &[PROT_READ | PROT_PMD; N])?;
    buf.protect(0, N, RW)?;
    // Only a write makes the page writable again.
    buf.fill(0, N, 301);
    expect_huge(&buf, 0, N, N)?;

    target.move_huge(&buf, 301)?;
    let local = target.local();
    let whole = if target.moves_large() { PROT_PMD } else { 0 };
    expect(&target, &buf, 0, &[local | PROT_WRITE | whole; N])?;
    expect(&target, &buf, 31, &[local | PROT_WRITE | whole; 2])?;
    target.expect(&buf, 0, N, N)?;

    // Other rights for a part split the entry, and no page has the PMD flag any more.
    buf.protect(100, 50, libc::PROT_READ)?;
    expect(&target, &buf, 0, &[local | PROT_WRITE; 100])?;
    expect(&target, &buf, 100, &[local | PROT_READ; 50])?;
    expect(&target, &buf, 150, &[local | PROT_WRITE; N - 150])?;

    // A stock kernel has two ways to refuse another device.
    let other = open(ctx, NODE + 1)?;
    let seen = other.snapshot(&buf, 150, 10).or_fail("SNAPSHOT")?;
    let remote = target.remote(PROT_WRITE);
    check_eq!(seen, vec![remote; 10], "SNAPSHOT by the other device");
    buf.check(0, N, 301)
}

/// More pages than the driver handles in one batch, with different neighbours.
fn batches(_: &Ctx) -> Outcome {
    const N: usize = 101;
    let device = Device::open(0)?;
    let buf = Buffer::anon(N)?;
    let mut expected = vec![PROT_NONE; N];
    for page in 0..N {
        expected[page] = match page % 3 {
            0 => PROT_NONE,
            1 => {
                buf.fill(page, 1, 302);
                PROT_WRITE
            }
            _ => {
                check_eq!(buf.get(page, 0), 0, "first word of fresh memory");
                PROT_ZERO | PROT_READ
            }
        };
    }
    for page in [1, 31, 34, 64, 97] {
        check_eq!(expected[page], PROT_WRITE, "kind of page {page}");
        device.to_device(&buf, page, 1).or_fail("MIGRATE_TO_DEV")?;
        expected[page] = PROT_PRIVATE_LOCAL | PROT_WRITE;
    }
    buf.unmap(60, 1)?;
    expected[60] = PROT_ERROR;
    expect(&device, &buf, 0, &expected)?;
    for (first, n) in [(1, 32), (31, 33), (33, 64), (N - 1, 1)] {
        expect(&device, &buf, first, &expected[first..first + n])?;
    }
    Ok(())
}

/// Each snapshot shows the state at its time.
fn changes(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(4, 303)?;
    // The result must come from the CPU's page table, not from the device's.
    device.read(&buf, 0, 4).or_fail("READ")?;
    expect(&device, &buf, 0, &[PROT_WRITE; 4])?;
    device.to_device(&buf, 0, 4).or_fail("MIGRATE_TO_DEV")?;
    expect(&device, &buf, 0, &[PROT_PRIVATE_LOCAL | PROT_WRITE; 4])?;
    buf.check(1, 1, 303)?;
    device.to_system(&buf, 2, 1).or_fail("MIGRATE_TO_SYS")?;
    expect_present(&buf, 1, 2)?;
    let seen = device.snapshot(&buf, 1, 2).or_fail("SNAPSHOT")?;
    check!(
        seen.iter()
            .all(|kind| [PROT_READ, PROT_WRITE].contains(kind)),
        "SNAPSHOT of pages that came back: expected system memory, found {seen:x?}"
    );
    buf.advise(2, 1, libc::MADV_DONTNEED)?;
    expect(&device, &buf, 2, &[PROT_NONE])?;
    buf.unmap(2, 1)?;
    expect(&device, &buf, 2, &[PROT_ERROR])?;
    buf.map_again(2, 1)?;
    expect(&device, &buf, 2, &[PROT_NONE])?;
    buf.fill(2, 1, 303);
    expect(&device, &buf, 2, &[PROT_WRITE])?;
    buf.check(0, 4, 303)
}

/// A snapshot does not populate, move or count anything.
fn touches_nothing(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::anon(64)?;
    let far = Buffer::filled(8, 304)?;
    device.move_all(&far, 304)?;
    let before = device.stats()?;
    expect(&device, &buf, 0, &[PROT_NONE; 64])?;
    check_eq!(proc::present(&buf, 0, 64)?, 0, "present pages");
    expect(&device, &far, 0, &[PROT_PRIVATE_LOCAL | PROT_WRITE; 8])?;
    let remote = Device::open(1)?;
    expect(&remote, &far, 0, &[PROT_NONE; 8])?;
    check_eq!(proc::on_device(&far, 0, 8)?.len(), 8, "device pages");
    let after = device.stats()?;
    check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults");
    check_eq!(after.device_faults, before.device_faults, "device faults");
    check_eq!(after.to_system, before.to_system, "pages moved");
    far.check(0, 8, 304)
}

fn bad(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(64, 305)?;
    let take = |addr, npages| device.command(HMM_SNAPSHOT, addr, npages, Data::Nowhere);
    let what = "SNAPSHOT with a bad data pointer";
    expect_errno(take(buf.at(0), 64), &[libc::EFAULT], what)?;
    let what = "SNAPSHOT of an unaligned range";
    expect_errno(take(buf.at(0) + 8, 1), &[libc::EINVAL], what)?;
    for npages in [0, u64::MAX, 1 << 52] {
        let what = format!("SNAPSHOT of {npages:#x} pages");
        expect_errno(take(buf.at(0), npages), &[libc::EINVAL], &what)?;
    }
    let what = "SNAPSHOT of the kernel";
    expect_errno(take(0xffff_8000_0000_0000, 1), &[libc::EINVAL], what)?;
    expect(&device, &buf, 0, &[PROT_WRITE; 64])?;
    buf.check(0, 64, 305)
}
