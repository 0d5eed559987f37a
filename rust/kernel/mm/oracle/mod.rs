// SPDX-License-Identifier: GPL-2.0

//! Comparisons and faults for an oracle of device memory; no driver needs them.

pub(crate) mod extra_mapping;
pub(crate) mod rmap;
pub(crate) mod survey;
pub(crate) mod walk;
#[cfg(CONFIG_KUNIT = "y")]
mod walk_kunit;
pub(crate) mod whole;
