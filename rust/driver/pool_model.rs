// SPDX-License-Identifier: GPL-2.0

//! KUnit: the pool against a model of it, an array that says whose each page is.

#![forbid(unsafe_code)]

use super::{
    blocks::BLOCK_PAGES,
    pool::{
        NewSlots,
        OpenerId,
        Pool,
        LARGE_ORDER, //
    }, //
};
use core::{
    num::NonZeroUsize,
    ops::Range, //
};
use kernel::prelude::*;

const BLOCKS: usize = 3;
const PAGES: usize = BLOCKS * BLOCK_PAGES;

/// Whose a page is, as what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Free,
    Small(usize),
    Large(usize),
}

struct Model {
    pool: Pool,
    openers: [OpenerId; 2],
    pages: KVVec<Page>,
    random: u32,
}

impl Model {
    fn new() -> Result<Self> {
        let mut pool = Pool::new(NonZeroUsize::new(PAGES).ok_or(EINVAL)?)?;
        pool.add_chunk(NewSlots::new(PAGES)?)?;
        Ok(Self {
            openers: [pool.add_opener()?, pool.add_opener()?],
            pool,
            pages: KVVec::from_elem(Page::Free, PAGES, GFP_KERNEL)?,
            random: 1,
        })
    }

    /// A number below `end`, the same ones in every run: the generator of Numerical Recipes, whose
    /// low bits are poor.
    fn random(&mut self, end: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(1_664_525)
            .wrapping_add(1_013_904_223);
        (self.random >> 8) as usize % end
    }

    /// The pages of the block of `page`.
    fn block(page: usize) -> Range<usize> {
        let head = page - page % BLOCK_PAGES;
        head..head + BLOCK_PAGES
    }

    fn count(&self, f: impl Fn(Page) -> bool) -> usize {
        self.pages.iter().filter(|&&page| f(page)).count()
    }

    fn free_blocks(&self) -> usize {
        self.pages
            .chunks(BLOCK_PAGES)
            .filter(|block| block.iter().all(|&page| page == Page::Free))
            .count()
    }

    /// Puts any page back, a large folio as a whole or in part. `false` where the pool is wrong.
    fn put(&mut self) -> bool {
        let page = self.random(PAGES);
        let whole = self.random(2) == 0;
        let block = Self::block(page);
        match self.pages[page] {
            Page::Large(_) if whole => {
                self.pages[block.clone()].fill(Page::Free);
                self.pool.put(block.start as u32, LARGE_ORDER)
            }
            Page::Large(who) => {
                self.pages[block].fill(Page::Small(who));
                self.pages[page] = Page::Free;
                self.pool.put(page as u32, 0)
            }
            Page::Small(_) => {
                self.pages[page] = Page::Free;
                !self.pool.put(page as u32, LARGE_ORDER) && self.pool.put(page as u32, 0)
            }
            Page::Free => !self.pool.put(page as u32, 0),
        }
    }

    /// Takes up to forty small ones. `false` where the pool is wrong.
    fn take_small(&mut self) -> bool {
        let who = self.random(2);
        let mut out = [0; 40];
        let wanted = 1 + self.random(out.len());
        let expected = wanted.min(self.count(|page| page == Page::Free));
        let n = self.pool.take_many(self.openers[who], &mut out[..wanted]);
        n == expected
            && out[..n].iter().all(|&page| {
                let page = &mut self.pages[page as usize];
                core::mem::replace(page, Page::Small(who)) == Page::Free
            })
    }

    /// Takes a large one. `false` where the pool is wrong.
    fn take_large(&mut self) -> bool {
        let who = self.random(2);
        let expected = self.free_blocks() != 0;
        match self.pool.take(self.openers[who], LARGE_ORDER) {
            Some(head) => {
                let block = &mut self.pages[Self::block(head as usize)];
                let free = block.iter().all(|&page| page == Page::Free);
                block.fill(Page::Large(who));
                free && head as usize % BLOCK_PAGES == 0
            }
            None => !expected,
        }
    }

    /// Whether pool and model agree on every page.
    fn agrees(&self) -> bool {
        let owned = |who| self.count(|page| page == Page::Small(who) || page == Page::Large(who));
        self.pool.free() == self.count(|page| page == Page::Free)
            && self.pool.free_large() == self.free_blocks()
            && (0..2).all(|who| self.pool.owned(self.openers[who]) == owned(who))
            && self.pages.iter().enumerate().all(|(number, &page)| {
                let order = match page {
                    Page::Free => None,
                    Page::Small(_) => Some(0),
                    Page::Large(_) => (number % BLOCK_PAGES == 0).then_some(LARGE_ORDER),
                };
                let number = number as u32;
                self.pool.order_of(number) == order
                    && self.pool.is_free(number) == Some(page == Page::Free)
            })
    }
}

#[kunit_tests(zdmirror_pool_model)]
mod tests {
    use super::*;

    #[test]
    fn large_and_small_from_the_same_chunk_for_ever() -> Result {
        let mut m = Model::new()?;
        let (mut most, mut least) = (0, PAGES);
        for round in 0..6000 {
            // In turns the pool runs empty and fills up.
            let puts = if round / 1000 % 2 == 0 { 30 } else { 98 };
            match m.random(100) {
                op if op < puts => assert!(m.put()),
                op if op % 2 == 0 => assert!(m.take_large()),
                _ => assert!(m.take_small()),
            }
            if round % 50 == 0 {
                assert!(m.agrees());
            }
            most = most.max(m.pool.free());
            least = least.min(m.pool.free());
        }
        // Or the rounds have not tried much.
        assert!(least == 0 && most > PAGES / 2);
        // Everything can be given back by what the lists say.
        for opener in m.openers {
            let mut out = [(0, 0); 1];
            while m.pool.next_owned(opener, &mut out) != 0 {
                assert!(m.pool.put(out[0].0, out[0].1));
            }
        }
        assert_eq!(m.pool.free_large(), BLOCKS);
        assert!(m.pool.remove_chunk(0).is_some());
        Ok(())
    }
}
