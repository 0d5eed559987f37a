// SPDX-License-Identifier: GPL-2.0
// error: E0061

//! A driver does not choose how much of the machine's memory it takes.

#![forbid(unsafe_code)]

use crate::{
    mm::region::frames::{RegionError, ReservedRegion},
    params::reserved_region,
};
use kernel::prelude::*;

fn take(start: u64) -> Result<ReservedRegion, RegionError> {
    reserved_region(start, 1 << 30, c"mine")
}
