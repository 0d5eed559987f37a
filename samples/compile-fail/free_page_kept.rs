// SPDX-License-Identifier: GPL-2.0
// error: E0521

//! A page of a set that a closure inspects stays free, and stays in the set.

#![forbid(unsafe_code)]

use crate::mm::region::free_folio::{FreeFolio, FreePages};

fn keep<'a>(pages: &'a FreePages, pfn: usize, kept: &mut Option<&'a FreeFolio>) {
    pages.with(pfn, |folio| *kept = Some(folio));
}
