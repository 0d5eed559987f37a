// SPDX-License-Identifier: GPL-2.0
// error: E0505

//! A list of device pages is valid while their pagemap is registered.

#![forbid(unsafe_code)]

use crate::mm::{
    migrate::{
        device_memory::DeviceMemory,
        migration::{Migration, PfnBuffer},
    },
    pagemap::{ops::PagemapOps, registration::Registration},
};

fn late<T, M>(map: Registration<T>, pfns: &[usize], buffer: &mut PfnBuffer, memory: &M)
where
    T: PagemapOps,
    M: DeviceMemory,
{
    let list = map.device_pfns(pfns);
    drop(map);
    if let Some(list) = list {
        drop(Migration::of_device_pages(buffer, &list, memory));
    }
}
