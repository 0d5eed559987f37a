// SPDX-License-Identifier: GPL-2.0

//! Other kinds of pages than plain anonymous ones.

use std::fs::File;

use super::super::Ctx;
use super::super::chain::SIZES;
use super::super::ksm::{Ksm, merged};
use super::super::leak::settled_in;
use super::super::strict::has_all_fixes;
use super::super::swap::swap_out;
use super::{Back, RW, SMALL, Scene, WAYS};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, PAGE, pattern_bytes};
use crate::pagemap::{SCAN_FILE, SCAN_PRESENT, SCAN_SWAPPED, SCAN_ZERO};
use crate::pagestate::{State, clear_soft_dirty, states};
use crate::swap::Swap;
use crate::uapi::*;
use crate::{check, check_eq, proc, sys};

/// Private copies of a file's pages, some of them read-only, next to pages of the file itself.
pub(super) fn file_private(ctx: &Ctx, node: usize) -> Outcome {
    const N: usize = SMALL;
    settled_in(ctx, node, |target, _| {
        let file: File = sys::memfd("zdm-place").or_fail("memfd_create")?;
        file.set_len((N * PAGE) as u64).or_fail("ftruncate")?;
        Buffer::shared(&file, N)?.fill(0, N, 3070);
        let buf = Buffer::of_file(&file, N, libc::MAP_PRIVATE).or_fail("mmap")?;
        buf.check(0, N, 3070)?;
        for page in (0..N).step_by(2) {
            buf.fill(page, 1, 3071);
        }
        let content = |buf: &Buffer| -> Outcome {
            (0..N).try_for_each(|page| buf.check(page, 1, 3071 - page as u64 % 2))
        };
        for prot in [RW, libc::PROT_READ] {
            buf.protect(0, N, prot)?;
            let before = states(target, &buf, 0, N)?;
            for request in [true, false] {
                proc::drain_batches()?;
                // The pages of the file have no entry in the device's table.
                let moved = target.to_device(&buf, 0, N);
                expect_errno(moved, &[libc::ENOENT], "MIGRATE_TO_DEV")?;
                target.expect(&buf, 0, N, N / 2)?;
                let there = states(target, &buf, 0, N)?;
                for page in 0..N {
                    let mut expected = before[page];
                    if page % 2 == 0 && !target.cpu_maps() {
                        expected.scan = expected.scan & !SCAN_PRESENT | SCAN_SWAPPED;
                    }
                    check_eq!(
                        there[page],
                        expected,
                        "page {page} with copies on the device"
                    );
                    let file = expected.scan & SCAN_FILE != 0;
                    check_eq!(file, page % 2 == 1, "page {page} is one of the file");
                }
                if request || target.cpu_maps() {
                    target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
                }
                content(&buf)?;
                target.expect(&buf, 0, N, 0)?;
                check_eq!(states(target, &buf, 0, N)?, before, "states in the end");
            }
        }
        buf.protect(0, N, RW)?;
        content(&buf)
    })
}

/// The pages that the device makes for holes and for the zero page have the rights of the mapping,
/// and are charged and counted like others.
fn fresh(ctx: &Ctx, node: usize, touch: bool) -> Outcome {
    // Without the series new PRIVATE pages have no mark.
    let marks = has_all_fixes(ctx)?;
    for huge in SIZES {
        for prot in [RW, libc::PROT_READ] {
            for how in WAYS {
                settled_in(ctx, node, |target, dir| {
                    let s = Scene::new(target, dir, huge, 3080)?;
                    s.buf.advise(s.first, s.n, libc::MADV_DONTNEED)?;
                    s.buf.protect(s.first, s.n, prot)?;
                    if touch {
                        s.buf.check_zero(s.first, s.n)?;
                        let zero = s
                            .states()?
                            .iter()
                            .filter(|p| p.scan & SCAN_ZERO != 0)
                            .count();
                        check_eq!(zero, s.n, "pages of zeroes");
                    }
                    clear_soft_dirty()?;
                    let moved = target
                        .to_device(&s.buf, s.first, s.n)
                        .or_fail("MIGRATE_TO_DEV")?;
                    check!(
                        moved.data.iter().all(|b| *b == 0),
                        "data of fresh pages: expected zeroes"
                    );
                    target.expect(&s.buf, s.first, s.n, s.n)?;
                    let expect = |when: &str| -> Outcome {
                        for (i, page) in s.states()?.iter().enumerate() {
                            let write = page.flags & ZDM_PAGE_WRITE != 0;
                            let anon = page.flags & ZDM_PAGE_ANON != 0;
                            let charged = page.flags & ZDM_PAGE_CHARGED != 0;
                            check!(
                                (!write || prot == RW) && anon && charged && !page.uffd_wp,
                                "page {i} {when}, rights {prot:#x}: expected a charged anonymous \
                                 page with no more rights, found {page:x?}"
                            );
                            check!(
                                page.soft_dirty || !marks,
                                "page {i} {when}, rights {prot:#x}: expected the mark of a new \
                                 page, found {page:x?}"
                            );
                        }
                        let rss = proc::smaps(&s.buf, s.first, s.n, "Rss")?;
                        check_eq!(rss, s.n as u64, "Rss {when}");
                        let anon = proc::smaps(&s.buf, s.first, s.n, "Anonymous")?;
                        check_eq!(anon, s.n as u64, "Anonymous {when}");
                        Ok(())
                    };
                    expect("on the device")?;
                    let denied = target.write(&s.buf, s.first, &pattern_bytes(3081, 0, 1));
                    check_eq!(denied.is_ok(), prot == RW, "WRITE of the device");
                    s.bring_back(how)?;
                    expect("back")?;
                    s.buf.protect(s.first, s.n, RW)?;
                    s.fill(3082);
                    s.check(3082)
                })?;
            }
        }
    }
    Ok(())
}

pub(super) fn holes(ctx: &Ctx, node: usize) -> Outcome {
    fresh(ctx, node, false)
}

pub(super) fn zero_pages(ctx: &Ctx, node: usize) -> Outcome {
    fresh(ctx, node, true)
}

/// Pages that were read back from swap and are still in the swap cache: they migrate with their
/// marks, and keep no more swap space than before.
pub(super) fn swap_cache(ctx: &Ctx, node: usize) -> Outcome {
    settled_in(ctx, node, |target, dir| {
        let _swap = Swap::on()?;
        let s = Scene::new(target, dir, false, 3090)?;
        let before = s.counters()?;
        swap_out(&s.buf, s.first, s.n, s.n)?;
        // A read leaves the page in the swap cache, a write does not.
        s.check(3090)?;
        let mut states = s.states()?;
        // A kernel with series A reports these pages as read-only, because they are clean. They are
        // writable on PRIVATE memory, and afterwards; the CPU maps those of another kind with the
        // entries that they had.
        for state in &mut states {
            if !target.cpu_maps() {
                state.flags |= ZDM_PAGE_WRITE;
            }
        }
        proc::drain_batches()?;
        let moved = target.to_device(&s.buf, s.first, s.n);
        if let Err(e) = &moved {
            check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
        }
        let went = target.on_device(&s.buf, s.first, s.n)?;
        crate::harness::note(&format!("{went} of {} pages in the swap cache went", s.n));
        if went == s.n {
            s.expect(&states, true, "from the swap cache, on the device")?;
        }
        target
            .to_system(&s.buf, s.first, s.n)
            .or_fail("MIGRATE_TO_SYS")?;
        s.expect(&states, false, "from the swap cache, back")?;
        s.check(3090)?;
        s.fill(3091);
        s.send(3091)?;
        s.bring_back(Back::Request)?;
        s.check(3091)?;
        // These counters differ by less than the program's own allocations. Those of smaps are
        // exact.
        const OWN: &[&str] = &["swapcached", "RssAnon", "nr_anon_pages", "anon"];
        let range = (s.first, s.n);
        s.watch.expect(&s.buf, range, &before, OWN, "after swap")
    })
}

/// Pages that KSM has merged: a page that migrates becomes the process's own, the other process's
/// pages stay the same, and shared pages are not writable.
pub(super) fn merged_pages(ctx: &Ctx, node: usize) -> Outcome {
    settled_in(ctx, node, |target, _| {
        let ksm = Ksm::start()?;
        let [a, b] = merged(&ksm, 3100)?;
        let n = a.pages();
        let before = [states(target, &a, 0, n)?, states(target, &b, 0, n)?];
        if let Err(e) = target.to_device(&a, 0, n) {
            check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
        }
        // A page that migrates does so for every process that maps it.
        let in_place = |states: &[State]| -> Vec<State> {
            let place = SCAN_PRESENT | SCAN_SWAPPED;
            let mask = |s: &State| State {
                scan: s.scan & !place,
                ..*s
            };
            states.iter().map(mask).collect()
        };
        check_eq!(
            in_place(&states(target, &b, 0, n)?),
            in_place(&before[1]),
            "the other's states"
        );
        for (i, page) in states(target, &a, 0, n)?.iter().enumerate() {
            let write = page.flags & ZDM_PAGE_WRITE;
            check_eq!(write, 0, "right to write to page {i} that others share");
        }
        target.to_system(&a, 0, n).or_fail("MIGRATE_TO_SYS")?;
        b.check(0, n, 3100)?;
        a.fill(0, n, 3101);
        b.check(0, n, 3100)?;
        a.check(0, n, 3101)
    })
}
