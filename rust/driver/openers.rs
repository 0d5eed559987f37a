// SPDX-License-Identifier: GPL-2.0

//! Whose the device pages in use are.
//!
//! The pages of an opener are on a list of its own, so that closing a file costs what it migrated.
//! A large folio is one entry, that of its first page.

#![forbid(unsafe_code)]

use super::{
    blocks::{
        BLOCK_PAGES,
        LARGE_ORDER, //
    },
    list::{
        Link,
        Linked,
        List,
        Table, //
    }, //
};
use core::num::NonZeroUsize;
use kernel::prelude::*;

/// Number of an opener in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenerId(u32);

impl OpenerId {
    /// The list of pages that are nobody's, but were not in the state of a free page when they
    /// were to be handed out. They are not tried again.
    pub(super) const QUARANTINE: Self = Self(0);
}

/// The list that a page is on, and as what.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Owner(u32);

impl Owner {
    /// The page is free, or part of a large folio but not its first page.
    const NOBODY: Self = Self(u32::MAX);

    /// Set in the entry of a large folio.
    const LARGE: u32 = 1 << 31;

    fn new(opener: OpenerId, order: u32) -> Self {
        Self(opener.0 | if order == 0 { 0 } else { Self::LARGE })
    }

    fn opener(self) -> OpenerId {
        OpenerId(self.0 & !Self::LARGE)
    }

    fn order(self) -> u32 {
        if self.0 & Self::LARGE == 0 {
            0
        } else {
            LARGE_ORDER
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Slot {
    link: Link,
    owner: Owner,
}

impl Linked for Slot {
    fn link(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// Folios of an opener.
#[derive(Clone, Copy)]
struct Owned {
    entries: List,
    /// Base pages of the entries.
    pages: usize,
    /// The opener is not gone.
    alive: bool,
}

impl Owned {
    const VACANT: Self = Self {
        entries: List::EMPTY,
        pages: 0,
        alive: false,
    };

    /// No opener has the number, and no page any more.
    fn is_vacant(&self) -> bool {
        !self.alive && self.pages == 0
    }
}

/// A folio in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The first page.
    pub(super) head: u32,
    pub(super) order: u32,
    /// Whose it is, possibly [`OpenerId::QUARANTINE`].
    pub(super) opener: OpenerId,
}

/// Room for openers, allocated without the pool's lock.
pub(super) struct ListRoom(KVVec<Owned>);

impl ListRoom {
    /// Room for `openers` openers. May sleep.
    pub(super) fn new(openers: usize) -> Result<Self> {
        Ok(Self(KVVec::with_capacity(openers, GFP_KERNEL)?))
    }
}

/// The pages in use of a device. Nothing but [`Openers::new`] sleeps.
pub(super) struct Openers {
    slots: Table<Slot>,
    lists: KVVec<Owned>,
}

impl Openers {
    /// No openers and no pages, but numbers for `chunks` chunks of `chunk_pages` pages. May sleep.
    pub(super) fn new(chunks: usize, chunk_pages: NonZeroUsize) -> Result<Self> {
        let mut lists = KVVec::with_capacity(64, GFP_KERNEL)?;
        lists.push(
            Owned {
                alive: true,
                ..Owned::VACANT
            },
            GFP_KERNEL,
        )?;
        Ok(Self {
            slots: Table::new(chunks, chunk_pages)?,
            lists,
        })
    }

    /// Slots for a chunk of `pages` pages. May sleep.
    pub(super) fn new_chunk(pages: usize) -> Result<KVVec<Slot>> {
        let slot = Slot {
            link: Link::NONE,
            owner: Owner::NOBODY,
        };
        Ok(KVVec::from_elem(slot, pages, GFP_KERNEL)?)
    }

    /// Pages of a chunk.
    pub(super) fn chunk_pages(&self) -> usize {
        self.slots.per_chunk()
    }

    /// The lowest number without a chunk.
    pub(super) fn vacancy(&self) -> Option<usize> {
        self.slots.vacancy()
    }

    /// Adds the slots of [`Openers::new_chunk`] as chunk `number`, which is vacant, and returns
    /// the number of its first page.
    pub(super) fn add_chunk(&mut self, number: usize, slots: KVVec<Slot>) -> u32 {
        self.slots.replace(number, slots);
        self.slots.numbers(number).start
    }

    /// Takes chunk `number` out, of which no page is in use.
    pub(super) fn remove_chunk(&mut self, number: usize) -> KVVec<Slot> {
        self.slots.replace(number, KVVec::new())
    }

    /// A new opener. The list of lists may have to grow, without waiting for memory.
    pub(super) fn add(&mut self) -> Result<OpenerId> {
        let number = match self.lists.iter().position(Owned::is_vacant) {
            Some(number) => number,
            None => {
                self.lists
                    .push_within_capacity(Owned::VACANT)
                    .map_err(|_| ENOSPC)?;
                self.lists.len() - 1
            }
        };
        self.lists[number].alive = true;
        Ok(OpenerId(number as u32))
    }

    /// The opener is gone. Pages that it still has keep its number until they are freed.
    pub(super) fn remove(&mut self, opener: OpenerId) {
        self.list(opener).alive = false;
    }

    /// How many openers there are room for without [`Openers::swap_lists`].
    pub(super) fn spare(&self) -> usize {
        let vacant = self.lists.iter().filter(|list| list.is_vacant()).count();
        vacant + self.lists.capacity() - self.lists.len()
    }

    /// Size that room for more openers is to have.
    pub(super) fn wanted_lists(&self) -> usize {
        self.lists.capacity() * 2
    }

    /// Takes room for more openers, and gives the old room back to be freed without the lock.
    pub(super) fn swap_lists(&mut self, mut new: ListRoom) -> ListRoom {
        if new.0.capacity() > self.lists.capacity() {
            for list in &self.lists {
                // There is room: the capacity is larger than that of what is copied.
                if new.0.push_within_capacity(*list).is_err() {
                    return new;
                }
            }
            core::mem::swap(&mut self.lists, &mut new.0);
        }
        new
    }

    /// Base pages that `opener` has.
    pub(super) fn pages(&self, opener: OpenerId) -> usize {
        self.lists[opener.0 as usize].pages
    }

    /// The folio that page `page` is part of, `None` when it is free or there is no such page.
    pub(super) fn entry(&self, page: u32) -> Option<Entry> {
        let entry = |head: u32, owner: Owner| Entry {
            head,
            order: owner.order(),
            opener: owner.opener(),
        };
        let owner = self.slots.get(page)?.owner;
        if owner != Owner::NOBODY {
            return Some(entry(page, owner));
        }
        let head = page & !(BLOCK_PAGES as u32 - 1);
        let owner = self.slots.get(head)?.owner;
        (owner != Owner::NOBODY && owner.order() == LARGE_ORDER).then(|| entry(head, owner))
    }

    /// The folio of order `order` at `head`, which was free, is that of `opener` now.
    pub(super) fn own(&mut self, opener: OpenerId, head: u32, order: u32) {
        self.slots[head].owner = Owner::new(opener, order);
        let list = &mut self.lists[opener.0 as usize];
        list.entries.push_back(&mut self.slots, head);
        list.pages += 1 << order;
    }

    /// The folio that `entry` describes is nobody's any more.
    pub(super) fn disown(&mut self, entry: Entry) {
        self.slots[entry.head].owner = Owner::NOBODY;
        let list = &mut self.lists[entry.opener.0 as usize];
        list.entries.remove(&mut self.slots, entry.head);
        list.pages -= 1 << entry.order;
    }

    /// Makes the pages of a large folio entries of their own.
    pub(super) fn split(&mut self, entry: Entry) {
        self.disown(entry);
        for page in entry.head..entry.head + (1 << entry.order) {
            self.own(entry.opener, page, 0);
        }
    }

    /// Writes up to `out.len()` of the folios of `opener` to `out`, first page and order, and
    /// returns how many. Each call gives the next ones, as the list is turned.
    pub(super) fn next(&mut self, opener: OpenerId, out: &mut [(u32, u32)]) -> usize {
        let Self { slots, lists } = self;
        let entries = &mut lists[opener.0 as usize].entries;
        let mut written = 0;
        for place in out.iter_mut().take(entries.len()) {
            let Some(head) = entries.head() else {
                break;
            };
            entries.remove(slots, head);
            entries.push_back(slots, head);
            *place = (head, slots[head].owner.order());
            written += 1;
        }
        written
    }

    fn list(&mut self, opener: OpenerId) -> &mut Owned {
        &mut self.lists[opener.0 as usize]
    }
}

#[kunit_tests(zdmirror_openers)]
mod tests {
    use super::*;

    /// Openers of one chunk of two blocks.
    fn openers() -> Result<Openers> {
        let pages = 2 * BLOCK_PAGES;
        let mut openers = Openers::new(2, NonZeroUsize::new(pages).ok_or(EINVAL)?)?;
        openers.add_chunk(0, Openers::new_chunk(pages)?);
        Ok(openers)
    }

    #[test]
    fn large_folio_is_one_entry() -> Result {
        let mut o = openers()?;
        let a = o.add()?;
        o.own(a, 512, LARGE_ORDER);
        o.own(a, 3, 0);
        assert_eq!(o.pages(a), BLOCK_PAGES + 1);
        let large = Entry {
            head: 512,
            order: LARGE_ORDER,
            opener: a,
        };
        for page in [512, 513, 1023] {
            assert_eq!(o.entry(page), Some(large));
        }
        for page in [0, 2, 4, 511, 1024, u32::MAX] {
            assert_eq!(o.entry(page), None);
        }
        let mut out = [(0, 0); 4];
        assert_eq!(o.next(a, &mut out), 2);
        assert_eq!(out[..2], [(512, LARGE_ORDER), (3, 0)]);
        o.disown(large);
        assert_eq!(o.entry(513), None);
        assert_eq!(o.pages(a), 1);
        Ok(())
    }

    #[test]
    fn split_keeps_pages_and_opener() -> Result {
        let mut o = openers()?;
        o.add()?;
        let b = o.add()?;
        o.own(b, 0, LARGE_ORDER);
        let large = o.entry(9).ok_or(EINVAL)?;
        o.split(large);
        assert_eq!(o.pages(b), BLOCK_PAGES);
        for head in [0, 1, 511] {
            let entry = Entry {
                head,
                order: 0,
                opener: b,
            };
            assert_eq!(o.entry(head), Some(entry));
        }
        let mut out = KVVec::from_elem((0, 9), BLOCK_PAGES + 1, GFP_KERNEL)?;
        assert_eq!(o.next(b, &mut out), BLOCK_PAGES);
        assert!(out[..BLOCK_PAGES]
            .iter()
            .copied()
            .eq((0..512).map(|page| (page, 0))));
        Ok(())
    }

    #[test]
    fn next_turns_the_list() -> Result {
        let mut o = openers()?;
        let a = o.add()?;
        for page in 0..5 {
            o.own(a, page, 0);
        }
        let mut out = [(0, 0); 2];
        for expected in [[0, 1], [2, 3], [4, 0]] {
            assert_eq!(o.next(a, &mut out), 2);
            assert_eq!(out.map(|(page, _)| page), expected);
        }
        Ok(())
    }

    #[test]
    fn number_is_kept_while_pages_are_left() -> Result {
        let mut o = openers()?;
        let a = o.add()?;
        o.own(a, 7, 0);
        o.remove(a);
        assert_ne!(o.add()?, a);
        o.disown(o.entry(7).ok_or(EINVAL)?);
        assert_eq!(o.add()?, a);
        Ok(())
    }

    #[test]
    fn room_for_openers_grows() -> Result {
        let mut o = openers()?;
        let first = o.add()?;
        o.own(first, 1, 0);
        while o.spare() > 0 {
            o.add()?;
        }
        assert!(o.add().is_err());
        let room = ListRoom::new(o.wanted_lists())?;
        drop(o.swap_lists(room));
        assert!(o.spare() > 0);
        let a = o.add()?;
        assert_eq!((o.pages(a), o.pages(first)), (0, 1));
        // Smaller room is of no use and given back.
        assert!(o.swap_lists(ListRoom::new(1)?).0.is_empty());
        Ok(())
    }
}
