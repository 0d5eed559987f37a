// SPDX-License-Identifier: GPL-2.0
// error: E0382

//! Allocating a folio consumes its backing.

#![forbid(unsafe_code)]

use crate::mm::{
    page::backing::Backing,
    pagemap::{dev_pagemap::DevPagemap, ops::PagemapOps},
    region::free_folio::FreeFolio,
};

fn twice<T: PagemapOps>(map: &DevPagemap<T>, folio: FreeFolio, backing: Backing) -> u32 {
    drop(map.folio_init(folio, backing));
    backing.order()
}
