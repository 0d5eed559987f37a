// SPDX-License-Identifier: GPL-2.0

//! The callbacks of the owner of a pagemap: `struct dev_pagemap_ops`.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::fault::{
    FaultError,
    VmFault, //
};
use crate::mm::page::device_folio::FreedFolio;
use kernel::prelude::*;

/// The callbacks of the owner of a pagemap: `struct dev_pagemap_ops`.
///
/// # Examples
///
/// ```
/// use kernel::mm::{
///     page::device_folio::FreedFolio,
///     pagemap::ops::PagemapOps,
///     region::free_stack::FreeStack,
/// };
///
/// struct Chunk {
///     freed: FreeStack,
/// }
///
/// impl PagemapOps for Chunk {
///     fn folio_free(&self, folio: FreedFolio<'_>) {
///         if let Some(free) = folio.into_free() {
///             // The allocator takes the folio off the stack. A folio that the stack refuses
///             // is not allocated again.
///             let _ = self.freed.push(free);
///         }
///     }
/// }
/// # use kernel::mm::region::frames::Frames;
/// # let chunk = Chunk { freed: FreeStack::new(Frames::for_test(512))? };
/// # assert!(chunk.freed.pop().is_none());
/// # Ok::<(), Error>(())
/// ```
pub(crate) trait PagemapOps: Send + Sync + Sized + 'static {
    /// The name of the memory in `/proc/iomem`.
    const NAME: &'static CStr = c"device memory";

    /// The last reference on a folio is gone, and the folio is given back.
    ///
    /// Called by the task that dropped the reference, in any context, interrupts included: must not
    /// sleep, and must not take a lock that is ever taken with interrupts enabled. The folio may be
    /// allocated again as soon as the owner's allocator has it.
    fn folio_free(&self, folio: FreedFolio<'_>);

    /// A large folio was split, and page `index` is now the head of a folio of `order`, which may
    /// be any order below that of the large folio.
    ///
    /// Called for each part, with the folio locked and frozen; must not sleep. By default it does nothing.
    fn folio_split(&self, _index: usize, _order: u32) {}
}

/// The further callbacks of the owner of PRIVATE memory.
///
/// # Examples
///
/// ```
/// use kernel::mm::pagemap::{fault::{FaultError, VmFault}, ops::PrivateOps};
/// # use kernel::mm::{
/// #     page::device_folio::FreedFolio,
/// #     pagemap::ops::PagemapOps,
/// #     region::owner::PgmapOwner,
/// # };
/// # use kernel::{mm::pagemap::registration::Registration, module::this_module, sizes::SZ_2M};
/// # struct Chunk;
/// # impl PagemapOps for Chunk {
/// #     fn folio_free(&self, _: FreedFolio<'_>) {}
/// # }
///
/// impl PrivateOps for Chunk {
///     fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError> {
///         pr_debug!("page {} is wanted back\n", fault.index());
///         // A driver migrates the page, as in the example of `VmFault`.
///         Err(FaultError::Sigbus)
///     }
/// }
/// # let owner = PgmapOwner::new(this_module::<LocalModule>())?;
/// # let (map, region) = Registration::private(SZ_2M, owner, |_| Ok(Chunk))?;
/// # for folio in region {
/// #     map.retire(folio).map_err(|_| EINVAL)?;
/// # }
/// # Ok::<(), Error>(())
/// ```
pub(crate) trait PrivateOps: PagemapOps {
    /// The CPU touched a folio. The mmap lock is held for reading, the folio is locked, and page faults are
    /// disabled for the task, so that what takes the mmap lock fails with `EDEADLK`. May sleep.
    ///
    /// The faulting task tries the access again after `Ok`, and comes back here if the page was not migrated.
    ///
    /// # Errors
    ///
    /// How the fault ends otherwise.
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError>;
}
