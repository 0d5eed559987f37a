// SPDX-License-Identifier: GPL-2.0
// error: E0624

//! A free folio comes from registration only.

#![forbid(unsafe_code)]

use crate::mm::region::free_folio::FreeFolio;

fn made_up(pfn: usize) -> FreeFolio {
    FreeFolio::new(pfn, 0)
}
