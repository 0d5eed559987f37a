// SPDX-License-Identifier: GPL-2.0
// error: E0382

//! Allocating a free folio consumes it.

#![forbid(unsafe_code)]

use crate::mm::{
    page::backing::Backing,
    pagemap::{dev_pagemap::DevPagemap, ops::PagemapOps},
    region::free_folio::FreeFolio,
};

fn twice<T: PagemapOps>(map: &DevPagemap<T>, folio: FreeFolio, a: Backing, b: Backing) {
    let first = map.folio_init(folio, a).ok();
    let second = map.folio_init(folio, b).ok();
    drop((first, second));
}
