// SPDX-License-Identifier: GPL-2.0
// error: E0133

//! A driver does not choose the memory of the machine that it takes.

#![forbid(unsafe_code)]

use crate::mm::region::frames::ReservedRegion;
use kernel::{prelude::*, sizes::SZ_2M};

fn take() -> Result<ReservedRegion> {
    Ok(ReservedRegion::request(1 << 32, SZ_2M, c"mine")?)
}
