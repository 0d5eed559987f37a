// SPDX-License-Identifier: GPL-2.0

//! The ioctl PAGEMAP_SCAN of /proc/PID/pagemap.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SOFT_DIRTY,
    PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, pm_scan_arg,
};
use nix::request_code_readwrite;

use crate::memory::PAGE;
use crate::sys::cvt;

/// linux-raw-sys lacks this number, which linux/fs.h composes.
const PAGEMAP_SCAN: u64 = request_code_readwrite!(b'f', 16, size_of::<pm_scan_arg>());

/// The bits of PAGEMAP_SCAN.
pub const SCAN_WRITTEN: u64 = PAGE_IS_WRITTEN as u64;
pub const SCAN_FILE: u64 = PAGE_IS_FILE as u64;
pub const SCAN_PRESENT: u64 = PAGE_IS_PRESENT as u64;
pub const SCAN_SWAPPED: u64 = PAGE_IS_SWAPPED as u64;
pub const SCAN_ZERO: u64 = PAGE_IS_PFNZERO as u64;
pub const SCAN_HUGE: u64 = PAGE_IS_HUGE as u64;
pub const SCAN_SOFT_DIRTY: u64 = PAGE_IS_SOFT_DIRTY as u64;

/// Scans an open /proc/PID/pagemap. Returns the ranges within `start..end` whose pages have all of
/// the bits `wanted`, each with the bits of `returned` that its pages have.
pub fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    wanted: u64,
    returned: u64,
) -> io::Result<Vec<[u64; 3]>> {
    scan_with(pagemap, start, end, wanted, returned, 0)
}

/// Write-protects the pages within `start..end` that were written since they were protected last. Their
/// areas must be registered with a userfaultfd that resolves such writes itself.
pub fn protect_written(pagemap: &File, start: u64, end: u64) -> io::Result<Vec<[u64; 3]>> {
    let flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
    scan_with(pagemap, start, end, SCAN_WRITTEN, SCAN_WRITTEN, flags)
}

fn scan_with(
    pagemap: &File,
    start: u64,
    end: u64,
    wanted: u64,
    returned: u64,
    flags: u32,
) -> io::Result<Vec<[u64; 3]>> {
    // The kernel joins neighbours that are alike. There is at most one range per page.
    let pages = (end - start) / PAGE as u64;
    let mut found = vec![[0u64; 3]; pages as usize + 1];
    let mut arg = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: flags.into(),
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
