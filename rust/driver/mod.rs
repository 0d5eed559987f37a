// SPDX-License-Identifier: GPL-2.0

//! The driver, which has policy only. Unsafe code is in `crate::mm`, the oracle in `crate::audit`.

#![forbid(unsafe_code)]

mod chunk;
mod client;
mod copy;
mod core_data;
mod debugfs;
mod device;
mod devmem;
mod devmem_alloc;
mod evict;
mod exclusive;
mod fault;
mod fault_around;
mod fault_window;
mod heads;
mod inject;
mod injection;
mod inspect;
mod ioctl;
mod migrate;
mod node;
mod observer;
mod page_backed;
mod pagemaps;
mod params;
mod pin;
mod pins;
mod rw;
mod scan;
mod snapshot;
mod stats;
mod streams;
mod strict;
mod verify;

pub(crate) use client::Client;
pub(crate) use debugfs::DebugFiles;
pub(crate) use device::Device;
pub(crate) use observer::Observer;
pub(crate) use pagemaps::PagemapsFile;
pub(crate) use params::{
    Config,
    Location, //
};
