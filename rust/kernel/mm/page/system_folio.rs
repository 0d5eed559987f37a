// SPDX-License-Identifier: GPL-2.0

//! Folios of system memory, to which device memory is migrated back.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use super::batch::PageBatch;
use crate::{
    bindings,
    mm::PMD_ORDER, //
};
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
/// use kernel::mm::page::system_folio::SystemFolio;
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

// Some kernels cannot split a folio that a CPU fault or an eviction brings back, so that the allocator makes an
// effort for large folios. A failure writes nothing to the log.
impl SystemFolio {
    /// Allocates a movable folio of `order` for address `address`, in bytes, of `vma`, by the memory policy there. May
    /// sleep. The folio is not cleared: a migration fills it.
    ///
    /// Wraps `vma_alloc_folio()`.
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

    /// Allocates a movable folio of `order` for user data whose address is not known. May sleep. The folio is not
    /// cleared: a migration fills it.
    ///
    /// Wraps `folio_alloc()`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an order above [`PMD_ORDER`], `ENOMEM`.
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
    pub(in crate::mm) fn as_non_null(&self) -> NonNull<bindings::page> {
        self.page
    }

    /// Gives the reference away.
    pub(in crate::mm) fn into_raw(self) -> *mut bindings::page {
        let page = self.page.as_ptr();
        core::mem::forget(self);
        page
    }
}

/// Folios of one page each for one purpose, allocated together where no memory policy says where each
/// has to be. Dropping it frees those that were not taken.
///
/// # Examples
///
/// ```
/// use kernel::mm::page::system_folio::SystemFolios;
///
/// let mut folios = SystemFolios::anywhere(2);
/// let (one, other) = (folios.alloc(0)?, folios.alloc(0)?);
/// assert_eq!((one.order(), other.order()), (0, 0));
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct SystemFolios<'a> {
    vma: Option<&'a VmaRef>,
    gfp: bindings::gfp_t,
    /// Folios that will be asked for, at most.
    wanted: usize,
    batch: PageBatch,
}

impl<'a> SystemFolios<'a> {
    /// Up to `wanted` movable folios for `vma`, of which the first [`SystemFolios::alloc`] allocates some together. Does
    /// not sleep.
    pub(crate) fn for_vma(vma: &'a VmaRef, wanted: usize) -> Self {
        Self {
            vma: Some(vma),
            gfp: bindings::GFP_HIGHUSER_MOVABLE | bindings::__GFP_NOWARN,
            wanted,
            batch: PageBatch::new(),
        }
    }

    /// As [`SystemFolios::for_vma`], for folios that the caller can do without: an allocation fails before it
    /// reclaims memory that is in use. Does not sleep.
    pub(crate) fn try_for_vma(vma: &'a VmaRef, wanted: usize) -> Self {
        let mut folios = Self::for_vma(vma, wanted);
        folios.gfp |= bindings::GFP_NORETRY;
        folios
    }

    /// Up to `wanted` movable folios for user data whose address is not known. Does not sleep.
    pub(crate) fn anywhere(wanted: usize) -> Self {
        Self {
            vma: None,
            gfp: bindings::GFP_HIGHUSER_MOVABLE | bindings::__GFP_NOWARN,
            wanted,
            batch: PageBatch::new(),
        }
    }

    /// A folio of order 0, for address `address`, in bytes, if an area was given. May sleep.
    ///
    /// Wraps `alloc_pages_bulk()`, or `vma_alloc_folio()` where there is a memory policy.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn alloc(&mut self, address: usize) -> Result<SystemFolio> {
        self.batch.refill(self.wanted, self.gfp, self.vma);
        self.wanted = self.wanted.saturating_sub(1);
        let page = self.batch.pop().or_else(|| {
            NonNull::new(match self.vma {
                // SAFETY: `vma` is valid and locked while it is borrowed. Core mm uses `address` to choose a
                // node only, and accepts any.
                Some(vma) => unsafe {
                    bindings::zdm_alloc_folio_vma(self.gfp, 0, vma.as_ptr(), address)
                },
                // SAFETY: The caller may sleep.
                None => unsafe { bindings::zdm_alloc_folio(self.gfp, 0) },
            })
        });
        // INVARIANT: A new page is a folio of order 0, and its one reference is ours.
        Ok(SystemFolio {
            page: page.ok_or(ENOMEM)?,
            order: 0,
        })
    }
}

/// Refuses orders above [`PMD_ORDER`], some of which the page allocator does not have.
fn check_order(order: u32) -> Result {
    if order > PMD_ORDER {
        Err(EINVAL)
    } else {
        Ok(())
    }
}

impl Drop for SystemFolio {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants of `SystemFolio`.
        unsafe { bindings::zdm_folio_put(self.page.as_ptr()) };
    }
}
