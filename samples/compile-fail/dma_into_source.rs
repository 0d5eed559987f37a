// SPDX-License-Identifier: GPL-2.0
// error: E0596

//! A device does not write to the source of a copy.

#![forbid(unsafe_code)]

use crate::mm::migrate::device_memory::{CpuPages, DmaPages};
use kernel::{device::Bound, device::Device, prelude::*};

fn map<'a>(source: &'a CpuPages<'a>, dev: &'a Device<Bound>) -> Result<DmaPages<'a>> {
    source.dma_map_from_device(dev)
}
