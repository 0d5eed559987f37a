// SPDX-License-Identifier: GPL-2.0

//! An open file of a device, and the operations on it.

#![forbid(unsafe_code)]

mod exclusive;
mod inject;
mod injection;
pub(super) mod inspect;
pub(super) mod open_file;
pub(super) mod pin;
mod pins;
pub(super) mod rw;
mod snapshot;
mod strict;
