// SPDX-License-Identifier: GPL-2.0

//! Registered ZONE_DEVICE memory.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    backing::{
        Backing,
        RawBacking, //
    },
    device_folio::{
        FreedFolio,
        HandOutError,
        LockedDeviceFolio, //
    },
    fault::{
        FaultError,
        VmFault, //
    },
    memory_type::MemoryType,
    module::ModulePin,
    owner::PgmapOwner,
    page::PageView,
    region::{
        MemRegion,
        RegionError, //
    },
    selection::DevicePfns, //
};
use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    types::Opaque, //
};

/// What the owner of a pagemap is called for: `struct dev_pagemap_ops`.
pub(crate) trait PagemapOps: Send + Sync + Sized + 'static {
    /// The last reference on a folio is gone.
    ///
    /// Called by whoever dropped it, in any context, interrupts included: must not sleep, and
    /// take no lock that is ever taken with interrupts on. The folio may be handed out again as
    /// soon as the owner's allocator knows it.
    fn folio_free(&self, folio: FreedFolio<'_>);

    /// A large folio was split, and page `index` is the head of what is now a folio of `order`.
    ///
    /// Called for each part, with the folio locked and frozen; must not sleep.
    fn folio_split(&self, index: usize, order: u32);
}

/// What the owner of PRIVATE memory is called for besides.
pub(crate) trait PrivateOps: PagemapOps {
    /// The CPU touched a folio. The mmap lock is held for reading, and the folio is locked. May
    /// sleep.
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError>;
}

/// The page is not (the head of) a folio in use.
const FREE: i8 = 0;

/// The page is free but must not be handed out for the moment.
const HELD: i8 = -1;

/// What `state` holds for the head of a folio in use.
fn in_use(order: u32) -> i8 {
    // CAST: Orders are below 64.
    order as i8 + 1
}

/// Looks at the references of a `dev_pagemap`, a millisecond apart, after which somebody is at work
/// on it.
const SETTLE_TRIES: usize = 1000;

/// Looks in a row that must find the same. Core mm drops the reference of a page after the page is
/// no longer in use, and may lose its processor in between: for longer than many a look, where that
/// is a busy machine's.
const SETTLED: usize = 300;

/// A fault to be injected into a page that is not in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Corruption {
    /// This many references. The page cannot be handed out unless there are none.
    Refs(i32),
    /// This in the place of a mapping.
    Mapping(usize),
    /// Whether it has `PG_anon_exclusive`.
    AnonExclusive(bool),
}

/// The opposite.
fn order_in_use(state: i8) -> Option<u32> {
    u32::try_from(state).ok()?.checked_sub(1)
}

/// A chunk of ZONE_DEVICE memory.
///
/// Folios in use of PRIVATE memory are backed by system memory, in the place of a device's own.
///
/// # Invariants
///
/// - `pgmap` is registered with `memremap_pages()`, and its `ops` are those of `T`.
/// - `state[i]` says whether page `i` is the head of a folio that was handed out and did not come
///   back through `folio_free` yet, and of which order; while it does, `zone_device_data` of that
///   page owns the [`RawBacking`] of a PRIVATE folio.
/// - While `folios` is not 0 a pin on the module is held, or the caller of `begin_use()` is about to
///   take it.
#[pin_data]
pub(crate) struct DevPagemap<T: PagemapOps> {
    #[pin]
    pgmap: Opaque<bindings::dev_pagemap>,
    memory: MemoryType,
    first_pfn: usize,
    state: KVVec<Atomic<i8>>,
    used: Atomic<usize>,
    /// Folios in use, or in the hands of `folio_free`.
    folios: Atomic<usize>,
    /// References of the `dev_pagemap` that live [`PagemapRef`](super::registration::PagemapRef)s
    /// own.
    pub(super) guards: Atomic<usize>,
    /// Those that registration left, before a page was in use.
    first_refs: i64,
    /// Those that fault injection took.
    leaked: Atomic<usize>,
    /// In the place of the module's, once that may be gone.
    no_ops: bindings::dev_pagemap_ops,
    owner: Arc<PgmapOwner>,
    ops: T,
}

// SAFETY: The `dev_pagemap` is used through core mm, which does its own locking.
unsafe impl<T: PagemapOps> Send for DevPagemap<T> {}
// SAFETY: As above; the rest is atomic or constant.
unsafe impl<T: PagemapOps> Sync for DevPagemap<T> {}

impl<T: PagemapOps> DevPagemap<T> {
    /// Registers the memory of `region`, to be unregistered before the result is dropped. May sleep.
    ///
    /// Wraps `memremap_pages()`. `raw_ops` must be those of this `T`, of the type of memory.
    ///
    /// # Errors
    ///
    /// [`RegionError::NoSpace`] when memory is short.
    pub(super) fn register(
        region: &MemRegion,
        memory: MemoryType,
        raw_ops: &'static bindings::dev_pagemap_ops,
        owner: Arc<PgmapOwner>,
        ops: T,
    ) -> Result<Pin<KBox<Self>>, RegionError> {
        let mut state =
            KVVec::with_capacity(region.pages(), GFP_KERNEL).map_err(|_| RegionError::NoSpace)?;
        for _ in 0..region.pages() {
            state
                .push_within_capacity(Atomic::new(FREE))
                .map_err(|_| RegionError::NoSpace)?;
        }
        let (range, first_pfn) = (region.range(), region.first_pfn());
        let raw_owner = owner.as_ptr();
        // INVARIANT: Registered here; no page was handed out.
        KBox::try_pin_init(
            try_pin_init!(Self {
                pgmap <- Opaque::try_ffi_init(move |pgmap: *mut bindings::dev_pagemap| {
                    // SAFETY: `pgmap` is valid for writes; all zeroes is its initial state.
                    unsafe { pgmap.write_bytes(0, 1) };
                    // SAFETY: As above.
                    let raw = unsafe { &mut *pgmap };
                    raw.type_ = memory.raw();
                    raw.nr_range = 1;
                    // SAFETY: The union is all zeroes, which is a valid range.
                    *unsafe { raw.__bindgen_anon_1.range.as_mut() } = range;
                    raw.ops = raw_ops;
                    raw.owner = raw_owner;
                    // SAFETY: `pgmap` is set up, and pinned until it is unregistered.
                    from_err_ptr(unsafe { bindings::memremap_pages(pgmap, -1) })?;
                    Ok::<(), Error>(())
                }),
                memory,
                first_pfn,
                state,
                used: Atomic::new(0),
                folios: Atomic::new(0),
                guards: Atomic::new(0),
                // SAFETY: Registered just now.
                first_refs: unsafe { bindings::zdm_pgmap_refs(pgmap.get()) } as i64,
                leaked: Atomic::new(0),
                no_ops: bindings::dev_pagemap_ops::default(),
                owner,
                ops,
            }),
            GFP_KERNEL,
        )
        .map_err(|_| RegionError::NoSpace)
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

    /// The data of the owner.
    pub(crate) fn ops(&self) -> &T {
        &self.ops
    }

    /// Number of base pages.
    pub(crate) fn pages(&self) -> usize {
        self.state.len()
    }

    /// References that this kernel keeps on a free page of such memory: as many as each page has
    /// while none is handed out, which is when to ask. 0, but for GENERIC memory in a kernel with
    /// the old rule.
    pub(crate) fn free_refs(&self) -> i32 {
        (0..self.pages())
            .filter_map(|i| self.page(i))
            .map(|page| page.refs())
            .min()
            .map_or(0, |refs| refs.max(0))
    }

    /// References of the `dev_pagemap` that registration left, before a page was in use: 1, and
    /// one for each page where the kernel does not count those in use.
    pub(crate) fn first_refs(&self) -> i64 {
        self.first_refs
    }

    /// References that the `dev_pagemap` has, beyond (or short of) those that registration left, that
    /// pages in use have, and that this module holds. They are counted by processor, and read one after
    /// the other: exact at a quiescent point only. Does not sleep.
    pub(crate) fn excess_refs(&self) -> i64 {
        // SAFETY: Registered by the type invariants.
        let refs = unsafe { bindings::zdm_pgmap_refs(self.raw()) } as i64;
        let own = self.used() + self.guards.load(Relaxed);
        // CAST: Both are less than the pages of a machine.
        refs - self.first_refs - own as i64
    }

    /// [`DevPagemap::excess_refs`], once it does not change any more; `None` where it goes on to change,
    /// as somebody is at work. May sleep, where it is not 0 at once.
    pub(crate) fn settled_excess(&self) -> Option<i64> {
        let mut excess = self.excess_refs();
        let mut same = 0;
        for _ in 0..SETTLE_TRIES {
            if excess == 0 || same == SETTLED {
                return Some(excess);
            }
            fsleep(Delta::from_millis(1));
            let before = core::mem::replace(&mut excess, self.excess_refs());
            same = if before == excess { same + 1 } else { 0 };
        }
        None
    }

    /// Takes a reference of the `dev_pagemap` that nobody owns, or drops it again, and says whether it
    /// did. Only for fault injection.
    pub(crate) fn leak_ref(&self, leak: bool) -> bool {
        if !leak {
            let some = self.leaked.cmpxchg(1, 0, Full).is_ok();
            if some {
                // SAFETY: It was leaked below.
                unsafe { bindings::zdm_pgmap_put(self.raw()) };
            }
            return some;
        }
        self.leaked.cmpxchg(0, 1, Full).is_ok()
            // SAFETY: Registered by the type invariants.
            && unsafe { bindings::zdm_pgmap_tryget_live(self.raw()) }
    }

    /// Takes the module's functions from a `dev_pagemap` that cannot be unregistered. To be called
    /// when no page is in use and nobody uses `self` any more but core mm.
    pub(super) fn orphan(&self) {
        // SAFETY: Core mm calls none of them for a page that is not in use, and `self` is kept for
        // good.
        unsafe { (*self.raw()).ops = &self.no_ops };
    }

    /// `pfns` as a list for [`Migration::of_device_pages`](super::migrate::Migration::of_device_pages);
    /// `None` unless all of them are pages of this pagemap.
    pub(crate) fn device_pfns<'a>(&'a self, pfns: &'a [usize]) -> Option<DevicePfns<'a>> {
        let range = self.first_pfn..self.first_pfn + self.pages();
        if !pfns.iter().all(|pfn| range.contains(pfn)) {
            return None;
        }
        // SAFETY: Checked above. The pagemap stays registered while it is borrowed.
        Some(unsafe { DevicePfns::from_raw(pfns) })
    }

    /// Whether, from page `index` on, pages are free by the allocator and have nothing that a free
    /// page must not have: how many. Does not sleep.
    ///
    /// Says the same as looking at each page, at a cost of about reading them.
    pub(crate) fn clean_pages(&self, index: usize, most: usize) -> usize {
        let n = most.min(self.pages().saturating_sub(index));
        let Some(state) = self.state.get(index..index + n) else {
            return 0;
        };
        // SAFETY: There are struct pages and states for `n` pages; an atomic may be read as what it
        // is an atomic of.
        unsafe { bindings::zdm_clean_pages(self.first_pfn + index, state.as_ptr().cast(), n) }
    }

    /// Reads up to `most` struct pages from that of page `index` on, and does nothing with them.
    pub(crate) fn read_pages(&self, index: usize, most: usize) -> usize {
        let n = most.min(self.pages().saturating_sub(index));
        if let Some(page) = self.page(index) {
            // SAFETY: There are `n` struct pages.
            core::hint::black_box(unsafe { bindings::zdm_read_pages(page.as_ptr(), n) });
        }
        n
    }

    /// Base pages that are handed out.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// Page frame number of page 0.
    pub(crate) fn first_pfn(&self) -> usize {
        self.first_pfn
    }

    /// Index of page frame `pfn`, if it is one of the pagemap's.
    pub(crate) fn index_of_pfn(&self, pfn: usize) -> Option<usize> {
        let index = pfn.checked_sub(self.first_pfn)?;
        (index < self.pages()).then_some(index)
    }

    /// A view of page `index`, `None` beyond the end.
    pub(crate) fn page(&self, index: usize) -> Option<PageView<'_>> {
        if index >= self.pages() {
            return None;
        }
        // SAFETY: The pagemap has struct pages for all its pfns by the type invariants.
        let page = unsafe { bindings::zdm_pfn_to_page(self.first_pfn + index) };
        // SAFETY: The pagemap stays registered while `self` is borrowed.
        NonNull::new(page).map(|page| unsafe { PageView::from_raw(page) })
    }

    /// The order of the folio in use that page `index` is the head of.
    pub(crate) fn order_in_use(&self, index: usize) -> Option<u32> {
        order_in_use(self.state.get(index)?.load(Relaxed))
    }

    /// Hands the folio out whose first page has number `index`, of the order of `backing`.
    ///
    /// Wraps `zone_device_folio_init()`. Does not sleep.
    ///
    /// # Errors
    ///
    /// Gives the backing back when a page of the folio is in use or not in the state that a free
    /// page must have, and when the backing is for another type of memory.
    pub(crate) fn hand_out(
        &self,
        index: usize,
        backing: Backing,
    ) -> Result<LockedDeviceFolio, HandOutError> {
        let order = backing.order();
        let pages = 1 << order;
        let end = index.saturating_add(pages);
        let fits = index % pages == 0 && end <= self.pages();
        let suits = backing.is_some() == (self.memory == MemoryType::Private);
        let (true, true, Some(head)) = (fits, suits, self.page(index)) else {
            return Err(HandOutError::NoSuchFolio(backing));
        };
        let state = &self.state[index];
        // Not in use yet: a tail that was left over may still name this page as its head.
        if state.cmpxchg(FREE, HELD, Full).is_err() {
            return Err(HandOutError::InUse(backing));
        }
        // SAFETY: There are so many pages, and the first one is no folio in use.
        let idle = unsafe { bindings::zdm_idle_pages(head.as_ptr(), pages) };
        for i in index + idle..end {
            if !self.page(i).is_some_and(|page| self.is_idle(page)) {
                state.store(FREE, Relaxed);
                return Err(HandOutError::NotFree(backing, i));
            }
        }
        state.store(in_use(order), Relaxed);
        self.used.add(pages, Relaxed);
        self.begin_use();
        let page = head.as_ptr();
        // SAFETY: The pages are free: none has a reference, and `state` keeps others away.
        unsafe { bindings::zdm_folio_init(page, self.pgmap.get(), order) };
        // SAFETY: The folio is ours now.
        // INVARIANT: `zone_device_data` owns the backing while the folio is in use.
        unsafe { backing.into_raw().store(page) };
        // SAFETY: The folio was left locked and with one reference.
        Ok(unsafe { LockedDeviceFolio::from_raw(NonNull::new_unchecked(page), order) })
    }

    /// One folio more is in use: the first one pins the module for all of them. The caller runs for
    /// a file of the module's, or for a folio in use. Does not sleep.
    fn begin_use(&self) {
        if self.folios.fetch_add(1, Full) == 0 {
            ModulePin::take().leak();
        }
    }

    /// One folio less is. The last thing that is done for it: the module may be unloaded.
    ///
    /// # Safety
    ///
    /// [`DevPagemap::begin_use`] must have been called for every call.
    unsafe fn end_use(&self) {
        if self.folios.fetch_sub(1, Full) == 1 {
            // SAFETY: Leaked by whoever made the first folio of these one in use: each change from
            // none to some has taken one, before its folio could be freed.
            drop(unsafe { ModulePin::from_leaked() });
        }
    }

    /// Whether nothing refers to `page`, so that it may be initialised.
    fn is_idle(&self, page: PageView<'_>) -> bool {
        let bits = page.bits();
        if bits.is_referenced() || bits.is_locked() {
            return false;
        }
        if !bits.is_tail() {
            return true;
        }
        // A tail has no references of its own: what matters is whether its folio is still there.
        // SAFETY: The page is valid, and the head of a folio of ours is a page of ours.
        let head = self.index_of(unsafe { bindings::zdm_compound_head(page.as_ptr()) });
        let end = self
            .order_in_use(head)
            .map_or(0, |order| head + (1 << order));
        end <= self.index_of(page.as_ptr())
    }

    /// Spoils a page that is not handed out, and says whether it did. Only for fault injection.
    pub(crate) fn corrupt_free_page(&self, index: usize, fault: Corruption) -> bool {
        let Some(page) = self.page(index) else {
            return false;
        };
        let state = &self.state[index];
        if page.bits().is_tail() || state.cmpxchg(FREE, HELD, Full).is_err() {
            return false;
        }
        let page = page.as_ptr();
        // SAFETY: For all three: the page is free and kept from being handed out, so nobody relies
        // on what it says.
        unsafe {
            match fault {
                Corruption::Refs(refs) => bindings::zdm_set_page_count(page, refs),
                Corruption::Mapping(mapping) => bindings::zdm_set_page_mapping(page, mapping),
                Corruption::AnonExclusive(set) => bindings::zdm_set_anon_exclusive(page, set),
            }
        }
        state.store(FREE, Relaxed);
        true
    }

    /// Frees a page once more that is not in use, and says whether it did. Only for fault injection:
    /// nothing but a report comes of it.
    pub(crate) fn free_again(&self, index: usize) -> bool {
        let Some(page) = self.page(index) else {
            return false;
        };
        if self.order_in_use(index).is_some() || page.bits().is_tail() {
            return false;
        }
        // SAFETY: It is a folio of this pagemap; one that is not in use is left alone.
        unsafe { Self::folio_free(page.as_ptr().cast()) };
        true
    }

    /// # Safety
    ///
    /// `page` must be a page of a registered `DevPagemap<T>` that outlives `'a`.
    unsafe fn of_page<'a>(page: *mut bindings::page) -> &'a Self {
        // SAFETY: By the caller's contract.
        unsafe { Self::of_pgmap(bindings::zdm_page_pgmap(page)) }
    }

    /// # Safety
    ///
    /// `pgmap` must be that of a registered `DevPagemap<T>` that outlives `'a`.
    unsafe fn of_pgmap<'a>(pgmap: *mut bindings::dev_pagemap) -> &'a Self {
        // SAFETY: By the caller's contract.
        unsafe { &*kernel::container_of!(Opaque::cast_from(pgmap), Self, pgmap) }
    }

    fn index_of(&self, page: *mut bindings::page) -> usize {
        // SAFETY: The callers give pages of this pagemap.
        unsafe { bindings::zdm_page_to_pfn(page) }.wrapping_sub(self.first_pfn)
    }

    /// # Safety
    ///
    /// Only to be called by core mm, with a folio of this kind of pagemap.
    unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
        let page: *mut bindings::page = folio.cast();
        let mut freed = bindings::zdm_freed::default();
        // SAFETY: Core mm frees a valid folio.
        unsafe { bindings::zdm_look_at_freed(page, &mut freed) };
        // SAFETY: The pagemap is alive until this folio is counted as freed, which happens after the
        // call.
        let map = unsafe { Self::of_pgmap(freed.pgmap) };
        // SAFETY: The folio is valid and nobody else's any more.
        let view = unsafe { PageView::from_raw(NonNull::new_unchecked(page)) };
        let (index, order) = (freed.pfn.wrapping_sub(map.first_pfn), freed.order);
        let handed_out = order_in_use(map.state[index].xchg(FREE, Full));
        if handed_out.is_some() {
            let backing = RawBacking::from_data(freed.data);
            // SAFETY: The folio is nobody else's.
            unsafe { RawBacking::NONE.store(page) };
            // SAFETY: The folio owned the backing by the type invariants, and is gone.
            unsafe { backing.free(order) };
            map.used.fetch_sub(1 << order, Relaxed);
        }
        map.ops
            .folio_free(FreedFolio::new(view, index, order, handed_out));
        if handed_out.is_some() {
            // SAFETY: This folio's use began when it was handed out, or split off one in use.
            // Unloading still waits for this function to return: core mm drops the pagemap's
            // reference afterwards.
            unsafe { map.end_use() };
        }
    }

    /// A large folio was split: gives `tail` what it needs of `head`'s, or, without a tail, ends
    /// the split for the head itself. Does not sleep.
    ///
    /// # Safety
    ///
    /// Only to be called by core mm, with folios of this kind of pagemap that it is splitting.
    unsafe extern "C" fn folio_split(head: *mut bindings::folio, tail: *mut bindings::folio) {
        let page: *mut bindings::page = head.cast();
        // SAFETY: Core mm keeps the folio, and so its pagemap.
        let map = unsafe { Self::of_page(page) };
        let target: *mut bindings::page = if tail.is_null() { page } else { tail.cast() };
        // SAFETY: Both folios are frozen: core mm is the only one who uses them.
        let order = unsafe { bindings::zdm_folio_order(target) };
        let index = map.index_of(target);
        map.state[index].store(in_use(order), Relaxed);
        map.ops.folio_split(index, order);
        if tail.is_null() {
            return;
        }
        // SAFETY: As above.
        unsafe { bindings::zdm_folio_inherit(tail, head) };
        // SAFETY: The backing is that of the folio being split.
        let backing = unsafe { RawBacking::of(page).split() };
        // SAFETY: As above.
        unsafe { backing.store(page) };
        let part = backing.part(index - map.index_of(page));
        // SAFETY: As above.
        // INVARIANT: The tail owns its part of the block from here on.
        unsafe { part.store(target) };
        // The tail is a folio in use of its own.
        map.begin_use();
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
        // SAFETY: As above, for the duration of this call.
        let fault = unsafe { VmFault::from_raw(vmf, &map.owner, map.first_pfn) };
        match map.ops.migrate_to_ram(&fault) {
            Ok(()) => 0,
            Err(err) => err.to_vm_fault(),
        }
    }
}
