// SPDX-License-Identifier: GPL-2.0
// error: E0382

//! A destination belongs to the migration.

#![forbid(unsafe_code)]

use crate::mm::{
    migrate::{
        device_memory::DeviceMemory,
        migration::{Migration, Setup},
    },
    page::system_folio::SystemFolio,
};

fn keep<M: DeviceMemory>(migration: &mut Migration<'_, Setup, M>, folio: SystemFolio) -> u32 {
    let _ = migration.copy_to_system(0, 0, folio);
    folio.order()
}
