// SPDX-License-Identifier: GPL-2.0
// error: E0277

//! A mirror is not put where it would never be dropped.

#![forbid(unsafe_code)]

use crate::mm::{hmm::mirror::HmmMirror, region::owner::PgmapOwner};
use kernel::{mm::MmWithUser, prelude::*, sync::Arc, types::Opaque};
use pin_init::Wrapper;

fn keep(mm: &MmWithUser, owner: Arc<PgmapOwner>) -> Result<Pin<KBox<Opaque<HmmMirror>>>> {
    KBox::try_pin_init(Opaque::pin_init(HmmMirror::new(mm, owner)), GFP_KERNEL)
}
