// SPDX-License-Identifier: GPL-2.0

//! The view of the rest of the kernel on the test's pages, so that a test need not trust the
//! driver: /proc/self/pagemap, smaps and status, and actions on these pages by /proc.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::check::{Fail, OrFail, Outcome};
use crate::memory::{Buffer, PAGE};
use crate::pagemap;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FRAME: u64 = (1 << 55) - 1;
/// MAX_SWAPFILES_SHIFT: a swap entry has its type before the offset, which is the page frame number
/// for device private entries.
const SWAP_TYPE_BITS: u32 = 5;

/// Makes every CPU put the pages of its batches on their lists. A batch holds a reference on each
/// page; afterwards pages of system memory have exact counts.
#[track_caller]
pub fn drain_batches() -> Outcome {
    // 1 drains the batches and drops clean caches; 4 keeps the later writes out of the log.
    for what in ["4", "1"] {
        fs::write("/proc/sys/vm/drop_caches", what).or_fail("drop_caches")?;
    }
    Ok(())
}

/// The entries of /proc/self/pagemap.
#[track_caller]
pub fn entries(buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<u64>> {
    let file = fs::File::open("/proc/self/pagemap").or_fail("/proc/self/pagemap")?;
    let mut bytes = vec![0; n * 8];
    let offset = buf.at(first) / PAGE as u64 * 8;
    file.read_exact_at(&mut bytes, offset)
        .or_fail("read of /proc/self/pagemap")?;
    Ok(bytes
        .chunks_exact(8)
        .map(|c| c.iter().rev().fold(0, |n, b| (n << 8) | u64::from(*b)))
        .collect())
}

/// The swap types of device private memory, read-only and writable (linux/swap.h). Swap files have
/// types from 0; the last types of 32 are markers, exclusive access and device private memory.
const DEVICE_PRIVATE: std::ops::RangeInclusive<u64> = 28..=29;
const SWAP_FILES: std::ops::RangeInclusive<u64> = 0..=1;

/// The swap type of an entry that is neither present nor empty.
fn swap_type(entry: u64) -> Option<u64> {
    let there = entry & PRESENT == 0 && entry & SWAPPED != 0;
    there.then_some(entry & ((1 << SWAP_TYPE_BITS) - 1))
}

fn is_of(entry: u64, types: &std::ops::RangeInclusive<u64>) -> bool {
    swap_type(entry).is_some_and(|t| types.contains(&t))
}

/// The page frame numbers of those pages that have device private entries.
#[track_caller]
pub fn on_device(buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<u64>> {
    Ok(entries(buf, first, n)?
        .into_iter()
        .filter(|e| is_of(*e, &DEVICE_PRIVATE))
        .map(|e| (e & FRAME) >> SWAP_TYPE_BITS)
        .collect())
}

/// The number of pages that are in a swap file.
#[track_caller]
pub fn swapped(buf: &Buffer, first: usize, n: usize) -> Outcome<usize> {
    Ok(entries(buf, first, n)?
        .into_iter()
        .filter(|e| is_of(*e, &SWAP_FILES))
        .count())
}

/// The page frame numbers of those pages that the CPU has mapped. Needs CAP_SYS_ADMIN.
#[track_caller]
pub fn frames(buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<u64>> {
    let all = entries(buf, first, n)?.into_iter();
    Ok(all
        .filter(|e| e & PRESENT != 0)
        .map(|e| e & FRAME)
        .collect())
}

/// The number of pages that huge entries map, present or not.
#[track_caller]
pub fn huge(buf: &Buffer, first: usize, n: usize) -> Outcome<usize> {
    let file = fs::File::open("/proc/self/pagemap").or_fail("/proc/self/pagemap")?;
    let (start, end) = (buf.at(first), buf.at(first + n));
    let regions = pagemap::scan_huge(&file, start, end).or_fail("PAGEMAP_SCAN")?;
    let bytes: u64 = regions.into_iter().map(|(a, b)| b - a).sum();
    Ok(bytes as usize / PAGE)
}

/// The number of pages that the CPU has mapped.
#[track_caller]
pub fn present(buf: &Buffer, first: usize, n: usize) -> Outcome<usize> {
    let all = entries(buf, first, n)?;
    Ok(all.into_iter().filter(|e| e & PRESENT != 0).count())
}

/// The value of a line `Name:   123 kB` in a text of /proc, in KiB.
pub fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let line = line.strip_prefix(':')?.trim().strip_suffix("kB")?;
    line.trim().parse().ok()
}

/// The flags of page frames in /proc/kpageflags.
#[track_caller]
pub fn frame_flags(frames: &[u64]) -> Outcome<Vec<u64>> {
    let file = fs::File::open("/proc/kpageflags").or_fail("/proc/kpageflags")?;
    let read = |pfn: &u64| -> Outcome<u64> {
        let mut flags = [0; 8];
        file.read_exact_at(&mut flags, pfn * 8)
            .or_fail("/proc/kpageflags")?;
        Ok(u64::from_ne_bytes(flags))
    };
    frames.iter().map(read).collect()
}

/// Whether a page frame of system memory is the first page of a large folio in use.
#[track_caller]
pub fn is_large_folio(pfn: u64) -> Outcome<bool> {
    const COMPOUND_HEAD: u64 = 1 << 15;
    Ok(frame_flags(&[pfn])?[0] & COMPOUND_HEAD != 0)
}

/// The anonymous resident memory of the process, in pages. The value is exact: /proc/PID/status
/// adds up the per-CPU parts.
#[track_caller]
pub fn rss_anon() -> Outcome<u64> {
    let text = fs::read_to_string("/proc/self/status").or_fail("/proc/self/status")?;
    match kib(&text, "RssAnon") {
        Some(n) => Ok(n * 1024 / PAGE as u64),
        None => Err(Fail::failed("no RssAnon in /proc/self/status")),
    }
}

/// The free memory of the machine, in pages. The value is approximate, because each CPU keeps some
/// pages.
#[track_caller]
pub fn mem_free() -> Outcome<u64> {
    let text = fs::read_to_string("/proc/meminfo").or_fail("/proc/meminfo")?;
    match kib(&text, "MemFree") {
        Some(n) => Ok(n * 1024 / PAGE as u64),
        None => Err(Fail::failed("no MemFree in /proc/meminfo")),
    }
}

/// The free memory of the machine, in pages, after the page cache and the CPUs have given back the
/// pages that they can.
#[track_caller]
pub fn free_pages() -> Outcome<u64> {
    // 3 drops unused page cache and slabs, and drains every CPU's batch of pages; 4 keeps the later
    // writes out of the log.
    for what in ["4", "3"] {
        fs::write("/proc/sys/vm/drop_caches", what).or_fail("drop_caches")?;
    }
    let text = fs::read_to_string("/proc/zoneinfo").or_fail("/proc/zoneinfo")?;
    // Add up the free pages of each zone, and each CPU's pages of a zone.
    let numbers = text.lines().filter_map(|line| {
        let line = line.trim();
        let number = line
            .strip_prefix("pages free ")
            .or_else(|| line.strip_prefix("count: "))?;
        number.trim().parse::<u64>().ok()
    });
    match numbers.sum() {
        0 => Err(Fail::failed("no free pages in /proc/zoneinfo")),
        n => Ok(n),
    }
}

/// A number in /proc/vmstat.
#[track_caller]
pub fn vmstat(name: &str) -> Outcome<u64> {
    let text = fs::read_to_string("/proc/vmstat").or_fail("/proc/vmstat")?;
    let number = text.lines().find_map(|line| {
        let (first, number) = line.split_once(' ')?;
        (first == name).then(|| number.trim().parse().ok())?
    });
    number.ok_or_else(|| Fail::failed(format!("no {name} in /proc/vmstat")))
}

/// The anonymous memory of the buffer's mapping by smaps, in pages. Device private pages count.
#[track_caller]
pub fn smaps_anonymous(buf: &Buffer) -> Outcome<u64> {
    smaps(buf, 0, buf.pages(), "Anonymous")
}

/// A field of smaps for the mappings within some pages of a buffer, in pages. No mapping may extend
/// beyond these pages.
#[track_caller]
pub fn smaps(buf: &Buffer, first: usize, n: usize, field: &str) -> Outcome<u64> {
    let text = fs::read_to_string("/proc/self/smaps").or_fail("/proc/self/smaps")?;
    match sum_of_range(&text, buf.at(first), buf.at(first + n), field) {
        Some(n) => Ok(n * 1024 / PAGE as u64),
        None => Err(Fail::failed("the buffer is not in /proc/self/smaps")),
    }
}

/// The sum of a field over the mappings of smaps that lie within a range. There are none if the
/// kernel has joined the buffer with a neighbour.
fn sum_of_range(text: &str, start: u64, end: u64, name: &str) -> Option<u64> {
    let mut sum = None;
    let mut inside = false;
    for line in text.lines() {
        let range = line
            .split_whitespace()
            .next()
            .and_then(|w| w.split_once('-'));
        let number = |s| u64::from_str_radix(s, 16).ok();
        if let Some((Some(a), Some(b))) = range.map(|(a, b)| (number(a), number(b))) {
            inside = a >= start && b <= end;
        } else if inside && is_field(line, name) {
            sum = Some(sum.unwrap_or(0) + kib(line, name)?);
        }
    }
    sum
}

fn is_field(line: &str, name: &str) -> bool {
    line.strip_prefix(name).is_some_and(|l| l.starts_with(':'))
}

/// Whether a module is loaded.
#[track_caller]
pub fn module_loaded(name: &str) -> Outcome<bool> {
    let text = fs::read_to_string("/proc/modules").or_fail("/proc/modules")?;
    Ok(text
        .lines()
        .any(|l| l.split_whitespace().next() == Some(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_fields() {
        let text = "VmRSS:\t   12 kB\nRssAnon:\t     8 kB\n";
        assert_eq!(kib(text, "RssAnon"), Some(8));
        assert_eq!(kib(text, "Rss"), None);
        let smaps = "1000-3000 rw-p 0 00:00 0\nAnonymous:  8 kB\n\
                     3000-4000 rw-p 0 00:00 0\nAnonymous:  4 kB\n";
        assert_eq!(sum_of_range(smaps, 0x1000, 0x3000, "Anonymous"), Some(8));
        assert_eq!(sum_of_range(smaps, 0x1000, 0x4000, "Anonymous"), Some(12));
        assert_eq!(sum_of_range(smaps, 0x5000, 0x6000, "Anonymous"), None);
    }

    #[test]
    fn the_hosts_own_proc() {
        let buf = Buffer::filled(4, 1).unwrap();
        assert_eq!(present(&buf, 0, 4).unwrap(), 4);
        assert!(on_device(&buf, 0, 4).unwrap().is_empty());
        assert_eq!(frames(&buf, 0, 4).unwrap().len(), 4);
        assert!(rss_anon().unwrap() > 0);
    }
}
