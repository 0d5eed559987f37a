// SPDX-License-Identifier: GPL-2.0

//! The oracle with `strict=1`, which compares all of struct page (I14): free and fresh pages of the
//! device have no unexplained field, whatever their history. The audit after each test is strict,
//! too.

use super::chain::{Image, SIZES, filled};
use super::leak::settled;
use super::target::{Target, huge_filled};
use super::{Ctx, PAGES, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES};
use crate::harness::Child;
use crate::{check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("strict", "strict=1":
    "life" => life,
    "marked" => marked,
    "split" => split,
    "sizes" => sizes,
    "collected" => collected,
);

/// The device that shows whether the kernel keeps a reference on free pages.
const GENERIC: usize = 4;

/// Skips a test on a kernel without the series: its `zone_device_page_init()` leaves flags of the
/// last user on a page, which strict mode reports. Such a kernel also keeps a reference on free
/// GENERIC pages.
#[track_caller]
pub(super) fn clears_flags(ctx: &Ctx) -> Outcome {
    if ctx.module.nodes().contains(&GENERIC) && Device::open(GENERIC)?.stats()?.free_refs != 0 {
        return Err(Fail::Skip(
            "flags of the last user stay on this kernel".into(),
        ));
    }
    Ok(())
}

/// Whether this kernel has all fixes of the series: the series for 7.2 lacks some.
#[track_caller]
pub(super) fn has_all_fixes(ctx: &Ctx) -> Outcome<bool> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").or_fail("the release")?;
    match clears_flags(ctx) {
        Ok(()) => Ok(!release.starts_with("7.2.")),
        Err(Fail::Skip(_)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Skips a test on a kernel that lacks some of the fixes.
#[track_caller]
pub(super) fn needs_all_fixes(ctx: &Ctx) -> Outcome {
    match has_all_fixes(ctx)? {
        true => Ok(()),
        false => Err(Fail::Skip("this kernel lacks fixes of the series".into())),
    }
}

/// Checks that no violation has been found so far.
#[track_caller]
fn nothing_found(target: &Target) -> Outcome {
    let (audit, records) = target.audit()?;
    check_eq!(
        (audit.found, audit.total),
        (0, 0),
        "violations, of which {records:x?}"
    );
    Ok(())
}

/// Migration both ways, sharing and copying, unmapping on the device, and the end of a process.
fn life(ctx: &Ctx, node: usize) -> Outcome {
    clears_flags(ctx)?;
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 4200)?;
            let n = buf.pages();
            let image = Image::new(n, 4200);
            image.send(target, &buf)?;
            target.bring_back(&buf, 0, n)?;
            image.send(target, &buf)?;
            Child::spawn(|| {
                buf.fill(0, n / 2, 4201);
                let own = Target::open(ctx, node)?;
                let _ = own.to_device(&buf, 0, n);
                buf.check(0, n / 2, 4201)
            })?
            .join()?;
            image.check(&buf)?;
            proc::drain_batches()?;
            let _ = target.to_device(&buf, 0, n);
            buf.unmap(0, n / 4)?;
            nothing_found(target)
        })?;
    }
    Ok(())
}

/// Pages that had every mark before they migrated: locked, cold, lazily freed, soft-dirty,
/// exclusive, active.
fn marked(ctx: &Ctx, node: usize) -> Outcome {
    clears_flags(ctx)?;
    for huge in SIZES {
        settled(ctx, node, |target| {
            let fresh = |seed| filled(huge, seed);
            for advice in [libc::MADV_COLD, libc::MADV_FREE, libc::MADV_MERGEABLE] {
                let buf = fresh(4210)?;
                buf.advise(0, buf.pages(), advice)?;
                buf.fill(0, buf.pages(), 4210);
                proc::drain_batches()?;
                target
                    .to_device(&buf, 0, buf.pages())
                    .or_fail("MIGRATE_TO_DEV")?;
                buf.check(0, buf.pages(), 4210)?;
            }
            let buf = fresh(4211)?;
            let n = buf.pages();
            buf.lock(0, n, true)?;
            proc::drain_batches()?;
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            buf.lock(0, n, false)?;
            buf.check(0, n, 4211)?;
            buf.lock(0, n, true)?;
            let _ = target.to_device(&buf, 0, n);
            drop(buf);
            // Accessed so often that it is active.
            let buf = fresh(4212)?;
            for _ in 0..4 {
                let read = target.read(&buf, 0, n).or_fail("READ")?;
                drop(read);
                buf.check(0, n, 4212)?;
                proc::drain_batches()?;
            }
            let count = n.min(PAGES);
            target.exclusive(&buf, 0, count).or_fail("EXCLUSIVE")?;
            buf.check(0, n, 4212)?;
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            nothing_found(target)
        })?;
    }
    Ok(())
}

/// A large folio is split on the device, and its pages are freed one by one.
fn split(ctx: &Ctx, node: usize) -> Outcome {
    clears_flags(ctx)?;
    settled(ctx, node, |target| {
        for (first, count) in [(0, 1), (HUGE_PAGES / 2, 9), (HUGE_PAGES - 1, 1)] {
            let buf = huge_filled(1, 4220)?;
            target.move_all(&buf, 4220)?;
            target
                .to_system(&buf, first, count)
                .or_fail("MIGRATE_TO_SYS")?;
            buf.unmap(first, count)?;
            nothing_found(target)?;
        }
        nothing_found(target)
    })
}

/// Pages of a large folio are given out as small ones, and the other way round.
fn sizes(ctx: &Ctx, node: usize) -> Outcome {
    clears_flags(ctx)?;
    for _ in 0..3 {
        settled(ctx, node, |target| {
            let large = huge_filled(2, 4230)?;
            target.move_all(&large, 4230)?;
            drop(large);
            let small = Buffer::filled(2 * HUGE_PAGES, 4231)?;
            target.move_all(&small, 4231)?;
            drop(small);
            let large = huge_filled(2, 4232)?;
            target.move_all(&large, 4232)?;
            large.check(0, 2 * HUGE_PAGES, 4232)?;
            nothing_found(target)
        })?;
    }
    Ok(())
}

/// Ranges of which each half is one of: never touched, only read, written, on the device already. Core mm counts
/// what it collects of each.
fn collected(ctx: &Ctx, node: usize) -> Outcome {
    const HALF: usize = 4;
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Half {
        Hole,
        Zeroes,
        Pages,
        Away,
    }
    const HALVES: [Half; 4] = [Half::Hole, Half::Zeroes, Half::Pages, Half::Away];
    needs_all_fixes(ctx)?;
    settled(ctx, node, |target| {
        for both in HALVES.iter().flat_map(|a| HALVES.map(|b| [*a, b])) {
            let buf = Buffer::anon(2 * HALF)?;
            for (i, half) in both.into_iter().enumerate() {
                let first = i * HALF;
                match half {
                    Half::Hole => {}
                    Half::Zeroes => buf.check_zero(first, HALF)?,
                    Half::Pages | Half::Away => buf.fill(first, HALF, 4240),
                }
            }
            proc::drain_batches()?;
            for (i, half) in both.into_iter().enumerate() {
                if half == Half::Away {
                    let moved = target.to_device(&buf, i * HALF, HALF);
                    moved.or_fail("MIGRATE_TO_DEV of a half")?;
                }
            }
            let told = |e| Fail::failed(format!("{both:?}: {e}"));
            for _ in 0..2 {
                let moved = target.to_device(&buf, 0, 2 * HALF);
                moved.or_fail("MIGRATE_TO_DEV").map_err(told)?;
                nothing_found(target).map_err(told)?;
                target.expect(&buf, 0, 2 * HALF, 2 * HALF).map_err(told)?;
                target
                    .to_system(&buf, 0, 2 * HALF)
                    .or_fail("MIGRATE_TO_SYS")?;
                nothing_found(target).map_err(told)?;
            }
            for (i, half) in both.into_iter().enumerate() {
                match half {
                    Half::Hole | Half::Zeroes => buf.check_zero(i * HALF, HALF)?,
                    Half::Pages | Half::Away => buf.check(i * HALF, HALF, 4240)?,
                }
            }
        }
        // The page of zeroes that is huge, and a hole of that size.
        for read in [true, false] {
            let buf = Buffer::anon_huge_aligned(HUGE_PAGES)?;
            buf.advise(0, HUGE_PAGES, libc::MADV_HUGEPAGE)?;
            if read {
                buf.check_zero(0, 1)?;
            }
            target
                .to_device(&buf, 0, HUGE_PAGES)
                .or_fail("MIGRATE_TO_DEV")?;
            nothing_found(target)?;
            buf.check_zero(0, HUGE_PAGES)?;
        }
        Ok(())
    })
}
