// SPDX-License-Identifier: GPL-2.0

//! The life of GENERIC pages, with their counts at each step: 0 when free, then one for each page
//! table entry, and nothing else. `generic/pins.rs` tests the counts of pins.

pub mod pins;

use std::fs;
use std::time::Duration;

use super::counts::{
    MAPPED, Waiting, expect, expect_frames, expect_free, frames, held, pinned, pinned_large,
};
use super::ksm::{self, KSM, Ksm};
use super::target::{GENERIC, Target, expect_huge, huge_filled};
use super::{Ctx, Test, absent, freed_since, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, check_bytes};
use crate::harness::Child;
use crate::module::busy;
use crate::sys;
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("generic.counts", counts),
    test("generic.counts_huge", counts_huge),
    test("generic.fork", fork),
    test("generic.fork_huge", fork_huge),
    test("generic.split", split),
    test("generic.partial_munmap", partial_munmap),
    test("generic.advice", advice),
    test("generic.mlock", mlock),
    test("generic.ksm", ksm),
    test("generic.mremap", mremap),
    test("generic.mprotect", mprotect),
    test("generic.exclusive_again", exclusive_again),
];

/// Tests that load the module themselves.
pub const RELOADING: &[Test] = &[absent(test("generic.unload", unload))];

const N: usize = HUGE_PAGES;
/// The number of pages in the small buffers.
const ALL: usize = 12;

/// The counts of small pages from free to free, with the share of each holder.
fn counts(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 620)?;
    let before = target.stats()?;
    target.move_all(&buf, 620)?;
    let pfns = frames(&target, &buf, 0, ALL)?;
    check_eq!(proc::frames(&buf, 0, ALL)?, pfns, "frames in pagemap");
    for page in target.inspect(&buf, 0, ALL).or_fail("ZDM_INSPECT")? {
        let wanted = ZDM_PAGE_THERE | ZDM_PAGE_WRITE | ZDM_PAGE_ANON | ZDM_PAGE_MAPPING;
        let wanted = wanted | ZDM_PAGE_ANON_EXCLUSIVE;
        let found = page.flags & !ZDM_PAGE_CHARGED;
        check_eq!(found, wanted, "flags of a page on the device");
        check_eq!(
            (page.kind, page.owner, page.order, page.index),
            (TYPE_GENERIC, ZDM_OWNER_LOCAL, 0, 0),
            "type, owner, order and index"
        );
    }
    expect(&target, &buf, 0, ALL, MAPPED, "after migration")?;

    let child = Waiting::idle()?;
    expect(&target, &buf, 0, ALL, [2, 2, 0], "after fork")?;
    child.join()?;
    expect(&target, &buf, 0, ALL, MAPPED, "after the child's end")?;

    // vmsplice adds a reference, a pin adds its bias.
    let (mut read, write) = sys::pipe().or_fail("pipe")?;
    check_eq!(
        buf.vmsplice_to(&write, 2, 3).or_fail("vmsplice")?,
        3 * 4096,
        "bytes lent to the pipe"
    );
    expect(&target, &buf, 2, 3, held(MAPPED, 1), "lent to a pipe")?;
    std::io::Read::read_exact(&mut read, &mut [0; 3 * 4096]).or_fail("pipe")?;
    expect(&target, &buf, 2, 3, MAPPED, "back from a pipe")?;
    let id = target.pin(&buf, 2, 3, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
    expect(&target, &buf, 2, 3, pinned(MAPPED, 1), "pinned")?;
    expect(&target, &buf, 5, ALL - 5, MAPPED, "beside pinned ones")?;
    target.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
    expect(&target, &buf, 0, ALL, MAPPED, "after the pin")?;

    // Half of the pages are freed by munmap, the others by migrating back.
    buf.unmap(0, ALL / 2)?;
    freed_since(&target, &before, ALL / 2)?;
    expect_free(&target, &pfns[..ALL / 2], "after munmap")?;
    target.bring_back(&buf, ALL / 2, ALL / 2)?;
    expect_free(&target, &pfns[ALL / 2..], "after migration back")?;
    buf.check(ALL / 2, ALL / 2, 620)?;
    target.expect_empty()
}

/// Checks the fields of a folio of 512 pages.
fn expect_folio(target: &Target, buf: &Buffer, counts: [i32; 3], when: &str) -> Outcome {
    let pages = target.inspect(buf, 0, N).or_fail("ZDM_INSPECT")?;
    for (i, page) in pages.iter().enumerate() {
        check_eq!(
            (page.order, page.index, page.pfn),
            (9, i as u32, pages[0].pfn + i as u64),
            "order, index and frame of page {i} {when}"
        );
    }
    expect(target, buf, 0, N, counts, when)
}

/// The counts of a large folio that one PMD maps.
fn counts_huge(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    if !target.moves_large() {
        return Err(Fail::Skip("this kernel moves small pages only".into()));
    }
    let buf = huge_filled(1, 621)?;
    let before = target.stats()?;
    target.move_huge(&buf, 621)?;
    let pfns = frames(&target, &buf, 0, N)?;
    expect_folio(&target, &buf, MAPPED, "after migration")?;
    let flags = target.inspect_one(&buf, 0)?.flags;
    check!(
        flags & ZDM_PAGE_PMD != 0 && flags & ZDM_PAGE_WRITE != 0,
        "flags of a huge page: expected PMD and WRITE, found {flags:#x}"
    );
    let child = Waiting::idle()?;
    expect_folio(&target, &buf, [2, 2, 0], "after fork")?;
    child.kill()?;
    expect_folio(&target, &buf, MAPPED, "after the child's end")?;

    for (first, n) in [(0, 1), (300, 10), (0, N)] {
        for (flags, counts) in [
            (ZDM_PIN_GET, held(MAPPED, n as i32)),
            (ZDM_PIN_WRITE, pinned_large(MAPPED, n as i32)),
            (ZDM_PIN_LONGTERM, pinned_large(MAPPED, n as i32)),
        ] {
            let id = target.pin(&buf, first, n, flags).or_fail("ZDM_PIN")?;
            expect_folio(&target, &buf, counts, &format!("with {n} pages held"))?;
            target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            expect_folio(&target, &buf, MAPPED, "after the pin")?;
        }
    }
    buf.check(0, N, 621)?;
    expect_huge(&buf, 0, N, N)?;
    buf.unmap(0, N)?;
    freed_since(&target, &before, N)?;
    expect_free(&target, &pfns, "after munmap of a huge page")?;
    target.expect_empty()
}

/// Three generations share a page. A process that writes gets a page of its own, and the page is
/// free after the last process has gone.
fn generations(target: &Target, buf: &Buffer, seed: u64) -> Outcome {
    let all = buf.pages();
    let pfns = frames(target, buf, 0, all)?;
    let child = Waiting::start(
        || {
            let grandchild =
                Waiting::start(|| buf.check(0, all, seed), || buf.check(0, all, seed))?;
            // The parent's file inspects the pages of the parent.
            expect(target, buf, 0, all, [3, 3, 0], "with a grandchild")?;
            buf.set(0, 0, 1);
            check_eq!(buf.get(0, 0), 1, "word that the child wrote");
            grandchild.join()?;
            let left = proc::frames(buf, 0, 1)?;
            check!(
                left[0] != pfns[0],
                "frame of a page that the child wrote: expected another, found the same"
            );
            Ok(())
        },
        || buf.check(1, all - 1, seed),
    )?;
    check_eq!(
        &frames(target, buf, 0, all)?,
        &pfns,
        "frames of the parent's pages"
    );
    child.join()?;
    buf.check(0, all, seed)?;
    // The last process that has the page writes in place.
    let before = target.stats()?;
    buf.fill(0, all, seed + 1);
    let counts = target.inspect_one(buf, 0)?;
    check_eq!((counts.refs, counts.mapcount), (1, 1), "counts at the end");
    check_eq!(
        &frames(target, buf, 0, all)?,
        &pfns,
        "frames after the parent's write"
    );
    check_eq!(
        target.stats()?.cpu_faults,
        before.cpu_faults,
        "growth of stats.cpu_faults"
    );
    let read = target.read(buf, 0, all).or_fail("READ")?;
    check_bytes(&read.data, seed + 1, 0, "what the CPU wrote, by the device")?;
    target.bring_back(buf, 0, all)?;
    buf.check(0, all, seed + 1)?;
    expect_free(target, &pfns, "after all of it")?;
    target.expect_empty()
}

fn fork(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 622)?;
    target.move_all(&buf, 622)?;
    generations(&target, &buf, 622)
}

/// A write also splits the child's huge entry; the folio stays whole, and the parent has a single
/// entry.
fn fork_huge(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = huge_filled(1, 624)?;
    target.move_huge(&buf, 624)?;
    generations(&target, &buf, 624)
}

/// A PMD becomes 512 entries, then the migration of a part splits the folio itself.
fn split(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    if !target.moves_large() {
        return Err(Fail::Skip("this kernel moves small pages only".into()));
    }
    let buf = huge_filled(1, 626)?;
    target.move_huge(&buf, 626)?;
    let pfns = frames(&target, &buf, 0, N)?;
    buf.protect(7, 1, libc::PROT_READ)?;
    let all = N as i32;
    expect_folio(&target, &buf, [all, all, 0], "after the split of the PMD")?;
    let flags = target.inspect_one(&buf, 7)?.flags;
    check_eq!(
        flags & (ZDM_PAGE_PMD | ZDM_PAGE_WRITE),
        0,
        "PMD and WRITE of a read-only page"
    );
    target.to_system(&buf, 100, 50).or_fail("MIGRATE_TO_SYS")?;
    target.expect(&buf, 0, N, N - 50)?;
    target.expect(&buf, 100, 50, 0)?;
    for page in target.inspect(&buf, 0, 100).or_fail("ZDM_INSPECT")? {
        check_eq!(
            (page.order, page.index, page.refs, page.mapcount),
            (0, 0, 1, 1),
            "order, index, references and mappings after the split of the folio"
        );
    }
    check_eq!(
        frames(&target, &buf, 0, 100)?,
        pfns[..100],
        "frames after the split"
    );
    expect_free(&target, &pfns[100..150], "of the part that went")?;
    buf.check(0, N, 626)?;
    target.bring_back(&buf, 0, N)?;
    buf.check(0, N, 626)?;
    expect_free(&target, &pfns, "in the end")?;
    target.expect_empty()
}

/// Unmapping a part of a large folio drops the references of that part; the folio is freed with its
/// last page.
fn partial_munmap(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    if !target.moves_large() {
        return Err(Fail::Skip("this kernel moves small pages only".into()));
    }
    let buf = huge_filled(1, 627)?;
    target.move_huge(&buf, 627)?;
    let pfns = frames(&target, &buf, 0, N)?;
    buf.unmap(0, N / 2)?;
    let left = target.inspect_one(&buf, N / 2)?;
    // Whether split or not, every remaining entry is one reference of its folio.
    let entries = match left.order {
        0 => 1,
        _ => N as i32 / 2,
    };
    let counts = [entries, entries, 0];
    expect(
        &target,
        &buf,
        N / 2,
        N / 2,
        counts,
        "after munmap of a half",
    )?;
    buf.check(N / 2, N / 2, 627)?;
    buf.advise(N / 2, N / 2 - 1, libc::MADV_DONTNEED)?;
    expect(&target, &buf, N - 1, 1, MAPPED, "as the last of its folio")?;
    buf.check(N - 1, 1, 627)?;
    buf.unmap(N - 1, 1)?;
    target.expect_empty()?;
    expect_free(&target, &pfns, "after munmap in parts")
}

/// Advice for system memory changes neither the pages nor their places; MADV_DONTNEED frees pages.
fn advice(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    for huge in [false, true] {
        let buf = match huge {
            false => Buffer::filled(ALL, 628)?,
            true => huge_filled(1, 628)?,
        };
        let all = buf.pages();
        target.move_all(&buf, 628)?;
        let pfns = frames(&target, &buf, 0, all)?;
        for (advice, name) in [
            (libc::MADV_COLD, "MADV_COLD"),
            (libc::MADV_PAGEOUT, "MADV_PAGEOUT"),
            (libc::MADV_FREE, "MADV_FREE"),
            (libc::MADV_POPULATE_READ, "MADV_POPULATE_READ"),
            (libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE"),
        ] {
            for (first, n) in [(0, all), (3, 5)] {
                buf.advise(first, n, advice)?;
                buf.check(0, all, 628)?;
                check_eq!(
                    frames(&target, &buf, 0, all)?,
                    pfns,
                    "frames after {name} of {n} pages"
                );
                let page = target.inspect_one(&buf, 3)?;
                check!(
                    page.refs == page.mapcount && page.flags & ZDM_PAGE_LRU == 0,
                    "a page after {name}: expected as many references as mappings and no \
                     LRU, found {page:x?}"
                );
            }
        }
        check_eq!(target.audit()?.0.found, 0, "violations after advice");
        buf.advise(0, all, libc::MADV_DONTNEED)?;
        expect_free(&target, &pfns, "after MADV_DONTNEED")?;
        buf.check_zero(0, all)?;
        target.expect_empty()?;
    }
    Ok(())
}

fn mlock(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    for huge in [false, true] {
        let buf = match huge {
            false => Buffer::filled(ALL, 629)?,
            true => huge_filled(1, 629)?,
        };
        let all = buf.pages();
        // Lock a part before it migrates, and the rest afterwards.
        buf.lock(0, all / 2, true)?;
        target.move_all(&buf, 629)?;
        buf.lock(0, all, true)?;
        target.expect(&buf, 0, all, all)?;
        let page = target.inspect_one(&buf, 0)?;
        check_eq!(page.refs, page.mapcount, "references of a locked page");
        buf.check(0, all, 629)?;
        target.bring_back(&buf, 0, all)?;
        target.move_all(&buf, 629)?;
        buf.lock(0, all / 2, false)?;
        buf.check(0, all, 629)?;
        // A page that is freed on the device would keep PG_unevictable; see `advice.rs`.
        target.bring_back(&buf, 0, all)?;
        drop(buf);
        target.expect_empty()?;
    }
    Ok(())
}

/// KSM does not merge pages on the device, although equal pages of system memory are merged.
fn ksm(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    if !fs::exists(KSM).or_fail(KSM)? {
        return Err(Fail::Skip("no CONFIG_KSM".into()));
    }
    let bufs = [
        Buffer::filled(ALL, 630)?,
        Buffer::filled(ALL, 630)?,
        Buffer::filled(ALL, 630)?,
        Buffer::filled(ALL, 630)?,
    ];
    target.move_all(&bufs[0], 630)?;
    target.move_all(&bufs[1], 630)?;
    let pfns = [0, 1].map(|i| frames(&target, &bufs[i], 0, ALL));
    let [a, b] = pfns;
    let pfns = [a?, b?];
    for buf in &bufs {
        buf.advise(0, ALL, libc::MADV_MERGEABLE)?;
    }
    let _ksm = Ksm;
    for (name, value) in [("sleep_millisecs", "0"), ("pages_to_scan", "1000")] {
        fs::write(format!("{KSM}/{name}"), value).or_fail(name)?;
    }
    let start = ksm::number("full_scans")?;
    fs::write(format!("{KSM}/run"), "1").or_fail("run")?;
    let mut merged = 0;
    sys::wait_until(Duration::from_secs(20), || {
        merged = ksm::number("pages_sharing").unwrap_or(0);
        merged > 0 && ksm::number("full_scans").is_ok_and(|n| n > start + 2)
    });
    check!(
        merged > 0,
        "merged pages in system memory: expected some, found none"
    );
    for (buf, pfns) in bufs.iter().zip(&pfns) {
        check_eq!(
            &frames(&target, buf, 0, ALL)?,
            pfns,
            "frames of pages on the device"
        );
        expect(&target, buf, 0, ALL, MAPPED, "beside merged ones")?;
    }
    // Merged pages may migrate or not; a process that writes gets a page of its own.
    if let Err(e) = target.to_device(&bufs[2], 0, ALL) {
        check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
    }
    for (i, buf) in bufs.iter().enumerate() {
        buf.check(0, ALL, 630)?;
        buf.fill(0, ALL, 631 + i as u64);
    }
    for (i, buf) in bufs.iter().enumerate() {
        buf.check(0, ALL, 631 + i as u64)?;
    }
    drop(bufs);
    target.expect_empty()
}

/// Entries move; the pages and their counts stay the same.
fn mremap(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    for huge in [false, true] {
        let buf = match huge {
            false => Buffer::filled(ALL, 636)?,
            true => huge_filled(1, 636)?,
        };
        let all = buf.pages();
        target.move_all(&buf, 636)?;
        let pfns = frames(&target, &buf, 0, all)?;
        let place = Buffer::anon_huge_aligned(3 * N)?;
        // Move to a place that fits a huge entry, and to one that does not.
        for at in [2 * N, 17] {
            let from = if at == 17 { &place } else { &buf };
            let first = if at == 17 { 2 * N } else { 0 };
            from.move_pages(first, all, &place, at)?;
            check_eq!(
                &frames(&target, &place, at, all)?,
                &pfns,
                "frames after mremap"
            );
            let page = target.inspect_one(&place, at)?;
            check_eq!(page.refs, page.mapcount, "references after mremap");
            if !huge {
                expect(&target, &place, at, all, MAPPED, "after mremap")?;
            }
            place.check_from(at, all, 636, 0)?;
        }
        drop(place);
        target.expect_empty()?;
        expect_free(&target, &pfns, "after mremap and munmap")?;
    }
    Ok(())
}

fn mprotect(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 637)?;
    target.move_all(&buf, 637)?;
    let pfns = frames(&target, &buf, 0, ALL)?;
    for (prot, write, there) in [
        (libc::PROT_READ, 0, ZDM_PAGE_THERE),
        (libc::PROT_NONE, 0, 0),
        (libc::PROT_READ, 0, ZDM_PAGE_THERE),
    ] {
        buf.protect(0, ALL, prot)?;
        let page = target.inspect_one(&buf, 3)?;
        check_eq!(page.flags & ZDM_PAGE_WRITE, write, "WRITE, rights {prot}");
        check_eq!(page.flags & ZDM_PAGE_THERE, there, "THERE, rights {prot}");
        expect_frames(&target, &pfns, MAPPED, "after mprotect")?;
    }
    buf.protect(0, ALL, libc::PROT_READ | libc::PROT_WRITE)?;
    buf.check(0, ALL, 637)?;
    buf.fill(0, ALL, 638);
    check_eq!(frames(&target, &buf, 0, ALL)?, pfns, "frames after a write");
    expect(&target, &buf, 0, ALL, MAPPED, "after a write")?;
    target.bring_back(&buf, 0, ALL)?;
    buf.check(0, ALL, 638)?;
    target.expect_empty()
}

/// A page that is no longer shared becomes exclusive again, so that the process can write to it in
/// place on the device.
fn exclusive_again(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 640)?;
    target.move_all(&buf, 640)?;
    let pfns = frames(&target, &buf, 0, ALL)?;
    for round in 0..3 {
        Child::spawn(|| buf.check(0, ALL, 640 + round))?.join()?;
        let flags = target.inspect_one(&buf, 0)?.flags;
        check_eq!(flags & ZDM_PAGE_WRITE, 0, "WRITE after fork");
        buf.fill(0, ALL, 641 + round);
        check_eq!(
            &frames(&target, &buf, 0, ALL)?,
            &pfns,
            "frames after writes"
        );
        let flags = target.inspect_one(&buf, 0)?.flags;
        let own = ZDM_PAGE_WRITE | ZDM_PAGE_ANON_EXCLUSIVE;
        check_eq!(flags & own, own, "WRITE and exclusiveness after a write");
    }
    target.bring_back(&buf, 0, ALL)?;
    buf.check(0, ALL, 643)
}

/// The module stays while pages are mapped and can be unloaded afterwards; the process keeps its
/// data all the time.
fn unload(ctx: &Ctx) -> Outcome {
    ctx.module.load("")?;
    let work = || -> Outcome {
        let target = Target::open(ctx, GENERIC)?;
        let small = Buffer::filled(ALL, 644)?;
        let huge = huge_filled(1, 645)?;
        target.move_all(&small, 644)?;
        target.move_huge(&huge, 645)?;
        match ctx.module.try_unload() {
            Err(e) if busy(&e) => {}
            other => {
                return Err(Fail::failed(format!(
                    "unloading with pages mapped: expected EAGAIN or EBUSY, found {other:?}"
                )));
            }
        }
        small.check(0, ALL, 644)?;
        let child = Waiting::start(|| Ok(()), || huge.check(0, N, 645))?;
        drop(target);
        child.join()?;
        ctx.module.unload()?;
        small.check(0, ALL, 644)?;
        huge.check(0, N, 645)?;
        huge.fill(0, N, 646);
        huge.check(0, N, 646)
    };
    match work() {
        // The next test needs the module unloaded.
        Err(Fail::Skip(why)) => ctx.module.unload().and(Err(Fail::Skip(why))),
        other => other,
    }
}
