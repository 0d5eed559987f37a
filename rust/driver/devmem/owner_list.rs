// SPDX-License-Identifier: GPL-2.0

//! The clients that have the device pages in use.
//!
//! The pages of a client are on a list of its own, so that closing a file costs as much as the file
//! has migrated. A large folio is one entry, that of its first page. Core mm may split it into
//! folios of any order; the entry is split when the first part comes back.

#![forbid(unsafe_code)]

use super::index_list::{
    Link,
    Linked,
    List,
    Table, //
};
use crate::mm::PMD_ORDER;
use core::num::NonZeroUsize;
use kernel::prelude::*;

/// The number of a client of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::driver) struct ClientId(u32);

impl ClientId {
    /// The number, which no other client of the device has at the same time.
    pub(in crate::driver) fn number(self) -> u32 {
        self.0
    }
}

/// The client whose list has a page, and the order of the folio.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Owner(u32);

impl Owner {
    /// The page is free, or part of a large folio but not its first page.
    const NOBODY: Self = Self(u32::MAX);

    /// The bits from here on have the order.
    const ORDER_SHIFT: u32 = 28;

    fn new(client: ClientId, order: u32) -> Self {
        Self(client.0 | (order << Self::ORDER_SHIFT))
    }

    fn client(self) -> ClientId {
        ClientId(self.0 & ((1 << Self::ORDER_SHIFT) - 1))
    }

    fn order(self) -> u32 {
        self.0 >> Self::ORDER_SHIFT
    }
}

#[derive(Clone, Copy)]
pub(super) struct Slot {
    link: Link,
    owner: Owner,
}

impl Linked for Slot {
    fn peek(&self) -> Link {
        self.link
    }

    fn link(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// The folios of a client.
#[derive(Clone, Copy)]
struct Owned {
    entries: List,
    /// The number of base pages in the entries.
    pages: usize,
    /// Whether the client still exists.
    alive: bool,
    /// The next number on the stack of vacant ones, while the number is vacant.
    next_vacant: Option<u32>,
}

impl Owned {
    const VACANT: Self = Self {
        entries: List::EMPTY,
        pages: 0,
        alive: false,
        next_vacant: None,
    };

    /// Whether no client has the number, and no page either.
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
    /// The client that has the folio.
    pub(super) client: ClientId,
}

/// Room for clients, allocated without the allocator's lock.
pub(in crate::driver) struct ListRoom(KVVec<Owned>);

impl ListRoom {
    /// Makes room for `clients` clients. May sleep.
    pub(in crate::driver) fn new(clients: usize) -> Result<Self> {
        Ok(Self(KVVec::with_capacity(clients, GFP_KERNEL)?))
    }
}

/// The pages in use of a device. Nothing but [`OwnerLists::new`] sleeps.
pub(super) struct OwnerLists {
    slots: Table<Slot>,
    lists: KVVec<Owned>,
    /// The stack of the vacant numbers, and their number. Whoever opens many files must not make others
    /// wait for a search among them.
    vacant: Option<u32>,
    vacancies: usize,
}

impl OwnerLists {
    /// Makes lists without clients and pages, with numbers for `chunks` chunks of `chunk_pages`
    /// pages. May sleep.
    pub(super) fn new(chunks: usize, chunk_pages: NonZeroUsize) -> Result<Self> {
        Ok(Self {
            slots: Table::new(chunks, chunk_pages)?,
            lists: KVVec::with_capacity(64, GFP_KERNEL)?,
            vacant: None,
            vacancies: 0,
        })
    }

    /// Makes the slots of a chunk of `pages` pages. May sleep.
    pub(super) fn new_chunk(pages: usize) -> Result<KVVec<Slot>> {
        let slot = Slot {
            link: Link::NONE,
            owner: Owner::NOBODY,
        };
        Ok(KVVec::from_elem(slot, pages, GFP_KERNEL)?)
    }

    /// The number of pages of a chunk.
    pub(super) fn chunk_pages(&self) -> usize {
        self.slots.per_chunk()
    }

    /// The lowest number without a chunk.
    pub(super) fn vacancy(&self) -> Option<usize> {
        self.slots.vacancy()
    }

    /// Adds the slots of [`OwnerLists::new_chunk`] as chunk `number`, which is vacant. Returns the
    /// number of its first page.
    pub(super) fn add_chunk(&mut self, number: usize, slots: KVVec<Slot>) -> u32 {
        self.slots.replace(number, slots);
        self.slots.numbers(number).start
    }

    /// Removes chunk `number`, of which no page is in use.
    pub(super) fn remove_chunk(&mut self, number: usize) -> KVVec<Slot> {
        self.slots.replace(number, KVVec::new())
    }

    /// Adds a client. The list of lists may have to grow, without waiting for memory.
    pub(super) fn add(&mut self) -> Result<ClientId> {
        let number = match self.vacant {
            Some(number) => {
                self.vacant = self.lists[number as usize].next_vacant.take();
                self.vacancies -= 1;
                number
            }
            None => {
                self.lists
                    .push_within_capacity(Owned::VACANT)
                    .map_err(|_| ENOSPC)?;
                // CAST: There is no memory for as many files as would exceed `u32`.
                (self.lists.len() - 1) as u32
            }
        };
        self.lists[number as usize].alive = true;
        Ok(ClientId(number))
    }

    /// Removes a client. Pages that it still has keep its number until they are freed.
    pub(super) fn remove(&mut self, client: ClientId) {
        let list = self.list(client);
        if core::mem::replace(&mut list.alive, false) && list.is_vacant() {
            self.vacate(client);
        }
    }

    /// Puts the number of `client`, which has just become vacant, on the stack.
    fn vacate(&mut self, client: ClientId) {
        let next = self.vacant.replace(client.0);
        self.list(client).next_vacant = next;
        self.vacancies += 1;
    }

    /// The number of clients for which there is room without [`OwnerLists::swap_lists`].
    pub(super) fn spare(&self) -> usize {
        self.vacancies + self.lists.capacity() - self.lists.len()
    }

    /// The size that the room for more clients must have.
    pub(super) fn wanted_lists(&self) -> usize {
        self.lists.capacity() * 2
    }

    /// Takes room for more clients. Returns the old room, which the caller frees without the lock.
    pub(super) fn swap_lists(&mut self, mut new: ListRoom) -> ListRoom {
        if new.0.capacity() > self.lists.capacity() {
            for list in &self.lists {
                // There is room: the new capacity is larger than the number of lists.
                if new.0.push_within_capacity(*list).is_err() {
                    return new;
                }
            }
            core::mem::swap(&mut self.lists, &mut new.0);
        }
        new
    }

    /// The number of base pages that `client` has.
    pub(super) fn pages(&self, client: ClientId) -> usize {
        self.lists[client.0 as usize].pages
    }

    /// The folio with page `page`; `None` if the page is free or does not exist.
    pub(super) fn entry(&self, page: u32) -> Option<Entry> {
        // For each order, `page` can belong to one folio, with another first page. The smallest
        // comes last.
        (0..=PMD_ORDER).find_map(|order| {
            let head = page & !((1 << order) - 1);
            let owner = self.slots.get(head)?.owner;
            let covers = owner != Owner::NOBODY && owner.order() >= order;
            covers.then(|| Entry {
                head,
                order: owner.order(),
                client: owner.client(),
            })
        })
    }

    /// Gives the folio of order `order` at `head`, which was free, to `client`.
    pub(super) fn own(&mut self, client: ClientId, head: u32, order: u32) {
        self.slots[head].owner = Owner::new(client, order);
        let list = &mut self.lists[client.0 as usize];
        list.entries.push_back(&mut self.slots, head);
        list.pages += 1 << order;
    }

    /// As [`OwnerLists::own`], for folios of order 0 at `pages`.
    pub(super) fn own_pages(&mut self, client: ClientId, pages: &[u32]) {
        let Self { slots, lists, .. } = self;
        let list = &mut lists[client.0 as usize];
        let owner = Owner::new(client, 0);
        list.entries.append(slots, pages, |slot| slot.owner = owner);
        list.pages += pages.len();
    }

    /// The folio that `entry` describes is nobody's any more.
    pub(super) fn disown(&mut self, entry: Entry) {
        self.take_out(entry);
        if self.list(entry.client).is_vacant() {
            self.vacate(entry.client);
        }
    }

    /// As [`OwnerLists::disown`], where the client gets the pages again at once.
    fn take_out(&mut self, entry: Entry) {
        self.slots[entry.head].owner = Owner::NOBODY;
        let list = &mut self.lists[entry.client.0 as usize];
        list.entries.remove(&mut self.slots, entry.head);
        list.pages -= 1 << entry.order;
    }

    /// Splits `entry`, so that the folio of `order` at `head`, a part of it, becomes an entry of
    /// its own. Returns that entry.
    pub(super) fn split(&mut self, entry: Entry, head: u32, order: u32) -> Entry {
        self.take_out(entry);
        let mut part = entry.head;
        for half in (order..entry.order).rev() {
            let upper = part + (1 << half);
            let (this, other) = if head < upper {
                (part, upper)
            } else {
                (upper, part)
            };
            self.own(entry.client, other, half);
            part = this;
        }
        self.own(entry.client, part, order);
        Entry {
            head: part,
            order,
            ..entry
        }
    }

    /// Writes up to `out.len()` of the folios of `client` to `out`, by first page and order.
    /// Returns their number. Each call gives the next ones, because it rotates the list.
    pub(super) fn next(&mut self, client: ClientId, out: &mut [(u32, u32)]) -> usize {
        let Self { slots, lists, .. } = self;
        let entries = &mut lists[client.0 as usize].entries;
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

    fn list(&mut self, client: ClientId) -> &mut Owned {
        &mut self.lists[client.0 as usize]
    }
}

#[kunit_tests(zdmirror_owner_list)]
mod tests {
    use super::*;

    /// OwnerLists of one chunk of two blocks.
    fn owner_lists() -> Result<OwnerLists> {
        let pages = 1024;
        let mut clients = OwnerLists::new(2, NonZeroUsize::new(pages).ok_or(EINVAL)?)?;
        clients.add_chunk(0, OwnerLists::new_chunk(pages)?);
        Ok(clients)
    }

    #[test]
    fn large_folio_is_one_entry() -> Result {
        let mut o = owner_lists()?;
        let a = o.add()?;
        o.own(a, 512, PMD_ORDER);
        o.own(a, 3, 0);
        assert_eq!(o.pages(a), 513);
        let large = Entry {
            head: 512,
            order: PMD_ORDER,
            client: a,
        };
        for page in [512, 513, 1023] {
            assert_eq!(o.entry(page), Some(large));
        }
        for page in [0, 2, 4, 511, 1024, u32::MAX] {
            assert_eq!(o.entry(page), None);
        }
        let mut out = [(0, 0); 4];
        assert_eq!(o.next(a, &mut out), 2);
        assert_eq!(out[..2], [(512, PMD_ORDER), (3, 0)]);
        o.disown(large);
        assert_eq!(o.entry(513), None);
        assert_eq!(o.pages(a), 1);
        Ok(())
    }

    #[test]
    fn pages_are_owned_together() -> Result {
        let mut o = owner_lists()?;
        let a = o.add()?;
        for pages in [&[][..], &[4, 5, 9], &[2], &[7, 8]] {
            o.own_pages(a, pages);
        }
        assert_eq!(o.pages(a), 6);
        let mut out = [(0, 9); 8];
        assert_eq!(o.next(a, &mut out), 6);
        assert_eq!(out[..6], [4, 5, 9, 2, 7, 8].map(|page| (page, 0)));
        for page in [9, 4, 8] {
            o.disown(o.entry(page).ok_or(EINVAL)?);
        }
        assert_eq!((o.next(a, &mut out), o.pages(a)), (3, 3));
        assert_eq!(out[..3], [5, 2, 7].map(|page| (page, 0)));
        Ok(())
    }

    #[test]
    fn split_keeps_pages_and_client() -> Result {
        let mut o = owner_lists()?;
        o.add()?;
        let b = o.add()?;
        o.own(b, 0, PMD_ORDER);
        let large = o.entry(9).ok_or(EINVAL)?;
        let part = o.split(large, 8, 2);
        let expected = Entry {
            head: 8,
            order: 2,
            client: b,
        };
        assert_eq!(part, expected);
        assert_eq!(o.pages(b), 512);
        // The other parts are as large as they can be.
        for (page, head, order) in [
            (0, 0, 3),
            (7, 0, 3),
            (8, 8, 2),
            (11, 8, 2),
            (12, 12, 2),
            (16, 16, 4),
            (255, 128, 7),
            (511, 256, 8),
        ] {
            let entry = Entry {
                head,
                order,
                client: b,
            };
            assert_eq!(o.entry(page), Some(entry));
        }
        let mut out = [(0, 0); 16];
        let n = o.next(b, &mut out);
        let pages: usize = out[..n].iter().map(|&(_, order)| 1 << order).sum();
        assert_eq!((n, pages), (8, 512));
        // An entry with the same size is not split.
        assert_eq!(o.split(part, 8, 2), part);
        assert_eq!(o.pages(b), 512);
        Ok(())
    }

    #[test]
    fn next_turns_the_list() -> Result {
        let mut o = owner_lists()?;
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
        let mut o = owner_lists()?;
        let a = o.add()?;
        o.own(a, 7, 0);
        o.remove(a);
        assert_ne!(o.add()?, a);
        o.disown(o.entry(7).ok_or(EINVAL)?);
        assert_eq!(o.add()?, a);
        Ok(())
    }

    #[test]
    fn vacant_numbers_are_used_again() -> Result {
        let mut o = owner_lists()?;
        let spare = o.spare();
        let [a, b, c] = [o.add()?, o.add()?, o.add()?];
        assert_eq!(o.spare(), spare - 3);
        // A folio that is split stays with its client, also when that is gone.
        o.own(b, 0, 1);
        o.remove(b);
        o.split(o.entry(0).ok_or(EINVAL)?, 1, 0);
        assert_eq!(o.spare(), spare - 3);
        o.remove(a);
        // To remove it again changes nothing.
        o.remove(a);
        o.disown(o.entry(0).ok_or(EINVAL)?);
        assert_eq!(o.spare(), spare - 2);
        o.disown(o.entry(1).ok_or(EINVAL)?);
        o.remove(c);
        assert_eq!(o.spare(), spare);
        assert_eq!([o.add()?, o.add()?, o.add()?], [c, b, a]);
        assert_eq!((o.spare(), o.add()?.number()), (spare - 3, 3));
        Ok(())
    }

    #[test]
    fn room_for_clients_grows() -> Result {
        let mut o = owner_lists()?;
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
        // A smaller room is useless and is given back.
        assert!(o.swap_lists(ListRoom::new(1)?).0.is_empty());
        Ok(())
    }
}
