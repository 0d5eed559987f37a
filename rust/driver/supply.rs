// SPDX-License-Identifier: GPL-2.0

//! Folios of device memory for one migration.

#![forbid(unsafe_code)]

use super::{
    chunk::Chunk,
    device::Device,
    pool::OpenerId, //
};
use crate::{
    audit::{
        check_fresh,
        check_fresh_tail,
        check_handed_out,
        Check,
        Event,
        Invariant,
        Violation, //
    },
    mm::{
        backing::Backing,
        device_folio::{
            HandOutError,
            LockedDeviceFolio, //
        },
        registration::PagemapRef, //
    },
    stamp::log_clock,
};

/// Pages that are tried before one that is not fit to be handed out counts as none left.
const HAND_OUT_TRIES: usize = 16;

/// Pages that are taken from the pool at a time.
const BATCH: usize = 64;

/// Hands out folios for one opener, and takes pages from the pool in batches to do so. What was
/// taken and not used goes back when it is dropped.
pub(super) struct Supply<'a> {
    device: &'a Device,
    opener: OpenerId,
    /// Pages that will be asked for, at most.
    wanted: usize,
    batch: [u32; BATCH],
    /// What of the batch is not used yet.
    next: usize,
    end: usize,
    /// When the last pages were taken, by [`log_clock`].
    taken: u64,
    /// Where the last page was.
    chunk: Option<PagemapRef<Chunk>>,
}

impl<'a> Supply<'a> {
    /// For up to `wanted` pages. Does not sleep.
    pub(super) fn new(device: &'a Device, opener: OpenerId, wanted: usize) -> Self {
        Self {
            device,
            opener,
            wanted,
            batch: [0; BATCH],
            next: 0,
            end: 0,
            taken: 0,
            chunk: None,
        }
    }

    /// Hands out a folio of `order`, locked. May sleep, for its backing.
    ///
    /// A page that is not what a free page must be is reported, set aside, and the next one taken.
    pub(super) fn folio(&mut self, order: u32) -> Option<LockedDeviceFolio> {
        let core = &self.device.core;
        let mut backing = self.device.memory_type().alloc_backing(order).ok()?;
        // Bounded, so that an allocator that is broken ends in reports.
        for _ in 0..HAND_OUT_TRIES {
            let page = self.take(order)?;
            let index = self.locate(page)?;
            let chunk = self.chunk.as_ref()?;
            if self.check(chunk, index, order) {
                // Reported, and not to be used.
                self.set_aside(chunk, index, page, order);
                continue;
            }
            match chunk.hand_out(index, backing) {
                Ok(folio) => {
                    let ledger = chunk.ops().ledger();
                    ledger.note_at(self.taken, index, Event::HandedOut, order);
                    if core.auditor.is_on() {
                        self.check_fresh(chunk, index, &folio);
                    }
                    core.stats.allocated.add(1 << order);
                    return Some(folio);
                }
                Err(err) => backing = self.refused(chunk, index, page, err),
            }
        }
        None
    }

    /// Takes a free page, of a whole block for a large folio.
    fn take(&mut self, order: u32) -> Option<u32> {
        if order > 0 || self.next == self.end {
            self.taken = log_clock();
        }
        if order > 0 {
            return self.device.memory().pool.take(self.opener, order);
        }
        if self.next == self.end {
            let room = self.wanted.clamp(1, BATCH);
            self.next = 0;
            self.end = self
                .device
                .memory()
                .pool
                .take_many(self.opener, &mut self.batch[..room]);
        }
        let page = self.batch[..self.end].get(self.next).copied()?;
        self.next += 1;
        self.wanted = self.wanted.saturating_sub(1);
        Some(page)
    }

    /// Makes `chunk` that of `page`, and returns the page's index there.
    fn locate(&mut self, page: u32) -> Option<usize> {
        let pages = self.device.config.chunk_pages;
        let index = page as usize % pages;
        let known = self
            .chunk
            .as_ref()
            .is_some_and(|chunk| chunk.ops().number() == page as usize / pages);
        if !known {
            self.chunk = Some(self.device.locate(page)?.0);
        }
        Some(index)
    }

    /// I2, for each page of the folio of `order` at `index`; whether there was a violation. A page
    /// in use is the allocator's fault, which `refused()` reports.
    fn check(&self, chunk: &PagemapRef<Chunk>, index: usize, order: u32) -> bool {
        let pages = 1 << order;
        // Far cheaper than page by page, which only tells more.
        if !self.device.core.auditor.is_on()
            || chunk.clean_pages(index, pages) == pages
            || chunk.order_in_use(index).is_some()
        {
            return false;
        }
        let mut found = false;
        for i in index..index + pages {
            let outcome = chunk.page(i).and_then(check_handed_out);
            found |= chunk.ops().judge(i, outcome);
        }
        found
    }

    /// I2, for a folio that was just handed out, and each of its pages.
    fn check_fresh(&self, chunk: &PagemapRef<Chunk>, index: usize, folio: &LockedDeviceFolio) {
        let order = folio.order();
        let mut broken = chunk.ops().judge(index, check_fresh(folio.page(), order));
        // Far cheaper than page by page, which only tells more.
        if folio.has_clean_tails() {
            return;
        }
        for i in index + 1..index + (1 << order) {
            // What is wrong with all of them is said once.
            if broken {
                return;
            }
            let outcome = chunk.page(i).and_then(check_fresh_tail);
            broken = chunk.ops().judge(i, outcome);
        }
    }

    /// Reports a folio that could not be handed out, and gives the backing back.
    fn refused(
        &self,
        chunk: &PagemapRef<Chunk>,
        index: usize,
        page: u32,
        err: HandOutError,
    ) -> Backing {
        let mut set_aside = true;
        let judge = |i, outcome| chunk.ops().judge(i, outcome);
        match &err {
            // Somebody has it, and keeps it: the pool gave it out twice.
            HandOutError::InUse(_) => {
                set_aside = false;
                let twice = |view| Violation::on(view, Invariant::HandedOut, Check::State, 0, 1);
                judge(index, chunk.page(index).map(twice));
            }
            HandOutError::NotFree(_, bad) => {
                if let Some(view) = chunk.page(*bad) {
                    // Clean by itself, so part of a folio that is in use.
                    if !judge(*bad, check_handed_out(view)) {
                        let tail = Violation::on(view, Invariant::HandedOut, Check::Tail, 0, 1);
                        judge(*bad, Some(tail));
                    }
                }
            }
            HandOutError::NoSuchFolio(_) => {}
        }
        let backing = err.into_backing();
        if set_aside {
            self.set_aside(chunk, index, page, backing.order());
        }
        backing
    }

    /// Keeps a folio from being handed out again.
    fn set_aside(&self, chunk: &PagemapRef<Chunk>, index: usize, page: u32, order: u32) {
        chunk.ops().ledger().note(index, Event::SetAside, order);
        self.device.memory().pool.quarantine(page, order);
    }
}

impl Drop for Supply<'_> {
    fn drop(&mut self) {
        if self.next < self.end {
            let mut memory = self.device.memory();
            for &page in &self.batch[self.next..self.end] {
                memory.pool.put(page, 0);
            }
        }
    }
}
