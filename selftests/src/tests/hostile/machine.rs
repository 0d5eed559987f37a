// SPDX-License-Identifier: GPL-2.0

//! What the system does with tasks, processors and memory in the midst of commands.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::files::WORKS;
use super::upkeep::KILLED;
use super::{violations, works};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::tests::account::{in_cgroup, join_cgroup};
use crate::tests::target::{open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.frozen_in_each", frozen_in_each),
    test("hostile.processor_goes", processor_goes),
    test("hostile.memory_goes", memory_goes),
];

/// Whether the tasks of a cgroup are frozen.
fn is_frozen(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.events")).is_ok_and(|text| text.contains("frozen 1"))
}

/// A process is frozen in the midst of each command, goes on, is frozen again, and is killed there. Others
/// use the device meanwhile.
fn frozen_in_each(ctx: &Ctx) -> Outcome {
    const N: usize = 8 * HUGE_PAGES;
    let targets = open_all(ctx)?;
    let (mut longest, mut others) = (Duration::ZERO, Duration::ZERO);
    for (round, (name, work)) in WORKS.into_iter().enumerate() {
        let target = &targets[round % targets.len()];
        let node = target.node();
        let before = target.audit()?.0.total;
        in_cgroup(&[], |dir| {
            let child = Child::spawn(|| {
                join_cgroup(dir)?;
                let device = Device::open(node)?;
                let [buf, to] = [Buffer::filled(N, 1810)?, Buffer::filled(N, 1810)?];
                loop {
                    let _ = work(&device, &buf, &to);
                }
            })?;
            std::thread::sleep(Duration::from_millis(150));
            for _ in 0..2 {
                fs::write(dir.join("cgroup.freeze"), "1").or_fail("cgroup.freeze")?;
                let frozen = sys::wait_until(Duration::from_secs(10), || is_frozen(dir));
                check!(frozen, "{name}: expected it to be frozen in 10 s");
                let start = Instant::now();
                works(ctx)?;
                target.release().or_fail("RELEASE")?;
                let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
                check_eq!(audit.found, 0, "{name}: violations, {records:x?}");
                others = others.max(start.elapsed());
                fs::write(dir.join("cgroup.freeze"), "0").or_fail("cgroup.freeze")?;
                std::thread::sleep(Duration::from_millis(20));
            }
            fs::write(dir.join("cgroup.freeze"), "1").or_fail("cgroup.freeze")?;
            let start = Instant::now();
            fs::write(dir.join("cgroup.kill"), "1").or_fail("cgroup.kill")?;
            check_eq!(child.exit()?, Exit::Signal(libc::SIGKILL), "{name}: end");
            longest = longest.max(start.elapsed());
            Ok(())
        })?;
        target.expect_empty()?;
        let (audit, records) = target.audit()?;
        check_eq!(audit.total, before, "{name}: violations, {records:x?}");
    }
    note(&format!(
        "killed in {longest:?}; commands of others took {others:?}"
    ));
    check!(longest < KILLED, "time of cgroup.kill: found {longest:?}");
    check!(
        others < Duration::from_secs(5),
        "time of the commands of others: found {others:?}"
    );
    works(ctx)
}

/// A processor that is on again when this is dropped.
struct Processor(&'static str);

impl Processor {
    fn switch(&self, on: bool) -> std::io::Result<()> {
        fs::write(self.0, if on { "1" } else { "0" })
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let _ = self.switch(true);
    }
}

/// A processor goes off and on again while tasks use the devices. The references of a pagemap are counted
/// by processor, and what the one that is off has counted is not lost.
fn processor_goes(ctx: &Ctx) -> Outcome {
    const N: usize = 256;
    const TIMES: usize = 4;
    let processor = Processor("/sys/devices/system/cpu/cpu1/online");
    let targets = open_each_kind(ctx)?;
    for target in &targets {
        let before = target.audit()?.0.total;
        let node = target.node();
        // What the processor that goes has counted.
        let stays = Buffer::filled(N, 1811)?;
        if sys::run_on(1).is_err() {
            return Err(Fail::Skip("only one processor".into()));
        }
        target.move_all(&stays, 1811)?;
        sys::run_on(0).or_fail("sched_setaffinity")?;
        let workers = (0..2)
            .map(|_| {
                Child::spawn(|| {
                    let _ = sys::run_on(1);
                    let device = Device::open(node)?;
                    let buf = Buffer::filled(N, 1812)?;
                    loop {
                        let _ = device.to_device(&buf, 0, N);
                        buf.check(0, N / 2, 1812)?;
                        let _ = device.to_system(&buf, 0, N);
                        let _ = device.exclusive(&buf, 0, 16);
                        buf.check(0, N, 1812)?;
                    }
                })
            })
            .collect::<Outcome<Vec<_>>>()?;
        for _ in 0..TIMES {
            processor
                .switch(false)
                .map_err(|e| Fail::Skip(format!("the processor stays: {e}")))?;
            let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
            check_eq!(audit.found, 0, "violations, {records:x?}");
            check!(audit.used >= N as u64, "used pages: found {}", audit.used);
            processor.switch(true).or_fail("the processor")?;
            std::thread::sleep(Duration::from_millis(50));
        }
        for worker in workers {
            check!(worker.is_running()?, "a process: expected it to run");
            worker.kill()?;
        }
        processor.switch(false).or_fail("the processor")?;
        target.expect(&stays, 0, N, N)?;
        stays.check(0, N, 1811)?;
        drop(stays);
        target.expect_empty()?;
        target.release().or_fail("RELEASE")?;
        processor.switch(true).or_fail("the processor")?;
        target.expect_violations(before)?;
    }
    works(ctx)
}

/// A block of memory that is on again when this is dropped.
struct Block(PathBuf);

impl Block {
    fn switch(&self, on: bool) -> std::io::Result<()> {
        let state = if on { "online" } else { "offline" };
        fs::write(self.0.join("state"), state)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let _ = self.switch(true);
    }
}

/// The blocks of memory, the last ones first.
fn blocks() -> Outcome<Vec<Block>> {
    const DIR: &str = "/sys/devices/system/memory";
    let entries = fs::read_dir(DIR).map_err(|e| Fail::Skip(format!("{DIR}: {e}")))?;
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix("memory")?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    found.sort();
    Ok(found
        .into_iter()
        .rev()
        .map(|(_, path)| Block(path))
        .collect())
}

/// Whether a block goes off in 30 s. What cannot move stays, and its block with it.
fn goes(block: &Block) -> Outcome<bool> {
    let child = Child::spawn(|| sys::exit_now(i32::from(block.switch(false).is_err())))?;
    let ended = sys::wait_until(Duration::from_secs(30), || {
        child.is_running().is_ok_and(|runs| !runs)
    });
    Ok(match ended {
        true => child.exit()? == Exit::Code(0),
        false => {
            child.kill()?;
            false
        }
    })
}

/// Blocks of memory go off and on again, for which their pages have to move, while tasks migrate pages and
/// RELEASE takes away the devices' own memory, which needs the same lock.
fn memory_goes(ctx: &Ctx) -> Outcome {
    const N: usize = 600;
    const TRIED: usize = 3;
    let targets = open_each_kind(ctx)?;
    let before = violations(&targets)?;
    let blocks = blocks()?;
    let workers = targets
        .iter()
        .map(|target| {
            let node = target.node();
            Child::spawn(|| {
                let device = Device::open(node)?;
                let [buf, pinned] = [Buffer::filled(N, 1830)?, Buffer::filled(N, 1831)?];
                loop {
                    // A page may stay where it is.
                    let _ = device.to_device(&buf, 0, N);
                    let _ = device.to_system(&buf, 100, N - 200);
                    if let Ok(id) = device.pin(&pinned, 0, N, ZDM_PIN_WRITE) {
                        let _ = device.unpin(id, 0);
                    }
                    let _ = device.exclusive(&pinned, 0, 64);
                    let _ = device.release();
                    buf.check(0, N, 1830)?;
                    pinned.check(0, N, 1831)?;
                }
            })
        })
        .collect::<Outcome<Vec<_>>>()?;
    let start = Instant::now();
    let mut went = 0;
    for block in blocks.iter().take(TRIED) {
        if goes(block)? {
            went += 1;
            works(ctx)?;
            block.switch(true).or_fail("a block that goes on again")?;
        }
    }
    note(&format!(
        "{went} of {TRIED} blocks went, in {:?}",
        start.elapsed()
    ));
    for worker in workers {
        check!(worker.is_running()?, "a process: expected it to run");
        worker.kill()?;
    }
    for (target, before) in targets.iter().zip(before) {
        target.expect_empty()?;
        target.expect_violations(before)?;
    }
    works(ctx)?;
    match went {
        0 => Err(Fail::Skip("no block of memory can go".into())),
        _ => Ok(()),
    }
}
