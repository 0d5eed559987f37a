// SPDX-License-Identifier: GPL-2.0

//! What a driver with device memory starts with.

pub(crate) use super::{
    backing::Backing,
    device_folio::{
        FreedFolio,
        LockedDeviceFolio, //
    },
    fault::{
        FaultError,
        VmFault, //
    },
    free_stack::FreeStack,
    memory_type::MemoryType,
    migrate::{
        Area,
        Migration,
        PfnBuffer,
        Request,
        Select,
        Setup,
        MAX_PAGES, //
    },
    owner::PgmapOwner,
    pagemap_ops::{
        PagemapOps,
        PrivateOps, //
    },
    range::PageRange,
    registration::Registration,
    system_folio::SystemFolio, //
};
