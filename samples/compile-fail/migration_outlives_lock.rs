// SPDX-License-Identifier: GPL-2.0
// error: E0505

//! A migration of a range ends before the mmap lock is dropped.

#![forbid(unsafe_code)]

use crate::mm::{
    migrate::{
        device_memory::DeviceMemory,
        migration::{Area, Migration, PfnBuffer, Request},
    },
    region::owner::PgmapOwner,
    user::range::PageRange,
};
use kernel::{mm::MmWithUser, prelude::*};

fn start<M: DeviceMemory>(
    mm: &MmWithUser,
    range: PageRange,
    owner: &PgmapOwner,
    memory: &M,
) -> Result {
    let mut buffer = PfnBuffer::new(range.pages())?;
    let mmap = mm.mmap_read_lock();
    let area = Area::lookup(&mmap, range.start()).ok_or(EINVAL)?;
    let request = Request::system(area, range, owner);
    let migration = Migration::of_range(&mut buffer, &request, memory)?;
    drop(mmap);
    drop(migration.copied());
    Ok(())
}
