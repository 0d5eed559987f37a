// SPDX-License-Identifier: GPL-2.0

//! Moving pages between system and device memory.
//!
//! The protocol of [`include/linux/migrate.h`](srctree/include/linux/migrate.h) as types: a
//! [`Migration`] in state [`Setup`] holds the source folios locked and unmapped, takes
//! destinations with their contents, and becomes [`Copied`] once core mm has moved the pages that it can move.
//! Each state can be left in one way only, and dropping one on the way puts every page back where
//! it was. The driver's [`DeviceMemory`] copies the contents.
//!
//! A source folio is one entry, that of its first page. It may be moved in one piece, or page by
//! page, in which case core mm splits it.

use super::{
    device_memory::DeviceMemory,
    pfn_buffer::{
        halves,
        Head,
        Progress, //
    }, //
};
use crate::{
    bindings,
    mm::{
        page::struct_page::MemMap,
        sync::task::check_may_fault,
        user::watches::WatchToken,
        PMD_ORDER, //
    },
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::prelude::*;

pub(crate) use super::{
    device_memory::CopyError,
    pfn_buffer::{
        bytes,
        PfnBuffer,
        MAX_PAGES, //
    },
    selection::{
        Area,
        DevicePfns,
        Request,
        Select, //
    },
    stage::{
        Copied,
        Finalized,
        Setup,
        Stage, //
    },
};

/// A migration of up to [`MAX_PAGES`] pages, of a range of an area or of a list of device pages.
///
/// The pages are locked until the migration is finalized or dropped. A task that waited for one of them would
/// wait for itself, so that page faults are disabled meanwhile: an access to user memory fails with `EFAULT`
/// where it would need one, and the functions here that fault pages in fail with `EDEADLK`.
///
/// A migration that is forgotten ([`core::mem::forget`]) ends when its [`PfnBuffer`] is used again or dropped. If
/// the buffer is forgotten, too, the pages stay locked, as a mutex does whose guard is forgotten, and tasks that use
/// them wait for ever. No memory is freed that is in use.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::migration::{Area, Migration, PfnBuffer, Request};
/// # use kernel::mm::kunit::{
/// #     device::{EmulatedDevice, EmulatedMemory},
/// #     support::{anon_range, touch},
/// # };
/// # let device = EmulatedDevice::new()?;
/// # let memory = EmulatedMemory;
/// # let range = anon_range(4)?;
/// # touch(range)?;
///
/// let task = current!();
/// let mm = task.mm().ok_or(EINVAL)?;
/// let mut buffer = PfnBuffer::new(range.pages())?;
/// let mmap = mm.mmap_read_lock();
/// let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// let request = Request::system(area, range, device.owner());
/// let mut migration = Migration::of_range(&mut buffer, &request, &memory)?;
/// for i in 0..migration.len() {
///     if let Some(order) = migration.source(i) {
///         // A source that cannot be copied stays where it is.
///         let _ = migration.copy_to_device(i, 0, device.alloc(order)?);
///     }
/// }
/// let migration = migration.copied()?;
/// let moved = migration.moved().pages;
/// drop(migration.finalize());
/// assert_eq!(device.memory().used(), moved);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - `head` is borrowed for `'a`. The `src` and `dst` of its `args` hold at least `len` entries, borrowed for `'a`,
///   too.
/// - Unless `finalized` is set, core mm has set up the migration and not finalized it: the sources are locked,
///   unmapped and referenced. Each valid destination entry owns the lock and a reference of its folio.
/// - `vma` says whether `args` is used as a whole (by `migrate_vma_*()`) or only its arrays (by
///   `migrate_device_*()`).
/// - The devices of the mappings in `head` are borrowed from `memory`.
/// - No hole has a destination unless `holes` is set, and no large hole has a small one.
/// - If `vma` is set the mmap lock of the area is held for `'a`.
#[must_use = "dropping a migration puts the pages back"]
pub(crate) struct Migration<'a, S: Stage, M: DeviceMemory> {
    head: NonNull<Head>,
    memmap: MemMap,
    pub(super) memory: &'a M,
    len: usize,
    pub(in crate::mm) vma: bool,
    pub(super) holes: bool,
    finalized: bool,
    /// The watch of the range that began before the migration.
    pub(in crate::mm) watch: Option<&'a WatchToken>,
    _p: PhantomData<(&'a mut PfnBuffer, Area<'a>, S)>,
}

impl<'a, M: DeviceMemory> Migration<'a, Setup, M> {
    /// Takes the pages that `request` names.
    ///
    /// Wraps `migrate_vma_setup()`: invalidates interval notifiers of the range, locks and unmaps
    /// the pages. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a range that is not within the area or larger than `buffer`, and for areas
    /// that cannot be migrated (hugetlb, DAX, `VM_SPECIAL`). `EDEADLK` while the current task has another
    /// migration, or handles a fault on device memory: some kernels wait for the lock of a large folio here.
    pub(crate) fn of_range(
        buffer: &'a mut PfnBuffer,
        request: &Request<'a>,
        memory: &'a M,
    ) -> Result<Self> {
        buffer.end_forgotten();
        check_may_fault()?;
        let (none, memmap) = (core::ptr::null_mut(), MemMap::get());
        // SAFETY: No fault is being handled, which NULL says.
        unsafe { Self::of_fault(buffer, request, memory, none, memmap) }
    }

    /// As [`Migration::of_range`], for a fault on `fault_page`, which the faulting task has locked.
    ///
    /// # Safety
    ///
    /// `fault_page` must be NULL or the locked page of a fault in the area that is being handled.
    #[inline(always)] // A call would return the large result through memory.
    pub(in crate::mm) unsafe fn of_fault(
        buffer: &'a mut PfnBuffer,
        request: &Request<'a>,
        memory: &'a M,
        fault_page: *mut bindings::page,
        memmap: MemMap,
    ) -> Result<Self> {
        let len = request.range.pages();
        if len > buffer.capacity() {
            return Err(EINVAL);
        }
        let (head, entries) = buffer.parts();
        let (src, dst) = halves(entries, len);
        let compound = if request.large {
            bindings::MIGRATE_VMA_SELECT_COMPOUND
        } else {
            0
        };
        let args = head.args.write(bindings::migrate_vma {
            vma: request.area.as_ptr(),
            dst: dst.as_mut_ptr(),
            src: src.as_mut_ptr(),
            cpages: 0,
            npages: 0,
            start: request.range.start(),
            end: request.range.end(),
            pgmap_owner: request.owner.as_ptr(),
            flags: request.select.flags() | compound,
            fault_page,
        });
        // SAFETY: The mmap lock is held by the invariants of `Area`. Both arrays have an entry for
        // each page, since the range is page aligned by the invariants of `PageRange`. The fault
        // page is as core mm wants it by the contract of this function.
        if unsafe { bindings::migrate_vma_setup(args) } != 0 {
            return Err(EINVAL); // It has no other error.
        }
        // SAFETY: Core mm has set up `args` and the entries above.
        unsafe { head.begin(!fault_page.is_null()) };
        // INVARIANT: Set up above; no destination is set.
        Ok(Self {
            head: NonNull::from(head),
            memmap,
            memory,
            len,
            vma: true,
            holes: request.select == Select::System,
            finalized: false,
            watch: request.watch,
            _p: PhantomData,
        })
    }

    /// Takes the device pages of `pfns`, at most as many as `buffer` has room for, wherever they
    /// are mapped. Pages that are free are skipped. A large folio moves only if each of its pages
    /// is listed, in order.
    ///
    /// Wraps `migrate_device_pfns()`. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` unless `buffer` has room for [`MAX_PAGES`] pages.
    pub(crate) fn of_device_pages(
        buffer: &'a mut PfnBuffer,
        pfns: &DevicePfns<'a>,
        memory: &'a M,
    ) -> Result<Self> {
        if buffer.capacity() < MAX_PAGES {
            return Err(EINVAL);
        }
        let len = pfns.as_slice().len().min(MAX_PAGES);
        let (head, entries) = buffer.parts();
        // Some kernels clear an entry for each page of a large folio, whether all are listed or not. The
        // entries of the destinations come next and are clear, too.
        entries[MAX_PAGES..MAX_PAGES + len].fill(0);
        entries[..len].copy_from_slice(&pfns.as_slice()[..len]);
        let src = entries.as_mut_ptr();
        let dst = src.wrapping_add(MAX_PAGES);
        let args = head.args.write(bindings::migrate_vma {
            vma: core::ptr::null_mut(),
            dst,
            src,
            cpages: 0,
            npages: len,
            start: 0,
            end: 0,
            pgmap_owner: core::ptr::null_mut(),
            flags: 0,
            fault_page: core::ptr::null_mut(),
        });
        // SAFETY: The entries are pfns of a pagemap that stays registered for `'a` by the invariants of
        // `DevicePfns`. There is room for `MAX_PAGES` entries after the last one. The function always
        // returns 0.
        unsafe { bindings::migrate_device_pfns(args.src, len) };
        // SAFETY: Core mm has set up the entries above, and `args` tells where they are, and how many.
        unsafe { head.begin(false) };
        // INVARIANT: Set up above; no destination is set.
        Ok(Self {
            head: NonNull::from(head),
            memmap: MemMap::get(),
            memory,
            len,
            vma: false,
            holes: false,
            finalized: false,
            watch: None,
            _p: PhantomData,
        })
    }

    /// Order of the source that starts at entry `i`; `None` where there is none to be moved.
    ///
    /// Core mm selects the holes of a range whatever else it is asked to select. A hole is a source
    /// on the way to the device only, where the first access may as well be the device's. On the way
    /// back a destination would populate memory that no task has touched.
    #[inline]
    pub(crate) fn source(&self, i: usize) -> Option<u32> {
        self.source_of(*self.sources().get(i)?)
    }

    /// As [`Migration::source`], of an entry.
    #[inline]
    fn source_of(&self, entry: usize) -> Option<u32> {
        let is_hole = !is_valid(entry);
        if entry & bindings::MIGRATE_PFN_MIGRATE == 0
            || is_hole && !self.holes
            || !self.vma && self.is_moving(entry)
        {
            None
        } else if entry & bindings::MIGRATE_PFN_COMPOUND == 0 {
            Some(0)
        } else {
            Some(self.large_order(entry))
        }
    }

    /// Order of the large source that `entry` is.
    #[cold]
    fn large_order(&self, entry: usize) -> u32 {
        // A large hole has the size of a PMD. A folio may have any order.
        self.page_of(entry).map_or(PMD_ORDER, |page| {
            // SAFETY: The source is locked and referenced by the type invariants of `Migration`.
            unsafe { bindings::zdm_folio_order(page.as_ptr()) }
        })
    }

    /// Page frame number of the source that starts at entry `i`; `None` for a hole.
    pub(crate) fn source_pfn(&self, i: usize) -> Option<usize> {
        (i < self.len && !self.is_hole(i)).then(|| self.src(i) >> bindings::MIGRATE_PFN_SHIFT)
    }

    /// Whether another task has moved the contents of the source `entry` away, with its charge, and has not
    /// dropped the last reference yet. A list of device pages may name such a page. Core mm would move it once
    /// more, and warn that no cgroup is charged for it.
    fn is_moving(&self, entry: usize) -> bool {
        self.page_of(entry).is_some_and(|page| {
            // SAFETY: The source is locked and referenced by the type invariants of `Migration`.
            unsafe { bindings::zdm_folio_is_uncharged(page.as_ptr()) }
        })
    }

    /// Base pages of all sources: as many destinations of order 0 would take all of them.
    pub(crate) fn selected(&self) -> usize {
        let mut pages = 0;
        for &entry in self.sources() {
            if let Some(order) = self.source_of(entry) {
                pages += 1 << order;
            }
        }
        pages
    }

    /// Whether the source at `i` is a small page of an area, as [`Migration::source`] says.
    #[inline]
    pub(super) fn is_small_page(&self, i: usize) -> bool {
        let small = bindings::MIGRATE_PFN_VALID | bindings::MIGRATE_PFN_MIGRATE;
        let entry = self.sources().get(i);
        self.vma && entry.is_some_and(|e| e & (small | bindings::MIGRATE_PFN_COMPOUND) == small)
    }

    /// Whether the source at `i` has no page.
    #[inline]
    pub(super) fn is_hole(&self, i: usize) -> bool {
        !is_valid(self.src(i))
    }

    /// Makes the folio of `order` that `page` is the head of the destination of page `part` of the
    /// source at `i`.
    ///
    /// # Safety
    ///
    /// `page` must be the head of a folio of `order` with the contents of the source, which the destination
    /// suits. The caller gives away the lock of the folio and a reference.
    #[inline]
    pub(super) unsafe fn set_destination(
        &mut self,
        i: usize,
        part: usize,
        page: *mut bindings::page,
        order: u32,
    ) {
        self.drop_destination(i + part);
        let pfn = self.memmap.pfn_of(page);
        let mut entry = (pfn << bindings::MIGRATE_PFN_SHIFT) | bindings::MIGRATE_PFN_VALID;
        entry |= self.src(i) & bindings::MIGRATE_PFN_WRITE;
        if order > 0 {
            entry |= bindings::MIGRATE_PFN_COMPOUND;
        }
        // INVARIANT: The entry owns lock and reference from here on.
        self.set_dst(i + part, entry);
    }

    /// Waits for the copies, and moves the pages that can be moved. Wraps `migrate_vma_pages()` and
    /// `migrate_device_pages()`; may sleep.
    ///
    /// # Errors
    ///
    /// That of [`DeviceMemory::fence`]. All pages are put back then.
    pub(crate) fn copied(mut self) -> Result<Migration<'a, Copied, M>> {
        self.fence()?;
        let head = self.head_mut();
        head.progress = Progress::Moved;
        let args = head.args.as_mut_ptr();
        if self.vma {
            // SAFETY: Core mm has set up `args` and not finalized it by the type invariants of `Migration`,
            // and the mmap lock is held.
            unsafe { bindings::migrate_vma_pages(args) };
        } else {
            let bindings::migrate_vma { src, dst, .. } = *self.args();
            // SAFETY: Core mm has set up the `len` entries and not finalized them by the type invariants of
            // `Migration`.
            unsafe { bindings::migrate_device_pages(src, dst, self.len) };
        }
        Ok(self.next(false))
    }
}

impl<'a, M: DeviceMemory> Migration<'a, Copied, M> {
    /// Restores the page tables, and drops the references and locks of the migration. Wraps
    /// `migrate_vma_finalize()` and `migrate_device_finalize()`; may sleep.
    pub(crate) fn finalize(mut self) -> Migration<'a, Finalized, M> {
        self.end();
        self.next(true)
    }
}

impl<'a, S: Stage, M: DeviceMemory> Migration<'a, S, M> {
    /// The same migration, in the stage that it has reached.
    #[inline]
    fn next<T: Stage>(mut self, finalized: bool) -> Migration<'a, T, M> {
        let next = Migration {
            head: self.head,
            memmap: self.memmap,
            memory: self.memory,
            len: self.len,
            vma: self.vma,
            holes: self.holes,
            finalized,
            watch: self.watch,
            _p: PhantomData,
        };
        // `next` takes over the remaining work.
        self.finalized = true;
        next
    }

    /// Lets core mm finish.
    fn end(&mut self) {
        // SAFETY: Both callers consume or drop `self`, whose migration is not finalized yet by the type invariants
        // of `Migration`. Before core mm is told to move the pages there is no destination.
        unsafe { self.head_mut().end() };
    }

    /// Waits for the copies that were begun, and unmaps their other ends.
    #[inline]
    pub(super) fn fence(&mut self) -> Result {
        let fenced = self.memory.fence();
        // SAFETY: `memory` is borrowed while `self` lives, and with it the devices, which are bound while they are
        // borrowed. No copy is under way any more.
        unsafe { self.head_mut().mappings.unmap() };
        fenced
    }

    /// Entries of the sources that have moved, with the order of the destination.
    pub(in crate::mm) fn moved_entries(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        let entries = self.sources().iter().zip(self.destinations_raw());
        entries.enumerate().filter_map(|(i, (&src, &dst))| {
            if src & bindings::MIGRATE_PFN_MIGRATE == 0 || !is_valid(dst) {
                None
            } else if dst & bindings::MIGRATE_PFN_COMPOUND == 0 {
                Some((i, 0))
            } else {
                Some((i, self.destination_order(i)))
            }
        })
    }

    /// Order of the large destination at entry `i`.
    fn destination_order(&self, i: usize) -> u32 {
        match self.page_of(self.dst(i)) {
            // SAFETY: The destination is locked and referenced by the type invariants of `Migration`.
            Some(page) if !self.finalized => unsafe { bindings::zdm_folio_order(page.as_ptr()) },
            // The range of an area has large sources of this order only. A list of device pages is not looked at any
            // more when the migration is finalized: see `destinations()`.
            _ => PMD_ORDER,
        }
    }

    /// The arguments and results of core mm.
    #[inline]
    pub(in crate::mm) fn args(&self) -> &bindings::migrate_vma {
        // SAFETY: Borrowed for longer than `self` lives by the type invariants of `Migration`; core mm
        // changes them in its functions only, and has set them up.
        unsafe { self.head.as_ref().args.assume_init_ref() }
    }

    /// What the migration has in its buffer.
    #[inline]
    pub(super) fn head_mut(&mut self) -> &mut Head {
        // SAFETY: Borrowed for longer than `self` lives by the type invariants of `Migration`.
        unsafe { self.head.as_mut() }
    }

    /// The page of the fault that the migration is made for, or NULL.
    pub(super) fn fault_page(&self) -> *mut bindings::page {
        self.args().fault_page
    }

    /// Number of entries: pages of the range, selected or not.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether core mm will move, or has moved, the source that starts at entry `i`.
    pub(super) fn is_selected(&self, i: usize) -> bool {
        let src = self.sources().get(i);
        src.is_some_and(|src| src & bindings::MIGRATE_PFN_MIGRATE != 0)
    }

    /// The entries of the sources.
    #[inline]
    pub(super) fn sources(&self) -> &[usize] {
        // SAFETY: There are `len` entries by the type invariants of `Migration`, which core mm changes in
        // its functions only.
        unsafe { core::slice::from_raw_parts(self.args().src, self.len) }
    }

    /// The entries of the destinations.
    #[inline]
    pub(super) fn destinations_raw(&self) -> &[usize] {
        // SAFETY: There are `len` entries by the type invariants of `Migration`, which core mm changes in
        // its functions only.
        unsafe { core::slice::from_raw_parts(self.args().dst, self.len) }
    }

    #[inline]
    pub(in crate::mm) fn src(&self, i: usize) -> usize {
        self.sources()[i]
    }

    #[inline]
    pub(in crate::mm) fn dst(&self, i: usize) -> usize {
        self.destinations_raw()[i]
    }

    /// The page of `entry`, one of this migration.
    #[inline]
    pub(in crate::mm) fn page_of(&self, entry: usize) -> Option<NonNull<bindings::page>> {
        if !is_valid(entry) {
            return None;
        }
        NonNull::new(self.memmap.page_of(entry >> bindings::MIGRATE_PFN_SHIFT))
    }

    pub(super) fn set_src(&mut self, i: usize, entry: usize) {
        assert_index(i, self.len);
        // SAFETY: `i` is below `len`.
        unsafe { *self.args().src.add(i) = entry };
    }

    fn set_dst(&mut self, i: usize, entry: usize) {
        assert_index(i, self.len);
        // SAFETY: `i` is below `len`.
        unsafe { *self.args().dst.add(i) = entry };
    }

    #[inline]
    pub(super) fn drop_destination(&mut self, i: usize) {
        if is_valid(self.dst(i)) {
            self.drop_valid_destination(i);
        }
    }

    #[cold]
    fn drop_valid_destination(&mut self, i: usize) {
        if let Some(page) = self.page_of(self.dst(i)) {
            // A copy to the destination may be under way.
            let _ = self.fence();
            self.set_dst(i, 0);
            // SAFETY: We own the lock by the type invariants of `Migration`.
            unsafe { bindings::zdm_folio_unlock(page.as_ptr()) };
            // SAFETY: We own a reference by the type invariants of `Migration`.
            unsafe { bindings::zdm_folio_put(page.as_ptr()) };
        }
    }
}

impl<S: Stage, M: DeviceMemory> Drop for Migration<'_, S, M> {
    fn drop(&mut self) {
        if self.finalized {
            return;
        }
        if !S::MOVED {
            // Core mm takes a source with a destination for one that has moved.
            for i in 0..self.len {
                self.drop_destination(i);
            }
        }
        self.end();
    }
}

/// An index beyond the entries would be a bug of this module, met by an oops of this task only.
fn assert_index(i: usize, len: usize) {
    // PANIC: All callers take `i` from `0..len` or check it first.
    assert!(i < len);
}

/// Whether an entry has a page.
#[inline]
pub(in crate::mm) fn is_valid(entry: usize) -> bool {
    entry & bindings::MIGRATE_PFN_VALID != 0
}
