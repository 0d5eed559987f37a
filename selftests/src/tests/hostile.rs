// SPDX-License-Identifier: GPL-2.0

//! A caller with nothing but an open file, who means harm: nothing that such a caller does breaks
//! an invariant, tells a secret, takes memory that is not accounted for, or keeps others waiting.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use libc::{ENOMEM, EPERM};

use super::account::{current, new_cgroup};
use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, Test, test, with};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE};
use crate::harness::Child;
use crate::sys;
use crate::uapi::*;
use crate::uring::Uring;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.no_secrets", no_secrets),
    test("hostile.pins_are_limited", pins_are_limited),
    test("hostile.mapping_is_bounded", mapping_is_bounded),
    test("hostile.mapping_is_charged", mapping_is_charged),
    test(
        "hostile.fail_alloc_is_not_for_others",
        fail_alloc_is_not_for_others,
    ),
    test(
        "hostile.close_does_not_wait_for_others",
        close_does_not_wait_for_others,
    ),
    test(
        "hostile.audit_while_others_migrate",
        audit_while_others_migrate::<PRIVATE>,
    ),
    test("hostile.foreign_mappings", foreign_mappings),
    test("hostile.mappings_of_devices", mappings_of_devices),
    test("hostile.any_bytes", any_bytes),
    test("hostile.address_space_in_motion", address_space_in_motion),
    test(
        "hostile_coherent.audit_while_others_migrate",
        audit_while_others_migrate::<COHERENT>,
    ),
    test(
        "hostile_coherent.pins_outlive_the_file",
        pins_outlive_the_file::<COHERENT>,
    ),
    test(
        "hostile_coherent.splice_outlives_the_file",
        splice_outlives_the_file::<COHERENT>,
    ),
    test(
        "hostile_generic.audit_while_others_migrate",
        audit_while_others_migrate::<GENERIC>,
    ),
    test(
        "hostile_generic.pins_outlive_the_file",
        pins_outlive_the_file::<GENERIC>,
    ),
    test(
        "hostile_generic.splice_outlives_the_file",
        splice_outlives_the_file::<GENERIC>,
    ),
];

/// With chunks that are small enough to fill.
pub const INJECTING: &[Test] = &[
    with(
        "inject=1 devmem_chunk_mb=2",
        test("hostile.release_of_many_chunks", release_of_many_chunks),
    ),
    with(
        "inject=1 devmem_chunk_mb=2",
        test("hostile.nobody_waits_for_release", nobody_waits_for_release),
    ),
    with(
        "inject=1 devmem_chunk_mb=2",
        test("hostile.fault_on_a_tail", fault_on_a_tail),
    ),
];

/// Every upstream command whose data goes to user space.
const READS: [u64; 4] = [
    HMM_READ,
    HMM_READ_UNLOCKED,
    HMM_MIGRATE_TO_DEV,
    HMM_EXCLUSIVE,
];

/// Every flavour of pin.
const PINS: [u32; 6] = [
    0,
    ZDM_PIN_WRITE,
    ZDM_PIN_GET,
    ZDM_PIN_LONGTERM,
    ZDM_PIN_FAST,
    ZDM_PIN_WRITE | ZDM_PIN_LONGTERM | ZDM_PIN_FAST,
];

/// Runs `body` as a user without capabilities.
fn as_nobody(body: impl FnOnce() -> Outcome) -> Outcome {
    Child::spawn(|| {
        sys::become_nobody().or_fail("setresuid")?;
        body()
    })?
    .join()
}

/// Tries every ioctl on a range. What each of them returns is not said here, but what the device
/// wrote is what it read before.
fn every_ioctl(device: &Device, addr: u64, npages: usize) -> Outcome {
    let n = npages as u64;
    let mut room = vec![0; npages * PAGE];
    for request in READS {
        let _ = device.command(request, addr, n, Data::Into(&mut room));
    }
    if device
        .command(HMM_READ, addr, n, Data::Into(&mut room))
        .is_ok()
    {
        let _ = device.command(HMM_WRITE, addr, n, Data::From(&room));
    }
    let _ = device.command(HMM_SNAPSHOT, addr, n, Data::Into(&mut room));
    let _ = device.command(HMM_CHECK_EXCLUSIVE, addr, n, Data::Nowhere);
    for flags in [0, ZDM_FAULT_WRITE] {
        let _ = device.fault(addr, n, flags);
    }
    let _ = device.inspect_at(addr, npages, 0);
    for flags in PINS {
        if let Ok(id) = device.pin_at(addr, n, flags) {
            let _ = device.command(HMM_MIGRATE_TO_DEV, addr, n, Data::Into(&mut room));
            device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        }
    }
    let _ = device.command(HMM_MIGRATE_TO_SYS, addr, n, Data::Nowhere);
    Ok(())
}

/// Checks that a device does its work.
fn works(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(4, 1600)?;
    target.move_all(&buf, 1600)?;
    buf.check(0, 4, 1600)
}

/// Page frame numbers are for CAP_SYS_ADMIN, as in /proc/pid/pagemap.
fn no_secrets(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(4, 1601)?;
    target.move_all(&buf, 1601)?;
    let seen = target.inspect(&buf, 0, 4).or_fail("ZDM_INSPECT")?;
    check!(
        seen.iter().all(|p| p.pfn != 0),
        "page frames that root sees: expected 4, found {seen:x?}"
    );
    as_nobody(|| {
        let seen = target
            .inspect(&buf, 0, 4)
            .or_fail("ZDM_INSPECT by nobody")?;
        check!(
            seen.iter()
                .all(|p| p.pfn == 0 && p.flags & ZDM_PAGE_THERE != 0),
            "pages that nobody sees: expected 4 without a number, found {seen:x?}"
        );
        let result = target.try_audit(ZDM_AUDIT_QUIET);
        expect_errno(result, &[EPERM], "ZDM_AUDIT_QUIET by nobody")?;
        let (_, records) = target.try_audit(0).or_fail("ZDM_AUDIT by nobody")?;
        check!(
            records.iter().all(|v| v.pfn == 0 && v.last_pid == 0),
            "records for nobody: expected none with a number, found {records:x?}"
        );
        Ok(())
    })
}

/// Pins count against RLIMIT_MEMLOCK of the user, in whatever process and file they are.
fn pins_are_limited(ctx: &Ctx) -> Outcome {
    const MOST: usize = 16;
    let target = Target::open(ctx, PRIVATE)?;
    let other = Device::open(1)?;
    as_nobody(|| {
        sys::limit(libc::RLIMIT_MEMLOCK, (MOST * PAGE) as u64).or_fail("setrlimit")?;
        let buf = Buffer::filled(2 * MOST, 1602)?;
        for flags in PINS {
            let all = target.pin(&buf, 0, MOST + 1, flags);
            expect_errno(all, &[ENOMEM], "ZDM_PIN of a page more than RLIMIT_MEMLOCK")?;
            let id = target.pin(&buf, 0, MOST, flags).or_fail("ZDM_PIN")?;
            expect_errno(
                other.pin(&buf, MOST, 1, flags),
                &[ENOMEM],
                "ZDM_PIN by another file",
            )?;
            Child::spawn(|| {
                let more = other.pin(&buf, MOST, 1, flags);
                expect_errno(more, &[ENOMEM], "ZDM_PIN by another process")
            })?
            .join()?;
            target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        }
        // A failure in the middle counts for nothing.
        buf.unmap(1, 1)?;
        expect_errno(target.pin(&buf, 0, MOST, 0), &[], "ZDM_PIN of a hole")?;
        let id = target.pin(&buf, 2, MOST, 0).or_fail("ZDM_PIN")?;
        target.unpin(id, 0).or_fail("ZDM_UNPIN")
    })
}

/// A mapping's pages are allocated with the mmap lock held, so there are not too many of them.
fn mapping_is_bounded(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let pages = (65 << 20) / PAGE;
    expect_errno(
        device.map(pages, libc::MAP_SHARED).map(drop),
        &[ENOMEM],
        "mmap of 65 MiB of the device",
    )?;
    device.map(64, libc::MAP_SHARED).or_fail("mmap").map(drop)
}

/// What a process maps of the device is charged to its cgroup.
fn mapping_is_charged(_: &Ctx) -> Outcome {
    const N: usize = 1024;
    let device = Device::open(0)?;
    let dir = new_cgroup()?;
    let result = Child::spawn(|| {
        fs::write(dir.join("cgroup.procs"), "0").or_fail("cgroup.procs")?;
        let before = current(&dir)?;
        let map = device.map(N, libc::MAP_SHARED).or_fail("mmap")?;
        let after = current(&dir)?;
        check!(
            after >= before + N as u64 - 64,
            "pages charged for a mapping of {N}: found {before} before, {after} after"
        );
        drop(map);
        Ok(())
    })?
    .join();
    let removed = sys::wait_until(Duration::from_secs(5), || fs::remove_dir(&dir).is_ok());
    result?;
    check!(removed, "rmdir of an empty cgroup: expected success");
    Ok(())
}

/// An allocation that one process wants to fail is not that of another one's CPU fault.
fn fail_alloc_is_not_for_others(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(8, 1603)?;
    let own = Target::open(ctx, PRIVATE)?;
    target.move_all(&buf, 1603)?;
    let before = target.stats()?;
    own.fail_alloc()?;
    Child::spawn(|| buf.check(0, 1, 1603))?.join()?;
    let faults = target.stats()?.cpu_faults.wrapping_sub(before.cpu_faults);
    check_eq!(faults, 1, "CPU faults of another process for a page");
    buf.check(1, 1, 1603)?;
    let faults = target.stats()?.cpu_faults.wrapping_sub(before.cpu_faults);
    check_eq!(faults, 3, "CPU faults in all, one of them in vain");
    buf.check(0, 8, 1603)
}

/// Runs `body` while threads migrate there and back.
fn while_others_migrate(target: &Target, body: impl FnOnce() -> Outcome) -> Outcome {
    let stop = AtomicBool::new(false);
    let buffers: Vec<Buffer> = (0..3)
        .map(|_| Buffer::filled(256, 1604))
        .collect::<Outcome<_>>()?;
    std::thread::scope(|scope| {
        for buf in &buffers {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = target.to_device(buf, 0, buf.pages());
                    let _ = target.to_system(buf, 0, buf.pages());
                }
            });
        }
        let result = body();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    buffers
        .iter()
        .try_for_each(|buf| buf.check(0, buf.pages(), 1604))
}

/// A file that used no memory of the device is closed at once.
fn close_does_not_wait_for_others(ctx: &Ctx) -> Outcome {
    const N: usize = 20;
    let target = Target::open(ctx, PRIVATE)?;
    let close = || -> Outcome<Duration> {
        let device = Device::open(0)?;
        let start = Instant::now();
        drop(device);
        Ok(start.elapsed())
    };
    while_others_migrate(&target, || {
        let mut times = (0..N).map(|_| close()).collect::<Outcome<Vec<_>>>()?;
        times.sort();
        // Half of them may have lost their processor.
        check!(
            times[N / 2] < Duration::from_millis(200),
            "time of a close while others migrate: expected less than 200 ms, found {times:?}"
        );
        Ok(())
    })
}

/// A page in motion is no violation, however often anybody looks.
fn audit_while_others_migrate<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let before = target.audit()?.0.total;
    while_others_migrate(&target, || {
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
            check_eq!(audit.total, before, "violations, {records:x?}");
            check_eq!(audit.found, 0, "violations that this scan found");
        }
        Ok(())
    })
}

/// Moves a buffer with a file of its own, lets `hold` take hold of it, and closes the file: the
/// page stays, and that is nobody's fault. Afterwards `holder` is dropped.
fn held_at_close<T>(ctx: &Ctx, node: usize, hold: impl FnOnce(&Buffer) -> Outcome<T>) -> Outcome {
    let observer = Target::open(ctx, node)?;
    let before = observer.audit()?.0.total;
    let buf = Buffer::filled(4, 1605)?;
    let holder = {
        let target = Target::open(ctx, node)?;
        target.move_all(&buf, 1605)?;
        hold(&buf)?
    };
    // As anybody may ask.
    let (audit, records) = observer.try_audit(0).or_fail("ZDM_AUDIT")?;
    check_eq!(
        audit.total,
        before,
        "violations after the close, {records:x?}"
    );
    check_eq!(audit.found, 0, "violations that the scan found");
    expect_errno(observer.release(), &[libc::EBUSY], "RELEASE of held pages")?;
    let (audit, records) = observer.try_audit(0).or_fail("ZDM_AUDIT")?;
    check_eq!(
        audit.total,
        before,
        "violations after RELEASE, {records:x?}"
    );
    buf.check(0, 4, 1605)?;
    drop(holder);
    observer.release().or_fail("RELEASE when nothing is held")?;
    buf.check(0, 4, 1605)?;
    observer.expect(&buf, 0, 4, 0)
}

/// Pins of another device's file.
fn pins_outlive_the_file<const NODE: usize>(ctx: &Ctx) -> Outcome {
    held_at_close(ctx, NODE, |buf| {
        let pinner = Device::open(0)?;
        pinner.pin(buf, 0, 1, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
        pinner.pin(buf, 2, 1, ZDM_PIN_GET).or_fail("ZDM_PIN")?;
        Ok(pinner)
    })
}

/// Pages in a pipe.
fn splice_outlives_the_file<const NODE: usize>(ctx: &Ctx) -> Outcome {
    held_at_close(ctx, NODE, |buf| {
        let (reader, writer) = sys::pipe().or_fail("pipe")?;
        buf.vmsplice_to(&writer, 0, 2).or_fail("vmsplice")?;
        Ok((reader, writer))
    })
}

/// Where the kernel's own page of code is mapped.
fn vdso() -> Outcome<Option<u64>> {
    let maps = fs::read_to_string("/proc/self/maps").or_fail("maps")?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    Ok(line.and_then(|line| u64::from_str_radix(line.split_once('-')?.0, 16).ok()))
}

/// Memory that no device is to have, as the driver is told of it by those who may map it.
fn foreign_mappings(ctx: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let mut buffers = Vec::new();
    if let Ok(file) = sys::memfd_secret(4 * PAGE as u64) {
        let buf = Buffer::shared(&file, 4)?;
        buf.fill(0, 4, 1606);
        buffers.push(buf);
    }
    if let Ok(buf) = Buffer::hugetlb(HUGE_PAGES) {
        // Without reserved pages the first access is SIGBUS, in a system call EFAULT.
        buffers.push(buf);
    }
    let uring = Uring::new().ok();
    if let Some(ring) = uring.as_ref().and_then(|uring| uring.ring().ok()) {
        buffers.push(ring);
    }
    for buf in &buffers {
        every_ioctl(&device, buf.at(0), buf.pages().min(4))?;
    }
    if let Some(buf) = buffers.first().filter(|_| sys::memfd_secret(0).is_ok()) {
        buf.check(0, 4, 1606)?;
        let read = device.read(buf, 0, 4);
        check!(
            read.is_ok(),
            "READ of secret memory by the process itself: found {read:?}"
        );
        for flags in PINS {
            expect_errno(
                device.pin(buf, 0, 1, flags),
                &[],
                "ZDM_PIN of secret memory",
            )?;
        }
    }
    if let Some(addr) = vdso()? {
        every_ioctl(&device, addr, 1)?;
        // vdso_data in front of it, which is no ordinary memory either.
        every_ioctl(&device, addr - 4 * PAGE as u64, 4)?;
    }
    // The vsyscall page, the first page that is the kernel's, and the last one.
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

/// The device's own mapping, and that of another one.
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

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[(self.next() % list.len() as u64) as usize]
    }
}

/// Every ioctl with every kind of argument, by a user without capabilities.
fn any_bytes(ctx: &Ctx) -> Outcome {
    const PAGES: usize = 16;
    let device = Device::open(0)?;
    let before = device.audit()?.0.total;
    as_nobody(|| {
        sys::limit(libc::RLIMIT_MEMLOCK, 64 * PAGE as u64).or_fail("setrlimit")?;
        // Pages behind those that are used are not mapped, so that nothing is written there.
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
                // Structures are versioned by their size.
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
    let (audit, records) = device.audit()?;
    check_eq!(audit.total, before, "violations, {records:x?}");
    works(ctx)
}

/// Every ioctl while the address space changes below it.
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
    let (audit, records) = Device::open(0)?.audit()?;
    check_eq!(audit.total, before, "violations, {records:x?}");
    works(ctx)
}

/// Fills `n` chunks of 2 MiB, and holds the folio in each of them by a file of its own.
fn hold_chunks(ctx: &Ctx, n: usize) -> Outcome<Vec<(Target, Buffer)>> {
    (0..n)
        .map(|_| {
            let target = Target::open(ctx, PRIVATE)?;
            let buf = huge_filled(1, 1610)?;
            target.move_all(&buf, 1610)?;
            target
                .inject(ZDM_INJECT_EXTRA_GET, buf.at(0))
                .or_fail("ZDM_INJECT")?;
            Ok((target, buf))
        })
        .collect()
}

/// Lets go of them, and forgets the violations that they were.
fn let_go(observer: &Target, held: Vec<(Target, Buffer)>) -> Outcome {
    for (target, _) in &held {
        target
            .inject(ZDM_INJECT_UNDO_GET, 0)
            .or_fail("ZDM_INJECT")?;
    }
    for (target, buf) in held {
        drop(target);
        buf.check(0, HUGE_PAGES, 1610)?;
    }
    observer
        .try_audit(ZDM_AUDIT_CLEAR)
        .or_fail("ZDM_AUDIT")
        .map(drop)
}

/// Chunks that cannot be released are waited for all at once.
fn release_of_many_chunks(ctx: &Ctx) -> Outcome {
    const CHUNKS: usize = 16;
    let observer = Target::open(ctx, PRIVATE)?;
    let held = hold_chunks(ctx, CHUNKS)?;
    let start = Instant::now();
    let result = observer.release();
    let took = start.elapsed();
    let found = observer.audit()?.0.total;
    let_go(&observer, held)?;
    expect_errno(result, &[libc::EBUSY], "RELEASE of held chunks")?;
    check!(
        found > 0,
        "violations of held pages: expected some, found none"
    );
    check!(
        took < Duration::from_secs(10),
        "time of RELEASE of {CHUNKS} held chunks: expected less than 10 s, found {took:?}"
    );
    Ok(())
}

/// Neither a migration that wants memory nor a signal waits for RELEASE.
fn nobody_waits_for_release(ctx: &Ctx) -> Outcome {
    let observer = Target::open(ctx, PRIVATE)?;
    let held = hold_chunks(ctx, 3)?;
    let child = Child::spawn(|| {
        // Again and again, so that one is under way whenever the parent looks.
        loop {
            let _ = observer.release();
        }
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let buf = Buffer::filled(4, 1612)?;
    let start = Instant::now();
    let moved = observer.move_all(&buf, 1612);
    let migration = start.elapsed();
    let start = Instant::now();
    let end = child.kill()?;
    let kill = start.elapsed();
    let_go(&observer, held)?;
    moved?;
    check_eq!(
        end,
        sys::Exit::Signal(libc::SIGKILL),
        "end of the process in RELEASE"
    );
    check!(
        migration < Duration::from_millis(700),
        "time of a migration during RELEASE: expected less than 700 ms, found {migration:?}"
    );
    check!(
        kill < Duration::from_millis(700),
        "time that a killed process stays in RELEASE: expected less than 700 ms, found {kill:?}"
    );
    buf.check(0, 4, 1612)
}

/// A fault on a page that is not the first of its folio is judged by the counts of the folio.
fn fault_on_a_tail(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = huge_filled(1, 1611)?;
    target.move_all(&buf, 1611)?;
    target
        .inject(ZDM_INJECT_EXTRA_GET, buf.at(0))
        .or_fail("ZDM_INJECT")?;
    let before = target.audit()?.0.total;
    let exit = Child::spawn(|| {
        // The folio is shared then, and mapped in small entries.
        let _ = buf.get(5, 0);
        Ok(())
    })?
    .exit()?;
    check_eq!(
        exit,
        sys::Exit::Signal(libc::SIGBUS),
        "end of a process whose fault cannot be met"
    );
    let (_, records) = target.audit()?;
    let found = records.iter().filter(|v| v.invariant == 3);
    check!(
        records.len() as u64 > before && found.clone().count() > 0,
        "records of I3: expected some, found {records:x?}"
    );
    // The folio has its mappings, the fault's reference, and the one that was injected.
    check!(
        found.clone().all(|v| v.found == v.expected + 1),
        "references in the records: expected one too many, found {records:x?}"
    );
    target
        .inject(ZDM_INJECT_UNDO_GET, 0)
        .or_fail("ZDM_INJECT")?;
    target.try_audit(ZDM_AUDIT_CLEAR).or_fail("ZDM_AUDIT")?;
    buf.check(0, HUGE_PAGES, 1611)
}

/// What the tests of this file promise about their own helpers.
#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn numbers_differ() {
        let mut numbers = Numbers(1);
        assert_ne!(numbers.next(), numbers.next());
        assert!([1, 2].contains(&numbers.pick(&[1, 2])));
    }
}
