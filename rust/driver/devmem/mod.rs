// SPDX-License-Identifier: GPL-2.0

//! Device memory: the free pages, and the clients that have the others.

#![forbid(unsafe_code)]

mod allocator;
mod free_blocks;
mod index_list;
#[cfg(CONFIG_KUNIT = "y")]
mod model;
mod owner_list;

pub(super) use allocator::{
    Allocator,
    NewChunk,
    MAX_CHUNKS, //
};
pub(super) use owner_list::{
    ClientId,
    ListRoom, //
};
