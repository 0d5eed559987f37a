// SPDX-License-Identifier: GPL-2.0

//! Commands when memory is short: the OOM killer ends the caller in the midst of each, and reclaim goes by
//! generations.

use std::fs;
use std::time::{Duration, Instant};

use super::files::{LONG, WORKS};
use super::{violations, works};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, PAGE};
use crate::harness::{Child, note};
use crate::swap::Swap;
use crate::sys::{self, Exit};
use crate::tests::account::{in_cgroup, join_cgroup};
use crate::tests::target::{open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.oom_killed_in_each", oom_killed_in_each),
    test("hostile.generations", generations),
];

/// The OOM killer ends a process that is in the midst of a command, because another of its threads needs
/// memory. Nothing stays behind.
fn oom_killed_in_each(ctx: &Ctx) -> Outcome {
    /// The limit of the cgroup, and more than that.
    const LIMIT: (&str, &str) = ("memory.max", "16M");
    const MORE: usize = (24 << 20) / PAGE;
    const PACE: Duration = Duration::from_millis(550);
    let targets = open_all(ctx)?;
    let before = violations(&targets)?;
    let mut longest = (Duration::ZERO, "");
    for (round, (name, work)) in WORKS.into_iter().enumerate() {
        let node = targets[round % targets.len()].node();
        in_cgroup(&[LIMIT], |dir| {
            let child = Child::spawn(|| {
                let device = Device::open(node)?;
                let [buf, to] = [Buffer::anon(LONG)?, Buffer::anon(LONG)?];
                let more = Buffer::anon(MORE)?;
                join_cgroup(dir)?;
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(Duration::from_millis(5 + 9 * round as u64));
                        more.fill(0, MORE, 1770);
                    });
                    loop {
                        let _ = work(&device, &buf, &to);
                    }
                })
            })?;
            let start = Instant::now();
            let ended = sys::wait_until(Duration::from_secs(30), || {
                child.is_running().is_ok_and(|runs| !runs)
            });
            check!(ended, "{name}: expected the OOM killer to end it in 30 s");
            longest = longest.max((start.elapsed(), name));
            let end = child.exit()?;
            check_eq!(end, Exit::Signal(libc::SIGKILL), "{name}: end");
            let events = fs::read_to_string(dir.join("memory.events")).or_fail("events")?;
            let kills = events.lines().find_map(|l| l.strip_prefix("oom_kill "));
            check!(
                kills.is_some_and(|n| n != "0"),
                "{name}: expected the cgroup to have killed, found {events}"
            );
            // The kernel logs no more than 10 of them in 5 s.
            std::thread::sleep(PACE.saturating_sub(start.elapsed()));
            Ok(())
        })?;
    }
    note(&format!("{} took longest: {:?}", longest.1, longest.0));
    for (target, before) in targets.iter().zip(before) {
        target.expect_empty()?;
        target.expect_violations(before)?;
    }
    works(ctx)
}

/// Reclaim by generations (CONFIG_LRU_GEN), which is as it was before when this is dropped.
struct Generations {
    before: String,
}

impl Generations {
    const ENABLED: &str = "/sys/kernel/mm/lru_gen/enabled";
    const LISTS: &str = "/sys/kernel/debug/lru_gen";

    fn on() -> Outcome<Self> {
        let skip = |e| Fail::Skip(format!("{}: {e}", Self::ENABLED));
        let before = fs::read_to_string(Self::ENABLED).map_err(skip)?;
        fs::write(Self::ENABLED, "y").map_err(skip)?;
        Ok(Self { before })
    }

    /// Makes a new generation of each list, which walks all page tables. Returns how many were made.
    fn age(&self) -> Outcome<usize> {
        let text = fs::read_to_string(Self::LISTS).or_fail(Self::LISTS)?;
        let (mut memcg, mut node, mut made) = ("", "", 0);
        let mut lines = text.lines().map(str::trim_start).peekable();
        while let Some(line) = lines.next() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("memcg"), Some(id)) => memcg = id,
                (Some("node"), Some(id)) => node = id,
                (Some(newest), _) => {
                    let is_last = !lines
                        .peek()
                        .is_some_and(|next| next.starts_with(|c: char| c.is_ascii_digit()));
                    // The list may have got another generation meanwhile.
                    let command = format!("+ {memcg} {node} {newest} 1 1");
                    made += usize::from(is_last && fs::write(Self::LISTS, command).is_ok());
                }
                _ => {}
            }
        }
        Ok(made)
    }
}

impl Drop for Generations {
    fn drop(&mut self) {
        let _ = fs::write(Self::ENABLED, self.before.trim());
    }
}

/// Reclaim by generations keeps its numbers in the flags of folios, and walks page tables that map pages of
/// the device. Pages on the way to the device and back, in a process that has too little memory, keep their
/// data, and leave nothing in the device's folios.
fn generations(ctx: &Ctx) -> Outcome {
    const PAGES: usize = 4096;
    let generations = Generations::on()?;
    let _swap = Swap::on()?;
    let mut made = 0;
    for target in open_each_kind(ctx)? {
        let before = target.audit()?.0.total;
        let node = target.node();
        in_cgroup(&[("memory.max", "24M")], |dir| {
            let child = Child::spawn(|| {
                join_cgroup(dir)?;
                let device = Device::open(node)?;
                let buf = Buffer::filled(PAGES, 1780)?;
                let more = Buffer::filled(PAGES, 1781)?;
                let end = Instant::now() + Duration::from_secs(3);
                for round in 0.. {
                    let first = round * 257 % (PAGES - 512);
                    // A page may be in swap, or held.
                    let _ = device.to_device(&buf, first, 512);
                    let _ = more.try_advise(first, 512, libc::MADV_COLD);
                    more.check(first, 64, 1781)?;
                    let _ = device.exclusive(&more, first, 8);
                    if round % 3 == 0 {
                        let _ = device.to_system(&buf, first, 256);
                        let _ = buf.try_advise(first, 512, libc::MADV_PAGEOUT);
                    }
                    buf.check(first + 128, 64, 1780)?;
                    if Instant::now() >= end {
                        break;
                    }
                }
                buf.check(0, PAGES, 1780)?;
                more.check(0, PAGES, 1781)
            })?;
            while child.is_running()? {
                made += generations.age()?;
                let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
                check_eq!(audit.found, 0, "violations, {records:x?}");
            }
            child.join()
        })?;
        target.expect_empty()?;
        target.expect_violations(before)?;
    }
    note(&format!("{made} generations"));
    check!(made > 0, "generations: expected some");
    works(ctx)
}
