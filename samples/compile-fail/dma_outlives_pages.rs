// SPDX-License-Identifier: GPL-2.0
// error: E0515

//! A DMA mapping ends before its pages are freed.

#![forbid(unsafe_code)]

use crate::mm::migrate::device_memory::{CpuPages, DmaPages};
use kernel::{device::Bound, device::Device, prelude::*};

fn map<'a>(pages: CpuPages<'a>, dev: &'a Device<Bound>) -> Result<DmaPages<'a>> {
    pages.dma_map_to_device(dev)
}
