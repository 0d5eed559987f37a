// SPDX-License-Identifier: GPL-2.0
// error: E0507

//! A borrowed free folio cannot be kept.

#![forbid(unsafe_code)]

use crate::mm::region::free_folio::{FreeFolio, FreePages};

fn keep(pages: &FreePages, pfn: usize) -> Option<FreeFolio> {
    pages.with(pfn, |folio| *folio)
}
