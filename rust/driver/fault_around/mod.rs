// SPDX-License-Identifier: GPL-2.0

//! Which pages around its own a CPU fault on device memory brings back.

#![forbid(unsafe_code)]

pub(super) mod files;
mod heads;
pub(super) mod streams;
