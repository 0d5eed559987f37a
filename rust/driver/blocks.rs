// SPDX-License-Identifier: GPL-2.0

//! Which device pages are free, by blocks of 2 MiB.
//!
//! A block whose pages are all free is on one list, a block that has some free ones on another, and
//! pages are taken from the latter as long as there are any: what was broken once is used up
//! before more is broken. A block is whole again as soon as its last page is back, so that small
//! and large folios can come from the same memory for ever.

#![forbid(unsafe_code)]

use super::list::{
    Link,
    Linked,
    List,
    Table, //
};
use core::num::NonZeroUsize;
use kernel::prelude::*;

/// Order of a block, and of the only large folios that there are.
pub(super) const LARGE_ORDER: u32 = 9;

/// Pages of a block.
pub(super) const BLOCK_PAGES: usize = 1 << LARGE_ORDER;

const BITS: usize = u64::BITS as usize;

/// Number of the first page of block `block`.
fn head_of(block: u32) -> u32 {
    block << LARGE_ORDER
}

/// Number of the block of page `page`.
fn block_of(page: u32) -> u32 {
    page >> LARGE_ORDER
}

#[derive(Clone, Copy)]
pub(super) struct Block {
    link: Link,
    /// Set bits of `map`.
    free: u32,
    /// On no list, and counted by nobody: its chunk is closed.
    closed: bool,
    /// A bit per page, set while it is free.
    map: [u64; BLOCK_PAGES / BITS],
}

impl Block {
    /// All pages free, and on no list.
    const WHOLE: Self = Self {
        link: Link::NONE,
        free: BLOCK_PAGES as u32,
        closed: false,
        map: [u64::MAX; BLOCK_PAGES / BITS],
    };

    /// Word and bit of page `page`.
    fn place(page: u32) -> (usize, u64) {
        let index = page as usize % BLOCK_PAGES;
        (index / BITS, 1 << (index % BITS))
    }

    #[cfg(CONFIG_KUNIT = "y")]
    fn is_free(&self, page: u32) -> bool {
        let (word, bit) = Self::place(page);
        self.map[word] & bit != 0
    }

    /// Takes the lowest free pages for `out`, and returns how many. `head` is the first page's
    /// number.
    fn take(&mut self, head: u32, out: &mut [u32]) -> usize {
        let mut taken = 0;
        for (word, map) in self.map.iter_mut().enumerate() {
            while *map != 0 && taken < out.len() {
                // CAST: Below `BLOCK_PAGES`.
                out[taken] = head + (word * BITS) as u32 + map.trailing_zeros();
                *map &= *map - 1;
                taken += 1;
            }
        }
        self.free -= taken as u32;
        taken
    }

    /// The highest free page, counted from the first one.
    fn highest(&self) -> Option<u32> {
        let (word, map) = self.map.iter().enumerate().rfind(|(_, &map)| map != 0)?;
        // CAST: Below `BLOCK_PAGES`.
        Some((word * BITS) as u32 + map.ilog2())
    }
}

impl Linked for Block {
    fn link(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// The free pages of a device. Nothing but [`Blocks::new`] sleeps.
pub(super) struct Blocks {
    table: Table<Block>,
    /// Blocks of which all pages are free.
    whole: List,
    /// Blocks of which some pages are free, those that were full last in front.
    partial: List,
    /// Pages that are free.
    free: usize,
}

impl Blocks {
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

    /// Blocks for a chunk of `pages` pages. May sleep.
    pub(super) fn new_chunk(pages: usize) -> Result<KVVec<Block>> {
        Ok(KVVec::from_elem(
            Block::WHOLE,
            pages / BLOCK_PAGES,
            GFP_KERNEL,
        )?)
    }

    /// Pages that are free.
    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// Blocks that are free as a whole.
    pub(super) fn whole(&self) -> usize {
        self.whole.len()
    }

    /// Adds the blocks of [`Blocks::new_chunk`] as chunk `number`, which is vacant.
    pub(super) fn add_chunk(&mut self, number: usize, blocks: KVVec<Block>) {
        self.table.replace(number, blocks);
        for block in self.table.numbers(number) {
            // As it was when it went.
            self.table[block].closed = false;
            self.whole.push_back(&mut self.table, block);
            self.free += BLOCK_PAGES;
        }
    }

    /// Takes chunk `number` out if all its pages are free.
    pub(super) fn remove_chunk(&mut self, number: usize) -> Option<KVVec<Block>> {
        let chunk = self.table.chunk(number);
        if chunk.is_empty() || chunk.iter().any(|b| b.free != Block::WHOLE.free) {
            return None;
        }
        // From no list any more.
        self.close_chunk(number);
        Some(self.table.replace(number, KVVec::new()))
    }

    /// Pages of chunk `number` that are not free. Costs a look at each of its blocks.
    pub(super) fn taken(&self, number: usize) -> usize {
        let taken = |b: &Block| (Block::WHOLE.free - b.free) as usize;
        self.table.chunk(number).iter().map(taken).sum()
    }

    /// Lets no page of chunk `number` that is or becomes free be taken, until it is opened again.
    pub(super) fn close_chunk(&mut self, number: usize) {
        for number in self.table.numbers(number) {
            let open = |block: &Block| (!block.closed).then_some(block.free);
            if let Some(free) = self.table.get(number).and_then(open) {
                self.table[number].closed = true;
                self.relist(number, free, 0);
            }
        }
    }

    /// Lets the free pages of chunk `number` be taken again.
    pub(super) fn open_chunk(&mut self, number: usize) {
        // The lowest is to be in front in the end.
        for number in self.table.numbers(number).rev() {
            let closed = |block: &Block| block.closed.then_some(block.free);
            if let Some(free) = self.table.get(number).and_then(closed) {
                self.table[number].closed = false;
                self.relist(number, 0, free);
            }
        }
    }

    /// Takes free pages for `out`, ascending within a block, and returns how many.
    pub(super) fn take(&mut self, out: &mut [u32]) -> usize {
        let mut taken = 0;
        while taken < out.len() {
            let Some(number) = self.partial.head().or(self.whole.head()) else {
                break;
            };
            taken += self.change(number, |block| {
                block.take(head_of(number), &mut out[taken..])
            });
        }
        taken
    }

    /// Takes a whole block and returns its first page.
    pub(super) fn take_whole(&mut self) -> Option<u32> {
        let number = self.whole.head()?;
        self.change(number, |block| {
            block.map = [0; BLOCK_PAGES / BITS];
            block.free = 0;
        });
        Some(head_of(number))
    }

    /// Page `page`, which was taken, is free again.
    pub(super) fn put(&mut self, page: u32) {
        self.change(block_of(page), |block| {
            let (word, bit) = Block::place(page);
            block.free += u32::from(block.map[word] & bit == 0);
            block.map[word] |= bit;
        });
    }

    /// All pages of the block of `page`, which were taken, are free again.
    pub(super) fn put_whole(&mut self, page: u32) {
        self.change(block_of(page), |block| {
            block.free = Block::WHOLE.free;
            block.map = Block::WHOLE.map;
        });
    }

    /// Whether `page` is free, `None` when there is no such page. For tests.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(super) fn is_free(&self, page: u32) -> Option<bool> {
        Some(self.table.get(block_of(page))?.is_free(page))
    }

    /// One of the free pages that are far from being taken.
    pub(super) fn peek(&self) -> Option<u32> {
        let number = self.whole.tail().or(self.partial.tail())?;
        Some(head_of(number) + self.table[number].highest()?)
    }

    /// Changes what is free of a block, and moves it to where it belongs then.
    fn change<R>(&mut self, number: u32, f: impl FnOnce(&mut Block) -> R) -> R {
        let block = &mut self.table[number];
        let before = block.free;
        let result = f(block);
        let after = block.free;
        if !block.closed {
            self.relist(number, before, after);
        }
        result
    }

    /// Moves a block that had `before` free pages, and has `after`, to the list where it belongs.
    fn relist(&mut self, number: u32, before: u32, after: u32) {
        self.free = self.free - before as usize + after as usize;
        // A block that stays where it is keeps its place there.
        if Self::is_partial(before) && !Self::is_partial(after) {
            self.partial.remove(&mut self.table, number);
        }
        if Self::is_whole(before) && !Self::is_whole(after) {
            self.whole.remove(&mut self.table, number);
        }
        // In front: a block that was full is the farthest from being whole, so it is used up first,
        // and one that has just become whole is broken before others are.
        if !Self::is_partial(before) && Self::is_partial(after) {
            self.partial.push_front(&mut self.table, number);
        }
        if !Self::is_whole(before) && Self::is_whole(after) {
            self.whole.push_front(&mut self.table, number);
        }
    }

    fn is_whole(free: u32) -> bool {
        free == Block::WHOLE.free
    }

    fn is_partial(free: u32) -> bool {
        free != 0 && !Self::is_whole(free)
    }
}

#[kunit_tests(zdmirror_blocks)]
mod tests {
    use super::*;

    const BLOCK: u32 = BLOCK_PAGES as u32;

    /// One chunk of `n` blocks, and room for another one.
    fn blocks(n: usize) -> Result<Blocks> {
        let pages = NonZeroUsize::new(n * BLOCK_PAGES).ok_or(EINVAL)?;
        let mut blocks = Blocks::new(2, pages)?;
        blocks.add_chunk(0, Blocks::new_chunk(pages.get())?);
        Ok(blocks)
    }

    fn take(blocks: &mut Blocks) -> Option<u32> {
        let mut out = [0];
        (blocks.take(&mut out) == 1).then_some(out[0])
    }

    #[test]
    fn chunk_is_a_number_of_blocks() {
        for (pages, good) in [(1, false), (511, false), (512, true), (513, false)] {
            let pages = NonZeroUsize::MIN.saturating_add(pages - 1);
            assert_eq!(Blocks::new(1, pages).is_ok(), good);
        }
    }

    #[test]
    fn lowest_free_page_comes_first() -> Result {
        let mut b = blocks(1)?;
        let mut out = [0; 130];
        assert_eq!(b.take(&mut out), 130);
        assert!(out.iter().copied().eq(0..130));
        for page in [127, 64, 63, 2] {
            b.put(page);
        }
        let mut out = [0; 6];
        assert_eq!(b.take(&mut out), 6);
        assert_eq!(out, [2, 63, 64, 127, 130, 131]);
        Ok(())
    }

    #[test]
    fn broken_blocks_are_used_up_first() -> Result {
        let mut b = blocks(3)?;
        assert_eq!(take(&mut b), Some(0));
        assert_eq!(b.take_whole(), Some(BLOCK));
        assert_eq!(take(&mut b), Some(1));
        assert_eq!(b.whole(), 1);
        // Two broken blocks: the one that was full is filled again before the other.
        b.put(BLOCK + 7);
        assert_eq!(take(&mut b), Some(BLOCK + 7));
        assert_eq!(take(&mut b), Some(2));
        assert_eq!(b.whole(), 1);
        Ok(())
    }

    #[test]
    fn one_page_back_and_forth_breaks_one_block() -> Result {
        let mut b = blocks(4)?;
        for _ in 0..1000 {
            assert_eq!(take(&mut b), Some(0));
            assert_eq!(b.whole(), 3);
            b.put(0);
            assert_eq!(b.whole(), 4);
        }
        Ok(())
    }

    #[test]
    fn last_page_back_makes_a_block_whole() -> Result {
        let mut b = blocks(1)?;
        for page in 0..BLOCK {
            assert_eq!(take(&mut b), Some(page));
        }
        assert_eq!(take(&mut b), None);
        assert_eq!(b.take_whole(), None);
        for page in (0..BLOCK).rev() {
            assert_eq!(b.whole(), 0);
            b.put(page);
        }
        assert_eq!(b.free(), BLOCK_PAGES);
        assert_eq!(b.take_whole(), Some(0));
        assert_eq!(b.is_free(BLOCK - 1), Some(false));
        assert_eq!(b.is_free(BLOCK), None);
        b.put_whole(0);
        assert_eq!(b.whole(), 1);
        Ok(())
    }

    #[test]
    fn take_spans_blocks() -> Result {
        let mut b = blocks(2)?;
        assert_eq!(take(&mut b), Some(0));
        let mut out = KVVec::from_elem(0, 2 * BLOCK_PAGES, GFP_KERNEL)?;
        assert_eq!(b.take(&mut out), 2 * BLOCK_PAGES - 1);
        assert!(out[..2 * BLOCK_PAGES - 1].iter().copied().eq(1..2 * BLOCK));
        assert_eq!(b.free(), 0);
        Ok(())
    }

    #[test]
    fn peeked_page_is_not_next() -> Result {
        let mut b = blocks(2)?;
        assert_eq!(b.peek(), Some(2 * BLOCK - 1));
        b.take_whole();
        b.take_whole();
        assert_eq!(b.peek(), None);
        b.put(5);
        b.put(70);
        assert_eq!(b.peek(), Some(70));
        Ok(())
    }

    #[test]
    fn only_free_chunks_go() -> Result {
        let mut b = blocks(2)?;
        b.add_chunk(1, Blocks::new_chunk(2 * BLOCK_PAGES)?);
        assert_eq!(take(&mut b), Some(0));
        assert!(b.remove_chunk(0).is_none());
        assert_eq!(b.remove_chunk(1).map(|c| c.len()), Some(2));
        assert!(b.remove_chunk(1).is_none());
        assert_eq!(b.free(), 2 * BLOCK_PAGES - 1);
        assert_eq!(b.whole(), 1);
        assert_eq!(b.is_free(2 * BLOCK), None);
        b.put(0);
        assert!(b.remove_chunk(0).is_some());
        assert_eq!((b.free(), b.whole(), take(&mut b)), (0, 0, None));
        Ok(())
    }

    #[test]
    fn nothing_is_taken_from_a_closed_chunk() -> Result {
        let mut b = blocks(2)?;
        b.add_chunk(1, Blocks::new_chunk(2 * BLOCK_PAGES)?);
        let mut out = [0; 2];
        assert_eq!(b.take(&mut out), 2);
        b.close_chunk(0);
        b.close_chunk(0);
        assert_eq!((b.free(), b.whole()), (2 * BLOCK_PAGES, 2));
        // What comes back stays out of reach.
        b.put(0);
        assert_eq!((b.taken(0), b.taken(1)), (1, 0));
        assert_eq!(take(&mut b), Some(2 * BLOCK));
        assert_eq!(b.take_whole(), Some(3 * BLOCK));
        b.open_chunk(0);
        b.open_chunk(0);
        assert_eq!((b.free(), b.whole()), (3 * BLOCK_PAGES - 2, 1));
        // Closed, it can go as soon as all of it is back, and is whole when it comes again.
        b.close_chunk(0);
        assert!(b.remove_chunk(0).is_none());
        b.put(1);
        assert_eq!(b.remove_chunk(0).map(|c| c.len()), Some(2));
        b.open_chunk(0);
        assert_eq!((b.free(), b.whole()), (BLOCK_PAGES - 1, 0));
        b.add_chunk(0, Blocks::new_chunk(2 * BLOCK_PAGES)?);
        assert_eq!((b.free(), b.whole()), (3 * BLOCK_PAGES - 1, 2));
        Ok(())
    }
}
