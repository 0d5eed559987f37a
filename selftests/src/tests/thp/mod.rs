// SPDX-License-Identifier: GPL-2.0

//! Transparent huge pages that migrate, come back and end in one piece. `thp/parts.rs` splits them.

pub mod parts;
pub mod shared;

use std::io::{Read, Write};
use std::time::Duration;

use super::strict::has_all_fixes;
use super::target::{COHERENT, GENERIC, PRIVATE, Target, expect_huge, huge_filled, make_huge};
use super::{Ctx, Test, expect_present, freed_since, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::proc;
use crate::sys::{self, Exit};

const N: usize = HUGE_PAGES;

pub const TESTS: &[Test] = &[
    test("thp.round_trip", round_trip::<PRIVATE>),
    test("thp.cpu_fault", cpu_fault),
    test("thp.zero_page", zero_page::<PRIVATE>),
    test("thp.fork_read", fork_read::<PRIVATE>),
    test("thp.fork_write", fork_write::<PRIVATE>),
    test("thp.mremap", mremap::<PRIVATE>),
    test("thp.fail_alloc_to_device", fail_to_device::<PRIVATE>),
    test("thp.fail_alloc_to_system", fail_to_system::<PRIVATE>),
    test("thp.fail_alloc_fault", fail_fault),
    test("thp.exit", exit::<PRIVATE>),
    test("thp.kill", kill::<PRIVATE>),
    test("thp.close", close::<PRIVATE>),
    test("thp_coherent.round_trip", round_trip::<COHERENT>),
    test("thp_coherent.cpu_access", cpu_access::<COHERENT>),
    test("thp_coherent.zero_page", zero_page::<COHERENT>),
    test("thp_coherent.fork_read", fork_read::<COHERENT>),
    test("thp_coherent.fork_write", fork_write::<COHERENT>),
    test("thp_coherent.mremap", mremap::<COHERENT>),
    test(
        "thp_coherent.fail_alloc_to_device",
        fail_to_device::<COHERENT>,
    ),
    test(
        "thp_coherent.fail_alloc_to_system",
        fail_to_system::<COHERENT>,
    ),
    test("thp_coherent.exit", exit::<COHERENT>),
    test("thp_coherent.kill", kill::<COHERENT>),
    test("thp_coherent.close", close::<COHERENT>),
    test("thp_generic.round_trip", round_trip::<GENERIC>),
    test("thp_generic.cpu_access", cpu_access::<GENERIC>),
    test("thp_generic.zero_page", zero_page::<GENERIC>),
    test("thp_generic.fork_read", fork_read::<GENERIC>),
    test("thp_generic.fork_write", fork_write::<GENERIC>),
    test("thp_generic.mremap", mremap::<GENERIC>),
    test(
        "thp_generic.fail_alloc_to_device",
        fail_to_device::<GENERIC>,
    ),
    test(
        "thp_generic.fail_alloc_to_system",
        fail_to_system::<GENERIC>,
    ),
    test("thp_generic.exit", exit::<GENERIC>),
    test("thp_generic.kill", kill::<GENERIC>),
    test("thp_generic.close", close::<GENERIC>),
];

/// Two huge pages migrate to the device and back by request.
fn round_trip<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(2, 200)?;
    let n = buf.pages();
    for seed in [200, 201] {
        let before = target.stats()?;
        target.move_huge(&buf, seed)?;
        let (audit, _) = target.audit()?;
        check_eq!(audit.used, n as u64, "used pages in the audit");
        check_eq!(audit.found, 0, "violations with the pages on the device");

        target.to_system(&buf, 0, n).or_fail("MIGRATE_TO_SYS")?;
        target.expect(&buf, 0, n, 0)?;
        expect_present(&buf, 0, n)?;
        target.expect_large(&before, 2, 2, 0)?;
        if target.moves_large() {
            expect_huge(&buf, 0, n, n)?;
        }
        let after = target.stats()?;
        let back = after.to_system.wrapping_sub(before.to_system);
        check_eq!(back, n as u64, "growth of stats.to_system");
        check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults");
        freed_since(&target, &before, n)?;
        buf.check(0, n, seed)?;
        // The second round has other data, and makes the pages huge again if the first round has
        // split them.
        buf.fill(0, n, 201);
        make_huge(&buf)?;
    }
    Ok(())
}

/// One CPU fault brings a huge page back in one piece.
fn cpu_fault(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = huge_filled(1, 202)?;
    let one_fault = |access: &dyn Fn()| -> Outcome {
        target.move_huge(&buf, 202)?;
        let before = target.stats()?;
        access();
        let faults = target.stats()?.cpu_faults.wrapping_sub(before.cpu_faults);
        check_eq!(faults, 1, "CPU faults for one access to a huge page");
        expect_present(&buf, 0, N)?;
        expect_huge(&buf, 0, N, N)?;
        target.expect_large(&before, 0, 1, 0)?;
        freed_since(&target, &before, N)
    };
    one_fault(&|| assert_ne!(buf.get(300, 7), 0))?;
    buf.check(0, N, 202)?;
    let old = buf.get(301, 7);
    one_fault(&|| buf.set(301, 7, !old))?;
    check_eq!(buf.get(301, 7), !old, "word that was written");
    buf.set(301, 7, old);
    buf.check(0, N, 202)
}

/// The CPU reads and writes COHERENT and GENERIC memory on the device.
fn cpu_access<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(1, 203)?;
    target.move_huge(&buf, 203)?;
    let before = target.stats()?;
    buf.check(0, N, 203)?;
    buf.fill(0, N, 204);
    let after = target.stats()?;
    check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults");
    target.expect(&buf, 0, N, N)?;
    let read = target.read(&buf, 0, N).or_fail("READ")?;
    check_bytes(&read.data, 204, 0, "what the CPU wrote, by the device")?;
    target
        .write(&buf, 8, &pattern_bytes(205, 8, 8))
        .or_fail("WRITE")?;
    buf.check(8, 8, 205)?;
    target.bring_back(&buf, 0, N)?;
    buf.check(0, 8, 204)?;
    buf.check(8, 8, 205)?;
    buf.check(16, N - 16, 204)
}

/// The huge zero page, and a place without a page.
fn zero_page<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for touched in [true, false] {
        let buf = Buffer::anon_huge_aligned(N)?;
        buf.advise(0, N, libc::MADV_HUGEPAGE)?;
        if touched {
            check_eq!(buf.get(0, 0), 0, "first word of fresh memory");
            expect_huge(&buf, 0, N, N)?;
        }
        let before = target.stats()?;
        let moved = target.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
        check_eq!(moved.cpages, N as u64, "copied pages");
        let nonzero = moved.data.iter().position(|b| *b != 0);
        check_eq!(nonzero, None, "first byte that is not 0");
        target.expect(&buf, 0, N, N)?;
        target.expect_large(&before, 1, 0, 0)?;

        // The device gets a page of its own, not the shared zero page.
        let data = pattern_bytes(206, 9, 3);
        target.write(&buf, 9, &data).or_fail("WRITE")?;
        target.bring_back(&buf, 0, N)?;
        buf.check_zero(0, 9)?;
        buf.check(9, 3, 206)?;
        buf.check_zero(12, N - 12)?;
        let fresh = Buffer::anon_huge_aligned(N)?;
        fresh.advise(0, N, libc::MADV_HUGEPAGE)?;
        fresh.check_zero(0, N)?;
    }
    Ok(())
}

/// Where pages are after processes have only read them.
fn after_reading(target: &Target, buf: &Buffer) -> Outcome {
    let there = if target.cpu_maps() { N } else { 0 };
    target.expect(buf, 0, N, there)
}

fn fork_read<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(1, 210)?;
    target.move_huge(&buf, 210)?;
    let (mut wait, go) = sys::pipe().or_fail("pipe")?;
    let early = Child::spawn(|| buf.check(0, N, 210))?;
    let late = Child::spawn(|| {
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        buf.check(0, N, 210)
    })?;
    early.join()?;
    // The device reads the shared page, wherever it is.
    let read = target.read(&buf, 0, N).or_fail("READ of shared pages")?;
    check_bytes(&read.data, 210, 0, "READ of shared pages")?;
    buf.check(0, N, 210)?;
    (&go).write_all(b"g").or_fail("pipe")?;
    late.join()?;
    after_reading(&target, &buf)?;
    target.bring_back(&buf, 0, N)?;
    target.expect_empty()?;
    buf.fill(0, N, 211);
    buf.check(0, N, 211)
}

/// Neither process sees the writes of the other.
fn fork_write<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(1, 212)?;

    target.move_huge(&buf, 212)?;
    Child::spawn(|| {
        // Write some pages alone, then all.
        buf.fill(17, 3, 213);
        buf.check(0, 17, 212)?;
        buf.check(17, 3, 213)?;
        buf.check(20, N - 20, 212)?;
        buf.fill(0, N, 213);
        buf.check(0, N, 213)
    })?
    .join()?;
    let read = target.read(&buf, 0, N).or_fail("READ")?;
    check_bytes(&read.data, 212, 0, "the parent's pages by the device")?;
    buf.check(0, N, 212)?;

    // The parent writes while a child still has the pages.
    target.bring_back(&buf, 0, N)?;
    target.move_all(&buf, 212)?;
    let (mut wait, go) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        buf.check(0, N, 212)
    })?;
    buf.fill(100, 3, 214);
    buf.check(0, 100, 212)?;
    buf.check(100, 3, 214)?;
    buf.check(103, N - 103, 212)?;
    buf.fill(0, N, 214);
    (&go).write_all(b"g").or_fail("pipe")?;
    child.join()?;
    buf.check(0, N, 214)?;
    target.bring_back(&buf, 0, N)?;
    target.expect_empty()
}

/// The entries move to another address; the pages stay where they are.
fn mremap<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    // Move to a place that fits a huge entry, and to one that does not.
    for at in [0, 128] {
        let buf = huge_filled(1, 215)?;
        target.move_huge(&buf, 215)?;
        let before = target.stats()?;
        let place = Buffer::anon_huge_aligned(2 * N)?;
        buf.move_pages(0, N, &place, at)?;
        check_eq!(
            target.stats()?.cpu_faults,
            before.cpu_faults,
            "CPU faults by mremap to page {at}"
        );
        target.expect(&place, at, N, N)?;
        if target.moves_large() {
            let expected = if at == 0 { N } else { 0 };
            expect_huge(&place, at, N, expected)?;
        }
        // Read before another mapping can take the place.
        let gone = target.read(&buf, 0, 1);
        expect_errno(gone, &[libc::EFAULT], "READ of the old place")?;
        let read = target.read(&place, at, N).or_fail("READ after mremap")?;
        check_bytes(&read.data, 215, 0, "READ after mremap")?;
        place.check_from(at, N, 215, 0)?;
        target.bring_back(&place, at, N)?;
        place.check_from(at, N, 215, 0)?;
        target.expect_empty()?;
    }
    Ok(())
}

/// Where only small pages migrate, another one replaces the failed allocation.
fn fail_one_page(target: &Target, buf: &Buffer) -> Outcome {
    target.to_device(buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
    target.expect(buf, 0, N, N)
}

/// If the allocation of a huge device page fails, small ones replace it.
fn fail_to_device<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(1, 220)?;
    let before = target.stats()?;
    target.fail_alloc()?;
    if target.moves_large() {
        target.move_all(&buf, 220)?;
    } else {
        fail_one_page(&target, &buf)?;
    }
    target.expect_large(&before, 0, 0, 1)?;
    expect_huge(&buf, 0, N, 0)?;
    target.bring_back(&buf, 0, N)?;
    buf.check(0, N, 220)?;

    // The failure does not repeat; and the same holds for a place without a page.
    let buf = huge_filled(1, 221)?;
    target.move_huge(&buf, 221)?;
    let empty = Buffer::anon_huge_aligned(N)?;
    empty.advise(0, N, libc::MADV_HUGEPAGE)?;
    let before = target.stats()?;
    target.fail_alloc()?;
    if target.moves_large() {
        let moved = target.to_device(&empty, 0, N).or_fail("MIGRATE_TO_DEV")?;
        check_eq!(moved.cpages, N as u64, "copied pages");
        target.expect(&empty, 0, N, N)?;
    } else {
        fail_one_page(&target, &empty)?;
    }
    target.expect_large(&before, 0, 0, 1)?;
    target.bring_back(&empty, 0, N)?;
    empty.check_zero(0, N)?;
    target.bring_back(&buf, 0, N)?;
    buf.check(0, N, 221)?;
    target.expect_empty()
}

/// If the allocation of a huge system page fails, small ones replace it.
fn fail_to_system<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(1, 222)?;
    target.move_huge(&buf, 222)?;
    let before = target.stats()?;
    target.fail_alloc()?;
    match target.to_system(&buf, 0, N) {
        // Nothing is smaller than a small page: then the command fails, once.
        Err(e) if !target.moves_large() => {
            check_eq!(e.raw_os_error(), Some(libc::ENOMEM), "MIGRATE_TO_SYS");
            target
                .to_system(&buf, 0, N)
                .or_fail("second MIGRATE_TO_SYS")?;
        }
        result => drop(result.or_fail("MIGRATE_TO_SYS")?),
    }
    target.expect(&buf, 0, N, 0)?;
    target.expect_large(&before, 0, 0, 1)?;
    if target.moves_large() {
        expect_huge(&buf, 0, N, 0)?;
    }
    freed_since(&target, &before, N)?;
    buf.check(0, N, 222)?;
    target.expect_empty()
}

/// The allocation fails in a CPU fault.
fn fail_fault(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = huge_filled(1, 223)?;
    target.move_huge(&buf, 223)?;
    let before = target.stats()?;
    target.fail_alloc()?;
    buf.check(0, N, 223)?;
    target.expect(&buf, 0, N, 0)?;
    target.expect_large(&before, 0, 0, 1)?;
    freed_since(&target, &before, N)?;
    if has_all_fixes(ctx)? {
        // The driver did not have to try again.
        check_eq!(
            target.stats()?.failed_migrate,
            before.failed_migrate,
            "pages that did not move at first"
        );
    }
    // The failure does not repeat.
    make_huge(&buf)?;
    target.move_huge(&buf, 223)?;
    let before = target.stats()?;
    buf.check(0, N, 223)?;
    target.expect_large(&before, 0, 1, 0)
}

fn exit<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let before = target.stats()?;
    Child::spawn(|| {
        let target = Target::open(ctx, NODE)?;
        let buf = huge_filled(2, 224)?;
        target.move_huge(&buf, 224)?;
        sys::exit_now(0)
    })?
    .join()?;
    freed_since(&target, &before, 2 * N)?;
    target.expect_empty()
}

/// A process is killed while it migrates huge pages, at another point each time.
fn kill<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for round in 0..6 {
        let before = target.stats()?;
        let child = Child::spawn(|| {
            let target = Target::open(ctx, NODE)?;
            let buf = huge_filled(1, 225)?;
            loop {
                target.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
                match round % 2 {
                    0 => drop(target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?),
                    // Bring them back by a fault, if there is one.
                    _ => {
                        buf.get(N / 2, 0);
                    }
                }
            }
        })?;
        let begun = sys::wait_until(Duration::from_secs(20), || {
            target.stats().is_ok_and(|s| s.to_device > before.to_device)
        });
        std::thread::sleep(Duration::from_millis(5 * round));
        let exit = child.kill()?;
        check_eq!(begun, true, "whether the child has begun to migrate");
        check_eq!(exit, Exit::Signal(libc::SIGKILL), "end in round {round}");
        target.expect_empty()?;
    }
    Ok(())
}

/// The last close of the file brings its huge pages back.
fn close<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let observer = Target::open(ctx, NODE)?;
    let target = Target::open(ctx, NODE)?;
    let buf = huge_filled(2, 226)?;
    target.move_huge(&buf, 226)?;
    let before = observer.stats()?;
    drop(target);
    observer.expect(&buf, 0, 2 * N, 0)?;
    expect_present(&buf, 0, 2 * N)?;
    let evicted = observer.stats()?.evicted.wrapping_sub(before.evicted);
    check_eq!(evicted, 2 * N as u64, "growth of stats.evicted");
    check_eq!(proc::present(&buf, 0, 2 * N)?, 2 * N, "present pages");
    observer.expect_empty()?;
    buf.check(0, 2 * N, 226)?;
    buf.fill(0, 2 * N, 227);
    buf.check(0, 2 * N, 227)
}
