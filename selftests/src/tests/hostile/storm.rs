// SPDX-License-Identifier: GPL-2.0

//! Many commands at the same time, in an order that nobody chose, and forks and other programs in the midst
//! of each.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::Resource;

use super::files::{LONG, WORKS};
use super::upkeep::KILLED;
use super::{Numbers, PINS, READS, works};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::tests::target::{huge_filled, open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq, files, threads};

pub const TESTS: &[Test] = &[
    test("hostile.storm", storm),
    test("hostile.fork_in_each", fork_in_each),
    test("hostile.exec_in_each", exec_in_each),
];

/// What a thread of the storm has to itself.
struct Caller {
    numbers: Numbers,
    room: Buffer,
    pins: Vec<u32>,
    done: usize,
}

impl Caller {
    const ROOM: usize = 64;

    fn new(seed: u64) -> Outcome<Self> {
        Ok(Self {
            numbers: Numbers(seed),
            room: Buffer::filled(Self::ROOM, seed)?,
            pins: Vec::new(),
            done: 0,
        })
    }

    /// A random part of a buffer: the first page, and the number of pages.
    fn part(&mut self, buf: &Buffer) -> (usize, usize) {
        let first = (self.numbers.next() % buf.pages() as u64) as usize;
        let most = self.numbers.pick(&[1, 4, 16, Self::ROOM as u64]);
        let n = 1 + (self.numbers.next() % most) as usize;
        (first, n.min(buf.pages() - first))
    }

    /// One random command on a random part of `buf`.
    fn command(&mut self, device: &Device, buf: &Buffer) {
        let (first, n) = self.part(buf);
        let (addr, pages) = (buf.at(first), n as u64);
        let is_ok = match self.numbers.next() % 64 {
            0..20 => {
                let request = self.numbers.pick(&READS);
                let data = Data::At(&self.room, 0);
                device.command(request, addr, pages, data).is_ok()
            }
            20..26 => {
                let data = Data::At(&self.room, 0);
                device.command(HMM_WRITE, addr, pages, data).is_ok()
            }
            26..34 => {
                let all = self.numbers.next() % 4 == 0;
                let (first, n) = if all { (0, buf.pages()) } else { (first, n) };
                device.to_system(buf, first, n).is_ok()
            }
            34..38 => {
                // The other end is in the same memory.
                let other = self.part(buf).0.min(buf.pages() - n);
                let request = self.numbers.pick(&READS);
                let data = Data::At(buf, other);
                device.command(request, addr, pages, data).is_ok()
            }
            38..42 => device
                .fault(addr, pages, self.numbers.pick(&[0, ZDM_FAULT_WRITE]))
                .is_ok(),
            42..47 => {
                let id = device.pin_at(addr, pages, self.numbers.pick(&PINS));
                let is_ok = id.is_ok();
                self.pins.extend(id);
                if self.pins.len() > 3 {
                    let id = self.pins.swap_remove(0);
                    let _ = device.unpin(id, self.numbers.pick(&[0, ZDM_UNPIN_DIRTY]));
                }
                is_ok
            }
            // One that another thread may have.
            47 => device.unpin((self.numbers.next() % 64) as u32, 0).is_ok(),
            48..51 => device.snapshot(buf, first, n).is_ok(),
            51..54 => device.inspect_at(addr, n, 0).is_ok(),
            54..57 => device.check_exclusive(buf, first, n).is_ok(),
            57 => device.fail_alloc().is_ok(),
            58 => {
                let pages = (self.numbers.next() % 600) as u32;
                device.fault_around(pages).is_ok()
            }
            59 => self.numbers.next() % 8 == 0 && device.release().is_ok(),
            60 => device.try_audit(0).is_ok(),
            61 => device.stats().is_ok(),
            _ => {
                let mut arg: Vec<u8> = (0..32)
                    .flat_map(|_| {
                        let words = [0, 1, pages, addr, self.room.at(1), u64::MAX, 1 << 52];
                        self.numbers.pick(&words).to_ne_bytes()
                    })
                    .collect();
                let request = self
                    .numbers
                    .pick(&[HMM_FLAGS, ZDM_AUDIT, ZDM_INSPECT, ZDM_PIN]);
                device.ioctl_bytes(request, &mut arg).is_ok()
            }
        };
        self.done += usize::from(is_ok);
    }

    /// One random change of the memory, which stays mapped: something of the test's own could take the
    /// place of what is not.
    fn change(&mut self, buf: &Buffer, place: &Buffer) {
        const ADVICES: [i32; 10] = [
            libc::MADV_DONTNEED,
            libc::MADV_FREE,
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_POPULATE_READ,
            libc::MADV_POPULATE_WRITE,
            libc::MADV_MERGEABLE,
            // MADV_COLLAPSE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE.
            25,
            102,
            103,
        ];
        let (first, n) = self.part(buf);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        match self.numbers.next() % 16 {
            0..8 => {
                let _ = buf.try_advise(first, n, self.numbers.pick(&ADVICES));
            }
            8..10 => {
                let prots = [libc::PROT_NONE, libc::PROT_READ, both];
                let _ = buf.protect(first, n, self.numbers.pick(&prots));
                let _ = buf.protect(first, n, both);
            }
            10 => {
                let _ = buf.try_lock(first, n, true);
                let _ = buf.try_lock(first, n, false);
            }
            11 => {
                let _ = buf.move_contents(first, n, place, first);
                let _ = place.move_contents(first, n, buf, first);
            }
            12 => {
                if let Ok(pid) = sys::fork(|| 0) {
                    let _ = sys::wait(pid, true);
                }
            }
            // The CPU reads, where it can.
            _ => {
                let n = n.min(Self::ROOM);
                let _ = files::read_process(sys::pid(), buf, first, &self.room, n);
            }
        }
    }
}

/// Eight threads without capabilities execute random commands on the same file, on memory that two others
/// change.
fn storm(ctx: &Ctx) -> Outcome {
    const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
    const CALLERS: usize = 8;
    const TIME: Duration = Duration::from_millis(2500);
    let mut done = 0;
    for target in open_each_kind(ctx)? {
        let before = target.audit()?.0.total;
        let node = target.node();
        let (news, say) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            let device = Device::open(node)?;
            sys::limit(Resource::RLIMIT_MEMLOCK, 512 * PAGE as u64).or_fail("setrlimit")?;
            sys::become_nobody().or_fail("setresuid")?;
            let buf = Buffer::anon_huge_aligned(2 * HUGE_PAGES)?;
            let _ = buf.try_advise(0, buf.pages(), libc::MADV_HUGEPAGE);
            let place = Buffer::anon(buf.pages())?;
            let end = Instant::now() + TIME;
            let done = AtomicUsize::new(0);
            threads::run(CALLERS + 2, |i| {
                let mut caller = Caller::new(SEED.rotate_left(i as u32 * 5))?;
                while Instant::now() < end {
                    match i < CALLERS {
                        true => caller.command(&device, &buf),
                        false => caller.change(&buf, &place),
                    }
                }
                done.fetch_add(caller.done, Ordering::Relaxed);
                Ok(())
            })?;
            let done = done.into_inner() as u64;
            std::io::Write::write_all(&mut &say, &done.to_ne_bytes()).or_fail("pipe")
        })?;
        drop(say);
        let ended = sys::wait_until(TIME + Duration::from_secs(20), || {
            child.is_running().is_ok_and(|runs| !runs)
        });
        check!(ended, "the storm: expected its end 20 s after its time");
        child.join()?;
        let mut count = [0; 8];
        std::io::Read::read_exact(&mut &news, &mut count).or_fail("pipe")?;
        done += u64::from_ne_bytes(count);
        target.expect_empty()?;
        target.expect_violations(before)?;
    }
    note(&format!("{done} commands succeeded"));
    check!(done > 200, "commands that succeeded: found {done}");
    works(ctx)
}

/// A thread forks in the midst of each command. Parent and children have the same data.
fn fork_in_each(ctx: &Ctx) -> Outcome {
    const N: usize = 2 * HUGE_PAGES;
    const FORKS: usize = 4;
    let targets = open_all(ctx)?;
    for (round, (name, work)) in WORKS.into_iter().enumerate() {
        let target = &targets[round % targets.len()];
        let node = target.node();
        let before = target.audit()?.0.total;
        Child::spawn(|| {
            let device = Device::open(node)?;
            // What WRITE writes is what is there.
            let [buf, to] = match round % 2 {
                0 => [Buffer::filled(N, 1790)?, Buffer::filled(N, 1790)?],
                _ => [huge_filled(2, 1790)?, huge_filled(2, 1790)?],
            };
            // A page of a snapshot is a byte.
            let kept = if name == "SNAPSHOT" { 8 } else { 0 };
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let _stop = threads::SetOnDrop(&stop);
                let (stop, device, buf, to) = (&stop, &device, &buf, &to);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let _ = work(device, buf, to);
                    }
                });
                let mut result = Ok(());
                for fork in 0..FORKS {
                    std::thread::sleep(Duration::from_millis(3 + 5 * fork as u64));
                    result = Child::spawn(|| {
                        let first = fork * (N / FORKS);
                        buf.check(first, 40, 1790)?;
                        buf.fill(first, 20, 1791);
                        buf.check(first, 20, 1791)?;
                        let _ = device.to_system(buf, 0, N);
                        Ok(())
                    })?
                    .join();
                    if result.is_err() {
                        break;
                    }
                }
                result
            })?;
            buf.check(0, N, 1790)?;
            to.check(kept, N - kept, 1790)
        })?
        .join()?;
        target.expect_empty()?;
        let (audit, records) = target.audit()?;
        check_eq!(audit.total, before, "{name}: violations, {records:x?}");
    }
    works(ctx)
}

/// A process becomes another program in the midst of each command, which a thread of it executes on a range
/// on which it takes long.
fn exec_in_each(ctx: &Ctx) -> Outcome {
    const BUSYBOX: &str = "/bin/busybox";
    let targets = open_all(ctx)?;
    let mut longest = (Duration::ZERO, "");
    for (round, (name, work)) in WORKS.into_iter().enumerate() {
        let target = &targets[round % targets.len()];
        let node = target.node();
        let before = target.audit()?.0.total;
        let (news, say) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            let device = Device::open(node)?;
            let [buf, to] = [Buffer::anon(LONG)?, Buffer::anon(LONG)?];
            std::thread::scope(|scope| {
                let (device, buf, to) = (&device, &buf, &to);
                scope.spawn(move || {
                    loop {
                        let _ = work(device, buf, to);
                    }
                });
                std::thread::sleep(Duration::from_millis(40));
                let _ = std::io::Write::write_all(&mut &say, b"n");
                use std::os::unix::process::CommandExt;
                let _ = Command::new(BUSYBOX).arg0("true").exec();
                sys::exit_now(3)
            })
        })?;
        drop(say);
        let begun = sys::readable(&news, Duration::from_secs(20)).or_fail("poll")?;
        let start = Instant::now();
        check!(begun, "{name}: the process never began");
        check_eq!(child.exit()?, Exit::Code(0), "{name}: end of the program");
        longest = longest.max((start.elapsed(), name));
        target.expect_empty()?;
        let (audit, records) = target.audit()?;
        check_eq!(audit.total, before, "{name}: violations, {records:x?}");
    }
    note(&format!(
        "{} took longest to end: {:?}",
        longest.1, longest.0
    ));
    check!(
        longest.0 < KILLED,
        "time of exec in the midst of {}: found {:?}",
        longest.1,
        longest.0
    );
    works(ctx)
}
