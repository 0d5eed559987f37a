// SPDX-License-Identifier: GPL-2.0

//! The driver: policy only. What is unsafe is in `crate::mm`, what is judged in `crate::audit`.

#![forbid(unsafe_code)]

mod blocks;
mod chunk;
mod client;
mod copy;
mod core_data;
mod debugfs;
mod device;
mod evict;
mod exclusive;
mod fault;
mod freed;
mod inject;
mod injection;
mod inspect;
mod ioctl;
mod list;
mod migrate;
mod node;
mod openers;
mod pagemaps;
mod params;
mod pin;
mod pins;
mod pool;
#[cfg(CONFIG_KUNIT = "y")]
mod pool_model;
mod rw;
mod scan;
mod snapshot;
mod stats;
mod supply;
mod verify;

pub(crate) use client::Client;
pub(crate) use debugfs::DebugFiles;
pub(crate) use device::Device;
pub(crate) use pagemaps::PagemapsFile;
pub(crate) use params::{
    Config,
    Location, //
};
