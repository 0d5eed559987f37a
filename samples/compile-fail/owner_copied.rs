// SPDX-License-Identifier: GPL-2.0
// error: E0507

//! The address of an owner is its identity, so an owner cannot be copied.

#![forbid(unsafe_code)]

use crate::mm::region::owner::PgmapOwner;

fn copy(owner: &PgmapOwner) -> PgmapOwner {
    *owner
}
