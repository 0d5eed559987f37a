// SPDX-License-Identifier: GPL-2.0

//! Folios of system memory: what device memory is migrated back to.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use super::PMD_ORDER;
use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    mm::virt::VmaRef,
    prelude::*, //
};

/// An owned folio of system memory that no other value refers to.
///
/// # Examples
///
/// ```
/// use kernel::mm::system_folio::SystemFolio;
///
/// let folio = SystemFolio::alloc(2)?;
/// assert_eq!(folio.order(), 2);
/// assert_eq!(SystemFolio::alloc(64).err(), Some(EINVAL));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `page` is the head of a folio of order `order` and `self` owns its only reference.
pub(crate) struct SystemFolio {
    page: NonNull<bindings::page>,
    order: u32,
}

// SAFETY: No other value refers to the folio, so it may change threads.
unsafe impl Send for SystemFolio {}

// Core mm cannot split a folio for which a CPU fault or an eviction asks, so that large ones are
// worth some effort. To run out of memory is no reason for a line in the log.
impl SystemFolio {
    /// Allocates a movable folio for `address` of `vma`, by the memory policy there. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an order above [`PMD_ORDER`], `ENOMEM`.
    pub(crate) fn alloc_vma(vma: &VmaRef, address: usize, order: u32) -> Result<Self> {
        check_order(order)?;
        let gfp = bindings::GFP_HIGHUSER_MOVABLE | bindings::__GFP_NOWARN;
        // SAFETY: A `VmaRef` is valid and locked while it is borrowed. Core mm uses `address` to
        // choose a node only, and accepts any.
        let page = unsafe { bindings::zdm_alloc_folio_vma(gfp, order, vma.as_ptr(), address) };
        // INVARIANT: A new folio has one reference, which is ours.
        Ok(Self {
            page: NonNull::new(page).ok_or(ENOMEM)?,
            order,
        })
    }

    /// As [`SystemFolio::alloc_vma`], for a page that no task waits for. The allocation reclaims
    /// little.
    pub(crate) fn try_alloc_vma(vma: &VmaRef, address: usize) -> Result<Self> {
        let gfp = bindings::GFP_HIGHUSER_MOVABLE | bindings::GFP_NORETRY | bindings::__GFP_NOWARN;
        // SAFETY: `vma` is valid and read-locked for the call.
        let page = unsafe { bindings::zdm_alloc_folio_vma(gfp, 0, vma.as_ptr(), address) };
        // INVARIANT: As in `alloc_vma()`.
        Ok(Self {
            page: NonNull::new(page).ok_or(ENOMEM)?,
            order: 0,
        })
    }

    /// Allocates a movable folio for user data whose address is not known. May sleep.
    pub(crate) fn alloc(order: u32) -> Result<Self> {
        check_order(order)?;
        let gfp = bindings::GFP_HIGHUSER_MOVABLE | bindings::__GFP_NOWARN;
        // SAFETY: The order is one that the page allocator has. The caller may sleep.
        let page = unsafe { bindings::zdm_alloc_folio(gfp, order) };
        // INVARIANT: A new folio has one reference, which is ours.
        Ok(Self {
            page: NonNull::new(page).ok_or(ENOMEM)?,
            order,
        })
    }

    /// Its order.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// The head page.
    pub(super) fn as_non_null(&self) -> NonNull<bindings::page> {
        self.page
    }

    /// Gives the reference away.
    pub(super) fn into_raw(self) -> *mut bindings::page {
        let page = self.page.as_ptr();
        core::mem::forget(self);
        page
    }
}

/// No caller asks for larger folios, and the page allocator has no order that does not fit a word.
fn check_order(order: u32) -> Result {
    if order > PMD_ORDER {
        Err(EINVAL)
    } else {
        Ok(())
    }
}

impl Drop for SystemFolio {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants.
        unsafe { bindings::zdm_folio_put(self.page.as_ptr()) };
    }
}
