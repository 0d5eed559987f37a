// SPDX-License-Identifier: GPL-2.0

//! Data and state that a migration could lose silently: that a page was written, writes during the
//! migration, and memory to which the device had exclusive access.

use std::sync::atomic::{AtomicBool, Ordering};

use super::leak::settled;
use super::target::{COHERENT, GENERIC, PRIVATE, Target};
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES};
use crate::pagestate::{self, views};
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("lost.dirty_bit", dirty_bit::<PRIVATE>),
    test("lost.dirty_bit_failed", dirty_bit_failed::<PRIVATE>),
    test("lost.writes", writes::<PRIVATE>),
    test("lost.exclusive_memory", exclusive_memory),
    test("lost.moved_table", moved_table),
    test("lost_coherent.dirty_bit", dirty_bit::<COHERENT>),
    test("lost_coherent.writes", writes::<COHERENT>),
    test("lost_generic.dirty_bit", dirty_bit::<GENERIC>),
    test("lost_generic.writes", writes::<GENERIC>),
];

/// Pages with MADV_FREE that were written afterwards. Only the page table has the dirty bit that
/// keeps the kernel from dropping them.
fn free_and_dirty(n: usize, seed: u64) -> Outcome<Buffer> {
    let buf = Buffer::filled(n, seed)?;
    buf.advise(0, n, libc::MADV_FREE)?;
    buf.fill(0, n, seed + 1);
    proc::drain_batches()?;
    Ok(buf)
}

/// Pages that were written after MADV_FREE keep their data through reclaim, also after they were on
/// the device.
fn dirty_bit<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let n = super::PAGES;
    let buf = free_and_dirty(n, 1900)?;
    target.move_all(&buf, 1901)?;
    target.bring_back(&buf, 0, n)?;
    buf.advise(0, n, libc::MADV_PAGEOUT)?;
    buf.check(0, n, 1901)
}

/// The migration fails: the page is mapped again with its dirty bit.
fn dirty_bit_failed<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = free_and_dirty(1, 1902)?;
    target.fail_alloc()?;
    let moved = target.to_device(&buf, 0, 1);
    check!(
        moved.is_err(),
        "MIGRATE_TO_DEV without memory: expected an error, found none"
    );
    target.expect(&buf, 0, 1, 0)?;
    buf.advise(0, 1, libc::MADV_PAGEOUT)?;
    buf.check(0, 1, 1903)
}

/// A thread counts in memory that another thread migrates back and forth: no step is lost.
fn writes<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const N: usize = 2;
    const ROUNDS: usize = 150;
    let target = Target::open(ctx, NODE)?;
    let buf = Buffer::anon(N)?;
    let over = AtomicBool::new(false);
    let before = target.stats()?;
    let counted = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut steps = 0;
            while !over.load(Ordering::Relaxed) {
                for page in 0..N {
                    buf.set(page, 7, buf.get(page, 7) + 1);
                }
                steps += 1;
            }
            steps
        });
        let moved: Outcome = (0..ROUNDS).try_for_each(|_| {
            // Pages that are being faulted back do not migrate; that is no failure.
            let _ = target.to_device(&buf, 0, N);
            if target.cpu_maps() {
                target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
            }
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        let steps = writer
            .join()
            .map_err(|_| Fail::failed("the writing thread panicked"))?;
        moved.map(|()| steps)
    })?;
    for page in 0..N {
        check_eq!(buf.get(page, 7), counted, "steps counted in page {page}");
    }
    let went = target.stats()?.to_device.wrapping_sub(before.to_device);
    check!(went > 0, "pages that went: expected some, found none");
    Ok(())
}

/// Memory that is unmapped while the device has exclusive access to it is freed, to the last page.
/// It is charged to a cgroup, in which only a few kernel pages may stay charged.
fn exclusive_memory(ctx: &Ctx) -> Outcome {
    const N: usize = 2048;
    const ROUNDS: usize = 4;
    settled(ctx, PRIVATE, |device| {
        for _ in 0..ROUNDS {
            let buf = Buffer::filled(N, 1910)?;
            device.exclusive(&buf, 0, N).or_fail("EXCLUSIVE")?;
            check_eq!(proc::present(&buf, 0, N)?, 0, "pages that the CPU has");
        }
        Ok(())
    })
}

/// mremap(2) marks what it moves as soft-dirty, also if it moves a page table as a whole: pages of
/// the system, and pages of the device.
fn moved_table(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    for away in [false, true] {
        let buf = Buffer::anon_huge_aligned(2 * HUGE_PAGES)?;
        buf.advise(0, 2 * HUGE_PAGES, libc::MADV_NOHUGEPAGE)?;
        buf.fill(0, HUGE_PAGES, 1920);
        if away {
            target
                .to_device(&buf, 0, HUGE_PAGES)
                .or_fail("MIGRATE_TO_DEV")?;
        }
        let before = target.on_device(&buf, 0, HUGE_PAGES)?;
        pagestate::clear_soft_dirty()?;
        let marked = |at: usize| -> Outcome<usize> {
            let pages = views(&target, &buf, at, HUGE_PAGES)?;
            Ok(pages.iter().filter(|page| page.soft_dirty).count())
        };
        check_eq!(marked(0)?, 0, "marks after clear_refs, away {away}");
        buf.move_pages(0, HUGE_PAGES, &buf, HUGE_PAGES)?;
        target.expect(&buf, HUGE_PAGES, HUGE_PAGES, before)?;
        let moved = marked(HUGE_PAGES)?;
        check_eq!(moved, HUGE_PAGES, "marks after mremap, away {away}");
        buf.check_from(HUGE_PAGES, HUGE_PAGES, 1920, 0)?;
    }
    Ok(())
}
