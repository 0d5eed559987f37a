// SPDX-License-Identifier: GPL-2.0

//! Faults that a count of references cannot show and that `place`, `mirror`, `tlb` and `daxcross`
//! do not cover. Each test covers the place of a seeded bug that no other test noticed.

use std::fs;
use std::os::unix::fs::FileExt;

use super::chain::{Image, SIZES, filled};
use super::counts::{IDLE, MAPPED, Waiting, frames};
use super::fsdax::{LARGE, SMALL, Setup};
use super::leak::settled;
use super::swap::swap_out;
use super::target::{expect_huge, huge_filled};
use super::{Ctx, PAGES, Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::dax::Dax;
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE, pattern_bytes};
use crate::fsdax::{EXT4, REFLINK, XFS};
use crate::harness::Child;
use crate::swap::Swap;
use crate::sys::Exit;
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq, files, proc, sys};

pub const TESTS: &[Test] = of_each_kind!("blind":
    "moved_then_rmap" => moved_then_rmap,
    "lock_batches" => lock_batches,
    "cold" => cold,
    "dirty_exclusive" => dirty_exclusive,
    "huge_counter" => huge_counter,
    "mapped_by" => mapped_by,
);

pub const DAX: &[Test] = &[
    test("blind.dax_zero_page_ext4", dax_zero_page::<EXT4>),
    test("blind.dax_zero_page_xfs", dax_zero_page::<XFS>),
    test("blind.dax_second_file", dax_second_file),
    test("blind.dax_poison_offset", dax_poison_offset::<PAGE>),
    test(
        "blind.dax_poison_offset_pmd",
        dax_poison_offset::<{ HUGE_PAGES * PAGE }>,
    ),
];

/// Pages that UFFDIO_MOVE has moved are found at their new address. If a page kept its old index,
/// rmap would not find it, and it could neither migrate nor be swapped out.
fn moved_then_rmap(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for away in [false, true] {
            settled(ctx, node, |target| {
                let _swap = Swap::on()?;
                let from = filled(huge, 4100)?;
                let n = from.pages();
                if away && target.cpu_maps() {
                    target.move_all(&from, 4100)?;
                }
                // The distance from the beginning of the mapping differs.
                let to = Buffer::anon_huge_aligned(2 * HUGE_PAGES)?;
                let at = if huge { HUGE_PAGES } else { 5 };
                if huge {
                    to.advise(0, 2 * HUGE_PAGES, libc::MADV_HUGEPAGE)?;
                }
                let uffd = Uffd::new().or_fail("userfaultfd")?;
                uffd.register(&to, 0, 2 * HUGE_PAGES)
                    .or_fail("UFFDIO_REGISTER")?;
                let moved = match uffd.move_pages(&from, 0, n, &to, at) {
                    Ok(moved) => moved,
                    Err(e) => {
                        check!(away, "UFFDIO_MOVE: expected success, found {e}");
                        return Ok(());
                    }
                };
                check!(moved > 0, "pages moved: expected some, found none");
                to.check_from(at, moved, 4100, 0)?;
                let there = target.on_device(&to, at, moved)?;
                if there == 0 {
                    swap_out(&to, at, moved, moved)?;
                    to.check_from(at, moved, 4100, 0)?;
                    proc::drain_batches()?;
                    target.to_device(&to, at, moved).or_fail("MIGRATE_TO_DEV")?;
                    target.expect(&to, at, moved, moved)?;
                }
                // RELEASE gives no addresses: it finds the mappings by rmap.
                target.release().or_fail("RELEASE")?;
                target.expect(&to, at, moved, 0)?;
                to.check_from(at, moved, 4100, 0)
            })?;
        }
    }
    Ok(())
}

/// Pages on the device are in no batch of a CPU, however they are locked and unlocked: their counts
/// are right at once.
fn lock_batches(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 4110)?;
            let n = buf.pages();
            let image = Image::new(n, 4110);
            image.send(target, &buf)?;
            let exact = |when: &str| -> Outcome {
                for (i, page) in target
                    .inspect(&buf, 0, n)
                    .or_fail("ZDM_INSPECT")?
                    .iter()
                    .enumerate()
                {
                    check!(
                        page.refs == page.mapcount && page.refs > 0,
                        "references of page {i} {when}: expected its mappings, found {page:x?}"
                    );
                }
                Ok(())
            };
            for (first, count) in [(0, n), (n / 2, 1), (0, 16)] {
                buf.lock(first, count, true)?;
                exact("locked")?;
                buf.lock(first, count, false)?;
                exact("unlocked")?;
            }
            image.check_device(target, &buf)?;
            let pfns = frames(target, &buf, 0, n)?;
            buf.lock(0, n, true)?;
            buf.unmap(0, n)?;
            for pfn in [pfns[0], pfns[n - 1]] {
                let page = target.inspect_frames(pfn, 1)?[0];
                check_eq!(page.refs, 0, "references of a page that was unmapped");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// MADV_COLD, on all pages and on a part, does not affect pages on the device: huge ones stay huge,
/// and none is in a batch.
fn cold(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for (part, advice) in [
            (false, libc::MADV_COLD),
            (true, libc::MADV_COLD),
            (false, libc::MADV_PAGEOUT),
            (true, libc::MADV_PAGEOUT),
        ] {
            settled(ctx, node, |target| {
                let _swap = Swap::on()?;
                let buf = filled(huge, 4120)?;
                let n = buf.pages();
                let image = Image::new(n, 4120);
                image.send(target, &buf)?;
                let pfns = frames(target, &buf, 0, n)?;
                let count = if part { n / 3 } else { n };
                buf.advise(n / 4 * usize::from(part), count, advice)?;
                target.expect(&buf, 0, n, n)?;
                check_eq!(&frames(target, &buf, 0, n)?, &pfns, "frames");
                let pages = target.inspect(&buf, 0, n).or_fail("ZDM_INSPECT")?;
                for (i, page) in pages.iter().enumerate() {
                    check!(
                        page.refs == page.mapcount && page.flags & ZDM_PAGE_LRU == 0,
                        "page {i}: expected no reference beside its mappings, and no list, \
                         found {page:x?}"
                    );
                }
                if huge && !part && target.moves_large() {
                    expect_huge(&buf, 0, n, n)?;
                }
                image.check_device(target, &buf)?;
                image.check(&buf)
            })?;
        }
    }
    Ok(())
}

/// A page is written after MADV_FREE, then a device gets exclusive access to it and gives it back
/// without a write. The page must still be dirty, so that reclaim does not drop it.
fn dirty_exclusive(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        for end in [0, 1, 2] {
            let buf = Buffer::filled(PAGES, 4130)?;
            buf.advise(0, PAGES, libc::MADV_FREE)?;
            buf.fill(0, PAGES, 4131);
            proc::drain_batches()?;
            target.exclusive(&buf, 0, PAGES).or_fail("EXCLUSIVE")?;
            match end {
                0 => buf.check(0, PAGES, 4131)?,
                1 => {
                    // The device was the last to write.
                    target
                        .write(&buf, 0, &pattern_bytes(4131, 0, PAGES))
                        .or_fail("WRITE")?;
                    buf.check(0, PAGES, 4131)?;
                }
                _ => {
                    let child = Waiting::start(|| Ok(()), || buf.check(0, PAGES, 4131))?;
                    child.join()?;
                }
            }
            proc::drain_batches()?;
            buf.advise(0, PAGES, libc::MADV_PAGEOUT)?;
            buf.check(0, PAGES, 4131)?;
        }
        Ok(())
    })
}

/// The statistics of huge pages return to their initial values when all pages have gone, in each
/// way.
fn huge_counter(ctx: &Ctx, node: usize) -> Outcome {
    let read = |name: &str| -> Option<i64> {
        let kib = HUGE_PAGES * PAGE / 1024;
        let base = "/sys/kernel/mm/transparent_hugepage";
        let path = format!("{base}/hugepages-{kib}kB/stats/{name}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let all = || ["nr_anon", "nr_anon_partially_mapped"].map(read);
    let before = all();
    if before[0].is_none() {
        return Err(Fail::Skip("no statistics of huge pages".into()));
    }
    for way in 0..5 {
        settled(ctx, node, |target| {
            let buf = huge_filled(2, 4140)?;
            let n = buf.pages();
            target.move_all(&buf, 4140)?;
            match way {
                // The pages are freed on the device.
                0 => buf.unmap(0, n)?,
                // The pages come back in one piece.
                1 => target.bring_back(&buf, 0, n)?,
                // The folio is split on the device.
                2 => {
                    buf.unmap(3, 1)?;
                    target.bring_back(&buf, 4, HUGE_PAGES - 4)?;
                }
                // A child copies the pages.
                3 => Child::spawn(|| {
                    buf.fill(0, n, 4141);
                    Ok(())
                })?
                .join()?,
                // The device has no memory for a piece.
                _ => {
                    target.bring_back(&buf, 0, n)?;
                    target.fail_alloc()?;
                    let _ = target.to_device(&buf, 0, n);
                }
            }
            Ok(())
        })?;
        // Exit and RCU free pages a little later.
        let mut found = all();
        sys::wait_until(std::time::Duration::from_secs(5), || {
            found = all();
            found[0] <= before[0] && found[1] <= before[1]
        });
        check!(
            found[0] <= before[0] && found[1] <= before[1] && found[0] >= Some(0),
            "statistics of huge pages after way {way}: expected {before:?}, found {found:?}"
        );
    }
    Ok(())
}

/// A folio's mapping count is the number of entries that map it, in every process.
fn mapped_by(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 4150)?;
            let n = buf.pages();
            target.move_all(&buf, 4150)?;
            let large = huge && target.moves_large();
            let expect = |entries: i32, when: &str| -> Outcome {
                for (i, page) in target
                    .inspect(&buf, 0, n)
                    .or_fail("ZDM_INSPECT")?
                    .iter()
                    .enumerate()
                {
                    check!(
                        page.mapcount == entries && page.refs == entries,
                        "page {i} {when}: expected {entries} mappings and as many references, \
                         found {page:x?}"
                    );
                }
                Ok(())
            };
            expect(1, "of one process")?;
            let one = Waiting::idle()?;
            expect(2, "of two processes")?;
            let other = Waiting::idle()?;
            expect(3, "of three processes")?;
            one.kill()?;
            expect(2, "after the end of one")?;
            if large {
                // Only this process's entry is split: 512 entries and one.
                buf.protect(7, 1, libc::PROT_READ)?;
                expect(HUGE_PAGES as i32 + 1, "split in one process")?;
            }
            other.join()
        })?;
    }
    Ok(())
}

/// Every mapping of a file's hole has the page of zeroes until the file is written; then all
/// mappings see the data, in other processes, too.
fn dax_zero_page<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for (pages, way) in [(SMALL, 0), (SMALL, 1), (LARGE, 0), (LARGE, 1), (LARGE, 2)] {
        let file = s.fs.empty("a")?;
        files::truncate(&file, pages).or_fail("ftruncate")?;
        let maps = [Buffer::shared(&file, pages)?, Buffer::shared(&file, pages)?];
        let private = Buffer::of_file(&file, pages, libc::MAP_PRIVATE).or_fail("mmap")?;
        for map in maps.iter().chain([&private]) {
            map.check_zero(0, pages)?;
        }
        let seen = |map: &Buffer| -> Outcome {
            map.check(3, 2, 4160)?;
            map.check_zero(0, 3)?;
            map.check_zero(5, pages - 5)
        };
        let child = Waiting::start(|| maps[0].check_zero(0, pages), || seen(&maps[0]))?;
        match way {
            0 => file
                .write_all_at(&pattern_bytes(4160, 3, 2), (3 * PAGE) as u64)
                .or_fail("write")?,
            1 => maps[1].fill(3, 2, 4160),
            _ => {
                // A mapping with room for small entries only, which take the place of a huge one.
                let narrow = Buffer::shared(&file, pages)?;
                narrow.unmap(0, 3)?;
                narrow.unmap(5, pages - 5)?;
                narrow.fill(3, 2, 4160);
            }
        }
        for map in maps.iter().chain([&private]) {
            seen(map)?;
        }
        child.join()?;
        // Repeat it with a write by a mapping.
        maps[1].fill(6, 1, 4161);
        for map in maps.iter().chain([&private]) {
            map.check(6, 1, 4161)?;
        }
        drop((maps, private, file));
        s.fs.remove("a")?;
    }
    s.unmount()
}

/// Two files share blocks. Changes of either file must not harm the other one: each in turn is
/// truncated, written to, and unlinked.
fn dax_second_file(_: &Ctx) -> Outcome {
    let s = Setup::new(REFLINK)?;
    for pages in [SMALL, LARGE] {
        for first in [0, 1] {
            for way in 0..3 {
                let a = s.fs.file("a", pages)?;
                a.write_all_at(&pattern_bytes(4170, 0, pages), 0)
                    .or_fail("write")?;
                let b = s.fs.empty("b")?;
                files::clone(&a, &b).or_fail("FICLONE")?;
                let names = ["a", "b"];
                let both = [&a, &b];
                // The file that maps the pages first sets the index; the other comes second.
                let map_first = Buffer::shared(both[first], pages)?;
                map_first.check(0, pages, 4170)?;
                let map_second = Buffer::shared(both[1 - first], pages)?;
                map_second.check(0, pages, 4170)?;
                let pfns: Vec<u64> = s
                    .device
                    .inspect(&map_second, 0, pages)
                    .or_fail("ZDM_INSPECT")?
                    .iter()
                    .map(|p| p.pfn)
                    .collect();
                match way {
                    0 => files::truncate(both[first], 0).or_fail("ftruncate")?,
                    1 => files::punch(both[first], 0, pages).or_fail("a hole punch")?,
                    _ => map_first.fill(0, pages, 4171),
                }
                map_second.check(0, pages, 4170)?;
                s.expect_shared(&map_second, MAPPED, "of the second file alone")?;
                s.expect_frames(&pfns, MAPPED, "of the second file alone")?;
                // Change the second file in the same way; then no file has the pages.
                match way {
                    0 => files::truncate(both[1 - first], 0).or_fail("ftruncate")?,
                    1 => files::punch(both[1 - first], 0, pages).or_fail("a hole punch")?,
                    _ => {
                        drop(map_second);
                        s.expect_frames(&pfns, IDLE, "of the second file, unmapped")?;
                        s.fs.remove(names[1 - first])?;
                        drop((map_first, a, b));
                        s.fs.remove(names[first])?;
                        s.expect_free(&pfns, "of no file any more")?;
                        continue;
                    }
                }
                s.expect_free(&pfns, "of no file any more")?;
                drop((map_first, map_second, a, b));
                s.fs.remove("a")?;
                s.fs.remove("b")?;
            }
        }
    }
    s.unmount()
}

/// The signal for a broken page of a device-dax has the address at which the page is mapped, even
/// if the page lies inside a huge one and not at the beginning of the device.
fn dax_poison_offset<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let dax = Dax::set_up(ALIGN)?;
    let step = dax.step();
    sys::on_signal(libc::SIGBUS, false).or_fail("signal")?;
    for broken in [step, 2 * step - 1, step + step / 2] {
        let child = Child::spawn(|| {
            sys::want_memory_failures().or_fail("prctl")?;
            files::catch_address(libc::SIGBUS).or_fail("sigaction")?;
            let own = dax.map(3 * step)?;
            // The first access to the huge page may lie anywhere in it.
            own.set(broken, 0, 1);
            own.fill(0, 3 * step, 4180);
            // A file shows the memory of the process that opened it.
            let page = Device::open(0)?.inspect_one(&own, broken)?;
            check_eq!(page.pfn, dax.frame() + broken as u64, "page frame");
            // The signal comes before the call returns, or not at all.
            let _ = own.try_advise(broken, 1, libc::MADV_HWPOISON);
            let (address, shift) = files::caught_address();
            let expected = own.at(broken) & !((1 << shift) - 1);
            check!(
                address != 0 && address & !((1 << shift) - 1) == expected,
                "address of the signal: expected {expected:#x} of {shift} bits, found {address:#x}"
            );
            Ok(())
        })?;
        check_eq!(child.exit()?, Exit::Code(0), "end of who is told");
    }
    Ok(())
}
