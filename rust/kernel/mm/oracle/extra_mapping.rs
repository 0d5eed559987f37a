// SPDX-License-Identifier: GPL-2.0

//! A fault to be injected into a page of any pagemap, whichever driver registered it.

use crate::{
    bindings,
    mm::{
        hmm::inspect::{
            AnyPagemap,
            MAX_PFNS, //
        },
        page::view::PageView,
        region::memory_type::MemoryType, //
    },
};
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Full,
        Relaxed, //
    }, //
};

/// One mapping too many in the mapcount of a free page, until this is dropped. Only for fault injection.
///
/// No entry maps the page for it, and rmap does not look for entries of a free page, so that the wrong count is the only
/// effect. Of a page in use that no entry maps any more, rmap would follow an `anon_vma` that may be freed. A [`DevPagemap`] does not allocate
/// the page meanwhile. Another driver may. If that driver makes the page a part of a large folio, the count is
/// not taken back, or, if it does so while the value is dropped, the count of a tail page is one too low. The
/// pagemap stays registered; its unregistration waits.
///
/// [`DevPagemap`]: crate::mm::pagemap::dev_pagemap::DevPagemap
///
/// # Invariants
///
/// `page` is a page of `pgmap`.
///
/// # Examples
///
/// ```
/// use kernel::mm::{hmm::inspect::inspect_pfns, oracle::extra_mapping::ExtraMapping};
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
/// # let pfn = device.memory().first_pfn();
///
/// let mapcount = || {
///     let mut found = [None];
///     inspect_pfns(pfn, &mut found, device.owner(), |facts| facts.map(|facts| facts.mapcount))
///         .and(Ok(found[0]))
/// };
/// let extra = ExtraMapping::new(pfn)?;
/// assert_eq!((extra.pfn(), mapcount()?), (pfn, Some(1)));
/// drop(extra);
/// assert_eq!(mapcount()?, Some(0));
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct ExtraMapping {
    page: NonNull<bindings::page>,
    pfn: usize,
    pgmap: AnyPagemap,
}

// SAFETY: The count is atomic, and the pagemap's reference belongs to no thread.
unsafe impl Send for ExtraMapping {}

impl ExtraMapping {
    /// Raises the mapcount of page frame `pfn`. Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT` if no pagemap has such a page, `EBUSY` if the page is in use, has a mapping too many already, or belongs to
    /// a large folio, which has its mapcount elsewhere.
    pub(crate) fn new(pfn: usize) -> Result<Self> {
        let pgmap = (pfn < MAX_PFNS)
            .then(|| AnyPagemap::of_pfn(pfn))
            .flatten()
            .ok_or(ENOENT)?;
        let view = pgmap.page(pfn).ok_or(ENOENT)?;
        if !is_free(&view) || view.bits().is_mapped() {
            return Err(EBUSY);
        }
        let page = NonNull::new(view.as_ptr()).ok_or(ENOENT)?;
        // INVARIANT: The page is one of `pgmap`.
        let extra = Self { page, pfn, pgmap };
        let before = extra.count().fetch_add(1, Full);
        // A page that has come into use meanwhile gets its count back.
        let view = extra.pgmap.page(pfn);
        if before != UNMAPPED || !view.as_ref().is_some_and(is_free) {
            return Err(EBUSY);
        }
        Ok(extra)
    }

    /// The page frame.
    pub(crate) fn pfn(&self) -> usize {
        self.pfn
    }

    /// `page->_mapcount`.
    fn count(&self) -> &Atomic<i32> {
        // SAFETY: The page is valid while the pagemap is registered, by the type invariants of
        // `ExtraMapping`. Every access to its count is atomic; both fields of the union have 32 bits.
        unsafe { Atomic::from_ptr((&raw mut (*self.page.as_ptr()).__bindgen_anon_2).cast()) }
    }
}

/// `page->_mapcount` of a page that no entry maps.
const UNMAPPED: i32 = -1;

/// Whether the page has a mapcount of its own now, and no task a reference on it.
fn is_free(page: &PageView<'_>) -> bool {
    is_small(page) && page.refs() <= MemoryType::free_refs(page.memory_type())
}

/// Whether the page has a mapcount of its own now.
fn is_small(page: &PageView<'_>) -> bool {
    !page.bits().is_tail() && page.large().is_none()
}

impl Drop for ExtraMapping {
    fn drop(&mut self) {
        let view = self.pgmap.page(self.pfn);
        let mut count = self.count().load(Relaxed);
        // Not below what an unmapped page has.
        while view.as_ref().is_some_and(is_small) && count >= 0 {
            match self.count().cmpxchg(count, count - 1, Full) {
                Ok(_) => return,
                Err(now) => count = now,
            }
        }
    }
}

#[kunit_tests(zdmirror_extra_mapping)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::{
            device::EmulatedDevice,
            support::{
                anon_range,
                munmap, //
            },
        },
        page::{
            backing::Backing,
            device_folio::FolioInitCause, //
        },
    };

    #[test]
    fn page_is_not_allocated() -> Result {
        let device = EmulatedDevice::new()?;
        let map = device.memory();
        let block = device.take().ok_or(ENOSPC)?;
        let pfn = block.first_pfn();
        let index = map.index_of_pfn(pfn).ok_or(EINVAL)?;
        let extra = ExtraMapping::new(pfn)?;
        let backing = Backing::alloc(block.order())?;
        let err = map.folio_init(block, backing).err().ok_or(EINVAL)?;
        assert_eq!(err.cause, FolioInitCause::NotFree(index));
        drop(extra);
        let folio = map.folio_init(err.folio, err.backing);
        drop(folio.map_err(|_| EINVAL)?);
        Ok(())
    }

    #[test]
    fn page_in_use_is_refused() -> Result {
        let device = EmulatedDevice::new()?;
        let range = anon_range(1)?;
        let mirror = device.mirror()?;
        device.migrate(range)?;
        let held = mirror.get_device_folio(range)?;
        let mapcount = || {
            let index = device.memory().index_of_pfn(held.pfn())?;
            device.memory().page(index).map(|page| page.mapcount())
        };
        assert_eq!(ExtraMapping::new(held.pfn()).err(), Some(EBUSY));
        assert_eq!(mapcount(), Some(1));
        munmap(range.start(), range.end() - range.start())?;
        // The page still names the anon_vma that it was mapped by.
        assert_eq!(ExtraMapping::new(held.pfn()).err(), Some(EBUSY));
        assert_eq!(mapcount(), Some(0));
        Ok(())
    }

    #[test]
    fn page_gets_one_mapping_at_most() -> Result {
        let device = EmulatedDevice::new()?;
        let pfn = device.memory().first_pfn();
        let extra = ExtraMapping::new(pfn)?;
        assert_eq!(ExtraMapping::new(pfn).err(), Some(EBUSY));
        drop(extra);
        let page = device.memory().page(0).ok_or(EINVAL)?;
        assert!(page.bits().is_clean());
        Ok(())
    }
}
