// SPDX-License-Identifier: GPL-2.0

//! Pages migrate to the device and back.

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, expect_present, freed_since, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes};
use crate::harness::{Child, note};
use crate::sys;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("migrate.round_trip", round_trip::<PRIVATE>),
    test("migrate.one_page", one_page::<PRIVATE>),
    test("migrate.read_only_mapping", read_only_mapping::<PRIVATE>),
    test("migrate.untouched_pages", untouched_pages::<PRIVATE>),
    test("migrate.partial_range", partial_range::<PRIVATE>),
    test("migrate.twice", twice::<PRIVATE>),
    test("migrate.large", large::<PRIVATE>),
    test("migrate.large_nohuge", large_nohuge::<PRIVATE>),
    test("migrate.two_devices", two_devices::<PRIVATE>),
    test("migrate.file_backed", file_backed::<PRIVATE>),
    test("migrate_generic.round_trip", round_trip::<GENERIC>),
    test("migrate_generic.one_page", one_page::<GENERIC>),
    test(
        "migrate_generic.read_only_mapping",
        read_only_mapping::<GENERIC>,
    ),
    test(
        "migrate_generic.untouched_pages",
        untouched_pages::<GENERIC>,
    ),
    test("migrate_generic.partial_range", partial_range::<GENERIC>),
    test("migrate_generic.twice", twice::<GENERIC>),
    test("migrate_generic.large", large::<GENERIC>),
    test("migrate_generic.large_nohuge", large_nohuge::<GENERIC>),
    test("migrate_generic.two_devices", two_devices::<GENERIC>),
    test("migrate_generic.file_backed", file_backed::<GENERIC>),
];

/// Migrates pages to the device and back by request, and checks every page by every means.
fn there_and_back(device: &Target, buf: &Buffer, seed: u64) -> Outcome {
    let n = buf.pages();
    let before = device.stats()?;
    device.move_all(buf, seed)?;

    // No other task runs: the scan is exact, and counts our pages as used.
    let (audit, _) = device.audit()?;
    check_eq!(audit.used, n as u64, "used pages in the audit");
    check_eq!(audit.found, 0, "violations with the pages on the device");

    let cmd = device.to_system(buf, 0, n).or_fail("MIGRATE_TO_SYS")?;
    // The C driver counts a huge page as one here, so a smaller number is no error; the counters
    // and pagemap below are exact.
    let says = cmd.cpages;
    check!(
        (1..=n as u64).contains(&says) && (n >= HUGE_PAGES || says == n as u64),
        "pages that MIGRATE_TO_SYS says it moved: expected {n}, found {says}"
    );
    expect_present(buf, 0, n)?;
    let after = device.stats()?;
    let back = after.to_system.wrapping_sub(before.to_system);
    check_eq!(back, n as u64, "growth of stats.to_system");
    check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults");
    freed_since(device, &before, n)?;
    buf.check(0, n, seed)
}

fn round_trip<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 1)?;
    there_and_back(&device, &buf, 1)?;
    // Repeat it with other data, so that a stale copy of the first round would show.
    buf.fill(0, PAGES, 2);
    there_and_back(&device, &buf, 2)
}

fn one_page<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE + 1)?;
    let buf = Buffer::filled(3, 3)?;
    let moved = device.to_device(&buf, 1, 1).or_fail("MIGRATE_TO_DEV")?;
    check_eq!(moved.cpages, 1, "copied pages");
    check_bytes(&moved.data, 3, 1, "returned data")?;
    device.expect(&buf, 1, 1, 1)?;
    expect_present(&buf, 0, 1)?;
    expect_present(&buf, 2, 1)?;
    device.to_system(&buf, 1, 1).or_fail("MIGRATE_TO_SYS")?;
    expect_present(&buf, 0, 3)?;
    buf.check(0, 3, 3)
}

/// A read-only page comes back read-only, and is never writable in between.
fn read_only_mapping<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 4)?;
    buf.protect(0, PAGES, libc::PROT_READ)?;
    device.move_all(&buf, 4)?;

    let (from, to) = (5, 6);
    Child::expect_segv(
        || {
            buf.set(from, 0, 1);
        },
        "write to a read-only page on the device",
    )?;
    device
        .to_system(&buf, to, PAGES - to)
        .or_fail("MIGRATE_TO_SYS")?;
    buf.check(0, PAGES, 4)?;
    Child::expect_segv(
        || {
            buf.set(to, 0, 1);
        },
        "write to a read-only page that came back",
    )?;
    buf.protect(0, PAGES, libc::PROT_READ | libc::PROT_WRITE)?;
    buf.fill(0, PAGES, 5);
    buf.check(0, PAGES, 5)
}

/// Memory that was never touched, and the shared zero page, migrate as zeroes.
fn untouched_pages<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::anon(PAGES)?;
    // The middle third has the zero page; there is nothing around it.
    buf.check_zero(PAGES / 3, PAGES / 3)?;

    let before = device.stats()?;
    let moved = device
        .to_device(&buf, 0, PAGES)
        .or_fail("MIGRATE_TO_DEV of untouched pages")?;
    check_eq!(moved.cpages, PAGES as u64, "copied pages");
    let nonzero = moved.data.iter().position(|b| *b != 0);
    check_eq!(
        nonzero,
        None,
        "first byte of the returned data that is not 0"
    );
    device.expect(&buf, 0, PAGES, PAGES)?;
    let got = device.stats()?.allocated.wrapping_sub(before.allocated);
    check_eq!(got, PAGES as u64, "growth of stats.allocated");

    buf.check_zero(0, PAGES)?;
    device.bring_back(&buf, 0, PAGES)?;
    buf.check_zero(0, PAGES)?;
    buf.fill(0, PAGES, 6);
    buf.check(0, PAGES, 6)
}

/// A hole in the range is an error, and does not harm the pages around it.
fn partial_range<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 7)?;
    let (hole, len) = (PAGES / 2, 8);
    buf.unmap(hole, len)?;
    let result = device.to_device(&buf, 0, PAGES);
    expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_DEV across a hole")?;
    buf.check(0, hole, 7)?;
    buf.check(hole + len, PAGES - hole - len, 7)?;

    // The same in the other direction, with pages that are on the device.
    let moved = device.to_device(&buf, 0, hole).or_fail("MIGRATE_TO_DEV")?;
    check_bytes(&moved.data, 7, 0, "returned data")?;
    let result = device.to_system(&buf, 0, PAGES);
    expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_SYS across a hole")?;
    buf.check(0, hole, 7)?;
    buf.check(hole + len, PAGES - hole - len, 7)
}

/// Pages that are already on the device stay there with their data.
///
/// The C driver returns ENOENT here if memory that ends where the buffer begins was unmapped in
/// between: its invalidation treats the end as part of the range, and drops the entry of the
/// buffer's first page.
fn twice<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 8)?;
    // Migrate half of the range first, so that the second call meets both kinds.
    device
        .to_device(&buf, 0, PAGES / 2)
        .or_fail("MIGRATE_TO_DEV of the first half")?;
    let before = device.stats()?;
    let moved = device
        .to_device(&buf, 0, PAGES)
        .or_fail("MIGRATE_TO_DEV of all")?;
    check_bytes(&moved.data, 8, 0, "returned data")?;
    let went = device.stats()?.to_device.wrapping_sub(before.to_device);
    check_eq!(
        went,
        (PAGES / 2) as u64,
        "pages of the second half that went"
    );
    device.expect(&buf, 0, PAGES, PAGES)?;

    let moved = device
        .to_device(&buf, 0, PAGES)
        .or_fail("MIGRATE_TO_DEV of all, again")?;
    check_bytes(&moved.data, 8, 0, "returned data")?;
    device.expect(&buf, 0, PAGES, PAGES)?;
    let (audit, _) = device.audit()?;
    check_eq!(audit.used, PAGES as u64, "used pages in the audit");
    buf.check(0, PAGES, 8)
}

fn eight_megabytes<const NODE: usize>(ctx: &Ctx, advice: i32) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let pages = 4 * HUGE_PAGES;
    let buf = Buffer::anon_huge_aligned(pages)?;
    buf.advise(0, pages, advice)?;
    buf.fill(0, pages, 9);
    there_and_back(&device, &buf, 9)?;

    // Bring the pages back by faults, if there are any, starting in the middle of each huge page.
    device.move_all(&buf, 9)?;
    for huge in 0..4 {
        buf.check(huge * HUGE_PAGES + 100, 1, 9)?;
    }
    buf.check(0, pages, 9)?;
    device.bring_back(&buf, 0, pages)?;
    expect_present(&buf, 0, pages)
}

fn large<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    let thp = std::fs::read_to_string(path)
        .map_err(|e| Fail::Skip(format!("no transparent huge pages: {path}: {e}")))?;
    check!(
        !thp.contains("[never]") || std::fs::write(path, "madvise").is_ok(),
        "{path}: expected always or madvise, found {thp}"
    );
    eight_megabytes::<NODE>(ctx, libc::MADV_HUGEPAGE)
}

fn large_nohuge<const NODE: usize>(ctx: &Ctx) -> Outcome {
    eight_megabytes::<NODE>(ctx, libc::MADV_NOHUGEPAGE)
}

/// Pages of the other device may migrate or not, but no data is lost.
fn two_devices<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let (zero, one) = (Target::open(ctx, NODE)?, Target::open(ctx, NODE + 1)?);
    let buf = Buffer::filled(PAGES, 10)?;
    zero.move_all(&buf, 10)?;
    match one.to_device(&buf, 0, PAGES) {
        Ok(moved) => check_bytes(&moved.data, 10, 0, "data by the second device")?,
        // The driver, like the C driver, does not select pages of the other device, and then has no
        // data to return.
        Err(e) => note(&format!("MIGRATE_TO_DEV on the second device: {e}")),
    }
    let read = one
        .read(&buf, 0, PAGES)
        .or_fail("READ by the second device")?;
    check_bytes(&read.data, 10, 0, "READ by the second device")?;
    buf.check(0, PAGES, 10)?;

    // The same in the other direction, with an access of the CPU in between.
    zero.bring_back(&buf, 0, PAGES)?;
    one.move_all(&buf, 10)?;
    let read = zero
        .read(&buf, 0, PAGES)
        .or_fail("READ by the first device")?;
    check_bytes(&read.data, 10, 0, "READ by the first device")?;
    buf.check(0, PAGES, 10)
}

/// Core mm does not migrate page cache to device memory. The command fails or moves fewer pages,
/// and the file stays the same.
fn file_backed<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let file = sys::memfd("zdm-file-backed").or_fail("memfd_create")?;
    file.set_len((PAGES * PAGE) as u64).or_fail("ftruncate")?;
    let buf = Buffer::shared(&file, PAGES)?;
    buf.fill(0, PAGES, 11);
    let before = device.stats()?;
    match device.to_device(&buf, 0, PAGES) {
        Ok(moved) if moved.cpages == PAGES as u64 => {
            check_bytes(&moved.data, 11, 0, "returned data")?;
        }
        Ok(moved) => note(&format!("{} pages copied", moved.cpages)),
        Err(e) => note(&format!("MIGRATE_TO_DEV of page cache: {e}")),
    }
    let went = device.stats()?.to_device.wrapping_sub(before.to_device);
    check_eq!(went, 0, "pages of the page cache that went to the device");
    buf.check(0, PAGES, 11)?;
    buf.fill(0, PAGES, 12);
    let mut data = vec![0; PAGES * PAGE];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut data, 0).or_fail("pread")?;
    check_bytes(&data, 12, 0, "data read from the file")
}
