// SPDX-License-Identifier: GPL-2.0

//! The pins that `ZDM_PIN` made for an open file.

#![forbid(unsafe_code)]

use crate::{
    mm::user::{
        locked_memory::LockedPages,
        pin::{
            PinRequest,
            PinnedPages, //
        },
        range::PageRange, //
    },
    uapi::{
        ZDM_PIN_MAX,
        ZDM_PIN_MAX_PAGES, //
    },
};
use kernel::prelude::*;

/// Pages that a client holds, and that count against the limit of the pinning user.
pub(in crate::driver) struct Pinned {
    // The pages are released before they stop counting.
    pages: PinnedPages,
    _locked: LockedPages,
}

impl Pinned {
    /// Holds the pages of `range`. May sleep.
    ///
    /// # Errors
    ///
    /// As [`LockedPages::charge`] and [`PinnedPages::new`].
    pub(super) fn new(range: PageRange, request: PinRequest) -> Result<Self> {
        let locked = LockedPages::charge(range.pages())?;
        Ok(Self {
            pages: PinnedPages::new(range, request)?,
            _locked: locked,
        })
    }

    /// Makes the pages dirty when they are released.
    pub(super) fn mark_dirty(&mut self) {
        self.pages.mark_dirty();
    }
}

/// What is held, by number.
///
/// # Invariants
///
/// `list` has room for what is promised, and all of it together is no more than the uapi allows.
pub(in crate::driver) struct Pins<T> {
    list: KVec<Held<T>>,
    /// The number that is tried next. Numbers increase, so that none is used again soon.
    next_id: u32,
    /// The number of pins in the list and of promised places.
    places: usize,
    /// The number of pages of both.
    pages: usize,
}

struct Held<T> {
    id: u32,
    pages: usize,
    what: T,
}

/// Room for all pins of a file, allocated without a lock.
pub(super) struct Room<T>(KVec<Held<T>>);

impl<T> Room<T> {
    /// Makes room. May sleep.
    pub(super) fn new() -> Result<Self> {
        let list = KVec::with_capacity(ZDM_PIN_MAX as usize, GFP_KERNEL_ACCOUNT)?;
        Ok(Self(list))
    }
}

impl<T> Pins<T> {
    /// A list without room.
    pub(super) fn new() -> Self {
        Self {
            list: KVec::new(),
            next_id: 1,
            places: 0,
            pages: 0,
        }
    }

    /// Whether the list has no room yet.
    pub(super) fn needs_room(&self) -> bool {
        self.list.capacity() == 0
    }

    /// Takes `room`. Returns what is not needed, for the caller to free without the lock.
    pub(super) fn take_room(&mut self, room: Room<T>) -> Option<Room<T>> {
        if !self.needs_room() {
            return Some(room);
        }
        self.list = room.0;
        None
    }

    /// Promises a place to a pin of `pages` pages, which is for [`Pins::add`] or
    /// [`Pins::give_up`] then.
    ///
    /// # Errors
    ///
    /// `ENOSPC` when there would be too many of either, or the list has no room.
    pub(super) fn promise(&mut self, pages: usize) -> Result {
        let total = self.pages.saturating_add(pages);
        let most = self.list.capacity().min(ZDM_PIN_MAX as usize);
        if self.places >= most || total > ZDM_PIN_MAX_PAGES as usize {
            return Err(ENOSPC);
        }
        self.places += 1;
        self.pages = total;
        Ok(())
    }

    /// Takes a promise back.
    pub(super) fn give_up(&mut self, pages: usize) {
        self.places = self.places.saturating_sub(1);
        self.pages = self.pages.saturating_sub(pages);
    }

    /// Takes what a place was promised to, and numbers it.
    ///
    /// # Errors
    ///
    /// Gives it back where there is no place.
    pub(super) fn add(&mut self, pages: usize, what: T) -> core::result::Result<u32, T> {
        let mut id = self.next_id;
        while id == 0 || self.list.iter().any(|held| held.id == id) {
            id = id.wrapping_add(1);
        }
        let held = Held { id, pages, what };
        match self.list.push_within_capacity(held) {
            Ok(()) => {
                self.next_id = id.wrapping_add(1);
                Ok(id)
            }
            Err(err) => {
                self.give_up(pages);
                Err(err.0.what)
            }
        }
    }

    /// Removes pin `id`.
    pub(super) fn remove(&mut self, id: u32) -> Option<T> {
        let place = self.list.iter().position(|held| held.id == id)?;
        let held = self.list.remove(place).ok()?;
        self.give_up(held.pages);
        Some(held.what)
    }

    /// Removes any pin.
    pub(super) fn remove_any(&mut self) -> Option<T> {
        let id = self.list.last()?.id;
        self.remove(id)
    }
}

#[kunit_tests(zdmirror_driver_pins)]
mod tests {
    use super::*;

    fn pin<T>(pins: &mut Pins<T>, pages: usize, what: T) -> Result<u32> {
        pins.promise(pages)?;
        pins.add(pages, what).map_err(|_| EINVAL)
    }

    fn with_room<T>() -> Result<Pins<T>> {
        let mut pins = Pins::new();
        assert!(pins.needs_room());
        assert_eq!(pins.promise(1), Err(ENOSPC));
        assert!(pins.take_room(Room::new()?).is_none());
        assert!(!pins.needs_room());
        // Another task may have been faster.
        assert!(pins.take_room(Room::new()?).is_some());
        Ok(pins)
    }

    #[test]
    fn so_many_pins_and_pages() -> Result {
        const MOST: usize = ZDM_PIN_MAX_PAGES as usize;
        let mut pins = with_room()?;
        for (pages, result) in [
            (MOST + 1, Err(ENOSPC)),
            (usize::MAX, Err(ENOSPC)),
            (MOST, Ok(1)),
            (1, Err(ENOSPC)),
        ] {
            assert_eq!(pin(&mut pins, pages, ()), result);
        }
        assert_eq!(pins.remove(1), Some(()));
        for _ in 0..ZDM_PIN_MAX {
            pin(&mut pins, 1, ())?;
        }
        assert_eq!(pin(&mut pins, 1, ()), Err(ENOSPC));
        assert_eq!(pins.remove_any(), Some(()));
        assert!(pin(&mut pins, 1, ()).is_ok());
        Ok(())
    }

    #[test]
    fn promises_count() -> Result {
        let mut pins = with_room()?;
        for _ in 0..ZDM_PIN_MAX {
            pins.promise(2)?;
        }
        assert_eq!(pins.promise(1), Err(ENOSPC));
        pins.give_up(2);
        let id = pin(&mut pins, 1, 7).map_err(|_| EINVAL)?;
        assert_eq!(pins.promise(1), Err(ENOSPC));
        assert_eq!(pins.remove(id), Some(7));
        for _ in 1..ZDM_PIN_MAX {
            pins.give_up(2);
        }
        assert_eq!((pins.places, pins.pages), (0, 0));
        Ok(())
    }

    #[test]
    fn numbers_are_not_used_again_soon() -> Result {
        let mut pins = with_room()?;
        let first = pin(&mut pins, 1, 1)?;
        let second = pin(&mut pins, 1, 2)?;
        assert_eq!((first, second), (1, 2));
        assert_eq!(pins.remove(first), Some(1));
        assert_eq!(pins.remove(first), None);
        assert_eq!(pin(&mut pins, 1, 3)?, 3);
        // After the last number they start again, without 0 and without numbers in use.
        pins.next_id = u32::MAX;
        assert_eq!(pin(&mut pins, 1, 4)?, u32::MAX);
        assert_eq!(pin(&mut pins, 1, 5)?, 1);
        assert_eq!(pin(&mut pins, 1, 6)?, 4);
        assert_eq!(pins.remove(0), None);
        Ok(())
    }
}
