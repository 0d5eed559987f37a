// SPDX-License-Identifier: GPL-2.0
// error: E0423

//! An area that only its own lock protects is not enough for a migration.

#![forbid(unsafe_code)]

use crate::mm::migrate::migration::Area;
use kernel::mm::virt::VmaRef;

fn area(vma: &VmaRef) -> Area<'_> {
    Area(vma)
}
