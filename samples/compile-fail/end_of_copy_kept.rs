// SPDX-License-Identifier: GPL-2.0
// error: E0521

//! The ends of a copy are valid only until the copying function returns.

#![forbid(unsafe_code)]

use crate::mm::migrate::device_memory::{CopyError, CpuPages, DeviceMemory, DevicePages};
use core::cell::RefCell;

struct Engine(RefCell<Option<CpuPages<'static>>>);

fn keep(engine: &Engine, pages: CpuPages<'_>) {
    *engine.0.borrow_mut() = Some(pages);
}
