// SPDX-License-Identifier: GPL-2.0

//! Secrets, limits and charges.

use libc::{EFAULT, ENOMEM, EPERM};
use nix::sys::resource::Resource;

use super::{PINS, as_nobody};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, PAGE};
use crate::harness::Child;
use crate::sys;
use crate::tests::account::{current, in_cgroup, join_cgroup};
use crate::tests::target::{PRIVATE, Target};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.no_secrets", no_secrets),
    test("hostile.pins_are_limited", pins_are_limited),
    test("hostile.mapping_is_bounded", mapping_is_bounded),
    test("hostile.mapping_is_charged", mapping_is_charged),
    test(
        "hostile.fail_alloc_is_not_for_others",
        fail_alloc_is_not_for_others,
    ),
    test("hostile.fail_alloc_is_bounded", fail_alloc_is_bounded),
];

/// Page frame numbers are only for CAP_SYS_ADMIN, as in /proc/pid/pagemap.
fn no_secrets(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(4, 1601)?;
    target.move_all(&buf, 1601)?;
    let seen = target.inspect(&buf, 0, 4).or_fail("ZDM_INSPECT")?;
    check!(
        seen.iter().all(|p| p.pfn != 0),
        "page frames that root sees: expected 4, found {seen:x?}"
    );
    as_nobody(|| {
        let seen = target
            .inspect(&buf, 0, 4)
            .or_fail("ZDM_INSPECT by nobody")?;
        check!(
            seen.iter()
                .all(|p| p.pfn == 0 && p.flags & ZDM_PAGE_THERE != 0),
            "pages that nobody sees: expected 4 without a number, found {seen:x?}"
        );
        let result = target.try_audit(ZDM_AUDIT_QUIET);
        expect_errno(result, &[EPERM], "ZDM_AUDIT_QUIET by nobody")?;
        let (_, records) = target.try_audit(0).or_fail("ZDM_AUDIT by nobody")?;
        check!(
            records.iter().all(|v| v.pfn == 0 && v.last_pid == 0),
            "records for nobody: expected none with a number, found {records:x?}"
        );
        Ok(())
    })
}

/// Pins count against the user's RLIMIT_MEMLOCK, across processes and files.
fn pins_are_limited(ctx: &Ctx) -> Outcome {
    const MOST: usize = 16;
    let target = Target::open(ctx, PRIVATE)?;
    let other = Device::open(1)?;
    as_nobody(|| {
        sys::limit(Resource::RLIMIT_MEMLOCK, (MOST * PAGE) as u64).or_fail("setrlimit")?;
        let buf = Buffer::filled(2 * MOST, 1602)?;
        for flags in PINS {
            let all = target.pin(&buf, 0, MOST + 1, flags);
            expect_errno(all, &[ENOMEM], "ZDM_PIN of a page more than RLIMIT_MEMLOCK")?;
            let id = target.pin(&buf, 0, MOST, flags).or_fail("ZDM_PIN")?;
            expect_errno(
                other.pin(&buf, MOST, 1, flags),
                &[ENOMEM],
                "ZDM_PIN by another file",
            )?;
            Child::spawn(|| {
                let more = other.pin(&buf, MOST, 1, flags);
                expect_errno(more, &[ENOMEM], "ZDM_PIN by another process")
            })?
            .join()?;
            target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        }
        // A pin that fails half-way counts nothing.
        buf.unmap(1, 1)?;
        expect_errno(target.pin(&buf, 0, MOST, 0), &[EFAULT], "ZDM_PIN of a hole")?;
        let id = target.pin(&buf, 2, MOST, 0).or_fail("ZDM_PIN")?;
        target.unpin(id, 0).or_fail("ZDM_UNPIN")
    })
}

/// The pages of a mapping are allocated with the mmap lock held, so their number is limited.
fn mapping_is_bounded(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let pages = (65 << 20) / PAGE;
    expect_errno(
        device.map(pages, libc::MAP_SHARED).map(drop),
        &[ENOMEM],
        "mmap of 65 MiB of the device",
    )?;
    device.map(64, libc::MAP_SHARED).or_fail("mmap").map(drop)
}

/// The pages of a mapping of the device are charged to the process's cgroup.
fn mapping_is_charged(_: &Ctx) -> Outcome {
    const N: usize = 1024;
    let device = Device::open(0)?;
    in_cgroup(&[], |dir| {
        Child::spawn(|| {
            join_cgroup(dir)?;
            let before = current(dir)?;
            let map = device.map(N, libc::MAP_SHARED).or_fail("mmap")?;
            let after = current(dir)?;
            check!(
                after >= before + N as u64 - 64,
                "pages charged for a mapping of {N}: found {before} before, {after} after"
            );
            drop(map);
            Ok(())
        })?
        .join()
    })
}

/// An injected allocation failure does not affect the CPU faults of another process.
fn fail_alloc_is_not_for_others(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(8, 1603)?;
    let own = Target::open(ctx, PRIVATE)?;
    target.move_all(&buf, 1603)?;
    let before = target.stats()?;
    own.fail_alloc()?;
    Child::spawn(|| buf.check(0, 1, 1603))?.join()?;
    let faults = target.stats()?.cpu_faults.wrapping_sub(before.cpu_faults);
    check_eq!(faults, 1, "CPU faults of another process for a page");
    buf.check(1, 1, 1603)?;
    let faults = target.stats()?.cpu_faults.wrapping_sub(before.cpu_faults);
    check_eq!(faults, 3, "CPU faults in all, one of them in vain");
    buf.check(0, 8, 1603)
}

/// Each CPU fault on the device looks through the files that have asked for a failure, so that there
/// cannot be many of them.
fn fail_alloc_is_bounded(ctx: &Ctx) -> Outcome {
    const MOST: usize = 256;
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(4, 1604)?;
    target.move_all(&buf, 1604)?;
    Child::spawn(|| {
        let files = (0..MOST + 1)
            .map(|_| Device::open(0))
            .collect::<Outcome<Vec<_>>>()?;
        let (last, first) = files.split_last().ok_or_else(|| Fail::failed("no files"))?;
        for file in first {
            file.fail_alloc()?;
            // A file that asks again is one.
            file.fail_alloc()?;
        }
        let ask = || last.command(HMM_FLAGS, PAGE as u64, HMM_FLAG_FAIL_ALLOC, Data::Nowhere);
        expect_errno(ask(), &[libc::ENOSPC], "FLAGS of one file more")?;
        // They are all of this process, whose faults they concern.
        let other = Child::spawn(|| buf.check(0, 2, 1604))?;
        other.join()?;
        drop(files);
        Device::open(0)?.fail_alloc()
    })?
    .join()?;
    buf.check(0, 4, 1604)
}
