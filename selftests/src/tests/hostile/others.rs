// SPDX-License-Identifier: GPL-2.0

//! Other ways to the pages of a device than the process's own accesses: debuggers, sockets, and
//! commands whose two ends are the same memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::lives::{mappings, say_word, wait_word};
use super::{Numbers, every_ioctl, works};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::memory::{WORDS, pattern_words};
use crate::tests::target::{Target, huge_filled, open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq, files, peers, sys, threads};

pub const TESTS: &[Test] = &[
    test("hostile.written_by_debuggers", written_by_debuggers),
    test("hostile.through_sockets", through_sockets),
    test("hostile.both_ends", both_ends),
    test("hostile.ends_in_mappings", ends_in_mappings),
    test("hostile.whole_address_space", whole_address_space),
    test("hostile.mapping_in_motion", mapping_in_motion),
    test("hostile.odd_file_operations", odd_file_operations),
    test("hostile.alarms", alarms),
];

/// A debugger writes to pages on the device that a process shares with another one: also where the
/// process itself may not write. Only the process sees it.
fn written_by_debuggers(ctx: &Ctx) -> Outcome {
    for target in open_each_kind(ctx)? {
        for huge in [false, true] {
            let buf = match huge {
                true => huge_filled(1, 1710)?,
                false => Buffer::filled(8, 1710)?,
            };
            let n = buf.pages();
            let new = Buffer::filled(8, 1711)?;
            target.move_all(&buf, 1710)?;
            let (here, there) = UnixStream::pair().or_fail("socketpair")?;
            let child = Child::spawn(|| {
                buf.protect(4, 2, libc::PROT_READ)?;
                say_word(&there)?;
                wait_word(&there)?;
                buf.check_from(0, 2, 1711, 0)?;
                buf.check_from(2, 1, 1711, 2)?;
                let words = buf.words(3);
                let mut expected = pattern_words(1710, 3);
                expected[5] = 0x1234;
                check!(words == expected, "page 3: expected one new word");
                buf.check_from(4, 1, 1711, 4)?;
                buf.check(5, n - 5, 1710)
            })?;
            wait_word(&here)?;
            let pid = child.pid();
            peers::trace(pid).or_fail("PTRACE_SEIZE")?;
            peers::stop_traced(pid).or_fail("PTRACE_INTERRUPT")?;
            let wrote = peers::write_process(pid, &new, &buf, 0, 2);
            check_eq!(
                wrote.or_fail("process_vm_writev")?,
                2 * PAGE,
                "bytes that process_vm_writev wrote"
            );
            check!(
                peers::write_process(pid, &new, &buf, 5, 1).is_err(),
                "process_vm_writev to a page without the right: expected an error"
            );
            let memory = File::options()
                .write(true)
                .open(format!("/proc/{pid}/mem"))
                .or_fail("/proc/pid/mem")?;
            for page in [2, 4] {
                memory
                    .write_all_at(&pattern_bytes(1711, page, 1), buf.at(page))
                    .or_fail("write to /proc/pid/mem")?;
            }
            peers::poke(pid, buf.at(3) + 5 * 8, 0x1234).or_fail("PTRACE_POKEDATA")?;
            let seen = Buffer::anon(8)?;
            files::read_process(pid, &buf, 0, &seen, 2).or_fail("process_vm_readv")?;
            seen.check_from(0, 2, 1711, 0)?;
            peers::untrace(pid).or_fail("PTRACE_DETACH")?;
            say_word(&here)?;
            child.join()?;
            buf.check(0, n, 1710)?;
            // The parent is not affected, nor is what the device reads of it.
            let read = target.read(&buf, 0, 8).or_fail("READ")?;
            check_bytes(&read.data, 1710, 0, "READ")?;
        }
    }
    works(ctx)
}

/// Sockets and pipes hold pages of the device, and what they deliver is what was sent, whatever
/// happens to the pages meanwhile.
fn through_sockets(ctx: &Ctx) -> Outcome {
    const N: usize = 4;
    for target in open_all(ctx)? {
        let observer = Target::open(ctx, target.node())?;
        let buf = Buffer::filled(N, 1712)?;
        target.move_all(&buf, 1712)?;
        let (reader, writer) = sys::pipe().or_fail("pipe")?;
        let (second, copy) = sys::pipe().or_fail("pipe")?;
        let (one, other) = UnixStream::pair().or_fail("socketpair")?;
        let sent = buf.vmsplice_to(&writer, 0, N).or_fail("vmsplice")?;
        check_eq!(sent, N * PAGE, "bytes in the pipe");
        let sent = peers::tee(&reader, &copy, N * PAGE).or_fail("tee")?;
        check_eq!(sent, N * PAGE, "bytes in the second pipe");
        let mut sent = 0;
        while sent < N * PAGE {
            sent += peers::splice(&reader, &one, N * PAGE - sent).or_fail("splice")?;
        }
        // Any result is right.
        let _ = target.to_system(&buf, 0, N);
        let _ = target.to_device(&buf, 0, N);
        let _ = target.exclusive(&buf, 0, N);
        drop(target);
        buf.check(0, N, 1712)?;
        buf.unmap(0, N)?;
        let (audit, records) = observer.try_audit(0).or_fail("ZDM_AUDIT")?;
        check_eq!(audit.found, 0, "violations, {records:x?}");
        let mut room = vec![0; N * PAGE];
        let limit = Some(Duration::from_secs(10));
        other.set_read_timeout(limit).or_fail("setsockopt")?;
        std::io::Read::read_exact(&mut &other, &mut room).or_fail("read of the socket")?;
        check_bytes(&room, 1712, 0, "data of the socket")?;
        std::io::Read::read_exact(&mut &second, &mut room).or_fail("read of the pipe")?;
        check_bytes(&room, 1712, 0, "data of the pipe")?;
        drop((reader, writer, second, copy, one, other));
        observer.expect_empty()?;
    }
    works(ctx)
}

/// Checks that each page is one of the pattern of `seed`.
fn check_whole_pages(buf: &Buffer, n: usize, seed: u64, what: &str) -> Outcome {
    let patterns: Vec<[u64; WORDS]> = (0..buf.pages()).map(|p| pattern_words(seed, p)).collect();
    for page in 0..n {
        let words = buf.words(page);
        check!(
            patterns.contains(&words),
            "page {page} after {what}: expected a page of the pattern"
        );
    }
    Ok(())
}

/// The range of a command and its other end overlap. The command ends, and copies whole pages.
fn both_ends(ctx: &Ctx) -> Outcome {
    const N: usize = 130;
    const RANGE: usize = 72;
    let mut done = 0;
    for target in open_all(ctx)? {
        for shift in [0, 1, 3, 58] {
            for (request, name) in [
                (HMM_READ, "READ"),
                (HMM_READ_UNLOCKED, "READ_UNLOCKED"),
                (HMM_WRITE, "WRITE"),
                (HMM_MIGRATE_TO_DEV, "MIGRATE_TO_DEV"),
                (HMM_EXCLUSIVE, "EXCLUSIVE"),
            ] {
                let buf = Buffer::filled(N, 1713)?;
                // A part of both ends is on the device, and a part is exclusive.
                let _ = target.to_device(&buf, 20, 60);
                let _ = target.exclusive(&buf, 10, 5);
                let (low, high) = (buf.at(0), Data::At(&buf, shift));
                let result = target.command(request, low, RANGE as u64, high);
                done += usize::from(result.is_ok());
                let what = format!("{name} at {shift} pages");
                if shift == 0 {
                    buf.check(0, N, 1713)?;
                } else {
                    check_whole_pages(&buf, N, 1713, &what)?;
                }
                // The same with the ends the other way round.
                let buf = Buffer::filled(N, 1713)?;
                let _ = target.to_device(&buf, 20, 60);
                let (high, low) = (buf.at(shift), Data::At(&buf, 0));
                let result = target.command(request, high, RANGE as u64, low);
                done += usize::from(result.is_ok());
                check_whole_pages(&buf, N, 1713, &what)?;
            }
        }
        // What describes the pages goes to the pages.
        let buf = Buffer::filled(N, 1713)?;
        target.to_device(&buf, 0, 8).or_fail("MIGRATE_TO_DEV")?;
        let into = Data::At(&buf, 0);
        target
            .command(HMM_SNAPSHOT, buf.at(0), RANGE as u64, into)
            .or_fail("SNAPSHOT")?;
        buf.check(1, N - 1, 1713)?;
        let mut inspect = Inspect {
            addr: buf.at(0),
            npages: RANGE as u64,
            pages: buf.at(0),
            ..Inspect::default()
        };
        target.inspect_with(&mut inspect).or_fail("ZDM_INSPECT")?;
        buf.check(1, N - 1, 1713)?;
    }
    note(&format!("{done} commands succeeded"));
    check!(done > 20, "commands that succeeded: found {done}");
    works(ctx)
}

/// The other end of a command is a mapping of a device, or of huge pages.
fn ends_in_mappings(ctx: &Ctx) -> Outcome {
    const N: usize = 8;
    for target in open_all(ctx)? {
        let buf = Buffer::filled(N, 1714)?;
        let private = Device::open(1)?;
        let mut ends = vec![
            target.map(N, libc::MAP_SHARED).or_fail("mmap")?,
            target.map(N, libc::MAP_PRIVATE).or_fail("mmap")?,
            private.map(N, libc::MAP_SHARED).or_fail("mmap")?,
        ];
        let huge = huge_filled(1, 1715)?;
        let _ = target.to_device(&huge, 0, HUGE_PAGES);
        ends.push(huge);
        for end in &ends {
            for request in super::READS {
                end.fill(0, N, 1715);
                let into = Data::At(end, 0);
                let what = format!("ioctl {request:#x} into a mapping");
                target.to_device(&buf, 0, N / 2).or_fail("MIGRATE_TO_DEV")?;
                target
                    .command(request, buf.at(0), N as u64, into)
                    .or_fail(&what)?;
                end.check(0, N, 1714)?;
            }
            end.fill(0, N, 1716);
            let from = Data::At(end, 0);
            target
                .command(HMM_WRITE, buf.at(0), N as u64, from)
                .or_fail("WRITE from a mapping")?;
            buf.check(0, N, 1716)?;
            buf.fill(0, N, 1714);
            target
                .command(HMM_SNAPSHOT, buf.at(0), N as u64, Data::At(end, 0))
                .or_fail("SNAPSHOT into a mapping")?;
        }
    }
    works(ctx)
}

/// All that a process has mapped goes to the devices and back while the process runs: its code, its
/// stack, and what the C library has.
fn whole_address_space(ctx: &Ctx) -> Outcome {
    /// The pages of a mapping that are tried.
    const MOST: u64 = 512;
    for target in open_each_kind(ctx)? {
        let node = target.node();
        let before = target.stats()?;
        Child::spawn(|| {
            let device = Device::open(node)?;
            let mut room = vec![0; MOST as usize * PAGE];
            for _ in 0..2 {
                for (addr, pages) in mappings("self")? {
                    let n = pages.min(MOST);
                    let requests = [
                        HMM_MIGRATE_TO_DEV,
                        HMM_EXCLUSIVE,
                        HMM_READ,
                        HMM_MIGRATE_TO_DEV,
                        HMM_READ_UNLOCKED,
                        HMM_SNAPSHOT,
                    ];
                    for request in requests {
                        let _ = device.command(request, addr, n, Data::Into(&mut room));
                    }
                    let _ = device.fault(addr, n, ZDM_FAULT_WRITE);
                    let _ = device.inspect_at(addr, n as usize, 0);
                    for flags in super::PINS {
                        if let Ok(id) = device.pin_at(addr, n, flags) {
                            let _ = device.command(HMM_MIGRATE_TO_DEV, addr, n, Data::Nowhere);
                            device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
                        }
                    }
                    let _ = device.command(HMM_MIGRATE_TO_DEV, addr, n, Data::Nowhere);
                }
            }
            // Another process starts with what is there now.
            Child::spawn(|| works(ctx))?.join()
        })?
        .join()?;
        let moved = target.stats()?.to_device - before.to_device;
        check!(moved > 64, "pages that moved: expected some, found {moved}");
        target.expect_empty()?;
    }
    works(ctx)
}

/// The device's own mapping changes while commands work on it.
fn mapping_in_motion(ctx: &Ctx) -> Outcome {
    const N: usize = 32;
    const ADVICES: [i32; 14] = [
        libc::MADV_DONTNEED,
        libc::MADV_FREE,
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_POPULATE_READ,
        libc::MADV_POPULATE_WRITE,
        libc::MADV_HUGEPAGE,
        libc::MADV_MERGEABLE,
        libc::MADV_REMOVE,
        libc::MADV_DONTFORK,
        libc::MADV_DOFORK,
        // MADV_COLLAPSE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE.
        25,
        102,
        103,
    ];
    let before = Device::open(0)?.audit()?.0.total;
    let target = Target::open(ctx, 0)?;
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        Child::spawn(|| {
            let device = Device::open(0)?;
            let stop = AtomicBool::new(false);
            let place = Buffer::anon(N)?;
            let buf = device.map(N, flags).or_fail("mmap")?;
            buf.fill(0, N, 1717);
            std::thread::scope(|scope| {
                let _stop = threads::SetOnDrop(&stop);
                scope.spawn(|| {
                    let mut numbers = Numbers(17);
                    while !stop.load(Ordering::Relaxed) {
                        let first = numbers.next() as usize % (N - 8);
                        let _ = buf.try_advise(first, 8, numbers.pick(&ADVICES));
                        let _ = buf.try_lock(first, 4, true);
                        let _ = buf.protect(first, 4, libc::PROT_READ);
                        let _ = buf.protect(first, 4, libc::PROT_READ | libc::PROT_WRITE);
                        let _ = buf.move_pages(first, 2, &place, first);
                        let _ = place.move_pages(first, 2, &buf, first);
                    }
                });
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        if let Ok(pid) = sys::fork(|| 0) {
                            let _ = sys::wait(pid, true);
                        }
                        if let Ok(more) = device.map(N, flags) {
                            more.fill(0, N, 1718);
                            let _ = target.read(&more, 0, N);
                        }
                    }
                });
                let end = Instant::now() + Duration::from_millis(1500);
                let mut result = Ok(());
                while result.is_ok() && Instant::now() < end {
                    result = every_ioctl(&device, buf.at(0), N);
                    let _ = every_ioctl(&device, place.at(0), N);
                }
                result
            })
        })?
        .join()?;
    }
    Device::open(0)?.expect_violations(before)?;
    works(ctx)
}

/// What can be done with any file, and a file that is opened by the name of a descriptor, which
/// mirrors who opens it.
fn odd_file_operations(ctx: &Ctx) -> Outcome {
    use std::io::{Read, Seek, SeekFrom, Write};
    let buf = Buffer::filled(4, 1719)?;
    let device = Device::open(0)?;
    let name = {
        use std::os::fd::{AsFd, AsRawFd};
        format!("/proc/{}/fd/{}", sys::pid(), device.as_fd().as_raw_fd())
    };
    Child::spawn(|| {
        buf.fill(0, 4, 1720);
        let mut file = File::options()
            .read(true)
            .write(true)
            .open(&name)
            .or_fail("open by /proc/pid/fd")?;
        let mut room = [0; 16];
        check!(file.read(&mut room).is_err(), "read: expected an error");
        check!(file.write(&room).is_err(), "write: expected an error");
        check!(file.set_len(0).is_err(), "ftruncate: expected an error");
        let _ = file.seek(SeekFrom::Start(1 << 40));
        let _ = file.sync_all();
        let _ = files::punch(&file, 0, 1);
        let (reader, writer) = sys::pipe().or_fail("pipe")?;
        check!(
            peers::splice(&file, &writer, PAGE).is_err(),
            "splice from the device: expected an error"
        );
        let _ = buf.vmsplice_to(&writer, 0, 1);
        check!(
            peers::splice(&reader, &file, PAGE).is_err(),
            "splice to the device: expected an error"
        );
        let ready = sys::readable(&file, Duration::ZERO);
        drop(ready);
        let own = Device::of_file(file);
        let read = own.read(&buf, 0, 4).or_fail("READ")?;
        check_bytes(&read.data, 1720, 0, "READ of the memory of who opened")?;
        let read = device.read(&buf, 0, 4).or_fail("READ")?;
        check_bytes(
            &read.data,
            1719,
            0,
            "READ of the memory of the first opener",
        )
    })?
    .join()?;
    works(ctx)
}

/// Executes commands while the process gets many signals, none of which is fatal.
fn alarms(ctx: &Ctx) -> Outcome {
    const N: usize = 150;
    let targets = open_each_kind(ctx)?;
    files::catch(libc::SIGALRM, false).or_fail("sigaction")?;
    for target in &targets {
        let buf = Buffer::filled(N, 1721)?;
        peers::alarm_every(2000).or_fail("setitimer")?;
        let result = every_ioctl(target, buf.at(0), N)
            .and_then(|()| target.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV"))
            .and_then(|moved| check_bytes(&moved.data, 1721, 0, "MIGRATE_TO_DEV"))
            .and_then(|()| buf.check(0, N, 1721));
        peers::alarm_every(0).or_fail("setitimer")?;
        result?;
    }
    works(ctx)
}
