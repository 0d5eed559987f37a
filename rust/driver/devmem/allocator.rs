// SPDX-License-Identifier: GPL-2.0

//! The allocator of device pages: it knows which pages are free and which client has the others.
//!
//! Page `n` of a chunk has the number of the chunk times the size of a chunk plus `n`. Folios have
//! any order up to [`PMD_ORDER`](crate::mm::PMD_ORDER). Taking or putting a folio costs the same
//! for every order, and whether it comes back in parts or not.

#![forbid(unsafe_code)]

use super::{
    free_blocks::{
        Blocks,
        FreeBlocks, //
    },
    owner_list::{
        ClientId,
        Entry,
        ListRoom,
        OwnerLists,
        Slot, //
    },
};
use crate::mm::region::free_folio::{
    FreeFolio,
    FreeRegion, //
};
use core::num::NonZeroUsize;
use kernel::prelude::*;

/// The largest number of chunks of a device.
pub(in crate::driver) const MAX_CHUNKS: usize = 16;

/// The parts of a chunk that the allocator does not own, so that their memory is allocated and
/// freed without its lock.
pub(in crate::driver) struct NewChunk {
    slots: KVVec<Slot>,
    blocks: Blocks,
}

impl NewChunk {
    /// Makes room for a chunk of `pages` pages, without the pages. May sleep.
    pub(in crate::driver) fn with_room(pages: usize) -> Result<Self> {
        Ok(Self {
            slots: OwnerLists::new_chunk(pages)?,
            blocks: Blocks::with_room(pages)?,
        })
    }

    /// Adds the pages.
    pub(in crate::driver) fn fill(&mut self, region: FreeRegion) {
        self.blocks.fill(region);
    }

    /// Calls `f` with each page that is not in use. `f` becomes the owner of the page.
    pub(in crate::driver) fn drain(&mut self, f: impl FnMut(FreeFolio)) {
        self.blocks.drain(f);
    }

    /// Calls `f` with the first page, if that is free.
    pub(in crate::driver) fn with_first<R>(&self, f: impl FnOnce(&FreeFolio) -> R) -> Option<R> {
        self.blocks.with_first(f)
    }
}

/// The pages of a device. To be kept under a spinlock; nothing but [`Allocator::new`] sleeps.
///
/// # Invariants
///
/// A page of a chunk is free or quarantined in `blocks`, part of an entry in `owners`, or both as
/// it was not given back yet.
pub(in crate::driver) struct Allocator {
    blocks: FreeBlocks,
    owners: OwnerLists,
    /// A page in use that must be reported as if it were taken once more (fault injection).
    twice: Option<u32>,
}

impl Allocator {
    /// An allocator without pages, for chunks of `chunk_pages` pages. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when a chunk is not a whole number of blocks, or larger than numbers go.
    pub(in crate::driver) fn new(chunk_pages: NonZeroUsize) -> Result<Self> {
        Ok(Self {
            blocks: FreeBlocks::new(MAX_CHUNKS, chunk_pages)?,
            owners: OwnerLists::new(MAX_CHUNKS, chunk_pages)?,
            twice: None,
        })
    }

    /// Adds the pages of a chunk, all free, and returns the number of its first page. The chunk
    /// gets the lowest number that none has.
    ///
    /// # Errors
    ///
    /// Gives `new` back when there is no number left or `new` is of the wrong size.
    pub(in crate::driver) fn add_chunk(&mut self, new: NewChunk) -> Result<u32, NewChunk> {
        let NewChunk { slots, blocks } = new;
        let number = self.owners.vacancy();
        let fits = slots.len() == self.owners.chunk_pages();
        let Some(number) = number.filter(|_| fits) else {
            return Err(NewChunk { slots, blocks });
        };
        match self.blocks.add_chunk(number, blocks) {
            Ok(()) => Ok(self.owners.add_chunk(number, slots)),
            Err(blocks) => Err(NewChunk { slots, blocks }),
        }
    }

    /// Makes the free pages of chunk `number` unavailable until the chunk is opened again. Closing
    /// and opening visit each of its blocks.
    pub(in crate::driver) fn close_chunk(&mut self, number: usize) {
        self.blocks.close_chunk(number);
    }

    /// Makes the free pages of chunk `number` available again, if there is such a chunk.
    pub(in crate::driver) fn open_chunk(&mut self, number: usize) {
        self.blocks.open_chunk(number);
    }

    /// The number of pages of chunk `number` that are not free, including pages that a migration
    /// has only reserved. Visits each of its blocks.
    pub(in crate::driver) fn taken(&self, number: usize) -> usize {
        self.blocks.taken(number)
    }

    /// Removes chunk `number`, whose number is vacant then. Returns `None` if there is no such
    /// chunk, or if a page is not free; quarantined pages are not free.
    pub(in crate::driver) fn remove_chunk(&mut self, number: usize) -> Option<NewChunk> {
        let blocks = self.blocks.remove_chunk(number)?;
        Some(NewChunk {
            slots: self.owners.remove_chunk(number),
            blocks,
        })
    }

    /// Calls `f` with each page of chunk `number` that is not in use, and removes the chunk.
    pub(in crate::driver) fn drain_chunk(&mut self, number: usize, f: impl FnMut(FreeFolio)) {
        self.blocks.take_chunk(number).drain(f);
        self.owners.remove_chunk(number);
    }

    /// The number of free pages.
    pub(in crate::driver) fn free(&self) -> usize {
        self.blocks.free()
    }

    /// The number of large folios that could be taken.
    pub(in crate::driver) fn free_large(&self) -> usize {
        self.blocks.whole()
    }

    /// Adds a client; `ENOSPC` if there is no room for one.
    pub(in crate::driver) fn add_client(&mut self) -> Result<ClientId> {
        self.owners.add()
    }

    /// The number of clients for which there is room without [`Allocator::swap_lists`].
    pub(in crate::driver) fn spare_clients(&self) -> usize {
        self.owners.spare()
    }

    /// The size that the room for more clients must have.
    pub(in crate::driver) fn wanted_lists(&self) -> usize {
        self.owners.wanted_lists()
    }

    /// Takes room for more clients. Returns the old room, which the caller frees without the lock.
    pub(in crate::driver) fn swap_lists(&mut self, new: ListRoom) -> ListRoom {
        self.owners.swap_lists(new)
    }

    /// Removes a client. Pages that it still has keep its number until they are freed.
    pub(in crate::driver) fn remove_client(&mut self, client: ClientId) {
        self.owners.remove(client);
    }

    /// Takes a free folio of order `order` for `client`, with the number of its first page.
    pub(in crate::driver) fn take(
        &mut self,
        client: ClientId,
        order: u32,
    ) -> Option<(u32, FreeFolio)> {
        let (page, folio) = self.blocks.take(order)?;
        self.owners.own(client, page, order);
        Some((page, folio))
    }

    /// Takes free pages of order 0 for `client`, as many as fit. Returns their number. `pages` gets
    /// the numbers of the pages.
    pub(in crate::driver) fn take_many(
        &mut self,
        client: ClientId,
        pages: &mut [u32],
        out: &mut [Option<FreeFolio>],
    ) -> usize {
        let n = self.blocks.take_pages(pages, out);
        self.owners.own_pages(client, &pages[..n]);
        n
    }

    /// The folio at page `page` is free again. A large one may come back in parts of any order.
    ///
    /// # Errors
    ///
    /// Gives `folio` back when no client has it or `page` is not its number.
    pub(in crate::driver) fn put(&mut self, page: u32, folio: FreeFolio) -> Result<(), FreeFolio> {
        if !self.end_use(page, folio.order()) {
            return Err(folio);
        }
        self.blocks.put(page, folio)
    }

    /// Keeps a folio from being taken again that was taken and failed the free-page checks.
    ///
    /// # Errors
    ///
    /// As [`Allocator::put`].
    pub(in crate::driver) fn quarantine(
        &mut self,
        page: u32,
        folio: FreeFolio,
    ) -> Result<(), FreeFolio> {
        if !self.end_use(page, folio.order()) {
            return Err(folio);
        }
        self.blocks.quarantine(page, folio)
    }

    /// Takes the folio of order `order` at page `page` from its client, if the client has it, alone
    /// or as a part of a larger folio.
    fn end_use(&mut self, page: u32, order: u32) -> bool {
        let Some(entry) = self.owners.entry(page) else {
            return false;
        };
        if entry.order < order || page % (1 << order) != 0 {
            return false;
        }
        let entry = if entry.order == order {
            entry
        } else {
            // Core mm has split the folio.
            self.owners.split(entry, page, order)
        };
        self.owners.disown(entry);
        true
    }

    /// Whether `page` can be taken; `None` if there is no such page. For tests.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(super) fn is_free(&self, page: u32) -> Option<bool> {
        self.blocks.is_free(page)
    }

    /// The folio as which page `page` was taken, or the part of it that has not come back yet. For
    /// tests.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(super) fn entry(&self, page: u32) -> Option<Entry> {
        self.owners.entry(page)
    }

    /// A free page (for fault injection).
    pub(in crate::driver) fn peek_free(&self) -> Option<u32> {
        self.blocks.peek()
    }

    /// Calls `f` with page `page` if it is free. Neither `f` nor another task can take the page
    /// until `f` returns.
    pub(in crate::driver) fn with_free<R>(
        &self,
        page: u32,
        f: impl FnOnce(&FreeFolio) -> R,
    ) -> Option<R> {
        self.blocks.with(page, f)
    }

    /// Makes the next allocation report that `page`, which is in use, was taken again. A page
    /// cannot really be taken twice; tests of the report use this.
    pub(in crate::driver) fn take_twice(&mut self, page: u32) {
        self.twice = Some(page);
    }

    /// Returns the page that must be reported as taken twice, once.
    pub(in crate::driver) fn taken_twice(&mut self) -> Option<u32> {
        self.twice.take()
    }

    /// The number of base pages that `client` has.
    pub(in crate::driver) fn owned(&self, client: ClientId) -> usize {
        self.owners.pages(client)
    }

    /// Writes up to `out.len()` of the folios of `client` to `out`, by first page and order.
    /// Returns their number. Each call gives the next ones, because it rotates the list. Core mm
    /// may have split a folio.
    pub(in crate::driver) fn next_owned(
        &mut self,
        client: ClientId,
        out: &mut [(u32, u32)],
    ) -> usize {
        self.owners.next(client, out)
    }
}

#[kunit_tests(zdmirror_allocator)]
mod tests {
    use super::*;
    use crate::mm::{
        region::free_folio::BLOCK_PAGES,
        PMD_ORDER, //
    };

    const BLOCK: u32 = BLOCK_PAGES as u32;

    fn chunk(number: usize, blocks: usize) -> Result<NewChunk> {
        let mut chunk = NewChunk::with_room(blocks * BLOCK_PAGES)?;
        chunk.fill(FreeRegion::for_test(number * blocks..(number + 1) * blocks));
        Ok(chunk)
    }

    /// An allocator with `chunks` chunks of `blocks` blocks.
    fn allocator(chunks: usize, blocks: usize) -> Result<Allocator> {
        let pages = blocks * BLOCK_PAGES;
        let mut allocator = Allocator::new(NonZeroUsize::new(pages).ok_or(EINVAL)?)?;
        for number in 0..chunks {
            allocator
                .add_chunk(chunk(number, blocks)?)
                .map_err(|_| EINVAL)?;
        }
        Ok(allocator)
    }

    #[test]
    fn empty_allocator_has_nothing() -> Result {
        let mut m = allocator(0, 1)?;
        let a = m.add_client()?;
        for order in [0, 4, PMD_ORDER] {
            assert!(m.take(a, order).is_none());
        }
        assert_eq!((m.is_free(0), m.entry(0)), (None, None));
        assert_eq!(m.peek_free(), None);
        assert!(m.put(0, FreeFolio::for_test(0)).is_err());
        assert!(Allocator::new(NonZeroUsize::MIN).is_err());
        Ok(())
    }

    #[test]
    fn each_page_once_then_none() -> Result {
        let mut m = allocator(1, 1)?;
        let a = m.add_client()?;
        for expected in 0..BLOCK {
            let (page, folio) = m.take(a, 0).ok_or(ENOMEM)?;
            assert_eq!((page, folio.order()), (expected, 0));
            assert_eq!(m.is_free(page), Some(false));
            assert_eq!(m.with_free(page, |_| ()), None);
        }
        assert!(m.take(a, 0).is_none());
        assert_eq!((m.free(), m.owned(a)), (0, BLOCK_PAGES));
        Ok(())
    }

    #[test]
    fn folio_of_the_wrong_number_is_refused() -> Result {
        let mut m = allocator(1, 2)?;
        let a = m.add_client()?;
        let (large, folio) = m.take(a, PMD_ORDER).ok_or(ENOMEM)?;
        let (small, page) = m.take(a, 0).ok_or(ENOMEM)?;
        let mut folio = folio;
        for bad in [small, small + 1, large + 1, 2 * BLOCK] {
            folio = m.put(bad, folio).err().ok_or(EINVAL)?;
        }
        let page = m.put(small + 1, page).err().ok_or(EINVAL)?;
        assert_eq!(m.owned(a), BLOCK_PAGES + 1);
        assert!(m.put(large, folio).is_ok() && m.put(small, page).is_ok());
        assert_eq!((m.owned(a), m.free()), (0, 2 * BLOCK_PAGES));
        Ok(())
    }

    #[test]
    fn clients_do_not_mix() -> Result {
        let mut m = allocator(1, 1)?;
        let (a, b) = (m.add_client()?, m.add_client()?);
        let mut third = None;
        for _ in 0..3 {
            let _ = m.take(a, 0).ok_or(ENOMEM)?;
            third = m.take(b, 0).filter(|&(page, _)| page == 3).or(third);
        }
        let (page, folio) = third.ok_or(EINVAL)?;
        assert!(m.put(page, folio).is_ok());
        let mut out = [(0, 9); 8];
        assert_eq!(m.next_owned(b, &mut out), 2);
        assert_eq!(out[..2], [(1, 0), (5, 0)]);
        assert_eq!(m.owned(a), 3);
        Ok(())
    }

    #[test]
    fn orders_do_not_overlap() -> Result {
        let mut m = allocator(1, 3)?;
        let a = m.add_client()?;
        for (order, expected) in [
            (0, 0),
            (PMD_ORDER, BLOCK),
            (4, 16),
            (1, 2),
            (4, 32),
            (PMD_ORDER, 2 * BLOCK),
        ] {
            let (page, folio) = m.take(a, order).ok_or(ENOMEM)?;
            assert_eq!((page, folio.order()), (expected, order));
        }
        let (mut pages, mut out) = ([0; 3], [const { None }; 3]);
        assert_eq!(m.take_many(a, &mut pages, &mut out), 3);
        assert_eq!(pages, [1, 4, 5]);
        assert!(m.take(a, PMD_ORDER).is_none());
        assert_eq!(m.free(), BLOCK_PAGES - 38);
        Ok(())
    }

    #[test]
    fn large_folio_comes_back_in_parts() -> Result {
        let mut m = allocator(1, 1)?;
        let a = m.add_client()?;
        let (_, folio) = m.take(a, PMD_ORDER).ok_or(ENOMEM)?;
        // The client may be gone at that time.
        m.remove_client(a);
        let first = folio.first_pfn();
        let mut parts = KVec::new();
        let part = folio
            .split_to(first + 16, 4, |rest| {
                let _ = parts.push(rest, GFP_KERNEL);
            })
            .map_err(|_| EINVAL)?;
        assert!(m.put(16, part).is_ok());
        assert_eq!(m.owned(a), BLOCK_PAGES - 16);
        assert_eq!((m.is_free(16), m.is_free(31)), (Some(true), Some(true)));
        assert_eq!((m.is_free(15), m.is_free(32)), (Some(false), Some(false)));
        let b = m.add_client()?;
        assert_ne!(a, b);
        let (page, again) = m.take(b, 4).ok_or(ENOMEM)?;
        assert_eq!(page, 16);
        for part in parts {
            let page = (part.first_pfn() - first) as u32;
            assert!(m.put(page, part).is_ok());
        }
        assert_eq!((m.owned(a), m.owned(b)), (0, 16));
        assert!(m.put(16, again).is_ok());
        assert_eq!(m.free_large(), 1);
        Ok(())
    }

    #[test]
    fn grows_chunk_by_chunk() -> Result {
        let mut m = allocator(1, 1)?;
        let a = m.add_client()?;
        let _ = m.take(a, PMD_ORDER).ok_or(ENOMEM)?;
        assert!(m.take(a, 0).is_none());
        assert!(m.add_chunk(chunk(1, 2)?).is_err());
        assert!(m.add_chunk(NewChunk::with_room(BLOCK_PAGES)?).is_err());
        for number in 1..MAX_CHUNKS {
            let first = m.add_chunk(chunk(number, 1)?).map_err(|_| EINVAL)?;
            assert_eq!(first, number as u32 * BLOCK);
        }
        assert_eq!(m.take(a, 0).map(|(page, _)| page), Some(BLOCK));
        assert!(m.add_chunk(chunk(MAX_CHUNKS, 1)?).is_err());
        Ok(())
    }

    #[test]
    fn chunk_goes_and_its_number_is_filled() -> Result {
        let mut m = allocator(3, 1)?;
        let a = m.add_client()?;
        let _ = m.take(a, PMD_ORDER).ok_or(ENOMEM)?;
        let (page, folio) = m.take(a, 0).ok_or(ENOMEM)?;
        assert_eq!(page, BLOCK);
        assert!(m.remove_chunk(0).is_none());
        assert!(m.remove_chunk(1).is_none());
        assert!(m.put(BLOCK, folio).is_ok());
        let old = m.remove_chunk(1).ok_or(EINVAL)?;
        assert!(m.remove_chunk(1).is_none());
        assert!(m.remove_chunk(MAX_CHUNKS).is_none());
        assert_eq!(m.is_free(BLOCK), None);
        assert_eq!(m.free(), BLOCK_PAGES);
        let (page, _) = m.take(a, PMD_ORDER).ok_or(ENOMEM)?;
        assert_eq!(page, 2 * BLOCK);
        assert!(m.take(a, 0).is_none());
        assert_eq!(m.add_chunk(old).map_err(|_| EINVAL)?, BLOCK);
        let (page, _) = m.take(a, PMD_ORDER).ok_or(ENOMEM)?;
        assert_eq!(page, BLOCK);
        Ok(())
    }

    #[test]
    fn quarantined_folio_is_not_tried_again() -> Result {
        for order in [0, 3, PMD_ORDER] {
            let mut m = allocator(1, 2)?;
            let a = m.add_client()?;
            let (page, folio) = m.take(a, order).ok_or(ENOMEM)?;
            // Free pages and parts of other folios are ignored.
            let folio = m.quarantine(page + BLOCK, folio).err().ok_or(EINVAL)?;
            assert_eq!(m.owned(a), 1 << order);
            assert!(m.quarantine(page, folio).is_ok());
            assert_eq!((m.owned(a), m.entry(page)), (0, None));
            assert_eq!(m.is_free(page), Some(false));
            // A repair can still find the page.
            assert!(m.with_free(page, |folio| folio.order()).is_some());
            assert_eq!(m.free(), 2 * BLOCK_PAGES - (1 << order));
            let (next, _) = m.take(a, order).ok_or(ENOMEM)?;
            assert_ne!(next, page);
            assert!(m.remove_chunk(0).is_none());
            let mut pages = 0;
            m.drain_chunk(0, |folio| pages += folio.pages());
            assert_eq!(pages, 2 * BLOCK_PAGES - (1 << order));
        }
        Ok(())
    }

    #[test]
    fn injected_page_is_reported_once() -> Result {
        let mut m = allocator(1, 1)?;
        m.take_twice(3);
        assert_eq!(m.taken_twice(), Some(3));
        assert_eq!(m.taken_twice(), None);
        Ok(())
    }
}
