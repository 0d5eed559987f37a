// SPDX-License-Identifier: GPL-2.0

//! Folios of ZONE_DEVICE memory that are in use, and the moment in which one stops to be.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    backing::{
        contents,
        Backing, //
    },
    struct_page,
    view::PageView, //
};
use crate::{
    bindings,
    mm::{
        region::free_folio::FreeFolio,
        sync::task::check_may_fault, //
    },
};
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// A device folio that was just allocated: locked, one reference, not mapped anywhere.
///
/// Dropping it unlocks and frees the folio: the driver's `folio_free` is called, by the same task. Does not sleep.
///
/// # Examples
///
/// ```
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
/// let folio = device.alloc(2)?;
/// assert!(folio.page().bits().is_locked());
/// assert_eq!(folio.page().refs(), 1);
/// assert_eq!(device.memory().used(), 4);
/// // No migration took the folio: its pages are free again.
/// drop(folio);
/// assert_eq!(device.memory().used(), 0);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `page` is the head of a locked folio of `order`, and we own the lock and one reference.
#[must_use = "the folio is freed at once when it is not given to a migration"]
pub(crate) struct LockedDeviceFolio {
    page: NonNull<bindings::page>,
    order: u32,
}

impl LockedDeviceFolio {
    /// # Safety
    ///
    /// The caller gives away the lock and a reference of the folio of `order` that `page` is the
    /// head of, in use and of a [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap).
    pub(in crate::mm) unsafe fn from_raw(page: NonNull<bindings::page>, order: u32) -> Self {
        // INVARIANT: The contract of this function says the same.
        Self { page, order }
    }

    /// Its order.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// The head page, which the folio's counts and flags are read from.
    pub(crate) fn page(&self) -> PageView<'_> {
        // SAFETY: Our reference keeps the folio in use, and with it the pagemap registered.
        unsafe { PageView::from_raw(self.page) }
    }

    /// Whether its pages but the first are tails with nothing that a free page must not have.
    pub(crate) fn has_clean_tails(&self) -> bool {
        // SAFETY: The folio is ours, and of this order by the type invariants of `LockedDeviceFolio`.
        self.order == 0 || unsafe { struct_page::has_clean_tails(self.page.as_ptr(), self.order) }
    }

    /// Gives lock and reference away.
    pub(in crate::mm) fn into_raw(self) -> *mut bindings::page {
        let page = self.page.as_ptr();
        core::mem::forget(self);
        page
    }
}

impl Drop for LockedDeviceFolio {
    fn drop(&mut self) {
        // SAFETY: We own the lock by the type invariants of `LockedDeviceFolio`.
        unsafe { bindings::zdm_folio_unlock(self.page.as_ptr()) };
        // SAFETY: We own a reference by the type invariants of `LockedDeviceFolio`.
        unsafe { bindings::zdm_folio_put(self.page.as_ptr()) };
    }
}

/// References of a folio, from which on a [`FolioRef`] takes no more. One that is forgotten keeps its reference, and a
/// count that wrapped around would free a folio in use.
const MOST_REFS: i32 = i32::MAX / 2;

/// A reference on a folio in use, of device or of system memory. Dropping the last one of a device folio calls the
/// `folio_free` of its driver. Does not sleep.
///
/// # Examples
///
/// ```
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let mirror = device.mirror()?;
/// device.migrate(range)?;
/// let held = mirror.get_device_folio(range)?;
/// assert!(device.memory().index_of_pfn(held.pfn()).is_some());
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// We own a reference on the folio of `page`.
pub(crate) struct FolioRef {
    page: NonNull<bindings::page>,
}

// SAFETY: References on folios may be dropped on any thread.
unsafe impl Send for FolioRef {}

impl FolioRef {
    /// Takes a reference on the folio of `page`; `None` if the folio is about to be freed, or has 2^30 references
    /// already. Does not sleep.
    ///
    /// # Safety
    ///
    /// `page` must be a page in use, whose folio no task splits meanwhile.
    pub(in crate::mm) unsafe fn try_get(page: NonNull<bindings::page>) -> Option<Self> {
        // SAFETY: The page is in use, and its folio whole, by the contract of this function.
        let refs = unsafe { struct_page::refs(struct_page::head(page.as_ptr())) };
        // Tasks that look at the same time are too few to exceed the limit by much.
        if refs > MOST_REFS {
            return None;
        }
        // SAFETY: The page is in use, and its folio whole, by the contract of this function.
        let got = unsafe { bindings::zdm_folio_try_get(page.as_ptr()) };
        // INVARIANT: Taken above.
        got.then(|| Self { page })
    }

    /// Page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The page is valid by the type invariants of `FolioRef`.
        unsafe { bindings::zdm_page_to_pfn(self.page.as_ptr()) }
    }

    /// Flips a bit of the page's data. Only for fault injection. May sleep.
    ///
    /// # Errors
    ///
    /// `EDEADLK` where the current task may have locked the folio, as it has a migration; `EINTR` on a fatal
    /// signal; `EFAULT` for a page whose contents the kernel does not reach: they are lost, or in the device's own memory.
    pub(crate) fn flip_bit(&self) -> Result {
        check_may_fault()?;
        let page = self.page.as_ptr();
        // A migrating task locks the page while it copies it.
        // SAFETY: The page is valid by the type invariants of `FolioRef`.
        to_result(unsafe { bindings::zdm_folio_lock_killable(page) })?;
        // SAFETY: The page is valid by the type invariants of `FolioRef`, and locked, so that no task
        // splits its folio.
        let data = NonNull::new(unsafe { contents(page) });
        // SAFETY: The memory that holds the contents lives as long as the page.
        let data = data.filter(|data| unsafe { bindings::zdm_page_is_reachable(data.as_ptr()) });
        if let Some(data) = data {
            // SAFETY: The kernel reaches the memory, which lives as long as the page.
            unsafe { bindings::zdm_flip_bit(data.as_ptr()) };
        }
        // SAFETY: The current task locked the folio above.
        unsafe { bindings::zdm_folio_unlock(page) };
        data.map(|_| ()).ok_or(EFAULT)
    }

    /// Marks the page that holds the contents as broken, or as whole again. Only for KUnit cases.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn set_poisoned(&self, poisoned: bool) {
        // SAFETY: The page is valid by the type invariants of `FolioRef`, and of a KUnit case, which alone
        // splits its folio. `contents()` is NULL or a valid page, which the helper tells apart.
        unsafe { bindings::zdm_kunit_set_poisoned(contents(self.page.as_ptr()), poisoned) };
    }
}

impl Drop for FolioRef {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants of `FolioRef`.
        unsafe { bindings::zdm_folio_put(self.page.as_ptr()) };
    }
}

/// Why [`DevPagemap::folio_init`](crate::mm::pagemap::dev_pagemap::DevPagemap::folio_init) refused.
///
/// # Examples
///
/// ```
/// use kernel::mm::page::{backing::Backing, device_folio::FolioInitCause};
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
///
/// let block = device.take().ok_or(ENOSPC)?;
/// let refused = device.memory().folio_init(block, Backing::none(0)?);
/// match refused.map_err(|err| (err.cause, err.folio)) {
///     Err((FolioInitCause::Mismatch, folio)) => device.put(folio),
///     _ => return Err(EINVAL),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FolioInitCause {
    /// The page with this index is free, but has a reference or a mapping, is locked, or has
    /// `PG_anon_exclusive`.
    NotFree(usize),
    /// Folio and backing are of different orders, or for other memory than the pagemap's, or the
    /// order is above [`MemoryType::max_order`](crate::mm::region::memory_type::MemoryType::max_order).
    Mismatch,
    /// The module is on its way out, and nothing may call into it later.
    Unloading,
}

/// What [`DevPagemap::folio_init`](crate::mm::pagemap::dev_pagemap::DevPagemap::folio_init) refused, and why.
///
/// # Examples
///
/// ```
/// use kernel::mm::page::backing::Backing;
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
///
/// let block = device.take().ok_or(ENOSPC)?;
/// let order = block.order();
/// // The backing is for another order.
/// let refused = device.memory().folio_init(block, Backing::alloc(0)?);
/// let err = refused.err().ok_or(EINVAL)?;
/// assert_eq!((err.folio.order(), err.backing.order()), (order, 0));
/// device.put(err.folio);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct FolioInitError {
    /// Why it refused.
    pub(crate) cause: FolioInitCause,
    /// The folio that was to be allocated.
    pub(crate) folio: FreeFolio,
    /// The backing that was to be used.
    pub(crate) backing: Backing,
}

impl FolioInitError {
    pub(in crate::mm) fn new(cause: FolioInitCause, folio: FreeFolio, backing: Backing) -> Self {
        Self {
            cause,
            folio,
            backing,
        }
    }
}

/// A folio in `folio_free`: no reference is left, and its backing is gone.
///
/// # Examples
///
/// ```
/// use kernel::mm::{page::device_folio::FreedFolio, pagemap::ops::PagemapOps};
/// # use kernel::mm::region::free_stack::FreeStack;
///
/// struct Pages(FreeStack);
///
/// impl PagemapOps for Pages {
///     fn folio_free(&self, folio: FreedFolio<'_>) {
///         let index = folio.index();
///         match folio.into_free() {
///             Some(free) => drop(self.0.push(free)),
///             None => pr_warn!("page {} was freed twice\n", index),
///         }
///     }
/// }
/// # use kernel::mm::region::frames::Frames;
/// # let pages = Pages(FreeStack::new(Frames::for_test(512))?);
/// # assert!(pages.0.is_empty());
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `page` is the first of `1 << order` pages of one pagemap, and has number `index` there.
#[must_use = "the pages of a folio that is not taken out are never allocated again"]
pub(crate) struct FreedFolio<'a> {
    page: PageView<'a>,
    clean: bool,
    index: usize,
    order: u32,
    free: Option<FreeFolio>,
}

impl<'a> FreedFolio<'a> {
    /// The folio of `order` that begins with `page`, which has number `index` in its pagemap.
    /// `clean` is what [`FreedFolio::is_clean_small`] says, `free` the value that goes back to the owner.
    ///
    /// # Safety
    ///
    /// There must be `1 << order` pages of one pagemap from `page` on.
    pub(in crate::mm) unsafe fn new(
        page: PageView<'a>,
        clean: bool,
        index: usize,
        order: u32,
        free: Option<FreeFolio>,
    ) -> Self {
        // INVARIANT: The contract of this function says the same.
        Self {
            page,
            clean,
            index,
            order,
            free,
        }
    }

    /// The folio as a value, of the order that it was allocated with. `None` when it was not in use, so
    /// that this is a second free.
    pub(crate) fn into_free(self) -> Option<FreeFolio> {
        self.free
    }

    /// The head page.
    pub(crate) fn page(&self) -> PageView<'a> {
        self.page
    }

    /// Whether one look at the head page, when `folio_free` began, has found a small folio with nothing that
    /// a free page must not have. Otherwise a closer look tells more.
    pub(crate) fn is_clean_small(&self) -> bool {
        self.clean
    }

    /// Whether the other pages are tails with nothing that a free page must not have.
    pub(crate) fn has_clean_tails(&self) -> bool {
        // SAFETY: There are so many pages by the type invariants of `FreedFolio`.
        self.order == 0 || unsafe { struct_page::has_clean_tails(self.page.as_ptr(), self.order) }
    }

    /// The other pages, in ascending order, with their index in the pagemap. None for a folio of order 0.
    pub(crate) fn tails(&self) -> impl Iterator<Item = (usize, PageView<'a>)> {
        let (page, index) = (self.page, self.index);
        (1..1 << self.order).filter_map(move |i| {
            // SAFETY: There are so many pages, of one pagemap, by the type invariants of `FreedFolio`.
            Some((index + i, unsafe { page.sibling(i) }?))
        })
    }

    /// Index of the head page in its pagemap.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// The order in which the folio was allocated or that a split left it with; `None` when it
    /// was not in use, so that this is a second free.
    pub(crate) fn allocated_order(&self) -> Option<u32> {
        self.free.as_ref().map(FreeFolio::order)
    }
}

#[kunit_tests(zdmirror_device_folio)]
mod tests {
    use super::*;
    use crate::mm::kunit::{
        device::EmulatedDevice,
        support::anon_range, //
    };
    use kernel::sync::atomic::{
        Atomic,
        Relaxed, //
    };

    #[test]
    fn references_do_not_wrap_around() -> Result {
        let device = EmulatedDevice::new()?;
        let range = anon_range(1)?;
        let mirror = device.mirror()?;
        device.migrate(range)?;
        let held = mirror.get_device_folio(range)?;
        // SAFETY: The page is valid by the type invariants of `FolioRef`, and every access to its count is atomic.
        let refs = unsafe { Atomic::from_ptr(&raw mut (*held.page.as_ptr())._refcount.counter) };
        // As if so many had been forgotten.
        refs.fetch_add(MOST_REFS, Relaxed);
        let more = mirror.get_device_folio(range).err();
        refs.fetch_sub(MOST_REFS, Relaxed);
        assert_eq!(more, Some(ENOENT));
        drop(held);
        assert!(mirror.get_device_folio(range).is_ok());
        Ok(())
    }
}
