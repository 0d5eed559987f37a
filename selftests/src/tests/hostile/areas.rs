// SPDX-License-Identifier: GPL-2.0

//! Areas with rules of their own: protection keys, code that must not change, sealed files, surplus huge
//! pages, files whose pages are remapped. Also addresses that are none of the caller's.

use std::fs;
use std::os::unix::fs::FileExt;

use libc::{EBUSY, EFAULT, EINVAL, ENOENT, EPERM};
use nix::fcntl::SealFlag;

use super::{PINS, every_ioctl, works};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::memory::pattern_words;
use crate::pkey::Key;
use crate::tests::target::{huge_filled, open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq, proc, sys};

pub const TESTS: &[Test] = &[
    test("hostile.protection_keys", protection_keys),
    test("hostile.code_stays", code_stays),
    test("hostile.sealed_file", sealed_file),
    test("hostile.surplus_huge_pages", surplus_huge_pages),
    test("hostile.remapped_file", remapped_file),
    test("hostile.droppable", droppable),
    test("hostile.kernel_addresses", kernel_addresses),
    test("hostile.unaligned_ends", unaligned_ends),
];

const N: usize = 8;

/// Keys hold for the CPU's accesses of a thread: also to the other end of a command, and for pins. The
/// device is no thread, and has the rights of the area. Pages keep their key on the device and on the way back.
fn protection_keys(ctx: &Ctx) -> Outcome {
    let key = Key::new().map_err(|e| Fail::Skip(format!("no protection keys: {e}")))?;
    for target in open_each_kind(ctx)? {
        for huge in [false, true] {
            let buf = match huge {
                true => huge_filled(1, 1740)?,
                false => Buffer::filled(N, 1740)?,
            };
            let n = buf.pages();
            let plain = Buffer::filled(2, 1741)?;
            let forbidden = |place: &str| -> Outcome {
                let what = format!("end of a process that reads what its key forbids, {place}");
                let read = || {
                    buf.get(1, 0);
                };
                Child::expect_segv(read, &what)?;
                Child::expect_segv(|| buf.set(2, 0, 0), &what)?;
                for request in [HMM_READ, HMM_READ_UNLOCKED, HMM_WRITE, HMM_MIGRATE_TO_DEV] {
                    let end = Data::At(&buf, 4);
                    let result = target.command(request, plain.at(0), 2, end);
                    let what = format!("ioctl {request:#x} with a forbidden end, {place}");
                    expect_errno(result, &[EFAULT], &what)?;
                }
                for flags in PINS {
                    let result = target.pin(&buf, 3, 1, flags);
                    expect_errno(result, &[EFAULT], &format!("ZDM_PIN {flags:#x}, {place}"))?;
                }
                Ok(())
            };
            let both = libc::PROT_READ | libc::PROT_WRITE;
            key.protect(&buf, 0, n, both).or_fail("pkey_mprotect")?;
            key.forbid(true);
            let result = (|| -> Outcome {
                forbidden("in system memory")?;
                let moved = target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
                check_bytes(&moved.data, 1740, 0, "MIGRATE_TO_DEV")?;
                forbidden("on the device")?;
                target
                    .write(&buf, 6, &pattern_bytes(1742, 6, 1))
                    .or_fail("WRITE")?;
                target.to_system(&buf, 0, n).or_fail("MIGRATE_TO_SYS")?;
                forbidden("back in system memory")?;
                target.exclusive(&buf, 0, 2).or_fail("EXCLUSIVE")?;
                forbidden("exclusive")
            })();
            key.forbid(false);
            result?;
            buf.check(0, 6, 1740)?;
            buf.check(6, 1, 1742)?;
            buf.check(7, n - 7, 1740)?;
            plain.check(0, 2, 1741)?;
        }
    }
    works(ctx)
}

/// The device does not write to code, nor to what a process cannot make writable.
fn code_stays(ctx: &Ctx) -> Outcome {
    let code = || -> Outcome<u64> {
        let maps = fs::read_to_string("/proc/self/maps").or_fail("maps")?;
        let line = maps.lines().find(|line| line.contains("r-xp"));
        let start = line.and_then(|line| u64::from_str_radix(line.split('-').next()?, 16).ok());
        start.ok_or_else(|| Fail::failed("no code in /proc/self/maps"))
    };
    for target in open_all(ctx)? {
        let node = target.node();
        Child::spawn(|| {
            sys::deny_write_execute().map_err(|e| Fail::Skip(format!("no PR_SET_MDWE: {e}")))?;
            let device = Device::open(node)?;
            let code = code()?;
            let buf = Buffer::filled(N, 1743)?;
            buf.protect(0, N, libc::PROT_READ)?;
            let mut before = vec![0; PAGE];
            device
                .command(HMM_READ, code, 1, Data::Into(&mut before))
                .or_fail("READ of code")?;
            for addr in [code, buf.at(1)] {
                let from = pattern_bytes(1744, 0, 1);
                let result = device.command(HMM_WRITE, addr, 1, Data::From(&from));
                expect_errno(result, &[EPERM, EFAULT], "WRITE to what is read-only")?;
                let result = device.fault(addr, 1, ZDM_FAULT_WRITE);
                expect_errno(result, &[EPERM, EFAULT], "ZDM_FAULT to write")?;
                let mut room = vec![0; PAGE];
                let result = device.command(HMM_EXCLUSIVE, addr, 1, Data::Into(&mut room));
                check!(result.is_err(), "EXCLUSIVE of it: expected an error");
                // What core mm migrates, it migrates without the right to write.
                let _ = device.command(HMM_MIGRATE_TO_DEV, addr, 1, Data::Into(&mut room));
                let result = device.command(HMM_WRITE, addr, 1, Data::From(&from));
                expect_errno(result, &[EPERM, EFAULT], "WRITE after MIGRATE_TO_DEV")?;
            }
            let mut after = vec![0; PAGE];
            device
                .command(HMM_READ, code, 1, Data::Into(&mut after))
                .or_fail("READ of code")?;
            check!(before == after, "code: expected it unchanged");
            buf.check(0, N, 1743)
        })?
        .join()?;
    }
    works(ctx)
}

/// A file is not sealed against writes while a pin may write to it, and nothing writes to it afterwards.
fn sealed_file(ctx: &Ctx) -> Outcome {
    for target in open_all(ctx)? {
        let file = sys::sealable_memfd("zdm-sealed").or_fail("memfd_create")?;
        file.set_len((N * PAGE) as u64).or_fail("ftruncate")?;
        let buf = Buffer::shared(&file, N)?;
        buf.fill(0, N, 1745);
        target
            .write(&buf, 0, &pattern_bytes(1746, 0, N))
            .or_fail("WRITE")?;
        let id = target.pin(&buf, 1, 1, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
        buf.unmap(0, N)?;
        let seal = || sys::add_seals(&file, SealFlag::F_SEAL_WRITE);
        expect_errno(seal(), &[EBUSY], "F_SEAL_WRITE of a pinned file")?;
        target.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
        seal().or_fail("F_SEAL_WRITE")?;
        let copy = Buffer::of_file(&file, N, libc::MAP_PRIVATE).or_fail("mmap")?;
        let read = target.read(&copy, 0, N).or_fail("READ")?;
        check_bytes(&read.data, 1746, 0, "READ")?;
        every_ioctl(&target, copy.at(0), N)?;
        target
            .write(&copy, 0, &pattern_bytes(1747, 0, N))
            .or_fail("WRITE to a private mapping")?;
        let _ = target.to_device(&copy, 0, N);
        let _ = target.exclusive(&copy, 0, 2);
        copy.check(0, N, 1747)?;
        let mut data = vec![0; N * PAGE];
        file.read_exact_at(&mut data, 0).or_fail("read")?;
        check_bytes(&data, 1746, 0, "the sealed file")?;
    }
    works(ctx)
}

/// Huge pages beyond the reserve of hugetlbfs go back when they are unmapped, whatever the device did.
fn surplus_huge_pages(ctx: &Ctx) -> Outcome {
    const OVERCOMMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";
    struct Overcommit;
    impl Drop for Overcommit {
        fn drop(&mut self) {
            let _ = fs::write(OVERCOMMIT, "0");
        }
    }
    let surplus = || -> Outcome<u64> {
        let text = fs::read_to_string("/proc/meminfo").or_fail("meminfo")?;
        let line = text.lines().find_map(|l| l.strip_prefix("HugePages_Surp:"));
        let n = line.and_then(|n| n.trim().parse().ok());
        n.ok_or_else(|| Fail::Skip("no HugePages_Surp in /proc/meminfo".into()))
    };
    let before = surplus()?;
    fs::write(OVERCOMMIT, "4").or_fail(OVERCOMMIT)?;
    let _overcommit = Overcommit;
    for target in open_all(ctx)? {
        let buf = Buffer::hugetlb(HUGE_PAGES).or_fail("mmap of a surplus huge page")?;
        buf.fill(0, HUGE_PAGES, 1748);
        check_eq!(surplus()?, before + 1, "surplus huge pages in use");
        every_ioctl(&target, buf.at(0), HUGE_PAGES)?;
        every_ioctl(&target, buf.at(5), 7)?;
        let id = target.pin(&buf, 9, 1, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
        buf.check(0, HUGE_PAGES, 1748)?;
        target
            .write(&buf, 3, &pattern_bytes(1749, 3, 2))
            .or_fail("WRITE")?;
        buf.check(3, 2, 1749)?;
        drop(buf);
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        check_eq!(surplus()?, before, "surplus huge pages after munmap");
    }
    works(ctx)
}

/// The device sees what remap_file_pages(2) has put in the place of pages that it knew.
fn remapped_file(ctx: &Ctx) -> Outcome {
    for target in open_all(ctx)? {
        let file = sys::memfd("zdm-remapped").or_fail("memfd_create")?;
        file.set_len((N * PAGE) as u64).or_fail("ftruncate")?;
        let buf = Buffer::shared(&file, N)?;
        buf.fill(0, N, 1750);
        let read = target.read(&buf, 0, N).or_fail("READ")?;
        check_bytes(&read.data, 1750, 0, "READ")?;
        buf.remap_file(0, 2, 4).or_fail("remap_file_pages")?;
        let read = target.read(&buf, 0, 2).or_fail("READ of other pages")?;
        check_bytes(&read.data, 1750, 4, "READ of other pages")?;
        target
            .write(&buf, 0, &pattern_bytes(1751, 4, 2))
            .or_fail("WRITE to other pages")?;
        buf.check(4, 2, 1751)?;
        buf.check(2, 2, 1750)?;
        every_ioctl(&target, buf.at(0), N)?;
        let mut data = vec![0; 2 * PAGE];
        file.read_exact_at(&mut data, 0).or_fail("read")?;
        check_bytes(&data, 1750, 0, "the first pages of the file")?;
    }
    works(ctx)
}

/// Memory that the kernel may drop goes to the device and back. It is either there or, where it was dropped,
/// zero.
fn droppable(ctx: &Ctx) -> Outcome {
    for target in open_each_kind(ctx)? {
        for huge in [false, true] {
            let n = if huge { 2 * HUGE_PAGES } else { N };
            let buf =
                Buffer::droppable(n).map_err(|e| Fail::Skip(format!("no MAP_DROPPABLE: {e}")))?;
            let advice = if huge {
                libc::MADV_HUGEPAGE
            } else {
                libc::MADV_NOHUGEPAGE
            };
            let _ = buf.try_advise(0, n, advice);
            buf.fill(0, n, 1757);
            let check = |place: &str| {
                let lost = (0..n).find(|&page| {
                    let words = buf.words(page);
                    words != pattern_words(1757, page) && words.iter().any(|&word| word != 0)
                });
                check!(
                    lost.is_none(),
                    "page {lost:?} {place}: expected it or zeroes"
                );
                Ok(())
            };
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            Child::spawn(|| {
                check("in a child")?;
                buf.fill(0, n, 1758);
                buf.check(0, n, 1758)
            })?
            .join()?;
            check("back")?;
            let _ = target.to_device(&buf, 0, n);
            let _ = buf.try_advise(0, n / 2, libc::MADV_PAGEOUT);
            target.to_system(&buf, 0, n).or_fail("MIGRATE_TO_SYS")?;
            check("back again")?;
            every_ioctl(&target, buf.at(0), N)?;
            check("after every ioctl")?;
            let _ = target.to_device(&buf, 0, n);
            let _ = buf.try_advise(0, n, libc::MADV_FREE);
        }
        target.expect_empty()?;
    }
    works(ctx)
}

/// No command reads from or writes to an address of the kernel, or one that is not canonical.
fn kernel_addresses(ctx: &Ctx) -> Outcome {
    let ends = [
        0xffff_8880_0010_0000u64,
        0xffff_c900_0000_0000,
        0xffff_ffff_8100_0000,
        0xffff_ffff_ff60_0000,
        !0xfff,
        0x7fff_ffff_f000,
        0x8000_0000_0000,
        0x00ff_ffff_ffff_f000,
        1 << 63,
        (1 << 63) - PAGE as u64,
    ];
    for target in open_all(ctx)? {
        let buf = Buffer::filled(N, 1752)?;
        let _ = target.to_device(&buf, 0, N / 2);
        for end in ends {
            for request in [
                HMM_READ,
                HMM_READ_UNLOCKED,
                HMM_WRITE,
                HMM_MIGRATE_TO_DEV,
                HMM_EXCLUSIVE,
                HMM_SNAPSHOT,
            ] {
                let mut arg = [buf.at(0), end, N as u64, 0, 0]
                    .map(u64::to_ne_bytes)
                    .concat();
                let result = target.ioctl_bytes(request, &mut arg);
                let what = format!("ioctl {request:#x} with its other end at {end:#x}");
                // A page that a batch of another CPU holds does not move.
                let errnos = match request {
                    HMM_MIGRATE_TO_DEV => &[EFAULT, ENOENT][..],
                    _ => &[EFAULT],
                };
                expect_errno(result, errnos, &what)?;
                let result = target.ioctl_at(request, end);
                let what = format!("ioctl {request:#x} with its argument at {end:#x}");
                expect_errno(result, &[EFAULT], &what)?;
            }
            let mut inspect = Inspect {
                addr: buf.at(0),
                npages: N as u64,
                pages: end,
                ..Inspect::default()
            };
            let result = target.inspect_with(&mut inspect);
            expect_errno(result, &[EFAULT], &format!("ZDM_INSPECT to {end:#x}"))?;
            for flags in PINS {
                let result = target.pin_at(end & !0xfff, 1, flags);
                expect_errno(result, &[EFAULT, EINVAL], &format!("ZDM_PIN of {end:#x}"))?;
            }
        }
        buf.check(0, N, 1752)?;
    }
    works(ctx)
}

/// The bytes of a buffer.
fn bytes(buf: &Buffer) -> Vec<u8> {
    let words = (0..buf.pages()).flat_map(|page| buf.words(page));
    words.flat_map(u64::to_ne_bytes).collect()
}

/// The other end of a command may begin anywhere, but must be memory that the caller may access.
fn unaligned_ends(ctx: &Ctx) -> Outcome {
    const SHIFT: usize = 123;
    for target in open_all(ctx)? {
        let buf = Buffer::filled(N, 1753)?;
        let place = Buffer::anon(N + 1)?;
        let command = |request| {
            let end = place.at(0) + SHIFT as u64;
            let mut arg = [buf.at(0), end, N as u64, 0, 0]
                .map(u64::to_ne_bytes)
                .concat();
            target.ioctl_bytes(request, &mut arg)
        };
        for request in super::READS {
            place.fill(0, N + 1, 1754);
            let before = bytes(&place);
            command(request).or_fail("a command with an unaligned end")?;
            let after = bytes(&place);
            let end = SHIFT + N * PAGE;
            check_bytes(&after[SHIFT..end], 1753, 0, "unaligned copy")?;
            check!(
                after[..SHIFT] == before[..SHIFT] && after[end..] == before[end..],
                "bytes beside an unaligned copy of ioctl {request:#x}: expected no change"
            );
        }
        place.fill(0, N + 1, 1755);
        command(HMM_WRITE).or_fail("WRITE from an unaligned end")?;
        check!(
            bytes(&buf) == bytes(&place)[SHIFT..SHIFT + N * PAGE],
            "what WRITE wrote from an unaligned end: expected the same bytes"
        );
        // What the caller may only read.
        buf.fill(0, N, 1753);
        place.fill(0, N + 1, 1756);
        place.protect(0, N + 1, libc::PROT_READ)?;
        for request in super::READS.into_iter().chain([HMM_SNAPSHOT]) {
            let into = Data::At(&place, 0);
            let result = target.command(request, buf.at(0), N as u64, into);
            let what = format!("ioctl {request:#x} into what is read-only");
            expect_errno(result, &[EFAULT], &what)?;
        }
        place.check(0, N + 1, 1756)?;
        check_eq!(
            proc::present(&place, 0, N + 1)?,
            N + 1,
            "pages of the place"
        );
        buf.check(0, N, 1753)?;
    }
    works(ctx)
}
