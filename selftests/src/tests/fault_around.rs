// SPDX-License-Identifier: GPL-2.0

//! A CPU fault brings back pages around its own, if the file asks for it.

use std::io::Read;

use super::target::{PRIVATE, Target, expect_huge, huge_filled};
use super::{Ctx, PAGES, Test, expect_present, freed_since, test, with};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES};
use crate::harness::Child;
use crate::threads;
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("fault_around.off", off),
    test("fault_around.forwards", forwards),
    test("fault_around.backwards", backwards),
    test("fault_around.scattered", scattered),
    test("fault_around.most", most),
    test("fault_around.advice", advice),
    test("fault_around.waste", waste),
    test("fault_around.holes", holes),
    test("fault_around.other_file", other_file),
    test("fault_around.other_device", other_device),
    test("fault_around.area_ends", area_ends),
    test("fault_around.table_ends", table_ends),
    test("fault_around.fork", fork),
    test("fault_around.copy_on_write", copy_on_write),
    test("fault_around.threads", threads),
    test("fault_around.again", again),
    test("fault_around.huge", huge),
    test("fault_around.split", split),
    test("fault_around.failed_allocation", failed_allocation),
    test("fault_around.closed", closed),
    test("fault_around.bad", bad),
];

pub const PARAMETER: &[Test] = &[with(
    "fault_around=64",
    test("fault_around.parameter", parameter),
)];

pub const INJECTING: &[Test] = &[with("inject=1", test("fault_around.held", held))];

const N: usize = HUGE_PAGES;
const MOST: u32 = ZDM_FAULT_AROUND_MAX;

/// The growth of the counters: CPU faults, pages around, hits and waste.
type Grown = (u64, u64, u64, u64);

fn grown(device: &Target, before: &Stats) -> Outcome<Grown> {
    let now = device.stats()?;
    Ok((
        now.cpu_faults - before.cpu_faults,
        now.around - before.around,
        now.around_hits - before.around_hits,
        now.around_waste - before.around_waste,
    ))
}

/// Small pages with the pattern of `seed`, which begin where a page table begins.
fn filled(n: usize, seed: u64) -> Outcome<Buffer> {
    let buf = Buffer::anon_huge_aligned(n)?;
    buf.fill(0, n, seed);
    Ok(buf)
}

/// A device with fault-around on.
fn device_on(ctx: &Ctx) -> Outcome<Target> {
    let device = Target::open(ctx, PRIVATE)?;
    device.fault_around(MOST).or_fail("ZDM_FAULT_AROUND")?;
    Ok(device)
}

/// A device with fault-around on, and small pages on it.
fn moved(ctx: &Ctx, n: usize, seed: u64) -> Outcome<(Target, Buffer)> {
    let (device, buf) = (device_on(ctx)?, filled(n, seed)?);
    device.move_all(&buf, seed)?;
    Ok((device, buf))
}

/// With fault-around off each page takes a fault, as in the C driver.
fn off(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(PAGES, 1500)?;
    for round in 0..2 {
        device.move_all(&buf, 1500)?;
        let before = device.stats()?;
        buf.check(0, PAGES, 1500)?;
        check_eq!(
            grown(&device, &before)?,
            (PAGES as u64, 0, 0, 0),
            "counters in round {round}"
        );
        freed_since(&device, &before, PAGES)?;
        // Switch it on and off again.
        let old = device.fault_around(MOST).or_fail("ZDM_FAULT_AROUND")?;
        check_eq!(old, 1, "what was set before");
        let old = device.fault_around(0).or_fail("ZDM_FAULT_AROUND")?;
        check_eq!(old, MOST, "what was set before");
    }
    Ok(())
}

/// The CPU accesses the pages that the iterator names, in order. All of `buf` comes back in few
/// faults: windows double, and all pages that they bring are used.
fn in_order(
    device: &Target,
    buf: &Buffer,
    seed: u64,
    order: impl Iterator<Item = usize>,
) -> Outcome {
    let n = buf.pages() as u64;
    let before = device.stats()?;
    for page in order {
        buf.check(page, 1, seed)?;
    }
    // Windows of 1, 16, 32, 64, 128, 256, 15 up to the end of the table, and 512 pages.
    let faults = 8;
    check_eq!(
        grown(device, &before)?,
        (faults, n - faults, n - faults - (N as u64 - 1), 0),
        "CPU faults, pages around, hits and waste"
    );
    expect_present(buf, 0, buf.pages())?;
    freed_since(device, &before, buf.pages())
}

fn forwards(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, 2 * N, 1510)?;
    in_order(&device, &buf, 1510, 0..2 * N)?;
    // The pages are writable.
    buf.fill(0, 2 * N, 1511);
    device.move_all(&buf, 1511)?;
    buf.check(0, 2 * N, 1511)
}

fn backwards(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, 2 * N, 1520)?;
    in_order(&device, &buf, 1520, (0..2 * N).rev())
}

/// Faults in random order bring only their own pages.
fn scattered(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, N, 1530)?;
    let before = device.stats()?;
    for page in (0..N).step_by(8) {
        buf.check(page, 1, 1530)?;
    }
    check_eq!(
        grown(&device, &before)?,
        (N as u64 / 8, 0, 0, 0),
        "counters"
    );
    device.expect(&buf, 0, N, N - N / 8)?;
    buf.check(0, N, 1530)
}

/// No window is larger than the file's setting.
fn most(ctx: &Ctx) -> Outcome {
    let (device, buf) = (Target::open(ctx, PRIVATE)?, filled(N, 1540)?);
    for most in [2, 5, 16, 20] {
        device.fault_around(most).or_fail("ZDM_FAULT_AROUND")?;
        device.move_all(&buf, 1540)?;
        let mut left = N;
        while left > 0 {
            // Access the first page of the rest.
            buf.get(N - left, 0);
            let now = device.on_device(&buf, 0, N)?;
            let came = left - now;
            check!(
                (1..=most as usize).contains(&came),
                "pages of one fault: expected 1..={most}, found {came}"
            );
            left = now;
        }
        buf.check(0, N, 1540)?;
    }
    Ok(())
}

/// MADV_SEQUENTIAL brings the largest window at once, MADV_RANDOM none.
fn advice(ctx: &Ctx) -> Outcome {
    let (device, buf) = (device_on(ctx)?, filled(2 * N, 1550)?);
    for (advice, faults) in [
        (libc::MADV_SEQUENTIAL, 2),
        (libc::MADV_RANDOM, 2 * N as u64),
        (libc::MADV_NORMAL, 8),
    ] {
        buf.advise(0, 2 * N, advice)?;
        device.move_all(&buf, 1550)?;
        let before = device.stats()?;
        buf.check(0, 2 * N, 1550)?;
        let (found, around, ..) = grown(&device, &before)?;
        check_eq!(
            (found, around),
            (faults, 2 * N as u64 - faults),
            "CPU faults and pages around with advice {advice}"
        );
    }
    Ok(())
}

/// Pages that come and are not used count as waste and make windows smaller.
fn waste(ctx: &Ctx) -> Outcome {
    let (device, buf) = (Target::open(ctx, PRIVATE)?, filled(N, 1560)?);
    device.fault_around(64).or_fail("ZDM_FAULT_AROUND")?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    device.move_all(&buf, 1560)?;
    let before = device.stats()?;
    // The CPU uses some pages of the first window, and only the first page of the second.
    for page in (0..=10).chain([64]) {
        buf.get(page, 0);
    }
    check_eq!(
        grown(&device, &before)?,
        (2, 63 + 15, 10, 53),
        "counters after the second fault"
    );
    buf.get(80, 0);
    check_eq!(
        grown(&device, &before)?,
        (3, 63 + 15 + 3, 10, 68),
        "counters after the third fault"
    );
    device.expect(&buf, 0, N, N - 84)?;
    buf.check(0, N, 1560)
}

/// A hole gets no page, and pages in system memory stay there.
fn holes(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, N, 1570)?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    let hole = |page: usize| page % 3 == 1;
    for page in (0..N).filter(|&page| hole(page)) {
        buf.advise(page, 1, libc::MADV_DONTNEED)?;
    }
    device.to_system(&buf, 200, 1).or_fail("MIGRATE_TO_SYS")?;
    let frame = proc::frames(&buf, 200, 1)?;
    let before = device.stats()?;
    buf.get(0, 0);
    check_eq!(device.stats()?.cpu_faults - before.cpu_faults, 1, "faults");
    let holes = (0..N).filter(|&page| hole(page)).count();
    check_eq!(proc::present(&buf, 0, N)?, N - holes, "pages present");
    check_eq!(proc::frames(&buf, 200, 1)?, frame, "frame of a system page");
    for page in 0..N {
        match hole(page) {
            true => buf.check_zero(page, 1)?,
            false => buf.check(page, 1, 1570)?,
        }
    }
    device.expect(&buf, 0, N, 0)
}

/// Two files own the pages in turn; a fault on a page of the first file brings no page of the
/// second.
fn take_turns(first: &Target, second: &Target, seed: u64) -> Outcome {
    let buf = filled(N, seed)?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    for page in 0..N {
        let device = if page % 2 == 0 { first } else { second };
        device.to_device(&buf, page, 1).or_fail("MIGRATE_TO_DEV")?;
    }
    first.expect(&buf, 0, N, N)?;
    let before = first.stats()?;
    buf.get(0, 0);
    let (faults, around, ..) = grown(first, &before)?;
    check_eq!((faults, around), (1, N as u64 / 2 - 1), "counters");
    first.expect(&buf, 0, N, N / 2)?;
    check_eq!(proc::present(&buf, 2, 1)?, 1, "page 2 present");
    // The second file has no fault-around: its pages come one by one.
    buf.get(1, 0);
    first.expect(&buf, 0, N, N / 2 - 1)?;
    buf.check(0, N, seed)
}

fn other_file(ctx: &Ctx) -> Outcome {
    take_turns(&device_on(ctx)?, &Target::open(ctx, PRIVATE)?, 1580)
}

fn other_device(ctx: &Ctx) -> Outcome {
    take_turns(&device_on(ctx)?, &Target::open(ctx, PRIVATE + 1)?, 1590)
}

/// A window ends where the area ends.
fn area_ends(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, N, 1600)?;
    // The area lies between two other ones.
    buf.advise(100, 50, libc::MADV_SEQUENTIAL)?;
    buf.get(110, 0);
    device.expect(&buf, 0, N, N - 40)?;
    check_eq!(proc::present(&buf, 110, 40)?, 40, "pages present");
    // The same holds downwards.
    buf.get(109, 0);
    device.expect(&buf, 0, N, N - 50)?;
    // The next page belongs to another area, without advice.
    buf.get(150, 0);
    device.expect(&buf, 0, 150, 100)?;
    buf.check(0, N, 1600)
}

/// A window ends where the page table ends.
fn table_ends(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, 2 * N, 1610)?;
    buf.advise(0, 2 * N, libc::MADV_SEQUENTIAL)?;
    buf.get(N - 5, 0);
    device.expect(&buf, 0, 2 * N, 2 * N - 5)?;
    // All pages are used, so that the next window is as large.
    buf.check(N - 5, 5, 1610)?;
    buf.get(N, 0);
    device.expect(&buf, 0, 2 * N, N - 5)?;
    buf.check(0, 2 * N, 1610)
}

/// The child's faults bring back pages that it shares with its parent.
fn fork(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, N, 1620)?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    let before = device.stats()?;
    Child::spawn(|| buf.check(0, N, 1620))?.join()?;
    let (faults, around, ..) = grown(&device, &before)?;
    check_eq!((faults, around), (1, N as u64 - 1), "counters");
    expect_present(&buf, 0, N)?;
    buf.check(0, N, 1620)?;
    freed_since(&device, &before, N)?;
    buf.fill(0, N, 1621);
    buf.check(0, N, 1621)
}

/// A write of one process brings back pages around, which stay shared.
fn copy_on_write(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, N, 1630)?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    // The child writes, and its parent reads later.
    Child::spawn(|| {
        buf.fill(0, N, 1631);
        buf.check(0, N, 1631)
    })?
    .join()?;
    buf.check(0, N, 1630)?;
    // The parent writes, and its child reads later.
    device.move_all(&buf, 1630)?;
    let (mut wait, go) = crate::sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        buf.check(0, N, 1630)
    })?;
    let before = device.stats()?;
    buf.fill(0, N, 1632);
    check_eq!(
        device.stats()?.cpu_faults - before.cpu_faults,
        1,
        "CPU faults on device pages"
    );
    std::io::Write::write_all(&mut &go, b"g").or_fail("pipe")?;
    child.join()?;
    buf.check(0, N, 1632)?;
    freed_since(&device, &before, N)
}

/// Windows of several threads overlap: each page comes back once.
fn threads(ctx: &Ctx) -> Outcome {
    const THREADS: usize = 4;
    let (device, buf) = (device_on(ctx)?, filled(N, 1640)?);
    for (round, advice) in [libc::MADV_NORMAL, libc::MADV_SEQUENTIAL]
        .into_iter()
        .cycle()
        .take(10)
        .enumerate()
    {
        buf.advise(0, N, advice)?;
        device.move_all(&buf, 1640)?;
        let before = device.stats()?;
        let start = std::sync::Barrier::new(THREADS);
        threads::run(THREADS, |n| {
            start.wait();
            match n % 2 {
                0 => buf.check(0, N, 1640),
                _ => (0..N).rev().try_for_each(|page| buf.check(page, 1, 1640)),
            }
        })?;
        expect_present(&buf, 0, N)?;
        let back = device.stats()?.to_system - before.to_system;
        check_eq!(back, N as u64, "pages that came back in round {round}");
        freed_since(&device, &before, N)?;
    }
    Ok(())
}

/// The same pages migrate and come back many times; the record of their accesses stays right.
fn again(ctx: &Ctx) -> Outcome {
    let (device, buf) = (device_on(ctx)?, filled(N, 1650)?);
    for round in 0..5 {
        buf.fill(0, N, 1650 + round);
        device.move_all(&buf, 1650 + round)?;
        let before = device.stats()?;
        buf.check(0, N, 1650 + round)?;
        let (faults, around, _, waste) = grown(&device, &before)?;
        check!(
            faults <= 10 && faults + around == N as u64 && waste == 0,
            "CPU faults, pages around and waste: found {faults}, {around}, {waste}"
        );
    }
    Ok(())
}

/// A huge page comes back alone, in one piece.
fn huge(ctx: &Ctx) -> Outcome {
    let (device, buf) = (device_on(ctx)?, huge_filled(2, 1660)?);
    buf.advise(0, 2 * N, libc::MADV_SEQUENTIAL)?;
    device.move_huge(&buf, 1660)?;
    let before = device.stats()?;
    buf.check(0, 2 * N, 1660)?;
    let (faults, around, ..) = grown(&device, &before)?;
    check_eq!((faults, around), (2, 0), "CPU faults and pages around");
    device.expect_large(&before, 0, 2, 0)?;
    expect_huge(&buf, 0, 2 * N, 2 * N)
}

/// A fault on small pages also brings back the rest of a huge page beside them.
fn split(ctx: &Ctx) -> Outcome {
    let (device, buf) = (device_on(ctx)?, huge_filled(1, 1670)?);
    device.move_huge(&buf, 1670)?;
    // Half of the huge page is freed, and small pages take its place.
    buf.advise(0, N / 2, libc::MADV_DONTNEED)?;
    buf.advise(0, N, libc::MADV_NOHUGEPAGE)?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    buf.fill(0, N / 2, 1670);
    device.to_device(&buf, 0, N / 2).or_fail("MIGRATE_TO_DEV")?;
    device.expect(&buf, 0, N, N)?;
    let before = device.stats()?;
    buf.get(3, 0);
    check_eq!(device.stats()?.cpu_faults - before.cpu_faults, 1, "faults");
    device.expect(&buf, 0, N, 3)?;
    buf.check(0, N, 1670)?;
    device.expect_empty()
}

/// A fault without memory for its own page is retried, as without a window.
fn failed_allocation(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, N, 1680)?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    device.fail_alloc()?;
    buf.check(0, N, 1680)?;
    device.expect(&buf, 0, N, 0)
}

/// A closed file leaves nothing behind for the next file, which may have the same number.
fn closed(ctx: &Ctx) -> Outcome {
    drop(device_on(ctx)?);
    let (device, buf) = (Target::open(ctx, PRIVATE)?, filled(PAGES, 1690)?);
    device.move_all(&buf, 1690)?;
    let before = device.stats()?;
    buf.check(0, PAGES, 1690)?;
    check_eq!(
        grown(&device, &before)?,
        (PAGES as u64, 0, 0, 0),
        "counters"
    );
    Ok(())
}

fn bad(ctx: &Ctx) -> Outcome {
    let device = device_on(ctx)?;
    for (pages, flags) in [(MOST + 1, 0), (u32::MAX, 0), (16, 1), (0, 1 << 31)] {
        let result = device.fault_around_with(pages, flags);
        expect_errno(result, &[libc::EINVAL], "ZDM_FAULT_AROUND with a bad value")?;
    }
    let result = device.ioctl_nowhere(ZDM_FAULT_AROUND);
    expect_errno(
        result,
        &[libc::EFAULT],
        "ZDM_FAULT_AROUND with a bad pointer",
    )?;
    // The setting is unchanged.
    let old = device.fault_around(1).or_fail("ZDM_FAULT_AROUND")?;
    check_eq!(old, MOST, "what was set before");
    Ok(())
}

/// The module parameter is the initial setting of each file.
fn parameter(ctx: &Ctx) -> Outcome {
    let (device, buf) = (Target::open(ctx, PRIVATE)?, filled(N, 1700)?);
    let old = device.fault_around(64).or_fail("ZDM_FAULT_AROUND")?;
    check_eq!(old, 64, "what the parameter has set");
    let device = Target::open(ctx, PRIVATE)?;
    device.move_all(&buf, 1700)?;
    let before = device.stats()?;
    buf.check(0, N, 1700)?;
    // Windows of 1, 16 and 32 pages, seven of 64, and what is left.
    check_eq!(device.stats()?.cpu_faults - before.cpu_faults, 11, "faults");
    Ok(())
}

/// A held page in the window stays, and the others come back.
fn held(ctx: &Ctx) -> Outcome {
    let (device, buf) = moved(ctx, N, 1710)?;
    buf.advise(0, N, libc::MADV_SEQUENTIAL)?;
    device
        .inject(ZDM_INJECT_EXTRA_GET, buf.at(7))
        .or_fail("ZDM_INJECT_EXTRA_GET")?;
    let before = device.stats()?;
    buf.get(0, 0);
    let (faults, around, ..) = grown(&device, &before)?;
    check_eq!((faults, around), (1, N as u64 - 2), "counters");
    device.expect(&buf, 0, N, 1)?;
    device.expect(&buf, 7, 1, 1)?;
    device
        .inject(ZDM_INJECT_UNDO_GET, buf.at(7))
        .or_fail("ZDM_INJECT_UNDO_GET")?;
    buf.check(0, N, 1710)?;
    device.expect(&buf, 0, N, 0)
}
