// SPDX-License-Identifier: GPL-2.0

//! Folios of device memory for one migration.

#![forbid(unsafe_code)]

use crate::{
    audit::{
        check_allocated,
        check_fresh,
        check_fresh_tail,
        whole_pages,
        Check,
        Event,
        Invariant,
        Violation, //
    },
    driver::{
        device::{
            chunk::Chunk,
            dmirror_device::Device,
            page_backed::PageBacked, //
        },
        devmem::ClientId, //
    },
    mm::{
        page::{
            backing::{
                Backing,
                BackingBatch, //
            },
            device_folio::{
                FolioInitCause,
                LockedDeviceFolio, //
            },
        },
        pagemap::registration::PagemapRef,
        region::{
            free_folio::FreeFolio,
            memory_type::MemoryType, //
        },
    },
    params::param_strict,
    stamp::log_clock, //
};
use core::ops::Range;
use kernel::prelude::*;

/// The number of unfit pages in sequence after which the allocation fails.
const HAND_OUT_TRIES: usize = 16;

/// The number of pages that are taken from the allocator at a time.
const BATCH: usize = 64;

/// Allocates folios for one client, and takes pages from the allocator in batches. Dropping it
/// returns unused pages to the allocator.
pub(super) struct DevmemAlloc<'a> {
    device: &'a Device,
    client: ClientId,
    /// The largest number of pages that will be needed.
    wanted: usize,
    /// The numbers of the pages of the batch.
    pages: [u32; BATCH],
    /// The unused pages of the batch.
    batch: [Option<FreeFolio>; BATCH],
    /// The first unused page of the batch, and the end of the batch.
    next: usize,
    end: usize,
    /// The time when the last pages were taken, by [`log_clock`].
    taken: u64,
    /// Blocks for pages that have kept none.
    backing: BackingBatch,
    /// The unused pages of the batch that have kept none, once it is known.
    bare: Option<usize>,
    /// The chunk of the last page.
    chunk: Option<PagemapRef<Chunk>>,
    /// Pages of `chunk` that were found fit to be allocated.
    clean: Range<usize>,
    /// Base pages that were allocated. The statistics get the sum.
    allocated: usize,
}

impl<'a> DevmemAlloc<'a> {
    /// For up to `wanted` pages. Does not sleep.
    pub(super) fn new(device: &'a Device, client: ClientId, wanted: usize) -> Self {
        Self {
            device,
            client,
            wanted,
            pages: [0; BATCH],
            batch: [const { None }; BATCH],
            next: 0,
            end: 0,
            taken: 0,
            backing: BackingBatch::new(),
            bare: None,
            chunk: None,
            clean: 0..0,
            allocated: 0,
        }
    }

    /// Allocates a folio of `order`, locked. May sleep, to allocate the backing.
    ///
    /// A page that fails the free-page checks is reported and quarantined, and the next one is
    /// taken.
    pub(in crate::driver) fn folio(&mut self, order: u32) -> Option<LockedDeviceFolio> {
        let core = &self.device.core;
        let mut backing = None;
        if order > 0 {
            backing = Some(PageBacked::alloc(self.device.memory_type(), order).ok()?);
        }
        // The loop is bounded, so that a broken allocator causes a limited number of reports.
        for _ in 0..HAND_OUT_TRIES {
            let (page, folio) = self.take(order)?;
            if !self.locate(page) {
                self.put(page, folio);
                return None;
            }
            let chunk = self.chunk.as_ref()?;
            let Some(index) = chunk.index_of_pfn(folio.first_pfn()) else {
                self.lost(&folio);
                return None;
            };
            if order == 0 && !self.clean.contains(&index) {
                let pages = self.run(&folio);
                self.clean = index..index + self.clean_pages(chunk, index, pages);
            }
            let is_clean = order == 0 && self.clean.contains(&index);
            if !is_clean && self.check(chunk, index, order) {
                // Reported, and not to be used.
                self.quarantine(chunk, index, page, folio);
                continue;
            }
            let kept = if backing.is_none() {
                chunk.folio_init_kept(folio)
            } else {
                Err((folio, None))
            };
            let result = match kept {
                Ok(folio) => Ok(folio),
                Err((folio, Some(cause))) => Err((folio, cause)),
                Err((folio, None)) => {
                    let Some(own) = backing.take().or_else(|| self.alloc_backing(order)) else {
                        self.put(page, folio);
                        return None;
                    };
                    let chunk = self.chunk.as_ref()?;
                    chunk.folio_init(folio, own).map_err(|err| {
                        backing = Some(err.backing);
                        (err.folio, err.cause)
                    })
                }
            };
            let chunk = self.chunk.as_ref()?;
            match result {
                Ok(folio) => {
                    let ledger = chunk.ops().ledger();
                    ledger.note_at(self.taken, index, Event::HandedOut, order);
                    if core.auditor.is_on() {
                        self.check_fresh(chunk, index, &folio);
                    }
                    chunk.ops().movers().note(index, order, self.client);
                    self.allocated += 1 << order;
                    return Some(folio);
                }
                Err((folio, cause)) => {
                    self.refused(chunk, cause);
                    self.quarantine(chunk, index, page, folio);
                }
            }
        }
        None
    }

    /// Memory for a folio of `order`. May sleep.
    fn alloc_backing(&mut self, order: u32) -> Option<Backing> {
        let memory = self.device.memory_type();
        if order > 0 || memory != MemoryType::Private {
            return PageBacked::alloc(memory, order).ok();
        }
        // The other pages that are at hand and need as much: those of a batch are counted once.
        let bare = self.bare.unwrap_or_else(|| self.count_bare());
        self.bare = Some(bare.saturating_sub(1));
        Backing::alloc_from(&mut self.backing, 1 + bare).ok()
    }

    /// The unused pages of the batch that have kept no block, as far as they are of the current chunk.
    fn count_bare(&self) -> usize {
        let has_kept = |folio: &FreeFolio| self.chunk.as_ref().is_some_and(|c| c.has_kept(folio));
        let others = self.batch[self.next..self.end].iter().flatten();
        others.filter(|folio| !has_kept(folio)).count()
    }

    /// Takes a free folio, with its number.
    fn take(&mut self, order: u32) -> Option<(u32, FreeFolio)> {
        if order > 0 {
            self.taken = log_clock();
            return self.device.memory().allocator.take(self.client, order);
        }
        if self.next == self.end {
            self.taken = log_clock();
            let room = self.wanted.clamp(1, BATCH);
            self.next = 0;
            self.bare = None;
            let twice = {
                let mut memory = self.device.memory();
                let (pages, batch) = (&mut self.pages[..room], &mut self.batch[..room]);
                self.end = memory.allocator.take_many(self.client, pages, batch);
                memory.allocator.taken_twice()
            };
            if let Some(page) = twice {
                self.report_twice(page);
            }
        }
        let i = self.next;
        let folio = self.batch[..self.end].get_mut(i)?.take()?;
        self.next += 1;
        self.wanted = self.wanted.saturating_sub(1);
        Some((self.pages[i], folio))
    }

    /// Returns a folio to the allocator.
    fn put(&self, page: u32, folio: FreeFolio) {
        if let Err(folio) = self.device.memory().allocator.put(page, folio) {
            self.lost(&folio);
        }
    }

    /// Reports that `folio` belongs to no chunk. Its memory stays registered.
    #[cold]
    fn lost(&self, folio: &FreeFolio) {
        pr_err!("nobody has the folio at pfn {:#x}\n", folio.first_pfn());
    }

    /// Makes `chunk` the chunk of `page`. Returns whether there is one.
    fn locate(&mut self, page: u32) -> bool {
        let number = page as usize / self.device.config.chunk_pages;
        let chunk = self.chunk.as_ref();
        if chunk.is_none_or(|chunk| chunk.ops().number() != number) {
            self.chunk = self.device.chunk(number);
            self.clean = 0..0;
        }
        self.chunk.is_some()
    }

    /// Reports that the allocator took page `page` again, if it is in use. The type of a free folio
    /// makes that impossible, so only fault injection asks for this.
    #[cold]
    fn report_twice(&self, page: u32) {
        let Some((chunk, index)) = self.device.locate(page) else {
            return;
        };
        if chunk.order_in_use(index).is_some() {
            let twice = |view| Violation::on(view, Invariant::HandedOut, Check::State, 0, 1);
            chunk.ops().judge(index, chunk.page(index).map(twice));
        }
    }

    /// Pages in a row from `folio` on that are taken next, with `folio`.
    fn run(&self, folio: &FreeFolio) -> usize {
        let next = self.batch[self.next..self.end].iter().flatten();
        let follows =
            |(n, other): &(usize, &FreeFolio)| other.first_pfn() == folio.first_pfn() + 1 + n;
        1 + next.enumerate().take_while(follows).count()
    }

    /// I2, for up to `pages` pages from `index` on by one look: how many are as they must be, before the
    /// first one that needs a closer look.
    fn clean_pages(&self, chunk: &PagemapRef<Chunk>, index: usize, pages: usize) -> usize {
        if self.device.core.auditor.is_on() {
            whole_pages(chunk, index, pages)
        } else {
            0
        }
    }

    /// I2, for each page of the folio of `order` at `index`; whether there was a violation.
    fn check(&self, chunk: &PagemapRef<Chunk>, index: usize, order: u32) -> bool {
        let pages = 1 << order;
        // Checking the whole folio at once is cheaper; the per-page check only adds detail.
        if !self.device.core.auditor.is_on() || whole_pages(chunk, index, pages) == pages {
            return false;
        }
        let mut found = false;
        for i in index..index + pages {
            let outcome = chunk.page(i).and_then(check_allocated);
            found |= chunk.ops().judge(i, outcome);
        }
        found
    }

    /// I2: checks a folio that was just allocated, and each of its pages.
    fn check_fresh(&self, chunk: &PagemapRef<Chunk>, index: usize, folio: &LockedDeviceFolio) {
        let order = folio.order();
        let mut broken = chunk.ops().judge(index, check_fresh(folio.page(), order));
        // Checking the whole folio at once is cheaper; the per-page check only adds detail.
        if folio.has_clean_tails() && !param_strict() {
            return;
        }
        for i in index + 1..index + (1 << order) {
            // A fault of all pages is reported once.
            if broken {
                return;
            }
            let outcome = chunk.page(i).and_then(check_fresh_tail);
            broken = chunk.ops().judge(i, outcome);
        }
    }

    /// Reports a folio that could not be allocated.
    #[cold]
    fn refused(&self, chunk: &PagemapRef<Chunk>, cause: FolioInitCause) {
        let FolioInitCause::NotFree(bad) = cause else {
            return;
        };
        let Some(view) = chunk.page(bad) else {
            return;
        };
        // A page that is clean alone belongs to a folio that is in use.
        if !chunk.ops().judge(bad, check_allocated(view)) {
            let tail = Violation::on(view, Invariant::HandedOut, Check::Tail, 0, 1);
            chunk.ops().judge(bad, Some(tail));
        }
    }

    /// Keeps a folio from being allocated again.
    #[cold]
    fn quarantine(&self, chunk: &PagemapRef<Chunk>, index: usize, page: u32, folio: FreeFolio) {
        let order = folio.order();
        chunk.ops().ledger().note(index, Event::SetAside, order);
        if let Err(folio) = self.device.memory().allocator.quarantine(page, folio) {
            self.lost(&folio);
        }
    }
}

impl Drop for DevmemAlloc<'_> {
    fn drop(&mut self) {
        self.device.core.stats.allocated.add(self.allocated);
        if self.next < self.end {
            let mut memory = self.device.memory();
            for i in self.next..self.end {
                let Some(folio) = self.batch[i].take() else {
                    continue;
                };
                if let Err(folio) = memory.allocator.put(self.pages[i], folio) {
                    self.lost(&folio);
                }
            }
        }
    }
}
