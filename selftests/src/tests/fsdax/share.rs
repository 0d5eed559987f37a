// SPDX-License-Identifier: GPL-2.0

//! DAX pages with several users: private mappings, forks, mappings that move or are unmapped in
//! part, MAP_SYNC, and files of xfs that share blocks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE, pattern_bytes};
use crate::fsdax::{EXT4, Mounted, REFLINK, XFS};
use crate::harness::Child;
use crate::sys::Exit;
use crate::tests::counts::{Counts, IDLE, MAPPED, Waiting};
use crate::tests::fsdax::waits::{IN_BREAK, expect_waits, expect_woken};
use crate::tests::fsdax::{LARGE, SMALL, Setup, expect_pmem_free, pins_of};
use crate::tests::target::{GENERIC, old_rule, open};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq, files};

pub const TESTS: &[Test] = &[
    test("fsdax.private_ext4", private::<EXT4>),
    test("fsdax.private_xfs", private::<XFS>),
    test("fsdax.private_reflink", private::<REFLINK>),
    test("fsdax.mremap_ext4", mremap::<EXT4>),
    test("fsdax.mremap_xfs", mremap::<XFS>),
    test("fsdax.mremap_reflink", mremap::<REFLINK>),
    test("fsdax.sync_ext4", sync::<EXT4>),
    test("fsdax.sync_xfs", sync::<XFS>),
    test("fsdax.sync_reflink", sync::<REFLINK>),
    test("fsdax.clone", clone),
    test("fsdax.clone_pinned", clone_pinned),
    test("fsdax.clone_mapped", clone_mapped),
    test("fsdax.clone_written", clone_written),
];

/// The counts of a page that `n` entries map.
fn entries(n: i32) -> Counts {
    [n, n, 0]
}

/// A private mapping has the pages of the file until it writes to one; then it gets a page of its
/// own. The same holds for a child.
fn private<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, shared) = s.mapped("a", pages, 870)?;
        let frames = s.expect(&shared, MAPPED, "mapped")?;
        let own = Buffer::of_file(&file, pages, libc::MAP_PRIVATE).or_fail("mmap")?;
        own.check(0, pages, 870)?;
        s.expect(&own, entries(2), "mapped twice")?;
        shared.set(2, 0, 1);
        check_eq!(own.get(2, 0), 1, "word by the private mapping");
        shared.fill(2, 1, 870);
        // The mapping has its own page now. If a PMD mapped the file, the first write has removed
        // it, and the other pages are mapped again one by one.
        own.fill(1, 1, 871);
        let page = s.device.inspect_one(&own, 1)?;
        check!(
            page.kind == TYPE_SYSTEM && page.flags & ZDM_PAGE_ANON != 0,
            "page after a private write: expected anonymous memory, found {page:x?}"
        );
        s.expect_frames(&frames[1..2], MAPPED, "after a private write")?;
        shared.check(0, pages, 870)?;
        own.check(0, 1, 870)?;
        own.check(2, 1, 870)?;
        // If the first access is the write, no page was mapped to copy from.
        let unread = Buffer::of_file(&file, pages, libc::MAP_PRIVATE).or_fail("mmap")?;
        unread.set(3, 0, shared.get(3, 0));
        unread.check(3, 1, 870)?;
        drop(unread);
        let [before, with_child] = match pages {
            SMALL => [entries(2), entries(3)],
            _ => [entries(3), entries(5)],
        };
        s.expect_frames(&frames[..1], before, "mapped by both")?;
        // A child has copies of the private entries, and breaks them itself.
        let child = Waiting::start(
            || {
                own.check(1, 1, 871)?;
                own.check(0, 1, 870)?;
                own.check(2, 1, 870)
            },
            || {
                own.fill(0, 2, 872);
                own.check(0, 2, 872)?;
                shared.check(0, pages, 870)
            },
        )?;
        s.expect_frames(&frames[..1], with_child, "and by a child")?;
        child.join()?;
        s.expect_frames(&frames[..1], before, "without the child")?;
        own.check(0, 1, 870)?;
        own.check(1, 1, 871)?;
        // A hole punch leaves private pages alone, truncation does not.
        files::punch(&file, 0, pages).or_fail("hole punch")?;
        own.check(1, 1, 871)?;
        own.check_zero(0, 1)?;
        shared.check_zero(0, pages)?;
        s.expect_free(&frames, "in the hole")?;
        files::truncate(&file, 0).or_fail("ftruncate")?;
        let child = Child::spawn(|| {
            own.get(1, 0);
            Ok(())
        })?;
        let end = Exit::Signal(libc::SIGBUS);
        check_eq!(child.exit()?, end, "a private page beyond the end");
        drop((file, shared, own));
        s.fs.remove("a")?;
    }
    s.unmount()
}

/// Mappings that move keep their references, or drop them and find the pages again. Mappings that
/// are unmapped in part drop as many references. Protection and write-back change none.
fn mremap<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 873)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        // Write-back makes the entries read-only, and keeps them.
        file.sync_all().or_fail("fsync")?;
        s.expect(&buf, MAPPED, "written back")?;
        buf.protect(0, pages, libc::PROT_READ)?;
        s.expect(&buf, MAPPED, "read only")?;
        buf.protect(0, pages, libc::PROT_READ | libc::PROT_WRITE)?;
        buf.fill(0, pages, 874);
        s.expect(&buf, MAPPED, "written again")?;
        // Move to a place that fits a PMD, and to one that does not.
        let place = Buffer::anon_huge_aligned(pages + HUGE_PAGES)?;
        buf.move_pages(0, pages, &place, 0)?;
        s.expect_frames(&frames, MAPPED, "moved")?;
        place.check(0, pages, 874)?;
        s.expect_frames(&frames, MAPPED, "moved and used")?;
        let odd = Buffer::anon_huge_aligned(pages + HUGE_PAGES)?;
        place.move_pages(0, pages, &odd, 1)?;
        odd.check_from(1, pages, 874, 0)?;
        let step = if pages == SMALL { 1 } else { HUGE_PAGES };
        s.expect_frames(&frames, entries(step as i32), "moved by a page")?;
        // Unmap every other page.
        for page in (0..pages).step_by(2) {
            odd.unmap(1 + page, 1)?;
        }
        odd.check_from(2, 1, 874, 1)?;
        match step {
            1 => {
                let odd: Vec<u64> = frames.iter().copied().skip(1).step_by(2).collect();
                let even: Vec<u64> = frames.iter().copied().step_by(2).collect();
                s.expect_frames(&odd, MAPPED, "left")?;
                s.expect_frames(&even, IDLE, "unmapped")?;
            }
            _ => s.expect_frames(&frames, entries(step as i32 / 2), "half unmapped")?,
        }
        drop(odd);
        s.expect_frames(&frames, IDLE, "unmapped")?;
        // Unmapping one page splits the PMD.
        let buf = Buffer::shared(&file, pages)?;
        buf.check(0, pages, 874)?;
        buf.unmap(0, 1)?;
        buf.check(1, pages - 1, 874)?;
        let left = if step == 1 {
            IDLE
        } else {
            entries(step as i32 - 1)
        };
        s.expect_frames(&frames[..1], left, "without the first page")?;
        drop((file, buf, place));
        s.fs.remove("a")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// With MAP_SYNC a page that a write fault has allocated exists after a power cut, without fsync.
/// Its counts are as for other pages.
fn sync<const KIND: usize>(_: &Ctx) -> Outcome {
    let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
    let plain = Mounted::plain()?;
    let file = plain.file("b", SMALL)?;
    let result = Buffer::of_file(&file, SMALL, flags);
    expect_errno(result, &[libc::EOPNOTSUPP], "MAP_SYNC without DAX")?;
    drop(file);
    for pages in [SMALL, LARGE] {
        let mut s = Setup::new(KIND)?;
        let file = s.fs.empty("a")?;
        file.sync_all().or_fail("fsync")?;
        files::truncate(&file, pages).or_fail("ftruncate")?;
        let buf = Buffer::of_file(&file, pages, flags).or_fail("mmap with MAP_SYNC")?;
        buf.fill(0, pages, 875);
        let counted = s.device.inspect(&buf, 0, pages).or_fail("ZDM_INSPECT")?;
        for (i, page) in counted.iter().enumerate() {
            let entries = if page.flags & ZDM_PAGE_PMD != 0 || page.order == 0 {
                1
            } else {
                0
            };
            check!(
                page.kind == TYPE_FS_DAX && page.refs == entries && page.mapcount == entries,
                "page {i} with MAP_SYNC: expected one entry, found {page:x?}"
            );
        }
        files::cut_power(&file).or_fail("shutdown")?;
        drop((file, buf));
        s.fs.unmount().or_fail("umount")?;
        expect_pmem_free(&s.device)?;
        s.fs = Mounted::again(KIND)?;
        let file = s.fs.open("a")?;
        let len = file.metadata().or_fail("stat")?.len();
        check_eq!(len, (pages * 4096) as u64, "size after a power cut");
        let buf = Buffer::shared(&file, pages)?;
        buf.check(0, pages, 875)?;
        drop((file, buf));
        s.unmount()?;
    }
    Ok(())
}

/// Two files that share blocks with the pattern of a seed, and their mappings.
#[track_caller]
pub(super) fn twins(s: &Setup, pages: usize, seed: u64) -> Outcome<([File; 2], [Buffer; 2])> {
    let (a, buf) = s.mapped("a", pages, seed)?;
    drop(buf);
    let b = s.fs.empty("b")?;
    files::clone(&a, &b).or_fail("FICLONE")?;
    let maps = [Buffer::shared(&a, pages)?, Buffer::shared(&b, pages)?];
    Ok(([a, b], maps))
}

/// Both files map the same pages, and a file that is written gets other pages.
fn clone(_: &Ctx) -> Outcome {
    let s = Setup::new(REFLINK)?;
    for pages in [SMALL, LARGE] {
        let ([a, b], [map_a, map_b]) = twins(&s, pages, 880)?;
        map_a.check(0, pages, 880)?;
        let alone = s.expect_shared(&map_a, MAPPED, "read by one file")?;
        map_b.check(0, pages, 880)?;
        s.expect_shared(&map_b, entries(2), "read by both files")?;
        let frames = s.expect_shared(&map_a, entries(2), "read by both files")?;
        check_eq!(frames, alone, "page frames");
        // A page of several files has no mapping set, because it has no single owner.
        for page in s.device.inspect_frames(frames[0], 1)? {
            check!(
                page.flags & ZDM_PAGE_MAPPING == 0,
                "page of two files: expected no mapping, found {page:x?}"
            );
        }
        // The files share only storage: the other file does not see a write.
        map_a.fill(1, 1, 881);
        map_b.check(0, pages, 880)?;
        map_a.check(1, 1, 881)?;
        map_a.check(0, 1, 880)?;
        map_a.check(2, pages - 2, 880)?;
        let page = s.device.inspect_one(&map_a, 1)?;
        check!(
            page.pfn != frames[1],
            "page after a write: expected another, found the same"
        );
        s.expect_frames(&frames[1..2], MAPPED, "of the other file alone")?;
        // One file gives up the page, then the other.
        files::truncate(&a, 0).or_fail("ftruncate")?;
        s.expect_shared(&map_b, MAPPED, "of one file")?;
        map_b.check(0, pages, 880)?;
        drop((a, map_a));
        s.fs.remove("a")?;
        s.expect_shared(&map_b, MAPPED, "of the only file")?;
        drop((b, map_b));
        s.expect_frames(&frames, IDLE, "unmapped")?;
        s.fs.remove("b")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// Two files share blocks. One of them is truncated and waits, because a page is pinned by a
/// mapping of the other.
struct Clash {
    a: File,
    b: File,
    map_a: Buffer,
    map_b: Buffer,
    frames: Vec<u64>,
    holder: Device,
    pin: u32,
    taker: Child,
}

impl Clash {
    fn begin(s: &Setup, pages: usize, seed: u64, what: &str) -> Outcome<Self> {
        let ([a, b], [map_a, map_b]) = twins(s, pages, seed)?;
        map_a.check(0, pages, seed)?;
        map_b.check(0, pages, seed)?;
        let frames = s.expect_shared(&map_a, entries(2), "read by both files")?;
        let truncate = || files::truncate(&a, 0).or_fail("ftruncate");
        let taker = Waiting::start(|| Ok(()), truncate)?;
        let holder = Device::open(0)?;
        let pin = holder.pin(&map_b, 1, 1, 0).or_fail("ZDM_PIN")?;
        let taker = taker.release()?;
        expect_waits(&taker, IN_BREAK, what)?;
        Ok(Self {
            a,
            b,
            map_a,
            map_b,
            frames,
            holder,
            pin,
            taker,
        })
    }
}

/// Truncation of one file waits for a pin by a mapping of the other, and is woken.
fn clone_pinned(_: &Ctx) -> Outcome {
    let s = Setup::new(REFLINK)?;
    let what = "ftruncate of a file whose page is held by another file's mapping";
    for pages in [SMALL, LARGE] {
        let c = Clash::begin(&s, pages, 882, what)?;
        let order = s.device.inspect_frames(c.frames[1], 1)?[0].order;
        s.expect_frames(&c.frames[1..2], pins_of(order, MAPPED, 1), "held")?;
        // The other mapping ends first, then the pin.
        drop(c.map_b);
        expect_waits(&c.taker, IN_BREAK, what)?;
        c.holder.unpin(c.pin, 0).or_fail("ZDM_UNPIN")?;
        expect_woken(c.taker, what)?;
        s.expect_frames(&c.frames, IDLE, "truncated")?;
        let map_b = Buffer::shared(&c.b, pages)?;
        map_b.check(0, pages, 882)?;
        drop((c.a, c.b, c.map_a, map_b));
        s.fs.remove("a")?;
        s.fs.remove("b")?;
        s.expect_free(&c.frames, "unlinked")?;
    }
    s.unmount()
}

/// The other file stays mapped, for which truncation need not wait.
fn clone_mapped(_: &Ctx) -> Outcome {
    let s = Setup::new(REFLINK)?;
    let what = "ftruncate of a file whose pages another one maps";
    for pages in [SMALL, LARGE] {
        let c = Clash::begin(&s, pages, 883, what)?;
        c.holder.unpin(c.pin, 0).or_fail("ZDM_UNPIN")?;
        expect_woken(c.taker, what)?;
        s.expect_shared(&c.map_b, MAPPED, "of one file")?;
        c.map_b.check(0, pages, 883)?;
        drop((c.a, c.b, c.map_a, c.map_b));
        s.fs.remove("a")?;
        s.fs.remove("b")?;
        s.expect_free(&c.frames, "unlinked")?;
    }
    s.unmount()
}

/// Skips the test on a kernel that takes folios of shared blocks apart while they are mapped.
#[track_caller]
pub(in crate::tests) fn needs_fixes(ctx: &Ctx) -> Outcome {
    // GENERIC memory shows whether the kernel has the series; that for 7.2 lacks the fixes.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").or_fail("the release")?;
    if release.starts_with("7.2.") || old_rule(ctx, &open(ctx, GENERIC)?, GENERIC)? {
        return Err(Fail::Skip(
            "this kernel would take mapped folios apart".into(),
        ));
    }
    Ok(())
}

/// A write(2) to blocks that two files share gives the file blocks of its own. Its mappings see what
/// was written, and those of the other file do not.
fn clone_written(ctx: &Ctx) -> Outcome {
    needs_fixes(ctx)?;
    let s = Setup::new(REFLINK)?;
    for (pages, both) in [(SMALL, false), (SMALL, true), (LARGE, false), (LARGE, true)] {
        let (a, map_a) = s.mapped("a", pages, 884)?;
        let b = s.fs.empty("b")?;
        files::clone(&a, &b).or_fail("FICLONE")?;
        map_a.check(0, pages, 884)?;
        let map_b = both.then(|| Buffer::shared(&b, pages)).transpose()?;
        let unharmed = || {
            if let Some(map_b) = &map_b {
                map_b.check(0, pages, 884)?;
            }
            let mut data = vec![0; pages * PAGE];
            b.read_exact_at(&mut data, 0).or_fail("read")?;
            check!(
                data == pattern_bytes(884, 0, pages),
                "data of the other file: expected it unchanged, found other data"
            );
            Ok(())
        };
        unharmed()?;
        a.write_all_at(&pattern_bytes(885, 1, 2), PAGE as u64)
            .or_fail("write")?;
        map_a.check(0, 1, 884)?;
        map_a.check(1, 2, 885)?;
        map_a.check(3, pages - 3, 884)?;
        let page = s.device.inspect_one(&map_a, 1)?;
        check_eq!(
            (page.refs, page.mapcount),
            (1, 1),
            "references and mappings of a page that was written"
        );
        unharmed()?;
        drop((map_a, map_b, a, b));
        s.fs.remove("a")?;
        s.fs.remove("b")?;
    }
    s.unmount()
}
