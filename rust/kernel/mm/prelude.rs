// SPDX-License-Identifier: GPL-2.0

//! What a driver with device memory starts with.

pub(crate) use crate::mm::{
    migrate::{
        device_memory::{
            CopyError,
            CpuPages,
            DeviceMemory,
            DevicePages, //
        },
        migration::{
            Area,
            Migration,
            PfnBuffer,
            Request,
            MAX_PAGES, //
        },
    },
    module::scope::ModuleScope,
    page::{
        backing::Backing,
        device_folio::{
            FreedFolio,
            LockedDeviceFolio, //
        },
        system_folio::SystemFolio, //
    },
    pagemap::{
        fault::{
            FaultError,
            VmFault, //
        },
        ops::{
            PagemapOps,
            PrivateOps, //
        },
        registration::Registration, //
    },
    region::{
        free_stack::FreeStack,
        owner::PgmapOwner, //
    },
    sync::task::check_signals,
    user::{
        mmap_lock::MmapLock,
        range::PageRange, //
    },
};

// For the type of a module.
#[allow(unused_imports)]
pub(crate) use crate::mm::module::scope::ModuleExit;
