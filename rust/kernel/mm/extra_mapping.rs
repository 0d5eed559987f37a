// SPDX-License-Identifier: GPL-2.0

//! A fault to be injected into a page of any pagemap, whichever driver registered it.

use super::inspect::{
    AnyPagemap,
    MAX_PFNS, //
};
use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Full, //
    }, //
};

/// One mapping too many in the mapcount of a page, until this is dropped. Only for fault injection.
///
/// Nothing maps the page for it, so nothing comes of it but a wrong number: the page is neither freed nor
/// reached by anyone. The pagemap stays registered meanwhile; its unregistration waits.
///
/// # Invariants
///
/// `page` is a page of `_pgmap`, and its `_mapcount` is one too high.
///
/// # Examples
///
/// ```
/// use kernel::mm::{extra_mapping::ExtraMapping, inspect::inspect_pfns};
/// # use kernel::mm::kunit_device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
/// # let pfn = device.memory().first_pfn();
///
/// let mapcount = || {
///     let mut found = [None];
///     inspect_pfns(pfn, &mut found, device.owner(), |facts| facts.map(|facts| facts.mapcount));
///     found[0]
/// };
/// let extra = ExtraMapping::new(pfn)?;
/// assert_eq!((extra.pfn(), mapcount()), (pfn, Some(1)));
/// drop(extra);
/// assert_eq!(mapcount(), Some(0));
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct ExtraMapping {
    page: NonNull<bindings::page>,
    pfn: usize,
    _pgmap: AnyPagemap,
}

// SAFETY: The count is atomic, and the pagemap's reference belongs to no thread.
unsafe impl Send for ExtraMapping {}

impl ExtraMapping {
    /// Raises the mapcount of page frame `pfn`. Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT` if no pagemap has such a page, `EBUSY` if the page belongs to a large folio, which
    /// has its mapcount elsewhere.
    pub(crate) fn new(pfn: usize) -> Result<Self> {
        let pgmap = (pfn < MAX_PFNS)
            .then(|| AnyPagemap::of_pfn(pfn))
            .flatten()
            .ok_or(ENOENT)?;
        let view = pgmap.page(pfn).ok_or(ENOENT)?;
        if view.bits().is_tail() || view.large().is_some() {
            return Err(EBUSY);
        }
        let page = NonNull::new(view.as_ptr()).ok_or(ENOENT)?;
        // INVARIANT: The page is one of `pgmap`, and its count is raised here.
        let extra = Self {
            page,
            pfn,
            _pgmap: pgmap,
        };
        extra.count().fetch_add(1, Full);
        Ok(extra)
    }

    /// The page frame.
    pub(crate) fn pfn(&self) -> usize {
        self.pfn
    }

    /// `page->_mapcount`.
    fn count(&self) -> &Atomic<i32> {
        // SAFETY: The page is valid while the pagemap is registered, by the type invariants. Every access
        // to its count is atomic; both fields of the union have 32 bits.
        unsafe { Atomic::from_ptr((&raw mut (*self.page.as_ptr()).__bindgen_anon_2).cast()) }
    }
}

impl Drop for ExtraMapping {
    fn drop(&mut self) {
        self.count().fetch_add(-1, Full);
    }
}
