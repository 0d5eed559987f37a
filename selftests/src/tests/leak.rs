// SPDX-License-Identifier: GPL-2.0

//! Memory that a scenario must not leave behind in the system (I8), and tests of the system's
//! memory.
//!
//! The audit after every test finds leaked device pages. A leaked system page that is charged to a
//! memory cgroup shows in the cgroup after all its processes have ended: `settled` runs a scenario
//! in a cgroup of its own. The charge is exact apart from the kernel's own needs. The source page
//! of a migration is no longer charged: `leak.*` migrate memory in all ways so often that a leak
//! would reduce free memory. The counters of an address space need no test, because the kernel
//! reports one that is not zero in the end (`Bad rss-counter state`), and the runner checks for
//! that.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::account::{charged, current, join_cgroup, new_cgroup};
use super::target::{Target, huge_filled};
use super::{Ctx, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("leak":
    "back" => back,
    "unmapped" => unmapped,
    "exit" => exit,
    "close" => close,
    "huge" => huge,
    "parts" => parts,
    "zero" => zero,
    "charge" => charge,
);

/// The pages of kernel memory that may stay charged to a cgroup without processes. It is fewer than
/// the pages of any test.
const REST: u64 = 40;

/// The charge of a cgroup without processes, in pages, after every CPU has returned its advance
/// charges and reclaim has freed what it can.
fn drained(dir: &Path) -> Outcome<u64> {
    let mut left = 0;
    sys::wait_until(Duration::from_secs(10), || {
        // Repeat it: exit and RCU free memory a little later.
        let _ = fs::write(dir.join("memory.high"), "0");
        left = current(dir).unwrap_or(u64::MAX);
        if left > REST {
            // Pages that only a CPU's batch holds are freed by this.
            let _ = proc::drain_batches();
        }
        left <= REST
    });
    Ok(left)
}

/// Counters of the machine that a scenario leaves as it found them: pages that are off their lists
/// for a migration, locked pages, and huge anonymous pages.
fn counters() -> [u64; 4] {
    // Adds up what every CPU has for itself.
    let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
    let isolated = |name| proc::vmstat(name).unwrap_or(0);
    [
        isolated("nr_isolated_anon"),
        isolated("nr_isolated_file"),
        isolated("nr_mlock"),
        crate::pagestate::huge_statistic("nr_anon").unwrap_or(0),
    ]
}

/// The sum of a field of smaps over all processes, in KiB.
fn of_processes(name: &str) -> u64 {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let kib = processes.filter_map(|entry| {
        let text = fs::read_to_string(entry.path().join("smaps_rollup")).ok()?;
        proc::kib(&text, name)
    });
    kib.sum()
}

/// Huge anonymous pages that processes have mapped.
fn mapped_huge() -> u64 {
    of_processes("AnonHugePages") * 1024 / (HUGE_PAGES * PAGE) as u64
}

/// The difference between the anonymous pages that the machine counts as mapped and those that
/// processes map, in pages. Any other number than 0 is a counter that was not changed with an
/// entry.
fn uncounted() -> i64 {
    let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
    let machine = proc::vmstat("nr_anon_pages").unwrap_or(0) as i64;
    machine - (of_processes("Pss_Anon") * 1024 / PAGE as u64) as i64
}

/// Page tables of the machine that no process has, in pages. Those that a process has are VmPTE, and one of the
/// first level.
fn without_process() -> i64 {
    let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
    let machine = proc::vmstat("nr_page_table_pages").unwrap_or(0) as i64;
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let of_one = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path().join("status")).ok()?;
        proc::kib(&text, "VmPTE")
    };
    let tables = processes.filter_map(of_one);
    tables.fold(machine, |left, kib| {
        left - (kib * 1024 / PAGE as u64) as i64 - 1
    })
}

/// Each process's share is rounded down to KiB, and a process may change its memory between the
/// two looks.
const UNCOUNTED: i64 = 8;

/// Checks that the machine's count of mapped anonymous pages is that of its processes.
#[track_caller]
fn expect_counted(before: i64) -> Outcome {
    let mut found = before;
    let same = sys::wait_until(Duration::from_secs(6), || {
        found = uncounted();
        found.abs_diff(before) <= UNCOUNTED as u64
    });
    check!(
        same,
        "mapped anonymous pages of the machine beside those of processes: expected {before} as \
         before the scenario, found {found}"
    );
    Ok(())
}

/// Checks that the machine has no more page tables without a process than before, but for those of the kernel,
/// which has one for each 2 MiB that it maps, and of processes that have just ended.
#[track_caller]
fn expect_tables(before: i64) -> Outcome {
    const FEW: i64 = 16;
    let mut found = before;
    let same = sys::wait_until(Duration::from_secs(6), || {
        found = without_process();
        found <= before + FEW
    });
    check!(
        same,
        "page tables of the machine that no process has: expected {before} but for {FEW}, found {found}"
    );
    Ok(())
}

/// Checks that counters are no higher than `before`. Others may migrate pages for a moment, and have
/// huge pages of their own.
#[track_caller]
fn expect_counters(before: [u64; 4]) -> Outcome {
    let mut found = counters();
    let fine = |found: [u64; 4]| {
        let same = found.iter().zip(before).all(|(now, then)| *now <= then);
        same || found[..3] == before[..3] && found[3] <= mapped_huge()
    };
    sys::wait_until(Duration::from_secs(6), || {
        found = counters();
        // Pages that were unlocked may wait in the batch of a CPU.
        fine(found) || proc::drain_batches().is_err()
    });
    check!(
        fine(found),
        "isolated anonymous pages, isolated file pages, locked pages, and huge anonymous pages \
         after the scenario: expected {before:?}, found {found:?}"
    );
    Ok(())
}

/// Runs a scenario with an open device in a process and a memory cgroup of its own. In the end the
/// cgroup must have no charge left, the device must have all of its pages back, and the cgroup must
/// be removable.
#[track_caller]
pub fn settled(ctx: &Ctx, node: usize, body: impl FnOnce(&Target) -> Outcome) -> Outcome {
    settled_in(ctx, node, |target, _| body(target))
}

/// As `settled`, for a scenario that uses its cgroup.
#[track_caller]
pub fn settled_in(ctx: &Ctx, node: usize, body: impl FnOnce(&Target, &Path) -> Outcome) -> Outcome {
    // Skip here if necessary, before anything is set up.
    let observer = Target::open(ctx, node)?;
    let before = observer.stats()?;
    let (machine, counted) = (counters(), uncounted());
    let dir = new_cgroup()?;
    let child = Child::spawn(|| {
        join_cgroup(&dir)?;
        let target = Target::open(ctx, node)?;
        body(&target, &dir)
    })?;
    let exit = child.exit()?;
    // A process that is still in the cgroup would rightly be charged.
    let populated = || fs::read_to_string(dir.join("cgroup.events"));
    let empty = sys::wait_until(Duration::from_secs(5), || {
        populated().is_ok_and(|t| t.contains("populated 0"))
    });
    let left = drained(&dir)?;
    let removed = fs::remove_dir(&dir);
    check_eq!(exit, Exit::Code(0), "end of the scenario");
    check!(empty, "processes of the scenario: expected none in the end");
    removed.or_fail("rmdir of the scenario's cgroup")?;
    check!(
        left <= REST,
        "pages charged for the scenario in the end: expected {REST} of the kernel's at most, \
         found {left}"
    );
    let mut after = observer.stats()?;
    sys::wait_until(Duration::from_secs(2), || {
        // A failed call shows in the final check.
        if let Ok(now) = observer.stats() {
            after = now;
        }
        after.allocated.wrapping_sub(after.freed) == before.allocated.wrapping_sub(before.freed)
    });
    check_eq!(
        after.allocated.wrapping_sub(after.freed),
        before.allocated.wrapping_sub(before.freed),
        "device pages in use"
    );
    expect_counters(machine)?;
    expect_counted(counted)
}

/// The number of pages of a trip: 8 MiB.
const N: usize = 2048;
const TRIPS: usize = 12;
/// Other parts of the machine allocate and free memory meanwhile: up to 40 pages were observed. A
/// leak of one page in 96 is noticed.
const SLACK: u64 = 256;

/// Repeats a trip and checks that free memory stays the same.
fn trips(ctx: &Ctx, node: usize, mut trip: impl FnMut(&Target, usize) -> Outcome) -> Outcome {
    let target = Target::open(ctx, node)?;
    // The first trips also allocate page tables, chunks of the device and slabs.
    trip(&target, 0)?;
    trip(&target, 1)?;
    target.expect_empty()?;
    let (before, tables) = (proc::free_pages()?, without_process());
    for i in 0..TRIPS {
        trip(&target, i)?;
    }
    target.expect_empty()?;
    let mut after = 0;
    sys::wait_until(Duration::from_secs(5), || {
        after = proc::free_pages().unwrap_or(0);
        after + SLACK >= before
    });
    note(&format!("free pages: {before}, then {after}"));
    check!(
        after + SLACK >= before,
        "free pages after {TRIPS} trips of {N}: expected {before} but for {SLACK}, found {after}"
    );
    expect_tables(tables)
}

/// A buffer whose pages are marked by one word each, so that a trip takes little time.
fn marked(seed: u64) -> Outcome<Buffer> {
    let buf = Buffer::anon(N)?;
    mark(&buf, seed);
    Ok(buf)
}

fn mark(buf: &Buffer, seed: u64) {
    for page in 0..buf.pages() {
        buf.set(page, 1, seed ^ ((page as u64) << 16));
    }
}

fn check_marks(buf: &Buffer, first: usize, n: usize, seed: u64) -> Outcome {
    for page in first..first + n {
        let found = buf.get(page, 1);
        let expected = seed ^ ((page as u64) << 16);
        check!(
            found == expected,
            "mark of page {page}: expected {expected:#x}, found {found:#x}"
        );
    }
    Ok(())
}

/// Moves a whole buffer in pieces, so that the returned data needs little memory.
fn send(target: &Target, buf: &Buffer) -> Outcome {
    for first in (0..buf.pages()).step_by(HUGE_PAGES) {
        target
            .to_device(buf, first, HUGE_PAGES)
            .or_fail("MIGRATE_TO_DEV")?;
    }
    target.expect(buf, 0, buf.pages(), buf.pages())
}

/// To the device and back, by request, and by a fault if there is one.
fn back(ctx: &Ctx, node: usize) -> Outcome {
    trips(ctx, node, |target, i| {
        let buf = marked(i as u64)?;
        send(target, &buf)?;
        if i % 2 == 0 {
            target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
        }
        check_marks(&buf, 0, N, i as u64)?;
        Ok(())
    })
}

/// The pages are freed on the device.
fn unmapped(ctx: &Ctx, node: usize) -> Outcome {
    trips(ctx, node, |target, i| {
        let buf = marked(i as u64)?;
        send(target, &buf)?;
        if i % 2 == 0 {
            buf.advise(0, N / 2, libc::MADV_DONTNEED)?;
            buf.unmap(N / 2, N / 2)?;
        }
        Ok(())
    })
}

/// The end of a process that shares the pages frees them.
fn exit(ctx: &Ctx, node: usize) -> Outcome {
    trips(ctx, node, |target, i| {
        let buf = marked(i as u64)?;
        send(target, &buf)?;
        Child::spawn(|| check_marks(&buf, 0, N, i as u64))?.join()?;
        drop(buf);
        Child::spawn(|| {
            let target = Target::open(ctx, node)?;
            let buf = marked(i as u64)?;
            send(&target, &buf)?;
            sys::exit_now(0)
        })?
        .join()
    })
}

/// The close of the file brings the pages back.
fn close(ctx: &Ctx, node: usize) -> Outcome {
    trips(ctx, node, |_, i| {
        let buf = marked(i as u64)?;
        let target = Target::open(ctx, node)?;
        send(&target, &buf)?;
        drop(target);
        check_marks(&buf, 0, N, i as u64)
    })
}

/// Huge pages are freed in turn on the device and after they have come back.
fn huge(ctx: &Ctx, node: usize) -> Outcome {
    trips(ctx, node, |target, i| {
        let buf = huge_filled(N / HUGE_PAGES, 0)?;
        mark(&buf, i as u64);
        send(target, &buf)?;
        match i % 3 {
            0 => drop(target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?),
            1 => check_marks(&buf, 0, N, i as u64)?,
            _ => {}
        }
        Ok(())
    })
}

/// A part of a huge page comes back, is freed, or is written by a child.
fn parts(ctx: &Ctx, node: usize) -> Outcome {
    trips(ctx, node, |target, i| {
        let buf = huge_filled(N / HUGE_PAGES, 0)?;
        mark(&buf, i as u64);
        send(target, &buf)?;
        for first in (0..N).step_by(HUGE_PAGES) {
            match (first / HUGE_PAGES + i) % 4 {
                0 => drop(target.to_system(&buf, first + 7, 100).or_fail("back")?),
                1 => buf.advise(first + 100, 30, libc::MADV_DONTNEED)?,
                2 => buf.unmap(first, HUGE_PAGES / 2)?,
                _ => Child::spawn(|| {
                    buf.set(first + 1, 1, 1);
                    buf.set(first + 300, 1, 1);
                    Ok(())
                })?
                .join()?,
            }
        }
        Ok(())
    })
}

/// The CPU reads each page.
fn read_all(buf: &Buffer) {
    for page in 0..buf.pages() {
        buf.get(page, 0);
    }
}

/// Holes get a page on the device, and so does the page of zeroes, small and huge.
fn zero(ctx: &Ctx, node: usize) -> Outcome {
    // The huge page of zeroes is made once, and goes with its last user.
    let keep = Buffer::anon_huge_aligned(HUGE_PAGES)?;
    keep.advise(0, HUGE_PAGES, libc::MADV_HUGEPAGE)?;
    check_eq!(keep.get(0, 0), 0, "a word of the page of zeroes");
    trips(ctx, node, |target, i| {
        let buf = Buffer::anon_huge_aligned(N)?;
        if i % 2 == 0 {
            buf.advise(0, N, libc::MADV_HUGEPAGE)?;
        }
        // A leak of one page in each must not be lost among the kernel's own.
        for _ in 0..if i % 4 == 2 { 4 } else { 0 } {
            read_all(&buf);
            send(target, &buf)?;
            buf.advise(0, N, libc::MADV_DONTNEED)?;
        }
        if i % 4 == 3 {
            read_all(&buf);
        }
        send(target, &buf)?;
        for page in (0..N).step_by(61) {
            check_eq!(buf.get(page, 0), 0, "a word of fresh memory");
        }
        if i % 3 == 0 {
            target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
        }
        Ok(())
    })
}

/// The charge of a cgroup does not depend on where its pages are, small or huge, and is zero when
/// they are freed.
fn charge(ctx: &Ctx, node: usize) -> Outcome {
    // Charges are taken in batches of 64 pages, on each of a few CPUs.
    const STOCK: u64 = 512;
    settled_in(ctx, node, |target, dir| {
        // The first trip is charged for a heap that stays.
        send(target, &marked(3)?)?;
        for huge in [false, true] {
            let start = current(dir)?;
            let buf = match huge {
                false => marked(3)?,
                true => huge_filled(N / HUGE_PAGES, 0)?,
            };
            mark(&buf, 3);
            let full = current(dir)?;
            let near = |when: &str, expected: u64| -> Outcome {
                let found = current(dir)?;
                check!(
                    found.abs_diff(expected) <= STOCK,
                    "memory.current {when}, huge {huge}: expected {expected} +- {STOCK}, found \
                     {found}"
                );
                Ok(())
            };
            near("with the buffer", start + N as u64)?;
            for _ in 0..2 {
                send(target, &buf)?;
                near("with the pages on the device", full)?;
                target.bring_back(&buf, 0, N)?;
                near("with the pages back", full)?;
            }
            check_marks(&buf, 0, N, 3)?;
            send(target, &buf)?;
            // Half of the pages are freed on the device; the rest comes back.
            buf.unmap(0, N / 2)?;
            near("with a half freed on the device", start + N as u64 / 2)?;
            target.bring_back(&buf, N / 2, N / 2)?;
            near("with the other half back", start + N as u64 / 2)?;
            check_marks(&buf, N / 2, N / 2, 3)?;
            drop(buf);
            near("with nothing left", start)?;
            let mut anon = u64::MAX;
            // The statistics are flushed every two seconds.
            sys::wait_until(Duration::from_secs(6), || {
                anon = charged(dir).unwrap_or(u64::MAX);
                anon < N as u64 / 2
            });
            if anon >= N as u64 / 2 {
                return Err(Fail::failed(format!(
                    "anon in memory.stat with nothing left: expected few, found {anon}"
                )));
            }
        }
        Ok(())
    })
}
