// SPDX-License-Identifier: GPL-2.0

//! A device's view of an address space, which it reads, writes, describes, and accesses exclusively.

pub(crate) mod access;
pub(crate) mod copy;
pub(crate) mod exclusive;
pub(crate) mod fill;
pub(crate) mod inspect;
pub(crate) mod mapped;
pub(crate) mod mirror;
pub(crate) mod snapshot;
pub(crate) mod table;
