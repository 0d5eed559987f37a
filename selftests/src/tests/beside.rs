// SPDX-License-Identifier: GPL-2.0

//! Other movers of pages next to device memory: compaction, migration between NUMA nodes, and
//! hugetlbfs. They leave pages of the device alone, and do no harm to the others.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use super::chain::{Image, SIZES, filled};
use super::counts::frames;
use super::leak::settled;
use super::target::Target;
use super::{Ctx, PAGES, Test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::threads;
use crate::{check, check_eq, numa, proc};

pub const TESTS: &[Test] = of_each_kind!("beside":
    "compaction" => compaction,
    "compaction_race" => compaction_race,
    "move_pages" => move_pages,
    "mbind" => mbind,
    "migrate_pages" => migrate_pages,
    "hugetlb" => hugetlb,
);

const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// A buffer with the pattern of `seed`; every other eighth is on the device.
fn striped(target: &Target, huge: bool, seed: u64) -> Outcome<Buffer> {
    let buf = filled(huge, seed)?;
    let part = buf.pages() / 8;
    for first in (0..buf.pages()).step_by(2 * part) {
        target
            .to_device(&buf, first, part)
            .or_fail("MIGRATE_TO_DEV")?;
    }
    target.expect(&buf, 0, buf.pages(), buf.pages() / 2)?;
    Ok(buf)
}

/// The frames of the pages on the device.
fn away(target: &Target, buf: &Buffer) -> Outcome<Vec<u64>> {
    let part = buf.pages() / 8;
    let mut all = Vec::new();
    for first in (0..buf.pages()).step_by(2 * part) {
        all.extend(frames(target, buf, first, part)?);
    }
    Ok(all)
}

/// Runs `what`, and checks that pages of the device stay where they are and that all data is right.
fn beside(ctx: &Ctx, node: usize, what: impl Fn(&Target, &Buffer) -> Outcome) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = striped(target, huge, 2900)?;
            let image = Image::new(buf.pages(), 2900);
            let before = away(target, &buf)?;
            what(target, &buf)?;
            target.expect(&buf, 0, buf.pages(), buf.pages() / 2)?;
            check_eq!(&away(target, &buf)?, &before, "frames on the device");
            image.check_device(target, &buf)?;
            image.check(&buf)?;
            image.send(target, &buf)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

fn compaction(ctx: &Ctx, node: usize) -> Outcome {
    beside(ctx, node, |_, _| fs::write(COMPACT, "1").or_fail(COMPACT))
}

/// Pages migrate to the device and back while memory is compacted.
fn compaction_race(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let buf = Buffer::filled(PAGES, 2910)?;
        let over = AtomicBool::new(false);
        let (compacting, moving) = std::thread::scope(|scope| {
            let compacting = scope.spawn(|| -> Outcome<usize> {
                let mut rounds = 0;
                while !over.load(Ordering::SeqCst) {
                    fs::write(COMPACT, "1").or_fail(COMPACT)?;
                    rounds += 1;
                }
                Ok(rounds)
            });
            let moving = (0..20).try_for_each(|round: u64| {
                buf.fill(0, PAGES, 2911 + round);
                // Pages that compaction has isolated at this moment stay.
                let _ = target.to_device(&buf, 0, PAGES);
                buf.check(0, PAGES, 2911 + round)?;
                target.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
                target.expect(&buf, 0, PAGES, 0)
            });
            over.store(true, Ordering::SeqCst);
            (threads::join(compacting), moving)
        });
        moving?;
        let rounds = compacting?;
        check!(
            rounds > 0,
            "rounds of compaction: expected some, found none"
        );
        buf.check(0, PAGES, 2930)
    })
}

/// Checks that those pages of a striped buffer that are in system memory are on a node, or on any,
/// and checks the status of all pages from move_pages(2).
#[track_caller]
fn expect_node(target: &Target, status: &[i32], node: Option<i32>, what: &str) -> Outcome {
    let nodes = numa::nodes()?;
    let part = status.len() / 8;
    for (page, &status) in status.iter().enumerate() {
        let on_device = (page / part) % 2 == 0;
        let errors = [-libc::ENOENT, -libc::EFAULT, -libc::EACCES, -libc::EBUSY];
        let there = (0..nodes).contains(&status);
        let good = match (on_device, node) {
            // A page of the device is missing for the CPU or belongs to no node; or it has a node
            // as others.
            (true, _) => errors.contains(&status) || target.cpu_maps() && there,
            (false, Some(node)) => status == node,
            (false, None) => there,
        };
        check!(
            good,
            "status of page {page} {what}: found {status}, on the device {on_device}"
        );
    }
    Ok(())
}

/// The nodes of the pages of a buffer.
fn nodes_of(buf: &Buffer) -> Outcome<Vec<i32>> {
    numa::move_pages(buf, 0, buf.pages(), None).or_fail("move_pages")
}

/// The target nodes in order, such that on a machine with two nodes each page moves once.
fn stations() -> Outcome<Vec<i32>> {
    Ok((0..numa::nodes()?).chain([0]).collect())
}

/// move_pages(2) tells where pages are, and does not move pages of the device.
fn move_pages(ctx: &Ctx, node: usize) -> Outcome {
    beside(ctx, node, |target, buf| {
        expect_node(target, &nodes_of(buf)?, None, "by move_pages")?;
        for to in stations()? {
            let what = format!("by move_pages to {to}");
            let status = numa::move_pages(buf, 0, buf.pages(), Some(to)).or_fail("move_pages")?;
            expect_node(target, &status, Some(to), &what)?;
            expect_node(target, &nodes_of(buf)?, Some(to), &what)?;
        }
        Ok(())
    })
}

/// mbind(2) with all flags that make it move pages.
fn mbind(ctx: &Ctx, node: usize) -> Outcome {
    beside(ctx, node, |target, buf| {
        for to in stations()? {
            for strict in [false, true] {
                match numa::bind(buf, 0, buf.pages(), to, strict) {
                    // A page that cannot move makes the strict call fail.
                    Err(e) if strict && e.raw_os_error() == Some(libc::EIO) => {}
                    result => result.or_fail("mbind")?,
                }
            }
            expect_node(
                target,
                &nodes_of(buf)?,
                Some(to),
                &format!("by mbind to {to}"),
            )?;
        }
        Ok(())
    })
}

/// migrate_pages(2) on the whole process.
fn migrate_pages(ctx: &Ctx, node: usize) -> Outcome {
    beside(ctx, node, |target, buf| {
        let stations = stations()?;
        for pair in stations.windows(2) {
            let left = numa::migrate_pages(pair[0], pair[1]).or_fail("migrate_pages")?;
            if stations.len() == 2 {
                check_eq!(left, 0, "pages that would not move, with one node only");
            }
            let what = format!("by migrate_pages from {} to {}", pair[0], pair[1]);
            expect_node(target, &nodes_of(buf)?, Some(pair[1]), &what)?;
        }
        Ok(())
    })
}

const RESERVE: &str = "/proc/sys/vm/nr_hugepages";

/// Pages of hugetlbfs do not migrate; their neighbours do.
fn hugetlb(ctx: &Ctx, node: usize) -> Outcome {
    struct Reserve(String);
    impl Drop for Reserve {
        fn drop(&mut self) {
            // A surplus of reserved pages does no harm.
            let _ = fs::write(RESERVE, &self.0);
        }
    }
    let old = fs::read_to_string(RESERVE)
        .map_err(|e| Fail::Skip(format!("no hugetlbfs: {RESERVE}: {e}")))?;
    let _reserve = Reserve(old);
    fs::write(RESERVE, "2").or_fail(RESERVE)?;
    settled(ctx, node, |target| {
        let buf = Buffer::hugetlb(HUGE_PAGES).or_fail("mmap of a reserved huge page")?;
        buf.fill(0, HUGE_PAGES, 2920);
        let before = target.stats()?;
        for (first, n) in [(0, HUGE_PAGES), (7, 1)] {
            let result = target.to_device(&buf, first, n);
            expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_DEV of hugetlbfs")?;
            let result = target.to_system(&buf, first, n);
            expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_SYS of hugetlbfs")?;
        }
        let after = target.stats()?;
        check_eq!(after.to_device, before.to_device, "pages that went");
        check_eq!(
            after.allocated.wrapping_sub(after.freed),
            before.allocated.wrapping_sub(before.freed),
            "device pages in use"
        );
        // The device reads and writes them where they are, also from the middle on.
        for (first, n) in [(0, HUGE_PAGES), (1, 1), (7, 40), (HUGE_PAGES - 1, 1)] {
            let read = target.read(&buf, first, n).or_fail("READ of hugetlbfs")?;
            check_bytes(&read.data, 2920, first, "READ of hugetlbfs")?;
            target
                .write(&buf, first, &pattern_bytes(2920, first, n))
                .or_fail("WRITE of hugetlbfs")?;
        }
        let near = Buffer::filled(PAGES, 2921)?;
        target.move_all(&near, 2921)?;
        buf.check(0, HUGE_PAGES, 2920)?;
        near.check(0, PAGES, 2921)?;
        check_eq!(proc::present(&buf, 0, HUGE_PAGES)?, HUGE_PAGES, "present");
        Ok(())
    })
}
