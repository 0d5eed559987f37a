// SPDX-License-Identifier: GPL-2.0

//! Moving pages between system and device memory.
//!
//! The protocol of [`include/linux/migrate.h`](srctree/include/linux/migrate.h) as types: a
//! [`Migration`] in state [`Setup`] holds the source folios locked and unmapped, takes
//! destinations with their contents, and becomes [`Copied`] once core mm has moved what it could.
//! Each state can be left in one way only, and dropping one on the way puts every page back where
//! it was.
//!
//! A source folio is one entry, that of its first page. It may be moved in one piece, or page by
//! page, in which case core mm splits it.

use super::{
    backing::contents,
    device_folio::{
        FolioRef,
        LockedDeviceFolio, //
    },
    memory_type::MemoryType,
    page::PageView,
    pagemap::{
        DevPagemap,
        PagemapOps,
        PgmapOwner, //
    },
    system_folio::SystemFolio, //
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_ORDER,
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

pub(crate) use super::pfn_buffer::PfnBuffer;

/// Most pages that one migration takes: what one page of page table entries maps, and what one
/// large folio has.
pub(crate) const MAX_PAGES: usize = 1 << PMD_ORDER;

/// Which pages of a range a migration takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Select {
    /// Pages in system memory, and holes: addresses that no page was ever mapped at.
    System,
    /// Pages of the given owner in device memory of this type.
    Device(MemoryType),
}

impl Select {
    /// Flags that `migrate_vma_setup()` takes for it, 0 where the kernel cannot select such pages.
    pub(super) fn flags(self) -> usize {
        match self {
            Self::System => bindings::MIGRATE_VMA_SELECT_SYSTEM,
            Self::Device(MemoryType::Private) => bindings::MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
            Self::Device(MemoryType::Coherent) => bindings::MIGRATE_VMA_SELECT_DEVICE_COHERENT,
            // SAFETY: Always safe.
            Self::Device(MemoryType::Generic) => unsafe { bindings::zdm_migrate_select_generic() },
        }
    }
}

/// A range of an area, and what of it is to be migrated.
pub(crate) struct Request<'a> {
    /// The area, read-locked.
    pub(crate) vma: &'a VmaRef,
    /// First address, in bytes.
    pub(crate) start: usize,
    /// End address, in bytes, exclusive.
    pub(crate) end: usize,
    /// What is taken.
    pub(crate) select: Select,
    /// Whether large folios are taken in one piece; otherwise core mm splits them first.
    pub(crate) large: bool,
    /// Whose device pages are taken; told to notifiers.
    pub(crate) owner: &'a PgmapOwner,
}

/// Where a [`Migration`] is.
pub(crate) trait Stage {
    /// Whether core mm has been told to move the pages.
    const MOVED: bool;
}

/// Source folios are locked and unmapped; destinations may be set.
pub(crate) struct Setup(());
/// Core mm has moved what it could; the page tables still hold migration entries.
pub(crate) struct Copied(());
/// It is over; the entries are good for a look back.
pub(crate) struct Finalized(());

impl Stage for Setup {
    const MOVED: bool = false;
}

impl Stage for Copied {
    const MOVED: bool = true;
}

impl Stage for Finalized {
    const MOVED: bool = true;
}

/// A migration of up to [`MAX_PAGES`] pages, of a range of an area or of a list of device pages.
///
/// # Invariants
///
/// - `args.src` and `args.dst` hold at least `len` entries, borrowed for `'a`.
/// - The entries are those of a migration that core mm has set up and not finalized; each valid
///   destination entry owns the lock and a reference of its folio.
/// - `vma` says whether `args` is used as a whole (by `migrate_vma_*()`) or only its arrays (by
///   `migrate_device_*()`).
/// - No hole has a destination unless `holes` is set.
#[must_use = "dropping a migration puts the pages back"]
pub(crate) struct Migration<'a, S: Stage> {
    args: bindings::migrate_vma,
    len: usize,
    vma: bool,
    holes: bool,
    finalized: bool,
    _p: PhantomData<(&'a mut PfnBuffer, S)>,
}

impl<'a> Migration<'a, Setup> {
    /// Takes the pages that `request` names.
    ///
    /// Wraps `migrate_vma_setup()`: invalidates interval notifiers of the range, locks and unmaps
    /// the pages. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a range that is not within the area or larger than `buffer`, and for areas
    /// that cannot be migrated (hugetlb, DAX, `VM_SPECIAL`).
    pub(crate) fn of_range(buffer: &'a mut PfnBuffer, request: &Request<'_>) -> Result<Self> {
        Self::setup(buffer, request, core::ptr::null_mut())
    }

    /// As [`Migration::of_range`], for a fault on `fault_page`, which the faulting task has locked.
    ///
    /// # Safety
    ///
    /// `fault_page` must be NULL or the locked page of a fault in the area that is being handled.
    pub(super) unsafe fn of_fault(
        buffer: &'a mut PfnBuffer,
        request: &Request<'_>,
        fault_page: *mut bindings::page,
    ) -> Result<Self> {
        Self::setup(buffer, request, fault_page)
    }

    fn setup(
        buffer: &'a mut PfnBuffer,
        request: &Request<'_>,
        fault_page: *mut bindings::page,
    ) -> Result<Self> {
        let len = request.end.checked_sub(request.start).ok_or(EINVAL)? >> PAGE_SHIFT;
        if len > buffer.capacity() {
            return Err(EINVAL);
        }
        let (src, dst) = buffer.halves(len);
        let compound = if request.large {
            bindings::MIGRATE_VMA_SELECT_COMPOUND
        } else {
            0
        };
        let mut args = bindings::migrate_vma {
            vma: request.vma.as_ptr(),
            dst: dst.as_mut_ptr(),
            src: src.as_mut_ptr(),
            cpages: 0,
            npages: 0,
            start: request.start,
            end: request.end,
            pgmap_owner: request.owner.as_ptr(),
            flags: request.select.flags() | compound,
            fault_page,
        };
        // SAFETY: The area is valid and read-locked, the arrays are large enough.
        to_result(unsafe { bindings::migrate_vma_setup(&mut args) })?;
        // INVARIANT: Set up above; no destination is set.
        Ok(Self {
            args,
            len,
            vma: true,
            holes: request.select == Select::System,
            finalized: false,
            _p: PhantomData,
        })
    }

    /// Takes the device pages of `pfns`, at most as many as `buffer` has room for, wherever they
    /// are mapped; those that are free are passed over. A large folio must be listed page by page.
    ///
    /// Wraps `migrate_device_pfns()`. May sleep; not to be called with the mmap lock held.
    pub(crate) fn of_device_pages(buffer: &'a mut PfnBuffer, pfns: &DevicePfns<'_>) -> Self {
        let len = pfns.0.len().min(buffer.capacity());
        let (src, dst) = buffer.halves(len);
        src[..len].copy_from_slice(&pfns.0[..len]);
        let args = bindings::migrate_vma {
            vma: core::ptr::null_mut(),
            dst: dst.as_mut_ptr(),
            src: src.as_mut_ptr(),
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
            holes: false,
            finalized: false,
            _p: PhantomData,
        }
    }

    /// Order of the source that starts at entry `i`; `None` where there is none to be moved.
    ///
    /// Core mm selects the holes of a range whatever else it is asked to select. A hole is a source
    /// on the way to the device only, where the first access may as well be the device's. On the way
    /// back a destination would populate memory that nobody has touched.
    pub(crate) fn source(&self, i: usize) -> Option<u32> {
        if !self.is_selected(i) || self.is_moving(i) || !self.holes && !is_valid(self.src(i)) {
            None
        } else if self.src(i) & bindings::MIGRATE_PFN_COMPOUND != 0 {
            Some(PMD_ORDER)
        } else {
            Some(0)
        }
    }

    /// Whether somebody else has moved the contents of the source at `i` away, with its charge, and
    /// has yet to drop the last reference. A list of device pages may name such a page; core mm would
    /// move it once more, and warn that nobody is charged for it.
    fn is_moving(&self, i: usize) -> bool {
        !self.vma
            && page_of(self.src(i)).is_some_and(|page| {
                // SAFETY: The source is locked and referenced.
                unsafe { bindings::zdm_folio_is_uncharged(page.as_ptr()) }
            })
    }

    /// Pages of all sources.
    pub(crate) fn selected(&self) -> usize {
        (0..self.len)
            .filter_map(|i| self.source(i))
            .map(|order| 1 << order)
            .sum()
    }

    /// Makes `folio` the destination of page `part` of the source at entry `i`, with the contents
    /// and the write permission of the source. A folio of the source's order takes all of it
    /// (`part` is 0 then).
    pub(crate) fn copy_to_device(&mut self, i: usize, part: usize, folio: LockedDeviceFolio) {
        let order = folio.order();
        if self.accepts(i, part, order) {
            let page = folio.into_raw();
            // SAFETY: The folio is locked and in use, nobody splits it.
            let memory = unsafe { contents(page) };
            self.copy_to(i, part, page, memory, order);
        }
    }

    /// As [`Migration::copy_to_device`], in the other direction.
    pub(crate) fn copy_to_system(&mut self, i: usize, part: usize, folio: SystemFolio) {
        let order = folio.order();
        if self.accepts(i, part, order) {
            let page = folio.into_raw();
            // SAFETY: The folio is new and nobody else's, so the lock is free.
            unsafe { bindings::zdm_folio_lock(page) };
            self.copy_to(i, part, page, page, order);
        }
    }

    /// Makes a large place without pages, at entry `i`, one of small places, so that each of them
    /// gets a destination of its own or none.
    pub(crate) fn split_hole(&mut self, i: usize) {
        if self.source(i) == Some(PMD_ORDER) && page_of(self.src(i)).is_none() {
            for entry in i..self.len.min(i + MAX_PAGES) {
                self.set_src(entry, bindings::MIGRATE_PFN_MIGRATE);
            }
        }
    }

    /// Whether the source at `i` has a page `part` that a folio of `order` could take.
    fn accepts(&self, i: usize, part: usize, order: u32) -> bool {
        self.source(i).is_some_and(|source| {
            let small = order == 0 && part < 1 << source;
            (small || order == source && part == 0) && i + part < self.len
        })
    }

    /// `page` must be the head of a folio of `order` that is locked and referenced, both of which
    /// we become the owner of, and that `accepts()` was asked about; its contents are those of
    /// `memory` and what follows it.
    fn copy_to(
        &mut self,
        i: usize,
        part: usize,
        page: *mut bindings::page,
        memory: *mut bindings::page,
        order: u32,
    ) {
        // SAFETY: The folio is locked and in use, nobody splits it.
        let from = page_of(self.src(i)).map(|source| unsafe { contents(source.as_ptr()) });
        let from = from.and_then(NonNull::new).map(NonNull::as_ptr);
        for n in 0..1 << order {
            // SAFETY: The destination has that many pages, and is ours.
            let to = unsafe { memory.add(n) };
            match from {
                // SAFETY: The source has at least `part` and `n` pages more, one of them 0. It is
                // locked and unmapped, so its contents are stable.
                Some(from) => unsafe { bindings::zdm_copy_highpage(to, from.add(part + n)) },
                // SAFETY: As for the destination above.
                None => unsafe { bindings::zdm_clear_highpage(to) },
            }
        }
        self.drop_destination(i + part);
        // SAFETY: The caller gives a valid page.
        let pfn = unsafe { bindings::zdm_page_to_pfn(page) };
        let mut entry = (pfn << bindings::MIGRATE_PFN_SHIFT) | bindings::MIGRATE_PFN_VALID;
        entry |= self.src(i) & bindings::MIGRATE_PFN_WRITE;
        if order > 0 {
            entry |= bindings::MIGRATE_PFN_COMPOUND;
        }
        self.set_dst(i + part, entry);
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
        self.next(false)
    }
}

/// A folio that core mm has moved the contents of, before the migration is finalized: both ends are
/// locked, and where they were mapped there are migration entries.
pub(crate) struct MovedFolio<'a> {
    /// Where the contents were; `None` for a place that had no page.
    pub(crate) source: Option<PageView<'a>>,
    /// References on the source that are the migration's, and the fault's that it is made for.
    pub(crate) source_refs: i32,
    /// Where they are now.
    pub(crate) destination: PageView<'a>,
}

/// What a migration has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Base pages that have moved.
    pub(crate) pages: usize,
    /// Folios that have moved, of any order.
    pub(crate) folios: usize,
    /// Large folios among them that have moved in one piece.
    pub(crate) large: usize,
}

impl<'a> Migration<'a, Copied> {
    /// What has moved.
    pub(crate) fn moved(&self) -> Moved {
        let mut moved = Moved::default();
        for (_, order) in self.moved_entries() {
            moved.pages += 1 << order;
            moved.folios += 1;
            moved.large += usize::from(order > 0);
        }
        moved
    }

    /// The folios that have moved.
    pub(crate) fn moved_folios(&self) -> impl Iterator<Item = MovedFolio<'_>> {
        self.moved_entries()
            .filter_map(|(i, _)| self.moved_folio(i))
    }

    /// Those of [`Migration::moved_folios`] that have, at one look, more or fewer references than the
    /// migration, the fault that it is made for, and mappings explain.
    pub(crate) fn suspects(&self) -> impl Iterator<Item = MovedFolio<'_>> {
        let mut next = 0;
        core::iter::from_fn(move || {
            // SAFETY: There are `len` entries of folios that are locked and referenced, and the
            // fault has a reference on its page.
            let i = unsafe {
                bindings::zdm_next_suspect(
                    self.args.src,
                    self.args.dst,
                    next,
                    self.len,
                    self.args.fault_page,
                )
            };
            next = i + 1;
            (i < self.len).then(|| self.moved_folio(i)).flatten()
        })
    }

    /// What entry `i` says of a folio that has moved.
    fn moved_folio(&self, i: usize) -> Option<MovedFolio<'_>> {
        // SAFETY: Both ends are locked and referenced until the migration is finalized.
        let view = |page| unsafe { PageView::from_raw(page) };
        let source = page_of(self.src(i)).map(view);
        Some(MovedFolio {
            source,
            source_refs: 1 + i32::from(source.is_some_and(|page| self.is_fault_folio(page))),
            destination: view(page_of(self.dst(i))?),
        })
    }

    /// Whether `page` is the first one of the folio that the fault is about which this is for.
    fn is_fault_folio(&self, page: PageView<'_>) -> bool {
        let fault = NonNull::new(self.args.fault_page).map(|fault| {
            // SAFETY: The fault has a reference on its page.
            unsafe { PageView::from_raw(fault) }.head()
        });
        fault.is_some_and(|head| head.as_ptr() == page.as_ptr())
    }

    /// Takes a reference on the first folio that has moved, where it is now or where it came from.
    /// Only for fault injection.
    pub(crate) fn hold_moved(&self, source: bool) -> Option<FolioRef> {
        let held = self
            .moved_folios()
            .filter_map(|folio| {
                if source {
                    folio.source
                } else {
                    Some(folio.destination)
                }
            })
            .find_map(|page| NonNull::new(page.as_ptr()))?;
        // SAFETY: The migration has a reference.
        let got = unsafe { bindings::zdm_folio_try_get(held.as_ptr()) };
        // SAFETY: Taken just now.
        got.then(|| unsafe { FolioRef::from_raw(held) })
    }

    /// Restores the page tables and drops what is no longer needed. Wraps
    /// `migrate_vma_finalize()` and `migrate_device_finalize()`; may sleep.
    pub(crate) fn finalize(mut self) -> Migration<'a, Finalized> {
        self.end();
        self.next(true)
    }
}

impl Migration<'_, Finalized> {
    /// Where what has moved is now: page frame number and order of each folio. It may have gone on
    /// since.
    pub(crate) fn destinations(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.moved_entries()
            .map(|(i, order)| (self.dst(i) >> bindings::MIGRATE_PFN_SHIFT, order))
    }
}

impl<'a, S: Stage> Migration<'a, S> {
    /// The same migration, in the stage that it has reached.
    fn next<T: Stage>(mut self, finalized: bool) -> Migration<'a, T> {
        let next = Migration {
            args: self.args,
            len: self.len,
            vma: self.vma,
            holes: self.holes,
            finalized,
            _p: PhantomData,
        };
        // What is left to be done is the duty of `next`.
        self.finalized = true;
        next
    }

    /// Lets core mm finish.
    fn end(&mut self) {
        if self.vma {
            // SAFETY: Not finalized yet, as the callers make sure.
            unsafe { bindings::migrate_vma_finalize(&mut self.args) };
        } else {
            // SAFETY: As above; the arrays have `len` entries.
            unsafe { bindings::migrate_device_finalize(self.args.src, self.args.dst, self.len) };
        }
    }

    /// Entries of what has moved, with the order of the destination.
    fn moved_entries(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        (0..self.len)
            .filter(|&i| self.is_selected(i) && is_valid(self.dst(i)))
            .map(|i| match self.dst(i) & bindings::MIGRATE_PFN_COMPOUND {
                0 => (i, 0),
                _ => (i, PMD_ORDER),
            })
    }

    /// Number of entries: pages of the range, selected or not.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether core mm will move (or has moved) what starts at entry `i`.
    fn is_selected(&self, i: usize) -> bool {
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

    fn set_src(&mut self, i: usize, entry: usize) {
        assert_index(i, self.len);
        // SAFETY: `i` is below `len`.
        unsafe { *self.args.src.add(i) = entry };
    }

    fn set_dst(&mut self, i: usize, entry: usize) {
        assert_index(i, self.len);
        // SAFETY: `i` is below `len`.
        unsafe { *self.args.dst.add(i) = entry };
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

impl<S: Stage> Drop for Migration<'_, S> {
    fn drop(&mut self) {
        if self.finalized {
            return;
        }
        if !S::MOVED {
            // Core mm would take a destination for one that the source was moved to.
            for i in 0..self.len {
                self.drop_destination(i);
            }
        }
        self.end();
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

/// Whether an entry has a page.
fn is_valid(entry: usize) -> bool {
    entry & bindings::MIGRATE_PFN_VALID != 0
}

fn page_of(entry: usize) -> Option<NonNull<bindings::page>> {
    if !is_valid(entry) {
        return None;
    }
    // SAFETY: Valid entries hold the number of a page with a struct page.
    NonNull::new(unsafe { bindings::zdm_pfn_to_page(entry >> bindings::MIGRATE_PFN_SHIFT) })
}

/// Length in bytes of `pages` pages.
pub(crate) const fn bytes(pages: usize) -> usize {
    pages * PAGE_SIZE
}
