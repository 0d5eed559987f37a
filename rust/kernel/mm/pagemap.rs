// SPDX-License-Identifier: GPL-2.0

//! Registered ZONE_DEVICE memory.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    device_folio::{
        FreedFolio,
        HandOutError,
        LockedDeviceFolio, //
    },
    fault::{
        FaultError,
        VmFault, //
    },
    module::ModulePin,
    page::PageView,
    system_folio::SystemFolio,
    PAGE_SHIFT, //
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

/// What the owner of a pagemap is called for: `struct dev_pagemap_ops`.
pub(crate) trait PagemapOps: Send + Sync + Sized + 'static {
    /// The last reference on a folio is gone.
    ///
    /// Called by whoever dropped it, possibly under a spinlock: must not sleep. The folio may be
    /// handed out again as soon as the owner's allocator knows it.
    fn folio_free(&self, folio: FreedFolio<'_>);

    /// The CPU touched a folio of PRIVATE memory. The mmap lock or the lock of the area is held
    /// for reading, and the folio is locked. May sleep.
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError>;
}

/// A chunk of MEMORY_DEVICE_PRIVATE memory: struct pages without memory that the CPU can reach.
///
/// Each page in use is backed by a [`SystemFolio`], in the place of a device's own memory.
///
/// # Invariants
///
/// - `pgmap` is registered with `memremap_pages()`, and its `ops` are those of `T`.
/// - `in_use[i]` says whether page `i` was handed out and did not come back through
///   `folio_free` yet; while it is set `zone_device_data` of that page owns a [`SystemFolio`].
/// - A pin on the module is held for every page in use.
#[pin_data]
pub(crate) struct DevPagemap<T: PagemapOps> {
    #[pin]
    pgmap: Opaque<bindings::dev_pagemap>,
    first_pfn: usize,
    in_use: KVVec<Atomic<bool>>,
    used: Atomic<usize>,
    owner: Arc<PgmapOwner>,
    ops: T,
}

// SAFETY: The `dev_pagemap` is used through core mm, which does its own locking.
unsafe impl<T: PagemapOps> Send for DevPagemap<T> {}
// SAFETY: As above; the rest is atomic or constant.
unsafe impl<T: PagemapOps> Sync for DevPagemap<T> {}

impl<T: PagemapOps> DevPagemap<T> {
    const OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
        folio_free: Some(Self::folio_free),
        migrate_to_ram: Some(Self::migrate_to_ram),
        memory_failure: None,
        folio_split: None,
    };

    /// Number of base pages.
    pub(crate) fn pages(&self) -> usize {
        self.in_use.len()
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

    /// Hands out page `index`, locked and with one reference, backed by `backing`.
    ///
    /// Wraps `zone_device_page_init()`. Refused, with the backing given back, when the page is in
    /// use or not in the state that a free page must have. Does not sleep.
    pub(crate) fn hand_out(
        &self,
        index: usize,
        backing: SystemFolio,
    ) -> Result<LockedDeviceFolio, HandOutError> {
        let Some(page) = self.page(index) else {
            return Err(HandOutError::NoSuchPage(backing));
        };
        if self.in_use[index].xchg(true, Full) {
            return Err(HandOutError::InUse(backing));
        }
        if page.refs() != 0 || page.is_locked() {
            self.in_use[index].store(false, Relaxed);
            return Err(HandOutError::NotFree(backing));
        }
        self.used.add(1, Relaxed);
        ModulePin::take().leak();
        // SAFETY: The page is free: it has no reference, and `in_use` keeps others away.
        unsafe { bindings::zone_device_page_init(page.as_ptr(), self.pgmap.get(), 0) };
        // SAFETY: The page is ours now.
        // INVARIANT: `zone_device_data` owns the backing while the page is in use.
        unsafe { bindings::zdm_set_zone_device_data(page.as_ptr(), backing.into_raw().cast()) };
        // SAFETY: `zone_device_page_init()` left the page locked and with one reference.
        Ok(unsafe { LockedDeviceFolio::from_raw(NonNull::new_unchecked(page.as_ptr())) })
    }

    /// Whether page `index` is handed out.
    pub(crate) fn is_in_use(&self, index: usize) -> bool {
        self.in_use
            .get(index)
            .is_some_and(|used| used.load(Relaxed))
    }

    /// Overwrites the reference count of a page that is not handed out, and says whether it did.
    ///
    /// The page cannot be handed out while the count is not zero. Only for fault injection.
    pub(crate) fn corrupt_free_page(&self, index: usize, refs: i32) -> bool {
        let Some(page) = self.page(index) else {
            return false;
        };
        if self.in_use[index].xchg(true, Full) {
            return false;
        }
        // SAFETY: The page is free and kept from being handed out, so nobody relies on its count.
        unsafe { bindings::zdm_set_page_count(page.as_ptr(), refs) };
        self.in_use[index].store(false, Relaxed);
        true
    }

    /// # Safety
    ///
    /// `pgmap` must be embedded in a registered `DevPagemap<T>` that outlives `'a`.
    unsafe fn from_pgmap<'a>(pgmap: *mut bindings::dev_pagemap) -> &'a Self {
        // SAFETY: By the caller's contract.
        unsafe { &*kernel::container_of!(Opaque::cast_from(pgmap), Self, pgmap) }
    }

    /// # Safety
    ///
    /// Only to be called by core mm, with a folio of this kind of pagemap.
    unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
        let page: *mut bindings::page = folio.cast();
        // SAFETY: Core mm frees a valid folio, whose pagemap is alive until this one is counted
        // as freed, which happens after the call.
        let map = unsafe { Self::from_pgmap(bindings::zdm_page_pgmap(page)) };
        // SAFETY: The folio is valid and nobody else's any more.
        let view = unsafe { PageView::from_raw(NonNull::new_unchecked(page)) };
        let index = view.pfn() - map.first_pfn;
        // SAFETY: As above.
        let data = unsafe { bindings::zdm_zone_device_data(page) };
        // SAFETY: As above.
        unsafe { bindings::zdm_set_zone_device_data(page, core::ptr::null_mut()) };
        let was_in_use = map.in_use[index].xchg(false, Full);
        if was_in_use {
            if let Some(backing) = NonNull::new(data.cast()) {
                // SAFETY: `zone_device_data` owns the backing by the type invariants.
                drop(unsafe { SystemFolio::from_raw(backing) });
            }
            map.used.fetch_sub(1, Relaxed);
        }
        map.ops.folio_free(FreedFolio::new(view, index, was_in_use));
        if was_in_use {
            // SAFETY: `hand_out()` leaked one for this page. Unloading still waits for this
            // function to return: core mm drops the pagemap's reference afterwards.
            drop(unsafe { ModulePin::from_leaked() });
        }
    }

    /// # Safety
    ///
    /// Only to be called by core mm, with a fault on a page of this kind of pagemap.
    unsafe extern "C" fn migrate_to_ram(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: Core mm gives a valid fault, whose page it holds a reference on.
        let pgmap = unsafe { bindings::zdm_page_pgmap((*vmf).page) };
        // SAFETY: The page's reference keeps its pagemap alive.
        let map = unsafe { Self::from_pgmap(pgmap) };
        // SAFETY: As above, for the duration of this call.
        let fault = unsafe { VmFault::from_raw(vmf, &map.owner) };
        match map.ops.migrate_to_ram(&fault) {
            Ok(()) => 0,
            Err(err) => err.to_vm_fault(),
        }
    }
}

/// The range of physical addresses of a pagemap, given back when dropped.
struct MemRegion {
    start: u64,
    bytes: u64,
}

impl MemRegion {
    /// Takes `bytes` that no memory of the machine answers to. May sleep.
    fn request_free(bytes: usize) -> Result<Self> {
        // SAFETY: `iomem_resource` is a static of the kernel, the name a static string.
        let res = from_err_ptr(unsafe {
            bindings::request_free_mem_region(
                &raw mut bindings::iomem_resource,
                bytes,
                kernel::str::as_char_ptr_in_const_context(c"hmm_dmirror"),
            )
        })?;
        // SAFETY: The resource is ours until it is released.
        let (start, end) = unsafe { ((*res).start, (*res).end) };
        Ok(Self {
            start,
            bytes: end - start + 1,
        })
    }
}

impl Drop for MemRegion {
    fn drop(&mut self) {
        // SAFETY: The region is ours, and `memunmap_pages()` was called for what was on it.
        unsafe { bindings::zdm_release_mem_region(self.start, self.bytes) };
    }
}

/// A [`DevPagemap`] and the duty to unregister it.
///
/// Dropping it calls `memunmap_pages()`, which would wait forever for a page that is still in use.
/// With such pages the memory stays registered instead, and the module stays loaded (a page in use
/// holds a pin on it). May sleep.
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
    /// `EINVAL` when `bytes` is no multiple of 2 MiB, and whatever the C functions return, mostly
    /// `ERANGE` (no free physical addresses) and `ENOMEM`.
    pub(crate) fn private(bytes: usize, owner: Arc<PgmapOwner>, ops: T) -> Result<Self> {
        if bytes == 0 || bytes % kernel::sizes::SZ_2M != 0 {
            return Err(EINVAL);
        }
        let region = MemRegion::request_free(bytes)?;
        let first_pfn = (region.start >> PAGE_SHIFT) as usize;
        let pages = bytes >> PAGE_SHIFT;
        let mut in_use = KVVec::with_capacity(pages, GFP_KERNEL)?;
        for _ in 0..pages {
            in_use.push(Atomic::new(false), GFP_KERNEL)?;
        }
        let (start, end) = (region.start, region.start + region.bytes - 1);
        let raw_owner = owner.as_ptr();
        let map = KBox::try_pin_init(
            try_pin_init!(DevPagemap {
                pgmap <- Opaque::try_ffi_init(move |pgmap: *mut bindings::dev_pagemap| {
                    // SAFETY: `pgmap` is valid for writes; all zeroes is its initial state.
                    unsafe { pgmap.write_bytes(0, 1) };
                    // SAFETY: As above.
                    let raw = unsafe { &mut *pgmap };
                    raw.type_ = bindings::MEMORY_DEVICE_PRIVATE;
                    raw.nr_range = 1;
                    // SAFETY: The union is all zeroes, which is a valid range.
                    let range = unsafe { raw.__bindgen_anon_1.range.as_mut() };
                    *range = bindings::range { start, end };
                    raw.ops = &Self::OPS;
                    raw.owner = raw_owner;
                    // SAFETY: `pgmap` is set up, and pinned until it is unregistered.
                    from_err_ptr(unsafe { bindings::memremap_pages(pgmap, -1) })?;
                    Ok::<(), Error>(())
                }),
                first_pfn,
                in_use,
                used: Atomic::new(0),
                owner,
                ops,
            }),
            GFP_KERNEL,
        )?;
        // INVARIANT: Registered above; no page was handed out.
        Ok(Self {
            map: ManuallyDrop::new(map),
            region: ManuallyDrop::new(region),
        })
    }

    const OPS: bindings::dev_pagemap_ops = DevPagemap::<T>::OPS;
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
            return;
        }
        // SAFETY: Registered by the type invariants, and unregistered only here.
        unsafe { bindings::memunmap_pages(self.map.pgmap.get()) };
        // SAFETY: Not used afterwards; core mm has forgotten the pagemap.
        unsafe { ManuallyDrop::drop(&mut self.map) };
        // SAFETY: Not used afterwards; nothing lies in the region any more.
        unsafe { ManuallyDrop::drop(&mut self.region) };
    }
}
