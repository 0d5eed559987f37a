// SPDX-License-Identifier: GPL-2.0

//! What a driver with device memory starts with.

pub(crate) use super::{
    backing::Backing,
    device_folio::{
        FreedFolio,
        LockedDeviceFolio, //
    },
    device_memory::{
        CopyError,
        CpuPages,
        DeviceMemory,
        DevicePages, //
    },
    fault::{
        FaultError,
        VmFault, //
    },
    free_stack::FreeStack,
    migrate::{
        Area,
        Migration,
        PfnBuffer,
        Request,
        MAX_PAGES, //
    },
    module_scope::ModuleScope,
    owner::PgmapOwner,
    pagemap_ops::{
        PagemapOps,
        PrivateOps, //
    },
    range::PageRange,
    registration::Registration,
    system_folio::SystemFolio, //
};

// For the type of a module.
#[allow(unused_imports)]
pub(crate) use super::module_scope::ModuleExit;
