// SPDX-License-Identifier: GPL-2.0
// error: E0505

//! A migration of device pages ends before their pagemap is unregistered.

#![forbid(unsafe_code)]

use crate::mm::{
    migrate::{
        device_memory::DeviceMemory,
        migration::{Migration, PfnBuffer},
    },
    pagemap::{ops::PagemapOps, registration::Registration},
};
use kernel::prelude::*;

fn late<T, M>(map: Registration<T>, pfns: &[usize], buffer: &mut PfnBuffer, memory: &M) -> Result
where
    T: PagemapOps,
    M: DeviceMemory,
{
    let list = map.device_pfns(pfns).ok_or(EINVAL)?;
    let migration = Migration::of_device_pages(buffer, &list, memory)?;
    drop(map);
    drop(migration.copied());
    Ok(())
}
