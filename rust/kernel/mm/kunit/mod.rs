// SPDX-License-Identifier: GPL-2.0

//! A device without hardware for KUnit cases and examples, and cases that need one.

pub(crate) mod device;
mod device_memory;
mod misuse;
mod scope;
pub(crate) mod support;
