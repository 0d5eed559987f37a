// SPDX-License-Identifier: GPL-2.0

//! The state of a page other than its place, and counters of memory: a migration changes none of
//! them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES, PAGE};
use crate::pagemap::{SCAN_FILE, SCAN_HUGE, SCAN_PRESENT, SCAN_SOFT_DIRTY, SCAN_SWAPPED};
use crate::pagemap::{SCAN_WRITTEN, SCAN_ZERO};
use crate::uapi::*;
use crate::{check, numa, pagemap, proc, sys};

const SOFT_DIRTY: u64 = 1 << 55;
pub const UFFD_WP: u64 = 1 << 57;

/// The flags of ZDM_INSPECT that do not depend on the place of a page. A device page is on no list.
const IN_PLACE: u32 =
    ZDM_PAGE_THERE | ZDM_PAGE_WRITE | ZDM_PAGE_ANON | ZDM_PAGE_CHARGED | ZDM_PAGE_ANON_EXCLUSIVE;

/// The state of a page without its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub soft_dirty: bool,
    pub uffd_wp: bool,
    /// The categories of PAGEMAP_SCAN.
    pub scan: u64,
    /// The flags of ZDM_INSPECT in `IN_PLACE`.
    pub flags: u32,
}

/// The states of pages of a buffer, by /proc/self/pagemap, PAGEMAP_SCAN and ZDM_INSPECT.
#[track_caller]
pub fn views(device: &Device, buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<State>> {
    const ALL: u64 = SCAN_WRITTEN
        | SCAN_FILE
        | SCAN_PRESENT
        | SCAN_SWAPPED
        | SCAN_ZERO
        | SCAN_HUGE
        | SCAN_SOFT_DIRTY;
    let entries = proc::entries(buf, first, n)?;
    let pagemap = File::open("/proc/self/pagemap").or_fail("/proc/self/pagemap")?;
    let (start, end) = (buf.at(first), buf.at(first + n));
    let ranges = pagemap::scan(&pagemap, start, end, 0, ALL).or_fail("PAGEMAP_SCAN")?;
    let mut scan = vec![0; n];
    for [from, to, bits] in ranges {
        let index = |at: u64| ((at - start) / PAGE as u64) as usize;
        scan[index(from)..index(to)].fill(bits);
    }
    let pages = device.inspect(buf, first, n).or_fail("ZDM_INSPECT")?;
    let state = |(i, page): (usize, &PageInfo)| State {
        soft_dirty: entries[i] & SOFT_DIRTY != 0,
        uffd_wp: entries[i] & UFFD_WP != 0,
        scan: scan[i],
        flags: page.flags & IN_PLACE,
    };
    Ok(pages.iter().enumerate().map(state).collect())
}

/// As `views`, for areas in which only pages are marked: the three must agree with one another.
#[track_caller]
pub fn states(device: &Device, buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<State>> {
    let states = views(device, buf, first, n)?;
    for (i, state) in states.iter().enumerate() {
        let same = state.soft_dirty == (state.scan & SCAN_SOFT_DIRTY != 0);
        check!(
            same,
            "page {}: soft-dirty by pagemap and by PAGEMAP_SCAN: expected the same, found {state:x?}",
            first + i
        );
    }
    Ok(states)
}

/// The flags of /proc/kpageflags that a folio has wherever it is: on a list, locked into memory and off
/// the lists of what is reclaimed, anonymous, backed by swap, and merged by KSM.
const FOLIO_FLAGS: u64 = (1 << 5) | (1 << 12) | (1 << 14) | (1 << 18) | (1 << 21) | (1 << 33);

/// These flags of the folios of pages in system memory, once no CPU has them in a batch.
#[track_caller]
pub fn folio_flags(buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<u64>> {
    proc::drain_batches()?;
    let flags = proc::frame_flags(&proc::frames(buf, first, n)?)?;
    Ok(flags.iter().map(|flags| flags & FOLIO_FLAGS).collect())
}

/// Counters that a migration does not change, in pages or pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters(Vec<(&'static str, u64)>);

/// The fields of smaps for the buffer, which are exact.
const SMAPS: &[&str] = &["Rss", "Pss", "Anonymous", "Swap", "Locked"];
const STATUS: &[&str] = &["RssAnon", "RssFile", "VmSwap", "VmPTE", "VmLck"];
const VMSTAT: &[&str] = &[
    "nr_isolated_anon",
    "nr_isolated_file",
    "nr_mlock",
    "nr_anon_pages",
    "nr_anon_transparent_hugepages",
];
const MEMORY: &[&str] = &["anon", "swapcached", "anon_thp"];

/// The number of pages by which a counter may differ, because the test program itself allocates
/// memory.
fn slack(name: &str) -> u64 {
    match name {
        // A third of the pages of the smallest scene.
        "RssAnon" | "nr_anon_pages" | "anon" => 64,
        "RssFile" => 24,
        "VmPTE" => 8,
        _ => 0,
    }
}

/// A statistic of huge pages, if the kernel has it.
pub fn huge_statistic(name: &str) -> Option<u64> {
    let path = format!(
        "/sys/kernel/mm/transparent_hugepage/hugepages-{}kB/stats/{name}",
        HUGE_PAGES * PAGE / 1024
    );
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A number in a file `memory.stat`, converted from bytes to pages.
fn memory_stat(dir: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(dir.join("memory.stat")).ok()?;
    let number = text.lines().find_map(|line| {
        let (first, number) = line.split_once(' ')?;
        (first == name).then(|| number.trim().parse::<u64>().ok())?
    })?;
    Some(number / PAGE as u64)
}

/// Reads counters of a buffer, the calling process, its memory cgroup and the machine.
pub struct Watch {
    cgroup: PathBuf,
}

impl Watch {
    /// From here on, the process has huge pages only where it asks for them: huge pages of its heap,
    /// part of which it gives back, would be counted with those of the buffer. NUMA balancing takes
    /// no rights from entries.
    #[track_caller]
    pub fn new(cgroup: &Path) -> Outcome<Self> {
        sys::huge_pages_where_advised().or_fail("PR_SET_THP_DISABLE")?;
        // A kernel without NUMA has no such call, and does not balance.
        let _ = numa::no_balancing();
        Ok(Self {
            cgroup: cgroup.to_path_buf(),
        })
    }

    /// Reads the counters. The mapping of the pages must not extend beyond them.
    #[track_caller]
    pub fn counters(&self, buf: &Buffer, first: usize, n: usize) -> Outcome<Counters> {
        // This write adds up the counters of all CPUs, and the kernel reports negative ones.
        fs::write("/proc/sys/vm/stat_refresh", "1").or_fail("stat_refresh")?;
        let mut list = Vec::new();
        for name in SMAPS {
            list.push((*name, proc::smaps(buf, first, n, name)?));
        }
        let status = fs::read_to_string("/proc/self/status").or_fail("/proc/self/status")?;
        for name in STATUS {
            let kib = proc::kib(&status, name);
            let kib = kib.ok_or_else(|| Fail::failed(format!("no {name} in /proc/self/status")))?;
            list.push((*name, kib * 1024 / PAGE as u64));
        }
        for name in VMSTAT {
            list.push((*name, proc::vmstat(name)?));
        }
        for name in MEMORY {
            let number = memory_stat(&self.cgroup, name);
            let number = number.ok_or_else(|| Fail::failed(format!("no {name} in memory.stat")))?;
            list.push((*name, number));
        }
        for name in ["nr_anon", "nr_anon_partially_mapped"] {
            list.extend(huge_statistic(name).map(|n| (name, n)));
        }
        Ok(Counters(list))
    }

    /// Checks that the counters are as before, apart from those that `except` names. The counters
    /// of the machine and the cgroup are added up every two seconds.
    #[track_caller]
    pub fn expect(
        &self,
        buf: &Buffer,
        (first, n): (usize, usize),
        before: &Counters,
        except: &[&str],
        when: &str,
    ) -> Outcome {
        let mut found = self.counters(buf, first, n)?;
        sys::wait_until(Duration::from_secs(6), || {
            if let Ok(again) = self.counters(buf, first, n) {
                found = again;
            }
            found.differences(before, except).is_empty()
        });
        let differences = found.differences(before, except);
        match differences.is_empty() {
            true => Ok(()),
            false => Err(Fail::failed(format!(
                "counters {when}: expected no change, found {}",
                differences.join(", ")
            ))),
        }
    }
}

impl Counters {
    fn differences(&self, before: &Self, except: &[&str]) -> Vec<String> {
        let pairs = self.0.iter().zip(&before.0);
        pairs
            .filter(|((name, now), (_, then))| {
                !except.contains(name) && now.abs_diff(*then) > slack(name)
            })
            .map(|((name, now), (_, then))| format!("{name} {now} instead of {then}"))
            .collect()
    }
}

/// Clears the soft-dirty bits of the calling process.
#[track_caller]
pub fn clear_soft_dirty() -> Outcome {
    fs::write("/proc/self/clear_refs", "4").or_fail("/proc/self/clear_refs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_beyond_the_slack() {
        let a = Counters(vec![("Rss", 3), ("RssAnon", 100)]);
        let b = Counters(vec![("Rss", 3), ("RssAnon", 150)]);
        assert!(b.differences(&a, &[]).is_empty());
        let c = Counters(vec![("Rss", 4), ("RssAnon", 200)]);
        assert_eq!(c.differences(&a, &[]).len(), 2);
        assert_eq!(c.differences(&a, &["Rss"]).len(), 1);
    }
}
