// SPDX-License-Identifier: GPL-2.0

//! Device memory before it is in use: physical ranges, types and owners, and free folios as values.

pub(crate) mod frames;
pub(crate) mod free_folio;
pub(crate) mod free_stack;
pub(crate) mod memory_type;
pub(crate) mod owner;
