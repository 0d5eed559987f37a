// SPDX-License-Identifier: GPL-2.0

//! Moving pages between system and device memory.
//!
//! The protocol of [`include/linux/migrate.h`](srctree/include/linux/migrate.h) as types: a
//! [`Migration`] in state [`Setup`] holds the source pages locked and unmapped, takes
//! destinations, and becomes [`Copied`] once core mm has moved what it could. Each state can be
//! left in one way only, and dropping one on the way puts every page back where it was.

use super::{
    device_folio::LockedDeviceFolio,
    pagemap::{
        DevPagemap,
        PagemapOps,
        PgmapOwner, //
    },
    system_folio::SystemFolio, //
    PAGE_SHIFT,
    PAGE_SIZE,
};
use crate::bindings;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    mm::virt::VmaRef,
    prelude::*, //
};

/// Most pages that one migration takes: what one page of page table entries maps.
pub(crate) const MAX_PAGES: usize = 512;

/// Source and destination entries for migrations of up to [`MAX_PAGES`] pages, to be reused.
pub(crate) struct PfnBuffer {
    src: KVVec<usize>,
    dst: KVVec<usize>,
}

impl PfnBuffer {
    /// Allocates room for `pages` pages, at most [`MAX_PAGES`]. May sleep.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let pages = pages.clamp(1, MAX_PAGES);
        Ok(Self {
            src: KVVec::from_elem(0, pages, GFP_KERNEL)?,
            dst: KVVec::from_elem(0, pages, GFP_KERNEL)?,
        })
    }

    /// Pages that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.src.len()
    }
}

/// Which pages of a range a migration takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Select {
    /// Pages in system memory, and places where no page is yet.
    System,
    /// PRIVATE pages of the given owner.
    DevicePrivate,
}

impl Select {
    fn flags(self) -> usize {
        match self {
            Self::System => bindings::MIGRATE_VMA_SELECT_SYSTEM,
            Self::DevicePrivate => bindings::MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
        }
    }
}

/// Source pages are locked and unmapped; destinations may be set.
pub(crate) struct Setup(());
/// Core mm has moved what it could; the page tables still hold migration entries.
pub(crate) struct Copied(());

/// A migration of up to [`MAX_PAGES`] pages, of a range of an area or of a list of device pages.
///
/// # Invariants
///
/// - `args.src` and `args.dst` hold at least `len` entries, borrowed for `'a`.
/// - The entries are those of a migration that core mm has set up and not finalized; each valid
///   destination entry owns the lock and a reference of its page.
/// - `vma` says whether `args` is used as a whole (by `migrate_vma_*()`) or only its arrays (by
///   `migrate_device_*()`).
#[must_use = "dropping a migration puts the pages back"]
pub(crate) struct Migration<'a, State> {
    args: bindings::migrate_vma,
    len: usize,
    vma: bool,
    finalized: bool,
    _p: PhantomData<(&'a mut PfnBuffer, State)>,
}

impl<'a> Migration<'a, Setup> {
    /// Takes the pages of `start..end` of `vma`, which the caller has read-locked.
    ///
    /// Wraps `migrate_vma_setup()`: invalidates interval notifiers of the range, locks and unmaps
    /// the pages that `select` names. `owner` is whose device pages are taken, and is told to
    /// notifiers. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a range that is not within `vma` or larger than `buffer`, and for areas that
    /// cannot be migrated (hugetlb, DAX, `VM_SPECIAL`).
    pub(crate) fn of_range(
        buffer: &'a mut PfnBuffer,
        vma: &'a VmaRef,
        start: usize,
        end: usize,
        select: Select,
        owner: &PgmapOwner,
    ) -> Result<Self> {
        Self::setup(
            buffer,
            vma,
            start,
            end,
            select,
            owner,
            core::ptr::null_mut(),
        )
    }

    /// As [`Migration::of_range`], for a fault on `fault_page`, which the faulting task has locked.
    ///
    /// # Safety
    ///
    /// `fault_page` must be NULL or the locked page of a fault in `vma` that is being handled.
    pub(super) unsafe fn of_fault(
        buffer: &'a mut PfnBuffer,
        vma: &'a VmaRef,
        start: usize,
        end: usize,
        owner: &PgmapOwner,
        fault_page: *mut bindings::page,
    ) -> Result<Self> {
        Self::setup(
            buffer,
            vma,
            start,
            end,
            Select::DevicePrivate,
            owner,
            fault_page,
        )
    }

    fn setup(
        buffer: &'a mut PfnBuffer,
        vma: &VmaRef,
        start: usize,
        end: usize,
        select: Select,
        owner: &PgmapOwner,
        fault_page: *mut bindings::page,
    ) -> Result<Self> {
        let len = end.checked_sub(start).ok_or(EINVAL)? >> PAGE_SHIFT;
        if len > buffer.capacity() {
            return Err(EINVAL);
        }
        buffer.dst[..len].fill(0);
        let mut args = bindings::migrate_vma {
            vma: vma.as_ptr(),
            dst: buffer.dst.as_mut_ptr(),
            src: buffer.src.as_mut_ptr(),
            cpages: 0,
            npages: 0,
            start,
            end,
            pgmap_owner: owner.as_ptr(),
            flags: select.flags(),
            fault_page,
        };
        // SAFETY: The area is valid and read-locked, the arrays are large enough.
        to_result(unsafe { bindings::migrate_vma_setup(&mut args) })?;
        // INVARIANT: Set up above; no destination is set.
        Ok(Self {
            args,
            len,
            vma: true,
            finalized: false,
            _p: PhantomData,
        })
    }

    /// Takes the device pages whose page frame numbers the first `len` entries of `buffer` are,
    /// wherever they are mapped; those that are free are passed over.
    ///
    /// Wraps `migrate_device_pfns()`. May sleep; not to be called with the mmap lock held.
    pub(crate) fn of_device_pages(buffer: &'a mut PfnBuffer, pfns: &DevicePfns<'_>) -> Self {
        let len = pfns.0.len().min(buffer.capacity());
        buffer.src[..len].copy_from_slice(&pfns.0[..len]);
        buffer.dst[..len].fill(0);
        let args = bindings::migrate_vma {
            vma: core::ptr::null_mut(),
            dst: buffer.dst.as_mut_ptr(),
            src: buffer.src.as_mut_ptr(),
            cpages: 0,
            npages: len,
            start: 0,
            end: 0,
            pgmap_owner: core::ptr::null_mut(),
            flags: 0,
            fault_page: core::ptr::null_mut(),
        };
        // SAFETY: The entries are pfns of a registered pagemap by the invariants of `DevicePfns`.
        // The function always returns 0.
        unsafe { bindings::migrate_device_pfns(args.src, len) };
        // INVARIANT: Set up above; no destination is set.
        Self {
            args,
            len,
            vma: false,
            finalized: false,
            _p: PhantomData,
        }
    }

    /// Makes `folio` the destination of source page `i`, with the source's write permission.
    pub(crate) fn set_device_destination(&mut self, i: usize, folio: LockedDeviceFolio) {
        if self.is_selected(i) {
            self.set_destination(i, folio.into_raw());
        }
    }

    /// Makes `folio` the destination of source page `i`, with the source's write permission.
    pub(crate) fn set_system_destination(&mut self, i: usize, folio: SystemFolio) {
        if self.is_selected(i) {
            let page = folio.into_raw();
            // SAFETY: The page is new and nobody else's, so the lock is free.
            unsafe { bindings::zdm_folio_lock(page) };
            self.set_destination(i, page);
        }
    }

    /// `page` must be locked and referenced, both of which we become the owner of.
    fn set_destination(&mut self, i: usize, page: *mut bindings::page) {
        self.drop_destination(i);
        // SAFETY: The caller gives a valid page.
        let pfn = unsafe { bindings::zdm_page_to_pfn(page) };
        let write = self.src(i) & bindings::MIGRATE_PFN_WRITE;
        let entry = (pfn << bindings::MIGRATE_PFN_SHIFT) | bindings::MIGRATE_PFN_VALID | write;
        self.set_dst(i, entry);
    }

    /// Copies source page `i` to `folio`, zeroes where there is no page yet.
    pub(crate) fn copy_source(&self, i: usize, folio: &mut SystemFolio) {
        match self.source_contents(i) {
            // SAFETY: The source is locked and unmapped, so its contents are stable.
            Some(from) => unsafe { folio.copy_from(from.as_ptr()) },
            None => folio.clear(),
        }
    }

    /// The page that holds the contents of source page `i`.
    fn source_contents(&self, i: usize) -> Option<NonNull<bindings::page>> {
        let page = page_of(self.src(i))?.as_ptr();
        // SAFETY: Source pages are valid during a migration.
        let contents = unsafe { contents(page) };
        NonNull::new(contents)
    }

    /// Moves what can be moved. Wraps `migrate_vma_pages()` and `migrate_device_pages()`; may
    /// sleep.
    pub(crate) fn copied(mut self) -> Migration<'a, Copied> {
        if self.vma {
            // SAFETY: Set up by the type invariants.
            unsafe { bindings::migrate_vma_pages(&mut self.args) };
        } else {
            // SAFETY: As above; the arrays have `len` entries.
            unsafe { bindings::migrate_device_pages(self.args.src, self.args.dst, self.len) };
        }
        let next = Migration {
            args: self.args,
            len: self.len,
            vma: self.vma,
            finalized: false,
            _p: PhantomData,
        };
        // The duty to finalize went to `next`.
        self.finalized = true;
        next
    }

    fn drop_destination(&mut self, i: usize) {
        if let Some(page) = page_of(self.dst(i)) {
            self.set_dst(i, 0);
            // SAFETY: We own the lock by the type invariants.
            unsafe { bindings::zdm_folio_unlock(page.as_ptr()) };
            // SAFETY: We own a reference by the type invariants.
            unsafe { bindings::zdm_folio_put(page.as_ptr()) };
        }
    }
}

impl Migration<'_, Copied> {
    /// Whether page `i` has moved.
    pub(crate) fn has_moved(&self, i: usize) -> bool {
        self.is_selected(i) && page_of(self.dst(i)).is_some()
    }

    /// Number of pages that have moved.
    pub(crate) fn moved(&self) -> usize {
        (0..self.len).filter(|&i| self.has_moved(i)).count()
    }

    /// Restores the page tables and drops what is no longer needed. Wraps
    /// `migrate_vma_finalize()` and `migrate_device_finalize()`; may sleep.
    pub(crate) fn finalize(self) {
        // Done by drop, which is the same on every way out.
    }
}

impl<State> Migration<'_, State> {
    /// Number of pages of the range, selected or not.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether core mm will move (or has moved) page `i`.
    pub(crate) fn is_selected(&self, i: usize) -> bool {
        i < self.len && self.src(i) & bindings::MIGRATE_PFN_MIGRATE != 0
    }

    fn src(&self, i: usize) -> usize {
        assert_index(i, self.len);
        // SAFETY: `i` is below `len`.
        unsafe { *self.args.src.add(i) }
    }

    fn dst(&self, i: usize) -> usize {
        assert_index(i, self.len);
        // SAFETY: `i` is below `len`.
        unsafe { *self.args.dst.add(i) }
    }

    fn set_dst(&mut self, i: usize, entry: usize) {
        assert_index(i, self.len);
        // SAFETY: `i` is below `len`.
        unsafe { *self.args.dst.add(i) = entry };
    }
}

impl<State> Drop for Migration<'_, State> {
    fn drop(&mut self) {
        if self.finalized {
            return;
        }
        if self.vma {
            // SAFETY: Not finalized yet by the type invariants.
            unsafe { bindings::migrate_vma_finalize(&mut self.args) };
        } else {
            // SAFETY: As above; the arrays have `len` entries.
            unsafe { bindings::migrate_device_finalize(self.args.src, self.args.dst, self.len) };
        }
    }
}

/// Page frame numbers of pages of one registered pagemap.
///
/// # Invariants
///
/// Every entry is the number of a page of a pagemap that stays registered for `'a`.
pub(crate) struct DevicePfns<'a>(&'a [usize]);

impl<'a> DevicePfns<'a> {
    /// `None` unless all of `pfns` are pages of `map`.
    pub(crate) fn new<T: PagemapOps>(map: &'a DevPagemap<T>, pfns: &'a [usize]) -> Option<Self> {
        let range = map.first_pfn()..map.first_pfn() + map.pages();
        // INVARIANT: Checked here; `map` stays registered while it is borrowed.
        pfns.iter()
            .all(|pfn| range.contains(pfn))
            .then_some(Self(pfns))
    }
}

/// An index beyond the entries would be a bug of this module, met by an oops of this task only.
fn assert_index(i: usize, len: usize) {
    // PANIC: All callers take `i` from `0..len` or check it first.
    assert!(i < len);
}

fn page_of(entry: usize) -> Option<NonNull<bindings::page>> {
    if entry & bindings::MIGRATE_PFN_VALID == 0 {
        return None;
    }
    // SAFETY: Valid entries hold the number of a page with a struct page.
    NonNull::new(unsafe { bindings::zdm_pfn_to_page(entry >> bindings::MIGRATE_PFN_SHIFT) })
}

/// The page that the CPU finds the contents of `page` in: the backing of a PRIVATE page, or
/// `page` itself. NULL when a PRIVATE page has no backing, that is when it is not in use.
///
/// # Safety
///
/// `page` must be a page in use that nobody frees meanwhile and, where it is PRIVATE, one of a
/// [`DevPagemap`](super::pagemap::DevPagemap).
pub(super) unsafe fn contents(page: *mut bindings::page) -> *mut bindings::page {
    // SAFETY: By the caller's contract.
    if unsafe { bindings::zdm_is_device_private_page(page) } {
        // SAFETY: As above.
        unsafe { bindings::zdm_zone_device_data(page) }.cast()
    } else {
        page
    }
}

/// Length in bytes of `pages` pages.
pub(crate) const fn bytes(pages: usize) -> usize {
    pages * PAGE_SIZE
}
