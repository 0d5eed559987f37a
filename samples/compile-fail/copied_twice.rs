// SPDX-License-Identifier: GPL-2.0
// error: E0382

//! Core mm moves the pages of a migration once.

#![forbid(unsafe_code)]

use crate::mm::migrate::{
    device_memory::DeviceMemory,
    migration::{Migration, Setup},
};

fn twice<M: DeviceMemory>(migration: Migration<'_, Setup, M>) {
    drop(migration.copied());
    drop(migration.copied());
}
