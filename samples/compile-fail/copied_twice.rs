// SPDX-License-Identifier: GPL-2.0
// error: E0382

//! Core mm moves the pages of a migration once.

#![forbid(unsafe_code)]

use crate::mm::device_memory::DeviceMemory;
use crate::mm::migrate::{Migration, Setup};

fn twice<M: DeviceMemory>(migration: Migration<'_, Setup, M>) {
    drop(migration.copied());
    drop(migration.copied());
}
