// SPDX-License-Identifier: GPL-2.0

//! Operations on mappings: their rights, addresses and processes.

use super::super::Ctx;
use super::super::counts::Waiting;
use super::Place;
use super::{RW, each};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, pattern_bytes};
use crate::uapi::ZDM_FAULT_WRITE;
use crate::uffd::Uffd;
use crate::{check, proc};

/// After fork() neither a write of the device nor one of the CPU changes the child's data; the
/// child keeps the old pages.
pub(super) fn fork(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3200, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        let child = Waiting::start(|| Ok(()), || buf.check(0, n, 3200))?;
        // The device writes first: its right to write has been revoked.
        s.target
            .write(&buf, 0, &pattern_bytes(3205, 0, n / 2))
            .or_fail("WRITE")?;
        buf.check(0, n / 2, 3205)?;
        s.agree(&buf, 0, n)?;
        child.join()?;
        s.agree(&buf, 0, n)
    })
}

/// A range, and one page of it, lose the right to write and get it back.
pub(super) fn mprotect(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3210, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        for (first, count) in [(0, n), (n / 3, 1), (n - 1, 1)] {
            buf.protect(first, count, libc::PROT_READ)?;
            for page in [first, first + count - 1] {
                s.may_not_write(&buf, page, 1)?;
            }
            let read = s.target.read(&buf, 0, n).or_fail("READ")?;
            let cpu: Vec<u8> = (0..n)
                .flat_map(|page| buf.words(page))
                .flat_map(u64::to_ne_bytes)
                .collect();
            check!(read.data == cpu, "READ: expected what the CPU reads");
            buf.protect(first, count, RW)?;
            s.agree(&buf, 0, n)?;
        }
        Ok(())
    })
}

/// The device has no access where the CPU has none.
pub(super) fn prot_none(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3220, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        for (first, count) in [(n / 2, 1), (0, n)] {
            buf.protect(first, count, libc::PROT_NONE)?;
            for page in [first, first + count - 1] {
                s.finds_nothing(&buf, page, 1)?;
            }
            buf.protect(first, count, RW)?;
            s.reads(&buf, 0, n, s.seed)?;
            s.target
                .fault(buf.at(0), n as u64, ZDM_FAULT_WRITE)
                .or_fail("ZDM_FAULT")?;
        }
        s.agree(&buf, 0, n)
    })
}

pub(super) fn munmap(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3230, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        buf.unmap(0, n)?;
        s.finds_nothing(&buf, 0, 1)?;
        s.finds_nothing(&buf, n - 1, 1)?;
        // Map other memory in the same place.
        buf.map_again(0, n)?;
        s.reads_zero(&buf, 0, n)?;
        s.agree(&buf, 0, n)
    })
}

pub(super) fn munmap_part(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3240, |s| {
        for first in [0, 7] {
            let buf = s.filled()?;
            let n = buf.pages();
            buf.unmap(first, 3)?;
            for page in first..first + 3 {
                s.finds_nothing(&buf, page, 1)?;
            }
            s.reads(&buf, first + 3, n - first - 3, s.seed)?;
            s.reads(&buf, 0, first, s.seed)?;
            buf.map_again(first, 3)?;
            s.reads_zero(&buf, first, 3)?;
            s.agree(&buf, 0, n)?;
        }
        Ok(())
    })
}

pub(super) fn mremap(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3250, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        let place = Buffer::anon_huge_aligned(n)?;
        buf.move_pages(0, n, &place, 0)?;
        s.finds_nothing(&buf, 0, 1)?;
        s.finds_nothing(&buf, n - 1, 1)?;
        s.reads(&place, 0, n, s.seed)?;
        buf.map_again(0, n)?;
        s.reads_zero(&buf, 0, n)?;
        s.agree(&buf, 0, n)?;
        s.agree(&place, 0, n)
    })
}

/// The old place stays mapped without pages.
pub(super) fn mremap_dontunmap(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3260, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        let place = Buffer::anon_huge_aligned(n)?;
        buf.move_contents(0, n, &place, 0)?;
        // The device reads first.
        s.reads_zero(&buf, 0, n)?;
        s.reads(&place, 0, n, s.seed)?;
        s.target
            .write(&buf, 0, &pattern_bytes(3265, 0, n))
            .or_fail("WRITE")?;
        place.check(0, n, s.seed)?;
        buf.check(0, n, 3265)?;
        s.agree(&buf, 0, n)?;
        s.agree(&place, 0, n)
    })
}

/// The device no longer sees the pages that the new place had before.
pub(super) fn mremap_over(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3270, |s| {
        let (from, to) = (s.filled()?, s.filled()?);
        let n = from.pages();
        from.fill(0, n, 3275);
        from.move_pages(0, n, &to, 0)?;
        s.reads(&to, 0, n, 3275)?;
        s.agree(&to, 0, n)
    })
}

/// The device follows UFFDIO_MOVE, whether it moves pages or refuses.
pub(super) fn uffd_move(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3280, |s| {
        let from = s.filled()?;
        let n = from.pages();
        let to = Buffer::anon_huge_aligned(n)?;
        let uffd = Uffd::new().or_fail("userfaultfd")?;
        uffd.register(&to, 0, n).or_fail("UFFDIO_REGISTER")?;
        // The kernel decides whether pages of a device move.
        let moved = match uffd.move_pages(&from, 0, n, &to, 0) {
            Ok(moved) => moved,
            Err(e) => {
                let errnos = [libc::EFAULT, libc::EBUSY, libc::EINVAL, libc::ENOENT];
                check!(
                    s.place != Place::System
                        && e.raw_os_error().is_some_and(|n| errnos.contains(&n)),
                    "UFFDIO_MOVE: expected success, found {e}"
                );
                0
            }
        };
        check!(
            moved > 0 || s.place != Place::System,
            "pages of the system that moved: expected some"
        );
        if moved > 0 {
            s.reads_zero(&from, 0, moved)?;
            s.reads(&to, 0, moved, s.seed)?;
            s.target
                .write(&from, 0, &pattern_bytes(3285, 0, moved))
                .or_fail("WRITE")?;
            to.check(0, moved, s.seed)?;
            s.agree(&to, 0, moved)?;
        }
        // Pages of another device do not go to this one.
        if moved > 0 && !(s.place == Place::Remote && s.target.cpu_maps()) {
            // rmap finds the pages at their new addresses.
            to.fill(0, moved, 3286);
            proc::drain_batches()?;
            s.target
                .to_device(&to, 0, moved)
                .or_fail("MIGRATE_TO_DEV")?;
            s.target.expect(&to, 0, moved, moved)?;
            s.target.release().or_fail("RELEASE")?;
            s.target.expect(&to, 0, moved, 0)?;
            to.check(0, moved, 3286)?;
        }
        s.agree(&from, 0, n)
    })
}

/// The device respects userfaultfd's write protection.
pub(super) fn uffd_wp(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3290, |s| {
        let buf = s.filled()?;
        let n = buf.pages();
        let uffd = Uffd::new().or_fail("userfaultfd")?;
        uffd.register_writes(&buf, 0, n)
            .or_fail("UFFDIO_REGISTER")?;
        s.target
            .fault(buf.at(0), n as u64, ZDM_FAULT_WRITE)
            .or_fail("ZDM_FAULT")?;
        uffd.protect(&buf, 0, n, true)
            .or_fail("UFFDIO_WRITEPROTECT")?;
        s.reads(&buf, 0, n, s.seed)?;
        for page in [0, n / 2, n - 1] {
            // No task answers: the write must not happen, now or later.
            let data = pattern_bytes(3295, page, 1);
            let result = s.target.write(&buf, page, &data);
            check!(
                result.is_err(),
                "WRITE to a protected page: expected an error, found success"
            );
        }
        buf.check(0, n, s.seed)?;
        uffd.protect(&buf, 0, n, false)
            .or_fail("UFFDIO_WRITEPROTECT")?;
        s.agree(&buf, 0, n)
    })
}
