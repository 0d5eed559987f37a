// SPDX-License-Identifier: GPL-2.0

//! Copies of device pages in system memory.

#![forbid(unsafe_code)]

use super::page_backed::Migration;
use crate::{
    driver::stats::Stats,
    mm::{
        migrate::migration::{
            CopyError,
            Setup, //
        },
        page::system_folio::SystemFolio, //
    },
};
use kernel::prelude::*;

/// Gives each source of `migration`, all of them in device memory, a destination in system memory.
/// Returns how many pages stay on the device because the hardware has lost their contents.
///
/// `alloc` makes a folio for entry `i` of an order. Where it has none a large folio is moved in
/// pages; so is what core mm made of a large folio, if the sources are `pieces`.
///
/// # Errors
///
/// `ENOMEM` when there is no memory for a single page.
pub(in crate::driver) fn copy_back(
    migration: &mut Migration<'_, Setup>,
    stats: &Stats,
    pieces: bool,
    mut alloc: impl FnMut(usize, u32) -> Result<SystemFolio>,
) -> Result<usize> {
    let mut poisoned = 0;
    let mut i = 0;
    while i < migration.len() {
        let Some(order) = migration.source(i) else {
            i += 1;
            continue;
        };
        match alloc(i, order) {
            Ok(folio) => {
                if migration.copy_to_system(i, 0, folio) == Err(CopyError::Poisoned) {
                    poisoned += 1 << order;
                }
            }
            Err(err) if order == 0 && !pieces => return Err(err),
            Err(_) => {
                stats.fell_back(order);
                for part in 0..1 << order {
                    let folio = alloc(i + part, 0)?;
                    if migration.copy_to_system(i, part, folio) == Err(CopyError::Poisoned) {
                        poisoned += 1;
                    }
                }
            }
        }
        i += 1 << order;
    }
    Ok(poisoned)
}
