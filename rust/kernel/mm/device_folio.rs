// SPDX-License-Identifier: GPL-2.0

//! Folios of ZONE_DEVICE memory that are in use, and the moment in which one stops to be.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    page::PageView,
    system_folio::SystemFolio, //
};
use crate::bindings;
use core::ptr::NonNull;

/// A device folio that was just handed out: locked, one reference, not mapped anywhere.
///
/// Dropping it unlocks and frees the folio.
///
/// # Invariants
///
/// `page` is locked, and we own the lock and one reference.
#[must_use = "the folio is freed at once when it is not given to a migration"]
pub(crate) struct LockedDeviceFolio {
    page: NonNull<bindings::page>,
}

impl LockedDeviceFolio {
    /// # Safety
    ///
    /// The caller gives away the lock and a reference of `page`, a page in use of a
    /// [`DevPagemap`](super::pagemap::DevPagemap).
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: By the caller's contract.
        Self { page }
    }

    /// Gives lock and reference away.
    pub(super) fn into_raw(self) -> *mut bindings::page {
        let page = self.page.as_ptr();
        core::mem::forget(self);
        page
    }
}

impl Drop for LockedDeviceFolio {
    fn drop(&mut self) {
        // SAFETY: We own the lock by the type invariants.
        unsafe { bindings::zdm_folio_unlock(self.page.as_ptr()) };
        // SAFETY: We own a reference by the type invariants.
        unsafe { bindings::zdm_folio_put(self.page.as_ptr()) };
    }
}

/// A reference on a device folio in use.
///
/// # Invariants
///
/// We own a reference on `page`.
pub(crate) struct DeviceFolioRef {
    page: NonNull<bindings::page>,
}

// SAFETY: References on folios may be dropped on any thread.
unsafe impl Send for DeviceFolioRef {}

impl DeviceFolioRef {
    /// # Safety
    ///
    /// The caller gives away a reference on `page`.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: By the caller's contract.
        Self { page }
    }

    /// Page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_page_to_pfn(self.page.as_ptr()) }
    }
}

impl Drop for DeviceFolioRef {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants.
        unsafe { bindings::zdm_folio_put(self.page.as_ptr()) };
    }
}

/// Why [`DevPagemap::hand_out`](super::pagemap::DevPagemap::hand_out) refused, with the backing
/// given back.
pub(crate) enum HandOutError {
    /// The page is in use.
    InUse(SystemFolio),
    /// The page is not in use, but has a reference or is locked.
    NotFree(SystemFolio),
    /// The index is beyond the end.
    NoSuchPage(SystemFolio),
}

impl HandOutError {
    /// The backing that was to be used.
    pub(crate) fn into_backing(self) -> SystemFolio {
        match self {
            Self::InUse(backing) | Self::NotFree(backing) | Self::NoSuchPage(backing) => backing,
        }
    }
}

/// A folio in the hands of `folio_free`: no reference is left, and its backing is gone.
pub(crate) struct FreedFolio<'a> {
    page: PageView<'a>,
    index: usize,
    was_in_use: bool,
}

impl<'a> FreedFolio<'a> {
    pub(super) fn new(page: PageView<'a>, index: usize, was_in_use: bool) -> Self {
        Self {
            page,
            index,
            was_in_use,
        }
    }

    /// The (head) page.
    pub(crate) fn page(&self) -> PageView<'a> {
        self.page
    }

    /// Index of the page in its pagemap.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Whether the page was handed out; if not this is a second free.
    pub(crate) fn was_in_use(&self) -> bool {
        self.was_in_use
    }
}
