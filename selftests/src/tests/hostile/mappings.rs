// SPDX-License-Identifier: GPL-2.0

//! Every ioctl on every kind of memory, and with every kind of bytes.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use libc::EFAULT;
use nix::sys::resource::Resource;

use super::{Numbers, PINS, as_nobody, every_ioctl, works};
use crate::check;
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE};
use crate::harness::Child;
use crate::sys;
use crate::tests::target::{COHERENT, GENERIC, PRIVATE};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::uring::Uring;

pub const TESTS: &[Test] = &[
    test("hostile.secret_memory", secret_memory),
    test("hostile.foreign_mappings", foreign_mappings),
    test("hostile.mappings_of_devices", mappings_of_devices),
    test("hostile.any_bytes", any_bytes),
    test("hostile.address_space_in_motion", address_space_in_motion),
];

/// The address of the vDSO.
fn vdso() -> Outcome<Option<u64>> {
    let maps = fs::read_to_string("/proc/self/maps").or_fail("maps")?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    Ok(line.and_then(|line| u64::from_str_radix(line.split_once('-')?.0, 16).ok()))
}

/// Secret memory, which is not in the kernel's direct map, is not accessible to a device, just as
/// GUP refuses it. Neither side of a copy crashes, and the process keeps its secret.
fn secret_memory(ctx: &Ctx) -> Outcome {
    const N: usize = 4;
    let file = match sys::memfd_secret(N as u64 * PAGE as u64) {
        Ok(file) => file,
        Err(err) => return Err(Fail::Skip(format!("memfd_secret: {err}"))),
    };
    for node in [PRIVATE, COHERENT, GENERIC] {
        // The machine may lack memory for some kinds of devices.
        let Ok(device) = Device::try_open(node) else {
            continue;
        };
        let buf = Buffer::shared(&file, N)?;
        buf.fill(0, N, 1606);
        expect_errno(device.read(&buf, 0, N), &[EFAULT], "READ of secret memory")?;
        let write = device.write(&buf, 1, &vec![7; PAGE]);
        expect_errno(write, &[EFAULT], "WRITE of secret memory")?;
        for flags in [0, ZDM_FAULT_WRITE] {
            let result = device.fault(buf.at(0), N as u64, flags);
            expect_errno(result, &[EFAULT], "ZDM_FAULT of secret memory")?;
        }
        for flags in PINS {
            let result = device.pin(&buf, 0, 1, flags);
            expect_errno(result, &[EFAULT], "ZDM_PIN of secret memory")?;
        }
        let result = device.to_device(&buf, 0, N);
        check!(
            result.is_err(),
            "MIGRATE_TO_DEV of secret memory: expected an error"
        );
        every_ioctl(&device, buf.at(0), N)?;
        // The process itself may use its secret memory as the other end of a copy.
        let plain = Buffer::filled(N, 1613)?;
        device
            .command(HMM_READ, plain.at(0), N as u64, Data::At(&buf, 0))
            .or_fail("READ into secret memory")?;
        buf.check(0, N, 1613)?;
        // A range that ends in secret memory returns no part of it.
        let near = Buffer::filled(2, 1614)?;
        Buffer::shared(&file, 1)?.move_pages(0, 1, &near, 1)?;
        let mut room = vec![0; 2 * PAGE];
        let result = device.command(HMM_READ, near.at(0), 2, Data::Into(&mut room));
        expect_errno(result, &[EFAULT], "READ up to secret memory")?;
        check!(
            room[PAGE..].iter().all(|&b| b == 0),
            "secret bytes in the buffer: expected none"
        );
    }
    works(ctx)
}

/// Memory that devices must not have: each special mapping that user space can make.
fn foreign_mappings(ctx: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let mut buffers = Vec::new();
    if let Ok(buf) = Buffer::hugetlb(HUGE_PAGES) {
        // Without reserved pages the first access gives SIGBUS, or EFAULT in a system call.
        buffers.push(buf);
    }
    let uring = Uring::new().ok();
    if let Some(ring) = uring.as_ref().and_then(|uring| uring.ring().ok()) {
        buffers.push(ring);
    }
    for buf in &buffers {
        every_ioctl(&device, buf.at(0), buf.pages().min(4))?;
    }
    if let Some(addr) = vdso()? {
        every_ioctl(&device, addr, 1)?;
        // The pages before the vDSO are its data pages, which are special, too.
        every_ioctl(&device, addr - 4 * PAGE as u64, 4)?;
    }
    // The vsyscall page, the first page of the kernel's half, and the last page.
    for addr in [
        0xffff_ffff_ff60_0000,
        0x7fff_ffff_f000,
        0x8000_0000_0000,
        !0xfff,
    ] {
        every_ioctl(&device, addr, 1)?;
    }
    works(ctx)
}

/// The device's own mapping, and that of another device.
fn mappings_of_devices(ctx: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let other = Device::open(1)?;
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        for owner in [&device, &other] {
            let buf = owner.map(4, flags).or_fail("mmap")?;
            buf.fill(0, 4, 1607);
            for device in [&device, &other] {
                every_ioctl(device, buf.at(0), 4)?;
            }
            buf.check(0, 4, 1607)?;
        }
    }
    works(ctx)
}

/// Every ioctl with every kind of argument, by a user without capabilities.
fn any_bytes(ctx: &Ctx) -> Outcome {
    const PAGES: usize = 16;
    let device = Device::open(0)?;
    let before = device.audit()?.0.total;
    as_nobody(|| {
        sys::limit(Resource::RLIMIT_MEMLOCK, 64 * PAGE as u64).or_fail("setrlimit")?;
        // Pages behind the used ones are not mapped, so that nothing is written there.
        let buf = Buffer::filled(PAGES + 64, 1608)?;
        buf.unmap(PAGES, 64)?;
        let own = Device::open(0).or_else(|_| Device::open(0));
        let device = own.as_ref().unwrap_or(&device);
        let words = [
            0,
            1,
            4,
            PAGES as u64,
            65536,
            1 << 20,
            buf.at(0),
            buf.at(0) + 1,
            buf.at(3),
            buf.at(PAGES - 1),
            8,
            PAGE as u64,
            0x7fff_ffff_f000,
            0x8000_0000_0000,
            0xffff_8880_0000_0000,
            1 << 52,
            1 << 63,
            u64::MAX >> 12,
            u64::MAX - 0xfff,
            u64::MAX,
        ];
        let requests = [
            HMM_READ,
            HMM_WRITE,
            HMM_MIGRATE_TO_DEV,
            HMM_MIGRATE_TO_SYS,
            HMM_EXCLUSIVE,
            HMM_CHECK_EXCLUSIVE,
            HMM_FLAGS,
            HMM_READ_UNLOCKED,
            ZDM_FAULT,
            ZDM_INSPECT,
            ZDM_AUDIT,
            ZDM_PIN,
            ZDM_UNPIN,
            ZDM_INJECT,
            ZDM_STATS,
        ];
        let mut numbers = Numbers(0x1234_5678_9abc_def1);
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            let mut request = numbers.pick(&requests);
            if request & 0x40 != 0 && numbers.next() % 4 == 0 {
                // The size of a structure is its version.
                let size = numbers.pick(&[0, 1, 7, 8, 24, 40, 63, 100, 256]);
                request = (request & !(0x3fff << 16)) | (size << 16);
            }
            let mut arg: Vec<u8> = (0..32)
                .flat_map(|_| numbers.pick(&words).to_ne_bytes())
                .collect();
            let _ = device.ioctl_bytes(request, &mut arg);
        }
        Ok(())
    })?;
    device.expect_violations(before)?;
    works(ctx)
}

/// Every ioctl while the address space changes.
fn address_space_in_motion(ctx: &Ctx) -> Outcome {
    const PAGES: usize = 64;
    let before = Device::open(0)?.audit()?.0.total;
    Child::spawn(|| {
        let device = Device::open(0)?;
        let buf = Buffer::filled(PAGES, 1609)?;
        let stop = AtomicBool::new(false);
        let stopped = || stop.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut numbers = Numbers(7);
                while !stopped() {
                    let first = (numbers.next() % 48) as usize;
                    let n = 1 + (numbers.next() % 16) as usize;
                    let _ = buf.unmap(first, n);
                    let _ = buf.map_again(first, n);
                }
            });
            scope.spawn(|| {
                let mut numbers = Numbers(11);
                while !stopped() {
                    let first = (numbers.next() % 48) as usize;
                    let _ = buf.try_advise(first, 16, libc::MADV_DONTNEED);
                    let _ = buf.try_advise(first, 16, libc::MADV_POPULATE_WRITE);
                    let _ = buf.try_advise(first, 16, libc::MADV_PAGEOUT);
                }
            });
            scope.spawn(|| {
                while !stopped() {
                    if let Ok(pid) = sys::fork(|| 0) {
                        let _ = sys::wait(pid, true);
                    }
                }
            });
            let end = Instant::now() + Duration::from_secs(5);
            let mut result = Ok(());
            while result.is_ok() && Instant::now() < end {
                result = every_ioctl(&device, buf.at(0), PAGES);
            }
            stop.store(true, Ordering::Relaxed);
            result
        })
    })?
    .join()?;
    Device::open(0)?.expect_violations(before)?;
    works(ctx)
}
