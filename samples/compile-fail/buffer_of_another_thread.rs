// SPDX-License-Identifier: GPL-2.0
// error: E0277

//! A buffer ends a migration that was forgotten, on the task that has disabled its page faults.

#![forbid(unsafe_code)]

use crate::mm::migrate::migration::PfnBuffer;

fn send<T: Send>(_: T) {}

fn elsewhere(buffer: PfnBuffer) {
    send(buffer);
}
