// SPDX-License-Identifier: GPL-2.0

//! Held GENERIC pages: short-term and long-term pins are granted on the device, and the page stays
//! there until the last holder has released it.

use std::path::Path;

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::gup::LongTermPin;
use crate::harness::Child;
use crate::module::busy;
use crate::sys::{self, Exit};
use crate::tests::counts::{
    Counts, MAPPED, Waiting, expect, expect_frames, expect_free, frames, held, pinned, pinned_large,
};
use crate::tests::target::{GENERIC, Target, huge_filled};
use crate::tests::{Ctx, Test, absent, freed_since, test};
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("generic.pin_stays", pin_stays),
    test("generic.pin_stays_huge", pin_stays_huge),
    test("generic.pin_munmap", pin_munmap),
    test("generic.pin_munmap_huge", pin_munmap_huge),
    test("generic.pin_mremap", pin_mremap),
    test("generic.pin_fork", pin_fork),
    test("generic.pin_fork_huge", pin_fork_huge),
    test("generic.pin_exit", pin_exit),
    test("generic.pin_gup_test", pin_gup_test),
    test("generic.pin_shared", pin_shared),
    test("generic.pin_device_write", pin_device_write),
    test("generic.pin_release", pin_release),
];

/// Tests that load the module themselves.
pub const RELOADING: &[Test] = &[absent(test("generic.pin_unload", pin_unload))];

const N: usize = HUGE_PAGES;
/// The number of pages in a small buffer, and the held ones among them.
const ALL: usize = 12;
const FIRST: usize = 5;
const HELD: usize = 4;

/// Every flavour of pin, with the counts that it adds to a small page.
const FLAVOURS: [u32; 6] = [
    ZDM_PIN_GET,
    ZDM_PIN_GET | ZDM_PIN_WRITE | ZDM_PIN_FAST,
    ZDM_PIN_WRITE,
    ZDM_PIN_FAST,
    ZDM_PIN_LONGTERM,
    ZDM_PIN_LONGTERM | ZDM_PIN_WRITE | ZDM_PIN_FAST,
];

fn with_flavour(flags: u32, counts: Counts) -> Counts {
    match flags & ZDM_PIN_GET {
        0 => pinned(counts, 1),
        _ => held(counts, 1),
    }
}

/// A held page stays the same page with all its data and does not migrate; it migrates after the
/// release.
fn pin_stays(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    for flags in FLAVOURS {
        let buf = Buffer::filled(ALL, 650)?;
        target.move_all(&buf, 650)?;
        let pfns = frames(&target, &buf, 0, ALL)?;
        let id = target
            .pin(&buf, FIRST, HELD, flags)
            .or_fail(&format!("ZDM_PIN with {flags:#x}"))?;
        let counts = with_flavour(flags, MAPPED);
        let when = format!("held with {flags:#x}");
        expect(&target, &buf, FIRST, HELD, counts, &when)?;
        for _ in 0..2 {
            target
                .to_system(&buf, 0, ALL)
                .or_fail("MIGRATE_TO_SYS of pages of which some are in use")?;
            target.expect(&buf, 0, ALL, HELD)?;
            check_eq!(
                &frames(&target, &buf, FIRST, HELD)?[..],
                &pfns[FIRST..FIRST + HELD],
                "frames of pages {when}"
            );
            expect(&target, &buf, FIRST, HELD, counts, &when)?;
            buf.check(0, ALL, 650)?;
        }
        buf.fill(FIRST, HELD, 651);
        expect(&target, &buf, FIRST, HELD, counts, "after a write")?;
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        expect(&target, &buf, FIRST, HELD, MAPPED, "let go")?;
        target.bring_back(&buf, 0, ALL)?;
        buf.check(0, FIRST, 650)?;
        buf.check(FIRST, HELD, 651)?;
        expect_free(&target, &pfns, "after all of it")?;
        target.expect_empty()?;
    }
    Ok(())
}

/// A held page of a large folio stays, whatever happens to the other pages.
fn pin_stays_huge(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    for flags in [ZDM_PIN_WRITE, ZDM_PIN_LONGTERM, ZDM_PIN_GET] {
        let buf = huge_filled(1, 652)?;
        target.move_huge(&buf, 652)?;
        let pfns = frames(&target, &buf, 0, N)?;
        let id = target.pin(&buf, 200, 3, flags).or_fail("ZDM_PIN")?;
        for (first, n) in [(0, N), (196, 12)] {
            target
                .to_system(&buf, first, n)
                .or_fail("MIGRATE_TO_SYS of pages of which some are in use")?;
            check_eq!(
                &frames(&target, &buf, 200, 3)?[..],
                &pfns[200..203],
                "frames of held pages"
            );
            target.expect(&buf, 200, 3, 3)?;
            buf.check(0, N, 652)?;
        }
        buf.fill(200, 3, 653);
        target.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
        target.bring_back(&buf, 0, N)?;
        buf.check(0, 200, 652)?;
        buf.check(200, 3, 653)?;
        buf.check(203, N - 203, 652)?;
        target.expect_empty()?;
        expect_free(&target, &pfns, "after all of it")?;
    }
    Ok(())
}

/// munmap drops only the mapping's reference: the page is freed when the holder releases it.
fn pin_munmap(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    for flags in FLAVOURS {
        let buf = Buffer::filled(ALL, 654)?;
        target.move_all(&buf, 654)?;
        let before = target.stats()?;
        let pfns = frames(&target, &buf, 0, ALL)?;
        let id = target.pin(&buf, FIRST, HELD, flags).or_fail("ZDM_PIN")?;
        buf.unmap(0, ALL)?;
        let (rest, kept) = (ALL - HELD, &pfns[FIRST..FIRST + HELD]);
        freed_since(&target, &before, rest)?;
        expect_free(&target, &pfns[..FIRST], "that were not held")?;
        expect_free(&target, &pfns[FIRST + HELD..], "that were not held")?;
        let alone = with_flavour(flags, [0, 0, 0]);
        expect_frames(&target, kept, alone, "unmapped, but held")?;
        // Another buffer does not get the held pages.
        let other = Buffer::filled(2 * ALL, 655)?;
        target.move_all(&other, 655)?;
        let taken = frames(&target, &other, 0, 2 * ALL)?;
        check_eq!(
            taken.iter().any(|pfn| kept.contains(pfn)),
            false,
            "whether a held page is handed out again"
        );
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        freed_since(&target, &before, ALL)?;
        expect_free(&target, kept, "let go")?;
        drop(other);
        target.expect_empty()?;
    }
    Ok(())
}

/// A large folio with one held page is freed as a whole when the page is released.
fn pin_munmap_huge(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    if !target.moves_large() {
        return Err(Fail::Skip("this kernel moves small pages only".into()));
    }
    for flags in [ZDM_PIN_LONGTERM, ZDM_PIN_GET | ZDM_PIN_FAST] {
        let buf = huge_filled(1, 656)?;
        target.move_huge(&buf, 656)?;
        let before = target.stats()?;
        let pfns = frames(&target, &buf, 0, N)?;
        let id = target.pin(&buf, 77, 2, flags).or_fail("ZDM_PIN")?;
        buf.unmap(0, N)?;
        let alone = match flags & ZDM_PIN_GET {
            0 => pinned_large([0, 0, 0], 2),
            _ => held([0, 0, 0], 2),
        };
        expect_frames(&target, &pfns[..1], alone, "unmapped, but held")?;
        expect_frames(&target, &pfns[N - 1..], alone, "unmapped, but held")?;
        check_eq!(target.stats()?.freed, before.freed, "stats.freed");
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        freed_since(&target, &before, N)?;
        expect_free(&target, &pfns, "let go")?;
        target.expect_empty()?;
    }
    Ok(())
}

/// The pin belongs to the page, not to the address.
fn pin_mremap(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 657)?;
    target.move_all(&buf, 657)?;
    let pfns = frames(&target, &buf, 0, ALL)?;
    let id = target
        .pin(&buf, FIRST, HELD, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE)
        .or_fail("ZDM_PIN")?;
    let place = buf.move_to_another_place()?;
    check_eq!(frames(&target, &place, 0, ALL)?, pfns, "frames");
    let counts = pinned(MAPPED, 1);
    expect(&target, &place, FIRST, HELD, counts, "after mremap")?;
    place.protect(0, ALL, libc::PROT_READ)?;
    expect(&target, &place, FIRST, HELD, counts, "after mprotect")?;
    place.check(0, ALL, 657)?;
    target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    expect(&target, &place, 0, ALL, MAPPED, "let go")?;
    target.bring_back(&place, 0, ALL)?;
    target.expect_empty()
}

/// fork gives the child copies of pinned pages, so that the parent and the holder keep the same
/// page.
fn forked(target: &Target, buf: &Buffer, at: usize, counts: Counts, seed: u64) -> Outcome {
    let all = buf.pages();
    let pfns = frames(target, buf, 0, all)?;
    let id = target.pin(buf, at, 1, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
    let child = Waiting::start(|| buf.check(0, all, seed), || buf.check(0, all, seed))?;
    buf.fill(at, 1, seed + 1);
    check_eq!(
        &frames(target, buf, at, 1)?[..],
        &pfns[at..=at],
        "frame of the pinned page after fork and a write"
    );
    child.join()?;
    target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    buf.check(at, 1, seed + 1)?;
    expect(target, buf, at, 1, counts, "let go, the child gone")?;
    target.bring_back(buf, 0, all)?;
    buf.check(0, at, seed)?;
    buf.check(at + 1, all - at - 1, seed)?;
    target.expect_empty()
}

fn pin_fork(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 658)?;
    target.move_all(&buf, 658)?;
    forked(&target, &buf, FIRST, MAPPED, 658)
}

/// The fork splits the huge entry; the folio stays whole.
fn pin_fork_huge(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    if !target.moves_large() {
        return Err(Fail::Skip("this kernel moves small pages only".into()));
    }
    let buf = huge_filled(1, 660)?;
    target.move_huge(&buf, 660)?;
    let entries = N as i32;
    forked(&target, &buf, 99, [entries, entries, 0], 660)
}

/// A process ends with pins: pins of its own file end with it, pins of a file that stays open
/// remain.
fn pin_exit(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let flags = ZDM_PIN_LONGTERM | ZDM_PIN_WRITE;
    for killed in [false, true] {
        // The file belongs to the child.
        let before = target.stats()?;
        let child = Child::spawn(|| {
            let own = Target::open(ctx, GENERIC)?;
            let buf = Buffer::filled(ALL, 662)?;
            own.move_all(&buf, 662)?;
            own.pin(&buf, FIRST, HELD, flags).or_fail("ZDM_PIN")?;
            if killed {
                sys::kill(sys::pid(), libc::SIGKILL).or_fail("kill")?;
            }
            sys::exit_now(0)
        })?;
        let end = if killed {
            Exit::Signal(libc::SIGKILL)
        } else {
            Exit::Code(0)
        };
        check_eq!(child.exit()?, end, "end of the process with pins");
        freed_since(&target, &before, ALL)?;
        target.expect_empty()?;

        // The file belongs to the parent, and parent and child share the pages: the parent inspects
        // the counts.
        let buf = Buffer::filled(ALL, 663)?;
        target.move_all(&buf, 663)?;
        let pfns = frames(&target, &buf, 0, ALL)?;
        let child = Child::spawn(|| {
            target
                .pin(&buf, FIRST, HELD, ZDM_PIN_GET)
                .or_fail("ZDM_PIN by a child")?;
            if killed {
                sys::kill(sys::pid(), libc::SIGKILL).or_fail("kill")?;
            }
            sys::exit_now(0)
        })?;
        check_eq!(child.exit()?, end, "end of the child");
        expect(&target, &buf, FIRST, HELD, held(MAPPED, 1), "held")?;
        let before = target.stats()?;
        buf.unmap(0, ALL)?;
        freed_since(&target, &before, ALL - HELD)?;
        let kept = &pfns[FIRST..FIRST + HELD];
        expect_frames(&target, kept, held([0, 0, 0], 1), "held by a file")?;
        // Ids are numbered per file, and the child has not passed its id on: try all.
        let ids = (0..=ZDM_PIN_MAX as u32).filter(|id| target.unpin(*id, 0).is_ok());
        check_eq!(ids.count(), 1, "pins that the file still has");
        expect_free(&target, kept, "let go")?;
        target.expect_empty()?;
    }
    Ok(())
}

/// The file of CONFIG_GUP_TEST.
const GUP_TEST: &str = "/sys/kernel/debug/gup_test";

/// Long-term pins of the kernel itself, by both ways of getting them.
fn pin_gup_test(ctx: &Ctx) -> Outcome {
    let path = Path::new(GUP_TEST);
    let target = Target::open(ctx, GENERIC)?;
    if !path.exists() {
        return Err(Fail::Skip("no CONFIG_GUP_TEST".into()));
    }
    for (fast, write) in [(false, false), (false, true), (true, false), (true, true)] {
        let buf = Buffer::filled(ALL, 664)?;
        target.move_all(&buf, 664)?;
        let before = target.stats()?;
        let pfns = frames(&target, &buf, 0, ALL)?;
        let kept = &pfns[FIRST..FIRST + HELD];
        let mut pin = LongTermPin::open(path).or_fail("gup_test")?;
        pin.start(&buf, FIRST, HELD, fast, write)
            .or_fail("PIN_LONGTERM_TEST_START")?;
        expect(&target, &buf, FIRST, HELD, pinned(MAPPED, 1), "pinned")?;
        check_eq!(
            &frames(&target, &buf, FIRST, HELD)?[..],
            kept,
            "frames of pinned pages"
        );
        // This device pins at the same time.
        let id = target
            .pin(&buf, FIRST, HELD, ZDM_PIN_LONGTERM)
            .or_fail("ZDM_PIN")?;
        expect(
            &target,
            &buf,
            FIRST,
            HELD,
            pinned(MAPPED, 2),
            "pinned twice",
        )?;
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        buf.unmap(0, ALL)?;
        expect_frames(&target, kept, pinned([0, 0, 0], 1), "unmapped, but pinned")?;
        let data = pin.read().or_fail("PIN_LONGTERM_TEST_READ")?;
        check_bytes(&data, 664, FIRST, "data by the pin after munmap")?;
        pin.stop().or_fail("PIN_LONGTERM_TEST_STOP")?;
        freed_since(&target, &before, ALL)?;
        expect_free(&target, kept, "let go")?;
        target.expect_empty()?;
    }
    Ok(())
}

/// A pin for writing of a shared page first gets a copy for the process; a plain reference is taken
/// on the shared page.
fn pin_shared(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 665)?;
    target.move_all(&buf, 665)?;
    let pfns = frames(&target, &buf, 0, ALL)?;
    let child = Waiting::start(|| Ok(()), || buf.check(0, ALL, 665))?;
    let get = target.pin(&buf, 0, 2, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
    expect(&target, &buf, 0, 2, [3, 2, 0], "shared and held")?;
    let pin = target.pin(&buf, 4, 2, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
    let own = frames(&target, &buf, 4, 2)?;
    check_eq!(
        own.iter().any(|pfn| pfns.contains(pfn)),
        false,
        "whether a shared page is pinned for writing"
    );
    expect_frames(&target, &pfns[4..6], MAPPED, "left to the child")?;
    expect(&target, &buf, 6, 2, [2, 2, 0], "shared")?;
    buf.fill(4, 2, 666);
    check_eq!(frames(&target, &buf, 4, 2)?, own, "frames of pinned pages");
    child.join()?;
    for id in [get, pin] {
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    }
    buf.check(0, 4, 665)?;
    buf.check(4, 2, 666)?;
    buf.check(6, ALL - 6, 665)?;
    target.bring_back(&buf, 0, ALL)?;
    target.expect_empty()?;
    expect_free(&target, &pfns, "after all of it")
}

/// The device and the CPU write to a held page: both see one page.
fn pin_device_write(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 667)?;
    target.move_all(&buf, 667)?;
    let pfns = frames(&target, &buf, 0, ALL)?;
    let id = target
        .pin(&buf, FIRST, HELD, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE)
        .or_fail("ZDM_PIN")?;
    for device in [&target, &Target::open(ctx, GENERIC + 1)?] {
        device
            .write(&buf, FIRST, &pattern_bytes(668, FIRST, HELD))
            .or_fail("WRITE")?;
        buf.check(FIRST, HELD, 668)?;
        buf.fill(FIRST, HELD, 667);
        let read = device.read(&buf, 0, ALL).or_fail("READ")?;
        check_bytes(&read.data, 667, 0, "READ of held pages")?;
        check_eq!(frames(&target, &buf, 0, ALL)?, pfns, "frames");
    }
    expect(&target, &buf, FIRST, HELD, pinned(MAPPED, 1), "pinned")?;
    target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    target.bring_back(&buf, 0, ALL)?;
    buf.check(0, ALL, 667)
}

/// The device gives up its memory except the held pages. It also gives those up after their release.
fn pin_release(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(ALL, 669)?;
    target.move_all(&buf, 669)?;
    let pfns = frames(&target, &buf, FIRST, 2)?;
    let id = target
        .pin(&buf, FIRST, 2, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE)
        .or_fail("ZDM_PIN")?;
    let result = target.release();
    expect_errno(result, &[libc::EBUSY], "RELEASE with pinned pages")?;
    target.expect(&buf, 0, ALL, 2)?;
    check_eq!(frames(&target, &buf, FIRST, 2)?, pfns, "frames");
    buf.check(0, ALL, 669)?;
    target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    // Audit only after the RELEASE: a scan also reports a reference that no entry explains.
    let (audit, records) = target.audit()?;
    check_eq!((audit.used, audit.found), (2, 0), "used pages, violations");
    // Any task may pin what it maps, so that a pin explains why a page stays.
    check!(
        records.is_empty(),
        "records of pages that are pinned: expected none, found {records:x?}"
    );
    target.release().or_fail("RELEASE")?;
    target.expect(&buf, 0, ALL, 0)?;
    buf.check(0, ALL, 669)?;
    target.expect_empty()
}

/// The file is closed while the pin of another file holds a page. The page stays with its data, and
/// so does the module while the page is in use.
fn pin_unload(ctx: &Ctx) -> Outcome {
    ctx.module.load("")?;
    let outcome = pinned_by_others(ctx);
    if outcome.is_err() {
        // The next test needs the module unloaded. This test's own failure has been reported.
        let _ = ctx.module.unload();
    }
    outcome
}

fn pinned_by_others(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let path = Path::new(GUP_TEST);
    if !path.exists() {
        return Err(Fail::Skip("no CONFIG_GUP_TEST".into()));
    }
    let buf = Buffer::filled(ALL, 670)?;
    target.move_all(&buf, 670)?;
    let pfns = frames(&target, &buf, FIRST, 2)?;
    let mut pin = LongTermPin::open(path).or_fail("gup_test")?;
    pin.start(&buf, FIRST, 2, true, true)
        .or_fail("PIN_LONGTERM_TEST_START")?;
    drop(target);
    let here = proc::frames(&buf, FIRST, 2)?;
    check_eq!(here, pfns, "frames of pinned pages after the close");
    let in_use = |when: &str| match ctx.module.try_unload() {
        Err(e) if busy(&e) => Ok(()),
        other => Err(Fail::failed(format!(
            "unloading {when}: expected EAGAIN or EBUSY, found {other:?}"
        ))),
    };
    in_use("with pinned pages")?;
    buf.check(0, ALL, 670)?;
    buf.fill(FIRST, 2, 671);
    let data = pin.read().or_fail("PIN_LONGTERM_TEST_READ")?;
    check_bytes(&data, 671, FIRST, "data by the pin")?;
    pin.stop().or_fail("PIN_LONGTERM_TEST_STOP")?;
    // After their release the pages still belong to the process, on a device without an open file.
    in_use("with mapped pages")?;
    buf.check(FIRST, 2, 671)?;
    drop(buf);
    ctx.module.unload()
}
