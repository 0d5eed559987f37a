// SPDX-License-Identifier: GPL-2.0

//! Counters of a device, in base pages or events.

#![forbid(unsafe_code)]

use crate::{
    mm::{
        migrate::moved::{
            Moved,
            ORDERS, //
        },
        sync::once::add_once, //
    },
    uapi::{
        ZdmStats,
        ZDM_STATS_ORDERS, //
    },
};
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// A counter that only grows.
pub(super) struct Counter(Atomic<u64>);

impl Counter {
    fn new() -> Self {
        Self(Atomic::new(0))
    }

    #[inline]
    pub(super) fn add(&self, n: usize) {
        add_once(&self.0, n as u64);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The counters of `struct zdm_stats`, which documents them.
pub(super) struct Stats {
    pub(super) allocated: Counter,
    pub(super) cpu_faults: Counter,
    pub(super) device_faults: Counter,
    evicted: Counter,
    pub(super) failed_alloc: Counter,
    pub(super) failed_migrate: Counter,
    pub(super) large_to_device: Counter,
    pub(super) large_to_system: Counter,
    pub(super) large_fallback: Counter,
    pub(super) exclusive: Counter,
    pub(super) around: Counter,
    pub(super) around_hits: Counter,
    pub(super) around_waste: Counter,
    to_device_by_order: [Counter; ORDERS],
    to_system_by_order: [Counter; ORDERS],
}

// Every order has an element in the uapi.
const _: () = assert!(ORDERS <= ZDM_STATS_ORDERS as usize);

impl Stats {
    pub(super) fn new() -> Self {
        Self {
            allocated: Counter::new(),
            cpu_faults: Counter::new(),
            device_faults: Counter::new(),
            evicted: Counter::new(),
            failed_alloc: Counter::new(),
            failed_migrate: Counter::new(),
            large_to_device: Counter::new(),
            large_to_system: Counter::new(),
            large_fallback: Counter::new(),
            exclusive: Counter::new(),
            around: Counter::new(),
            around_hits: Counter::new(),
            around_waste: Counter::new(),
            to_device_by_order: core::array::from_fn(|_| Counter::new()),
            to_system_by_order: core::array::from_fn(|_| Counter::new()),
        }
    }

    /// Counts folios that moved to the device.
    #[inline]
    pub(super) fn moved_to_device(&self, moved: Moved) {
        add_each(&self.to_device_by_order, moved);
        add_some(&self.large_to_device, moved.large());
    }

    /// Counts a folio of `order` that is moved in pages.
    pub(super) fn fell_back(&self, order: u32) {
        if order > 0 {
            self.large_fallback.add(1);
        }
    }

    /// Counts folios that moved back.
    #[inline]
    pub(super) fn moved_to_system(&self, moved: Moved) {
        add_each(&self.to_system_by_order, moved);
        add_some(&self.large_to_system, moved.large());
    }

    /// Counts folios that were evicted.
    pub(super) fn evicted(&self, moved: Moved) {
        self.large_to_system.add(moved.large());
        add_each(&self.to_system_by_order, moved);
        // After the count of all that moved, which `to_uapi()` takes it from.
        self.evicted.add(moved.pages);
    }

    /// Converts the counters for user space, together with values that are not counted here.
    pub(super) fn to_uapi(
        &self,
        freed: u64,
        violations: u64,
        max_order: u32,
        free_refs: u64,
    ) -> ZdmStats {
        let evicted = self.evicted.get();
        let to_device_by_order = get_each(&self.to_device_by_order);
        let to_system_by_order = get_each(&self.to_system_by_order);
        ZdmStats {
            allocated: self.allocated.get(),
            freed,
            to_device: pages_of(&to_device_by_order),
            to_system: pages_of(&to_system_by_order).saturating_sub(evicted),
            cpu_faults: self.cpu_faults.get(),
            device_faults: self.device_faults.get(),
            evicted,
            failed_alloc: self.failed_alloc.get(),
            failed_migrate: self.failed_migrate.get(),
            violations,
            large_to_device: self.large_to_device.get(),
            large_to_system: self.large_to_system.get(),
            large_fallback: self.large_fallback.get(),
            max_order: max_order.into(),
            exclusive: self.exclusive.get(),
            free_refs,
            around: self.around.get(),
            around_hits: self.around_hits.get(),
            around_waste: self.around_waste.get(),
            to_device_by_order,
            to_system_by_order,
        }
    }
}

/// The base pages of so many folios of each order.
fn pages_of(folios: &[u64]) -> u64 {
    let pages = folios.iter().enumerate();
    pages.map(|(order, folios)| folios << order).sum()
}

/// Counts `n`, which is 0 most often.
#[inline]
fn add_some(counter: &Counter, n: usize) {
    if n > 0 {
        counter.add(n);
    }
}

/// Counts the folios of each order.
#[inline]
fn add_each(counters: &[Counter; ORDERS], moved: Moved) {
    counters[0].add(moved.by_order[0].into());
    if moved.large() > 0 {
        add_large(counters, &moved);
    }
}

/// Counts the large folios of each order.
fn add_large(counters: &[Counter; ORDERS], moved: &Moved) {
    let moved = counters.iter().zip(moved.by_order).skip(1);
    for (counter, folios) in moved.filter(|(_, folios)| *folios > 0) {
        counter.add(folios.into());
    }
}

/// The counts of each order; no folio of a larger order can move.
fn get_each(counters: &[Counter; ORDERS]) -> [u64; ZDM_STATS_ORDERS as usize] {
    core::array::from_fn(|order| counters.get(order).map_or(0, Counter::get))
}
