// SPDX-License-Identifier: GPL-2.0
// error: E0505

//! The memory that a migration copies to lives as long as the migration.

#![forbid(unsafe_code)]

use crate::mm::migrate::{
    device_memory::DeviceMemory,
    migration::{DevicePfns, Migration, PfnBuffer},
};

fn late<M: DeviceMemory>(buffer: &mut PfnBuffer, pfns: &DevicePfns<'_>, memory: M) {
    let migration = Migration::of_device_pages(buffer, pfns, &memory);
    drop(memory);
    drop(migration);
}
