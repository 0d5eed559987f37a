// SPDX-License-Identifier: GPL-2.0

//! The free device pages, by blocks of 2 MiB.
//!
//! A block whose pages are all free is on one list, a block with some free pages on another. Pages
//! are taken from the latter list as long as it has any, so that broken blocks are used up before
//! whole ones are broken. A block is whole again as soon as its last page is back, so small and
//! large folios can share the memory for any length of time.

#![forbid(unsafe_code)]

use super::index_list::{
    Link,
    Linked,
    List,
    Table, //
};
use crate::mm::{
    region::free_folio::{
        FreeFolio,
        FreePages,
        FreeRegion,
        BLOCK_PAGES, //
    },
    PMD_ORDER, //
};
use core::num::NonZeroUsize;
use kernel::prelude::*;

/// The number of blocks with free pages that are searched for a folio of a middle order before a
/// whole block is broken.
const SEARCH: usize = 64;

/// The number of the block of page `page`.
fn block_of(page: u32) -> u32 {
    page >> PMD_ORDER
}

/// The pages of one block.
pub(super) struct Block {
    link: Link,
    /// Whether the chunk is closed: the block is on no list, and its pages do not count.
    closed: bool,
    /// The pages that can be taken.
    free: FreePages,
    /// The pages that failed the free-page checks, and are not taken again.
    quarantined: FreePages,
}

impl Block {
    /// Makes a block of the free pages of `folio`, which has [`PMD_ORDER`]. The block is on no
    /// list.
    fn new(folio: FreeFolio) -> Result<Self, FreeFolio> {
        let free = FreePages::new(folio)?;
        Ok(Self {
            link: Link::NONE,
            closed: false,
            quarantined: free.none_of(),
            free,
        })
    }

    fn is_whole(&self) -> bool {
        self.free.len() == BLOCK_PAGES
    }

    /// Calls `f` with each page that is free or quarantined. `f` becomes the owner of the page.
    fn drain(&mut self, mut f: impl FnMut(FreeFolio)) {
        if let Some(folio) = self.free.take(PMD_ORDER) {
            return f(folio);
        }
        while let Some(folio) = self.free.take(0).or_else(|| self.quarantined.take(0)) {
            f(folio);
        }
    }
}

/// The blocks of one chunk.
pub(super) struct Blocks(KVVec<Block>);

impl Blocks {
    /// Makes room for a chunk of `pages` pages. May sleep.
    pub(super) fn with_room(pages: usize) -> Result<Self> {
        Ok(Self(KVVec::with_capacity(pages / BLOCK_PAGES, GFP_KERNEL)?))
    }

    /// Adds the pages of `region`. Pages without room are never used.
    pub(super) fn fill(&mut self, region: FreeRegion) {
        for block in region.map_while(|folio| Block::new(folio).ok()) {
            if self.0.push_within_capacity(block).is_err() {
                return;
            }
        }
    }

    /// Calls `f` with each page that is not in use. `f` becomes the owner of the page.
    pub(super) fn drain(&mut self, mut f: impl FnMut(FreeFolio)) {
        for block in self.0.iter_mut() {
            block.drain(&mut f);
        }
    }

    /// Calls `f` with the first page, if that is free.
    pub(super) fn with_first<R>(&self, f: impl FnOnce(&FreeFolio) -> R) -> Option<R> {
        let free = &self.0.first()?.free;
        free.with(free.first_pfn(), f)
    }
}

impl Linked for Block {
    fn peek(&self) -> Link {
        self.link
    }

    fn link(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// The free pages of a device. Nothing but [`FreeBlocks::new`] sleeps.
pub(super) struct FreeBlocks {
    table: Table<Block>,
    /// The blocks whose pages are all free.
    whole: List,
    /// The blocks with some free pages; the block that was full last is in front.
    partial: List,
    /// The number of free pages.
    free: usize,
}

impl FreeBlocks {
    /// No pages, but numbers for `chunks` chunks of `chunk_pages` pages. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when a chunk is not a whole number of blocks.
    pub(super) fn new(chunks: usize, chunk_pages: NonZeroUsize) -> Result<Self> {
        if chunk_pages.get() % BLOCK_PAGES != 0 {
            return Err(EINVAL);
        }
        let per_chunk = NonZeroUsize::new(chunk_pages.get() / BLOCK_PAGES).ok_or(EINVAL)?;
        Ok(Self {
            table: Table::new(chunks, per_chunk)?,
            whole: List::EMPTY,
            partial: List::EMPTY,
            free: 0,
        })
    }

    /// The number of free pages.
    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// The number of blocks whose pages are all free.
    pub(super) fn whole(&self) -> usize {
        self.whole.len()
    }

    /// Adds `blocks` as chunk `number`, which is vacant.
    ///
    /// # Errors
    ///
    /// Gives `blocks` back when they are not as many as a chunk has, or not all free.
    pub(super) fn add_chunk(&mut self, number: usize, blocks: Blocks) -> Result<(), Blocks> {
        if blocks.0.len() != self.table.per_chunk() || !blocks.0.iter().all(Block::is_whole) {
            return Err(blocks);
        }
        self.table.replace(number, blocks.0);
        for block in self.table.numbers(number) {
            // The chunk may have been closed when it was removed.
            self.table[block].closed = false;
            self.whole.push_back(&mut self.table, block);
            self.free += BLOCK_PAGES;
        }
        Ok(())
    }

    /// Removes chunk `number` if all its pages are free.
    pub(super) fn remove_chunk(&mut self, number: usize) -> Option<Blocks> {
        let chunk = self.table.chunk(number);
        if chunk.is_empty() || !chunk.iter().all(Block::is_whole) {
            return None;
        }
        Some(self.take_chunk(number))
    }

    /// Removes chunk `number`, whether its pages are free or not.
    pub(super) fn take_chunk(&mut self, number: usize) -> Blocks {
        // This removes its blocks from the lists.
        self.close_chunk(number);
        Blocks(self.table.replace(number, KVVec::new()))
    }

    /// The number of pages of chunk `number` that are not free. Visits each of its blocks.
    pub(super) fn taken(&self, number: usize) -> usize {
        let taken = |b: &Block| BLOCK_PAGES - b.free.len();
        self.table.chunk(number).iter().map(taken).sum()
    }

    /// Makes the free pages of chunk `number` unavailable until the chunk is opened again.
    pub(super) fn close_chunk(&mut self, number: usize) {
        for number in self.table.numbers(number) {
            let open = |block: &Block| (!block.closed).then_some(block.free.len());
            if let Some(free) = self.table.get(number).and_then(open) {
                self.table[number].closed = true;
                self.relist(number, free, 0);
            }
        }
    }

    /// Makes the free pages of chunk `number` available again.
    pub(super) fn open_chunk(&mut self, number: usize) {
        // In the end the lowest block must be in front.
        for number in self.table.numbers(number).rev() {
            let closed = |block: &Block| block.closed.then_some(block.free.len());
            if let Some(free) = self.table.get(number).and_then(closed) {
                self.table[number].closed = false;
                self.relist(number, 0, free);
            }
        }
    }

    /// Takes free pages for `out`, ascending within a block. Returns their number. `pages` gets the
    /// number of each page.
    pub(super) fn take_pages(&mut self, pages: &mut [u32], out: &mut [Option<FreeFolio>]) -> usize {
        let mut taken = 0;
        let wanted = pages.len().min(out.len());
        while taken < wanted {
            let Some(number) = self.partial.head().or(self.whole.head()) else {
                break;
            };
            let n = self.change(number, |free| free.take_pages(&mut out[taken..wanted]));
            for i in taken..taken + n {
                pages[i] = page_of(number, out[i].as_ref());
            }
            taken += n;
        }
        taken
    }

    /// Takes a folio of `order`, with the number of its first page. A small one comes from a partly
    /// free block as long as there is one.
    pub(super) fn take(&mut self, order: u32) -> Option<(u32, FreeFolio)> {
        let number = self.find(order)?;
        let folio = self.change(number, |free| free.take(order));
        Some((page_of(number, folio.as_ref()), folio?))
    }

    /// Finds a block with a free folio of `order`.
    fn find(&self, order: u32) -> Option<u32> {
        let mut next = self.partial.head().filter(|_| order < PMD_ORDER);
        for _ in 0..SEARCH {
            let Some(number) = next else { break };
            if self.table[number].free.has(order) {
                return next;
            }
            next = self.partial.next(&self.table, number);
        }
        self.whole.head().filter(|_| order <= PMD_ORDER)
    }

    /// The folio at page `page`, which was taken, is free again.
    ///
    /// # Errors
    ///
    /// Gives `folio` back when it is not of the block of `page`.
    pub(super) fn put(&mut self, page: u32, folio: FreeFolio) -> Result<(), FreeFolio> {
        if self.table.get(block_of(page)).is_none() {
            return Err(folio);
        }
        self.change(block_of(page), |free| free.put(folio))
    }

    /// Keeps the folio at page `page`, which was taken, from being taken again.
    ///
    /// # Errors
    ///
    /// As [`FreeBlocks::put`].
    pub(super) fn quarantine(&mut self, page: u32, folio: FreeFolio) -> Result<(), FreeFolio> {
        if self.table.get(block_of(page)).is_none() {
            return Err(folio);
        }
        self.table[block_of(page)].quarantined.put(folio)
    }

    /// Calls `f` with page `page` if it is free or quarantined. The page keeps its state.
    pub(super) fn with<R>(&self, page: u32, f: impl FnOnce(&FreeFolio) -> R) -> Option<R> {
        let block = self.table.get(block_of(page))?;
        let pfn = block.free.first_pfn() + page as usize % BLOCK_PAGES;
        let pages = if block.free.contains(pfn, 0) {
            &block.free
        } else {
            &block.quarantined
        };
        pages.with(pfn, f)
    }

    /// Whether `page` is free; `None` if there is no such page. For tests.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(super) fn is_free(&self, page: u32) -> Option<bool> {
        let free = &self.table.get(block_of(page))?.free;
        Some(free.contains(free.first_pfn() + page as usize % BLOCK_PAGES, 0))
    }

    /// One of the free pages that will be taken last.
    pub(super) fn peek(&self) -> Option<u32> {
        let number = self.whole.tail().or(self.partial.tail())?;
        let free = &self.table[number].free;
        // CAST: Page numbers of a device fit `u32`.
        Some((number << PMD_ORDER) + (free.highest()? - free.first_pfn()) as u32)
    }

    /// Changes the free pages of a block, and moves the block to the list where it belongs.
    fn change<R>(&mut self, number: u32, f: impl FnOnce(&mut FreePages) -> R) -> R {
        let block = &mut self.table[number];
        let before = block.free.len();
        let result = f(&mut block.free);
        let after = block.free.len();
        if !block.closed {
            self.relist(number, before, after);
        }
        result
    }

    /// Moves a block whose number of free pages has changed from `before` to `after` to the list
    /// where it belongs.
    fn relist(&mut self, number: u32, before: usize, after: usize) {
        self.free = self.free - before + after;
        // A block that stays on its list keeps its place.
        if Self::is_partial(before) && !Self::is_partial(after) {
            self.partial.remove(&mut self.table, number);
        }
        if Self::is_whole(before) && !Self::is_whole(after) {
            self.whole.remove(&mut self.table, number);
        }
        // The block goes to the front. A block that was full needs the most pages to become whole,
        // so it is used up first; a block that has just become whole is broken first.
        if !Self::is_partial(before) && Self::is_partial(after) {
            self.partial.push_front(&mut self.table, number);
        }
        if !Self::is_whole(before) && Self::is_whole(after) {
            self.whole.push_front(&mut self.table, number);
        }
    }

    fn is_whole(free: usize) -> bool {
        free == BLOCK_PAGES
    }

    fn is_partial(free: usize) -> bool {
        free != 0 && !Self::is_whole(free)
    }
}

/// The number of the first page of `folio`, which belongs to block `block`.
fn page_of(block: u32, folio: Option<&FreeFolio>) -> u32 {
    let index = folio.map_or(0, |folio| folio.first_pfn() % BLOCK_PAGES);
    // CAST: Page numbers of a device fit `u32`.
    (block << PMD_ORDER) + index as u32
}

#[kunit_tests(zdmirror_free_blocks)]
mod tests {
    use super::*;

    const BLOCK: u32 = BLOCK_PAGES as u32;

    /// A map, and the folios taken from it, by page number.
    struct Fixture {
        map: FreeBlocks,
        taken: KVVec<Option<FreeFolio>>,
    }

    impl Fixture {
        /// A map with room for two chunks, and `chunks` chunks of `n` blocks.
        fn new(chunks: usize, n: usize) -> Result<Self> {
            let pages = NonZeroUsize::new(n * BLOCK_PAGES).ok_or(EINVAL)?;
            let mut taken = KVVec::with_capacity(2 * pages.get(), GFP_KERNEL)?;
            for _ in 0..2 * pages.get() {
                taken.push(None, GFP_KERNEL)?;
            }
            let mut map = FreeBlocks::new(2, pages)?;
            for number in 0..chunks {
                let mut blocks = Blocks::with_room(pages.get())?;
                blocks.fill(FreeRegion::for_test(number * n..(number + 1) * n));
                map.add_chunk(number, blocks).map_err(|_| EINVAL)?;
            }
            Ok(Self { map, taken })
        }

        fn take_order(&mut self, order: u32) -> Option<u32> {
            let (page, folio) = self.map.take(order)?;
            self.taken[page as usize] = Some(folio);
            Some(page)
        }

        fn take(&mut self) -> Option<u32> {
            self.take_order(0)
        }

        /// Takes up to `n` pages. Returns their numbers.
        fn take_pages(&mut self, n: usize) -> Result<KVVec<u32>> {
            let mut pages = KVVec::from_elem(0, n, GFP_KERNEL)?;
            let mut out = KVVec::with_capacity(n, GFP_KERNEL)?;
            for _ in 0..n {
                out.push(None, GFP_KERNEL)?;
            }
            let taken = self.map.take_pages(&mut pages, &mut out);
            for (&page, folio) in pages.iter().zip(out.iter_mut()).take(taken) {
                self.taken[page as usize] = folio.take();
            }
            pages.truncate(taken);
            Ok(pages)
        }

        fn put(&mut self, page: u32) -> bool {
            self.taken[page as usize]
                .take()
                .is_some_and(|folio| self.map.put(page, folio).is_ok())
        }
    }

    #[test]
    fn chunk_is_a_number_of_blocks() {
        for (pages, good) in [(1, false), (511, false), (512, true), (513, false)] {
            let pages = NonZeroUsize::MIN.saturating_add(pages - 1);
            assert_eq!(FreeBlocks::new(1, pages).is_ok(), good);
        }
    }

    #[test]
    fn lowest_free_page_comes_first() -> Result {
        let mut f = Fixture::new(1, 1)?;
        assert!(f.take_pages(130)?.iter().copied().eq(0..130));
        for page in [127, 64, 63, 2] {
            assert!(f.put(page));
        }
        assert_eq!(f.take_pages(6)?[..], [2, 63, 64, 127, 130, 131]);
        Ok(())
    }

    #[test]
    fn broken_blocks_are_used_up_first() -> Result {
        let mut f = Fixture::new(1, 3)?;
        assert_eq!(f.take(), Some(0));
        assert_eq!(f.take_order(PMD_ORDER), Some(BLOCK));
        assert_eq!(f.take(), Some(1));
        assert_eq!(f.map.whole(), 1);
        // A folio of a middle order breaks no whole block, and is aligned.
        assert_eq!(f.take_order(4), Some(16));
        assert_eq!(f.take_order(2), Some(4));
        assert_eq!(f.map.whole(), 1);
        assert_eq!(f.take_order(PMD_ORDER), Some(2 * BLOCK));
        assert_eq!(f.take_order(PMD_ORDER), None);
        assert_eq!(f.take_order(PMD_ORDER + 1), None);
        Ok(())
    }

    #[test]
    fn block_that_was_full_is_filled_first() -> Result {
        let mut f = Fixture::new(1, 2)?;
        assert_eq!(f.take(), Some(0));
        let whole = f.map.take(PMD_ORDER).ok_or(EINVAL)?;
        assert_eq!(whole.0, BLOCK);
        let page = whole
            .1
            .split_to((1 << 52) + BLOCK_PAGES + 7, 0, |_| {})
            .map_err(|_| EINVAL)?;
        f.map.put(BLOCK + 7, page).map_err(|_| EINVAL)?;
        assert_eq!(f.take(), Some(BLOCK + 7));
        assert_eq!(f.take(), Some(1));
        Ok(())
    }

    #[test]
    fn one_page_back_and_forth_breaks_one_block() -> Result {
        let mut f = Fixture::new(1, 4)?;
        for _ in 0..1000 {
            assert_eq!(f.take(), Some(0));
            assert_eq!(f.map.whole(), 3);
            assert!(f.put(0));
            assert_eq!(f.map.whole(), 4);
        }
        Ok(())
    }

    #[test]
    fn last_page_back_makes_a_block_whole() -> Result {
        let mut f = Fixture::new(1, 1)?;
        for page in 0..BLOCK {
            assert_eq!(f.take(), Some(page));
        }
        assert_eq!(f.take(), None);
        assert_eq!(f.take_order(PMD_ORDER), None);
        for page in (0..BLOCK).rev() {
            assert_eq!(f.map.whole(), 0);
            assert!(f.put(page));
        }
        assert_eq!(f.map.free(), BLOCK_PAGES);
        assert_eq!(f.take_order(PMD_ORDER), Some(0));
        assert_eq!(f.map.is_free(BLOCK - 1), Some(false));
        assert_eq!(f.map.is_free(BLOCK), None);
        assert!(f.put(0));
        assert_eq!(f.map.whole(), 1);
        Ok(())
    }

    #[test]
    fn take_spans_blocks() -> Result {
        let mut f = Fixture::new(1, 2)?;
        assert_eq!(f.take(), Some(0));
        let pages = f.take_pages(2 * BLOCK_PAGES)?;
        assert!(pages.iter().copied().eq(1..2 * BLOCK));
        assert_eq!(f.map.free(), 0);
        Ok(())
    }

    #[test]
    fn peeked_page_is_not_next() -> Result {
        let mut f = Fixture::new(1, 2)?;
        assert_eq!(f.map.peek(), Some(2 * BLOCK - 1));
        f.take_pages(2 * BLOCK_PAGES)?;
        assert_eq!(f.map.peek(), None);
        assert!(f.put(5) && f.put(70));
        assert_eq!(f.map.peek(), Some(70));
        Ok(())
    }

    #[test]
    fn pages_of_no_block_are_refused() -> Result {
        let mut f = Fixture::new(1, 1)?;
        let (page, folio) = f.map.take(3).ok_or(EINVAL)?;
        let folio = f.map.put(2 * BLOCK, folio).err().ok_or(EINVAL)?;
        let folio = f.map.quarantine(2 * BLOCK, folio).err().ok_or(EINVAL)?;
        f.map.quarantine(page, folio).map_err(|_| EINVAL)?;
        // The page is unavailable, but can still be inspected.
        assert_eq!(f.take(), Some(8));
        assert_eq!(f.map.with(page, |folio| folio.order()), Some(0));
        assert_eq!(f.map.with(8, |_| ()), None);
        assert_eq!(f.map.with(2 * BLOCK, |_| ()), None);
        assert!(f.put(8));
        assert!(f.map.remove_chunk(0).is_none());
        let mut pages = 0;
        f.map.take_chunk(0).drain(|folio| pages += folio.pages());
        assert_eq!((pages, f.map.free()), (BLOCK_PAGES, 0));
        Ok(())
    }

    #[test]
    fn only_free_chunks_go() -> Result {
        let mut f = Fixture::new(2, 2)?;
        assert_eq!(f.take(), Some(0));
        assert!(f.map.remove_chunk(0).is_none());
        let mut blocks = 0;
        f.map
            .remove_chunk(1)
            .ok_or(EINVAL)?
            .drain(|folio| blocks += usize::from(folio.order() == PMD_ORDER));
        assert_eq!(blocks, 2);
        assert!(f.map.remove_chunk(1).is_none());
        assert_eq!(f.map.free(), 2 * BLOCK_PAGES - 1);
        assert_eq!(f.map.whole(), 1);
        assert_eq!(f.map.is_free(2 * BLOCK), None);
        assert!(f.put(0));
        assert!(f.map.remove_chunk(0).is_some());
        assert_eq!((f.map.free(), f.map.whole(), f.take()), (0, 0, None));
        Ok(())
    }

    #[test]
    fn nothing_is_taken_from_a_closed_chunk() -> Result {
        let mut f = Fixture::new(2, 2)?;
        assert_eq!(f.take_pages(2)?.len(), 2);
        f.map.close_chunk(0);
        f.map.close_chunk(0);
        assert_eq!((f.map.free(), f.map.whole()), (2 * BLOCK_PAGES, 2));
        // A page that comes back stays unavailable.
        assert!(f.put(0));
        assert_eq!((f.map.taken(0), f.map.taken(1)), (1, 0));
        assert_eq!(f.take(), Some(2 * BLOCK));
        assert_eq!(f.take_order(PMD_ORDER), Some(3 * BLOCK));
        f.map.open_chunk(0);
        f.map.open_chunk(0);
        assert_eq!((f.map.free(), f.map.whole()), (3 * BLOCK_PAGES - 2, 1));
        // A closed chunk can be removed when all of it is back, and is whole when it is added
        // again.
        f.map.close_chunk(0);
        assert!(f.map.remove_chunk(0).is_none());
        assert!(f.put(1));
        let chunk = f.map.remove_chunk(0).ok_or(EINVAL)?;
        f.map.open_chunk(0);
        assert_eq!((f.map.free(), f.map.whole()), (BLOCK_PAGES - 1, 0));
        f.map.add_chunk(0, chunk).map_err(|_| EINVAL)?;
        assert_eq!((f.map.free(), f.map.whole()), (3 * BLOCK_PAGES - 1, 2));
        Ok(())
    }
}
