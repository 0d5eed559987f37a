// SPDX-License-Identifier: GPL-2.0

//! Files that share blocks and map them in different ways: one as a whole and the other in part, one
//! again and again, both at the same time. Shared blocks are mapped page by page, however large the
//! file, because their folio belongs to all of the files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE, pattern_bytes};
use crate::fsdax::REFLINK;
use crate::sys::Exit;
use crate::tests::counts::{IDLE, MAPPED, Waiting, frames as frames_of, held};
use crate::tests::fsdax::share::{needs_fixes, twins};
use crate::tests::fsdax::waits::{IN_BREAK, expect_waits, expect_woken};
use crate::tests::fsdax::{LARGE, SMALL, Setup};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check_eq, files};

pub const TESTS: &[Test] = &[
    test("fsdax.clone_part_first", part_first),
    test("fsdax.clone_part_second", part_second),
    test("fsdax.clone_part_written", part_written),
    test("fsdax.clone_pinned_again", pinned_again),
    test("fsdax.clone_pinned_written", pinned_written),
    test("fsdax.clone_pinned_end", pinned_end),
    test("fsdax.clone_race", race),
];

/// The counts of a page that both files map.
const BOTH: [i32; 3] = [2, 2, 0];
/// Pages that are too few for a PMD.
const PART: usize = 4;
/// How often each of two threads maps all pages anew.
const ROUNDS: usize = 30;

/// Checks that every page of a mapping is a folio of its own with these counts.
#[track_caller]
fn expect_small(s: &Setup, buf: &Buffer, counts: [i32; 3], when: &str) -> Outcome<Vec<u64>> {
    let pages = s
        .device
        .inspect(buf, 0, buf.pages())
        .or_fail("ZDM_INSPECT")?;
    for (i, p) in pages.iter().enumerate() {
        let found = [p.refs, p.mapcount, p.pins];
        if found != counts || p.order != 0 || p.flags & ZDM_PAGE_PMD != 0 {
            return Err(Fail::failed(format!(
                "shared page {i} {when}: expected [references, mappings, pins] {counts:?}, \
                 order 0, found {p:x?}"
            )));
        }
    }
    Ok(pages.iter().map(|p| p.pfn).collect())
}

/// Removes both files, after which no page is in use.
fn end_of(s: Setup, frames: &[u64]) -> Outcome {
    s.expect_frames(frames, IDLE, "unmapped")?;
    s.fs.remove("a")?;
    s.fs.remove("b")?;
    s.expect_free(frames, "unlinked")?;
    s.unmount()
}

/// A file maps a few pages, then another one maps all of the blocks that they share.
fn part_first(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let s = Setup::new(REFLINK)?;
    let ([a, b], [map_a, map_b]) = twins(&s, LARGE, 890)?;
    drop(map_b);
    let part = Buffer::shared(&b, PART)?;
    part.check(0, PART, 890)?;
    let few = expect_small(&s, &part, MAPPED, "of the first file")?;
    map_a.check(0, LARGE, 890)?;
    expect_small(&s, &part, BOTH, "of both files")?;
    let frames = frames_of(&s.device, &map_a, 0, LARGE)?;
    check_eq!(frames[..PART], few[..], "page frames of both files");
    s.expect_frames(&frames[PART..], MAPPED, "of the second file alone")?;
    drop(part);
    expect_small(&s, &map_a, MAPPED, "of the second file")?;
    map_a.check(0, LARGE, 890)?;
    drop((a, b, map_a));
    end_of(s, &frames)
}

/// A file maps all of its blocks, then another one maps a few of them, from a page that is not the
/// first.
fn part_second(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let s = Setup::new(REFLINK)?;
    let ([a, b], [map_a, map_b]) = twins(&s, LARGE, 891)?;
    map_a.check(0, LARGE, 891)?;
    let frames = expect_small(&s, &map_a, MAPPED, "of the first file")?;
    // A copy of one page leaves the other file an extent that no PMD maps.
    b.write_all_at(&pattern_bytes(892, 0, 1), 0)
        .or_fail("write")?;
    map_b.check(0, 1, 892)?;
    map_b.check(1, HUGE_PAGES - 1, 891)?;
    s.expect_frames(&frames[..1], MAPPED, "of the first file alone")?;
    s.expect_frames(&frames[1..HUGE_PAGES], BOTH, "of both files")?;
    files::truncate(&a, 0).or_fail("ftruncate")?;
    s.expect_frames(&frames[1..HUGE_PAGES], MAPPED, "of the second file alone")?;
    s.expect_free(&frames[..1], "of no file")?;
    map_b.check(1, LARGE - 1, 891)?;
    drop((a, b, map_a, map_b));
    end_of(s, &frames)
}

/// Pages of a file are read as a whole, and written to by a mapping of a few pages. Each that is
/// written to moves to a block of its own, and no other one does.
fn part_written(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let s = Setup::new(REFLINK)?;
    let ([a, b], [map_a, map_b]) = twins(&s, LARGE, 893)?;
    map_a.check(0, LARGE, 893)?;
    map_b.check(0, LARGE, 893)?;
    let frames = expect_small(&s, &map_a, BOTH, "of both files")?;
    let part = Buffer::shared(&a, PART)?;
    for page in [2, 1] {
        part.fill(page, 1, 894);
        s.expect_frames(&frames[page..=page], MAPPED, "of the other file")?;
    }
    map_a.check(0, 1, 893)?;
    map_a.check(1, 2, 894)?;
    map_a.check(3, LARGE - 3, 893)?;
    map_b.check(0, LARGE, 893)?;
    let own = frames_of(&s.device, &map_a, 1, 2)?;
    // The file still knows each page: truncation waits for none, and gives up all.
    files::truncate(&a, 0).or_fail("ftruncate")?;
    s.expect_free(&own, "of no file")?;
    expect_small(&s, &map_b, MAPPED, "of the other file")?;
    map_b.check(0, LARGE, 893)?;
    drop((a, b, map_a, map_b, part));
    end_of(s, &frames)
}

/// A page of a shared block is pinned, and the file maps it once more.
fn pinned_again(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let s = Setup::new(REFLINK)?;
    let ([a, b], [map_a, map_b]) = twins(&s, SMALL, 895)?;
    map_a.check(0, SMALL, 895)?;
    let frames = expect_small(&s, &map_a, MAPPED, "of one file")?;
    let pin = s.device.pin(&map_a, 1, 1, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
    let again = Buffer::shared(&a, SMALL)?;
    again.check(0, SMALL, 895)?;
    // The second mapping has not taken the pages away from the first one.
    s.expect_frames(&frames[..1], BOTH, "mapped twice")?;
    s.expect_frames(&frames[1..2], held(BOTH, 1), "mapped twice and held")?;
    drop(again);
    for _ in 0..3 {
        map_a.advise(0, SMALL, libc::MADV_DONTNEED)?;
        s.expect_frames(&frames[1..2], [1, 0, 0], "held")?;
        map_a.check(0, SMALL, 895)?;
        s.expect_frames(&frames[1..2], held(MAPPED, 1), "mapped and held")?;
    }
    map_b.check(0, SMALL, 895)?;
    s.expect_frames(&frames[1..2], held(BOTH, 1), "mapped by both and held")?;
    s.device.unpin(pin, 0).or_fail("ZDM_UNPIN")?;
    drop((a, b, map_a, map_b));
    end_of(s, &frames)
}

/// Where 7.3 with the series waits for a page whose block write(2) is to replace.
const IN_WRITE: (char, &[&str]) = (
    'S',
    &[
        "wait_page_idle",
        "dax_wait_page",
        "dax_invalidate_shared",
        "dax_iomap_iter",
        "dax_iomap_rw",
    ],
);

/// write(2) to a shared block waits for a page that is pinned, because the file forgets it: nobody
/// else would know of the pin when the other file gives up the block. A signal ends the wait.
fn pinned_written(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let what = "write(2) to a shared block whose page is held";
    for both in [false, true] {
        let s = Setup::new(REFLINK)?;
        let ([a, b], [map_a, map_b]) = twins(&s, SMALL, 900)?;
        map_a.check(0, SMALL, 900)?;
        if both {
            map_b.check(0, SMALL, 900)?;
        }
        let frames = frames_of(&s.device, &map_a, 0, SMALL)?;
        let write = || {
            a.write_all_at(&pattern_bytes(901, 1, 1), 4096)
                .or_fail("write")
        };
        let (killed, writer) = (
            Waiting::start(|| Ok(()), write)?,
            Waiting::start(|| Ok(()), write)?,
        );
        let holder = Device::open(0)?;
        let pin = holder.pin(&map_a, 1, 1, 0).or_fail("ZDM_PIN")?;
        let killed = killed.release()?;
        expect_waits(&killed, IN_WRITE, what)?;
        let end = killed.kill()?;
        check_eq!(end, Exit::Signal(libc::SIGKILL), "{what}, killed");
        map_a.check(0, SMALL, 900)?;
        let writer = writer.release()?;
        expect_waits(&writer, IN_WRITE, what)?;
        // The page is mapped once more meanwhile, and is the same.
        map_a.check(1, 1, 900)?;
        check_eq!(
            frames_of(&s.device, &map_a, 1, 1)?,
            frames[1..2],
            "page frame while the writer waits"
        );
        expect_waits(&writer, IN_WRITE, what)?;
        holder.unpin(pin, 0).or_fail("ZDM_UNPIN")?;
        expect_woken(writer, what)?;
        map_a.check(0, 1, 900)?;
        map_a.check(1, 1, 901)?;
        map_a.check(2, SMALL - 2, 900)?;
        map_b.check(0, SMALL, 900)?;
        drop((a, b, map_a, map_b));
        end_of(s, &frames)?;
    }
    Ok(())
}

/// write(2) beyond the end of a file zeroes the rest of the last page, whose block is shared, and
/// waits for the page for the same reason.
fn pinned_end(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let what = "write(2) beyond the end of a file whose last page is held";
    let s = Setup::new(REFLINK)?;
    let last = SMALL - 1;
    let (a, map) = s.mapped("a", SMALL, 902)?;
    drop(map);
    a.set_len((last * PAGE + 8) as u64).or_fail("ftruncate")?;
    let b = s.fs.empty("b")?;
    files::clone(&a, &b).or_fail("FICLONE")?;
    let map = Buffer::shared(&a, SMALL)?;
    map.check(0, last, 902)?;
    let word = map.get(last, 0);
    let frames = frames_of(&s.device, &map, 0, SMALL)?;
    let writer = Waiting::start(
        || Ok(()),
        || {
            a.write_all_at(&pattern_bytes(903, 0, 1), ((SMALL + 2) * PAGE) as u64)
                .or_fail("write")
        },
    )?;
    let holder = Device::open(0)?;
    let pin = holder.pin(&map, last, 1, 0).or_fail("ZDM_PIN")?;
    let writer = writer.release()?;
    expect_waits(&writer, IN_BREAK, what)?;
    holder.unpin(pin, 0).or_fail("ZDM_UNPIN")?;
    expect_woken(writer, what)?;
    map.check(0, last, 902)?;
    check_eq!(map.get(last, 0), word, "the first word of the last page");
    check_eq!(map.get(last, 1), 0, "the word after the old end");
    drop((a, b, map));
    end_of(s, &frames)
}

/// Two files map the same blocks at the same time, and forget them, many times.
fn race(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let s = Setup::new(REFLINK)?;
    let ([a, b], maps) = twins(&s, HUGE_PAGES, 896)?;
    let others = [s.fs.empty("c")?, s.fs.empty("d")?];
    let sweep = |map: &Buffer, file: &File, other: &File| -> Outcome {
        for _ in 0..ROUNDS {
            for page in 0..HUGE_PAGES {
                map.get(page, 0);
            }
            // A file that shares its blocks with another one forgets all of its pages.
            files::clone(file, other).or_fail("FICLONE")?;
        }
        Ok(())
    };
    let both = [(&maps[0], &a, &others[0]), (&maps[1], &b, &others[1])];
    std::thread::scope(|scope| {
        let [first, second] =
            both.map(|(map, file, other)| scope.spawn(|| sweep(map, file, other)));
        [first, second].map(|t| {
            t.join()
                .map_err(|_| Fail::failed("a thread: expected its result, found a panic"))?
        })
    })
    .into_iter()
    .collect::<Outcome<Vec<()>>>()?;
    for map in &maps {
        map.check(0, HUGE_PAGES, 896)?;
    }
    let frames = expect_small(&s, &maps[0], BOTH, "of both files")?;
    drop((a, b, maps, others));
    s.fs.remove("c")?;
    s.fs.remove("d")?;
    end_of(s, &frames)
}
