// SPDX-License-Identifier: GPL-2.0

//! KUnit cases that compare the allocator with a model, an array with the owner of each page.

#![forbid(unsafe_code)]

use super::{
    allocator::{
        Allocator,
        NewChunk, //
    },
    owner_list::ClientId, //
};
use crate::mm::{
    region::free_folio::{
        FreeFolio,
        FreeRegion,
        BLOCK_PAGES, //
    },
    PMD_ORDER, //
};
use core::num::NonZeroUsize;
use kernel::prelude::*;

const BLOCKS: usize = 3;
const PAGES: usize = BLOCKS * BLOCK_PAGES;

struct Model {
    allocator: Allocator,
    clients: [ClientId; 2],
    /// The client that has the page.
    pages: KVVec<Option<usize>>,
    /// The folio that begins with the page, if it is taken.
    taken: KVVec<Option<FreeFolio>>,
    random: u32,
}

impl Model {
    fn new() -> Result<Self> {
        let mut allocator = Allocator::new(NonZeroUsize::new(PAGES).ok_or(EINVAL)?)?;
        let mut chunk = NewChunk::with_room(PAGES)?;
        chunk.fill(FreeRegion::for_test(0..BLOCKS));
        allocator.add_chunk(chunk).map_err(|_| EINVAL)?;
        let mut taken = KVVec::with_capacity(PAGES, GFP_KERNEL)?;
        for _ in 0..PAGES {
            taken.push(None, GFP_KERNEL)?;
        }
        Ok(Self {
            clients: [allocator.add_client()?, allocator.add_client()?],
            allocator,
            pages: KVVec::from_elem(None, PAGES, GFP_KERNEL)?,
            taken,
            random: 1,
        })
    }

    /// A pseudo-random number below `end`, the same in every run: the generator of Numerical
    /// Recipes, whose low bits are poor.
    fn random(&mut self, end: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(1_664_525)
            .wrapping_add(1_013_904_223);
        (self.random >> 8) as usize % end
    }

    /// The first page of the folio that `page` is part of.
    fn head(&self, page: usize) -> Option<usize> {
        (0..=PMD_ORDER)
            .map(|order| page & !((1 << order) - 1))
            .find(|&head| {
                let folio = self.taken[head].as_ref();
                folio.is_some_and(|folio| page - head < folio.pages())
            })
    }

    fn free(&self) -> usize {
        self.pages.iter().filter(|page| page.is_none()).count()
    }

    fn free_blocks(&self) -> usize {
        self.pages
            .chunks(BLOCK_PAGES)
            .filter(|block| block.iter().all(|page| page.is_none()))
            .count()
    }

    /// Whether an aligned run of free pages is as large as `order`.
    fn has(&self, order: u32) -> bool {
        self.pages
            .chunks(1 << order)
            .any(|run| run.iter().all(|page| page.is_none()))
    }

    /// Puts a part of the folio of a random page, or all of it. Returns `false` if the allocator is
    /// wrong.
    fn put(&mut self) -> bool {
        let page = self.random(PAGES);
        let Some(head) = self.head(page) else {
            return self.pages[page].is_none();
        };
        let Some(folio) = self.taken[head].take() else {
            return false;
        };
        let order = match self.random(2) {
            0 => folio.order(),
            _ => self.random(folio.order() as usize + 1) as u32,
        };
        let pfn = folio.first_pfn() + page - head;
        let base = folio.first_pfn() - head;
        let taken = &mut self.taken;
        let part = folio.split_to(pfn, order, |rest| {
            let page = rest.first_pfn() - base;
            taken[page] = Some(rest);
        });
        let Ok(part) = part else {
            return false;
        };
        let first = part.first_pfn() - base;
        self.pages[first..first + part.pages()].fill(None);
        self.allocator.put(first as u32, part).is_ok()
    }

    /// Records that client `who` got `folio` at `page`. Returns `false` if it was not free.
    fn take(&mut self, who: usize, page: u32, folio: FreeFolio) -> bool {
        let page = page as usize;
        let run = &mut self.pages[page..page + folio.pages()];
        let free = run.iter().all(|page| page.is_none());
        run.fill(Some(who));
        let aligned = page % folio.pages() == 0;
        self.taken[page] = Some(folio);
        free && aligned
    }

    /// Takes up to forty small folios. Returns `false` if the allocator is wrong.
    fn take_small(&mut self) -> bool {
        let who = self.random(2);
        let (mut pages, mut out) = ([0; 40], [const { None }; 40]);
        let wanted = 1 + self.random(out.len());
        let expected = wanted.min(self.free());
        let client = self.clients[who];
        let n = self
            .allocator
            .take_many(client, &mut pages[..wanted], &mut out);
        n == expected
            && pages[..n].iter().zip(&mut out).all(|(&page, folio)| {
                folio
                    .take()
                    .is_some_and(|folio| self.take(who, page, folio))
            })
    }

    /// Takes a folio of a random order. Returns `false` if the allocator is wrong.
    fn take_order(&mut self) -> bool {
        let who = self.random(2);
        let order = match self.random(3) {
            0 => PMD_ORDER,
            _ => self.random(PMD_ORDER as usize + 1) as u32,
        };
        let expected = self.has(order);
        match self.allocator.take(self.clients[who], order) {
            Some((page, folio)) => folio.order() == order && self.take(who, page, folio),
            None => !expected,
        }
    }

    /// Whether allocator and model agree on every page.
    fn agrees(&self) -> bool {
        let owned = |who| self.pages.iter().filter(|&&page| page == Some(who)).count();
        self.allocator.free() == self.free()
            && self.allocator.free_large() == self.free_blocks()
            && (0..2).all(|who| self.allocator.owned(self.clients[who]) == owned(who))
            && self.pages.iter().enumerate().all(|(number, &page)| {
                let number = number as u32;
                let client = self.allocator.entry(number).map(|entry| entry.client);
                client == page.map(|who| self.clients[who])
                    && self.allocator.is_free(number) == Some(page.is_none())
            })
    }
}

#[kunit_tests(zdmirror_allocator_model)]
mod tests {
    use super::*;

    #[test]
    fn all_orders_from_the_same_chunk_for_ever() -> Result {
        let mut m = Model::new()?;
        let (mut most, mut least) = (0, PAGES);
        for round in 0..6000 {
            // The allocator alternately runs empty and fills up.
            let puts = if round / 1000 % 2 == 0 { 30 } else { 98 };
            match m.random(100) {
                op if op < puts => assert!(m.put()),
                op if op % 2 == 0 => assert!(m.take_order()),
                _ => assert!(m.take_small()),
            }
            if round % 50 == 0 {
                assert!(m.agrees());
            }
            most = most.max(m.allocator.free());
            least = least.min(m.allocator.free());
        }
        // Otherwise the rounds have not tried much.
        assert!(least == 0 && most > PAGES / 2);
        // The lists have exactly the taken pages.
        for (who, client) in m.clients.into_iter().enumerate() {
            let mut out = [(0, 0); 1];
            while m.allocator.next_owned(client, &mut out) != 0 {
                let head = m.head(out[0].0 as usize).ok_or(EINVAL)?;
                assert_eq!(m.pages[head], Some(who));
                let folio = m.taken[head].take().ok_or(EINVAL)?;
                m.pages[head..head + folio.pages()].fill(None);
                assert!(m.allocator.put(head as u32, folio).is_ok());
            }
        }
        assert_eq!(m.allocator.free_large(), BLOCKS);
        assert!(m.allocator.remove_chunk(0).is_some());
        Ok(())
    }
}
