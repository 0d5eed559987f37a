// SPDX-License-Identifier: GPL-2.0

//! Commands when memory is short: the OOM killer ends the caller in the midst of each, and no large pages
//! are free.

use std::fs;
use std::time::{Duration, Instant};

use super::files::{LONG, WORKS};
use super::{violations, works};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::swap::Swap;
use crate::sys::{self, Exit};
use crate::tests::account::{in_cgroup, join_cgroup};
use crate::tests::target::{Target, huge_filled, open_all, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.oom_killed_in_each", oom_killed_in_each),
    test("hostile.without_memory", without_memory),
    test("hostile.nothing_but_small_pages", nothing_but_small_pages),
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

/// The memory that a process may have is taken from it, all of it, in the midst of each command. The process
/// is killed, and nothing stays behind.
fn without_memory(ctx: &Ctx) -> Outcome {
    let targets = open_all(ctx)?;
    let before = violations(&targets)?;
    let mut longest = (Duration::ZERO, "");
    for (round, (name, work)) in WORKS.into_iter().enumerate() {
        let node = targets[round % targets.len()].node();
        in_cgroup(&[], |dir| {
            let child = Child::spawn(|| {
                join_cgroup(dir)?;
                let device = Device::open(node)?;
                let [buf, to] = [Buffer::filled(2048, 1771)?, Buffer::filled(2048, 1771)?];
                loop {
                    let _ = work(&device, &buf, &to);
                    // Something is to be faulted in the next time, too.
                    let _ = device.to_device(&buf, 0, 512);
                }
            })?;
            std::thread::sleep(Duration::from_millis(120 + 9 * round as u64));
            let start = Instant::now();
            // This returns when the pages have gone, or the processes.
            fs::write(dir.join("memory.max"), "0").or_fail("memory.max")?;
            let ended = sys::wait_until(Duration::from_secs(20), || {
                child.is_running().is_ok_and(|runs| !runs)
            });
            longest = longest.max((start.elapsed(), name));
            check!(ended, "{name}: expected the OOM killer to end it in 20 s");
            check_eq!(child.exit()?, Exit::Signal(libc::SIGKILL), "{name}: end");
            // The kernel logs no more than 10 of them in 5 s.
            std::thread::sleep(Duration::from_millis(550).saturating_sub(start.elapsed()));
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

/// Memory of which only single pages are free, until this is dropped.
struct Fragmented {
    _pages: Buffer,
}

impl Fragmented {
    const RESERVE: &str = "/proc/sys/vm/nr_hugepages";
    const COMPACT_LOCKED: &str = "/proc/sys/vm/compact_unevictable_allowed";
    /// The huge pages that are cut into single ones.
    const CUT: usize = 192;
    /// Those that are free meanwhile, so that nobody runs out of memory.
    const SPARE: usize = 64;

    fn number(path: &str) -> Outcome<usize> {
        let text = fs::read_to_string(path).map_err(|e| Fail::Skip(format!("{path}: {e}")))?;
        let n = text.trim().parse();
        n.map_err(|e| Fail::failed(format!("{path}: {e}")))
    }

    fn make() -> Outcome<Self> {
        Self::number(Self::RESERVE)?;
        fs::write(Self::COMPACT_LOCKED, "0")
            .map_err(|e| Fail::Skip(format!("{}: {e}", Self::COMPACT_LOCKED)))?;
        // hugetlbfs takes as many huge pages as there are, and need not clear them.
        fs::write(Self::RESERVE, "1000000").or_fail(Self::RESERVE)?;
        let taken = Self::number(Self::RESERVE)?;
        let pages = Buffer::anon(Self::CUT * HUGE_PAGES)?;
        let fragmented = Self { _pages: pages };
        check!(
            taken > 2 * (Self::CUT + Self::SPARE),
            "huge pages of the machine: expected more than {}, found {taken}",
            2 * (Self::CUT + Self::SPARE)
        );
        fs::write(Self::RESERVE, (taken - Self::CUT - Self::SPARE).to_string())
            .or_fail(Self::RESERVE)?;
        let pages = &fragmented._pages;
        // MADV_POPULATE_WRITE; then locked pages do not move, and every second one goes.
        let _ = pages.try_advise(0, pages.pages(), libc::MADV_POPULATE_WRITE);
        let mut locked = 0;
        while locked < pages.pages() && pages.try_lock(locked, HUGE_PAGES, true).is_ok() {
            locked += HUGE_PAGES;
        }
        fs::write(Self::RESERVE, taken.to_string()).or_fail(Self::RESERVE)?;
        const MADV_DONTNEED_LOCKED: i32 = 24;
        for page in (0..locked).step_by(2) {
            pages.advise(page, 1, MADV_DONTNEED_LOCKED)?;
        }
        // Huge pages that were left because so little else was free.
        fs::write(Self::RESERVE, "1000000").or_fail(Self::RESERVE)?;
        note(&format!(
            "{taken} huge pages taken, {locked} pages cut; {}",
            large_blocks()?
        ));
        check!(locked > 8 * HUGE_PAGES, "pages cut: found {locked}");
        Ok(fragmented)
    }
}

impl Drop for Fragmented {
    fn drop(&mut self) {
        let _ = fs::write(Self::RESERVE, "0");
        let _ = fs::write(Self::COMPACT_LOCKED, "1");
    }
}

/// The number of free blocks of each order in the zones that user space gets its memory from, as text.
fn large_blocks() -> Outcome<String> {
    let text = fs::read_to_string("/proc/buddyinfo").or_fail("buddyinfo")?;
    let lines = text.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().skip(3).collect();
        words.join(" ")
    });
    Ok(lines.collect::<Vec<_>>().join("; "))
}

/// Where no large page is free, large pages of the device come back as small ones, and no command needs a
/// large allocation.
fn nothing_but_small_pages(ctx: &Ctx) -> Outcome {
    const HUGE: usize = 3;
    let n = HUGE * HUGE_PAGES;
    let mut fell_back = 0;
    for target in open_each_kind(ctx)? {
        // They go to the device while there is room, and one stays in the system.
        let bufs = [1771, 1772, 1773, 1774]
            .into_iter()
            .map(|seed| Ok((huge_filled(HUGE, seed)?, seed)))
            .collect::<Outcome<Vec<_>>>()?;
        let [first, second, third, fourth] = &bufs[..] else {
            return Err(Fail::failed("buffers"));
        };
        let evicted = Target::open(ctx, target.node())?;
        evicted.move_huge(&first.0, first.1)?;
        target.move_huge(&second.0, second.1)?;
        target.move_huge(&third.0, third.1)?;
        let before = target.stats()?;
        let scarce = Fragmented::make()?;
        let start = Instant::now();
        // By the close of the file.
        drop(evicted);
        target.expect(&first.0, 0, n, 0)?;
        first.0.check(0, n, first.1)?;
        // By faults of the CPU, or on request.
        target.bring_back(&second.0, 0, n)?;
        second.0.check(0, n, second.1)?;
        // By fork() and a write to what is shared then.
        Child::spawn(|| {
            third.0.check(0, n, third.1)?;
            third.0.fill(0, n, 1775);
            third.0.check(0, n, 1775)
        })?
        .join()?;
        third.0.check(0, n, third.1)?;
        // Huge pages of the system, and the small ones that have come back.
        for (buf, seed) in [fourth, first, second] {
            target.move_all(buf, *seed)?;
            let read = target.read(buf, 5, 700).or_fail("READ")?;
            check_bytes(&read.data, *seed, 5, "READ")?;
            target
                .write(buf, 600, &pattern_bytes(*seed, 600, 8))
                .or_fail("WRITE")?;
            target.exclusive(buf, 7, 40).or_fail("EXCLUSIVE")?;
            target.snapshot(buf, 0, n).or_fail("SNAPSHOT")?;
            target.inspect(buf, 0, n).or_fail("ZDM_INSPECT")?;
            buf.check(0, n, *seed)?;
        }
        // New memory of the device needs tables for its pages.
        target.release().or_fail("RELEASE")?;
        for (buf, seed) in &bufs {
            target.move_all(buf, *seed)?;
        }
        target.release().or_fail("RELEASE")?;
        for (buf, seed) in &bufs {
            buf.check(0, n, *seed)?;
        }
        let after = target.stats()?;
        fell_back += after.large_fallback.wrapping_sub(before.large_fallback);
        note(&format!(
            "{:?}; fell back {} times, failed allocations {}; {}",
            start.elapsed(),
            after.large_fallback.wrapping_sub(before.large_fallback),
            after.failed_alloc.wrapping_sub(before.failed_alloc),
            large_blocks()?
        ));
        drop(scarce);
    }
    check!(
        fell_back > 0,
        "large pages for which there was none: expected some"
    );
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
