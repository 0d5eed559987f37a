// SPDX-License-Identifier: GPL-2.0

//! What the system does with tasks and processors in the midst of commands.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::files::WORKS;
use super::upkeep::KILLED;
use super::works;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES};
use crate::harness::{Child, note};
use crate::sys::{self, Exit};
use crate::tests::account::{in_cgroup, join_cgroup};
use crate::tests::target::{open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.frozen_in_each", frozen_in_each),
    test("hostile.processor_goes", processor_goes),
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
