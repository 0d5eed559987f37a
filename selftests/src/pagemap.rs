// SPDX-License-Identifier: GPL-2.0

//! The ioctl PAGEMAP_SCAN of /proc/PID/pagemap.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::memory::PAGE;
use crate::sys::cvt;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The bits of PAGEMAP_SCAN, `PAGE_IS_*` of linux/fs.h.
pub const SCAN_WRITTEN: u64 = 1 << 1;
pub const SCAN_FILE: u64 = 1 << 2;
pub const SCAN_PRESENT: u64 = 1 << 3;
pub const SCAN_SWAPPED: u64 = 1 << 4;
pub const SCAN_ZERO: u64 = 1 << 5;
pub const SCAN_HUGE: u64 = 1 << 6;
pub const SCAN_SOFT_DIRTY: u64 = 1 << 7;

/// Scans an open /proc/PID/pagemap. Returns the ranges within `start..end` whose pages have all of
/// the bits `wanted`, each with the bits of `returned` that its pages have.
pub fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    wanted: u64,
    returned: u64,
) -> io::Result<Vec<[u64; 3]>> {
    const PAGEMAP_SCAN: u64 = 0xc060_6610;
    // The kernel joins neighbours that are alike. There is at most one range per page.
    let pages = (end - start) / PAGE as u64;
    let mut found = vec![[0u64; 3]; pages as usize + 1];
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: wanted,
        category_anyof_mask: 0,
        return_mask: returned,
    };
    let (fd, arg) = (pagemap.as_raw_fd(), std::ptr::from_mut(&mut arg));
    // SAFETY: `arg` and the vector that it points to outlive the call and have the sizes that `arg`
    // says.
    let n = cvt(unsafe { libc::ioctl(fd, PAGEMAP_SCAN, arg) }.into())?;
    found.truncate(n as usize);
    Ok(found)
}

/// The ranges within `start..end` that huge entries map, present or not.
pub fn scan_huge(pagemap: &File, start: u64, end: u64) -> io::Result<Vec<(u64, u64)>> {
    let found = scan(pagemap, start, end, SCAN_HUGE, SCAN_HUGE)?;
    Ok(found.iter().map(|r| (r[0], r[1])).collect())
}
