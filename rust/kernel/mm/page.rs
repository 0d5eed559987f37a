// SPDX-License-Identifier: GPL-2.0

//! Read-only view of a `struct page` of ZONE_DEVICE memory, free or in use.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use crate::bindings;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

/// A `struct page` that stays mapped in the memory map for `'a`, in whatever state it is.
///
/// Everything that is read here may change at any time: the values are exact only while nothing
/// else can reach the page. None of the methods sleeps or takes a lock.
///
/// # Invariants
///
/// `page` points at an initialised `struct page` of a registered pagemap for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct PageView<'a> {
    page: NonNull<bindings::page>,
    _pagemap: PhantomData<&'a ()>,
}

impl PageView<'_> {
    /// # Safety
    ///
    /// `page` must point at a `struct page` of a pagemap that stays registered for the lifetime
    /// that the caller picks.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: By the caller's contract.
        Self {
            page,
            _pagemap: PhantomData,
        }
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }

    /// Page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_page_to_pfn(self.as_ptr()) }
    }

    /// `page_ref_count()`: references on this page or, for a tail page, always zero.
    pub(crate) fn refs(&self) -> i32 {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_page_ref_count(self.as_ptr()) }
    }

    /// `folio_mapcount()`: page table entries, present or not, that map the folio.
    pub(crate) fn mapcount(&self) -> i32 {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_folio_mapcount(self.as_ptr()) }
    }

    /// `folio_order()`.
    pub(crate) fn order(&self) -> u32 {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_folio_order(self.as_ptr()) }
    }

    /// Whether `PG_locked` is set.
    pub(crate) fn is_locked(&self) -> bool {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_folio_locked(self.as_ptr()) }
    }

    /// Whether `PG_lru` is set, which it must never be on ZONE_DEVICE memory.
    pub(crate) fn is_lru(&self) -> bool {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_folio_lru(self.as_ptr()) }
    }

    /// Whether `PG_anon_exclusive` is set.
    pub(crate) fn is_anon_exclusive(&self) -> bool {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_page_anon_exclusive(self.as_ptr()) }
    }

    /// `folio->mapping` as a number, with its type bits.
    pub(crate) fn mapping(&self) -> usize {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_folio_mapping(self.as_ptr()) }
    }

    /// `folio->memcg_data` as a number, 0 without `CONFIG_MEMCG`.
    pub(crate) fn memcg(&self) -> usize {
        // SAFETY: The page is valid by the type invariants.
        unsafe { bindings::zdm_folio_memcg(self.as_ptr()) }
    }
}
