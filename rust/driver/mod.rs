// SPDX-License-Identifier: GPL-2.0

//! The driver, which has policy only. Unsafe code is in `crate::mm`, the oracle in `crate::audit`.
//!
//! A folder or file imports only what stands before it in this list:
//!
//! | where | what belongs there |
//! |---|---|
//! | `devmem/` | the allocator: which pages are free, and which file moved the others to the device |
//! | `fault_around/` | streams of CPU faults, and the pages around a fault that come back with its own |
//! | `params`, `stats` | module parameters, checked; counters |
//! | `device/` | a device: its chunks of memory, copies, checks of moved pages, CPU faults, the scan |
//! | `migrate/` | migrations on request, folios for them, and eviction |
//! | `client/` | an open file: reads and writes, exclusive access, snapshots, pins, injected faults |
//! | `ioctl`, `node`, `observer` | the nodes of the devices, the node without a device, and their ioctls |
//! | `debugfs`, `pagemaps` | files in debugfs |

#![forbid(unsafe_code)]

mod client;
mod debugfs;
mod device;
mod devmem;
mod fault_around;
mod ioctl;
mod migrate;
mod node;
mod observer;
mod pagemaps;
mod params;
mod stats;

pub(crate) use client::open_file::Client;
pub(crate) use debugfs::DebugFiles;
pub(crate) use device::dmirror_device::Device;
pub(crate) use observer::Observer;
pub(crate) use pagemaps::PagemapsFile;
pub(crate) use params::{
    Config,
    Location, //
};
