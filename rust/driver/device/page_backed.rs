// SPDX-License-Identifier: GPL-2.0

//! The memory of the devices. A device has no hardware: the CPU copies, and PRIVATE memory is a
//! block of system memory behind each folio.

#![forbid(unsafe_code)]

use crate::mm::{
    migrate::{
        device_memory::{
            CopyError,
            CpuPages,
            DeviceMemory,
            DevicePages, //
        },
        migration, //
    },
    page::backing::Backing,
    region::memory_type::MemoryType, //
};
use kernel::prelude::*;

/// A migration from or to the memory of a device.
pub(in crate::driver) type Migration<'a, S> = migration::Migration<'a, S, PageBacked>;

/// Memory of a device that the CPU copies to and from.
pub(in crate::driver) struct PageBacked;

impl PageBacked {
    /// Memory for a folio of `order` of `memory`. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an order above that of a PMD, `ENOMEM`.
    pub(in crate::driver) fn alloc(memory: MemoryType, order: u32) -> Result<Backing> {
        match memory {
            MemoryType::Private => Backing::alloc(order),
            MemoryType::Coherent | MemoryType::Generic => Backing::none(order),
        }
    }
}

impl DeviceMemory for PageBacked {
    #[inline]
    fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
        to.copy_from_cpu(from)
    }

    #[inline]
    fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
        from.copy_to_cpu(to)
    }

    #[inline]
    fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
        to.clear()
    }
}
