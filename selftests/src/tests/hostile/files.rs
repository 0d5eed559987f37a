// SPDX-License-Identifier: GPL-2.0

//! A device file in unexpected use: by other processes, other users, killed tasks, and tasks
//! without memory.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use libc::{EFAULT, EINVAL, EPERM};
use nix::sys::resource::Resource;

use super::{Numbers, PINS, as_nobody, every_ioctl, violations, works};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, PAGE, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::swap::Swap;
use crate::sys::{self, Exit};
use crate::tests::account::{join_cgroup, new_cgroup};
use crate::tests::target::{PRIVATE, Target, open_all};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.killed_in_each", killed_in_each),
    test("hostile.file_of_another", file_of_another),
    test("hostile.opener_has_gone", opener_has_gone),
    test("hostile.closed_in_use", closed_in_use),
    test("hostile.short_of_memory", short_of_memory),
    test("hostile.user_namespace", user_namespace),
    test("hostile.odd_areas", odd_areas),
];

/// The pages of a range on which every command takes long: 1 GiB.
pub(super) const LONG: usize = 1 << 18;

/// The command that a process repeats until it is killed.
pub(super) type Work = fn(&Device, &Buffer, &Buffer) -> std::io::Result<()>;

fn command(device: &Device, request: u64, buf: &Buffer, data: Data<'_>) -> std::io::Result<()> {
    device
        .command(request, buf.at(0), buf.pages() as u64, data)
        .map(drop)
}

/// Each command that takes long on a long range.
pub(super) const WORKS: [(&str, Work); 11] = [
    ("READ", |d, buf, to| {
        command(d, HMM_READ, buf, Data::At(to, 0))
    }),
    ("READ_UNLOCKED", |d, buf, to| {
        command(d, HMM_READ_UNLOCKED, buf, Data::At(to, 0))
    }),
    ("WRITE", |d, buf, to| {
        command(d, HMM_WRITE, buf, Data::At(to, 0))
    }),
    ("MIGRATE_TO_DEV", |d, buf, to| {
        command(d, HMM_MIGRATE_TO_DEV, buf, Data::At(to, 0))
    }),
    ("MIGRATE_TO_SYS", |d, buf, _| {
        let _ = d.command(HMM_MIGRATE_TO_DEV, buf.at(0), 64, Data::Nowhere);
        command(d, HMM_MIGRATE_TO_SYS, buf, Data::Nowhere)
    }),
    ("EXCLUSIVE", |d, buf, to| {
        command(d, HMM_EXCLUSIVE, buf, Data::At(to, 0))
    }),
    ("CHECK_EXCLUSIVE", |d, buf, _| {
        command(d, HMM_CHECK_EXCLUSIVE, buf, Data::Nowhere)
    }),
    ("SNAPSHOT", |d, buf, to| {
        command(d, HMM_SNAPSHOT, buf, Data::At(to, 0))
    }),
    ("ZDM_FAULT", |d, buf, _| {
        d.fault(buf.at(0), buf.pages() as u64, 0).map(drop)
    }),
    ("ZDM_PIN", |d, buf, _| {
        let id = d.pin_at(buf.at(0), 65536, ZDM_PIN_WRITE)?;
        d.unpin(id, ZDM_UNPIN_DIRTY)
    }),
    ("ZDM_AUDIT", |d, _, _| d.try_audit(0).map(drop)),
];

/// A process that is killed during a command ends soon, whatever the command.
fn killed_in_each(ctx: &Ctx) -> Outcome {
    let targets = open_all(ctx)?;
    let before = violations(&targets)?;
    let mut longest = (Duration::ZERO, "");
    for (name, work) in WORKS {
        let (news, say) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            let device = Device::open(0)?;
            let [buf, to] = [Buffer::anon(LONG)?, Buffer::anon(LONG)?];
            std::io::Write::write_all(&mut &say, b"n").or_fail("pipe")?;
            loop {
                // There may be no memory for it.
                let _ = work(&device, &buf, &to);
            }
        })?;
        drop(say);
        let begun = sys::readable(&news, Duration::from_secs(20)).or_fail("poll")?;
        std::thread::sleep(Duration::from_millis(60));
        let start = Instant::now();
        let end = child.kill()?;
        let took = start.elapsed();
        check!(begun, "{name}: the process never began");
        check_eq!(
            end,
            Exit::Signal(libc::SIGKILL),
            "{name}: end of the process"
        );
        longest = longest.max((took, name));
    }
    note(&format!(
        "{} took longest to be killed: {:?}",
        longest.1, longest.0
    ));
    check!(
        longest.0 < Duration::from_secs(3),
        "time that a process killed in {} stays: expected less than 3 s, found {:?}",
        longest.1,
        longest.0
    );
    for (target, before) in targets.iter().zip(before) {
        target.expect_violations(before)?;
    }
    works(ctx)
}

/// A file belongs to the address space that opened it, whichever process uses it. Pins and the
/// other end of a copy belong to the caller.
fn file_of_another(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(8, 1620)?;
    target.to_device(&buf, 0, 4).or_fail("MIGRATE_TO_DEV")?;
    as_nobody(|| {
        // The same address has another page here.
        buf.fill(0, 8, 1621);
        let read = target.read(&buf, 0, 8).or_fail("READ")?;
        check_bytes(&read.data, 1620, 0, "READ of the opener's memory")?;
        target
            .write(&buf, 6, &pattern_bytes(1622, 6, 2))
            .or_fail("WRITE")?;
        buf.check(0, 8, 1621)?;
        let id = target.pin(&buf, 0, 8, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
        buf.fill(0, 8, 1623);
        target.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
        target.to_system(&buf, 0, 8).or_fail("MIGRATE_TO_SYS")?;
        buf.check(0, 8, 1623)
    })?;
    target.expect(&buf, 0, 8, 0)?;
    buf.check(0, 6, 1620)?;
    buf.check(6, 2, 1622)
}

/// A file whose opener has ended returns errors for everything that needs the opener's address
/// space.
fn opener_has_gone(ctx: &Ctx) -> Outcome {
    let (news, say) = sys::pipe().or_fail("pipe")?;
    let opener = Child::spawn(|| {
        let target = Target::open(ctx, PRIVATE)?;
        let buf = Buffer::filled(4, 1630)?;
        target.move_all(&buf, 1630)?;
        let parent = sys::pid();
        // A child inherits the file; its parent does not wait for it.
        Child::spawn(|| {
            let gone = sys::wait_until(Duration::from_secs(20), || sys::parent() != parent);
            check!(gone, "end of the opener: expected it in 20 s");
            let mut room = vec![0; 4 * PAGE];
            let mut tried = |request, data: bool, errno: &[i32], what| {
                let data = if data {
                    Data::Into(&mut room)
                } else {
                    Data::Nowhere
                };
                expect_errno(target.command(request, buf.at(0), 4, data), errno, what)
            };
            tried(HMM_READ, true, &[EFAULT], "READ")?;
            tried(HMM_WRITE, true, &[EFAULT], "WRITE")?;
            tried(HMM_READ_UNLOCKED, true, &[EFAULT], "READ_UNLOCKED")?;
            tried(HMM_MIGRATE_TO_DEV, true, &[EINVAL], "MIGRATE_TO_DEV")?;
            tried(HMM_MIGRATE_TO_SYS, false, &[EINVAL], "MIGRATE_TO_SYS")?;
            tried(HMM_EXCLUSIVE, true, &[EINVAL], "EXCLUSIVE")?;
            expect_errno(target.fault(buf.at(0), 4, 0), &[EFAULT], "ZDM_FAULT")?;
            check!(
                target.snapshot(&buf, 0, 4).is_err() && target.inspect(&buf, 0, 4).is_err(),
                "SNAPSHOT and ZDM_INSPECT of nothing: expected errors"
            );
            // Commands that do not need the opener still work.
            let id = target.pin(&buf, 0, 4, 0).or_fail("ZDM_PIN")?;
            buf.check(0, 4, 1630)?;
            target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            target.stats()?;
            std::io::Write::write_all(&mut &say, b"n").or_fail("pipe")
        })
        .map(drop)
    })?;
    opener.join()?;
    drop(say);
    let mut word = Vec::new();
    std::io::Read::read_to_end(&mut &news, &mut word).or_fail("pipe")?;
    check_eq!(word, b"n", "word of the heir that all was as expected");
    works(ctx)
}

/// One thread closes a file while others execute commands on it.
fn closed_in_use(ctx: &Ctx) -> Outcome {
    const THREADS: usize = 3;
    const N: usize = 64;
    let before = Device::open(0)?.audit()?.0.total;
    let buf = Buffer::filled(N * THREADS, 1640)?;
    let end = Instant::now() + Duration::from_secs(4);
    let mut rounds = 0;
    while Instant::now() < end {
        let device = Device::open(0)?;
        let closed = AtomicBool::new(false);
        std::thread::scope(|scope| -> Outcome {
            for thread in 0..THREADS {
                let (device, closed, buf) = (&device, &closed, &buf);
                scope.spawn(move || {
                    while !closed.load(Ordering::Relaxed) {
                        let _ = device.to_device(buf, thread * N, N);
                        let _ = device.read(buf, thread * N, N);
                        if let Ok(id) = device.pin(buf, thread * N, 1, 0) {
                            let _ = device.unpin(id, 0);
                        }
                        let _ = device.exclusive(buf, thread * N, 4);
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(20 + rounds % 7));
            let result = device.close_under_all().or_fail("dup3");
            closed.store(true, Ordering::Relaxed);
            result
        })?;
        buf.check(0, buf.pages(), 1640)?;
        rounds += 1;
    }
    note(&format!("closed {rounds} times"));
    check!(rounds > 0, "rounds: expected some, found none");
    let audit = Device::open(0)?.expect_violations(before)?;
    check_eq!(audit.used, 0, "pages in use after all files are closed");
    works(ctx)
}

/// Processes in a cgroup with too little memory: every allocation has to wait until pages are
/// swapped out.
fn short_of_memory(ctx: &Ctx) -> Outcome {
    const PAGES: usize = 4096;
    let targets = open_all(ctx)?;
    let before = violations(&targets)?;
    let _swap = Swap::on()?;
    let dir = new_cgroup()?;
    fs::write(dir.join("memory.max"), "24M").or_fail("memory.max")?;
    let mut rounds = 0;
    let end = Instant::now() + Duration::from_secs(6);
    let mut numbers = Numbers(5);
    while rounds < targets.len() || Instant::now() < end {
        let node = targets[rounds % targets.len()].node();
        rounds += 1;
        let first = numbers.next() as usize % (PAGES / 2);
        Child::spawn(|| {
            join_cgroup(&dir)?;
            let device = Device::open(node)?;
            let buf = Buffer::filled(PAGES, 1650)?;
            // Reclaim cannot take pages on the device.
            for first in (0..PAGES / 2).step_by(256) {
                let _ = device.to_device(&buf, first, 256);
            }
            let other = Child::spawn(|| {
                buf.fill(0, PAGES, 1651);
                buf.check(0, PAGES, 1651)
            })?;
            every_ioctl(&device, buf.at(first), 64)?;
            buf.check(0, PAGES, 1650)?;
            other.join()
        })?
        .join()?;
    }
    note(&format!("{rounds} rounds"));
    let removed = sys::wait_until(Duration::from_secs(5), || fs::remove_dir(&dir).is_ok());
    check!(removed, "rmdir of the cgroup: expected success");
    for (target, before) in targets.iter().zip(before) {
        let audit = target.expect_violations(before)?;
        check_eq!(audit.used, 0, "pages in use");
    }
    works(ctx)
}

/// Capabilities in a user namespace of the process's own do not count.
fn user_namespace(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(4, 1660)?;
    target.move_all(&buf, 1660)?;
    // The process is root in its own namespace, and has the same user id as root outside.
    Child::spawn(|| {
        if let Err(e) = sys::new_user_namespace() {
            return Err(Fail::Skip(format!("no user namespaces: {e}")));
        }
        let seen = target.inspect(&buf, 0, 4).or_fail("ZDM_INSPECT")?;
        check!(
            seen.iter().all(|p| p.pfn == 0),
            "frames that root of a namespace sees: expected none, found {seen:x?}"
        );
        for flags in [ZDM_AUDIT_QUIET, ZDM_AUDIT_CLEAR, ZDM_AUDIT_PASS] {
            expect_errno(target.try_audit(flags), &[EPERM], "ZDM_AUDIT with flags")?;
        }
        expect_errno(
            target.inspect_at(1, 1, ZDM_INSPECT_PFN),
            &[EPERM],
            "ZDM_INSPECT of a frame",
        )?;
        expect_errno(
            target.inject(ZDM_INJECT_EXTRA_GET, buf.at(0)),
            &[EPERM],
            "ZDM_INJECT",
        )?;
        sys::limit(Resource::RLIMIT_MEMLOCK, 2 * PAGE as u64).or_fail("setrlimit")?;
        let own = Buffer::filled(4, 1661)?;
        for flags in PINS {
            let more = target.pin(&own, 0, 3, flags);
            expect_errno(more, &[libc::ENOMEM], "ZDM_PIN of more than RLIMIT_MEMLOCK")?;
        }
        Ok(())
    })?
    .join()
}

/// Special areas: no rights, a guard, a userfaultfd, a seal, a pin.
fn odd_areas(ctx: &Ctx) -> Outcome {
    const N: usize = 8;
    for target in open_all(ctx)? {
        let other = Device::open(1)?;
        let none = Buffer::filled(N, 1670)?;
        none.protect(2, 4, libc::PROT_NONE)?;
        expect_errno(
            target.read(&none, 0, N),
            &[EFAULT, EPERM],
            "READ of PROT_NONE",
        )?;
        every_ioctl(&target, none.at(0), N)?;
        none.protect(2, 4, libc::PROT_READ | libc::PROT_WRITE)?;
        none.check(0, N, 1670)?;

        let stack = Buffer::stack(N).or_fail("mmap of MAP_GROWSDOWN")?;
        stack.fill(0, N, 1671);
        every_ioctl(&target, stack.at(0) - 4 * PAGE as u64, 4 + N)?;
        every_ioctl(&target, stack.at(0), N)?;
        stack.check(0, N, 1671)?;

        let sealed = Buffer::filled(N, 1672)?;
        if sealed.seal().is_ok() {
            every_ioctl(&target, sealed.at(0), N)?;
            sealed.check(0, N, 1672)?;
        }

        let locked = Buffer::filled(N, 1673)?;
        locked.lock(0, N, true)?;
        every_ioctl(&target, locked.at(0), N)?;
        locked.check(0, N, 1673)?;

        let pinned = Buffer::filled(N, 1674)?;
        let id = other.pin(&pinned, 0, N, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE);
        every_ioctl(&target, pinned.at(0), N)?;
        pinned.check(0, N, 1674)?;
        if let Ok(id) = id {
            other.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        }

        let handled = Buffer::anon(N)?;
        if let Ok(uffd) = Uffd::new() {
            uffd.register(&handled, 0, N).or_fail("UFFDIO_REGISTER")?;
            // No process answers the userfaultfd: the waiting child is killed.
            let child = Child::spawn(|| {
                let device = Device::open(target.node())?;
                every_ioctl(&device, handled.at(0), N)
            })?;
            std::thread::sleep(Duration::from_millis(100));
            let start = Instant::now();
            child.kill()?;
            check!(
                start.elapsed() < Duration::from_secs(3),
                "time that a process killed in a fault stays: found {:?}",
                start.elapsed()
            );
            // READ does not wait, because its fault may not drop the mmap lock.
            expect_errno(
                target.read(&handled, 0, N),
                &[EFAULT],
                "READ of what is handled",
            )?;
            drop(uffd);
        }
        handled.check_zero(0, N)?;
    }
    works(ctx)
}
