// SPDX-License-Identifier: GPL-2.0

//! Eviction: the contents of device memory move back to the system, wherever the pages are mapped.

#![forbid(unsafe_code)]

use crate::{
    audit::{
        check_stuck,
        Moment, //
    },
    driver::{
        device::{
            chunk::Chunk,
            dmirror_device::{
                lock_killable,
                Device,
                RemovedChunk, //
            },
            page_backed::{
                Migration,
                PageBacked, //
            },
        },
        devmem::{
            ClientId,
            MAX_CHUNKS, //
        },
    },
    mm::{
        migrate::migration::{
            PfnBuffer,
            Setup,
            MAX_PAGES, //
        },
        page::system_folio::{
            SystemFolio,
            SystemFolios, //
        },
        pagemap::registration::PagemapRef,
        sync::task::check_signals, //
    },
    stamp::{
        may_log,
        Topic, //
    },
};
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The number of attempts, 5 ms apart, to move pages that do not move at once. On a busy machine a
/// task that holds a page for a moment may lose its processor for longer than one attempt.
const TRIES: usize = 200;

/// The number of attempts that an attempt of a killed task counts as.
const KILLED_COST: usize = 10;

/// The remaining attempts of an eviction.
struct Patience(usize);

impl Patience {
    fn new() -> Self {
        Self(TRIES)
    }

    /// Waits for a moment. Returns false if it has waited often enough. A killed task waits less
    /// often, because it must end. May sleep.
    fn wait(&mut self) -> bool {
        let cost = if check_signals().is_err() {
            KILLED_COST
        } else {
            1
        };
        let Some(left) = self.0.checked_sub(cost) else {
            return false;
        };
        self.0 = left;
        fsleep(Delta::from_millis(5));
        true
    }
}

/// The result of an attempt to release a chunk.
enum Release {
    /// The chunk is gone.
    Done,
    /// Its pagemap is held.
    Held,
    /// Some of its pages moved.
    Moving,
    /// None of its pages moved, as memory was `short` or for another reason.
    Stuck { short: bool },
}

/// The number of stuck folios that are reported one by one.
const STUCK_RECORDS: usize = 8;

/// The number of folios that are taken from a client's list at a time.
const BATCH: usize = 128;

/// The page frame numbers of one chunk that are evicted together.
struct Batch {
    chunk: Option<PagemapRef<Chunk>>,
    pfns: KVVec<usize>,
    buffer: PfnBuffer,
    /// Whether there was no memory for a folio.
    short: bool,
}

impl Batch {
    /// Makes a batch for up to `pages` pages. May sleep.
    fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            chunk: None,
            pfns: KVVec::with_capacity(pages.min(MAX_PAGES), GFP_KERNEL)?,
            buffer: PfnBuffer::new(MAX_PAGES)?,
            short: false,
        })
    }

    /// Adds the folio of `order` at `index` of chunk `number`. If there is no room left, first
    /// evicts the batch. May sleep.
    fn add(&mut self, device: &Device, number: usize, index: usize, order: u32) {
        let pages = 1 << order;
        let same = |chunk: &PagemapRef<Chunk>| chunk.ops().number() == number;
        let fits = self.pfns.len() + pages <= self.pfns.capacity();
        if !fits || !self.chunk.as_ref().is_some_and(same) {
            self.evict(device);
            // Look the chunk up once for all folios of the batch.
            self.chunk = device.chunk(number);
        }
        let Some(chunk) = &self.chunk else { return };
        let first = chunk.first_pfn() + index;
        // Core mm needs an entry for each page of a large folio, and handles each page separately
        // if the folio was split meanwhile.
        for pfn in first..first + pages {
            if self.pfns.push_within_capacity(pfn).is_err() {
                break;
            }
        }
    }

    /// Evicts the batch. May sleep.
    fn evict(&mut self, device: &Device) {
        let Some(chunk) = self.chunk.take() else {
            return;
        };
        if let Some(list) = chunk.device_pfns(&self.pfns) {
            if let Ok(migration) = Migration::of_device_pages(&mut self.buffer, &list, &PageBacked)
            {
                self.short |= device.evict_pages(migration, None);
            }
        }
        self.pfns.clear();
    }
}

impl Device {
    /// Returns the pages of `client` to system memory, at a cost that grows with their number. May
    /// sleep, for a bounded time: pages that do not move are reported and stay.
    pub(in crate::driver) fn evict(&self, client: ClientId) {
        let mut short = false;
        let moved = self.try_often(
            || self.memory().allocator.owned(client),
            |pages| {
                short = self.evict_owned(client, pages)?;
                Ok(())
            },
        );
        if moved {
            // This lets the module be unloaded as soon as the file is closed.
            self.chunks().for_each(|chunk| chunk.finish_use());
            return;
        }
        let mut stuck = [(0, 0); STUCK_RECORDS];
        let (n, left) = {
            let mut memory = self.memory();
            (
                memory.allocator.next_owned(client, &mut stuck),
                memory.allocator.owned(client),
            )
        };
        if !short {
            let located = stuck[..n].iter().filter_map(|&(page, _)| self.locate(page));
            self.report_stuck(located);
        }
        if left > 0 && may_log(Topic::Stuck) {
            let reason = if short {
                " for lack of free memory"
            } else {
                ""
            };
            pr_err!(
                "{} device pages would not move{}; the module stays loaded\n",
                left,
                reason
            );
        }
    }

    /// Returns all pages to system memory and unregisters what is free then; the device gets new
    /// memory when it is wanted. May sleep. The wait for pages that do not move is
    /// as long as that for the pages of one file, however many chunks there are, and growth goes on
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// `EBUSY` when pages would not move or the pagemap is held, which is put on record; their chunk
    /// stays. `EINTR` on a fatal signal.
    pub(in crate::driver) fn release_memory(&self) -> Result {
        let _releasing = lock_killable(&self.releasing)?;
        let mut left = [false; MAX_CHUNKS];
        for (number, left) in left.iter_mut().enumerate() {
            *left = self.chunk(number).is_some();
            // Otherwise migrations would fill the chunk as fast as the eviction empties it.
            self.memory().allocator.close_chunk(number);
        }
        let result = self.release_chunks(&mut left);
        for (number, _) in left.iter().enumerate().filter(|(_, left)| **left) {
            self.memory().allocator.open_chunk(number);
        }
        result
    }

    /// Releases the chunks that `left` marks. The chunks that `left` marks afterwards stay closed.
    fn release_chunks(&self, left: &mut [bool; MAX_CHUNKS]) -> Result {
        let mut result = Ok(());
        let mut patience = Patience::new();
        loop {
            let mut moved = false;
            let mut short = false;
            for (number, left) in left.iter_mut().enumerate().filter(|(_, left)| **left) {
                match self.release_chunk(number)? {
                    Release::Done => *left = false,
                    Release::Held => {
                        self.memory().allocator.open_chunk(number);
                        *left = false;
                        result = Err(EBUSY);
                    }
                    Release::Moving => moved = true,
                    Release::Stuck { short: now } => short |= now,
                }
            }
            if !left.contains(&true) {
                return result;
            }
            check_signals()?;
            if !moved && !patience.wait() {
                self.report_left(left, short);
                return Err(EBUSY);
            }
        }
    }

    /// Tries once to move all pages of chunk `number` and to unregister it.
    fn release_chunk(&self, number: usize) -> Result<Release> {
        // The allocator also counts pages that a migration has reserved, but does not use yet.
        let before = self.memory().allocator.taken(number);
        let mut short = false;
        if before != 0 {
            short = self.evict_chunk(number)?;
            let after = self.memory().allocator.taken(number);
            if after != 0 {
                return Ok(if after < before {
                    Release::Moving
                } else {
                    Release::Stuck { short }
                });
            }
        }
        // Memory whose pagemap is held could not be unregistered, so it stays.
        if self.report_leak(number) {
            return Ok(Release::Held);
        }
        Ok(if self.remove_chunk(number)? {
            Release::Done
        } else {
            // A page was freed late, or allocated before the chunk was closed.
            Release::Stuck { short }
        })
    }

    /// Reports what is left of the chunks that `left` marks.
    fn report_left(&self, left: &[bool; MAX_CHUNKS], short: bool) {
        let left = left.iter().enumerate().filter(|(_, left)| **left);
        let chunks = || left.clone().filter_map(|(number, _)| self.chunk(number));
        for chunk in chunks() {
            // Quarantined pages are neither in use nor free.
            if chunk.used() == 0 {
                self.report_leak(chunk.ops().number());
            }
        }
        if short {
            return;
        }
        self.report_stuck(chunks().flat_map(|chunk| {
            let mut used = [None; STUCK_RECORDS];
            let indices = (0..chunk.pages()).filter(|&i| chunk.order_in_use(i).is_some());
            for (place, index) in used.iter_mut().zip(indices) {
                *place = Some(index);
            }
            let number = chunk.ops().number();
            let used = used.into_iter().flatten();
            used.filter_map(move |index| Some((self.chunk(number)?, index)))
        }));
    }

    /// Unregisters chunk `number` if all of it is free. Returns whether it was.
    fn remove_chunk(&self, number: usize) -> Result<bool> {
        let growth = lock_killable(&self.growth)?;
        // The chunk is dropped without the locks.
        let removed = self.memory().remove(number);
        drop(growth);
        Ok(removed.map(RemovedChunk::unregister).is_some())
    }

    /// Calls `evict` with the number of pages that are `left`, until none are left or they have not
    /// moved for a second. Returns whether none are left.
    fn try_often(&self, left: impl Fn() -> usize, mut evict: impl FnMut(usize) -> Result) -> bool {
        let mut patience = Patience::new();
        loop {
            let before = left();
            if before == 0 {
                return true;
            }
            if evict(before).is_err() && may_log(Topic::Short) {
                pr_warn!("no memory to evict with, trying again\n");
            }
            let after = left();
            if after != 0 && after >= before && !patience.wait() {
                return false;
            }
        }
    }

    /// Tries each folio of the `pages` pages of `client` once. Returns whether memory was short.
    fn evict_owned(&self, client: ClientId, pages: usize) -> Result<bool> {
        let mut batch = Batch::new(pages)?;
        let mut list = [(0, 0); BATCH];
        let chunk_pages = self.config.chunk_pages.get();
        let mut left = pages;
        while left > 0 {
            let room = left.min(BATCH);
            let n = self
                .memory()
                .allocator
                .next_owned(client, &mut list[..room]);
            if n == 0 {
                break;
            }
            for &(page, order) in &list[..n] {
                left = left.saturating_sub(1 << order);
                let page = page as usize;
                batch.add(self, page / chunk_pages, page % chunk_pages, order);
            }
        }
        batch.evict(self);
        Ok(batch.short)
    }

    /// Tries each folio of chunk `number` once, and returns whether memory was short.
    ///
    /// # Errors
    ///
    /// `EINTR` on a fatal signal, `ENOMEM`.
    fn evict_chunk(&self, number: usize) -> Result<bool> {
        let mut batch = Batch::new(MAX_PAGES)?;
        let Some(chunk) = self.chunk(number) else {
            return Ok(false);
        };
        for index in 0..chunk.pages() {
            if index % MAX_PAGES == 0 {
                check_signals()?;
            }
            let Some(order) = chunk.order_in_use(index) else {
                continue;
            };
            batch.add(self, number, index, order);
        }
        batch.evict(self);
        Ok(batch.short)
    }

    /// Evicts the sources of `migration` that were allocated for client `of`, or for any. Returns whether memory
    /// was short. A large folio for which no folio of its order is free moves in pages. May sleep.
    pub(super) fn evict_pages(
        &self,
        mut migration: Migration<'_, Setup>,
        of: Option<ClientId>,
    ) -> bool {
        let stats = &self.core.stats;
        let mut short = false;
        self.be_slow();
        // The number of pages that have a destination, and whether some are parts of a large folio.
        let (mut filled, mut in_pages) = (0, false);
        let mut pages = SystemFolios::anywhere(migration.len());
        let mut near = None;
        for i in 0..migration.len() {
            let Some(order) = migration.source(i) else {
                continue;
            };
            if !of.is_none_or(|client| self.is_of(&mut near, migration.source_pfn(i), client)) {
                continue;
            }
            if order > 0 {
                if let Ok(folio) = SystemFolio::alloc(order) {
                    if migration.copy_to_system(i, 0, folio).is_ok() {
                        filled += 1 << order;
                    }
                    continue;
                }
                stats.fell_back(order);
                in_pages = true;
            }
            for part in 0..1 << order {
                // Without memory the page stays, and the caller tries again. Core mm splits a folio for the
                // destination of its first page only.
                let Ok(folio) = pages.alloc(0) else {
                    stats.failed_alloc.add((1 << order) - part);
                    short = true;
                    break;
                };
                // A page with lost contents stays, like one that is held.
                if migration.copy_to_system(i, part, folio).is_ok() {
                    filled += 1;
                }
            }
        }
        // The memory of the device fails no copy that has begun. If it did, the pages would be
        // tried again.
        let Ok(migration) = migration.copied() else {
            return short;
        };
        let moved = self.core.finish(migration, |pfn| self.last_of_pfn(pfn));
        stats.evicted(moved);
        // Some kernels split no folio that is evicted. It waits for a free folio of its order.
        short || in_pages && moved.pages < filled
    }

    /// Whether the page with page frame number `pfn` was allocated for `client`. `near` is the chunk of the page
    /// that was looked at before.
    fn is_of(
        &self,
        near: &mut Option<PagemapRef<Chunk>>,
        pfn: Option<usize>,
        client: ClientId,
    ) -> bool {
        let found = pfn.and_then(|pfn| self.locate_near(near, pfn));
        found.and_then(|(chunk, index)| chunk.ops().movers().of(index)) == Some(client.number())
    }

    /// Reports those of `pages`, which an eviction leaves behind, that were not freed or changed since. May
    /// sleep.
    fn report_stuck(&self, pages: impl Iterator<Item = (PagemapRef<Chunk>, usize)>) {
        let moment = self.moment();
        let stuck = |chunk: &PagemapRef<Chunk>, index| {
            chunk.order_in_use(index)?;
            check_stuck(chunk.page(index)?, moment)
        };
        let mut found = KVec::new();
        for (chunk, index) in pages {
            let Some(violation) = stuck(&chunk, index) else {
                continue;
            };
            // Without memory only the first ones are reported.
            if found.push((chunk, index, violation), GFP_KERNEL).is_err() {
                break;
            }
        }
        if !found.is_empty() && moment == Moment::Busy {
            // A task that moves one of them may have been preempted for longer than the eviction waited.
            if self.core.preempted.wait().is_err() {
                return;
            }
        }
        for (n, (chunk, index, violation)) in found.iter().enumerate() {
            // A console is slow, and a killed task must end.
            if n >= STUCK_RECORDS && check_signals().is_err() {
                return;
            }
            let lasting = stuck(chunk, *index).filter(|now| now == violation);
            chunk.ops().judge(*index, lasting);
        }
    }
}
