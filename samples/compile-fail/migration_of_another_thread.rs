// SPDX-License-Identifier: GPL-2.0
// error: E0277

//! The thread that took the locks of a migration lets go of them.

#![forbid(unsafe_code)]

use crate::mm::migrate::{Migration, Setup};

fn send<T: Send>(_: T) {}

fn elsewhere(migration: Migration<'static, Setup>) {
    send(migration);
}
