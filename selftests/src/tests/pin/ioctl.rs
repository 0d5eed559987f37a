// SPDX-License-Identifier: GPL-2.0

//! ZDM_PIN and ZDM_UNPIN, and their effect on pages of every kind. `generic/pins.rs` tests that
//! GENERIC pages stay where they are.

use crate::check::{OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE};
use crate::harness::Child;
use crate::tests::counts::{Counts, MAPPED, Waiting, frames, held, pinned};
use crate::tests::target::{COHERENT, GENERIC, PRIVATE, Target};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{proc, sys};

pub const TESTS: &[Test] = &[
    test("pin.flavours", flavours),
    test("pin.flavours_migrated", migrated::<PRIVATE>),
    test("pin.bad", bad),
    test("pin.hole", hole),
    test("pin.read_only", read_only),
    test("pin.limits", limits),
    test("pin.close", close),
    test("pin.kill", kill),
    test("pin.cow", cow),
    test("pin.cow_read", cow_read),
    test("pin_coherent.flavours", migrated::<COHERENT>),
    test("pin_generic.flavours", migrated::<GENERIC>),
];

const ALL: usize = 12;
const FIRST: usize = 5;
const HELD: usize = 4;

/// Every valid set of flags.
fn all_flags() -> impl Iterator<Item = u32> {
    let both = ZDM_PIN_GET | ZDM_PIN_LONGTERM;
    (0..16).filter(move |flags| flags & both != both)
}

/// The counts of a small page with a single holder.
fn with_flags(flags: u32) -> Counts {
    match flags & ZDM_PIN_GET {
        0 => pinned(MAPPED, 1),
        _ => held(MAPPED, 1),
    }
}

/// Checks the counts of pages, in system memory, too: pinning a page may put it into an activation
/// batch, which holds a reference as well.
#[track_caller]
fn expect(
    device: &Device,
    buf: &Buffer,
    first: usize,
    n: usize,
    counts: Counts,
    when: &str,
) -> Outcome {
    proc::drain_batches()?;
    crate::tests::counts::expect(device, buf, first, n, counts, when)
}

/// The counts of system memory before a pin, during it, and after it.
fn flavours(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(ALL, 680)?;
    let pfns = frames(&device, &buf, 0, ALL)?;
    for flags in all_flags() {
        let when = format!("with {flags:#x}");
        expect(&device, &buf, 0, ALL, MAPPED, "before")?;
        let id = device
            .pin(&buf, FIRST, HELD, flags)
            .or_fail(&format!("ZDM_PIN {when}"))?;
        expect(&device, &buf, FIRST, HELD, with_flags(flags), &when)?;
        expect(&device, &buf, 0, FIRST, MAPPED, "before what is held")?;
        let end = FIRST + HELD;
        expect(&device, &buf, end, ALL - end, MAPPED, "behind what is held")?;
        // A second pin adds the same again, and each is released separately.
        let more = device.pin(&buf, FIRST, HELD, flags).or_fail("ZDM_PIN")?;
        device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        expect(&device, &buf, FIRST, HELD, with_flags(flags), &when)?;
        let dirty = match flags & ZDM_PIN_WRITE {
            0 => 0,
            _ => ZDM_UNPIN_DIRTY,
        };
        device.unpin(more, dirty).or_fail("ZDM_UNPIN")?;
        check_eq!(&frames(&device, &buf, 0, ALL)?, &pfns, "frames");
    }
    expect(&device, &buf, 0, ALL, MAPPED, "after")?;
    buf.check(0, ALL, 680)
}

/// Pages on a device: PRIVATE pages move to system memory for any pin, COHERENT ones for a
/// long-term pin, GENERIC ones for none.
fn migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for flags in all_flags() {
        let when = format!("with {flags:#x}");
        let buf = Buffer::filled(ALL, 681)?;
        target.move_all(&buf, 681)?;
        let id = target
            .pin(&buf, FIRST, HELD, flags)
            .or_fail(&format!("ZDM_PIN {when}"))?;
        let long = flags & ZDM_PIN_LONGTERM != 0;
        let stay = target.cpu_maps() && (target.keeps_pinned() || !long);
        target.expect(&buf, FIRST, HELD, if stay { HELD } else { 0 })?;
        target.expect(&buf, 0, ALL, if stay { ALL } else { ALL - HELD })?;
        expect(&target, &buf, FIRST, HELD, with_flags(flags), &when)?;
        let pfns = frames(&target, &buf, FIRST, HELD)?;
        // The held page migrates in neither direction.
        if stay {
            target.to_system(&buf, 0, ALL).or_fail("MIGRATE_TO_SYS")?;
        } else {
            let result = target.to_device(&buf, 0, ALL);
            expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV")?;
        }
        let now = frames(&target, &buf, FIRST, HELD)?;
        check_eq!(now, pfns, "frames of pages that are held");
        buf.check(0, ALL, 681)?;
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        target.bring_back(&buf, 0, ALL)?;
        target.move_all(&buf, 681)?;
        buf.check(0, ALL, 681)?;
        target.bring_back(&buf, 0, ALL)?;
        target.expect_empty()?;
    }
    Ok(())
}

fn bad(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(ALL, 682)?;
    let refused = |addr: u64, npages: u64, flags: u32, errno: i32| -> Outcome {
        let what = format!("ZDM_PIN of {npages:#x} pages at {addr:#x} with {flags:#x}");
        expect_errno(device.pin_at(addr, npages, flags), &[errno], &what)
    };
    for flags in [
        ZDM_PIN_GET | ZDM_PIN_LONGTERM,
        ZDM_PIN_GET | ZDM_PIN_LONGTERM | ZDM_PIN_FAST | ZDM_PIN_WRITE,
        0x10,
        1 << 31,
        u32::MAX,
    ] {
        refused(buf.at(0), 1, flags, libc::EINVAL)?;
    }
    for (addr, npages) in [
        (buf.at(0) + 8, 1),
        (buf.at(0), 0),
        (buf.at(0), 1 << 52),
        (buf.at(0), u64::MAX),
        (1 << 56, 1),
        (0xffff_8000_0000_0000, 1),
        (u64::MAX - 4095, 1),
    ] {
        refused(addr, npages, ZDM_PIN_WRITE, libc::EINVAL)?;
    }
    let result = device.ioctl_nowhere(ZDM_PIN);
    expect_errno(result, &[libc::EFAULT], "ZDM_PIN with a bad argument")?;
    let result = device.ioctl_nowhere(ZDM_UNPIN);
    expect_errno(result, &[libc::EFAULT], "ZDM_UNPIN with a bad argument")?;

    let gone = |id: u32, what: &str| {
        let result = device.unpin(id, 0);
        expect_errno(result, &[libc::ENOENT], &format!("ZDM_UNPIN {what}"))
    };
    for id in [0, 1, 63, 64, u32::MAX] {
        gone(id, "of what was never held")?;
    }
    let id = device.pin(&buf, 0, 2, 0).or_fail("ZDM_PIN")?;
    for flags in [2, 1 << 31, u32::MAX] {
        let result = device.unpin(id, flags);
        expect_errno(result, &[libc::EINVAL], "ZDM_UNPIN with unknown flags")?;
    }
    expect(&device, &buf, 0, 2, pinned(MAPPED, 1), "held")?;
    // A file cannot release the pins of another file.
    let other = Device::open(0)?;
    let theirs = other.pin(&buf, 4, 2, 0).or_fail("ZDM_PIN")?;
    device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    gone(id, "twice")?;
    gone(theirs, "of what another file holds")?;
    expect(&device, &buf, 4, 2, pinned(MAPPED, 1), "held by another")?;
    other.unpin(theirs, 0).or_fail("ZDM_UNPIN")?;
    expect(&device, &buf, 0, ALL, MAPPED, "after all")?;
    buf.check(0, ALL, 682)
}

/// ZDM_PIN holds all of the pages or none.
fn hole(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(ALL, 683)?;
    buf.unmap(6, 1)?;
    buf.protect(9, 1, libc::PROT_NONE)?;
    for flags in all_flags() {
        for (first, n) in [(6, 1), (9, 1), (0, ALL), (5, 2), (7, 3), (6, 2)] {
            let what = format!("ZDM_PIN of {n} pages from {first} with {flags:#x}");
            let result = device.pin(&buf, first, n, flags);
            expect_errno(result, &[libc::EFAULT], &what)?;
            expect(&device, &buf, 0, 6, MAPPED, "before a hole")?;
            expect(&device, &buf, 7, 2, MAPPED, "between holes")?;
            expect(&device, &buf, 10, 2, MAPPED, "behind holes")?;
        }
    }
    buf.check(0, 6, 683)?;
    buf.check(10, 2, 683)
}

/// A page that may not be written cannot be pinned for writing.
fn read_only(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(ALL, 684)?;
    buf.protect(4, 4, libc::PROT_READ)?;
    for flags in all_flags() {
        let result = device.pin(&buf, 2, 4, flags);
        if flags & ZDM_PIN_WRITE != 0 {
            expect_errno(result, &[libc::EFAULT], "ZDM_PIN for writing")?;
        } else {
            let id = result.or_fail("ZDM_PIN")?;
            expect(&device, &buf, 2, 4, with_flags(flags), "held")?;
            device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        }
        expect(&device, &buf, 0, ALL, MAPPED, "after")?;
    }
    Ok(())
}

/// The numbers of pins and pages are limited per file.
fn limits(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let other = Device::open(0)?;
    let buf = Buffer::filled(1, 685)?;
    let full = |what: &str| {
        let result = device.pin(&buf, 0, 1, ZDM_PIN_GET);
        expect_errno(result, &[libc::ENOSPC], what)
    };
    let mut ids = Vec::new();
    for _ in 0..ZDM_PIN_MAX {
        ids.push(device.pin(&buf, 0, 1, ZDM_PIN_GET).or_fail("ZDM_PIN")?);
    }
    let sorted: std::collections::BTreeSet<u32> = ids.iter().copied().collect();
    check_eq!(sorted.len(), ZDM_PIN_MAX, "different ids");
    full("one pin too many")?;
    let id = other.pin(&buf, 0, 1, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
    other.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    let all = held(MAPPED, ZDM_PIN_MAX as i32);
    expect(&device, &buf, 0, 1, all, "held by many pins")?;
    device.unpin(ids[20], 0).or_fail("ZDM_UNPIN")?;
    ids[20] = device.pin(&buf, 0, 1, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
    full("one pin too many again")?;
    for id in ids {
        device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    }
    expect(&device, &buf, 0, 1, MAPPED, "let go")?;

    // The page of zeroes needs no memory.
    let zeroes = Buffer::anon_huge_aligned(ZDM_PIN_MAX_PAGES + HUGE_PAGES)?;
    zeroes.advise(0, zeroes.pages(), libc::MADV_HUGEPAGE)?;
    let result = device.pin(&zeroes, 0, ZDM_PIN_MAX_PAGES + 1, ZDM_PIN_GET);
    expect_errno(result, &[libc::ENOSPC], "one page too many")?;
    let most = device
        .pin(&zeroes, 0, ZDM_PIN_MAX_PAGES - 1, ZDM_PIN_GET)
        .or_fail("ZDM_PIN of all pages but one")?;
    let result = device.pin(&zeroes, 0, 2, ZDM_PIN_GET);
    expect_errno(result, &[libc::ENOSPC], "one page too many in two pins")?;
    let last = device.pin(&buf, 0, 1, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
    full("one page too many")?;
    for id in [most, last] {
        device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    }
    expect(&device, &buf, 0, 1, MAPPED, "let go")?;
    buf.check(0, 1, 685)
}

/// The last close releases all pins.
fn close(_: &Ctx) -> Outcome {
    let observer = Device::open(0)?;
    let buf = Buffer::filled(ALL, 686)?;
    let device = Device::open(0)?;
    for flags in [ZDM_PIN_GET, 0, ZDM_PIN_WRITE, ZDM_PIN_LONGTERM] {
        device.pin(&buf, FIRST, HELD, flags).or_fail("ZDM_PIN")?;
    }
    let all = held(pinned(MAPPED, 3), 1);
    expect(&observer, &buf, FIRST, HELD, all, "held four times")?;
    // A child that inherits the descriptor has the same file.
    let child = Waiting::start(|| Ok(()), || Ok(()))?;
    drop(device);
    let now = observer.inspect_one(&buf, FIRST)?;
    check_eq!(now.pins, all[2], "pins while a child has the file");
    child.join()?;
    // The child's mapping of the page is gone as well.
    expect(&observer, &buf, 0, ALL, MAPPED, "after the last close")?;
    buf.check(0, ALL, 686)
}

/// A process is killed that holds pages of a file which another process maps.
fn kill(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let file = sys::memfd("zdm-pin").or_fail("memfd_create")?;
    file.set_len((ALL * PAGE) as u64).or_fail("ftruncate")?;
    let buf = Buffer::shared(&file, ALL)?;
    buf.fill(0, ALL, 687);
    let look = || -> Outcome<Vec<PageInfo>> {
        proc::drain_batches()?;
        device.inspect(&buf, 0, ALL).or_fail("ZDM_INSPECT")
    };
    let before = look()?;
    for flags in [ZDM_PIN_GET, ZDM_PIN_WRITE, ZDM_PIN_WRITE | ZDM_PIN_LONGTERM] {
        let child = Waiting::start(
            || {
                // The file is not closed before the end of the process.
                let own = std::mem::ManuallyDrop::new(Device::open(0)?);
                own.pin(&buf, FIRST, HELD, flags).or_fail("ZDM_PIN")?;
                Ok(())
            },
            || Ok(()),
        )?;
        let extra = if flags & ZDM_PIN_GET != 0 {
            1
        } else {
            PIN_BIAS
        };
        let during = look()?;
        for (page, was) in (0..ALL).zip(&before) {
            let is = during[page];
            // The child maps the pages that it has touched.
            let maps = is.mapcount - was.mapcount;
            let inside = (FIRST..FIRST + HELD).contains(&page);
            let expected = was.refs + maps + if inside { extra } else { 0 };
            check_eq!(is.refs, expected, "references of page {page}, held");
        }
        child.kill()?;
        check_eq!(look()?, before, "pages after the holder was killed");
    }
    buf.check(0, ALL, 687)
}

/// A pin for writing first breaks copy-on-write: the held page is the process's own, and stays so.
fn cow(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    for flags in [0, ZDM_PIN_GET, ZDM_PIN_LONGTERM, ZDM_PIN_FAST] {
        let flags = flags | ZDM_PIN_WRITE;
        let buf = Buffer::filled(ALL, 688)?;
        let child = Waiting::start(|| Ok(()), || buf.check(0, ALL, 688))?;
        let shared = frames(&device, &buf, 0, ALL)?;
        expect(&device, &buf, 0, ALL, [2, 2, 0], "shared")?;
        let id = device.pin(&buf, FIRST, HELD, flags).or_fail("ZDM_PIN")?;
        let own = frames(&device, &buf, FIRST, HELD)?;
        for (i, pfn) in own.iter().enumerate() {
            check_eq!(
                shared.contains(pfn),
                false,
                "whether page {} is still shared",
                FIRST + i
            );
        }
        let when = format!("held with {flags:#x}");
        expect(&device, &buf, FIRST, HELD, with_flags(flags), &when)?;
        expect(&device, &buf, 0, FIRST, [2, 2, 0], "shared")?;
        buf.fill(FIRST, HELD, 689);
        check_eq!(frames(&device, &buf, FIRST, HELD)?, own, "frames");
        child.join()?;
        device.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
        buf.check(0, FIRST, 688)?;
        buf.check(FIRST, HELD, 689)?;
    }
    Ok(())
}

/// A pin for reading also holds the process's own page. A plain reference holds the shared page,
/// and the process's next write makes a copy.
fn cow_read(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(ALL, 690)?;
    let child = Waiting::start(|| Ok(()), || buf.check(0, ALL, 690))?;
    let shared = frames(&device, &buf, 0, ALL)?;
    let pin = device.pin(&buf, 0, 2, 0).or_fail("ZDM_PIN")?;
    let get = device.pin(&buf, 4, 2, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
    let own = frames(&device, &buf, 0, 2)?;
    check_eq!(
        own.iter().any(|pfn| shared.contains(pfn)),
        false,
        "whether a pinned page is still shared"
    );
    expect(&device, &buf, 0, 2, pinned(MAPPED, 1), "pinned")?;
    check_eq!(
        &frames(&device, &buf, 4, 2)?[..],
        &shared[4..6],
        "frames of pages that are only got"
    );
    expect(&device, &buf, 4, 2, [3, 2, 0], "shared and got")?;
    buf.fill(0, 6, 691);
    check_eq!(frames(&device, &buf, 0, 2)?, own, "frames of pinned pages");
    let moved = frames(&device, &buf, 4, 2)?;
    check_eq!(
        moved.iter().any(|pfn| shared.contains(pfn)),
        false,
        "whether a write went to a page that is shared"
    );
    child.join()?;
    for id in [pin, get] {
        device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    }
    Child::spawn(|| buf.check(0, 6, 691))?.join()?;
    buf.check(6, ALL - 6, 690)
}
