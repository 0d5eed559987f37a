// SPDX-License-Identifier: GPL-2.0
// error: E0499

//! The entries of a migration belong to it for as long as it lasts.

#![forbid(unsafe_code)]

use crate::mm::migrate::{DevicePfns, Migration, PfnBuffer};

fn both(buffer: &mut PfnBuffer, pfns: &DevicePfns<'_>) {
    let one = Migration::of_device_pages(buffer, pfns);
    let other = Migration::of_device_pages(buffer, pfns);
    drop(one.copied());
    drop(other.copied());
}
