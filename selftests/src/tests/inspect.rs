// SPDX-License-Identifier: GPL-2.0

//! ZDM_INSPECT: the fields of pages, by address and by page frame.

use std::fs::{self, File};

use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, PAGES, Test, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE};
use crate::harness::Child;
use crate::sys;
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("inspect.kinds", kinds),
    test("inspect.files", files),
    test("inspect.huge", huge),
    test("inspect.private", on_device::<PRIVATE>),
    test("inspect.pfn", pfn),
    test("inspect.touches_nothing", touches_nothing),
    test("inspect.many", many),
    test("inspect.bad", bad),
    test("inspect_coherent.on_device", on_device::<COHERENT>),
    test("inspect_coherent.pfn", pfn_of::<COHERENT>),
    test("inspect_generic.on_device", on_device::<GENERIC>),
    test("inspect_generic.pfn", pfn_of::<GENERIC>),
];

/// The result for an address without a page, with the reason in `flags`.
fn nothing(flags: u32) -> PageInfo {
    PageInfo {
        flags,
        ..PageInfo::default()
    }
}

/// Checks a page of system memory, anonymous or of a file, except its frame and whether it is
/// charged.
#[track_caller]
fn expect_system(page: &PageInfo, flags: u32, order: u32, counts: [i32; 3]) -> Outcome {
    let expected = PageInfo {
        pfn: page.pfn,
        refs: counts[0],
        mapcount: counts[1],
        pins: counts[2],
        order,
        kind: TYPE_SYSTEM,
        owner: ZDM_OWNER_NONE,
        flags: ZDM_PAGE_THERE | flags,
        index: page.index,
    };
    let found = PageInfo {
        flags: page.flags & !ZDM_PAGE_CHARGED,
        ..*page
    };
    match found == expected && page.pfn != 0 {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "a page of system memory: expected {expected:x?}, found {found:x?}"
        ))),
    }
}

/// The flags of an exclusive anonymous page.
const OWN: u32 = ZDM_PAGE_ANON | ZDM_PAGE_MAPPING | ZDM_PAGE_LRU | ZDM_PAGE_ANON_EXCLUSIVE;

fn kinds(_: &Ctx) -> Outcome {
    let (device, other) = (Device::open(0)?, Device::open(1)?);
    let buf = Buffer::filled(9, 670)?;
    buf.protect(0, 1, libc::PROT_NONE)?;
    buf.unmap(1, 1)?;
    buf.advise(2, 2, libc::MADV_DONTNEED)?;
    check_eq!(buf.get(3, 0), 0, "first word of fresh memory");
    buf.protect(5, 1, libc::PROT_READ)?;
    device.to_device(&buf, 6, 1).or_fail("MIGRATE_TO_DEV")?;
    other.to_device(&buf, 7, 1).or_fail("MIGRATE_TO_DEV")?;
    proc::drain_batches()?;

    let pages = device.inspect(&buf, 0, 9).or_fail("ZDM_INSPECT")?;
    check_eq!(pages[0], nothing(ZDM_PAGE_ERROR), "page without access");
    check_eq!(pages[1], nothing(ZDM_PAGE_ERROR), "no mapping");
    check_eq!(pages[2], nothing(0), "never touched");
    let zero = ZDM_PAGE_THERE | ZDM_PAGE_ZERO;
    check_eq!(pages[3].flags & !ZDM_PAGE_CHARGED, zero, "flags of zeroes");
    check_eq!(
        (pages[3].kind, pages[3].owner, pages[3].order),
        (TYPE_SYSTEM, ZDM_OWNER_NONE, 0),
        "type, owner and order of zeroes"
    );
    expect_system(&pages[4], OWN | ZDM_PAGE_WRITE, 0, [1, 1, 0])?;
    expect_system(&pages[5], OWN, 0, [1, 1, 0])?;
    check_eq!(
        (pages[6].kind, pages[6].owner),
        (TYPE_PRIVATE, ZDM_OWNER_LOCAL),
        "type and owner of a page on the device"
    );
    check_eq!(pages[7], nothing(0), "another device's PRIVATE page");
    expect_system(&pages[8], OWN | ZDM_PAGE_WRITE, 0, [1, 1, 0])?;
    let known = [3, 4, 5, 8].map(|i| pages[i].pfn);
    check_eq!(
        proc::frames(&buf, 2, 7)?,
        known.to_vec(),
        "frames in /proc/self/pagemap"
    );
    // A page inspected alone gives the same as among its neighbours.
    for (i, page) in pages.iter().enumerate() {
        let alone = device.inspect_one(&buf, i)?;
        check_eq!((alone.pfn, alone.flags), (page.pfn, page.flags), "page {i}");
    }
    // A page that a child shares has two entries, and is not exclusive.
    let child = super::counts::Waiting::idle()?;
    let page = device.inspect_one(&buf, 4)?;
    let shared = OWN & !ZDM_PAGE_ANON_EXCLUSIVE;
    expect_system(&page, shared, 0, [2, 2, 0])?;
    child.join()?;
    buf.check(4, 1, 670)
}

/// Pages of files: in tmpfs, and in the page cache of a file system.
fn files(_: &Ctx) -> Outcome {
    const PATH: &str = "/tmp/zdm-inspect";
    let device = Device::open(0)?;
    fs::create_dir_all("/tmp").or_fail("mkdir /tmp")?;
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(PATH)
    };
    let file = open().or_fail(PATH)?;
    // The test needs only the open file, not its name.
    fs::remove_file(PATH).or_fail(PATH)?;
    for file in [sys::memfd("zdm-inspect").or_fail("memfd_create")?, file] {
        file.set_len(4 * PAGE as u64).or_fail("ftruncate")?;
        let buf = Buffer::shared(&file, 4)?;
        buf.fill(0, 3, 671);
        proc::drain_batches()?;
        let pages = device.inspect(&buf, 0, 4).or_fail("ZDM_INSPECT")?;
        for page in &pages[..3] {
            // A small folio has one reference for the file and one for the entry.
            check!(
                page.mapcount >= 1 && page.refs > page.mapcount && page.pins == 0,
                "counts of a file's page: expected more references than mappings, no \
                 pins, found {page:x?}"
            );
            let wanted = ZDM_PAGE_THERE | ZDM_PAGE_WRITE | ZDM_PAGE_MAPPING;
            let unwanted = ZDM_PAGE_ANON | ZDM_PAGE_ZERO | ZDM_PAGE_ANON_EXCLUSIVE;
            check_eq!(
                page.flags & (wanted | unwanted),
                wanted,
                "flags of a file's page"
            );
            check_eq!(
                (page.kind, page.owner),
                (TYPE_SYSTEM, ZDM_OWNER_NONE),
                "type and owner of a file's page"
            );
        }
        check_eq!(pages[3].flags & ZDM_PAGE_WRITE, 0, "WRITE, never touched");
        // A private mapping of the same page.
        let private = Buffer::of_file(&file, 4, libc::MAP_PRIVATE).or_fail("mmap")?;
        check_eq!(private.get(0, 0), buf.get(0, 0), "word of the file");
        let seen = device.inspect_one(&private, 0)?;
        check_eq!(seen.pfn, pages[0].pfn, "frame by a private mapping");
        check_eq!(seen.flags & ZDM_PAGE_WRITE, 0, "WRITE of a private mapping");
        private.set(0, 0, 1);
        let copy = device.inspect_one(&private, 0)?;
        check!(
            copy.pfn != pages[0].pfn && copy.flags & ZDM_PAGE_ANON != 0,
            "a private copy: expected an anonymous page, found {copy:x?}"
        );
        buf.check(0, 3, 671)?;
    }
    Ok(())
}

fn huge(_: &Ctx) -> Outcome {
    const N: usize = HUGE_PAGES;
    let device = Device::open(0)?;
    let buf = huge_filled(1, 672)?;
    proc::drain_batches()?;
    for (first, n) in [(0, N), (77, 5), (N - 1, 1)] {
        let pages = device.inspect(&buf, first, n).or_fail("ZDM_INSPECT")?;
        for (i, page) in pages.iter().enumerate() {
            check_eq!(page.index as usize, first + i, "index in the folio");
            // While a PMD maps the folio, its first page has the exclusive mark for all of it.
            let page = PageInfo {
                flags: page.flags | ZDM_PAGE_ANON_EXCLUSIVE,
                ..*page
            };
            expect_system(&page, OWN | ZDM_PAGE_WRITE | ZDM_PAGE_PMD, 9, [1, 1, 0])?;
        }
    }
    // After the split there are as many entries as pages.
    buf.protect(3, 1, libc::PROT_READ)?;
    let entries = N as i32;
    let page = device.inspect_one(&buf, 4)?;
    let flags = OWN | ZDM_PAGE_WRITE;
    expect_system(&page, flags, 9, [entries, entries, 0])?;

    let zero = Buffer::anon_huge_aligned(N)?;
    zero.advise(0, N, libc::MADV_HUGEPAGE)?;
    check_eq!(zero.get(0, 0), 0, "first word of fresh memory");
    let page = device.inspect_one(&zero, 100)?;
    check_eq!(
        page.flags & !ZDM_PAGE_CHARGED,
        ZDM_PAGE_THERE | ZDM_PAGE_ZERO | ZDM_PAGE_PMD,
        "flags of the huge page of zeroes"
    );
    buf.check(0, N, 672)
}

/// Small and huge pages on a device, inspected through the device itself and through the other one.
fn on_device<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let other = Target::open(ctx, NODE + 1)?;
    let small = Buffer::filled(PAGES, 673)?;
    let huge = huge_filled(1, 673)?;
    target.move_all(&small, 673)?;
    target.move_huge(&huge, 673)?;
    for buf in [&small, &huge] {
        let whole = buf.pages() == HUGE_PAGES && target.moves_large();
        let n = buf.pages();
        let pages = target.inspect(buf, 0, n).or_fail("ZDM_INSPECT")?;
        for (i, page) in pages.iter().enumerate() {
            let first = pages[0].pfn;
            check_eq!(
                [page.refs, page.mapcount, page.pins],
                [1, 1, 0],
                "counts of page {i}"
            );
            check_eq!(
                (page.kind, page.owner),
                (target.memory_type(), ZDM_OWNER_LOCAL),
                "type and owner of page {i}"
            );
            let (order, index, pmd) = match whole {
                true => (9, i as u32, ZDM_PAGE_PMD),
                false => (0, 0, 0),
            };
            check_eq!((page.order, page.index), (order, index), "order and index");
            check!(
                !whole || page.pfn == first + i as u64,
                "frame of page {i}: expected one behind the other, found {page:x?}"
            );
            let wanted = ZDM_PAGE_THERE | ZDM_PAGE_WRITE | ZDM_PAGE_ANON | ZDM_PAGE_MAPPING;
            let ignored = ZDM_PAGE_CHARGED | ZDM_PAGE_ANON_EXCLUSIVE;
            check_eq!(page.flags & !ignored, wanted | pmd, "flags of page {i}");
            if i == 0 {
                let exclusive = page.flags & ZDM_PAGE_ANON_EXCLUSIVE;
                check_eq!(exclusive, ZDM_PAGE_ANON_EXCLUSIVE, "exclusiveness");
            }
        }
        let seen = other.inspect(buf, 0, n).or_fail("ZDM_INSPECT")?;
        for (page, theirs) in pages.iter().zip(&seen) {
            // Core mm has two ways to report that a PRIVATE page belongs to another device.
            let expected = match target.cpu_maps() {
                true => PageInfo {
                    owner: ZDM_OWNER_REMOTE,
                    ..*page
                },
                false => nothing(theirs.flags & ZDM_PAGE_ERROR),
            };
            check_eq!(*theirs, expected, "a page as the other device sees it");
        }
    }
    let pfns = match target.cpu_maps() {
        true => proc::frames(&small, 0, PAGES)?,
        false => proc::on_device(&small, 0, PAGES)?,
    };
    let seen = super::counts::frames(&target, &small, 0, PAGES)?;
    check_eq!(seen, pfns, "frames in /proc/self/pagemap");
    // By frame the result is the same page, but without the state of its mappings.
    for pfn in &pfns[..8] {
        let page = target.inspect_frames(*pfn, 1)?[0];
        check_eq!(
            (page.pfn, page.refs, page.mapcount, page.kind, page.owner),
            (*pfn, 1, 1, target.memory_type(), ZDM_OWNER_LOCAL),
            "a page by its frame"
        );
        check_eq!(
            page.flags & (ZDM_PAGE_WRITE | ZDM_PAGE_PMD | ZDM_PAGE_ERROR),
            0,
            "flags that an address has"
        );
    }
    small.check(0, PAGES, 673)?;
    huge.check(0, HUGE_PAGES, 673)
}

/// Frames that are no page of a pagemap.
fn pfn(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 674)?;
    let ram = proc::frames(&buf, 0, 1)?[0];
    for pfn in [0, 1, ram, 1 << 36, (1 << 40) - 1] {
        let page = device.inspect_frames(pfn, 1)?[0];
        check_eq!(page, nothing(0), "page frame {pfn:#x}");
    }
    let pages = device.inspect_frames(ram & !0xff, 256)?;
    check_eq!(
        pages.iter().filter(|p| **p != nothing(0)).count(),
        0,
        "frames of system memory that are seen"
    );
    Ok(())
}

/// All frames of both devices, free and in use.
fn pfn_of<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let other = Target::open(ctx, NODE + 1)?;
    let buf = Buffer::filled(PAGES, 675)?;
    target.move_all(&buf, 675)?;
    let used = proc::frames(&buf, 0, PAGES)?;
    let (mut mine, mut in_use) = (0, 0);
    for range in ctx.module.frames(NODE) {
        let n = (range.end - range.start) as usize;
        let pages = target.inspect_frames(range.start, n)?;
        let theirs = other.inspect_frames(range.start, n)?;
        for ((pfn, page), seen) in range.zip(&pages).zip(&theirs) {
            check_eq!(page.pfn, pfn, "page frame");
            check_eq!(page.kind, target.memory_type(), "type of {pfn:#x}");
            let counts = [page.refs, page.mapcount, page.pins];
            let expected = match used.contains(&pfn) {
                true => [1, 1, 0],
                false => [0, 0, 0],
            };
            check_eq!(counts, expected, "counts of page frame {pfn:#x}");
            let owners = (page.owner, seen.owner);
            mine += u64::from(page.owner == ZDM_OWNER_LOCAL);
            in_use += usize::from(page.refs > 0);
            check!(
                owners == (ZDM_OWNER_LOCAL, ZDM_OWNER_REMOTE)
                    || owners == (ZDM_OWNER_REMOTE, ZDM_OWNER_LOCAL),
                "owner of {pfn:#x} by both devices: expected one LOCAL, found {owners:?}"
            );
        }
        // Behind the end there is other memory, or none.
        let over = target.inspect_frames(range_end(ctx, NODE) - 1, 2)?;
        check_eq!(over[0].kind, target.memory_type(), "type of the last page");
        check!(
            over[1].kind != target.memory_type() || over[1].flags == 0,
            "page frame behind the last: expected none of these, found {:x?}",
            over[1]
        );
    }
    check_eq!(mine, target.audit()?.0.pages, "frames of this device");
    check_eq!(in_use, PAGES, "frames in use");
    buf.check(0, PAGES, 675)
}

/// The first frame behind those of a kind of device.
fn range_end(ctx: &Ctx, node: usize) -> u64 {
    let ends = ctx.module.frames(node).into_iter().map(|r| r.end);
    ends.max().unwrap_or(0)
}

/// An inspection does not populate, move, count or hold anything.
fn touches_nothing(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::anon(64)?;
    let far = Buffer::filled(8, 676)?;
    device.move_all(&far, 676)?;
    let before = device.stats()?;
    for _ in 0..3 {
        let pages = device.inspect(&buf, 0, 64).or_fail("ZDM_INSPECT")?;
        check_eq!(pages, vec![nothing(0); 64], "pages that are not there");
        let pages = device.inspect(&far, 0, 8).or_fail("ZDM_INSPECT")?;
        check!(
            pages.iter().all(|p| p.refs == 1 && p.mapcount == 1),
            "counts of pages on the device: expected 1 each, found {pages:x?}"
        );
    }
    check_eq!(proc::present(&buf, 0, 64)?, 0, "present pages");
    check_eq!(proc::on_device(&far, 0, 8)?.len(), 8, "device pages");
    let after = device.stats()?;
    check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults");
    check_eq!(after.device_faults, before.device_faults, "device faults");
    check_eq!(after.to_system, before.to_system, "pages moved");
    far.check(0, 8, 676)
}

/// The largest number of pages in one call, with mappings and holes among them.
fn many(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::anon(ZDM_INSPECT_MAX_PAGES)?;
    let some = [0, 1, 511, 512, 4095, 32768, ZDM_INSPECT_MAX_PAGES - 1];
    for page in some {
        buf.fill(page, 1, 677);
    }
    // PROT_NONE instead of a hole, in which the vector of results could be mapped.
    buf.protect(1000, 3000, libc::PROT_NONE)?;
    let pages = device
        .inspect(&buf, 0, ZDM_INSPECT_MAX_PAGES)
        .or_fail("ZDM_INSPECT of many pages")?;
    for (i, page) in pages.iter().enumerate() {
        let expected = match i {
            _ if some.contains(&i) && !(1000..4000).contains(&i) => {
                ZDM_PAGE_THERE | ZDM_PAGE_WRITE | ZDM_PAGE_ANON
            }
            1000..4000 => ZDM_PAGE_ERROR,
            _ => 0,
        };
        let mask = ZDM_PAGE_THERE | ZDM_PAGE_WRITE | ZDM_PAGE_ANON | ZDM_PAGE_ERROR;
        check_eq!(page.flags & mask, expected, "flags of page {i}");
    }
    Ok(())
}

fn bad(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(4, 678)?;
    let room = Buffer::filled(1, 679)?;
    let good = Inspect {
        addr: buf.at(0),
        npages: 4,
        pages: room.at(0),
        ..Inspect::default()
    };
    device
        .inspect_with(&mut good.clone())
        .or_fail("ZDM_INSPECT")?;
    let refused = |wrong: Inspect, errno: i32, what: &str| -> Outcome {
        let result = device.inspect_with(&mut wrong.clone());
        expect_errno(result, &[errno], &format!("ZDM_INSPECT with {what}"))
    };
    for flags in [2, 3, 1 << 31, u32::MAX] {
        refused(Inspect { flags, ..good }, libc::EINVAL, "unknown flags")?;
    }
    let reserved = Inspect {
        reserved: 1,
        ..good
    };
    refused(reserved, libc::EINVAL, "reserved set")?;
    let max = ZDM_INSPECT_MAX_PAGES as u64;
    for npages in [0, max + 1, 1 << 52, u64::MAX] {
        for flags in [0, ZDM_INSPECT_PFN] {
            let wrong = Inspect {
                npages,
                flags,
                ..good
            };
            refused(wrong, libc::EINVAL, &format!("{npages:#x} pages"))?;
        }
    }
    for addr in [
        good.addr + 8,
        1 << 56,
        0xffff_8000_0000_0000,
        u64::MAX - 4095,
    ] {
        refused(Inspect { addr, ..good }, libc::EINVAL, "a bad address")?;
    }
    for flags in [0, ZDM_INSPECT_PFN] {
        let nowhere = Inspect {
            pages: 8,
            flags,
            ..good
        };
        refused(nowhere, libc::EFAULT, "a bad pointer")?;
    }
    let last = Inspect {
        addr: u64::MAX,
        npages: 4,
        flags: ZDM_INSPECT_PFN,
        ..good
    };
    refused(last, libc::EINVAL, "page frames that wrap")?;
    let result = device.ioctl_nowhere(ZDM_INSPECT);
    expect_errno(result, &[libc::EFAULT], "ZDM_INSPECT with a bad argument")?;
    // Inspection by frame is for root, by address for every user.
    Child::spawn(|| {
        sys::become_nobody().or_fail("setresuid")?;
        let result = device.inspect_at(1, 1, ZDM_INSPECT_PFN);
        expect_errno(result, &[libc::EPERM], "ZDM_INSPECT_PFN by nobody")?;
        let pages = device
            .inspect(&buf, 0, 4)
            .or_fail("ZDM_INSPECT by nobody")?;
        check!(
            pages.iter().all(|p| p.flags & ZDM_PAGE_THERE != 0),
            "pages seen by nobody: expected 4, found {pages:x?}"
        );
        Ok(())
    })?
    .join()?;
    buf.check(0, 4, 678)
}
