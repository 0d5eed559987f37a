// SPDX-License-Identifier: GPL-2.0

//! Odd ways to a device: numbers of ioctls that are none, the ends of the address space, mappings with flags
//! that suit no device, and an opener whose process namespace ends.

use std::time::{Duration, Instant};

use libc::{EFAULT, EINVAL, ENOTTY};

use super::files::WORKS;
use super::upkeep::KILLED;
use super::{READS, as_nobody, every_ioctl, violations, works};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, PAGE, check_bytes};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::tests::account::{current, in_cgroup, join_cgroup};
use crate::tests::target::{PRIVATE, Target, open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::uring::Requests;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.odd_numbers", odd_numbers),
    test(
        "hostile.ends_of_the_address_space",
        ends_of_the_address_space,
    ),
    test("hostile.odd_mappings", odd_mappings),
    test("hostile.namespace_ends", namespace_ends),
    test("hostile.by_io_uring", by_io_uring),
];

/// The number of an ioctl, as _IOC() makes it.
fn ioc(direction: u64, kind: u8, number: u8, size: u64) -> u64 {
    (direction << 30) | (size << 16) | (u64::from(kind) << 8) | u64::from(number)
}

/// Numbers that are near to those of the commands: of another size, direction or kind.
fn odd_numbers(ctx: &Ctx) -> Outcome {
    const SIZES: [u64; 9] = [0, 1, 7, 8, 24, 40, 64, 4096, 0x3fff];
    /// The numbers of the commands of any size.
    const OWN: std::ops::RangeInclusive<u8> = 0x40..=0x47;
    let target = Target::open(ctx, PRIVATE)?;
    let before = target.audit()?.0.total;
    as_nobody(|| {
        let mut refused = 0;
        for number in 0..=u8::MAX {
            for direction in 0..4 {
                for size in SIZES {
                    let mut arg = vec![0; 0x4000];
                    let near = target.ioctl_bytes(ioc(direction, b'H', number, size), &mut arg);
                    if !OWN.contains(&number) && near.is_err() {
                        refused += 1;
                    }
                    // Another kind. The kernel itself has commands of the kinds 0, `T`, `X` and `f`.
                    for kind in [b'G', b'I', 0xff] {
                        let request = ioc(direction, kind, number, size);
                        let other = target.ioctl_bytes(request, &mut arg);
                        let what = format!("ioctl {request:#x}");
                        expect_errno(other, &[ENOTTY], &what)?;
                    }
                }
            }
        }
        // The exact numbers of upstream's commands are among them, on a range of no pages.
        check_eq!(
            refused,
            (256 - OWN.count()) * 4 * SIZES.len(),
            "numbers that were refused"
        );
        Ok(())
    })?;
    target.expect_violations(before)?;
    works(ctx)
}

/// The first page that is not of user space, with page tables of five and of four levels.
const ENDS: [u64; 2] = [(1 << 56) - PAGE as u64, (1 << 47) - PAGE as u64];

/// Ranges, and other ends of copies, at the ends of the address space. The last page is one as any other.
fn ends_of_the_address_space(ctx: &Ctx) -> Outcome {
    const P: u64 = PAGE as u64;
    for target in open_each_kind(ctx)? {
        let last_page = |end: u64| Some((end, Buffer::anon_at(end - P, 1).ok()?));
        let Some((end, last)) = ENDS.into_iter().find_map(last_page) else {
            return Err(Fail::Skip("the last page is in use".into()));
        };
        last.fill(0, 1, 1840);
        // A CPU fault brings back pages around its own.
        target.fault_around(512).or_fail("ZDM_FAULT_AROUND")?;
        for _ in 0..2 {
            target.move_all(&last, 1840)?;
            last.check(0, 1, 1840)?;
            // The check of PRIVATE memory has brought the page back, CPUs read all other memory where it is.
            if target.on_device(&last, 0, 1)? == 1 {
                target
                    .to_system(&last, 0, 1)
                    .or_fail("MIGRATE_TO_SYS of the last page")?;
            }
        }
        every_ioctl(&target, last.at(0), 1)?;
        last.check(0, 1, 1840)?;
        let mut room = vec![0; 4 * PAGE];
        for (addr, npages) in [
            (end - P, 2),
            (end - P, 1 << 52),
            (end - P, u64::MAX / P),
            (end, 1),
            (end + P, 1),
            (1 << 63, 1),
            ((1 << 63) - P, 2),
            (u64::MAX - P + 1, 1),
            (u64::MAX - P + 1, 2),
            (last.at(0), 0),
            (0, 1 << 52),
            (0, u64::MAX),
        ] {
            let what = format!("{npages:#x} pages at {addr:#x}");
            for request in READS.into_iter().chain([HMM_SNAPSHOT, HMM_WRITE]) {
                let result = target.command(request, addr, npages, Data::Nowhere);
                expect_errno(result, &[EINVAL], &format!("{request:#x} of {what}"))?;
            }
            expect_errno(
                target.command(HMM_MIGRATE_TO_SYS, addr, npages, Data::Nowhere),
                &[EINVAL],
                &format!("MIGRATE_TO_SYS of {what}"),
            )?;
            for flags in [0, ZDM_FAULT_WRITE] {
                let result = target.fault(addr, npages, flags);
                expect_errno(result, &[EINVAL], &format!("ZDM_FAULT of {what}"))?;
            }
            for flags in super::PINS {
                let result = target.pin_at(addr, npages, flags);
                expect_errno(result, &[EINVAL], &format!("ZDM_PIN of {what}"))?;
            }
        }
        // The other end of a copy begins in the last page and does not end in it.
        let buf = Buffer::filled(2, 1841)?;
        target.move_all(&buf, 1841)?;
        for request in [HMM_READ, HMM_READ_UNLOCKED, HMM_WRITE, HMM_EXCLUSIVE] {
            let fields = [buf.at(0), last.at(0), 2, 0, 0];
            let mut arg: Vec<u8> = fields.into_iter().flat_map(u64::to_ne_bytes).collect();
            let result = target.ioctl_bytes(request, &mut arg);
            let what = format!("{request:#x} with an end beyond the last page");
            expect_errno(result, &[EFAULT], &what)?;
        }
        let read = target.command(HMM_READ, last.at(0), 1, Data::Into(&mut room));
        read.or_fail("READ of the last page")?;
        drop(last);
        let gone = target.command(HMM_READ, end - P, 1, Data::Into(&mut room));
        expect_errno(
            gone,
            &[EFAULT],
            "READ of the last page when it is not mapped",
        )?;
        target.to_system(&buf, 0, 2).or_fail("MIGRATE_TO_SYS")?;
    }
    works(ctx)
}

/// Mappings of a device with flags and offsets that no device has, made longer and twice. They go away with
/// all their pages.
fn odd_mappings(ctx: &Ctx) -> Outcome {
    const N: usize = 32;
    const FLAGS: [i32; 9] = [
        0,
        libc::MAP_GROWSDOWN,
        libc::MAP_HUGETLB,
        libc::MAP_LOCKED,
        libc::MAP_NORESERVE,
        libc::MAP_POPULATE,
        libc::MAP_STACK,
        libc::MAP_SYNC,
        libc::MAP_ANONYMOUS,
    ];
    const OFFSETS: [i64; 4] = [0, 1 << 40, i64::MAX - (PAGE as i64 - 1), -(PAGE as i64)];
    let target = Target::open(ctx, PRIVATE)?;
    let before = target.audit()?.0.total;
    in_cgroup(&[], |dir| {
        Child::spawn(|| {
            join_cgroup(dir)?;
            let device = Device::open(0)?;
            let mut made = 0;
            let charged = current(dir)?;
            for flags in FLAGS {
                for kind in [
                    libc::MAP_SHARED,
                    libc::MAP_PRIVATE,
                    libc::MAP_SHARED_VALIDATE,
                ] {
                    for offset in OFFSETS {
                        let Ok(mut map) = device.map_at(N, kind | flags, offset) else {
                            continue;
                        };
                        made += 1;
                        map.fill(0, N, 1842);
                        every_ioctl(&device, map.at(0), N)?;
                        map.check(0, N, 1842)?;
                        if let Ok(twice) = map.duplicate() {
                            let _ = every_ioctl(&device, twice.at(0), N);
                        }
                        if map.grow(N).is_ok() {
                            let _ = every_ioctl(&device, map.at(0), 2 * N);
                            // There are no pages in what was added.
                            let beyond = Child::spawn(|| {
                                map.get(N, 0);
                                Ok(())
                            })?;
                            let end = beyond.exit()?;
                            let private = flags & libc::MAP_ANONYMOUS != 0;
                            check!(
                                private || end == Exit::Signal(libc::SIGBUS),
                                "end of a reader beyond the pages: found {end:?}, flags {flags:#x}"
                            );
                        }
                        map.check(0, N, 1842)?;
                    }
                }
            }
            note(&format!("{made} mappings"));
            check!(made > 20, "mappings that were made: found {made}");
            let now = current(dir)?;
            check!(
                now < charged + (made * N / 4) as u64,
                "pages charged after {made} mappings: found {charged} before, {now} after"
            );
            // More than there may be, by any flags.
            let pages = (65 << 20) / PAGE;
            for flags in FLAGS {
                if flags & (libc::MAP_ANONYMOUS | libc::MAP_HUGETLB) != 0 {
                    continue;
                }
                let result = device.map_at(pages, libc::MAP_SHARED | flags, 0);
                check!(result.is_err(), "mmap of 65 MiB with {flags:#x}");
            }
            Ok(())
        })?
        .join()
    })?;
    target.expect_violations(before)?;
    works(ctx)
}

/// The first process of a process namespace ends while another one of the namespace executes a command on a
/// file of the first one: the kernel kills the other one, and the first one waits for it.
fn namespace_ends(ctx: &Ctx) -> Outcome {
    const N: usize = 1 << 16;
    let targets = open_all(ctx)?;
    let before = violations(&targets)?;
    let mut longest = (Duration::ZERO, "");
    for (round, (name, work)) in WORKS.into_iter().enumerate() {
        let node = targets[round % targets.len()].node();
        let (news, say) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            if let Err(e) = sys::new_process_namespace() {
                return Err(Fail::Skip(format!("no process namespaces: {e}")));
            }
            // It is the first one there, and ends as soon as the other one has begun.
            Child::spawn(|| {
                check_eq!(sys::pid(), 1, "number of the first process");
                let [buf, to] = [Buffer::anon(N)?, Buffer::anon(N)?];
                let device = Device::open(node)?;
                let _worker = Child::spawn(|| {
                    std::io::Write::write_all(&mut &say, b"n").or_fail("pipe")?;
                    loop {
                        let _ = work(&device, &buf, &to);
                    }
                })?;
                std::thread::sleep(Duration::from_millis(60));
                sys::exit_now(0)
            })?
            .join()
        })?;
        drop(say);
        let begun = sys::readable(&news, Duration::from_secs(20)).or_fail("poll")?;
        std::thread::sleep(Duration::from_millis(60));
        let start = Instant::now();
        child.join()?;
        longest = longest.max((start.elapsed(), name));
        check!(begun, "{name}: the process never began");
    }
    note(&format!(
        "{} took longest to end: {:?}",
        longest.1, longest.0
    ));
    check!(
        longest.0 < KILLED,
        "time until a namespace has ended in {}: found {:?}",
        longest.1,
        longest.0
    );
    for (target, before) in targets.iter().zip(before) {
        target.expect_empty()?;
        target.expect_violations(before)?;
    }
    works(ctx)
}

/// Threads of the kernel open and close a device for a process, whose memory the file mirrors, and execute
/// requests that a device has no use for.
fn by_io_uring(ctx: &Ctx) -> Outcome {
    const N: usize = 32;
    for target in open_each_kind(ctx)? {
        let path = std::ffi::CString::new(Device::path(target.node()))
            .map_err(|e| Fail::failed(format!("path: {e}")))?;
        for polled in [false, true] {
            let mut ring =
                Requests::new(polled).map_err(|e| Fail::Skip(format!("no io_uring: {e}")))?;
            let buf = Buffer::filled(N, 1850)?;
            let device = Device::of_file(ring.open(&path).or_fail("open by io_uring")?);
            let place = Buffer::filled(1, 1851)?;
            for (name, result) in ring.odd(&device, &place, HMM_READ as u32) {
                check!(result.is_err(), "{name} of a device: found {result:?}");
            }
            place.check(0, 1, 1851)?;
            let read = device.read(&buf, 0, N).or_fail("READ")?;
            check_bytes(
                &read.data,
                1850,
                0,
                "READ of the memory of who asked for the file",
            )?;
            device.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
            target.expect(&buf, 0, N, N)?;
            every_ioctl(&device, place.at(0), 1)?;
            ring.close(device.into_file())
                .or_fail("close by io_uring")?;
            // The last user of the file may be the thread, which goes on.
            let back = sys::wait_until(Duration::from_secs(10), || {
                target.on_device(&buf, 0, N).is_ok_and(|pages| pages == 0)
            });
            check!(back, "pages of the file: expected them back in 10 s");
            buf.check(0, N, 1850)?;
            // The process ends, and the thread with it, while the file is open.
            Child::spawn(|| {
                let mut ring = Requests::new(polled).or_fail("io_uring")?;
                let device = Device::of_file(ring.open(&path).or_fail("open by io_uring")?);
                let own = Buffer::filled(N, 1852)?;
                device.to_device(&own, 0, N).or_fail("MIGRATE_TO_DEV")?;
                sys::exit_now(0)
            })?
            .join()?;
            let empty = sys::wait_until(Duration::from_secs(10), || {
                target.try_audit(0).is_ok_and(|(audit, _)| audit.used == 0)
            });
            check!(
                empty,
                "pages of a process that ended: expected none in 10 s"
            );
        }
        target.expect_empty()?;
    }
    works(ctx)
}
