// SPDX-License-Identifier: GPL-2.0

//! The duty to unregister ZONE_DEVICE memory, and references that put it off.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    memory_type::MemoryType,
    module::ModulePin,
    owner::PgmapOwner,
    pagemap::{
        DevPagemap,
        PagemapOps,
        PrivateOps, //
    },
    region::{
        MemRegion,
        RegionError, //
    }, //
};
use crate::bindings;
use core::{
    mem::ManuallyDrop,
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    }, //
};

/// A [`DevPagemap`] and the duty to unregister it.
///
/// Dropping it calls `memunmap_pages()`, which would wait forever for a page that is still in use.
/// With such pages the memory stays registered instead, for good, and the module stays loaded. So
/// it does with references of the `dev_pagemap` that nobody accounts for, without the module. May
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
        Self::at(MemoryType::Coherent, start, bytes, owner, ops)
    }

    /// As [`Registration::coherent`], of GENERIC memory.
    pub(crate) fn generic(
        start: u64,
        bytes: usize,
        owner: Arc<PgmapOwner>,
        ops: T,
    ) -> Result<Self, RegionError> {
        Self::at(MemoryType::Generic, start, bytes, owner, ops)
    }

    /// Registers memory that the CPU can reach, where it is.
    fn at(
        memory: MemoryType,
        start: u64,
        bytes: usize,
        owner: Arc<PgmapOwner>,
        ops: T,
    ) -> Result<Self, RegionError> {
        let region = MemRegion::request(start, bytes)?;
        Self::new(region, memory, const { &DevPagemap::<T>::OPS }, owner, ops)
    }

    fn new(
        region: MemRegion,
        memory: MemoryType,
        raw_ops: &'static bindings::dev_pagemap_ops,
        owner: Arc<PgmapOwner>,
        ops: T,
    ) -> Result<Self, RegionError> {
        let map = DevPagemap::register(&region, memory, raw_ops, owner, ops)?;
        // INVARIANT: Registered above.
        Ok(Self {
            map: ManuallyDrop::new(map),
            region: ManuallyDrop::new(region),
        })
    }

    /// Keeps the memory registered for as long as the result lives; `None` while it is being
    /// unregistered. Does not sleep.
    pub(crate) fn get(&self) -> Option<PagemapRef<T>> {
        // SAFETY: Registered by the type invariants.
        if !unsafe { bindings::zdm_pgmap_tryget_live(self.map.raw()) } {
            return None;
        }
        self.guards.add(1, Relaxed);
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
                self.first_pfn(),
                self.used()
            );
            // What stays registered calls this module's code, and bears its name.
            ModulePin::take().leak();
            return;
        }
        // `PagemapRef`s of others go, or are known: `memunmap_pages()` waits for them.
        let excess = self.settled_excess();
        if excess != Some(0) {
            // `memunmap_pages()` would wait for ever for the last one to go.
            pr_err!(
                "pagemap at pfn {:#x} stays registered: {} references too many on it\n",
                self.first_pfn(),
                excess.unwrap_or_default()
            );
            self.map.orphan();
            return;
        }
        // SAFETY: Registered by the type invariants, and unregistered only here. Waits for each
        // `PagemapRef`.
        unsafe { bindings::memunmap_pages(self.map.raw()) };
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
        self.guards.fetch_sub(1, Relaxed);
        // SAFETY: We own a reference by the type invariants.
        unsafe { bindings::zdm_pgmap_put(self.raw()) };
    }
}
