// SPDX-License-Identifier: GPL-2.0

//! Exclusive access of the device to pages in system memory, and the events that end it.

pub mod paths;

use std::io::{Read, Write};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::target::{COHERENT, GENERIC, PRIVATE, Target, expect_huge, huge_filled};
use super::{Ctx, PAGES, Test, expect_present, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::threads;
use crate::{check, check_eq, numa, proc};

pub const TESTS: &[Test] = &[
    test("exclusive.grant", grant),
    test("exclusive.absent", absent),
    test("exclusive.refused", refused),
    test("exclusive.cpu_read", cpu_read),
    test("exclusive.cpu_write", cpu_write),
    test("exclusive.syscall", syscall),
    test("exclusive.device_write", device_write),
    test("exclusive.fork", fork),
    test("exclusive.fork_meanwhile", fork_meanwhile),
    test("exclusive.munmap", munmap),
    test("exclusive.mremap", mremap),
    test("exclusive.mprotect", mprotect),
    test("exclusive.migrate", migrate),
    test("exclusive.huge", huge),
    test("exclusive.migrated", migrated::<PRIVATE>),
    test("exclusive.two_openers", two_openers),
    test("exclusive.close", close),
    test("exclusive.exit", exit),
    test("exclusive_coherent.migrated", migrated::<COHERENT>),
    test("exclusive_generic.migrated", migrated::<GENERIC>),
];

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Keeps NUMA balancing away from the process and its children. The notifiers hear of it as they hear of
/// mprotect(2), which ends exclusive access, and it comes when it likes.
fn keep() {
    // A kernel without NUMA has no such call.
    let _ = numa::no_balancing();
}

/// Takes exclusive access to a whole buffer that holds the pattern of `seed`.
#[track_caller]
fn take(device: &Device, buf: &Buffer, seed: u64) -> Outcome {
    keep();
    let n = buf.pages();
    let taken = device.exclusive(buf, 0, n).or_fail("EXCLUSIVE")?;
    check_bytes(&taken.data, seed, 0, "data that EXCLUSIVE returned")?;
    if taken.cpages != n as u64 {
        return Err(Fail::failed(format!(
            "pages that EXCLUSIVE says it copied: expected {n}, found {}",
            taken.cpages
        )));
    }
    held(device, buf, 0, n)
}

/// Checks that the device has exclusive access to each of the pages.
#[track_caller]
fn held(device: &Device, buf: &Buffer, first: usize, n: usize) -> Outcome {
    for page in first..first + n {
        let result = device.check_exclusive(buf, page, 1);
        let what = format!("CHECK_EXCLUSIVE of page {page}");
        expect_errno(result, &[libc::EPERM], &what)?;
    }
    match proc::present(buf, first, n)? {
        0 => Ok(()),
        found => Err(Fail::failed(format!(
            "present pages: expected 0, found {found}"
        ))),
    }
}

/// Checks that the device has exclusive access to none of the pages.
#[track_caller]
fn lost(device: &Device, buf: &Buffer, first: usize, n: usize) -> Outcome {
    device
        .check_exclusive(buf, first, n)
        .or_fail("CHECK_EXCLUSIVE of what was taken away")
}

fn grant(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 310)?;
    lost(&device, &buf, 0, PAGES)?;
    let before = device.stats()?;
    take(&device, &buf, 310)?;
    let after = device.stats()?;
    let got = after.exclusive.wrapping_sub(before.exclusive);
    check_eq!(got, PAGES as u64, "growth of stats.exclusive");
    // A single exclusive page in the range is an error.
    let result = device.check_exclusive(&buf, 0, PAGES);
    expect_errno(result, &[libc::EPERM], "CHECK_EXCLUSIVE of all")?;
    // A read of the device does not end its exclusive access.
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 310, 0, "READ")?;
    held(&device, &buf, 0, PAGES)?;
    // The pages can be taken again, although the CPU gets them for a moment.
    take(&device, &buf, 310)?;
    let (audit, _) = device.audit()?;
    check_eq!(audit.used, 0, "used pages in the audit");
    buf.check(0, PAGES, 310)
}

/// Missing pages and the zero page are replaced by new pages.
fn absent(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::anon(PAGES)?;
    buf.check_zero(PAGES / 3, PAGES / 3)?;
    let taken = device.exclusive(&buf, 0, PAGES).or_fail("EXCLUSIVE")?;
    let nonzero = taken.data.iter().position(|b| *b != 0);
    check_eq!(nonzero, None, "first byte that is not 0");
    held(&device, &buf, 0, PAGES)?;
    buf.check_zero(0, PAGES)?;
    buf.fill(0, PAGES, 311);
    lost(&device, &buf, 0, PAGES)?;
    buf.check(0, PAGES, 311)?;
    // The new page in the place of the zero page must be another one.
    Buffer::anon(4)?.check_zero(0, 4)
}

/// A device cannot get exclusive access to memory that the process may not write.
fn refused(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(8, 312)?;
    buf.protect(0, 2, libc::PROT_READ)?;
    buf.protect(2, 1, libc::PROT_NONE)?;
    buf.unmap(3, 1)?;
    for page in 0..4 {
        let result = device.exclusive(&buf, page, 1);
        let what = format!("EXCLUSIVE of page {page}");
        expect_errno(result, &[libc::EFAULT], &what)?;
        lost(&device, &buf, page, 1)?;
    }
    let file = sys::memfd("zdm-exclusive").or_fail("memfd_create")?;
    file.set_len(4 * 4096).or_fail("ftruncate")?;
    let shared = Buffer::shared(&file, 4)?;
    shared.fill(0, 4, 313);
    let result = device.exclusive(&shared, 0, 4);
    expect_errno(result, &[libc::EOPNOTSUPP], "EXCLUSIVE of a file's pages")?;
    lost(&device, &shared, 0, 4)?;
    shared.check(0, 4, 313)?;
    // Pages before the refused one may be exclusive now, but a CPU access ends that.
    buf.unmap(6, 1)?;
    let result = device.exclusive(&buf, 4, 4);
    expect_errno(result, &[libc::EFAULT], "EXCLUSIVE across a hole")?;
    buf.protect(0, 3, RW)?;
    buf.check(0, 3, 312)?;
    buf.check(4, 2, 312)?;
    buf.check(7, 1, 312)?;
    lost(&device, &buf, 0, 8)
}

/// A read of the CPU ends the access to one page, and to no other.
fn cpu_read(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 314)?;
    take(&device, &buf, 314)?;
    let (first, second) = (5, PAGES - 1);
    for page in [first, second] {
        buf.check(page, 1, 314)?;
        lost(&device, &buf, page, 1)?;
        expect_present(&buf, page, 1)?;
    }
    held(&device, &buf, 0, first)?;
    held(&device, &buf, first + 1, second - first - 1)?;
    let result = device.check_exclusive(&buf, 0, PAGES);
    expect_errno(result, &[libc::EPERM], "CHECK_EXCLUSIVE of a mixture")?;
    buf.check(0, PAGES, 314)?;
    lost(&device, &buf, 0, PAGES)?;
    expect_present(&buf, 0, PAGES)
}

fn cpu_write(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 315)?;
    take(&device, &buf, 315)?;
    buf.fill(3, 4, 316);
    lost(&device, &buf, 3, 4)?;
    held(&device, &buf, 0, 3)?;
    held(&device, &buf, 7, PAGES - 7)?;
    // The device must not read the page's old content.
    let read = device.read(&buf, 3, 4).or_fail("READ")?;
    check_bytes(&read.data, 316, 3, "READ of what the CPU wrote")?;
    buf.fill(0, PAGES, 317);
    lost(&device, &buf, 0, PAGES)?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 317, 0, "READ of what the CPU wrote")?;
    buf.check(0, PAGES, 317)
}

/// An access of the kernel for the process counts as an access of the CPU.
fn syscall(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(8, 318)?;
    take(&device, &buf, 318)?;
    let file = sys::memfd("zdm-exclusive").or_fail("memfd_create")?;
    let n = buf.write_to(&file, 0, 4).or_fail("write")?;
    check_eq!(n, 4 * 4096, "bytes written");
    lost(&device, &buf, 0, 4)?;
    held(&device, &buf, 4, 4)?;
    let mut data = vec![0; n];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut data, 0).or_fail("pread")?;
    check_bytes(&data, 318, 0, "data in the file")?;
    buf.check(0, 8, 318)
}

/// The device writes to exclusive pages without a fault and keeps the access; a read by another
/// file ends it.
fn device_write(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 319)?;
    take(&device, &buf, 319)?;
    let data = pattern_bytes(320, 0, 8);
    let written = device.write(&buf, 0, &data).or_fail("WRITE")?;
    check_eq!(written.faults, 0, "faults of WRITE");
    held(&device, &buf, 0, PAGES)?;
    let other = Device::open(0)?;
    let read = other.read(&buf, 8, 8).or_fail("READ by another file")?;
    check_bytes(&read.data, 319, 8, "READ by another file")?;
    held(&device, &buf, 0, 8)?;
    lost(&device, &buf, 8, 8)?;
    held(&device, &buf, 16, PAGES - 16)?;
    buf.check(0, 8, 320)?;
    buf.check(8, PAGES - 8, 319)
}

/// After a fork both processes have the data, neither sees the writes of the other, and the device
/// has lost its exclusive access.
fn fork(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 321)?;
    take(&device, &buf, 321)?;
    let (mut wait, go) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        buf.check(0, PAGES, 321)?;
        buf.fill(0, PAGES / 2, 322);
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        buf.check(0, PAGES / 2, 322)?;
        buf.check(PAGES / 2, PAGES - PAGES / 2, 321)
    })?;
    lost(&device, &buf, 0, PAGES)?;
    // While the child lives the pages are shared: exclusive access of the parent must not affect
    // the child.
    take(&device, &buf, 321)?;
    buf.fill(0, PAGES, 323);
    lost(&device, &buf, 0, PAGES)?;
    (&go).write_all(b"g").or_fail("pipe")?;
    child.join()?;
    buf.check(0, PAGES, 323)?;
    let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 323, 0, "READ after fork")
}

/// A process forks while a thread takes exclusive access, one page after the other. fork() waits for a page whose
/// folio the thread has locked.
fn fork_meanwhile(_: &Ctx) -> Outcome {
    const FORKS: usize = 30;
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 345)?;
    keep();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (over, device, buf) = (&over, &device, &buf);
        let taking = scope.spawn(move || -> Outcome<usize> {
            let mut rounds = 0;
            while !over.load(Ordering::SeqCst) {
                // fork() takes pages away before they are read back.
                if let Err(e) = device.exclusive(buf, 0, PAGES) {
                    expect_errno::<()>(Err(e), &[libc::ENOENT], "EXCLUSIVE")?;
                }
                rounds += 1;
            }
            Ok(rounds)
        });
        let forking = {
            let _over = threads::SetOnDrop(over);
            (0..FORKS).try_for_each(|fork| {
                std::thread::sleep(Duration::from_millis(fork as u64 % 5));
                Child::spawn(|| buf.check(0, PAGES, 345))?.join()
            })
        };
        let rounds = threads::join(taking)?;
        note(&format!("the pages were taken {rounds} times"));
        forking
    })?;
    buf.check(0, PAGES, 345)
}

fn munmap(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 324)?;
    take(&device, &buf, 324)?;
    buf.unmap(8, 8)?;
    lost(&device, &buf, 8, 8)?;
    held(&device, &buf, 0, 8)?;
    let result = device.read(&buf, 8, 1);
    expect_errno(result, &[libc::EFAULT], "READ of what is unmapped")?;
    buf.map_again(8, 8)?;
    lost(&device, &buf, 8, 8)?;
    buf.check_zero(8, 8)?;
    buf.advise(32, 8, libc::MADV_DONTNEED)?;
    lost(&device, &buf, 32, 8)?;
    buf.check_zero(32, 8)?;
    buf.check(0, 8, 324)?;
    buf.check(16, 16, 324)?;
    buf.check(40, PAGES - 40, 324)
}

/// Exclusive access belongs to an address, not to a page.
fn mremap(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(8, 325)?;
    take(&device, &buf, 325)?;
    let place = Buffer::anon(8)?;
    buf.move_pages(0, 8, &place, 0)?;
    lost(&device, &buf, 0, 8)?;
    lost(&device, &place, 0, 8)?;
    place.check(0, 8, 325)?;
    take(&device, &place, 325)?;
    place.check(0, 8, 325)
}

fn mprotect(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 326)?;
    take(&device, &buf, 326)?;
    buf.protect(0, PAGES / 2, libc::PROT_READ)?;
    lost(&device, &buf, 0, PAGES / 2)?;
    let data = pattern_bytes(327, 0, PAGES / 2);
    let result = device.write(&buf, 0, &data);
    expect_errno(result, &[libc::EPERM], "WRITE to read-only pages")?;
    Child::expect_segv(
        || {
            buf.set(1, 0, 1);
        },
        "write to a read-only page",
    )?;
    buf.check(0, PAGES / 2, 326)?;
    buf.protect(0, PAGES / 2, RW)?;
    buf.check(0, PAGES, 326)?;
    take(&device, &buf, 326)?;
    buf.fill(0, PAGES, 328);
    buf.check(0, PAGES, 328)
}

/// An exclusive page does not migrate and loses no data.
fn migrate(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(8, 329)?;
    take(&device, &buf, 329)?;
    let before = device.stats()?;
    match device.to_device(&buf, 0, 8) {
        // The C driver returns the data of pages that it has mapped, wherever they are.
        Ok(moved) => check_bytes(&moved.data, 329, 0, "returned data")?,
        Err(e) => check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV"),
    }
    let went = device.stats()?.to_device.wrapping_sub(before.to_device);
    check_eq!(went, 0, "pages that went though they are held");
    buf.check(0, 8, 329)?;
    lost(&device, &buf, 0, 8)?;
    device.move_all(&buf, 329)?;
    buf.check(0, 8, 329)
}

/// The entry of a huge page is split; the data stays the same.
fn huge(_: &Ctx) -> Outcome {
    const N: usize = HUGE_PAGES;
    let device = Device::open(0)?;
    let buf = huge_filled(1, 330)?;
    let taken = device.exclusive(&buf, 100, 40).or_fail("EXCLUSIVE")?;
    check_bytes(&taken.data, 330, 100, "data that EXCLUSIVE returned")?;
    held(&device, &buf, 100, 40)?;
    lost(&device, &buf, 0, 100)?;
    lost(&device, &buf, 140, N - 140)?;
    expect_huge(&buf, 0, N, 0)?;
    expect_present(&buf, 0, 100)?;
    buf.check(0, N, 330)?;
    lost(&device, &buf, 0, N)?;
    buf.fill(0, N, 331);
    buf.check(0, N, 331)
}

/// PRIVATE pages come back first; COHERENT and GENERIC pages stay on the device.
fn migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 332)?;
    target.move_all(&buf, 332)?;
    let taken = target.exclusive(&buf, 0, PAGES).or_fail("EXCLUSIVE")?;
    check_bytes(&taken.data, 332, 0, "data that EXCLUSIVE returned")?;
    held(&target, &buf, 0, PAGES)?;
    let used = if target.cpu_maps() { PAGES } else { 0 };
    check_eq!(target.audit()?.0.used, used as u64, "used pages");
    buf.check(0, PAGES / 2, 332)?;
    lost(&target, &buf, 0, PAGES / 2)?;
    buf.fill(PAGES / 2, PAGES - PAGES / 2, 333);
    lost(&target, &buf, 0, PAGES)?;
    let expect = || -> Outcome {
        buf.check(0, PAGES / 2, 332)?;
        buf.check(PAGES / 2, PAGES - PAGES / 2, 333)
    };
    expect()?;
    target.bring_back(&buf, 0, PAGES)?;
    expect()?;
    target.expect_empty()
}

/// Two files of one device or of two take the same pages from each other for a while. Each makes
/// progress, and no data is lost.
fn two_openers(_: &Ctx) -> Outcome {
    const ROUNDS: usize = 100;
    const LIMIT: Duration = Duration::from_secs(20);
    for node in [0, 1] {
        let (a, b) = (Device::open(0)?, Device::open(node)?);
        let buf = Buffer::filled(4, 334)?;
        let start = Barrier::new(2);
        let begun = Instant::now();
        let fight = |device: &Device| -> Outcome<usize> {
            let mut won = 0;
            start.wait();
            for _ in 0..ROUNDS {
                match device.exclusive(&buf, 0, 4) {
                    Ok(taken) => {
                        check_bytes(&taken.data, 334, 0, "data in a fight")?;
                        won += 1;
                    }
                    // The other file took the page before the data was read.
                    Err(e) => {
                        check!(
                            matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EBUSY)),
                            "EXCLUSIVE in a fight: expected success, ENOENT or EBUSY, found {e}"
                        );
                    }
                }
                check!(
                    begun.elapsed() < LIMIT,
                    "{ROUNDS} rounds: expected an end within {LIMIT:?}, found none"
                );
            }
            Ok(won)
        };
        let (won_a, won_b) = std::thread::scope(|scope| {
            let other = scope.spawn(|| fight(&b));
            let won = fight(&a);
            (won, threads::join(other))
        });
        let (won_a, won_b) = (won_a?, won_b?);
        note(&format!(
            "against node {node}: {won_a} to {won_b} of {ROUNDS}"
        ));
        check!(
            won_a > 0 && won_b > 0,
            "successes: expected some of each, found {won_a} and {won_b}"
        );
        // In the end at most one file has each page.
        for page in 0..4 {
            let free = [&a, &b].map(|d| d.check_exclusive(&buf, page, 1).is_ok());
            check!(
                free.contains(&true),
                "files with page {page} for themselves: expected 1 at most, found 2"
            );
        }
        buf.check(0, 4, 334)?;
        lost(&a, &buf, 0, 4)?;
        lost(&b, &buf, 0, 4)?;
    }
    Ok(())
}

/// The CPU has its pages after the file is closed.
fn close(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 335)?;
    take(&device, &buf, 335)?;
    drop(device);
    buf.check(0, PAGES / 2, 335)?;
    buf.fill(0, PAGES / 2, 336);
    buf.check(PAGES / 2, PAGES - PAGES / 2, 335)?;
    expect_present(&buf, 0, PAGES)?;

    // Or another file has them, which knows nothing of the first.
    let device = Device::open(0)?;
    buf.fill(0, PAGES, 337);
    take(&device, &buf, 337)?;
    drop(device);
    let device = Device::open(1)?;
    take(&device, &buf, 337)?;
    buf.check(0, PAGES, 337)
}

/// The process ends, in order or not, while the device has its pages.
fn exit(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    for how in 0..3 {
        let buf = Buffer::filled(8, 338)?;
        take(&device, &buf, 338)?;
        let (mut ready, go) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            let device = Device::open(0)?;
            let own = Buffer::filled(PAGES, 339)?;
            take(&device, &own, 339)?;
            (&go).write_all(b"g").or_fail("pipe")?;
            match how {
                // The process ends with its destructors, and without.
                0 => Ok(()),
                1 => sys::exit_now(0),
                _ => loop {
                    std::thread::sleep(Duration::from_secs(1));
                },
            }
        })?;
        ready.read_exact(&mut [0]).or_fail("pipe")?;
        match how {
            2 => check_eq!(child.kill()?, Exit::Signal(libc::SIGKILL), "end"),
            _ => child.join()?,
        }
        // Only the fork ended the parent's access.
        lost(&device, &buf, 0, 8)?;
        take(&device, &buf, 338)?;
        buf.check(0, 8, 338)?;
    }
    Ok(())
}
