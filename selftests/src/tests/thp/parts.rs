// SPDX-License-Identifier: GPL-2.0

//! A part of a transparent huge page migrates, changes or is unmapped.

use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::tests::target::{COHERENT, GENERIC, PRIVATE, Target, expect_huge, huge_filled};
use crate::tests::{Ctx, Test, expect_present, test};
use crate::{check, check_eq};

const N: usize = HUGE_PAGES;

pub const TESTS: &[Test] = &[
    test("thp.unmap_part", unmap::<PRIVATE>),
    test("thp.dontneed_part", dontneed::<PRIVATE>),
    test("thp.protect_part", protect::<PRIVATE>),
    test("thp.mremap_part", mremap::<PRIVATE>),
    test("thp.device_part", device_part::<PRIVATE>),
    test("thp.other_device", other_device::<PRIVATE>),
    test("thp.part_to_device", to_device::<PRIVATE>),
    test("thp.part_to_system", to_system::<PRIVATE>),
    test("thp.misaligned", misaligned::<PRIVATE>),
    test("thp.close_parts", close_parts::<PRIVATE>),
    test("thp_coherent.unmap_part", unmap::<COHERENT>),
    test("thp_coherent.dontneed_part", dontneed::<COHERENT>),
    test("thp_coherent.protect_part", protect::<COHERENT>),
    test("thp_coherent.mremap_part", mremap::<COHERENT>),
    test("thp_coherent.device_part", device_part::<COHERENT>),
    test("thp_coherent.other_device", other_device::<COHERENT>),
    test("thp_coherent.part_to_device", to_device::<COHERENT>),
    test("thp_coherent.part_to_system", to_system::<COHERENT>),
    test("thp_coherent.misaligned", misaligned::<COHERENT>),
    test("thp_coherent.close_parts", close_parts::<COHERENT>),
    test("thp_generic.unmap_part", unmap::<GENERIC>),
    test("thp_generic.dontneed_part", dontneed::<GENERIC>),
    test("thp_generic.protect_part", protect::<GENERIC>),
    test("thp_generic.mremap_part", mremap::<GENERIC>),
    test("thp_generic.device_part", device_part::<GENERIC>),
    test("thp_generic.other_device", other_device::<GENERIC>),
    test("thp_generic.part_to_device", to_device::<GENERIC>),
    test("thp_generic.part_to_system", to_system::<GENERIC>),
    test("thp_generic.misaligned", misaligned::<GENERIC>),
    test("thp_generic.close_parts", close_parts::<GENERIC>),
];

/// The beginning, the end, the middle, and single pages.
const PARTS: [(usize, usize); 5] = [
    (0, N / 2),
    (N / 2, N / 2),
    (N / 4, N / 2),
    (0, 1),
    (N - 1, 1),
];

/// The ranges of a huge page without a part.
fn rest((first, n): (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
    let end = first + n;
    [(0, first), (end, N - end)].into_iter().filter(|r| r.1 > 0)
}

/// Checks that the device reads the pattern of `seed`.
fn device_check(device: &Device, buf: &Buffer, first: usize, n: usize, seed: u64) -> Outcome {
    let read = device.read(buf, first, n).or_fail("READ")?;
    check_bytes(&read.data, seed, first, "READ")
}

/// Checks that a scan finds no violation while a huge page is in use.
fn expect_sound(device: &Device) -> Outcome {
    let (audit, records) = device.audit()?;
    check_eq!(audit.found, 0, "violations ({records:x?})");
    check!(audit.used > 0, "used pages: expected some, found none");
    Ok(())
}

/// Unmapped pages are freed, at the latest with the rest; the rest keeps its data.
fn unmap<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for part in PARTS {
        let buf = huge_filled(1, 230)?;
        target.move_huge(&buf, 230)?;
        let before = target.stats()?;
        buf.unmap(part.0, part.1)?;
        for (first, n) in rest(part) {
            target.expect(&buf, first, n, n)?;
            device_check(&target, &buf, first, n, 230)?;
        }
        let gone = target.read(&buf, part.0, 1);
        expect_errno(gone, &[libc::EFAULT], "READ of what is unmapped")?;
        check_eq!(target.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
        expect_sound(&target)?;
        for (first, n) in rest(part) {
            buf.check(first, n, 230)?;
            target.bring_back(&buf, first, n)?;
            buf.check(first, n, 230)?;
        }
        target.expect_empty()?;

        // The rest is still on the device in the end.
        let buf = huge_filled(1, 231)?;
        target.move_huge(&buf, 231)?;
        buf.unmap(part.0, part.1)?;
        drop(buf);
        target.expect_empty()?;
    }
    Ok(())
}

fn dontneed<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for (first, n) in PARTS {
        let buf = huge_filled(1, 232)?;
        target.move_huge(&buf, 232)?;
        buf.advise(first, n, libc::MADV_DONTNEED)?;
        target.expect(&buf, first, n, 0)?;
        target.expect(&buf, 0, N, N - n)?;
        let read = target.read(&buf, first, n).or_fail("READ")?;
        let nonzero = read.data.iter().position(|b| *b != 0);
        check_eq!(nonzero, None, "first byte that the device still reads");
        for (first, n) in rest((first, n)) {
            device_check(&target, &buf, first, n, 232)?;
        }
        expect_sound(&target)?;

        // The range gets new pages between the existing ones.
        buf.check_zero(first, n)?;
        buf.fill(first, n, 232);
        let moved = target.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
        check_bytes(&moved.data, 232, 0, "data of old and new pages")?;
        target.expect(&buf, 0, N, N)?;
        target.bring_back(&buf, 0, N)?;
        buf.check(0, N, 232)?;
        target.expect_empty()?;
    }
    Ok(())
}

fn protect<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
    let target = Target::open(ctx, NODE)?;
    let (first, n) = (N / 4, N / 2);
    let buf = huge_filled(1, 233)?;
    target.move_huge(&buf, 233)?;
    buf.protect(first, n, libc::PROT_READ)?;
    target.expect(&buf, 0, N, N)?;
    device_check(&target, &buf, 0, N, 233)?;

    // Neither the device nor the CPU may write to the part; both may write beside it.
    let data = pattern_bytes(234, first, 2);
    let result = target.write(&buf, first, &data);
    expect_errno(result, &[libc::EPERM], "WRITE to read-only pages")?;
    Child::expect_segv(
        || {
            buf.set(first + n - 1, 0, 1);
        },
        "write to a read-only page",
    )?;
    target
        .write(&buf, 0, &pattern_bytes(235, 0, first))
        .or_fail("WRITE beside read-only pages")?;
    buf.fill(first + n, N - first - n, 236);
    let expect = || -> Outcome {
        buf.check(0, first, 235)?;
        buf.check(first, n, 233)?;
        buf.check(first + n, N - first - n, 236)
    };
    expect()?;
    buf.protect(first, n, RW)?;
    expect()?;
    target.bring_back(&buf, 0, N)?;
    expect()?;
    buf.fill(0, N, 237);
    buf.check(0, N, 237)?;
    target.expect_empty()?;

    // Remove all access and restore it: the data stays on the device meanwhile.
    let buf = huge_filled(1, 238)?;
    target.move_huge(&buf, 238)?;
    buf.protect(first, n, libc::PROT_NONE)?;
    let result = target.read(&buf, first, 1);
    expect_errno(result, &[libc::EFAULT], "READ without access")?;
    buf.protect(first, n, RW)?;
    target.expect(&buf, 0, N, N)?;
    device_check(&target, &buf, 0, N, 238)?;
    buf.check(0, N, 238)
}

fn mremap<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let (first, n) = (N / 4, N / 2);
    let buf = huge_filled(1, 240)?;
    target.move_huge(&buf, 240)?;
    let before = target.stats()?;
    let place = Buffer::anon_huge_aligned(N)?;
    buf.move_pages(first, n, &place, 7)?;
    check_eq!(target.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
    target.expect(&place, 7, n, n)?;
    let read = target.read(&place, 7, n).or_fail("READ")?;
    check_bytes(&read.data, 240, first, "READ of what has moved")?;
    for (first, n) in rest((first, n)) {
        target.expect(&buf, first, n, n)?;
        device_check(&target, &buf, first, n, 240)?;
    }
    expect_sound(&target)?;
    // Writes to one place must not appear at the other one, although both share a folio.
    target
        .write(&place, 7, &pattern_bytes(241, 7, 3))
        .or_fail("WRITE")?;
    place.check(7, 3, 241)?;
    place.check_from(10, n - 3, 240, first + 3)?;
    for (first, n) in rest((first, n)) {
        buf.check(first, n, 240)?;
        target.bring_back(&buf, first, n)?;
        buf.check(first, n, 240)?;
    }
    target.bring_back(&place, 7, n)?;
    place.check(7, 3, 241)?;
    place.check_from(10, n - 3, 240, first + 3)?;
    target.expect_empty()
}

/// The device reads and writes parts of its own huge page, which stays whole.
fn device_part<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(1, 242)?;
    target.move_huge(&buf, 242)?;
    let before = target.stats()?;
    // Use a file that has not mapped anything yet, too.
    for device in [&*target, &Device::open(NODE)?] {
        // Use ends, and batches of 32 on and off their boundaries.
        for (first, n) in [(0, 1), (N - 1, 1), (100, 40), (31, 2), (64, 32), (0, N)] {
            device_check(device, &buf, first, n, 242)?;
        }
        let data = pattern_bytes(243, 200, 50);
        device.write(&buf, 200, &data).or_fail("WRITE")?;
        device_check(device, &buf, 200, 50, 243)?;
        let data = pattern_bytes(242, 200, 50);
        device.write(&buf, 200, &data).or_fail("WRITE")?;
    }
    check_eq!(target.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
    target.expect(&buf, 0, N, N)?;
    if target.moves_large() {
        expect_huge(&buf, 0, N, N)?;
    }
    buf.check(0, N, 242)?;
    target.bring_back(&buf, 0, N)?;
    buf.check(0, N, 242)
}

/// Another device reads a part: a CPU fault brings PRIVATE memory back, COHERENT and GENERIC memory
/// is read in place.
fn other_device<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let other = Target::open(ctx, NODE + 1)?;
    let buf = huge_filled(1, 244)?;
    target.move_huge(&buf, 244)?;
    device_check(&other, &buf, 100, 40, 244)?;
    let left = target.on_device(&buf, 100, 40)?;
    check_eq!(left, if target.cpu_maps() { 40 } else { 0 }, "pages left");
    device_check(&other, &buf, 0, N, 244)?;
    let data = pattern_bytes(245, 8, 8);
    other.write(&buf, 8, &data).or_fail("WRITE")?;
    device_check(&target, &buf, 8, 8, 245)?;
    device_check(&target, &buf, 16, N - 16, 244)?;
    buf.check(0, 8, 244)?;
    buf.check(8, 8, 245)?;
    target.bring_back(&buf, 0, N)?;
    buf.check(16, N - 16, 244)
}

/// A part of a huge page migrates, then the rest.
fn to_device<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for (first, n) in PARTS {
        let buf = huge_filled(1, 246)?;
        let before = target.stats()?;
        let moved = target.to_device(&buf, first, n).or_fail("MIGRATE_TO_DEV")?;
        check_eq!(moved.cpages, n as u64, "copied pages");
        check_bytes(&moved.data, 246, first, "data of the part")?;
        target.expect(&buf, first, n, n)?;
        target.expect(&buf, 0, N, n)?;
        for (first, n) in rest((first, n)) {
            expect_present(&buf, first, n)?;
        }
        let moved = target.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
        check_bytes(&moved.data, 246, 0, "data of the whole")?;
        target.expect(&buf, 0, N, N)?;
        let went = target.stats()?.to_device.wrapping_sub(before.to_device);
        check_eq!(went, N as u64, "growth of stats.to_device");
        buf.check(0, N, 246)?;
        target.bring_back(&buf, 0, N)?;
        buf.check(0, N, 246)?;
        target.expect_empty()?;
    }
    Ok(())
}

/// A part of a huge page comes back, then the rest.
fn to_system<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for (first, n) in PARTS {
        let buf = huge_filled(1, 247)?;
        target.move_huge(&buf, 247)?;
        let before = target.stats()?;
        target.to_system(&buf, first, n).or_fail("MIGRATE_TO_SYS")?;
        target.expect(&buf, first, n, 0)?;
        expect_present(&buf, first, n)?;
        target.expect(&buf, 0, N, N - n)?;
        device_check(&target, &buf, 0, N, 247)?;
        expect_sound(&target)?;
        let back = target.stats()?.to_system.wrapping_sub(before.to_system);
        check_eq!(back, n as u64, "growth of stats.to_system");
        check_eq!(target.stats()?.cpu_faults, before.cpu_faults, "CPU faults");
        buf.check(first, n, 247)?;
        target.bring_back(&buf, 0, N)?;
        buf.check(0, N, 247)?;
        target.expect_empty()?;
    }
    Ok(())
}

/// Ranges that begin and end within huge pages, with whole ones between.
fn misaligned<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let (first, n) = (100, 2 * N + 55);
    let buf = huge_filled(4, 248)?;
    let all = buf.pages();
    let before = target.stats()?;
    let moved = target.to_device(&buf, first, n).or_fail("MIGRATE_TO_DEV")?;
    check_eq!(moved.cpages, n as u64, "copied pages");
    check_bytes(&moved.data, 248, first, "data of a misaligned range")?;
    target.expect(&buf, first, n, n)?;
    target.expect(&buf, 0, all, n)?;
    let now = target.stats()?;
    let large = now.large_to_device.wrapping_sub(before.large_to_device);
    // Exactly one whole huge page lies within the range.
    check!(
        large <= 1,
        "huge pages that moved: expected 1 at most, found {large}"
    );
    note(&format!("{large} of 1 whole huge page moved in one piece"));

    let (from, m) = (first + 200, N + 77);
    target.to_system(&buf, from, m).or_fail("MIGRATE_TO_SYS")?;
    target.expect(&buf, from, m, 0)?;
    target.expect(&buf, 0, all, n - m)?;
    device_check(&target, &buf, 0, all, 248)?;
    expect_sound(&target)?;
    buf.check(0, all, 248)?;
    target.bring_back(&buf, first, n)?;
    buf.check(0, all, 248)?;
    target.expect_empty()
}

/// The file is closed while huge pages have holes, parts and other rights.
fn close_parts<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let observer = Target::open(ctx, NODE)?;
    let target = Target::open(ctx, NODE)?;
    let (holed, torn, bound) = (
        huge_filled(1, 250)?,
        huge_filled(1, 251)?,
        huge_filled(1, 252)?,
    );
    for (buf, seed) in [(&holed, 250), (&torn, 251), (&bound, 252)] {
        target.move_huge(buf, seed)?;
    }
    holed.unmap(10, 100)?;
    torn.advise(300, 3, libc::MADV_DONTNEED)?;
    bound.protect(0, 30, libc::PROT_READ)?;
    drop(target);
    observer.expect_empty()?;
    holed.check(0, 10, 250)?;
    holed.check(110, N - 110, 250)?;
    torn.check(0, 300, 251)?;
    torn.check_zero(300, 3)?;
    torn.check(303, N - 303, 251)?;
    bound.check(0, N, 252)
}
