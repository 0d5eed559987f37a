// SPDX-License-Identifier: GPL-2.0

//! Mapped files on pmem without a page cache. An idle page has count 0; each entry that maps it and
//! each holder adds one reference. Each test runs on ext4, on xfs, and on xfs with shared blocks.

pub mod blocks;
pub mod bytes;
pub mod clones;
pub mod failure;
pub mod io;
pub mod mix;
pub mod races;
pub mod share;
pub mod told;
pub mod upkeep;
pub mod waits;
pub mod written;

use std::fs::File;

use super::counts::{Counts, IDLE, MAPPED, Waiting, held, pinned, pinned_large};
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::fsdax::{self, EXT4, Mounted, REFLINK, XFS};
use crate::gup::LongTermPin;
use crate::uapi::*;
use crate::uring::Uring;
use crate::{check, check_eq, files};

pub const TESTS: &[Test] = &[
    test("fsdax.counts_ext4", counts::<EXT4>),
    test("fsdax.counts_xfs", counts::<XFS>),
    test("fsdax.counts_reflink", counts::<REFLINK>),
    test("fsdax.pins_ext4", pins::<EXT4>),
    test("fsdax.pins_xfs", pins::<XFS>),
    test("fsdax.pins_reflink", pins::<REFLINK>),
    test("fsdax.long_term_ext4", long_term::<EXT4>),
    test("fsdax.long_term_xfs", long_term::<XFS>),
    test("fsdax.long_term_reflink", long_term::<REFLINK>),
    test("fsdax.no_page_cache_ext4", no_page_cache::<EXT4>),
    test("fsdax.no_page_cache_xfs", no_page_cache::<XFS>),
    test("fsdax.no_page_cache_reflink", no_page_cache::<REFLINK>),
];

/// The pages of a file that PTEs map: too few for a PMD.
pub(super) const SMALL: usize = 8;
/// The pages of a file that PMDs map.
pub(super) const LARGE: usize = 2 * HUGE_PAGES;

/// The file of CONFIG_GUP_TEST.
const GUP_TEST: &str = "/sys/kernel/debug/gup_test";

/// A file system with DAX, and a device that inspects and pins its pages.
///
/// The device is dropped first, because the end of a file waits until no page is held.
pub(super) struct Setup {
    pub device: Device,
    pub fs: Mounted,
}

/// The order of the folio that one fault into a file of this size maps.
pub(super) fn order(pages: usize) -> u32 {
    if pages < HUGE_PAGES { 0 } else { 9 }
}

/// The counts of a folio of a file of this size after `n` pins.
pub(super) fn with_pins(pages: usize, counts: Counts, n: i32) -> Counts {
    pins_of(order(pages), counts, n)
}

/// The counts of a folio of this order after `n` pins.
pub(super) fn pins_of(order: u32, counts: Counts, n: i32) -> Counts {
    match order {
        0 => pinned(counts, n),
        _ => pinned_large(counts, n),
    }
}

impl Setup {
    #[track_caller]
    pub fn new(kind: usize) -> Outcome<Self> {
        let device = Device::open(0)?;
        let fs = Mounted::dax(kind)?;
        Ok(Self { device, fs })
    }

    /// As `new`, but an xfs gets a single allocation group.
    #[track_caller]
    pub fn one_group(kind: usize) -> Outcome<Self> {
        let device = Device::open(0)?;
        let fs = Mounted::dax_one_group(kind)?;
        Ok(Self { device, fs })
    }

    /// A new file and a mapping of all of it, which holds the pattern of `seed`.
    #[track_caller]
    pub fn mapped(&self, name: &str, pages: usize, seed: u64) -> Outcome<(File, Buffer)> {
        let file = self.fs.file(name, pages)?;
        let buf = Buffer::shared(&file, pages)?;
        buf.fill(0, pages, seed);
        Ok((file, buf))
    }

    /// Checks that the pages of a mapping are DAX pages with these counts, mapped by entries of the
    /// right size.
    #[track_caller]
    pub fn expect(&self, buf: &Buffer, counts: Counts, when: &str) -> Outcome<Vec<u64>> {
        self.expect_order(buf, counts, order(buf.pages()), when)
    }

    /// As `expect`, for blocks that files share. A kernel with series A maps them page by page,
    /// which `clones` tests; another kernel by what fits.
    #[track_caller]
    pub fn expect_shared(&self, buf: &Buffer, counts: Counts, when: &str) -> Outcome<Vec<u64>> {
        let found = self.device.inspect_one(buf, 0)?.order;
        self.expect_order(buf, counts, found.min(order(buf.pages())), when)
    }

    #[track_caller]
    fn expect_order(
        &self,
        buf: &Buffer,
        counts: Counts,
        order: u32,
        when: &str,
    ) -> Outcome<Vec<u64>> {
        let pages = self
            .device
            .inspect(buf, 0, buf.pages())
            .or_fail("ZDM_INSPECT")?;
        for (i, page) in pages.iter().enumerate() {
            let found = [page.refs, page.mapcount, page.pins];
            let pmd = page.flags & ZDM_PAGE_PMD != 0;
            if found != counts
                || page.order != order
                || pmd != (order > 0)
                || page.kind != TYPE_FS_DAX
            {
                return Err(Fail::failed(format!(
                    "page {i} {when}: expected [references, mappings, pins] {counts:?}, order \
                     {order}, mapped so, FS_DAX, found {page:x?}"
                )));
            }
        }
        Ok(pages.iter().map(|page| page.pfn).collect())
    }

    /// Checks the counts of page frames, mapped or not.
    #[track_caller]
    pub fn expect_frames(&self, frames: &[u64], counts: Counts, when: &str) -> Outcome {
        for pfn in frames {
            let page = self.device.inspect_frames(*pfn, 1)?[0];
            let found = [page.refs, page.mapcount, page.pins];
            if found != counts || page.kind != TYPE_FS_DAX {
                return Err(Fail::failed(format!(
                    "page frame {pfn:#x} {when}: expected [references, mappings, pins] \
                     {counts:?}, FS_DAX, found {page:x?}"
                )));
            }
        }
        Ok(())
    }

    /// Checks that page frames are free: no file has them, and their folios are small again.
    #[track_caller]
    pub fn expect_free(&self, frames: &[u64], when: &str) -> Outcome {
        self.expect_frames(frames, IDLE, when)?;
        for pfn in frames {
            let page = self.device.inspect_frames(*pfn, 1)?[0];
            if page.flags != ZDM_PAGE_THERE || page.order != 0 {
                return Err(Fail::failed(format!(
                    "page frame {pfn:#x} {when}: expected a page of no file, found {page:x?}"
                )));
            }
        }
        Ok(())
    }

    /// Unmounts, and checks that all of the pmem is free then.
    #[track_caller]
    pub fn unmount(mut self) -> Outcome {
        self.fs.unmount().or_fail("umount")?;
        expect_pmem_free(&self.device)
    }
}

/// Checks that every page of the pmem is free.
#[track_caller]
pub(super) fn expect_pmem_free(device: &Device) -> Outcome {
    let (first, n) = fsdax::pmem_frames()?;
    let pages = device.inspect_frames(first, n)?;
    let free = |p: &&PageInfo| {
        [p.refs, p.mapcount, p.pins] == IDLE
            && (p.kind, p.order) == (TYPE_FS_DAX, 0)
            && p.flags == ZDM_PAGE_THERE
    };
    let used: Vec<&PageInfo> = pages.iter().filter(|p| !free(p)).collect();
    match used.first() {
        None => Ok(()),
        Some(page) => Err(Fail::failed(format!(
            "pages of an unmounted pmem that are not free: expected 0, found {}, the first of \
             them {page:x?}",
            used.len()
        ))),
    }
}

/// Each entry adds one reference, and its removal takes it away. A page belongs to no file after
/// the file has gone or has given it up, in each way.
fn counts<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 800)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        // Adds a second mapping and another process, and removes them.
        let again = Buffer::shared(&file, pages)?;
        again.check(0, pages, 800)?;
        s.expect_frames(&frames, [2, 2, 0], "mapped twice")?;
        let other = Waiting::start(|| again.check(0, pages, 800), || Ok(()))?;
        s.expect_frames(&frames, [3, 3, 0], "and by another process")?;
        other.join()?;
        s.expect_frames(&frames, [2, 2, 0], "without the other process")?;
        drop(again);
        s.expect(&buf, MAPPED, "mapped once again")?;
        drop(buf);
        // The file still has the pages: they are idle, not free.
        s.expect_frames(&frames, IDLE, "unmapped")?;
        // Truncate a part, then all.
        let buf = Buffer::shared(&file, pages)?;
        buf.check(0, pages, 800)?;
        files::truncate(&file, pages / 2).or_fail("ftruncate")?;
        s.expect_free(&frames[pages / 2..], "truncated")?;
        buf.check(0, pages / 2, 800)?;
        s.expect_frames(&frames[..pages / 2], MAPPED, "not truncated")?;
        files::truncate(&file, 0).or_fail("ftruncate")?;
        s.expect_free(&frames, "truncated wholly")?;
        drop(buf);
        // Punch a hole.
        let (file, buf) = s.mapped("b", pages, 801)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let hole = pages / 2;
        files::punch(&file, 0, hole).or_fail("hole punch")?;
        s.expect_free(&frames[..hole], "in the hole")?;
        buf.check(hole, pages - hole, 801)?;
        buf.check_zero(0, hole)?;
        s.expect_frames(&frames[hole..], MAPPED, "beside the hole")?;
        drop((file, buf));
        s.expect_frames(&frames[hole..], IDLE, "closed")?;
        s.fs.remove("b")?;
        s.expect_free(&frames, "unlinked")?;
        // Unlink while it is mapped: the file ends with the mapping.
        let (file, buf) = s.mapped("c", pages, 802)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        s.fs.remove("c")?;
        drop(file);
        buf.check(0, pages, 802)?;
        s.expect(&buf, MAPPED, "unlinked and mapped")?;
        drop(buf);
        s.expect_free(&frames, "unlinked and unmapped")?;
        s.fs.remove("a")?;
    }
    // Leave files behind for the unmount.
    let mut all = Vec::new();
    for (name, pages) in [("d", SMALL), ("e", LARGE)] {
        let (_, buf) = s.mapped(name, pages, 803)?;
        all.extend(s.expect(&buf, MAPPED, "mapped")?);
    }
    s.expect_frames(&all, IDLE, "unmapped")?;
    s.unmount()
}

/// Each holder adds one reference, however it got it. References and data survive the end of the
/// mapping.
fn pins<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 810)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let n = pages / order_pages(pages);
        let get = |n| held(MAPPED, n);
        let pin = |n| with_pins(pages, MAPPED, n);
        for (flags, counts) in [
            (ZDM_PIN_GET, get(1)),
            (ZDM_PIN_GET | ZDM_PIN_FAST, get(1)),
            (ZDM_PIN_GET | ZDM_PIN_WRITE | ZDM_PIN_FAST, get(1)),
            (0, pin(1)),
            (ZDM_PIN_FAST, pin(1)),
            (ZDM_PIN_WRITE, pin(1)),
            (ZDM_PIN_WRITE | ZDM_PIN_FAST, pin(1)),
        ] {
            let when = format!("with flags {flags:#x}");
            // Pin one page of each folio.
            let ids: Vec<u32> = (0..n)
                .map(|i| s.device.pin(&buf, i * order_pages(pages), 1, flags))
                .collect::<std::io::Result<_>>()
                .or_fail(&format!("ZDM_PIN {when}"))?;
            s.expect(&buf, counts, &when)?;
            for id in ids {
                s.device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            }
            s.expect(&buf, MAPPED, &format!("without {when}"))?;
        }
        // Pin every page of the file, then unmap.
        let id = s.device.pin(&buf, 0, pages, 0).or_fail("ZDM_PIN")?;
        let all = with_pins(pages, MAPPED, order_pages(pages) as i32);
        s.expect(&buf, all, "all pages held")?;
        drop(buf);
        s.expect_frames(&frames, [all[0] - 1, 0, all[2]], "held and not mapped")?;
        let buf = Buffer::shared(&file, pages)?;
        buf.check(0, pages, 810)?;
        s.expect(&buf, all, "held and mapped again")?;
        s.device.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
        s.expect(&buf, MAPPED, "let go")?;
        drop((file, buf));
        s.expect_frames(&frames, IDLE, "in the end")?;
        s.fs.remove("a")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// The number of pages in the folio that one fault into a file of this size maps.
fn order_pages(pages: usize) -> usize {
    1 << order(pages)
}

/// Long-term pins are refused, because the file system could not get its blocks back.
fn long_term<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 820)?;
        let private = Buffer::of_file(&file, pages, libc::MAP_PRIVATE).or_fail("mmap")?;
        private.check(0, pages, 820)?;
        let refused = &[libc::EOPNOTSUPP];
        for flags in [0, ZDM_PIN_WRITE, ZDM_PIN_FAST, ZDM_PIN_WRITE | ZDM_PIN_FAST] {
            let what = format!("ZDM_PIN for long with flags {flags:#x}");
            let result = s.device.pin(&buf, 0, 1, flags | ZDM_PIN_LONGTERM);
            expect_errno(result, refused, &what)?;
            let result = s.device.pin(&private, 1, 1, flags | ZDM_PIN_LONGTERM);
            expect_errno(result, refused, &format!("{what}, of a private mapping"))?;
        }
        // io_uring is a user of long-term pins within the kernel.
        let result = Uring::with_buffer(&buf, 0, 1);
        expect_errno(result, refused, "a registered buffer of io_uring")?;
        if let Ok(mut gup) = LongTermPin::open(GUP_TEST.as_ref()) {
            for fast in [false, true] {
                let result = gup.start(&buf, 0, 1, fast, true);
                expect_errno(result, refused, "PIN_LONGTERM_TEST_START")?;
            }
        }
        // Anonymous memory can be registered: the call itself is right.
        let anon = Buffer::filled(1, 821)?;
        drop(Uring::with_buffer(&anon, 0, 1).or_fail("a registered buffer of memory")?);
        drop(private);
        s.expect(&buf, MAPPED, "after refusals")?;
        drop((file, buf));
        s.fs.remove("a")?;
    }
    s.unmount()
}

/// The pages are on no list, are not charged, and have no reference but those of mappings, because
/// there is no page cache. read(2) and write(2) do not even map them.
fn no_page_cache<const KIND: usize>(_: &Ctx) -> Outcome {
    use std::os::unix::fs::FileExt;
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 830)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        for page in s.device.inspect(&buf, 0, pages).or_fail("ZDM_INSPECT")? {
            let wrong = ZDM_PAGE_LRU | ZDM_PAGE_ANON | ZDM_PAGE_CHARGED;
            check!(
                page.flags & wrong == 0 && page.flags & ZDM_PAGE_MAPPING != 0,
                "page of a DAX file: expected it on no list, charged to nobody, of a file, \
                 found {page:x?}"
            );
        }
        drop(buf);
        s.expect_frames(&frames, IDLE, "unmapped")?;
        let mut data = vec![0; pages * PAGE];
        file.read_exact_at(&mut data, 0).or_fail("read")?;
        check_bytes(&data, 830, 0, "read(2) after a write by a mapping")?;
        file.write_all_at(&pattern_bytes(831, 0, pages), 0)
            .or_fail("write")?;
        s.expect_frames(&frames, IDLE, "after read and write")?;
        let buf = Buffer::shared(&file, pages)?;
        buf.check(0, pages, 831)?;
        let now = s.expect(&buf, MAPPED, "mapped again")?;
        check_eq!(now, frames, "page frames");
        // read(2) sees the data of a mapping at once.
        buf.fill(0, pages, 832);
        file.read_exact_at(&mut data, 0).or_fail("read")?;
        check_bytes(&data, 832, 0, "read(2) of what is mapped")?;
        s.fs.remove("a")?;
    }
    s.unmount()
}
