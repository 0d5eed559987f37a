// SPDX-License-Identifier: GPL-2.0

//! Addresses without a page stay empty when a range comes back from the device. Core mm selects
//! such holes as sources, whatever a migration asks for.

use super::target::{Target, huge_filled};
use super::{Ctx, PAGES, Test};
use crate::check::{OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, HUGE_PAGES};
use crate::proc;

pub const TESTS: &[Test] = of_each_kind!("holes":
    "one_page" => one_page,
    "every_other" => every_other,
    "huge" => huge,
    "huge_beside_small" => huge_beside_small,
    "nothing_there" => nothing_there,
);

/// Brings the whole buffer back. `pages` pages are on the device in `folios` folios, and nothing
/// else is mapped. Checks that exactly those pages are mapped afterwards.
#[track_caller]
fn comes_back(target: &Target, buf: &Buffer, pages: usize, folios: usize) -> Outcome {
    let n = buf.pages();
    let before = target.stats()?;
    let back = target.to_system(buf, 0, n).or_fail("MIGRATE_TO_SYS")?;
    check_eq!(proc::present(buf, 0, n)?, pages, "pages that are mapped");
    target.expect(buf, 0, n, 0)?;
    check_eq!(back.cpages, folios as u64, "cpages, as the C driver counts");
    let after = target.stats()?;
    let moved = after.to_system.wrapping_sub(before.to_system);
    check_eq!(moved, pages as u64, "growth of stats.to_system");
    check_eq!(
        after.failed_migrate,
        before.failed_migrate,
        "stats.failed_migrate"
    );
    Ok(())
}

/// One page on the device in 64 MiB of untouched memory (shared/cases/holes.c).
fn one_page(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let n = 32 * HUGE_PAGES;
    for huge in [false, true] {
        let buf = Buffer::anon_huge_aligned(n)?;
        buf.fill(0, 1, 2100);
        if huge {
            // The page keeps its table of small entries; huge pages could fill the rest.
            buf.advise(0, n, libc::MADV_HUGEPAGE)?;
        }
        target.to_device(&buf, 0, 1).or_fail("MIGRATE_TO_DEV")?;
        target.expect(&buf, 0, 1, 1)?;
        comes_back(&target, &buf, 1, 1)?;
        buf.check(0, 1, 2100)?;
    }
    Ok(())
}

/// Holes between pages of one page table.
fn every_other(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::anon(2 * PAGES)?;
    for page in (0..2 * PAGES).step_by(2) {
        buf.fill(page, 1, 2110);
        target.to_device(&buf, page, 1).or_fail("MIGRATE_TO_DEV")?;
    }
    target.expect(&buf, 0, 2 * PAGES, PAGES)?;
    comes_back(&target, &buf, PAGES, PAGES)?;
    for page in (0..2 * PAGES).step_by(2) {
        buf.check(page, 1, 2110)?;
    }
    Ok(())
}

/// A huge page on the device between holes of the size of a huge page.
fn huge(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::anon_huge_aligned(5 * HUGE_PAGES)?;
    buf.advise(0, buf.pages(), libc::MADV_HUGEPAGE)?;
    buf.fill(2 * HUGE_PAGES, HUGE_PAGES, 2120);
    target
        .to_device(&buf, 2 * HUGE_PAGES, HUGE_PAGES)
        .or_fail("MIGRATE_TO_DEV")?;
    target.expect(&buf, 2 * HUGE_PAGES, HUGE_PAGES, HUGE_PAGES)?;
    let before = target.stats()?;
    let large = target.moves_large() && proc::huge(&buf, 2 * HUGE_PAGES, HUGE_PAGES)? > 0;
    let folios = if large { 1 } else { HUGE_PAGES };
    comes_back(&target, &buf, HUGE_PAGES, folios)?;
    target.expect_large(&before, 0, usize::from(large), 0)?;
    buf.check(2 * HUGE_PAGES, HUGE_PAGES, 2120)
}

/// A huge page, a hole, and small pages on the device. The range begins and ends in holes, and an
/// allocation fails.
fn huge_beside_small(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::anon_huge_aligned(4 * HUGE_PAGES)?;
    buf.advise(HUGE_PAGES, 2 * HUGE_PAGES, libc::MADV_HUGEPAGE)?;
    let (first, n) = (3 * HUGE_PAGES + 7, PAGES);
    buf.fill(first, n, 2130);
    target.to_device(&buf, first, n).or_fail("MIGRATE_TO_DEV")?;
    target.expect(&buf, first, n, n)?;
    target.fail_alloc()?;
    // The failed allocation is for a small page: the ioctl fails without moving anything.
    let failed = target.to_system(&buf, HUGE_PAGES / 2, 3 * HUGE_PAGES);
    if failed.is_err() {
        target.expect(&buf, first, n, n)?;
        // The CPU maps COHERENT and GENERIC pages on the device.
        let mapped = if target.cpu_maps() { n } else { 0 };
        let present = proc::present(&buf, 0, buf.pages())?;
        check_eq!(present, mapped, "mapped pages");
    }
    target
        .to_system(&buf, HUGE_PAGES / 2, 3 * HUGE_PAGES)
        .or_fail("MIGRATE_TO_SYS")?;
    check_eq!(proc::present(&buf, 0, buf.pages())?, n, "mapped pages");
    buf.check(first, n, 2130)
}

/// Nothing is on the device, or nothing is mapped at all.
fn nothing_there(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE] {
        let buf = Buffer::anon_huge_aligned(3 * HUGE_PAGES)?;
        buf.advise(0, buf.pages(), advice)?;
        comes_back(&target, &buf, 0, 0)?;
    }
    // Neither system memory nor the holes beside it are sources.
    let buf = huge_filled(1, 2140)?;
    let back = target
        .to_system(&buf, 0, HUGE_PAGES)
        .or_fail("MIGRATE_TO_SYS")?;
    check_eq!(back.cpages, 0, "pages that came back from nowhere");
    buf.check(0, HUGE_PAGES, 2140)
}
