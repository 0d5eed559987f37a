// SPDX-License-Identifier: GPL-2.0
// error: E0507

//! Owners of pagemaps are told apart by their address, so that there are no copies.

#![forbid(unsafe_code)]

use crate::mm::owner::PgmapOwner;

fn copy(owner: &PgmapOwner) -> PgmapOwner {
    *owner
}
