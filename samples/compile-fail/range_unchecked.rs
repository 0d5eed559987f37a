// SPDX-License-Identifier: GPL-2.0
// error: E0616

//! A range is checked when it is made, and cannot be changed afterwards.

#![forbid(unsafe_code)]

use crate::mm::user::range::PageRange;

fn grow(mut range: PageRange) -> PageRange {
    range.end += 1;
    range
}
