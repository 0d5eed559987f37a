// SPDX-License-Identifier: GPL-2.0
// error: E0423

//! A list of device pages has numbers of one registered pagemap only.

#![forbid(unsafe_code)]

use crate::mm::migrate::migration::DevicePfns;

fn any(pfns: &[usize]) -> DevicePfns<'_> {
    DevicePfns(pfns)
}
