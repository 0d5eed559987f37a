// SPDX-License-Identifier: GPL-2.0

//! The driver: policy only. What is unsafe is in `crate::mm`, what is judged in `crate::audit`.

#![forbid(unsafe_code)]

mod access;
mod blocks;
mod chunk;
mod device;
mod file;
mod freed;
mod inject;
mod ioctl;
mod list;
mod migrate;
mod openers;
mod pool;
#[cfg(CONFIG_KUNIT = "y")]
mod pool_model;
mod stats;

pub(crate) use device::{
    Config,
    Device, //
};
pub(crate) use file::Opener;
