// SPDX-License-Identifier: GPL-2.0

//! Moves pages between system and device memory.

mod copy;
mod cpu_pages;
pub(crate) mod device_memory;
mod mappings;
pub(crate) mod migration;
pub(crate) mod moved;
pub(crate) mod pfn_buffer;
pub(crate) mod selection;
pub(crate) mod stage;
