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
    migrate::Select,
    module::ModulePin,
    page::PageView,
    region::{
        MemRegion,
        RegionError, //
    },
    PMD_ORDER, //
};
use crate::bindings;
use core::{
    mem::ManuallyDrop,
    ops::Deref,
    ptr::NonNull, //
};
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
    types::Opaque, //
};

/// Identifies the owner of pagemaps to core mm: `dev_pagemap.owner`.
///
/// The address of this object is the identity, so that no two owners that live at the same time
/// are equal and none can be made up.
pub(crate) struct PgmapOwner {
    // Not zero-sized, for the sake of a unique address.
    _address: u8,
}

impl PgmapOwner {
    /// Makes a new identity. May sleep.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self { _address: 0 }, GFP_KERNEL)?)
    }

    pub(super) fn as_ptr(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

/// `enum memory_type`, as far as this module registers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryType {
    /// Memory that the CPU cannot reach.
    Private,
    /// Memory that the CPU reaches as its own.
    Coherent,
    /// The same, and it may be pinned for long. Also what device-dax registers.
    Generic,
}

impl MemoryType {
    fn raw(self) -> bindings::memory_type {
        match self {
            Self::Private => bindings::MEMORY_DEVICE_PRIVATE,
            Self::Coherent => bindings::MEMORY_DEVICE_COHERENT,
            Self::Generic => bindings::MEMORY_DEVICE_GENERIC,
        }
    }

    /// Memory for a folio of `order`: a block of system memory for PRIVATE memory, nothing for
    /// memory that the CPU can reach. May sleep.
    pub(crate) fn alloc_backing(self, order: u32) -> Result<Backing> {
        match self {
            Self::Private => Backing::alloc(order),
            Self::Coherent | Self::Generic => Ok(Backing::none(order)),
        }
    }

    /// Whether this kernel migrates pages to and from such memory at all.
    pub(crate) fn is_migratable(self) -> bool {
        Select::Device(self).flags() != 0
    }

    /// The largest order of a folio that this kernel can migrate to and from such memory.
    ///
    /// A kernel with `migrate_device_max_order()` says so itself. One without it knows large
    /// folios in PRIVATE memory only: it would not take a large COHERENT one back out. Where nothing
    /// is migrated to such memory the order is 0.
    pub(crate) fn max_order(self) -> u32 {
        if !self.is_migratable() {
            return 0;
        }
        // SAFETY: Always safe in a context that may sleep.
        let said = unsafe { bindings::zdm_migrate_device_max_order(self.raw()) };
        if let Ok(order) = u32::try_from(said) {
            return order.min(PMD_ORDER);
        }
        // SAFETY: Always safe.
        let thp = unsafe { bindings::zdm_thp_migration_supported() };
        if self == Self::Private && thp {
            PMD_ORDER
        } else {
            0
        }
    }
}

/// What the owner of a pagemap is called for: `struct dev_pagemap_ops`.
pub(crate) trait PagemapOps: Send + Sync + Sized + 'static {
    /// The last reference on a folio is gone.
    ///
    /// Called by whoever dropped it, in any context, interrupts included: must not sleep, and
    /// take no lock that is ever taken with interrupts on. The folio may be handed out again as
    /// soon as the owner's allocator knows it.
    fn folio_free(&self, folio: FreedFolio<'_>);
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
///   page owns the [`RawBacking`] of a PRIVATE folio, and a pin on the module is held for it.
#[pin_data]
pub(crate) struct DevPagemap<T: PagemapOps> {
    #[pin]
    pgmap: Opaque<bindings::dev_pagemap>,
    memory: MemoryType,
    first_pfn: usize,
    state: KVVec<Atomic<i8>>,
    used: Atomic<usize>,
    owner: Arc<PgmapOwner>,
    ops: T,
}

// SAFETY: The `dev_pagemap` is used through core mm, which does its own locking.
unsafe impl<T: PagemapOps> Send for DevPagemap<T> {}
// SAFETY: As above; the rest is atomic or constant.
unsafe impl<T: PagemapOps> Sync for DevPagemap<T> {}

impl<T: PagemapOps> DevPagemap<T> {
    /// Of memory that the CPU can reach. A kernel in which a free GENERIC page has a reference
    /// never calls `folio_free` for one, nor has this module one in use there.
    const OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
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

    /// Base pages that are handed out.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// Page frame number of page 0.
    pub(crate) fn first_pfn(&self) -> usize {
        self.first_pfn
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
        for i in index..end {
            if !self.page(i).is_some_and(|page| self.is_idle(page)) {
                state.store(FREE, Relaxed);
                return Err(HandOutError::NotFree(backing, i));
            }
        }
        state.store(in_use(order), Relaxed);
        self.used.add(pages, Relaxed);
        ModulePin::take().leak();
        let page = head.as_ptr();
        // SAFETY: The pages are free: none has a reference, and `state` keeps others away.
        unsafe { bindings::zdm_folio_init(page, self.pgmap.get(), order) };
        // SAFETY: The folio is ours now.
        // INVARIANT: `zone_device_data` owns the backing while the folio is in use.
        unsafe { backing.into_raw().store(page) };
        // SAFETY: The folio was left locked and with one reference.
        Ok(unsafe { LockedDeviceFolio::from_raw(NonNull::new_unchecked(page), order) })
    }

    /// Whether nothing refers to `page`, so that it may be initialised.
    fn is_idle(&self, page: PageView<'_>) -> bool {
        let bits = page.bits();
        if page.refs() != 0 || bits.is_locked() {
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

    /// Overwrites the reference count of a page that is not handed out, and says whether it did.
    ///
    /// The page cannot be handed out while the count is not zero. Only for fault injection.
    pub(crate) fn corrupt_free_page(&self, index: usize, refs: i32) -> bool {
        let Some(page) = self.page(index) else {
            return false;
        };
        let state = &self.state[index];
        if page.bits().is_tail() || state.cmpxchg(FREE, HELD, Full).is_err() {
            return false;
        }
        // SAFETY: The page is free and kept from being handed out, so nobody relies on its count.
        unsafe { bindings::zdm_set_page_count(page.as_ptr(), refs) };
        state.store(FREE, Relaxed);
        true
    }

    /// # Safety
    ///
    /// `page` must be a page of a registered `DevPagemap<T>` that outlives `'a`.
    unsafe fn of_page<'a>(page: *mut bindings::page) -> &'a Self {
        // SAFETY: By the caller's contract.
        let pgmap = unsafe { bindings::zdm_page_pgmap(page) };
        // SAFETY: As above.
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
        // SAFETY: Core mm frees a valid folio, whose pagemap is alive until this one is counted
        // as freed, which happens after the call.
        let map = unsafe { Self::of_page(page) };
        // SAFETY: The folio is valid and nobody else's any more.
        let view = unsafe { PageView::from_raw(NonNull::new_unchecked(page)) };
        let (index, order) = (map.index_of(page), view.order());
        let handed_out = order_in_use(map.state[index].xchg(FREE, Full));
        if handed_out.is_some() {
            // SAFETY: The folio is nobody else's.
            let backing = unsafe { RawBacking::of(page) };
            // SAFETY: As above.
            unsafe { RawBacking::NONE.store(page) };
            // SAFETY: The folio owned the backing by the type invariants, and is gone.
            unsafe { backing.free(order) };
            map.used.fetch_sub(1 << order, Relaxed);
        }
        map.ops
            .folio_free(FreedFolio::new(view, index, order, handed_out));
        if handed_out.is_some() {
            // SAFETY: One was leaked for this folio. Unloading still waits for this function to
            // return: core mm drops the pagemap's reference afterwards.
            drop(unsafe { ModulePin::from_leaked() });
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
        map.state[map.index_of(target)].store(in_use(order), Relaxed);
        if tail.is_null() {
            return;
        }
        // SAFETY: As above.
        unsafe { bindings::zdm_folio_inherit(tail, head) };
        // SAFETY: The backing is that of the folio being split.
        let backing = unsafe { RawBacking::of(page).split() };
        // SAFETY: As above.
        unsafe { backing.store(page) };
        let part = backing.part(map.index_of(target) - map.index_of(page));
        // SAFETY: As above.
        // INVARIANT: The tail owns its part of the block from here on.
        unsafe { part.store(target) };
        // The tail is a folio in use of its own.
        ModulePin::take().leak();
    }
}

impl<T: PrivateOps> DevPagemap<T> {
    const PRIVATE_OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
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
        let fault = unsafe { VmFault::from_raw(vmf, &map.owner) };
        match map.ops.migrate_to_ram(&fault) {
            Ok(()) => 0,
            Err(err) => err.to_vm_fault(),
        }
    }
}

/// A [`DevPagemap`] and the duty to unregister it.
///
/// Dropping it calls `memunmap_pages()`, which would wait forever for a page that is still in use.
/// With such pages the memory stays registered instead, for good, and the module stays loaded. May
/// sleep.
pub(crate) struct Registration<T: PagemapOps> {
    // Dropped before the region that it lies in.
    map: ManuallyDrop<Pin<KBox<DevPagemap<T>>>>,
    region: ManuallyDrop<MemRegion>,
}

impl<T: PagemapOps> Registration<T> {
    /// Registers `bytes` of PRIVATE memory for `owner`. May sleep.
    ///
    /// Wraps `request_free_mem_region()` and `memremap_pages()`.
    ///
    /// # Errors
    ///
    /// [`RegionError::Unaligned`] when `bytes` is no multiple of 2 MiB, `NoSpace` when addresses
    /// or memory are short.
    pub(crate) fn private(bytes: usize, owner: Arc<PgmapOwner>, ops: T) -> Result<Self, RegionError>
    where
        T: PrivateOps,
    {
        let region = MemRegion::request_free(bytes)?;
        let raw_ops = const { &DevPagemap::<T>::PRIVATE_OPS };
        Self::new(region, MemoryType::Private, raw_ops, owner, ops)
    }

    /// Registers the `bytes` of memory at physical address `start` as COHERENT memory of `owner`.
    /// May sleep.
    ///
    /// Wraps `request_mem_region()` and `memremap_pages()`.
    ///
    /// # Errors
    ///
    /// As `MemRegion::request()`, and `NoSpace` when memory is short.
    pub(crate) fn coherent(
        start: u64,
        bytes: usize,
        owner: Arc<PgmapOwner>,
        ops: T,
    ) -> Result<Self, RegionError> {
        let region = MemRegion::request(start, bytes)?;
        let raw_ops = const { &DevPagemap::<T>::OPS };
        Self::new(region, MemoryType::Coherent, raw_ops, owner, ops)
    }

    /// As [`Registration::coherent`], of GENERIC memory.
    pub(crate) fn generic(
        start: u64,
        bytes: usize,
        owner: Arc<PgmapOwner>,
        ops: T,
    ) -> Result<Self, RegionError> {
        let region = MemRegion::request(start, bytes)?;
        let raw_ops = const { &DevPagemap::<T>::OPS };
        Self::new(region, MemoryType::Generic, raw_ops, owner, ops)
    }

    fn new(
        region: MemRegion,
        memory: MemoryType,
        raw_ops: &'static bindings::dev_pagemap_ops,
        owner: Arc<PgmapOwner>,
        ops: T,
    ) -> Result<Self, RegionError> {
        let mut state =
            KVVec::with_capacity(region.pages(), GFP_KERNEL).map_err(|_| RegionError::NoSpace)?;
        for _ in 0..region.pages() {
            state
                .push_within_capacity(Atomic::new(FREE))
                .map_err(|_| RegionError::NoSpace)?;
        }
        let (range, first_pfn) = (region.range(), region.first_pfn());
        let raw_owner = owner.as_ptr();
        let map = KBox::try_pin_init(
            try_pin_init!(DevPagemap {
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
                owner,
                ops,
            }),
            GFP_KERNEL,
        )
        .map_err(|_| RegionError::NoSpace)?;
        // INVARIANT: Registered above; no page was handed out.
        Ok(Self {
            map: ManuallyDrop::new(map),
            region: ManuallyDrop::new(region),
        })
    }

    /// Keeps the memory registered for as long as the result lives; `None` while it is being
    /// unregistered. Does not sleep.
    pub(crate) fn get(&self) -> Option<PagemapRef<T>> {
        // SAFETY: Registered by the type invariants.
        if !unsafe { bindings::zdm_pgmap_tryget_live(self.map.pgmap.get()) } {
            return None;
        }
        // INVARIANT: Taken above.
        Some(PagemapRef(NonNull::from(&**self)))
    }
}

impl<T: PagemapOps> Deref for Registration<T> {
    type Target = DevPagemap<T>;

    fn deref(&self) -> &DevPagemap<T> {
        &self.map
    }
}

impl<T: PagemapOps> Drop for Registration<T> {
    fn drop(&mut self) {
        if self.used() != 0 {
            pr_err!(
                "pagemap at pfn {:#x} stays registered: {} pages in use\n",
                self.first_pfn,
                self.used()
            );
            // What stays registered calls this module's code, and bears its name.
            ModulePin::take().leak();
            return;
        }
        // SAFETY: Registered by the type invariants, and unregistered only here. Waits for each
        // `PagemapRef`.
        unsafe { bindings::memunmap_pages(self.map.pgmap.get()) };
        // SAFETY: Not used afterwards; core mm has forgotten the pagemap.
        unsafe { ManuallyDrop::drop(&mut self.map) };
        // SAFETY: Not used afterwards; nothing lies in the region any more.
        unsafe { ManuallyDrop::drop(&mut self.region) };
    }
}

/// A reference on a pagemap that is registered. To be held for a bounded time: unregistering it
/// waits.
///
/// # Invariants
///
/// Owns a reference of the `dev_pagemap`, so that `memunmap_pages()` does not return and the
/// [`DevPagemap`] is not freed.
pub(crate) struct PagemapRef<T: PagemapOps>(NonNull<DevPagemap<T>>);

impl<T: PagemapOps> Deref for PagemapRef<T> {
    type Target = DevPagemap<T>;

    fn deref(&self) -> &DevPagemap<T> {
        // SAFETY: Not freed by the type invariants.
        unsafe { self.0.as_ref() }
    }
}

impl<T: PagemapOps> Drop for PagemapRef<T> {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants.
        unsafe { bindings::zdm_pgmap_put(self.pgmap.get()) };
    }
}
