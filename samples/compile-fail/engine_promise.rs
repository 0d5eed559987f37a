// SPDX-License-Identifier: GPL-2.0
// error: E0133

//! A driver without unsafe code does not promise what its engine writes: the pages are cleared first.

#![forbid(unsafe_code)]

use crate::mm::migrate::device_memory::Overwrites;

fn promise() -> Overwrites {
    Overwrites::promise()
}
