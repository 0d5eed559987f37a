// SPDX-License-Identifier: GPL-2.0

//! The allocator of device pages: which ones are free, and whose the others are.
//!
//! Page `n` of a chunk has the chunk's number times the size of a chunk plus `n` for its number.
//! Folios are of order 0 or [`LARGE_ORDER`]. Taking and putting one is O(1) but for a large folio
//! that comes back in parts, which costs its 512 pages once.

#![forbid(unsafe_code)]

use super::{
    blocks::{
        Block,
        Blocks, //
    },
    openers::{
        Entry,
        Openers,
        Slot, //
    }, //
};
use core::num::NonZeroUsize;
use kernel::prelude::*;

pub(super) use super::{
    blocks::LARGE_ORDER,
    openers::{
        ListRoom,
        OpenerId, //
    }, //
};

/// Chunks that a device may grow to.
pub(super) const MAX_CHUNKS: usize = 16;

/// What a pool needs for a chunk that is not part of it, so that it is allocated and freed without
/// the pool's lock.
pub(super) struct NewSlots {
    slots: KVVec<Slot>,
    blocks: KVVec<Block>,
}

impl NewSlots {
    /// For a chunk of `pages` pages. May sleep.
    pub(super) fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            slots: Openers::new_chunk(pages)?,
            blocks: Blocks::new_chunk(pages)?,
        })
    }
}

/// The pages of a device. To be kept under a spinlock; nothing but [`Pool::new`] sleeps.
///
/// # Invariants
///
/// A page of a chunk is either free in `blocks` or part of an entry in `openers`.
pub(super) struct Pool {
    blocks: Blocks,
    openers: Openers,
    /// A page in use that the next take of order 0 is to hand out again: fault injection.
    twice: Option<u32>,
}

impl Pool {
    /// A pool without pages, for chunks of `chunk_pages` pages. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when a chunk is not a whole number of large folios, or larger than numbers go.
    pub(super) fn new(chunk_pages: NonZeroUsize) -> Result<Self> {
        Ok(Self {
            blocks: Blocks::new(MAX_CHUNKS, chunk_pages)?,
            openers: Openers::new(MAX_CHUNKS, chunk_pages)?,
            twice: None,
        })
    }

    /// Adds the pages of a chunk, all free, and returns the number of its first page. The chunk
    /// gets the lowest number that none has.
    ///
    /// # Errors
    ///
    /// `EINVAL` when there is no number left or `new` is of the wrong size. It is dropped then,
    /// which may sleep, so under a spinlock the caller makes sure that it does not happen.
    pub(super) fn add_chunk(&mut self, new: NewSlots) -> Result<u32> {
        let number = self.openers.vacancy().ok_or(EINVAL)?;
        if new.slots.len() != self.openers.chunk_pages() {
            return Err(EINVAL);
        }
        self.blocks.add_chunk(number, new.blocks);
        Ok(self.openers.add_chunk(number, new.slots))
    }

    /// Hands out nothing of chunk `number` until it is opened again. Costs a look at each of its blocks,
    /// as opening it does.
    pub(super) fn close_chunk(&mut self, number: usize) {
        self.blocks.close_chunk(number);
    }

    /// Hands out pages of chunk `number` again, if there is one.
    pub(super) fn open_chunk(&mut self, number: usize) {
        self.blocks.open_chunk(number);
    }

    /// Pages of chunk `number` that are not free, those included that were taken and are not handed
    /// out yet. Costs as much.
    pub(super) fn taken(&self, number: usize) -> usize {
        self.blocks.taken(number)
    }

    /// Takes chunk `number` out, whose number is vacant then. `None` when there is no such chunk,
    /// or when not all of its pages are free; those in quarantine are not.
    pub(super) fn remove_chunk(&mut self, number: usize) -> Option<NewSlots> {
        let blocks = self.blocks.remove_chunk(number)?;
        Some(NewSlots {
            slots: self.openers.remove_chunk(number),
            blocks,
        })
    }

    /// Pages that are free.
    pub(super) fn free(&self) -> usize {
        self.blocks.free()
    }

    /// Large folios that could be taken.
    pub(super) fn free_large(&self) -> usize {
        self.blocks.whole()
    }

    /// A new opener; `ENOSPC` when there is no room for one.
    pub(super) fn add_opener(&mut self) -> Result<OpenerId> {
        self.openers.add()
    }

    /// How many openers there are room for without [`Pool::swap_lists`].
    pub(super) fn spare_openers(&self) -> usize {
        self.openers.spare()
    }

    /// Size that room for more openers is to have.
    pub(super) fn wanted_lists(&self) -> usize {
        self.openers.wanted_lists()
    }

    /// Takes room for more openers, and gives the old room back to be freed without the lock.
    pub(super) fn swap_lists(&mut self, new: ListRoom) -> ListRoom {
        self.openers.swap_lists(new)
    }

    /// The opener is gone. Pages that it still has keep its number until they are freed.
    pub(super) fn remove_opener(&mut self, opener: OpenerId) {
        self.openers.remove(opener);
    }

    /// Takes a free folio of order `order` for `opener` and returns its first page.
    pub(super) fn take(&mut self, opener: OpenerId, order: u32) -> Option<u32> {
        match order {
            0 => {
                let mut page = [0];
                (self.take_many(opener, &mut page) == 1).then_some(page[0])
            }
            LARGE_ORDER => {
                let head = self.blocks.take_whole()?;
                self.openers.own(opener, head, LARGE_ORDER);
                Some(head)
            }
            _ => None,
        }
    }

    /// Takes free pages of order 0 for `opener`, as many as `out` has room for, and returns how
    /// many there were.
    pub(super) fn take_many(&mut self, opener: OpenerId, out: &mut [u32]) -> usize {
        let Some((first, rest)) = out.split_first_mut() else {
            return 0;
        };
        // One that was freed meanwhile is not to be given out past the others.
        if let Some(page) = self.twice.take().filter(|&p| self.order_of(p).is_some()) {
            *first = page;
            return 1 + self.take_many(opener, rest);
        }
        let n = self.blocks.take(out);
        for &page in &out[..n] {
            self.openers.own(opener, page, 0);
        }
        n
    }

    /// The folio of order `order` at `page` is free again. A large one may come back in parts.
    ///
    /// `false` when it was free already or is no such folio: nothing is changed then.
    pub(super) fn put(&mut self, page: u32, order: u32) -> bool {
        let done = self.end_use(page, order);
        if done {
            match order {
                0 => self.blocks.put(page),
                _ => self.blocks.put_whole(page),
            }
        }
        done
    }

    /// Sets the folio of order `order` at `page`, which was taken but could not be used, aside.
    pub(super) fn quarantine(&mut self, page: u32, order: u32) {
        if self.end_use(page, order) {
            self.openers.own(OpenerId::QUARANTINE, page, order);
        }
    }

    /// Takes the folio of order `order` at `page` from its opener, if it is one or part of one.
    fn end_use(&mut self, page: u32, order: u32) -> bool {
        let Some(entry) = self.used(page) else {
            return false;
        };
        if entry.order == LARGE_ORDER && order == 0 {
            // Core mm has split it.
            self.openers.split(entry);
            return self.end_use(page, 0);
        }
        let same = entry.head == page && entry.order == order;
        if same {
            self.openers.disown(entry);
        }
        same
    }

    /// Whether `page` is nobody's, `None` when there is no such page. For tests.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(super) fn is_free(&self, page: u32) -> Option<bool> {
        self.blocks.is_free(page)?;
        Some(self.used(page).is_none())
    }

    /// Order of the folio whose first page is `page`, `None` when that is not in use.
    pub(super) fn order_of(&self, page: u32) -> Option<u32> {
        let entry = self.used(page)?;
        (entry.head == page).then_some(entry.order)
    }

    /// The folio of `page`, unless that is nobody's.
    fn used(&self, page: u32) -> Option<Entry> {
        self.openers
            .entry(page)
            .filter(|entry| entry.opener != OpenerId::QUARANTINE)
    }

    /// A free page, for fault injection.
    pub(super) fn peek_free(&self) -> Option<u32> {
        self.blocks.peek()
    }

    /// Makes the next take of order 0 hand out `page`, if that is the first one of a folio in use
    /// then.
    pub(super) fn hand_out_twice(&mut self, page: u32) {
        self.twice = Some(page);
    }

    /// Base pages that `opener` has.
    pub(super) fn owned(&self, opener: OpenerId) -> usize {
        self.openers.pages(opener)
    }

    /// Writes up to `out.len()` of the folios of `opener` to `out`, first page and order, and
    /// returns how many. Each call gives the next ones, as the list is turned.
    pub(super) fn next_owned(&mut self, opener: OpenerId, out: &mut [(u32, u32)]) -> usize {
        self.openers.next(opener, out)
    }
}

#[kunit_tests(zdmirror_pool)]
mod tests {
    use super::*;
    use crate::driver::blocks::BLOCK_PAGES;

    const BLOCK: u32 = BLOCK_PAGES as u32;

    /// A pool for chunks of `blocks` blocks, with `chunks` of them.
    fn pool(chunks: usize, blocks: usize) -> Result<Pool> {
        let pages = blocks * BLOCK_PAGES;
        let mut pool = Pool::new(NonZeroUsize::new(pages).ok_or(EINVAL)?)?;
        for _ in 0..chunks {
            pool.add_chunk(NewSlots::new(pages)?)?;
        }
        Ok(pool)
    }

    #[test]
    fn empty_pool_has_nothing() -> Result {
        let mut pool = pool(0, 1)?;
        let a = pool.add_opener()?;
        assert_eq!(pool.take(a, 0), None);
        assert_eq!(pool.take(a, LARGE_ORDER), None);
        assert_eq!(pool.is_free(0), None);
        assert_eq!(pool.order_of(0), None);
        assert_eq!(pool.peek_free(), None);
        assert!(!pool.put(0, 0));
        assert!(!pool.put(0, LARGE_ORDER));
        assert!(Pool::new(NonZeroUsize::MIN).is_err());
        Ok(())
    }

    #[test]
    fn each_page_once_then_none() -> Result {
        let mut pool = pool(1, 1)?;
        let a = pool.add_opener()?;
        for page in 0..BLOCK {
            assert_eq!(pool.take(a, 0), Some(page));
            assert_eq!(pool.is_free(page), Some(false));
        }
        assert_eq!(pool.take(a, 0), None);
        assert_eq!(pool.free(), 0);
        assert_eq!(pool.owned(a), BLOCK_PAGES);
        Ok(())
    }

    #[test]
    fn put_twice_is_refused() -> Result {
        let mut pool = pool(1, 2)?;
        let a = pool.add_opener()?;
        for order in [0, LARGE_ORDER] {
            let page = pool.take(a, order).ok_or(ENOMEM)?;
            assert!(pool.put(page, order));
            assert!(!pool.put(page, order));
            assert_eq!(pool.free(), 2 * BLOCK_PAGES);
            assert_eq!(pool.owned(a), 0);
        }
        Ok(())
    }

    #[test]
    fn put_of_the_wrong_order_is_refused() -> Result {
        let mut pool = pool(1, 2)?;
        let a = pool.add_opener()?;
        let large = pool.take(a, LARGE_ORDER).ok_or(ENOMEM)?;
        let small = pool.take(a, 0).ok_or(ENOMEM)?;
        assert_eq!(pool.take(a, 1), None);
        let bad = [
            (small, LARGE_ORDER),
            (small + 1, LARGE_ORDER),
            (large + 1, LARGE_ORDER),
            (large, 1),
            (large, LARGE_ORDER + 1),
            (2 * BLOCK, LARGE_ORDER),
        ];
        for (page, order) in bad {
            assert!(!pool.put(page, order));
        }
        assert_eq!(pool.order_of(large), Some(LARGE_ORDER));
        assert_eq!(pool.order_of(large + 1), None);
        assert_eq!(pool.order_of(small), Some(0));
        assert_eq!(pool.owned(a), BLOCK_PAGES + 1);
        // A block that came back in parts is not whole for the first page of it either.
        assert!(pool.put(large + 1, 0));
        assert!(!pool.put(large, LARGE_ORDER));
        Ok(())
    }

    #[test]
    fn openers_do_not_mix() -> Result {
        let mut pool = pool(1, 1)?;
        let a = pool.add_opener()?;
        let b = pool.add_opener()?;
        for _ in 0..3 {
            pool.take(a, 0);
            pool.take(b, 0);
        }
        assert!(pool.put(3, 0));
        let mut out = [(0, 9); 8];
        assert_eq!(pool.next_owned(b, &mut out), 2);
        assert_eq!(out[..2], [(1, 0), (5, 0)]);
        assert_eq!(pool.owned(a), 3);
        Ok(())
    }

    #[test]
    fn large_and_small_do_not_overlap() -> Result {
        let mut pool = pool(1, 3)?;
        let a = pool.add_opener()?;
        assert_eq!(pool.take(a, 0), Some(0));
        assert_eq!(pool.free_large(), 2);
        assert_eq!(pool.take(a, LARGE_ORDER), Some(BLOCK));
        let mut out = [0; 3];
        assert_eq!(pool.take_many(a, &mut out), 3);
        assert_eq!(out, [1, 2, 3]);
        assert_eq!(pool.take(a, LARGE_ORDER), Some(2 * BLOCK));
        assert_eq!(pool.take(a, LARGE_ORDER), None);
        assert_eq!(pool.free(), BLOCK_PAGES - 4);
        Ok(())
    }

    #[test]
    fn merged_block_is_large_again() -> Result {
        let mut pool = pool(1, 1)?;
        let a = pool.add_opener()?;
        for _ in 0..3 {
            let page = pool.take(a, 0).ok_or(ENOMEM)?;
            assert_eq!(pool.take(a, LARGE_ORDER), None);
            assert!(pool.put(page, 0));
            assert_eq!(pool.take(a, LARGE_ORDER), Some(0));
            assert_eq!(pool.take(a, 0), None);
            assert!(pool.put(0, LARGE_ORDER));
        }
        Ok(())
    }

    #[test]
    fn large_folio_comes_back_in_parts() -> Result {
        let mut pool = pool(1, 1)?;
        let a = pool.add_opener()?;
        pool.take(a, LARGE_ORDER);
        // The opener may be gone by then.
        pool.remove_opener(a);
        assert!(pool.put(7, 0));
        assert_eq!(pool.owned(a), BLOCK_PAGES - 1);
        assert_eq!(pool.order_of(0), Some(0));
        assert_eq!(pool.order_of(8), Some(0));
        assert_eq!(pool.is_free(7), Some(true));
        assert!(!pool.put(7, 0));
        let b = pool.add_opener()?;
        assert_ne!(a, b);
        assert_eq!(pool.take(b, 0), Some(7));
        for page in (0..BLOCK).filter(|&page| page != 7) {
            assert!(pool.put(page, 0));
        }
        assert_eq!((pool.owned(a), pool.owned(b)), (0, 1));
        assert!(pool.put(7, 0));
        assert_eq!(pool.free_large(), 1);
        Ok(())
    }

    #[test]
    fn grows_chunk_by_chunk() -> Result {
        let mut pool = pool(1, 1)?;
        let a = pool.add_opener()?;
        pool.take(a, LARGE_ORDER);
        assert_eq!(pool.take(a, 0), None);
        assert!(pool.add_chunk(NewSlots::new(2 * BLOCK_PAGES)?).is_err());
        for number in 1..MAX_CHUNKS as u32 {
            assert_eq!(pool.add_chunk(NewSlots::new(BLOCK_PAGES)?)?, number * BLOCK);
        }
        assert_eq!(pool.take(a, 0), Some(BLOCK));
        assert!(pool.add_chunk(NewSlots::new(BLOCK_PAGES)?).is_err());
        Ok(())
    }

    #[test]
    fn chunk_goes_and_its_number_is_filled() -> Result {
        let mut pool = pool(3, 1)?;
        let a = pool.add_opener()?;
        assert_eq!(pool.take(a, LARGE_ORDER), Some(0));
        assert_eq!(pool.take(a, 0), Some(BLOCK));
        assert!(pool.remove_chunk(0).is_none());
        assert!(pool.remove_chunk(1).is_none());
        assert!(pool.put(BLOCK, 0));
        let old = pool.remove_chunk(1).ok_or(EINVAL)?;
        assert!(pool.remove_chunk(1).is_none());
        assert!(pool.remove_chunk(MAX_CHUNKS).is_none());
        assert_eq!(pool.is_free(BLOCK), None);
        assert!(!pool.put(BLOCK, 0));
        assert_eq!(pool.free(), BLOCK_PAGES);
        assert_eq!(pool.take(a, LARGE_ORDER), Some(2 * BLOCK));
        assert_eq!(pool.take(a, 0), None);
        assert_eq!(pool.add_chunk(old)?, BLOCK);
        assert_eq!(pool.take(a, LARGE_ORDER), Some(BLOCK));
        Ok(())
    }

    #[test]
    fn quarantined_page_is_not_tried_again() -> Result {
        let mut pool = pool(1, 1)?;
        let a = pool.add_opener()?;
        let page = pool.take(a, 0).ok_or(ENOMEM)?;
        pool.quarantine(page, 0);
        assert_eq!(pool.owned(a), 0);
        assert_eq!(pool.is_free(page), Some(true));
        assert_eq!(pool.order_of(page), None);
        assert_eq!(pool.take(a, 0), Some(1));
        assert!(!pool.put(page, 0));
        assert!(pool.put(1, 0));
        assert_eq!(pool.free(), BLOCK_PAGES - 1);
        assert_eq!(pool.take(a, LARGE_ORDER), None);
        assert!(pool.remove_chunk(0).is_none());
        Ok(())
    }

    #[test]
    fn quarantined_large_folio_is_not_tried_again() -> Result {
        let mut pool = pool(1, 2)?;
        let a = pool.add_opener()?;
        let head = pool.take(a, LARGE_ORDER).ok_or(ENOMEM)?;
        // Free pages and parts of something else are left alone.
        pool.quarantine(head + BLOCK, 0);
        pool.quarantine(head + 1, LARGE_ORDER);
        assert_eq!(pool.owned(a), BLOCK_PAGES);
        pool.quarantine(head, LARGE_ORDER);
        assert_eq!(pool.owned(a), 0);
        for page in [head, head + 1, head + BLOCK - 1] {
            assert_eq!(pool.is_free(page), Some(true));
            assert!(!pool.put(page, 0));
            assert!(!pool.put(page, LARGE_ORDER));
        }
        assert_eq!(pool.free(), BLOCK_PAGES);
        assert_eq!(pool.take(a, LARGE_ORDER), Some(BLOCK));
        assert_eq!(pool.take(a, 0), None);
        Ok(())
    }

    #[test]
    fn injected_page_comes_next_and_once() -> Result {
        let mut pool = pool(1, 2)?;
        let a = pool.add_opener()?;
        assert_eq!(pool.take(a, 0), Some(0));
        pool.hand_out_twice(0);
        assert_eq!(pool.take(a, LARGE_ORDER), Some(BLOCK));
        let mut out = [9; 2];
        assert_eq!(pool.take_many(a, &mut out), 2);
        assert_eq!(out, [0, 1]);
        // Neither a free page nor the inside of a large folio.
        for (page, next) in [(5, 2), (BLOCK + 1, 3)] {
            pool.hand_out_twice(page);
            assert_eq!(pool.take(a, 0), Some(next));
        }
        assert_eq!(pool.owned(a), BLOCK_PAGES + 4);
        Ok(())
    }
}
