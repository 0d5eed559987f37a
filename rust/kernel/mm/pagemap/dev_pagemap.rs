// SPDX-License-Identifier: GPL-2.0

//! Registered ZONE_DEVICE memory.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    fault::{
        FaultError,
        VmFault, //
    },
    kept::{
        Keeper,
        Kept, //
    },
    ops::{
        PagemapOps,
        PrivateOps, //
    },
    refs, //
};
use crate::bindings;
use crate::mm::{
    module::pin::{
        ModulePin,
        Work, //
    },
    page::{
        backing::RawBacking,
        device_folio::FreedFolio,
        struct_page::{
            self,
            MemMap, //
        },
        view::PageView, //
    },
    region::{
        frames::{
            Frames,
            MemRegion,
            RegionError, //
        },
        free_folio::{
            FreeFolio,
            FreeRegion, //
        },
        memory_type::MemoryType,
        owner::PgmapOwner, //
    },
    sync::{
        cache_line::CacheLine,
        once::{
            read_once,
            store_release, //
        },
        task::NoFaults, //
    },
};
use core::ptr::NonNull;
use kernel::{
    alloc::flags::__GFP_NOWARN,
    error::from_err_ptr,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            AtomicFlag,
            Full,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    types::Opaque, //
};

/// The page is not the head of a folio in use.
pub(super) const FREE: i8 = 0;

/// The page is the head of a folio that `folio_free` is taking apart.
const FREEING: i8 = -1;

/// The value of `state` for the head of a folio in use.
pub(super) fn in_use(order: u32) -> i8 {
    // CAST: Orders are at most `PMD_ORDER`.
    order as i8 + 1
}

/// The order of the folio in use that `state` says.
fn order_in_use(state: i8) -> Option<u32> {
    u32::try_from(state).ok()?.checked_sub(1)
}

/// The amount that a folio adds to `in_use`. No pagemap has as many pages.
const FOLIO: usize = 1 << 32;

/// A chunk of ZONE_DEVICE memory. Folios in use of PRIVATE memory may be backed by system memory.
///
/// # Examples
///
/// ```
/// # let device = kernel::mm::kunit::device::EmulatedDevice::new()?; let map = device.memory();
/// let folio = device.alloc(3)?;
/// let index = map.index_of_pfn(folio.page().pfn()).ok_or(EINVAL)?;
/// assert_eq!((map.order_in_use(index), map.used()), (Some(3), 8));
/// drop(folio);
/// assert_eq!((map.order_in_use(index), map.used()), (None, 0));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - `pgmap` is registered with `memremap_pages()`, and its `ops` are `raw_ops`, those of `T`.
/// - `state[i]` says whether page `i` is the head of a folio that was allocated and did not come
///   back through `folio_free` yet, and of which order; while it does, `zone_device_data` of that
///   page owns the [`RawBacking`] of a PRIVATE folio.
/// - Each page is in exactly one place: in a folio that `state` names, in a value of
///   [`free_folio`](crate::mm::region::free_folio), or home. `away` counts the pages that are not home.
/// - While a folio is in use, or a `folio_free` has not returned to core mm, `pinned` is set and owns a
///   reference of the module, or `unpin()` is about to set it again. Core mm calls the functions of
///   `raw_ops` for folios in use only, so that they may be in the text of the module.
#[pin_data]
pub(crate) struct DevPagemap<T: PagemapOps> {
    // Dropped first, as its shrinker looks at other fields.
    pub(super) kept: Kept,
    #[pin]
    pub(in crate::mm) pgmap: Opaque<bindings::dev_pagemap>,
    pub(super) memory: MemoryType,
    /// The largest order of a folio that may be allocated: a kernel that cannot migrate larger ones may
    /// split them without a call of `folio_split`.
    pub(super) max_order: u32,
    pub(super) frames: Frames,
    memmap: MemMap,
    pub(super) state: KVVec<Atomic<i8>>,
    /// Folios in use, or that `folio_free` is taking apart, times [`FOLIO`], and their base pages.
    in_use: CacheLine<Atomic<usize>>,
    /// Base pages whose owner did not give them back with `retire()`.
    away: Atomic<usize>,
    /// Whether a reference of the module is held for the folios.
    pinned: AtomicFlag,
    /// Drops the reference of the module.
    #[pin]
    unpin: Work,
    /// References of the `dev_pagemap` that live [`PagemapRef`](super::registration::PagemapRef)s
    /// own.
    pub(super) guards: Atomic<usize>,
    /// Those that registration left, before a page was in use.
    pub(super) first_refs: i64,
    /// The reference that fault injection takes.
    pub(super) leaked: Atomic<u32>,
    /// The `dev_pagemap` cannot be unregistered and was given up: nothing may use it any more.
    pub(super) closed: AtomicFlag,
    /// `pgmap.ops` points to this. It is no static of the module, because a pagemap that stays
    /// registered outlives the module.
    raw_ops: bindings::dev_pagemap_ops,
    pub(super) owner: Arc<PgmapOwner>,
    pub(super) ops: T,
}

// SAFETY: The `dev_pagemap` is used through core mm, which does its own locking.
unsafe impl<T: PagemapOps> Send for DevPagemap<T> {}
// SAFETY: Core mm does its own locking for the `dev_pagemap`; the other fields are atomic, constant, or
// `Sync` by themselves.
unsafe impl<T: PagemapOps> Sync for DevPagemap<T> {}

impl<T: PagemapOps> DevPagemap<T> {
    /// Registers the memory of `region`. Returns the pagemap, and its pages, which are all free. May
    /// sleep.
    ///
    /// Wraps `memremap_pages()`. `ops` makes the data of the owner for the page frames of the region.
    ///
    /// # Errors
    ///
    /// [`RegionError::NoSpace`] when memory is short.
    ///
    /// # Safety
    ///
    /// - `raw_ops` must be a copy of [`DevPagemap::OPS`] or [`DevPagemap::PRIVATE_OPS`] of this `T`, the
    ///   latter if and only if `memory` is PRIVATE.
    /// - The caller must unregister the pagemap before the result is dropped, or never drop it.
    pub(super) unsafe fn register(
        region: &MemRegion,
        memory: MemoryType,
        raw_ops: bindings::dev_pagemap_ops,
        owner: Arc<PgmapOwner>,
        ops: impl FnOnce(Frames) -> Result<T>,
    ) -> Result<(Pin<KBox<Self>>, FreeRegion), RegionError> {
        let (range, frames) = (region.range(), region.frames());
        let ops = ops(frames).map_err(|_| RegionError::NoSpace)?;
        let mut state = KVVec::with_capacity(frames.pages(), GFP_KERNEL | __GFP_NOWARN)
            .map_err(|_| RegionError::NoSpace)?;
        for _ in 0..frames.pages() {
            state
                .push_within_capacity(Atomic::new(FREE))
                .map_err(|_| RegionError::NoSpace)?;
        }
        let backed = if memory == MemoryType::Private {
            frames.pages()
        } else {
            0
        };
        let kept = Kept::new(backed).map_err(|_| RegionError::NoSpace)?;
        let raw_owner = owner.as_ptr();
        // INVARIANT: The pagemap is registered here, no page was allocated, and all pages are in the
        // `FreeRegion` that is returned.
        let map = KBox::try_pin_init(
            try_pin_init!(&this in Self {
                kept,
                raw_ops,
                pgmap <- Opaque::try_ffi_init(move |pgmap: *mut bindings::dev_pagemap| {
                    // SAFETY: `pgmap` is valid for writes; all zeroes is its initial state.
                    unsafe { pgmap.write_bytes(0, 1) };
                    // SAFETY: `pgmap` is valid, initialised above, and no other task knows it.
                    let raw = unsafe { &mut *pgmap };
                    raw.type_ = memory.raw();
                    raw.flags = memory.pagemap_flags();
                    raw.nr_range = 1;
                    // SAFETY: The union is all zeroes, which is a valid range.
                    *unsafe { raw.__bindgen_anon_1.range.as_mut() } = range;
                    // SAFETY: `this` is the place that is being initialised. `raw_ops` was initialised before
                    // `pgmap`, and is pinned with it.
                    raw.ops = unsafe { &raw const (*this.as_ptr()).raw_ops };
                    raw.owner = raw_owner;
                    // SAFETY: `pgmap` is set up, and pinned until it is unregistered.
                    from_err_ptr(unsafe { bindings::memremap_pages(pgmap, -1) })?;
                    Ok::<(), Error>(())
                }),
                memory,
                max_order: memory.max_order(),
                frames,
                memmap: MemMap::get(),
                state,
                in_use: CacheLine(Atomic::new(0)),
                away: Atomic::new(frames.pages()),
                pinned: AtomicFlag::new(false),
                // SAFETY: `unpin` is the work of a `DevPagemap` of this `T`.
                unpin <- unsafe { Work::new(Self::unpin) },
                guards: Atomic::new(0),
                // SAFETY: The pagemap was registered just now.
                first_refs: refs::first(unsafe { refs::refs(pgmap.get()) }, frames.pages()),
                leaked: Atomic::new(0),
                closed: AtomicFlag::new(false),
                owner,
                ops,
            }),
            GFP_KERNEL,
        )
        .map_err(|_| RegionError::NoSpace)?;
        // SAFETY: The pagemap is pinned, and its field `kept` is dropped before it is gone.
        unsafe { map.kept.start(core::ptr::from_ref(&*map)) };
        // SAFETY: The region was registered just now, it is aligned to blocks, and no page is in any other
        // value.
        let free = unsafe { FreeRegion::from_raw(frames) };
        Ok((map, free))
    }

    /// The `dev_pagemap` itself.
    pub(super) fn raw(&self) -> *mut bindings::dev_pagemap {
        self.pgmap.get()
    }

    /// Of memory that the CPU can reach. A kernel in which a free GENERIC page has a reference
    /// never calls `folio_free` for one, nor has this module one in use there.
    pub(super) const OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
        folio_free: Some(Self::folio_free),
        migrate_to_ram: None,
        memory_failure: None,
        folio_split: Some(Self::folio_split),
    };

    /// The owner's data.
    pub(crate) fn ops(&self) -> &T {
        &self.ops
    }

    /// Number of base pages.
    pub(crate) fn pages(&self) -> usize {
        self.frames.pages()
    }

    /// Gives the pages of `folio` back for good: they are not allocated again, and are home. In any context.
    ///
    /// # Errors
    ///
    /// Gives `folio` back when it belongs to another pagemap.
    pub(crate) fn retire(&self, folio: FreeFolio) -> Result<(), FreeFolio> {
        if self.index_of_pfn(folio.first_pfn()).is_none() {
            return Err(folio);
        }
        // INVARIANT: The folio is consumed, so that its pages are in no other place.
        self.away.fetch_sub(folio.pages(), Release);
        Ok(())
    }

    /// Base pages that are allocated, or in a value of [`free_folio`](crate::mm::region::free_folio).
    pub(crate) fn away(&self) -> usize {
        // Acquire: pairs with the release of the last `retire()`.
        self.away.load(Acquire)
    }

    /// Makes every further use of `self` fail, as its `dev_pagemap` cannot be unregistered, or the module is
    /// being unloaded.
    pub(super) fn close(&self) {
        self.closed.store(true, Release);
        // The shrinker would call into the module.
        self.kept.stop();
    }

    /// Base pages that are allocated.
    pub(crate) fn used(&self) -> usize {
        self.in_use.load(Relaxed) % FOLIO
    }

    /// Page frame number of page 0.
    pub(crate) fn first_pfn(&self) -> usize {
        self.frames.first_pfn()
    }

    /// Index of page frame `pfn`, if it is one of the pagemap's.
    pub(crate) fn index_of_pfn(&self, pfn: usize) -> Option<usize> {
        let index = pfn.checked_sub(self.first_pfn())?;
        (index < self.pages()).then_some(index)
    }

    /// A view of page `index`, `None` beyond the end.
    pub(crate) fn page(&self, index: usize) -> Option<PageView<'_>> {
        if index >= self.pages() {
            return None;
        }
        // The pagemap has struct pages for all its pfns by the type invariants.
        let page = self.memmap.page_of(self.first_pfn() + index);
        let pgmap = NonNull::new(self.raw())?;
        // SAFETY: The page is one of `pgmap`, which stays registered while `self` is borrowed.
        NonNull::new(page).map(|page| unsafe { PageView::of_pagemap(page, pgmap) })
    }

    /// The order of the folio in use that page `index` is the head of.
    pub(crate) fn order_in_use(&self, index: usize) -> Option<u32> {
        order_in_use(read_once(self.state.get(index)?))
    }

    /// Counts a folio that will be in use, and `pages` base pages that it has more than before; the first
    /// folio pins the module for all of them. `false` when the module is on its way out and no folio is
    /// in use. Does not sleep.
    pub(super) fn begin_use(&self, pages: usize) -> bool {
        self.in_use.fetch_add(FOLIO + pages, Full);
        // The read is ordered after the count: `unpin()` sees the folio, or this sees that `unpin()` has run.
        if self.pinned.load(Relaxed) {
            return true;
        }
        let Some(pin) = ModulePin::try_take(self.owner.module()) else {
            self.in_use.fetch_sub(FOLIO + pages, Full);
            return false;
        };
        if !self.pinned.xchg(true, Full) {
            pin.leak();
        }
        true
    }

    /// Counts a folio of `pages` base pages that is in use no longer. Does not sleep.
    ///
    /// Work drops the reference of the module, and not this, because `folio_free` returns through the text of
    /// the module afterwards.
    ///
    /// # Safety
    ///
    /// [`DevPagemap::begin_use`] must have counted the folio, or the parts that it was split into, and this
    /// must be called once for each.
    pub(super) unsafe fn end_use(&self, pages: usize) {
        if self.in_use.fetch_sub(FOLIO + pages, Full) == FOLIO + pages {
            self.unpin.queue_later();
        }
    }

    /// Waits until the module is no longer pinned for folios that are freed already. May sleep.
    pub(crate) fn finish_use(&self) {
        if self.folios() == 0 {
            self.unpin.flush();
        }
    }

    /// Makes sure that [`DevPagemap::unpin`] does not run, and never will. May sleep.
    pub(super) fn disable_unpin(&self) {
        self.unpin.disable();
    }

    /// Drops the reference of the module that was held for folios, if there is one.
    ///
    /// # Safety
    ///
    /// No folio may be in use, each `folio_free` must have returned, and [`DevPagemap::disable_unpin`] must
    /// have been called.
    pub(super) unsafe fn drop_pin(&self) {
        if self.pinned.xchg(false, Full) {
            // SAFETY: `pinned` owned it by the type invariants of `DevPagemap`.
            drop(unsafe { ModulePin::from_leaked(self.owner.module()) });
        }
    }

    /// Drops the reference of the module if no folio is in use and each `folio_free` has returned to core
    /// mm, which drops the folio's references of the `dev_pagemap` then.
    ///
    /// # Safety
    ///
    /// Only to be called for the work of a `DevPagemap<T>`.
    unsafe extern "C" fn unpin(work: *mut bindings::work_struct) {
        // SAFETY: The work is a field of a `DevPagemap<T>`, which is not freed before `disable_unpin()`.
        let map = unsafe { &*kernel::container_of!(Work::of_raw(work), Self, unpin) };
        while map.folios() == 0 && map.pinned.load(Relaxed) {
            if map.closed.load(Relaxed) {
                // The module stays loaded, because no task would wait for this work.
                return;
            }
            if map.stable_excess() != Some(0) {
                // A task holds a reference of the pagemap, which could not be unregistered.
                map.unpin.queue_later();
                return;
            }
            if map.folios() != 0 || !map.pinned.xchg(false, Full) {
                return;
            }
            // SAFETY: `pinned` owned it by the type invariants of `DevPagemap`.
            let pin = unsafe { ModulePin::from_leaked(map.owner.module()) };
            // A folio may have been allocated, or even freed again, by a task that still saw `pinned`.
            let idle = map.folios() == 0 && map.excess_refs() == 0;
            if idle || map.pinned.xchg(true, Full) {
                // Nothing is in use, or the task has pinned the module, too. Unloading waits for this
                // work, which `disable_unpin()` waits for.
                drop(pin);
                return;
            }
            pin.leak();
        }
    }

    /// # Safety
    ///
    /// `page` must be a page in use of a registered `DevPagemap<T>` that outlives `'a`, and its folio must
    /// stay whole meanwhile.
    unsafe fn of_page<'a>(page: *mut bindings::page) -> &'a Self {
        // SAFETY: The folio is whole, so that its head holds the pagemap, which is that of a
        // `DevPagemap<T>` by the contract of this function.
        unsafe { Self::of_pgmap(struct_page::pgmap(struct_page::head(page))) }
    }

    /// # Safety
    ///
    /// `pgmap` must be that of a registered `DevPagemap<T>` that outlives `'a`.
    unsafe fn of_pgmap<'a>(pgmap: *mut bindings::dev_pagemap) -> &'a Self {
        // SAFETY: `pgmap` is a field of a `DevPagemap<T>` that outlives `'a`, by the contract of this
        // function.
        unsafe { &*kernel::container_of!(Opaque::cast_from(pgmap), Self, pgmap) }
    }

    /// Index of `page`, which may be one of another pagemap.
    pub(super) fn index_of(&self, page: *mut bindings::page) -> usize {
        self.memmap.pfn_of(page).wrapping_sub(self.first_pfn())
    }

    /// Takes a folio from those in use, and returns the order that it was allocated with, or that a
    /// split left it with. `None` when it is not in use.
    fn take_used(&self, index: usize) -> Option<u32> {
        let state = self.state.get(index)?;
        let before = read_once(state);
        let order = order_in_use(before)?;
        // A kernel that frees a folio twice at the same time must not get it twice.
        state.cmpxchg(before, FREEING, Full).ok()?;
        Some(order)
    }

    /// # Safety
    ///
    /// Only to be called with the head of a folio of this kind of pagemap, by core mm when the last
    /// reference is gone, or for a folio that is free and stays so.
    pub(super) unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
        let page: *mut bindings::page = folio.cast();
        // SAFETY: `page` is the head of a folio of a `DevPagemap<T>` by the contract of this function.
        let raw = unsafe { struct_page::pgmap(page) };
        // SAFETY: Core mm drops the folio's references of the pagemap after the call.
        let map = unsafe { Self::of_pgmap(raw) };
        let index = map.index_of(page);
        let head = NonNull::new(page).zip(NonNull::new(raw));
        let Some((head, pgmap)) = head.filter(|_| index < map.pages()) else {
            return;
        };
        // SAFETY: The page is one of the pagemap, which stays registered, as core mm drops the folio's references
        // of the pagemap after the call.
        let view = unsafe { PageView::of_pagemap(head, pgmap) };
        // SAFETY: The page is one of the pagemap, which stays registered during this call.
        let clean = unsafe { struct_page::is_clean_small(page) };
        let order = map.take_used(index);
        let free = order.map(|order| {
            // SAFETY: `page` is the head of a folio of a `DevPagemap`.
            let backing = unsafe { RawBacking::of(page) };
            // SAFETY: `take_used()` made the folio ours, so that no other task reads its backing
            // meanwhile.
            unsafe { RawBacking::NONE.store(page) };
            // SAFETY: The folio owned the backing by the type invariants of `DevPagemap`, and is gone. Its
            // page is ours.
            if !unsafe { map.kept.put(index, backing) } {
                // SAFETY: The folio owned the backing by the type invariants of `DevPagemap`, and is gone.
                // It was not kept.
                unsafe { backing.free(order) };
            }
            // INVARIANT: The pages are in the `FreeFolio` from here on.
            store_release(&map.state[index], FREE);
            // SAFETY: `take_used()` says that the pages were a folio in use of this order, so that they are in
            // no value, and nothing refers to them any more.
            unsafe { FreeFolio::from_raw(map.first_pfn() + index, order) }
        });
        let pages = free.as_ref().map(FreeFolio::pages);
        // The order in a free page may be left over from an earlier use.
        let order = order.unwrap_or(0);
        // SAFETY: `take_used()` says that the folio was of this order. There is one page in any case.
        let freed = unsafe { FreedFolio::new(view, clean, index, order, free) };
        map.ops.folio_free(freed);
        if let Some(pages) = pages {
            // SAFETY: `take_used()` said that the folio was in use, so that it was counted, and gives it once.
            unsafe { map.end_use(pages) };
        }
    }

    /// A large folio was split. Core mm calls this for each new folio, `tail`, which gets its part of the backing,
    /// and at the end without a tail, for the head itself. Does not sleep.
    ///
    /// # Safety
    ///
    /// Only to be called by core mm, with folios of this kind of pagemap that it is splitting.
    unsafe extern "C" fn folio_split(head: *mut bindings::folio, tail: *mut bindings::folio) {
        let page: *mut bindings::page = head.cast();
        // SAFETY: Core mm has the folio locked and frozen, which keeps it and its pagemap.
        let map = unsafe { Self::of_page(page) };
        let target: *mut bindings::page = if tail.is_null() { page } else { tail.cast() };
        // SAFETY: Both folios are frozen: only core mm uses them.
        let order = unsafe { bindings::zdm_folio_order(target) };
        let index = map.index_of(target);
        map.state[index].store(in_use(order), Relaxed);
        map.ops.folio_split(index, order);
        if tail.is_null() {
            return;
        }
        // SAFETY: Both folios are frozen, so that no other task reads these fields meanwhile.
        unsafe { bindings::zdm_folio_inherit(tail, head) };
        // SAFETY: `page` is the head of the folio that is being split.
        let whole = unsafe { RawBacking::of(page) };
        // SAFETY: The folio owns the backing by the type invariants of `DevPagemap`, and is frozen, so that
        // no other task frees or splits the backing meanwhile.
        let backing = unsafe { whole.split() };
        // SAFETY: The folio is frozen, so that no other task reads its backing meanwhile.
        unsafe { backing.store(page) };
        let part = backing.part(index - map.index_of(page));
        // INVARIANT: The tail owns its part of the block from here on.
        // SAFETY: The tail is frozen, so that no other task reads its backing meanwhile.
        unsafe { part.store(target) };
        // The tail is a folio in use of its own. The module is pinned for the folio that is being split, or
        // `unpin()` is about to see that folio.
        map.begin_use(0);
    }
}

impl<T: PagemapOps> Keeper for DevPagemap<T> {
    fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Those that `folio_free` is taking apart count, too.
    fn folios(&self) -> usize {
        self.in_use.load(Relaxed) / FOLIO
    }
}

impl<T: PrivateOps> DevPagemap<T> {
    pub(super) const PRIVATE_OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
        migrate_to_ram: Some(Self::migrate_to_ram),
        ..Self::OPS
    };

    /// # Safety
    ///
    /// Only to be called by core mm, with a fault on a page of this kind of pagemap.
    unsafe extern "C" fn migrate_to_ram(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: Core mm gives a valid fault, and holds a reference on its page, which keeps the
        // pagemap alive.
        let map = unsafe { Self::of_page((*vmf).page) };
        let (owner, first_pfn) = (&map.owner, map.first_pfn());
        let Some(pgmap) = NonNull::new(map.raw()) else {
            return FaultError::Sigbus.to_vm_fault();
        };
        // SAFETY: Core mm handles the fault for the duration of this call, and its page is one of `map`.
        let fault = unsafe { VmFault::from_raw(vmf, owner, pgmap, map.memmap, first_pfn) };
        // Core mm has locked the page.
        let _no_faults = NoFaults::new();
        match map.ops.migrate_to_ram(&fault) {
            Ok(()) => 0,
            Err(err) => err.to_vm_fault(),
        }
    }
}
