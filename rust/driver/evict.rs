// SPDX-License-Identifier: GPL-2.0

//! Eviction: device memory goes back to the system, wherever it is mapped.

#![forbid(unsafe_code)]

use super::{
    chunk::Chunk,
    device::Device,
    pool::{
        OpenerId,
        MAX_CHUNKS, //
    },
};
use crate::{
    audit::{
        Check,
        Invariant,
        Violation, //
    },
    mm::{
        migrate::{
            DevicePfns,
            Migration,
            PfnBuffer,
            Setup,
            MAX_PAGES, //
        },
        registration::PagemapRef,
        system_folio::SystemFolio, //
    },
};
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Times that pages which would not move are tried again, 5 ms apart: who holds one for a moment may
/// lose its processor for longer than that on a busy machine.
const TRIES: usize = 200;

/// Folios that would not move which are put on record one by one.
const STUCK_RECORDS: usize = 8;

/// Folios that are taken from an opener's list at a time.
const BATCH: usize = 128;

/// Page frame numbers of one chunk that are evicted together.
struct Batch {
    chunk: Option<PagemapRef<Chunk>>,
    pfns: KVVec<usize>,
    buffer: PfnBuffer,
}

impl Batch {
    /// For up to `pages` pages at a time. May sleep.
    fn new(pages: usize) -> Result<Self> {
        let pages = pages.min(MAX_PAGES);
        Ok(Self {
            chunk: None,
            pfns: KVVec::with_capacity(pages, GFP_KERNEL)?,
            buffer: PfnBuffer::new(pages)?,
        })
    }

    /// Adds the folio of `order` at `index` of `chunk`, after what was added before is evicted if
    /// there is no room left. May sleep.
    fn add(&mut self, device: &Device, chunk: PagemapRef<Chunk>, index: usize, order: u32) {
        let pages = 1 << order;
        let same = self
            .chunk
            .as_ref()
            .is_some_and(|known| known.ops().number() == chunk.ops().number());
        if !same || self.pfns.len() + pages > self.pfns.capacity() {
            self.evict(device);
        }
        let first = chunk.first_pfn() + index;
        // Core mm wants room for each page of a large folio, and meets each page by itself where
        // the folio was split meanwhile.
        for pfn in first..first + pages {
            if self.pfns.push_within_capacity(pfn).is_err() {
                break;
            }
        }
        self.chunk = Some(chunk);
    }

    /// Evicts what was added. May sleep.
    fn evict(&mut self, device: &Device) {
        let Some(chunk) = self.chunk.take() else {
            return;
        };
        if let Some(list) = DevicePfns::new(&*chunk, &self.pfns) {
            device.evict_pages(Migration::of_device_pages(&mut self.buffer, &list));
        }
        self.pfns.clear();
    }
}

impl Device {
    /// Returns the pages of `opener` to system memory, at a cost that follows how many there are.
    /// May sleep, and takes a bounded time: what would not move is put on record and stays.
    pub(super) fn evict(&self, opener: OpenerId) {
        let moved = self.try_often(
            || self.memory().pool.owned(opener),
            |pages| self.evict_owned(opener, pages),
        );
        if moved {
            return;
        }
        let mut stuck = [(0, 0); STUCK_RECORDS];
        let (n, left) = {
            let mut memory = self.memory();
            (
                memory.pool.next_owned(opener, &mut stuck),
                memory.pool.owned(opener),
            )
        };
        for &(page, _) in &stuck[..n] {
            let located = self.locate(page);
            if let Some((chunk, index)) = located {
                self.report_stuck(&chunk, index);
            }
        }
        if left > 0 {
            pr_err!(
                "{} device pages would not move; the module stays loaded\n",
                left
            );
        }
    }

    /// Returns all pages to system memory and unregisters what is free then; the device gets new
    /// memory when it is wanted. May sleep, and takes a bounded time.
    ///
    /// # Errors
    ///
    /// `EBUSY` when pages would not move or the pagemap is held, which is put on record; their chunk
    /// stays.
    pub(super) fn release_memory(&self) -> Result {
        let _growth = self.growth.lock();
        let mut result = Ok(());
        for number in 0..MAX_CHUNKS {
            if self.chunk(number).is_none() {
                continue;
            }
            // Who migrates meanwhile would fill it again as fast as it is emptied.
            self.memory().pool.close_chunk(number);
            // By what the pool says: a migration under way has pages that are in nobody's use yet.
            let moved = self.try_often(
                || self.memory().pool.taken(number),
                |_| self.evict_chunk(number),
            );
            // Pages that were set aside are used by nobody, and never free.
            let unused = moved || self.chunk(number).is_some_and(|chunk| chunk.used() == 0);
            // Memory whose pagemap is held stays: it could not be unregistered.
            let leak = unused && self.report_leak(number);
            if moved && !leak && self.remove_chunk(number) {
                continue;
            }
            self.memory().pool.open_chunk(number);
            result = Err(EBUSY);
            if let Some(chunk) = self.chunk(number) {
                let used = (0..chunk.pages()).filter(|&i| chunk.order_in_use(i).is_some());
                for index in used.take(STUCK_RECORDS) {
                    self.report_stuck(&chunk, index);
                }
            }
        }
        result
    }

    /// Unregisters chunk `number` if all of it is free, and says whether it was.
    fn remove_chunk(&self, number: usize) -> bool {
        // Dropped without the lock.
        let removed = self.memory().remove(number);
        removed.is_some()
    }

    /// Calls `evict` with the number of pages that are `left`, until there are none or they would
    /// not move for a second. Whether none are left.
    fn try_often(&self, left: impl Fn() -> usize, evict: impl Fn(usize) -> Result) -> bool {
        let mut tries = 0;
        loop {
            let before = left();
            if before == 0 {
                return true;
            }
            if evict(before).is_err() {
                pr_warn!("no memory to evict with, trying again\n");
            }
            let after = left();
            if after != 0 && after >= before {
                // Somebody holds the pages for a moment, or for good.
                tries += 1;
                if tries > TRIES {
                    return false;
                }
                fsleep(Delta::from_millis(5));
            }
        }
    }

    /// Tries each folio of the `pages` pages of `opener` once.
    fn evict_owned(&self, opener: OpenerId, pages: usize) -> Result {
        let mut batch = Batch::new(pages)?;
        let mut list = [(0, 0); BATCH];
        let mut left = pages;
        while left > 0 {
            let room = left.min(BATCH);
            let n = self.memory().pool.next_owned(opener, &mut list[..room]);
            if n == 0 {
                break;
            }
            for &(page, order) in &list[..n] {
                left = left.saturating_sub(1 << order);
                let located = self.locate(page);
                if let Some((chunk, index)) = located {
                    batch.add(self, chunk, index, order);
                }
            }
        }
        batch.evict(self);
        Ok(())
    }

    /// Tries each folio of chunk `number` once.
    fn evict_chunk(&self, number: usize) -> Result {
        let mut batch = Batch::new(MAX_PAGES)?;
        let Some(chunk) = self.chunk(number) else {
            return Ok(());
        };
        for index in 0..chunk.pages() {
            let Some(order) = chunk.order_in_use(index) else {
                continue;
            };
            if let Some(chunk) = self.chunk(number) {
                batch.add(self, chunk, index, order);
            }
        }
        batch.evict(self);
        Ok(())
    }

    fn evict_pages(&self, mut migration: Migration<'_, Setup>) {
        let stats = &self.core.stats;
        for i in 0..migration.len() {
            let Some(order) = migration.source(i) else {
                continue;
            };
            // Without memory the folio stays; the caller tries again. It is not moved in pages:
            // core mm does that for a range of an area only.
            match SystemFolio::alloc(order) {
                Ok(folio) => migration.copy_to_system(i, 0, folio),
                Err(_) => stats.failed_alloc.add(1 << order),
            }
        }
        let moved = self
            .core
            .finish(migration.copied(), |pfn| self.last_of_pfn(pfn));
        stats.evicted.add(moved.pages);
        stats.large_to_system.add(moved.large);
    }

    /// Puts page `index` on record, which an eviction leaves behind, unless it was freed since.
    fn report_stuck(&self, chunk: &PagemapRef<Chunk>, index: usize) {
        if chunk.order_in_use(index).is_none() {
            return;
        }
        let stuck = chunk.page(index).map(|page| {
            let refs = u64::try_from(page.refs()).unwrap_or(0);
            Violation::on(page, Invariant::Teardown, Check::Stuck, 0, refs)
        });
        chunk.ops().judge(index, stuck);
    }
}
