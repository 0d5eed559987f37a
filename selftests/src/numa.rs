// SPDX-License-Identifier: GPL-2.0

//! System calls that move pages between NUMA nodes, of which the guest has one or two.

#![allow(unsafe_code)]

use std::fs;
use std::io;

use linux_raw_sys::mempolicy::{
    MPOL_BIND, MPOL_LOCAL, MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT,
};

use crate::check::{Fail, Outcome};
use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

/// The number of bits in a set of nodes.
const BITS: libc::c_ulong = 64;

/// The number of the machine's nodes, which are numbered from 0.
#[track_caller]
pub fn nodes() -> Outcome<i32> {
    let path = "/sys/devices/system/node/online";
    // The text is "0" or "0-1"; a kernel without NUMA has no such file.
    let text = fs::read_to_string(path).unwrap_or_else(|_| "0".into());
    let last = text.trim().rsplit('-').next().unwrap_or_default();
    last.parse::<i32>()
        .map(|last| last + 1)
        .map_err(|e| Fail::failed(format!("{path}: '{text}': {e}")))
}

/// Keeps NUMA balancing away from the memory of the calling process. After a second of run time it
/// would make device private entries read-only, as change_softleaf_pte() does not tell it from
/// mprotect(2).
pub fn no_balancing() -> io::Result<()> {
    // A policy that a process has set itself does not ask for balancing.
    // SAFETY: The call takes only numbers and no set of nodes.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            MPOL_LOCAL,
            std::ptr::null::<u64>(),
            0,
        )
    };
    cvt(ret).map(drop)
}

/// The node of each page, or a negative errno. If `to` names a node, the pages are moved to it.
pub fn move_pages(buf: &Buffer, first: usize, n: usize, to: Option<i32>) -> io::Result<Vec<i32>> {
    let pages: Vec<u64> = (first..first + n).map(|page| buf.at(page)).collect();
    let nodes = to.map(|node| vec![node; n]);
    let mut status = vec![i32::MIN; n];
    let nodes = nodes.as_ref().map_or(std::ptr::null(), |n| n.as_ptr());
    let (flags, out) = (MPOL_MF_MOVE_ALL, status.as_mut_ptr());
    // SAFETY: The arrays have `n` elements or are null, and outlive the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            n,
            pages.as_ptr(),
            nodes,
            out,
            flags,
        )
    };
    cvt(ret).map(|_| status)
}

/// Binds pages to a node and moves the pages of other nodes. With `strict`, a page that cannot be
/// moved is an error.
pub fn bind(buf: &Buffer, first: usize, n: usize, node: i32, strict: bool) -> io::Result<()> {
    let nodes: u64 = 1 << node;
    let strict = if strict { MPOL_MF_STRICT } else { 0 };
    let flags = MPOL_MF_MOVE | MPOL_MF_MOVE_ALL | strict;
    let (addr, len, mode) = (buf.at(first), n * PAGE, MPOL_BIND as libc::c_int);
    // SAFETY: The set of nodes outlives the call; memory keeps its contents.
    let ret = unsafe { libc::syscall(libc::SYS_mbind, addr, len, mode, &nodes, BITS, flags) };
    cvt(ret).map(drop)
}

/// Moves all pages of the process from one node to another. Returns the number of pages that did
/// not move.
pub fn migrate_pages(from: i32, to: i32) -> io::Result<usize> {
    let (from, to): (u64, u64) = (1 << from, 1 << to);
    // SAFETY: The sets of nodes outlive the call; memory keeps its contents.
    let ret = unsafe { libc::syscall(libc::SYS_migrate_pages, 0, BITS, &from, &to) };
    cvt(ret).map(|n| n as usize)
}
