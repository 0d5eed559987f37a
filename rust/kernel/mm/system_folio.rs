// SPDX-License-Identifier: GPL-2.0

//! Folios of system memory: targets of a migration and backing of fake device memory.
//!
//! C headers: [`include/linux/gfp.h`](srctree/include/linux/gfp.h),
//! [`include/linux/highmem.h`](srctree/include/linux/highmem.h)

use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    mm::virt::VmaRef,
    prelude::*, //
};

/// An owned order-0 folio of system memory that nobody else knows.
///
/// # Invariants
///
/// `page` is an order-0 page of system memory and `self` owns its only reference.
pub(crate) struct SystemFolio {
    page: NonNull<bindings::page>,
}

// SAFETY: A page that nobody else knows may change threads.
unsafe impl Send for SystemFolio {}

impl SystemFolio {
    /// Allocates a folio for data of a device, wherever there is memory. May sleep.
    pub(crate) fn alloc() -> Result<Self> {
        // SAFETY: Always safe in a context that may sleep.
        let page = unsafe { bindings::zdm_alloc_page(Self::gfp(bindings::GFP_HIGHUSER)) };
        // INVARIANT: A new page has one reference, which is ours.
        Ok(Self {
            page: NonNull::new(page).ok_or(ENOMEM)?,
        })
    }

    /// Allocates a movable folio for `address` of `vma`, by the memory policy there. May sleep.
    pub(crate) fn alloc_vma(vma: &VmaRef, address: usize) -> Result<Self> {
        let gfp = Self::gfp(bindings::GFP_HIGHUSER_MOVABLE);
        // SAFETY: `vma` is valid and read-locked for the call.
        let page = unsafe { bindings::zdm_alloc_page_vma(gfp, vma.as_ptr(), address) };
        // INVARIANT: As in `alloc()`.
        Ok(Self {
            page: NonNull::new(page).ok_or(ENOMEM)?,
        })
    }

    /// Allocates a movable folio for user data whose address is not known. May sleep.
    pub(crate) fn alloc_movable() -> Result<Self> {
        // SAFETY: Always safe in a context that may sleep.
        let page = unsafe { bindings::zdm_alloc_page(Self::gfp(bindings::GFP_HIGHUSER_MOVABLE)) };
        // INVARIANT: As in `alloc()`.
        Ok(Self {
            page: NonNull::new(page).ok_or(ENOMEM)?,
        })
    }

    // The memory is the device's or the process's fault to run out of: no warning in the log.
    fn gfp(base: bindings::gfp_t) -> bindings::gfp_t {
        base | bindings::__GFP_NOWARN
    }

    /// Fills the folio with zeroes.
    pub(crate) fn clear(&mut self) {
        // SAFETY: The page is ours alone by the type invariants.
        unsafe { bindings::zdm_clear_highpage(self.as_ptr()) };
    }

    /// # Safety
    ///
    /// `from` must be a page whose contents the CPU can address and nobody writes meanwhile.
    pub(super) unsafe fn copy_from(&mut self, from: *mut bindings::page) {
        // SAFETY: The page is ours alone by the type invariants, `from` by the contract.
        unsafe { bindings::zdm_copy_highpage(self.as_ptr(), from) };
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }

    /// Gives the reference away, to be taken back with [`SystemFolio::from_raw`].
    pub(super) fn into_raw(self) -> *mut bindings::page {
        let page = self.as_ptr();
        core::mem::forget(self);
        page
    }

    /// # Safety
    ///
    /// `page` must come from [`SystemFolio::into_raw`], once.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: By the caller's contract.
        Self { page }
    }
}

impl Drop for SystemFolio {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants.
        unsafe { bindings::zdm_folio_put(self.as_ptr()) };
    }
}
