// SPDX-License-Identifier: GPL-2.0

//! The address space of a process: ranges, the mmap lock, pins, and notifiers of changes.

pub(super) mod changes;
mod hold;
pub(crate) mod locked_memory;
pub(crate) mod mmap_lock;
pub(crate) mod notifier;
pub(crate) mod pin;
pub(crate) mod range;
pub(crate) mod watches;
