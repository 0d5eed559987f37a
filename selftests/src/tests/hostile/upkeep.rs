// SPDX-License-Identifier: GPL-2.0

//! What a caller may cost others: memory that no limit sees, and waits for what the caller never
//! does.

use std::time::{Duration, Instant};

use super::lives::{Opener, say_word, wait_word};
use super::works;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE, check_bytes};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::tests::account::{current, in_cgroup, join_cgroup};
use crate::tests::target::{PRIVATE, Target};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.table_goes_with_the_area", table_goes_with_the_area),
    test("hostile.opener_keeps_its_lock", opener_keeps_its_lock),
    test("hostile.opener_forks_slowly", opener_forks_slowly),
    test("hostile.throttled_migration", throttled_migration),
    test("hostile.nobody_answers", nobody_answers),
];

/// The longest that a killed process may stay.
pub(super) const KILLED: Duration = Duration::from_secs(3);

/// The device's page table takes no more memory than the CPU's: what is unmapped page by page, in
/// areas that are far from each other, leaves nothing behind.
fn table_goes_with_the_area(ctx: &Ctx) -> Outcome {
    const PARTS: usize = 16;
    const BLOCKS: usize = 64;
    const ALL: u64 = (PARTS * BLOCKS) as u64;
    in_cgroup(&[], |dir| {
        Child::spawn(|| {
            join_cgroup(dir)?;
            let device = Device::open(0)?;
            let parts: Vec<Buffer> = (0..PARTS)
                .map(|_| Buffer::anon_huge_aligned(BLOCKS * HUGE_PAGES))
                .collect::<Outcome<_>>()?;
            // Of each block one page stays, an area of its own.
            for part in &parts {
                for block in 0..BLOCKS {
                    part.unmap(block * HUGE_PAGES + 1, HUGE_PAGES - 1)?;
                }
            }
            let mut room = vec![1; PAGE];
            let before = current(dir)?;
            for part in &parts {
                for page in (0..part.pages()).step_by(HUGE_PAGES) {
                    part.fill(page, 1, 1700);
                    let read = Data::Into(&mut room);
                    device
                        .command(HMM_READ, part.at(page), 1, read)
                        .or_fail("READ")?;
                    part.unmap(page, 1)?;
                }
            }
            let grown = current(dir)?.saturating_sub(before);
            note(&format!("{grown} pages for {ALL} areas"));
            // CPUs keep charges in stock.
            check!(
                grown < ALL / 2,
                "pages that {ALL} unmapped areas leave charged: expected fewer than {}, found {grown}",
                ALL / 2
            );
            Ok(())
        })?
        .join()
    })?;
    works(ctx)
}

/// A command on a page of a buffer.
type Work = fn(&Device, &Buffer, usize) -> std::io::Result<()>;

const WORKS: [(&str, Work); 8] = [
    ("READ", |d, buf, page| d.read(buf, page, 1).map(drop)),
    ("READ_UNLOCKED", |d, buf, page| {
        d.read_unlocked(buf, page, 1).map(drop)
    }),
    ("WRITE", |d, buf, page| {
        d.write(buf, page, &[1; PAGE]).map(drop)
    }),
    ("MIGRATE_TO_DEV", |d, buf, page| {
        d.to_device(buf, page, 1).map(drop)
    }),
    ("MIGRATE_TO_SYS", |d, buf, page| {
        d.to_system(buf, page, 1).map(drop)
    }),
    ("EXCLUSIVE", |d, buf, page| {
        d.exclusive(buf, page, 1).map(drop)
    }),
    ("SNAPSHOT", |d, buf, page| {
        d.snapshot(buf, page, 1).map(drop)
    }),
    ("ZDM_INSPECT", |d, buf, page| {
        d.inspect(buf, page, 1).map(drop)
    }),
];

/// A process that uses the file of another one can be killed while the opener does something with its own
/// address space for which its cgroup makes it wait. The opener has every `step`th page of `buf`.
fn while_the_opener(
    ctx: &Ctx,
    buf: &Buffer,
    step: usize,
    work_of_opener: impl Fn(&Device) -> std::io::Result<()>,
) -> Outcome {
    in_cgroup(&[("memory.high", "1M")], |dir| {
        let opener = Opener::start(0, |device, socket| {
            for page in (0..buf.pages()).step_by(step) {
                buf.fill(page, 1, 1701);
            }
            join_cgroup(dir)?;
            say_word(socket)?;
            wait_word(socket)?;
            let _ = work_of_opener(device);
            Ok(())
        })?;
        let read = opener.device.read(buf, 0, 1).or_fail("READ")?;
        check_bytes(&read.data, 1701, 0, "READ")?;
        opener.tell()?;
        std::thread::sleep(Duration::from_millis(500));
        let waiting = WORKS
            .iter()
            .enumerate()
            .map(|(i, (name, work))| {
                let child = Child::spawn(|| {
                    let _ = work(&opener.device, buf, (i + 1) * step);
                    Ok(())
                })?;
                Ok((*name, child))
            })
            .collect::<Outcome<Vec<_>>>()?;
        std::thread::sleep(Duration::from_millis(500));
        let mut times = Vec::new();
        for (name, child) in waiting {
            let waits = child.is_running()?;
            let start = Instant::now();
            sys::kill(child.pid(), libc::SIGKILL).or_fail("kill")?;
            let ended = sys::wait_until(KILLED, || child.is_running().is_ok_and(|runs| !runs));
            times.push((name, waits, ended, start.elapsed()));
        }
        let start = Instant::now();
        let end = opener.child.kill()?;
        let took = start.elapsed();
        note(&format!("{times:?}, opener {took:?}"));
        check_eq!(end, Exit::Signal(libc::SIGKILL), "end of the opener");
        check!(
            took < KILLED,
            "time that the killed opener stays: found {took:?}"
        );
        check!(
            times.iter().all(|(_, waits, _, _)| *waits),
            "processes that wait for the opener: expected all, found {times:?}"
        );
        check!(
            times.iter().all(|(_, _, ended, _)| *ended),
            "killed processes: expected their end in {KILLED:?}, found {times:?}"
        );
        Ok(())
    })?;
    works(ctx)
}

/// The opener keeps the lock of its address space: it maps the device.
fn opener_keeps_its_lock(ctx: &Ctx) -> Outcome {
    let buf = Buffer::anon(16)?;
    while_the_opener(ctx, &buf, 1, |device| {
        device.map((64 << 20) / PAGE, libc::MAP_SHARED).map(drop)
    })
}

/// The opener forks, and waits for a page table in the midst of an invalidation.
fn opener_forks_slowly(ctx: &Ctx) -> Outcome {
    let buf = Buffer::anon(1024 * HUGE_PAGES)?;
    while_the_opener(ctx, &buf, HUGE_PAGES, |_| sys::fork(|| 0).map(drop))
}

/// A migration that its cgroup slows down, in the midst of which it waits for seconds, is no violation
/// for others, and can be killed.
fn throttled_migration(ctx: &Ctx) -> Outcome {
    const N: usize = 4096;
    let target = Target::open(ctx, PRIVATE)?;
    let before = target.audit()?.0.total;
    in_cgroup(&[("memory.high", "1M")], |dir| {
        let child = Child::spawn(|| {
            let device = Device::open(0)?;
            let buf = Buffer::anon(N)?;
            // Some of the pages are there.
            for page in (0..N).step_by(7) {
                buf.fill(page, 1, 1702);
            }
            join_cgroup(dir)?;
            // Without a place for the data, which would be charged, too.
            loop {
                for request in [HMM_MIGRATE_TO_DEV, HMM_MIGRATE_TO_SYS] {
                    let _ = device.command(request, buf.at(0), N as u64, Data::Nowhere);
                }
            }
        })?;
        let end = Instant::now() + Duration::from_secs(6);
        let (mut scans, mut used) = (0, 0);
        while Instant::now() < end {
            let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
            check_eq!(audit.found, 0, "violations, {records:x?}");
            used = used.max(audit.used);
            scans += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
        let start = Instant::now();
        child.kill()?;
        let took = start.elapsed();
        note(&format!("{scans} scans, {used} pages, killed in {took:?}"));
        check!(used > 0, "pages on the device: expected some, found none");
        check!(
            took < KILLED,
            "time that the killed process stays: found {took:?}"
        );
        Ok(())
    })?;
    target.expect_violations(before)?;
    target.expect_empty()?;
    works(ctx)
}

/// A userfaultfd that is never answered keeps nobody but those who want the page.
fn nobody_answers(ctx: &Ctx) -> Outcome {
    const N: usize = 8;
    const COMMANDS: [u64; 4] = [HMM_READ, HMM_MIGRATE_TO_DEV, HMM_WRITE, HMM_SNAPSHOT];
    let buf = Buffer::filled(N + 4 * COMMANDS.len(), 1703)?;
    let handled = Buffer::anon(N)?;
    if Uffd::new().is_err() {
        return Err(Fail::Skip("no userfaultfd".into()));
    }
    let target = Target::open(ctx, PRIVATE)?;
    let opener = Opener::start(0, |_, socket| {
        let uffd = Uffd::new().or_fail("userfaultfd")?;
        uffd.register(&handled, 0, N).or_fail("UFFDIO_REGISTER")?;
        say_word(socket)?;
        wait_word(socket)
    })?;
    let device = &opener.device;
    // They want the page of the opener, or one of their own, as the other end of a command.
    let source = Child::spawn(|| {
        let _ = device.read_unlocked(&handled, 0, 1);
        Ok(())
    })?;
    let ends = COMMANDS
        .into_iter()
        .enumerate()
        .map(|(i, request)| {
            // Each command has pages of its own: one that another command works on does not migrate.
            let pages = buf.at(N + 4 * i);
            let run = || device.command(request, pages, 4, Data::At(&handled, 1));
            let child = Child::spawn(|| {
                let uffd = Uffd::new().or_fail("userfaultfd")?;
                uffd.register(&handled, 0, N).or_fail("UFFDIO_REGISTER")?;
                let mut result = run();
                // So does one that a fork is about to share: the next child starts meanwhile.
                while matches!(&result, Err(e) if e.raw_os_error() == Some(libc::ENOENT)) {
                    result = run();
                }
                Err(Fail::failed(format!(
                    "ioctl {request:#x} returned {result:?}"
                )))
            })?;
            Ok((request, child))
        })
        .collect::<Outcome<Vec<_>>>()?;
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    for (request, child) in &ends {
        check!(
            child.is_running()?,
            "ioctl {request:#x}: expected it to wait"
        );
    }
    check!(source.is_running()?, "READ_UNLOCKED: expected it to wait");
    // The same file, another file of the same device, and all of the device.
    let read = device.read(&buf, 4, 2).or_fail("READ by the same file")?;
    check_bytes(&read.data, 1703, 4, "READ by the same file")?;
    device
        .to_device(&buf, 4, 4)
        .or_fail("MIGRATE_TO_DEV by the same file")?;
    works(ctx)?;
    target.release().or_fail("RELEASE")?;
    let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
    check_eq!(audit.found, 0, "violations, {records:x?}");
    let took = start.elapsed();
    check!(
        took < Duration::from_secs(4),
        "time of the commands of others: found {took:?}"
    );
    for (_, child) in ends {
        let start = Instant::now();
        child.kill()?;
        let took = start.elapsed();
        check!(
            took < KILLED,
            "time that a killed process stays: found {took:?}"
        );
    }
    // With the opener its userfaultfd goes, so that nobody waits for it any more.
    let start = Instant::now();
    opener.child.kill()?;
    source.join()?;
    let took = start.elapsed();
    check!(took < KILLED, "time until nobody waits: found {took:?}");
    works(ctx)
}
