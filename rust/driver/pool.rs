// SPDX-License-Identifier: GPL-2.0

//! Which device pages are free, and whose the others are.
//!
//! Every page has a slot, and every slot is on one doubly linked list: that of the free pages or
//! that of the opener who has it. Links are indices, so that the lists need no allocation and no
//! `unsafe`, taking and freeing a page are O(1) and may happen under a spinlock, and closing a
//! file costs what it migrated.

#![forbid(unsafe_code)]

use core::num::NonZeroUsize;
use kernel::prelude::*;

/// No slot.
const NIL: u32 = u32::MAX;

/// Chunks that a device may grow to.
pub(super) const MAX_CHUNKS: usize = 16;

/// The list of free pages.
const FREE: u32 = 0;

/// The list of pages that are nobody's, but were not in the state of a free page when they were to
/// be handed out. They are not tried again. Openers have the numbers above.
const QUARANTINE: u32 = 1;

#[derive(Clone, Copy)]
struct Slot {
    prev: u32,
    next: u32,
    /// Number of the list that the slot is on.
    list: u32,
}

#[derive(Clone, Copy)]
struct List {
    head: u32,
    tail: u32,
    len: u32,
    /// Whether an opener owns the list; the free list is always owned.
    owned: bool,
}

const EMPTY: List = List {
    head: NIL,
    tail: NIL,
    len: 0,
    owned: false,
};

/// Number of an opener in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenerId(u32);

/// Slots of a chunk that is not part of a pool yet, so that they are allocated without its lock.
pub(super) struct NewSlots(KVVec<Slot>);

impl NewSlots {
    /// Allocates slots for `pages` pages. May sleep.
    pub(super) fn new(pages: usize) -> Result<Self> {
        let slot = Slot {
            prev: NIL,
            next: NIL,
            list: FREE,
        };
        Ok(Self(KVVec::from_elem(slot, pages, GFP_KERNEL)?))
    }
}

/// The pages of a device. To be kept under a spinlock; nothing here sleeps.
pub(super) struct Pool {
    /// Not zero, so that dividing by it cannot panic.
    chunk_pages: NonZeroUsize,
    chunks: KVec<KVVec<Slot>>,
    lists: KVVec<List>,
    /// A page in use that the next [`Pool::take`] is to hand out again: fault injection.
    twice: Option<u32>,
}

impl Pool {
    /// A pool without pages, for chunks of `chunk_pages` pages. May sleep.
    pub(super) fn new(chunk_pages: NonZeroUsize) -> Result<Self> {
        let mut lists = KVVec::with_capacity(64, GFP_KERNEL)?;
        lists.push(
            List {
                owned: true,
                ..EMPTY
            },
            GFP_KERNEL,
        )?;
        lists.push(
            List {
                owned: true,
                ..EMPTY
            },
            GFP_KERNEL,
        )?;
        Ok(Self {
            chunk_pages,
            chunks: KVec::with_capacity(MAX_CHUNKS, GFP_KERNEL)?,
            lists,
            twice: None,
        })
    }

    /// Adds the pages of a chunk, all free, and returns the number of its first page.
    pub(super) fn add_chunk(&mut self, new: NewSlots) -> Result<u32> {
        if new.0.len() != self.chunk_pages.get() || self.chunks.len() >= MAX_CHUNKS {
            return Err(EINVAL);
        }
        let base = self.chunks.len() * self.chunk_pages.get();
        self.chunks
            .push_within_capacity(new.0)
            .map_err(|_| ENOMEM)?;
        // The free list is a stack: the lowest page is to come first.
        for page in (base..base + self.chunk_pages.get()).rev() {
            self.push_front(FREE, page as u32);
        }
        Ok(base as u32)
    }

    /// Pages that are free.
    pub(super) fn free(&self) -> usize {
        self.lists[FREE as usize].len as usize
    }

    /// Whether another chunk may be added.
    pub(super) fn can_grow(&self) -> bool {
        self.chunks.len() < MAX_CHUNKS
    }

    /// A new opener. The list of lists may have to grow, without waiting for memory.
    pub(super) fn add_opener(&mut self) -> Result<OpenerId> {
        let vacant = self.lists.iter().position(|l| !l.owned && l.len == 0);
        let number = match vacant {
            Some(number) => number,
            None => {
                if self.lists.len() == self.lists.capacity() {
                    return Err(ENOSPC);
                }
                self.lists.push_within_capacity(EMPTY).map_err(|_| ENOMEM)?;
                self.lists.len() - 1
            }
        };
        self.lists[number].owned = true;
        Ok(OpenerId(number as u32))
    }

    /// How many openers there are room for without [`Pool::swap_lists`].
    pub(super) fn spare_openers(&self) -> usize {
        let vacant = self.lists.iter().filter(|l| !l.owned && l.len == 0).count();
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

    /// The opener is gone. Pages that it still has keep its number until they are freed.
    pub(super) fn remove_opener(&mut self, opener: OpenerId) {
        self.lists[opener.0 as usize].owned = false;
    }

    /// Takes a free page for `opener`.
    pub(super) fn take(&mut self, opener: OpenerId) -> Option<u32> {
        // One that was freed meanwhile is on the free list, and not to be given out past it.
        if let Some(page) = self
            .twice
            .take()
            .filter(|&p| self.is_free(p) == Some(false))
        {
            return Some(page);
        }
        let page = self.lists[FREE as usize].head;
        if page == NIL {
            return None;
        }
        self.unlink(page);
        self.push_back(opener.0, page);
        Some(page)
    }

    /// Page `page` is free again. `false` when it was free already.
    pub(super) fn put(&mut self, page: u32) -> bool {
        match self.slot(page) {
            Some(slot) if slot.list > QUARANTINE => {
                self.unlink(page);
                self.push_front(FREE, page);
                true
            }
            _ => false,
        }
    }

    /// Sets `page`, which was taken but could not be used, aside.
    pub(super) fn quarantine(&mut self, page: u32) {
        if self.slot(page).is_some() {
            self.unlink(page);
            self.push_back(QUARANTINE, page);
        }
    }

    /// Whether `page` is nobody's, `None` when there is no such page.
    pub(super) fn is_free(&self, page: u32) -> Option<bool> {
        self.slot(page).map(|slot| slot.list <= QUARANTINE)
    }

    /// A free page, for fault injection.
    pub(super) fn peek_free(&self) -> Option<u32> {
        let page = self.lists[FREE as usize].tail;
        (page != NIL).then_some(page)
    }

    /// Makes the next [`Pool::take`] hand out `page`, in use or not.
    pub(super) fn hand_out_twice(&mut self, page: u32) {
        self.twice = Some(page);
    }

    /// Pages that `opener` has.
    pub(super) fn owned(&self, opener: OpenerId) -> usize {
        self.lists[opener.0 as usize].len as usize
    }

    /// Writes up to `out.len()` of the pages of `opener` to `out` and returns how many. Each call
    /// gives the next ones, as the list is turned.
    pub(super) fn next_owned(&mut self, opener: OpenerId, out: &mut [u32]) -> usize {
        let n = out.len().min(self.owned(opener));
        for entry in &mut out[..n] {
            let page = self.lists[opener.0 as usize].head;
            *entry = page;
            self.unlink(page);
            self.push_back(opener.0, page);
        }
        n
    }

    fn slot(&self, page: u32) -> Option<&Slot> {
        let page = page as usize;
        self.chunks
            .get(page / self.chunk_pages)?
            .get(page % self.chunk_pages)
    }

    /// Changes a slot that is known to exist.
    fn slot_mut(&mut self, page: u32) -> &mut Slot {
        let page = page as usize;
        &mut self.chunks[page / self.chunk_pages][page % self.chunk_pages]
    }

    fn unlink(&mut self, page: u32) {
        let Slot { prev, next, list } = *self.slot_mut(page);
        if prev == NIL {
            self.lists[list as usize].head = next;
        } else {
            self.slot_mut(prev).next = next;
        }
        if next == NIL {
            self.lists[list as usize].tail = prev;
        } else {
            self.slot_mut(next).prev = prev;
        }
        self.lists[list as usize].len -= 1;
    }

    fn push_front(&mut self, list: u32, page: u32) {
        let next = self.lists[list as usize].head;
        *self.slot_mut(page) = Slot {
            prev: NIL,
            next,
            list,
        };
        if next == NIL {
            self.lists[list as usize].tail = page;
        } else {
            self.slot_mut(next).prev = page;
        }
        let list = &mut self.lists[list as usize];
        list.head = page;
        list.len += 1;
    }

    fn push_back(&mut self, list: u32, page: u32) {
        let prev = self.lists[list as usize].tail;
        *self.slot_mut(page) = Slot {
            prev,
            next: NIL,
            list,
        };
        if prev == NIL {
            self.lists[list as usize].head = page;
        } else {
            self.slot_mut(prev).next = page;
        }
        let list = &mut self.lists[list as usize];
        list.tail = page;
        list.len += 1;
    }
}

/// Room for openers, allocated without the pool's lock.
pub(super) struct ListRoom(KVVec<List>);

impl ListRoom {
    /// Room for `openers` openers. May sleep.
    pub(super) fn new(openers: usize) -> Result<Self> {
        Ok(Self(KVVec::with_capacity(openers, GFP_KERNEL)?))
    }
}

#[kunit_tests(zdmirror_pool)]
mod tests {
    use super::*;

    fn pool(pages: usize) -> Result<Pool> {
        let mut pool = Pool::new(NonZeroUsize::new(pages).ok_or(EINVAL)?)?;
        pool.add_chunk(NewSlots::new(pages)?)?;
        Ok(pool)
    }

    #[test]
    fn empty_pool_has_nothing() -> Result {
        let mut pool = Pool::new(NonZeroUsize::MIN)?;
        let a = pool.add_opener()?;
        assert_eq!(pool.take(a), None);
        assert_eq!(pool.is_free(0), None);
        assert!(!pool.put(0));
        Ok(())
    }

    #[test]
    fn each_page_once_then_none() -> Result {
        let mut pool = pool(4)?;
        let a = pool.add_opener()?;
        for page in 0..4 {
            assert_eq!(pool.take(a), Some(page));
            assert_eq!(pool.is_free(page), Some(false));
        }
        assert_eq!(pool.take(a), None);
        assert_eq!(pool.free(), 0);
        assert_eq!(pool.owned(a), 4);
        Ok(())
    }

    #[test]
    fn put_twice_is_refused() -> Result {
        let mut pool = pool(4)?;
        let a = pool.add_opener()?;
        let page = pool.take(a).ok_or(ENOMEM)?;
        assert!(pool.put(page));
        assert!(!pool.put(page));
        assert_eq!(pool.free(), 4);
        assert_eq!(pool.owned(a), 0);
        Ok(())
    }

    #[test]
    fn middle_of_a_list_can_go() -> Result {
        let mut pool = pool(8)?;
        let a = pool.add_opener()?;
        for _ in 0..5 {
            pool.take(a);
        }
        assert!(pool.put(2));
        assert!(pool.put(0));
        assert!(pool.put(4));
        let mut out = [NIL; 8];
        assert_eq!(pool.next_owned(a, &mut out), 2);
        assert_eq!(out[..2], [1, 3]);
        // The last page freed is the first one taken.
        assert_eq!(pool.take(a), Some(4));
        Ok(())
    }

    #[test]
    fn openers_do_not_mix() -> Result {
        let mut pool = pool(8)?;
        let a = pool.add_opener()?;
        let b = pool.add_opener()?;
        for _ in 0..3 {
            pool.take(a);
            pool.take(b);
        }
        let mut out = [NIL; 8];
        assert_eq!(pool.next_owned(b, &mut out), 3);
        assert_eq!(out[..3], [1, 3, 5]);
        assert_eq!(pool.owned(a), 3);
        Ok(())
    }

    #[test]
    fn next_owned_turns_the_list() -> Result {
        let mut pool = pool(8)?;
        let a = pool.add_opener()?;
        for _ in 0..5 {
            pool.take(a);
        }
        let mut out = [NIL; 2];
        pool.next_owned(a, &mut out);
        assert_eq!(out, [0, 1]);
        pool.next_owned(a, &mut out);
        assert_eq!(out, [2, 3]);
        pool.next_owned(a, &mut out);
        assert_eq!(out, [4, 0]);
        Ok(())
    }

    #[test]
    fn number_is_kept_while_pages_are_left() -> Result {
        let mut pool = pool(4)?;
        let a = pool.add_opener()?;
        let page = pool.take(a).ok_or(ENOMEM)?;
        pool.remove_opener(a);
        assert_ne!(pool.add_opener()?, a);
        assert!(pool.put(page));
        assert_eq!(pool.add_opener()?, a);
        Ok(())
    }

    #[test]
    fn grows_chunk_by_chunk() -> Result {
        let mut pool = pool(2)?;
        let a = pool.add_opener()?;
        pool.take(a);
        pool.take(a);
        assert_eq!(pool.take(a), None);
        assert_eq!(pool.add_chunk(NewSlots::new(2)?)?, 2);
        assert_eq!(pool.take(a), Some(2));
        assert!(pool.add_chunk(NewSlots::new(3)?).is_err());
        for _ in 2..MAX_CHUNKS {
            pool.add_chunk(NewSlots::new(2)?)?;
        }
        assert!(!pool.can_grow());
        assert!(pool.add_chunk(NewSlots::new(2)?).is_err());
        Ok(())
    }

    #[test]
    fn room_for_openers_grows() -> Result {
        let mut pool = pool(2)?;
        while pool.spare_openers() > 0 {
            pool.add_opener()?;
        }
        assert!(pool.add_opener().is_err());
        let room = ListRoom::new(pool.wanted_lists())?;
        drop(pool.swap_lists(room));
        let a = pool.add_opener()?;
        assert_eq!(pool.take(a), Some(0));
        Ok(())
    }

    #[test]
    fn quarantined_page_is_not_tried_again() -> Result {
        let mut pool = pool(2)?;
        let a = pool.add_opener()?;
        let page = pool.take(a).ok_or(ENOMEM)?;
        pool.quarantine(page);
        assert_eq!(pool.owned(a), 0);
        assert_eq!(pool.is_free(page), Some(true));
        assert_eq!(pool.take(a), Some(1));
        assert_eq!(pool.take(a), None);
        assert!(!pool.put(page));
        Ok(())
    }

    #[test]
    fn injected_page_comes_next_and_once() -> Result {
        let mut pool = pool(4)?;
        let a = pool.add_opener()?;
        assert_eq!(pool.take(a), Some(0));
        pool.hand_out_twice(0);
        assert_eq!(pool.take(a), Some(0));
        assert_eq!(pool.take(a), Some(1));
        Ok(())
    }
}
