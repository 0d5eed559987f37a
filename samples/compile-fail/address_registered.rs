// SPDX-License-Identifier: GPL-2.0
// error: E0308

//! A physical address is not memory: only a region that was requested can be registered.

#![forbid(unsafe_code)]

use crate::mm::{
    kunit::device::NoPages, pagemap::registration::Registration, region::owner::PgmapOwner,
};
use kernel::sync::Arc;

fn anywhere(address: u64, owner: Arc<PgmapOwner>) {
    drop(Registration::coherent(address, owner, |_| Ok(NoPages)));
}
