// SPDX-License-Identifier: GPL-2.0
// error: E0505

//! An area is not valid after the mmap lock is dropped.

#![forbid(unsafe_code)]

use crate::mm::migrate::migration::Area;
use kernel::mm::MmWithUser;

fn end_of(mm: &MmWithUser, address: usize) -> Option<usize> {
    let mmap = mm.mmap_read_lock();
    let area = Area::lookup(&mmap, address)?;
    drop(mmap);
    Some(area.end())
}
