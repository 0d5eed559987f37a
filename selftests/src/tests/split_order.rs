// SPDX-License-Identifier: GPL-2.0

//! Huge pages on the device are split in place into folios of any order.

use std::fs;

use super::target::{Target, huge_filled};
use super::{Ctx, Test, expect_present, freed_since};
use crate::check::{OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, HUGE_PAGES};

const N: usize = HUGE_PAGES;

/// An anonymous folio has no order 1.
const ORDERS: [u32; 6] = [0, 2, 3, 4, 6, 8];

pub const TESTS: &[Test] = of_each_kind!("split_order":
    "taken_back" => taken_back,
    "zapped_in_part" => zapped_in_part,
    "unmapped" => unmapped,
    "closed" => closed,
    "released" => released,
    "moved_again" => moved_again,
);

/// A huge page on the device, split into folios of `order`. A device that moves only small pages
/// has nothing to split, and debugfs does not find a PRIVATE page.
fn split(target: &Target, order: u32, seed: u64) -> Outcome<Buffer> {
    let buf = huge_filled(1, seed)?;
    target.move_huge(&buf, seed)?;
    let (start, end) = (buf.at(0), buf.at(N));
    let request = format!("{},{start:#x},{end:#x},{order}", std::process::id());
    fs::write("/sys/kernel/debug/split_huge_pages", request).or_fail("split_huge_pages")?;
    let split = target.cpu_maps() && target.moves_large();
    let expected = match split {
        true => order,
        false if target.moves_large() => N.ilog2(),
        false => 0,
    };
    let pages = target.inspect(&buf, 0, N).or_fail("INSPECT")?;
    for (i, page) in pages.iter().enumerate() {
        check_eq!(page.order, expected, "order of page {i} after the split");
    }
    target.expect(&buf, 0, N, N)?;
    let (audit, _) = target.audit()?;
    check_eq!(audit.used, N as u64, "used pages after the split");
    check_eq!(audit.found, 0, "violations after the split");
    Ok(buf)
}

fn taken_back(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    for order in ORDERS {
        let before = target.stats()?;
        let buf = split(&target, order, 700)?;
        // Migrate a part that cuts a folio, then the rest.
        target
            .to_system(&buf, 5, 7)
            .or_fail("MIGRATE_TO_SYS of a part")?;
        buf.check(0, N, 700)?;
        target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
        target.expect(&buf, 0, N, 0)?;
        expect_present(&buf, 0, N)?;
        freed_since(&target, &before, N)?;
        buf.check(0, N, 700)?;
    }
    Ok(())
}

fn zapped_in_part(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    for order in ORDERS {
        let before = target.stats()?;
        let buf = split(&target, order, 701)?;
        for (first, n) in [(0, 3), (16, 16), (N / 2, N / 4), (N - 1, 1)] {
            buf.advise(first, n, libc::MADV_DONTNEED)?;
            buf.check_zero(first, n)?;
        }
        buf.check(3, 13, 701)?;
        buf.check(32, N / 2 - 32, 701)?;
        drop(buf);
        freed_since(&target, &before, N)?;
        target.expect_empty()?;
    }
    Ok(())
}

fn unmapped(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    for order in ORDERS {
        let before = target.stats()?;
        drop(split(&target, order, 702)?);
        freed_since(&target, &before, N)?;
        target.expect_empty()?;
    }
    Ok(())
}

fn closed(ctx: &Ctx, node: usize) -> Outcome {
    let observer = Target::open(ctx, node)?;
    for order in ORDERS {
        let target = Target::open(ctx, node)?;
        let buf = split(&target, order, 703)?;
        let order = target.inspect_one(&buf, 0)?.order as usize;
        let before = observer.stats()?;
        drop(target);
        observer.expect_empty()?;
        // Each folio comes back in one piece.
        let after = observer.stats()?;
        check_eq!(
            after.to_system_by_order[order] - before.to_system_by_order[order],
            (N >> order) as u64,
            "growth of stats.to_system_by_order[{order}]"
        );
        buf.check(0, N, 703)?;
    }
    Ok(())
}

fn released(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    for order in ORDERS {
        let buf = split(&target, order, 704)?;
        target.release().or_fail("RELEASE")?;
        target.expect(&buf, 0, N, 0)?;
        buf.check(0, N, 704)?;
    }
    Ok(())
}

/// Memory that came back in parts of any order can be used for a huge page again.
fn moved_again(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    for round in 0..2 * ORDERS.len() {
        let order = ORDERS[round % ORDERS.len()];
        let buf = split(&target, order, 705)?;
        target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
        buf.check(0, N, 705)?;
    }
    target.expect_empty()
}
