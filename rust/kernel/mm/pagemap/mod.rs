// SPDX-License-Identifier: GPL-2.0

//! Registers device memory, and calls its driver when a folio is freed, split, or touched by the CPU.

pub(crate) mod audit;
pub(crate) mod dev_pagemap;
pub(crate) mod fault;
mod folio_init;
mod kept;
pub(crate) mod ops;
mod pfns;
pub(super) mod refs;
pub(crate) mod registration;
