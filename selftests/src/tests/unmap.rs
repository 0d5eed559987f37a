// SPDX-License-Identifier: GPL-2.0

//! The mapping changes or ends while its pages are on the device.

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, expect_present, freed_since, test};
use crate::check::{OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, check_bytes};

pub const TESTS: &[Test] = &[
    test("unmap.while_migrated", while_migrated::<PRIVATE>),
    test("unmap.partial_while_migrated", partial::<PRIVATE>),
    test("unmap.mremap_while_migrated", mremap::<PRIVATE>),
    test("unmap.madvise_dontneed", madvise_dontneed::<PRIVATE>),
    test("unmap_generic.while_migrated", while_migrated::<GENERIC>),
    test("unmap_generic.partial_while_migrated", partial::<GENERIC>),
    test("unmap_generic.mremap_while_migrated", mremap::<GENERIC>),
    test(
        "unmap_generic.madvise_dontneed",
        madvise_dontneed::<GENERIC>,
    ),
];

fn while_migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 50)?;
    device.move_all(&buf, 50)?;
    let before = device.stats()?;
    buf.unmap(0, PAGES)?;
    freed_since(&device, &before, PAGES)?;
    let after = device.stats()?;
    check_eq!(
        after.to_system,
        before.to_system,
        "pages moved to the system"
    );
    let (audit, _) = device.audit()?;
    check_eq!(audit.used, 0, "used pages in the audit");
    check_eq!(audit.found, 0, "violations after munmap");
    Ok(())
}

fn partial<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 51)?;
    device.move_all(&buf, 51)?;
    let before = device.stats()?;
    buf.unmap(PAGES / 3, PAGES / 3)?;
    freed_since(&device, &before, PAGES / 3)?;
    device.expect(&buf, 0, PAGES / 3, PAGES / 3)?;
    device.expect(&buf, PAGES / 3, PAGES / 3, 0)?;
    let (audit, _) = device.audit()?;
    check_eq!(
        audit.used,
        (PAGES - PAGES / 3) as u64,
        "used pages in the audit"
    );
    check_eq!(audit.found, 0, "violations after munmap of a part");
    buf.check(0, PAGES / 3, 51)?;
    buf.check(2 * PAGES / 3, PAGES / 3, 51)
}

/// The entries move to another address; the pages stay where they are.
fn mremap<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 52)?;
    device.move_all(&buf, 52)?;
    let before = device.stats()?;
    let buf = buf.move_to_another_place()?;
    check_eq!(device.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
    device.expect(&buf, 0, PAGES, PAGES)?;
    // The device must not use its entries for the old address, and must find the pages at the new
    // one.
    let read = device.read(&buf, 0, PAGES).or_fail("READ after mremap")?;
    check_bytes(&read.data, 52, 0, "READ after mremap")?;
    device.to_system(&buf, 0, 8).or_fail("MIGRATE_TO_SYS")?;
    expect_present(&buf, 0, 8)?;
    buf.check(0, PAGES, 52)
}

fn madvise_dontneed<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 53)?;
    device.move_all(&buf, 53)?;
    let before = device.stats()?;
    buf.advise(8, 16, libc::MADV_DONTNEED)?;
    freed_since(&device, &before, 16)?;
    let read = device.read(&buf, 8, 16).or_fail("READ")?;
    let nonzero = read.data.iter().position(|b| *b != 0);
    check_eq!(nonzero, None, "first byte that the device still reads");
    buf.check(0, 8, 53)?;
    buf.check_zero(8, 16)?;
    buf.check(24, PAGES - 24, 53)
}
