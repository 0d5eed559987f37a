// SPDX-License-Identifier: GPL-2.0
// error: E0277

//! The thread that took the locks of a migration must release them.

#![forbid(unsafe_code)]

use crate::mm::migrate::{
    device_memory::DeviceMemory,
    migration::{Migration, Setup},
};

fn send<T: Send>(_: T) {}

fn elsewhere<M: DeviceMemory + Sync>(migration: Migration<'static, Setup, M>) {
    send(migration);
}
