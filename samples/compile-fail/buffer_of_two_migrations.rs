// SPDX-License-Identifier: GPL-2.0
// error: E0499

//! The entries of a migration belong to it for as long as it lasts.

#![forbid(unsafe_code)]

use crate::mm::migrate::{
    device_memory::DeviceMemory,
    migration::{DevicePfns, Migration, PfnBuffer},
};

fn both<M: DeviceMemory>(buffer: &mut PfnBuffer, pfns: &DevicePfns<'_>, memory: &M) {
    let one = Migration::of_device_pages(buffer, pfns, memory);
    let other = Migration::of_device_pages(buffer, pfns, memory);
    drop((one, other));
}
