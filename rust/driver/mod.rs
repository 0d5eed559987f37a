// SPDX-License-Identifier: GPL-2.0

//! The driver: policy only. What is unsafe is in `crate::mm`, what is judged in `crate::audit`.

#![forbid(unsafe_code)]

mod access;
mod blocks;
mod chunk;
mod config;
mod debugfs;
mod device;
mod evict;
mod file;
mod freed;
mod inject;
mod inspect;
mod ioctl;
mod list;
mod migrate;
mod openers;
mod pagemaps;
mod pin;
mod pool;
#[cfg(CONFIG_KUNIT = "y")]
mod pool_model;
mod scan;
mod settle;
mod snapshot;
mod stats;
mod supply;

pub(crate) use config::{
    Config,
    Location, //
};
pub(crate) use debugfs::DebugFiles;
pub(crate) use device::Device;
pub(crate) use file::Opener;
pub(crate) use pagemaps::PagemapsFile;
