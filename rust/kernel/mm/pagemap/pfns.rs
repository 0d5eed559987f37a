// SPDX-License-Identifier: GPL-2.0

//! Lists of page frames of a pagemap.

use super::{
    dev_pagemap::DevPagemap,
    ops::PagemapOps, //
};
use crate::mm::{
    migrate::selection::DevicePfns,
    page::struct_page,
    sync::task::cond_resched, //
};
use kernel::{
    alloc::flags::__GFP_NOWARN,
    prelude::*, //
};

/// Pages that are looked at before other tasks get their turn.
const STEPS: usize = 1 << 16;

impl<T: PagemapOps> DevPagemap<T> {
    /// A list of page frames, `None` unless all of them belong to this pagemap.
    pub(crate) fn device_pfns<'a>(&'a self, pfns: &'a [usize]) -> Option<DevicePfns<'a>> {
        pfns.iter()
            .all(|&pfn| self.index_of_pfn(pfn).is_some())
            // SAFETY: The pages belong to this pagemap, which stays registered while it is borrowed.
            .then(|| unsafe { DevicePfns::from_raw(pfns) })
    }

    /// Whether page `index` has as many references as mappings. A free page has none of both. This costs less than
    /// two calls.
    pub(crate) fn has_expected_refs(&self, index: usize) -> bool {
        self.page(index).is_none_or(|page| {
            // SAFETY: The page is one of this pagemap, which stays registered while it is borrowed. A page
            // that looks like a tail names another one of the pagemap.
            unsafe { struct_page::has_expected_refs(page.as_ptr()) }
        })
    }

    /// Page frame numbers of all folios in use, page by page. Out of date at once, unless nothing is
    /// allocated or freed meanwhile. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when memory is short, or when so many pages are in use that their numbers are too long for an
    /// allocation: 2 GiB, for 1 TiB of memory.
    pub(crate) fn used_pfns(&self) -> Result<KVVec<usize>> {
        let mut pfns = KVVec::new();
        for index in 0..self.pages() {
            if index % STEPS == 0 {
                cond_resched();
            }
            for page in 0..self.order_in_use(index).map_or(0, |order| 1 << order) {
                pfns.push(self.first_pfn() + index + page, GFP_KERNEL | __GFP_NOWARN)?;
            }
        }
        Ok(pfns)
    }
}
