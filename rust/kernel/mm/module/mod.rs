// SPDX-License-Identifier: GPL-2.0

//! Keeps the module of a driver loaded while the kernel may call into it.

pub(crate) mod callback;
pub(crate) mod pin;
pub(crate) mod scope;
