// SPDX-License-Identifier: GPL-2.0

//! A device: its memory in chunks, CPU faults on it, and the scan of all its pages.

#![forbid(unsafe_code)]

pub(super) mod chunk;
pub(super) mod copy;
mod core_data;
pub(super) mod dmirror_device;
mod fault;
mod fault_window;
pub(super) mod page_backed;
mod scan;
pub(super) mod verify;
