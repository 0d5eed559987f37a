// SPDX-License-Identifier: GPL-2.0

//! Operations on pages: they are dropped, swapped out, merged, moved, or made exclusive.

use super::super::ksm::Ksm;
use super::super::leak::settled;
use super::super::swap::swap_out;
use super::super::target::Target;
use super::super::{Ctx, PAGES};
use super::{Place, RW, Scene, each};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::swap::Swap;
use crate::uapi::{PROT_ERROR, PROT_NONE, ZDM_FAULT_WRITE};
use crate::{check, check_eq, files, numa, proc, sys};

/// Pages that are dropped, all or one by one, are zeroes for the device, too.
pub(super) fn dontneed(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3300, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        for page in [0, n / 2, n - 1] {
            buf.advise(page, 1, libc::MADV_DONTNEED)?;
            s.reads_zero(&buf, page, 1)?;
        }
        s.reads(&buf, 1, n / 2 - 1, s.seed)?;
        s.agree(&buf, 0, n)?;
        s.target
            .fault(buf.at(0), n as u64, ZDM_FAULT_WRITE)
            .or_fail("ZDM_FAULT")?;
        buf.advise(0, n, libc::MADV_DONTNEED)?;
        s.reads_zero(&buf, 0, n)?;
        s.agree(&buf, 0, n)
    })
}

/// Files that have read the page of zeroes in each place read afterwards what a device has put there, and written.
pub(super) fn zeroes(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3380, |s| {
        let taker = match s.place {
            Place::System => return Ok(()),
            Place::Local => s.target,
            Place::Remote => &s.other,
        };
        let n = if s.huge { HUGE_PAGES } else { PAGES };
        let buf = Buffer::anon_huge_aligned(n)?;
        let advice = if s.huge {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        buf.advise(0, n, advice)?;
        buf.check_zero(0, n)?;
        let second = Target::open(ctx, node)?;
        let files = [s.target, &second, &s.other];
        for file in files {
            let mapped = file.fault(buf.at(0), n as u64, 0).or_fail("ZDM_FAULT")?;
            check_eq!(mapped, n as u64, "pages of zeroes that a file maps");
        }
        taker.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
        taker
            .write(&buf, 0, &pattern_bytes(3381, 0, n))
            .or_fail("WRITE")?;
        for file in files {
            let read = file.read(&buf, 0, n).or_fail("READ")?;
            check_bytes(&read.data, 3381, 0, "what took the place of zeroes")?;
        }
        buf.check(0, n, 3381)?;
        s.agree(&buf, 0, n)
    })
}

/// The device finds nothing behind guard markers.
pub(super) fn guard(ctx: &Ctx, node: usize) -> Outcome {
    const INSTALL: i32 = 102;
    const REMOVE: i32 = 103;
    each(ctx, node, 3310, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        for (first, count) in [(n / 2, 1), (0, n)] {
            buf.advise(first, count, INSTALL)?;
            s.finds_nothing(&buf, first, 1)?;
            s.finds_nothing(&buf, first + count - 1, 1)?;
            buf.advise(first, count, REMOVE)?;
            s.reads_zero(&buf, first, count)?;
        }
        s.agree(&buf, 0, n)
    })
}

/// The device reads swapped-out pages from swap, and sees the changes that the CPU makes after
/// reading them back.
pub(super) fn swapped_out(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3320, |s| {
        let _swap = Swap::on()?;
        let buf = s.filled()?;
        let n = buf.pages();
        // Pages of a device are not swapped out.
        let expected = n - s.target.on_device(&buf, 0, n)?;
        swap_out(&buf, 0, n, expected)?;
        s.reads(&buf, 0, n / 2, s.seed)?;
        swap_out(&buf, 0, n, expected)?;
        s.agree(&buf, 0, n)
    })
}

/// No write reaches a page that KSM has merged, including writes of the device.
pub(super) fn ksm(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3330, |s| {
        if s.huge {
            return Ok(());
        }
        let ksm = Ksm::start()?;
        let bufs = [Buffer::filled(PAGES, 3330)?, Buffer::filled(PAGES, 3330)?];
        let n = PAGES;
        for buf in &bufs {
            if s.place == Place::System {
                s.arrange(buf)?;
            }
            buf.advise(0, n, libc::MADV_MERGEABLE)?;
        }
        ksm.scan()?;
        let mut away = 0;
        if s.place != Place::System {
            // KSM cannot handle pages that are on the device: do not scan until it is known that the
            // kernel has left the merged pages in system memory.
            ksm.pause()?;
            for buf in &bufs {
                let device = if s.place == Place::Local {
                    s.target
                } else {
                    &s.other
                };
                let _ = device.to_device(buf, 0, n);
                away += device.on_device(buf, 0, n)?;
                s.target
                    .fault(buf.at(0), n as u64, 0)
                    .or_fail("ZDM_FAULT")?;
            }
            if away == 0 {
                ksm.resume()?;
            }
        }
        for page in (0..n).step_by(5) {
            s.target
                .write(&bufs[0], page, &pattern_bytes(3335, page, 1))
                .or_fail("WRITE")?;
        }
        bufs[1].check(0, n, 3330)?;
        s.reads(&bufs[1], 0, n, 3330)?;
        if away == 0 {
            ksm.scan()?;
        }
        s.agree(&bufs[0], 0, n)?;
        bufs[1].check(0, n, 3330)?;
        s.agree(&bufs[1], 0, n)
    })
}

/// Small pages become a huge one, and a huge one becomes small pages.
pub(super) fn collapse(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3340, |s| {
        let n = HUGE_PAGES;
        let buf = Buffer::anon_huge_aligned(n)?;
        buf.advise(0, n, libc::MADV_HUGEPAGE)?;
        buf.fill(0, n, s.seed);
        if !s.huge {
            // Other rights for one page split the entry; restoring them does not join it.
            buf.protect(3, 1, libc::PROT_READ)?;
            buf.protect(3, 1, RW)?;
        }
        s.arrange(&buf)?;
        match buf.try_advise(0, n, libc::MADV_COLLAPSE) {
            Ok(()) => {}
            // Pages of a device are not collapsed.
            Err(e) => {
                check!(
                    s.place != Place::System || s.huge,
                    "MADV_COLLAPSE: expected success, found {e}"
                );
            }
        }
        s.reads(&buf, 0, n, s.seed)?;
        s.agree(&buf, 0, n)?;
        buf.protect(n / 2, 1, libc::PROT_READ)?;
        s.may_not_write(&buf, n / 2, 1)?;
        buf.protect(n / 2, 1, RW)?;
        s.agree(&buf, 0, n)
    })
}

/// The kernel moves pages within system memory, between nodes and by compaction.
pub(super) fn moved(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3350, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        for to in [1, 0] {
            // A machine with one node has no target, and returns an error for each page.
            let _ = numa::move_pages(&buf, 0, n, Some(to));
            s.reads(&buf, 0, n, s.seed)?;
        }
        std::fs::write("/proc/sys/vm/compact_memory", "1").or_fail("compact_memory")?;
        s.agree(&buf, 0, n)
    })
}

/// Exclusive access of a device ends as soon as the CPU accesses the page, which has the device's
/// data; the device keeps no other mapping.
pub(super) fn exclusive(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3360, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        if s.place != Place::System && !s.target.cpu_maps() {
            // The CPU maps the page on the device.
            return Ok(());
        }
        let count = n.min(PAGES);
        s.target.exclusive(&buf, 0, count).or_fail("EXCLUSIVE")?;
        buf.fill(0, count, 3365);
        s.reads(&buf, 0, count, 3365)?;
        s.reads(&buf, count, n - count, s.seed)?;
        s.agree(&buf, 0, n)
    })
}

/// The other device gets exclusive access: this device loses its mapping, and then sees the other
/// one's writes.
pub(super) fn exclusive_other(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3370, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        if s.place != Place::System && !s.target.cpu_maps() {
            return Ok(());
        }
        let count = n.min(PAGES);
        s.other.exclusive(&buf, 0, count).or_fail("EXCLUSIVE")?;
        // Without a fault this device has no mapping there.
        let seen = s.target.snapshot(&buf, 0, count).or_fail("SNAPSHOT")?;
        check!(
            seen.iter().all(|p| *p == PROT_NONE || *p == PROT_ERROR),
            "SNAPSHOT of what is the other's alone: expected nothing, found {seen:x?}"
        );
        s.other
            .write(&buf, 0, &pattern_bytes(3375, 0, count))
            .or_fail("WRITE of the other")?;
        s.reads(&buf, 0, count, 3375)?;
        buf.check(0, count, 3375)?;
        s.agree(&buf, 0, n)
    })
}

/// The other device takes the pages.
pub(super) fn to_other_device(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3380, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        proc::drain_batches()?;
        // Pages of a device may stay where they are.
        if let Err(e) = s.other.to_device(&buf, 0, n) {
            check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
        }
        let data = pattern_bytes(3385, 0, n);
        s.other
            .write(&buf, 0, &data)
            .or_fail("WRITE of the other")?;
        s.reads(&buf, 0, n, 3385)?;
        s.target
            .write(&buf, 0, &pattern_bytes(3386, 0, n))
            .or_fail("WRITE")?;
        let read = s.other.read(&buf, 0, n).or_fail("READ of the other")?;
        check_bytes(&read.data, 3386, 0, "READ by the other device")?;
        s.agree(&buf, 0, n)
    })
}

/// The device does not find pages that were truncated or punched out of a file.
pub(super) fn truncate(ctx: &Ctx, node: usize) -> Outcome {
    Target::open(ctx, node)?;
    settled(ctx, node, |target| {
        let n = PAGES;
        let file = sys::memfd("zdm-mirror").or_fail("memfd_create")?;
        file.set_len((n * PAGE) as u64).or_fail("ftruncate")?;
        let buf = Buffer::shared(&file, n)?;
        let s = Scene {
            target,
            other: Target::open(ctx, node + 1)?,
            place: Place::System,
            huge: false,
            seed: 3390,
        };
        buf.fill(0, n, 3390);
        s.arrange(&buf)?;
        files::punch(&file, 4, 3).or_fail("a hole punch")?;
        s.reads_zero(&buf, 4, 3)?;
        s.agree(&buf, 0, n)?;
        s.arrange(&buf)?;
        files::truncate(&file, n / 2).or_fail("ftruncate")?;
        s.finds_nothing(&buf, n / 2, 1)?;
        s.finds_nothing(&buf, n - 1, 1)?;
        files::truncate(&file, n).or_fail("ftruncate")?;
        s.reads_zero(&buf, n / 2, n / 2)?;
        s.agree(&buf, 0, n)
    })
}
