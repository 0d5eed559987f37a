// SPDX-License-Identifier: GPL-2.0

//! Moves pages to the device and back on request, and evicts device memory.

#![forbid(unsafe_code)]

mod alloc;
mod evict;
mod mapped;
pub(super) mod request;
