// SPDX-License-Identifier: GPL-2.0

//! HMM_DMIRROR_FLAGS with FAIL_ALLOC: the next allocation for a migration fails, once. `thp.rs`
//! tests it with huge pages.

use super::target::{COHERENT, GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, Data, Device, PAGE, check_bytes};
use crate::uapi::{HMM_FLAG_FAIL_ALLOC, HMM_FLAGS};

pub const TESTS: &[Test] = &[
    test("fail.to_device", to_device::<PRIVATE>),
    test("fail.to_system", to_system::<PRIVATE>),
    test("fail.cpu_fault", cpu_fault),
    test("fail.per_file", per_file),
    test("fail.flags", flags),
    test("fail.close", close::<PRIVATE>),
    test("fail_coherent.to_device", to_device::<COHERENT>),
    test("fail_coherent.to_system", to_system::<COHERENT>),
    test("fail_coherent.close", close::<COHERENT>),
    test("fail_generic.to_device", to_device::<GENERIC>),
    test("fail_generic.to_system", to_system::<GENERIC>),
    test("fail_generic.close", close::<GENERIC>),
];

/// Checks that the driver replaces the failed allocation: a device that moves only small pages
/// treats each as a part of a large one and allocates another page.
fn made_good(target: &Target, buf: &Buffer) -> Outcome {
    let moved = target.to_device(buf, 0, PAGES).or_fail("MIGRATE_TO_DEV")?;
    check_bytes(&moved.data, 390, 0, "returned data")?;
    target.expect(buf, 0, PAGES, PAGES)
}

/// One page stays, the rest migrates; the command cannot return all data then.
fn to_device<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 390)?;
    let before = target.stats()?;
    target.fail_alloc()?;
    if !target.moves_large() {
        return made_good(&target, &buf);
    }
    let result = target.to_device(&buf, 0, PAGES);
    expect_errno(
        result,
        &[libc::ENOENT],
        "MIGRATE_TO_DEV with a page missing",
    )?;
    target.expect(&buf, 0, PAGES, PAGES - 1)?;
    let failed = target
        .stats()?
        .failed_alloc
        .wrapping_sub(before.failed_alloc);
    check_eq!(failed, 1, "growth of stats.failed_alloc");
    let read = target.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 390, 0, "READ of a mixture")?;
    // The failure does not repeat.
    let moved = target.to_device(&buf, 0, PAGES).or_fail("MIGRATE_TO_DEV")?;
    check_bytes(&moved.data, 390, 0, "returned data")?;
    target.expect(&buf, 0, PAGES, PAGES)?;
    target.bring_back(&buf, 0, PAGES)?;
    buf.check(0, PAGES, 390)?;
    target.expect_empty()
}

/// The command fails, and the page stays where it is.
fn to_system<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 391)?;
    target.move_all(&buf, 391)?;
    target.fail_alloc()?;
    if !target.moves_large() {
        target.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
        target.expect(&buf, 0, PAGES, 0)?;
        return buf.check(0, PAGES, 391);
    }
    let result = target.to_system(&buf, 0, PAGES);
    expect_errno(result, &[libc::ENOMEM], "MIGRATE_TO_SYS")?;
    target.expect(&buf, 0, PAGES, PAGES)?;
    let (audit, _) = target.audit()?;
    check_eq!(audit.used, PAGES as u64, "used pages in the audit");
    check_eq!(audit.found, 0, "violations after a failure");
    let read = target.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 391, 0, "READ")?;
    target.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
    target.expect(&buf, 0, PAGES, 0)?;
    buf.check(0, PAGES, 391)?;
    target.expect_empty()
}

/// A CPU fault without memory is retried, and the process notices nothing.
fn cpu_fault(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(8, 392)?;
    for page in [0, 5] {
        target.move_all(&buf, 392)?;
        let before = target.stats()?;
        target.fail_alloc()?;
        buf.check(page, 1, 392)?;
        let faults = target.stats()?.cpu_faults.wrapping_sub(before.cpu_faults);
        check_eq!(faults, 2, "CPU faults for a page, the first in vain");
        target.expect(&buf, page, 1, 0)?;
        buf.check(0, 8, 392)?;
    }
    target.expect_empty()
}

/// As in the C driver the flags must be a valid number of pages, so 0 is invalid.
fn flags(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let flags = |addr, flags| device.command(HMM_FLAGS, addr, flags, Data::Nowhere);
    let page = PAGE as u64;
    for (addr, wrong) in [(page, 0), (page, 2), (page, 3), (page + 1, 1)] {
        let what = format!("FLAGS of {wrong} at {addr:#x}");
        expect_errno(flags(addr, wrong), &[libc::EINVAL], &what)?;
    }
    let cmd = flags(page, HMM_FLAG_FAIL_ALLOC).or_fail("FLAGS")?;
    check_eq!((cmd.cpages, cmd.faults), (0, 0), "what FLAGS returns");
    Ok(())
}

/// The flag belongs to one file, but a CPU fault fails if any file of the process has it.
fn per_file(ctx: &Ctx) -> Outcome {
    let flagged = Target::open(ctx, PRIVATE)?;
    let other = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(PAGES, 393)?;
    flagged.fail_alloc()?;
    other.move_all(&buf, 393)?;
    // There is no CPU fault in between.
    other.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
    buf.check(0, PAGES, 393)?;
    let result = flagged.to_device(&buf, 0, PAGES);
    expect_errno(
        result,
        &[libc::ENOENT],
        "MIGRATE_TO_DEV with a page missing",
    )?;
    flagged.expect(&buf, 0, PAGES, PAGES - 1)?;
    buf.check(0, PAGES, 393)
}

/// The close brings all pages back although the flag is set.
fn close<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let observer = Target::open(ctx, NODE)?;
    let target = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 394)?;
    target.move_all(&buf, 394)?;
    target.fail_alloc()?;
    drop(target);
    observer.expect(&buf, 0, PAGES, 0)?;
    buf.check(0, PAGES, 394)?;
    observer.expect_empty()
}
