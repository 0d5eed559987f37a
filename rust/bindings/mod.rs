// SPDX-License-Identifier: GPL-2.0

//! Bindings for the C interfaces that the `kernel` crate does not bind.
//!
//! Generated at build time from `bindings_helper.h`. Types known to the `kernel` crate come
//! from there, so that there is one of each.

#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

pub(crate) use kernel::bindings::*;
use kernel::ffi;

include!(env!("ZDM_BINDINGS"));
