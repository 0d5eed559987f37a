// SPDX-License-Identifier: GPL-2.0

//! How free pages of a pagemap become folios in use.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h), `zone_device_folio_init()`

use super::{
    dev_pagemap::{
        in_use,
        DevPagemap, //
    },
    ops::PagemapOps, //
};
use crate::{
    bindings,
    mm::{
        page::{
            backing::{
                Backing,
                RawBacking, //
            },
            device_folio::{
                FolioInitCause,
                FolioInitError,
                LockedDeviceFolio, //
            },
            struct_page,
            view::PageView, //
        },
        region::{
            free_folio::FreeFolio,
            memory_type::MemoryType, //
        },
        sync::once::write_once, //
    },
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed, //
};

impl<T: PagemapOps> DevPagemap<T> {
    /// Allocates `folio`. `backing` holds its contents where the CPU cannot reach the memory.
    ///
    /// Wraps `zone_device_folio_init()`. Not for atomic context: the C function takes the lock of the folio, which is free,
    /// by `lock_page()`.
    ///
    /// # Errors
    ///
    /// Gives folio and backing back when they do not suit each other or this pagemap, when the kernel
    /// cannot migrate or split folios of this order in such memory, when a page of the folio has
    /// a reference, a mapping or a flag that a free page must not have, and when the module is on its way
    /// out.
    pub(crate) fn folio_init(
        &self,
        folio: FreeFolio,
        backing: Backing,
    ) -> Result<LockedDeviceFolio, FolioInitError> {
        let suits = backing.order() == folio.order()
            && folio.order() <= self.max_order
            && (self.memory == MemoryType::Private || !backing.is_some());
        let begun = if suits {
            self.begin_folio_init(&folio)
        } else {
            Err(FolioInitCause::Mismatch)
        };
        match begun {
            Ok((index, head)) => {
                let backing = self.kept.mark(index, backing.into_raw());
                Ok(self.end_folio_init(folio, index, head, backing))
            }
            Err(cause) => Err(FolioInitError::new(cause, folio, backing)),
        }
    }

    /// Whether the memory that the last folio at `folio` had is kept, so that
    /// [`DevPagemap::folio_init_kept`] is worth a try.
    pub(crate) fn has_kept(&self, folio: &FreeFolio) -> bool {
        let index = folio.first_pfn().wrapping_sub(self.first_pfn());
        folio.order() == 0 && self.kept.has(index)
    }

    /// As [`DevPagemap::folio_init`], with the memory that the last folio there had.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kernel::mm::kunit::device::EmulatedDevice;
    /// # let device = EmulatedDevice::new()?;
    /// // The folio is freed, and the memory behind it is kept.
    /// drop(device.alloc(0)?);
    /// let page = device.take().ok_or(ENOSPC)?;
    /// assert!(device.memory().has_kept(&page));
    /// // Memory pressure may take what is kept, so that a driver falls back to `folio_init()`.
    /// match device.memory().folio_init_kept(page) {
    ///     Ok(folio) => drop(folio),
    ///     Err((page, cause)) => {
    ///         assert!(cause.is_none());
    ///         device.put(page);
    ///     }
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Gives the folio back, with a cause unless no memory was kept.
    pub(crate) fn folio_init_kept(
        &self,
        folio: FreeFolio,
    ) -> Result<LockedDeviceFolio, (FreeFolio, Option<FolioInitCause>)> {
        if !self.has_kept(&folio) {
            return Err((folio, None));
        }
        let (index, head) = match self.begin_folio_init(&folio) {
            Ok(begun) => begun,
            Err(cause) => return Err((folio, Some(cause))),
        };
        match self.kept.take(index) {
            Some(backing) => Ok(self.end_folio_init(folio, index, head, backing)),
            None => {
                // SAFETY: `begin_folio_init()` has counted the folio, which is not allocated.
                unsafe { self.end_use(1) };
                Err((folio, None))
            }
        }
    }

    /// Makes sure that `folio` can be allocated, and counts it as in use. Returns the index of its first
    /// page, and the page.
    fn begin_folio_init(&self, folio: &FreeFolio) -> Result<(usize, PageView<'_>), FolioInitCause> {
        let pages = folio.pages();
        let index = self
            .index_of_pfn(folio.first_pfn())
            .filter(|_| !self.closed.load(Relaxed));
        let Some((index, head)) = index.and_then(|i| Some((i, self.page(i)?))) else {
            return Err(FolioInitCause::Mismatch);
        };
        // SAFETY: The folio is one of this pagemap, so that there are struct pages for all of it.
        let idle = unsafe { struct_page::idle_pages(head.as_ptr(), pages) };
        for i in index + idle..index + pages {
            if !self.page(i).is_some_and(|page| self.is_idle(page)) {
                return Err(FolioInitCause::NotFree(i));
            }
        }
        // INVARIANT: The module is pinned before the folio is in use.
        if self.begin_use(pages) {
            Ok((index, head))
        } else {
            Err(FolioInitCause::Unloading)
        }
    }

    /// Allocates the folio that [`DevPagemap::begin_folio_init`] has accepted.
    fn end_folio_init(
        &self,
        folio: FreeFolio,
        index: usize,
        head: PageView<'_>,
        backing: RawBacking,
    ) -> LockedDeviceFolio {
        let order = folio.order();
        // INVARIANT: `folio` is consumed, and from here on its pages are those of a folio in use.
        write_once(&self.state[index], in_use(order));
        let page = head.as_ptr();
        // SAFETY: By the invariants of `FreeFolio` no other value has its pages, and no page has a reference.
        unsafe { bindings::zdm_folio_init(page, self.pgmap.get(), order) };
        // INVARIANT: `zone_device_data` owns the backing while the folio is in use.
        // SAFETY: The folio is ours, so that no other task reads its backing meanwhile.
        unsafe { backing.store(page) };
        let page = head.as_non_null();
        // SAFETY: `zone_device_folio_init()` left the folio locked and with one reference.
        unsafe { LockedDeviceFolio::from_raw(page, order) }
    }

    /// Whether nothing refers to `page`, so that it may be initialised.
    fn is_idle(&self, page: PageView<'_>) -> bool {
        let bits = page.bits();
        // A page that is taken for exclusive, and that two processes share, is written by both.
        if bits.is_referenced() || bits.is_locked() || bits.is_anon_exclusive() {
            return false;
        }
        if !bits.is_tail() {
            // A task that still maps the page would see its next contents.
            return !bits.is_mapped();
        }
        // A tail has no references of its own. The page is idle if its folio is no longer in use.
        // SAFETY: The page is valid, and the head of a folio of ours is a page of ours.
        let head = self.index_of(unsafe { struct_page::head(page.as_ptr()) });
        let end = self
            .order_in_use(head)
            .map_or(0, |order| head + (1 << order));
        end <= self.index_of(page.as_ptr())
    }
}
