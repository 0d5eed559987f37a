// SPDX-License-Identifier: GPL-2.0

//! What the owner of a pagemap is called for: `struct dev_pagemap_ops`.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    device_folio::FreedFolio,
    fault::{
        FaultError,
        VmFault, //
    }, //
};

/// What the owner of a pagemap is called for: `struct dev_pagemap_ops`.
///
/// # Examples
///
/// ```
/// # use crate::mm::{device_folio::FreedFolio, free_stack::FreeStack, pagemap_ops::PagemapOps};
/// struct Chunk {
///     freed: FreeStack,
/// }
///
/// impl PagemapOps for Chunk {
///     fn folio_free(&self, folio: FreedFolio<'_>) {
///         if let Some(free) = folio.into_free() {
///             // The allocator takes the folio off the stack. A folio that the stack refuses is not
///             // handed out again.
///             let _ = self.freed.push(free);
///         }
///     }
/// }
/// ```
pub(crate) trait PagemapOps: Send + Sync + Sized + 'static {
    /// The last reference on a folio is gone, and the folio is given back.
    ///
    /// Called by the task that dropped the reference, in any context, interrupts included: must not
    /// sleep, and must not take a lock that is ever taken with interrupts enabled. The folio may be
    /// handed out again as soon as the owner's allocator has it.
    fn folio_free(&self, folio: FreedFolio<'_>);

    /// A large folio was split, and page `index` is the head of what is now a folio of `order`, which
    /// may be any order below that of the large folio.
    ///
    /// Called for each part, with the folio locked and frozen; must not sleep. By default it does nothing.
    fn folio_split(&self, _index: usize, _order: u32) {}
}

/// What the owner of PRIVATE memory is called for besides.
pub(crate) trait PrivateOps: PagemapOps {
    /// The CPU touched a folio. The mmap lock is held for reading, and the folio is locked. May
    /// sleep.
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError>;
}
