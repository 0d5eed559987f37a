// SPDX-License-Identifier: GPL-2.0

//! Rights, addresses and sizes of mappings change while their pages are on the device: mprotect,
//! mremap, munmap, with small and huge pages. `unmap.rs` has further tests of unshared pages,
//! `thp/parts.rs` of parts of huge pages.

use super::chain::{Image, SIZES, expect_no_write, filled};
use super::counts::{MAPPED, Waiting, expect_free, frames};
use super::leak::settled;
use super::target::{Target, expect_huge, huge_filled};
use super::{Ctx, PAGES, Test, freed_since};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = of_each_kind!("rights":
    "and_back" => and_back,
    "shared" => shared,
    "entry_split_in_one_process" => entry_split_in_one_process,
    "mremap_dontunmap" => mremap_dontunmap,
    "mremap_over" => mremap_over,
    "mremap_part_over" => mremap_part_over,
    "mremap_shared" => mremap_shared,
    "munmap_pages" => munmap_pages,
    "munmap_all_but_one" => munmap_all_but_one,
    "not_for_children" => not_for_children,
);

const N: usize = HUGE_PAGES;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// The pages of a buffer that are checked one by one: the first, some in the middle, the last.
fn single(n: usize) -> [usize; 4] {
    [0, 1, n / 2, n - 1]
}

/// Checks that a write by the CPU ends the process that tries it.
#[track_caller]
fn refused(buf: &Buffer, page: usize) -> Outcome {
    Child::expect_segv(
        || {
            buf.set(page, 0, 1);
        },
        &format!("end of who writes to page {page}"),
    )?;
    Ok(())
}

/// Rights are revoked and given back: read-only pages are so for the CPU and the device, and the
/// data stays the same.
fn and_back(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1200)?;
            let n = buf.pages();
            let mut image = Image::new(n, 1200);
            image.send(target, &buf)?;
            for (round, between) in [libc::PROT_READ, libc::PROT_NONE].into_iter().enumerate() {
                buf.protect(0, n, libc::PROT_READ)?;
                expect_no_write(target, &buf, "read-only")?;
                image.check_device(target, &buf)?;
                buf.protect(0, n, between)?;
                for page in single(n) {
                    refused(&buf, page)?;
                    let result = target.write(&buf, page, &pattern_bytes(1201, page, 1));
                    expect_errno(
                        result,
                        &[libc::EPERM, libc::EFAULT],
                        "WRITE of the device without the right",
                    )?;
                }
                buf.protect(0, n, RW)?;
                target.expect(&buf, 0, n, n)?;
                image.check_device(target, &buf)?;
                let data = pattern_bytes(1202, 3, 4);
                target.write(&buf, 3, &data).or_fail("WRITE")?;
                image.set(3, 4, 1202);
                image.check(&buf)?;
                image.fill(&buf, n - 2, 2, 1203 + round as u64);
                image.send(target, &buf)?;
            }
            target.bring_back(&buf, 0, n)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

/// Rights that come back after fork() do not allow writes to the other process's page, neither by
/// the CPU nor by the device. (Mutants: fork or mprotect leaves a writable device entry.)
fn shared(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for between in [libc::PROT_READ, libc::PROT_NONE] {
            settled(ctx, node, |target| {
                let buf = filled(huge, 1210)?;
                let n = buf.pages();
                let mut image = Image::new(n, 1210);
                image.send(target, &buf)?;
                let old = image.clone();
                let child = Waiting::start(|| Ok(()), || old.check(&buf))?;
                buf.protect(0, n, between)?;
                buf.protect(0, n, RW)?;
                expect_no_write(target, &buf, "after fork and mprotect")?;
                let data = pattern_bytes(1211, 2, 7);
                target.write(&buf, 2, &data).or_fail("WRITE")?;
                image.set(2, 7, 1211);
                image.fill(&buf, n / 2, n / 4, 1212);
                image.check(&buf)?;
                image.send(target, &buf)?;
                buf.protect(0, n, between)?;
                buf.protect(0, n, RW)?;
                image.fill(&buf, n - 1, 1, 1213);
                child.join()?;
                image.check(&buf)
            })?;
        }
    }
    Ok(())
}

/// One process has a huge entry of a folio on the device, another one 512 small entries: the
/// counts, the data and the end are right in either order.
fn entry_split_in_one_process(ctx: &Ctx, node: usize) -> Outcome {
    for parent_splits in [false, true] {
        for page in [0, N / 2, N - 1] {
            settled(ctx, node, |target| {
                let buf = huge_filled(1, 1220)?;
                let mut image = Image::new(N, 1220);
                target.move_huge(&buf, 1220)?;
                let old = image.clone();
                let split = || -> Outcome {
                    buf.protect(page, 1, libc::PROT_READ)?;
                    expect_huge(&buf, 0, N, 0)
                };
                let child = Waiting::start(
                    || if parent_splits { Ok(()) } else { split() },
                    || {
                        old.check(&buf)?;
                        buf.protect(page, 1, RW)?;
                        buf.fill(0, N, 1221);
                        buf.check(0, N, 1221)
                    },
                )?;
                if parent_splits {
                    split()?;
                    let counts = target.inspect_one(&buf, 3)?;
                    check_eq!(
                        counts.refs,
                        counts.mapcount,
                        "references of a page that two processes map"
                    );
                    buf.protect(page, 1, RW)?;
                } else if target.moves_large() {
                    expect_huge(&buf, 0, N, N)?;
                }
                image.check_device(target, &buf)?;
                image.fill(&buf, page, 1, 1222);
                child.join()?;
                image.check(&buf)?;
                buf.advise(0, N, libc::MADV_DONTNEED)?;
                target.expect_empty()
            })?;
        }
    }
    Ok(())
}

/// The pages move; the old address stays mapped without pages.
fn mremap_dontunmap(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1230)?;
            let n = buf.pages();
            let image = Image::new(n, 1230);
            image.send(target, &buf)?;
            let pfns = frames(target, &buf, 0, n)?;
            let place = Buffer::anon_huge_aligned(n)?;
            let before = target.stats()?;
            buf.move_contents(0, n, &place, 0)?;
            check_eq!(&frames(target, &place, 0, n)?, &pfns, "frames after mremap");
            target.expect(&place, 0, n, n)?;
            target.expect(&buf, 0, n, 0)?;
            image.check_device(target, &place)?;
            let after = target.stats()?;
            check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults by mremap");
            buf.check_zero(0, n)?;
            buf.fill(0, n, 1231);
            target.move_all(&buf, 1231)?;
            image.check(&place)?;
            buf.check(0, n, 1231)
        })?;
    }
    Ok(())
}

/// Pages of the device move over other pages of the device, which are freed by that.
fn mremap_over(ctx: &Ctx, node: usize) -> Outcome {
    for (from_huge, to_huge) in [(false, false), (true, true), (false, true), (true, false)] {
        settled(ctx, node, |target| {
            let (from, n) = (filled(from_huge, 1240)?, PAGES);
            let to = filled(to_huge, 1241)?;
            for (buf, seed) in [(&from, 1240), (&to, 1241)] {
                target.move_all(buf, seed)?;
            }
            let n = match (from_huge, to_huge) {
                (true, true) => N,
                _ => n,
            };
            let moved = frames(target, &from, 0, n)?;
            let over = frames(target, &to, 0, n)?;
            let before = target.stats()?;
            from.move_pages(0, n, &to, 0)?;
            // A part of a huge page is not freed before the rest.
            if !to_huge || n == N {
                freed_since(target, &before, n)?;
                expect_free(target, &over, "after something was moved there")?;
            }
            check_eq!(&frames(target, &to, 0, n)?, &moved, "frames after mremap");
            to.check(0, n, 1240)?;
            to.check(n, to.pages() - n, 1241)?;
            if from.pages() > n {
                from.check(n, from.pages() - n, 1240)?;
            }
            target.bring_back(&to, 0, to.pages())?;
            to.check(0, n, 1240)?;
            to.check(n, to.pages() - n, 1241)
        })?;
    }
    Ok(())
}

/// Single pages of a huge page (the first, one in the middle, the last) move over single pages of
/// another one, to offsets of other parity.
fn mremap_part_over(ctx: &Ctx, node: usize) -> Outcome {
    for (page, at) in [(0, 0), (0, N - 1), (N / 2, 7), (N - 1, 0), (N - 1, N / 2)] {
        settled(ctx, node, |target| {
            let (from, to) = (huge_filled(1, 1250)?, huge_filled(1, 1251)?);
            target.move_huge(&from, 1250)?;
            target.move_huge(&to, 1251)?;
            from.move_pages(page, 1, &to, at)?;
            let check_rest = |buf: &Buffer, hole: usize, seed: u64| -> Outcome {
                buf.check(0, hole, seed)?;
                buf.check(hole + 1, N - hole - 1, seed)
            };
            let read = target.read(&to, at, 1).or_fail("READ of what was moved")?;
            check_bytes(&read.data, 1250, page, "READ of what was moved")?;
            to.check_from(at, 1, 1250, page)?;
            check_rest(&from, page, 1250)?;
            check_rest(&to, at, 1251)?;
            target.bring_back(&to, 0, N)?;
            check_rest(&to, at, 1251)?;
            to.check_from(at, 1, 1250, page)
        })?;
    }
    Ok(())
}

/// A child that moves shared pages moves only its own entries.
fn mremap_shared(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1260)?;
            let n = buf.pages();
            let image = Image::new(n, 1260);
            image.send(target, &buf)?;
            Child::spawn(|| {
                let place = Buffer::anon_huge_aligned(n + 8)?;
                buf.move_pages(0, n, &place, 8)?;
                place.check_from(8, n / 2, 1260, 0)?;
                place.fill(8, n / 3, 1261);
                let own = Target::open(ctx, node)?;
                own.to_device(&place, 8, n).or_fail("MIGRATE_TO_DEV")?;
                own.expect(&place, 8, n, n)?;
                place.check(8, n / 3, 1261)?;
                place.check_from(8 + n / 3, n - n / 3, 1260, n / 3)
            })?
            .join()?;
            image.check_device(target, &buf)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

/// Checks the counts and data of a remaining page of a huge page.
fn left(target: &Target, buf: &Buffer, page: usize, entries: i32, seed: u64) -> Outcome {
    let found = target.inspect_one(buf, page)?;
    // Whether split or not, every remaining entry is one reference of its folio.
    let expected = if found.order == 0 { 1 } else { entries };
    check!(
        found.refs == expected && found.mapcount == expected,
        "page {page} with {entries} left: expected {expected} references and mappings, found \
         {found:x?}"
    );
    let read = target.read(buf, page, 1).or_fail("READ")?;
    check_bytes(&read.data, seed, page, "READ of what is left")
}

/// Single pages of a huge page are unmapped, each alone and then together.
fn munmap_pages(ctx: &Ctx, node: usize) -> Outcome {
    for page in [0, 1, N / 2 - 1, N - 1] {
        settled(ctx, node, |target| {
            let buf = huge_filled(1, 1270)?;
            target.move_huge(&buf, 1270)?;
            let pfns = frames(target, &buf, 0, N)?;
            buf.unmap(page, 1)?;
            left(target, &buf, (page + 1) % N, N as i32 - 1, 1270)?;
            target.expect(&buf, 0, N, N - 1)?;
            let other = (page + N / 4) % N;
            buf.unmap(other, 1)?;
            left(target, &buf, (page + 1) % N, N as i32 - 2, 1270)?;
            let holes = [page.min(other), page.max(other)];
            let parts = [
                (0, holes[0]),
                (holes[0] + 1, holes[1] - holes[0] - 1),
                (holes[1] + 1, N - holes[1] - 1),
            ];
            // The parts are alternately brought back and freed on the device.
            for (i, (first, n)) in parts.into_iter().filter(|p| p.1 > 0).enumerate() {
                match i % 2 {
                    0 => {
                        target.bring_back(&buf, first, n)?;
                        buf.check(first, n, 1270)?;
                    }
                    _ => {
                        buf.check(first, 1, 1270)?;
                        buf.unmap(first, n)?;
                    }
                }
            }
            // Any part that is left has come back.
            target.expect_empty()?;
            expect_free(target, &pfns, "of a huge page in pieces")
        })?;
    }
    Ok(())
}

/// All of a huge page is unmapped except a single page, which still works; then it is unmapped,
/// too.
fn munmap_all_but_one(ctx: &Ctx, node: usize) -> Outcome {
    for page in [0, N / 2, N - 1] {
        for back in [false, true] {
            settled(ctx, node, |target| {
                let buf = huge_filled(1, 1280)?;
                target.move_huge(&buf, 1280)?;
                let pfns = frames(target, &buf, 0, N)?;
                if page > 0 {
                    buf.unmap(0, page)?;
                }
                if page + 1 < N {
                    buf.unmap(page + 1, N - page - 1)?;
                }
                left(target, &buf, page, 1, 1280)?;
                super::counts::expect(target, &buf, page, 1, MAPPED, "as the last of its folio")?;
                Child::spawn(|| {
                    buf.check(page, 1, 1280)?;
                    buf.fill(page, 1, 1281);
                    buf.check(page, 1, 1281)
                })?
                .join()?;
                match back {
                    true => {
                        target.bring_back(&buf, page, 1)?;
                        buf.check(page, 1, 1280)?;
                    }
                    false => buf.unmap(page, 1)?,
                }
                target.expect_empty()?;
                expect_free(target, &pfns, "when the last of it has gone")
            })?;
        }
    }
    Ok(())
}

/// A child gets no pages of MADV_DONTFORK ranges, and zeroes in MADV_WIPEONFORK ranges.
fn not_for_children(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1290)?;
            let n = buf.pages();
            let image = Image::new(n, 1290);
            image.send(target, &buf)?;
            // A huge page cannot lie in two mappings.
            buf.advise(0, n / 2, libc::MADV_DONTFORK)?;
            buf.advise(n / 2, n / 4, libc::MADV_WIPEONFORK)?;
            Child::spawn(|| {
                buf.check_zero(n / 2, n / 4)?;
                buf.check(n / 2 + n / 4, n / 4, 1290)?;
                buf.fill(n / 2, n / 2, 1291);
                Child::expect_segv(
                    || {
                        buf.get(n / 4, 0);
                    },
                    "end of who reads what is not for children",
                )?;
                Ok(())
            })?
            .join()?;
            // The first half is not shared: it can be written in place.
            let page = target.inspect_one(&buf, n / 4)?;
            check!(
                page.flags & ZDM_PAGE_WRITE != 0,
                "a page that was not for children: expected the right to write, found {page:x?}"
            );
            image.check_device(target, &buf)?;
            image.check(&buf)?;
            Ok(())
        })?;
    }
    Ok(())
}
