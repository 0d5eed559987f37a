// SPDX-License-Identifier: GPL-2.0
// error: E0382

//! Reserved memory is registered once.

#![forbid(unsafe_code)]

use crate::mm::{
    kunit::device::NoPages,
    pagemap::registration::Registration,
    region::{frames::ReservedRegion, owner::PgmapOwner},
};
use kernel::sync::Arc;

fn twice(region: ReservedRegion, owner: Arc<PgmapOwner>) {
    let one = Registration::coherent(region, owner.clone(), |_| Ok(NoPages));
    let other = Registration::generic(region, owner, |_| Ok(NoPages));
    drop((one, other));
}
