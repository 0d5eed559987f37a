// SPDX-License-Identifier: GPL-2.0
// error: E0599

//! Pages that core mm has moved get no other destination.

#![forbid(unsafe_code)]

use crate::mm::{
    migrate::{
        device_memory::DeviceMemory,
        migration::{Copied, Migration},
    },
    page::system_folio::SystemFolio,
};

fn late<M: DeviceMemory>(mut migration: Migration<'_, Copied, M>, folio: SystemFolio) {
    let _ = migration.copy_to_system(0, 0, folio);
}
