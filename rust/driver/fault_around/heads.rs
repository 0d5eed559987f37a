// SPDX-License-Identifier: GPL-2.0

//! The places where faults may continue a stream, found without a lock.
//!
//! Most faults in no order continue nothing. They must cost no more than a fault without fault-around,
//! so that they read and write a few words here and take no lock. What two faults at the same time
//! write may get mixed up: it only decides how many pages a fault brings back, within the limits of
//! the file.

#![forbid(unsafe_code)]

use crate::mm::{
    sync::once::{
        read_once,
        write_once, //
    },
    PAGE_SIZE, //
};
use core::ops::Range;
use kernel::{
    prelude::*,
    sync::atomic::Atomic, //
};

/// Windows that are remembered for a file.
const HEADS: usize = 8;

/// Sets of windows. Files whose numbers differ by a multiple of this share one.
const SETS: usize = 16;

/// How a fault lies to an earlier window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::driver) enum Near {
    /// Right after its last page.
    Follows,
    /// Right before its first page.
    Precedes,
}

/// A fault that may bring back more than its own page, and the window that it continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::driver) struct Turn {
    /// `None` for a fault that begins a stream.
    pub(in crate::driver) near: Option<Near>,
    set: usize,
    head: usize,
}

/// The last window of a stream, together with one page before and one page after it.
struct Head {
    /// Identifies the file and the address space.
    key: Atomic<usize>,
    /// The first address of the page before.
    from: Atomic<usize>,
    /// The distance in bytes from there to the page after.
    len: Atomic<usize>,
}

impl Head {
    /// Of no file: no address space has the number 0.
    const fn none() -> Self {
        Self {
            key: Atomic::new(0),
            from: Atomic::new(0),
            len: Atomic::new(0),
        }
    }

    /// The distance of `address` from the beginning, and the whole length, if it is not beyond the end.
    #[inline]
    fn distance(&self, address: usize) -> Option<(usize, usize)> {
        let distance = address.wrapping_sub(read_once(&self.from));
        let len = read_once(&self.len);
        (distance <= len).then_some((distance, len))
    }

    fn set(&self, key: usize, window: &Range<usize>) {
        write_once(&self.key, key);
        let from = window.start.wrapping_sub(PAGE_SIZE);
        write_once(&self.from, from);
        write_once(&self.len, window.end.wrapping_sub(from));
    }
}

/// The windows of some files.
struct Set {
    heads: [Head; HEADS],
    /// The window that a new one replaces.
    oldest: Atomic<usize>,
}

impl Set {
    /// The window of `key` that `address` is beside, or within.
    // Not a part of `visit()`, which seldom gets here and would save registers for it.
    #[inline(never)]
    fn find(&self, key: usize, address: usize) -> Option<(usize, Option<Near>)> {
        let (mut precedes, mut within) = (None, None);
        for (n, head) in self.heads.iter().enumerate() {
            let Some((distance, len)) = head.distance(address) else {
                continue;
            };
            if read_once(&head.key) != key {
                continue;
            }
            if distance == len {
                return Some((n, Some(Near::Follows)));
            }
            let place = if distance == 0 {
                &mut precedes
            } else {
                &mut within
            };
            place.get_or_insert(n);
        }
        let before = precedes.map(|n| (n, Some(Near::Precedes)));
        before.or(within.map(|n| (n, None)))
    }
}

/// The windows of all files of a device.
pub(super) struct Heads(KVec<Set>);

impl Heads {
    /// May sleep.
    pub(super) fn new() -> Result<Self> {
        let mut sets = KVec::with_capacity(SETS, GFP_KERNEL)?;
        for _ in 0..SETS {
            let heads = [const { Head::none() }; HEADS];
            let oldest = Atomic::new(0);
            sets.push(Set { heads, oldest }, GFP_KERNEL)?;
        }
        Ok(Self(sets))
    }

    /// Records a fault at `address` of the address space `mm` on a page of `client`. Returns `None` where
    /// only its own page is to come back: with no window near by, unless `any` is set, and within a
    /// window, whose page was left behind or went to the device again.
    pub(super) fn visit(&self, client: u32, mm: usize, address: usize, any: bool) -> Option<Turn> {
        let key = mm ^ client as usize;
        let number = client as usize % SETS;
        let set = self.0.get(number)?;
        let turn = |near, head| Turn {
            near,
            set: number,
            head,
        };
        // Most faults in no order are near no window, and end after this look.
        let is_near = set
            .heads
            .iter()
            .any(|head| head.distance(address).is_some());
        let found = if is_near {
            set.find(key, address)
        } else {
            None
        };
        if let Some((n, near @ Some(_))) = found {
            return Some(turn(near, n));
        }
        let page = address..address + PAGE_SIZE;
        if let Some((n, None)) = found {
            set.heads[n].set(key, &page);
            return any.then_some(turn(None, n));
        }
        let n = read_once(&set.oldest) % HEADS;
        write_once(&set.oldest, n + 1);
        set.heads[n].set(key, &page);
        any.then_some(turn(None, n))
    }

    /// Forgets the windows of `client`, with those of others in its set.
    pub(super) fn forget(&self, client: u32) {
        let set = self.0.get(client as usize % SETS);
        for head in set.iter().flat_map(|set| &set.heads) {
            head.set(0, &(0..0));
        }
    }

    /// Records that the fault of `turn` brings back `window`.
    pub(in crate::driver) fn moved(
        &self,
        turn: Turn,
        client: u32,
        mm: usize,
        window: &Range<usize>,
    ) {
        let set = self.0.get(turn.set);
        if let Some(head) = set.and_then(|set| set.heads.get(turn.head)) {
            head.set(mm ^ client as usize, window);
        }
    }
}

#[kunit_tests(zdmirror_heads)]
mod tests {
    use super::*;

    const MM: usize = 0x1000;

    const fn page(n: usize) -> usize {
        (100 + n) * PAGE_SIZE
    }

    /// How a fault on page `n` of client 1 is met.
    fn visit(heads: &Heads, n: usize) -> Option<Near> {
        heads.visit(1, MM, page(n), false)?.near
    }

    #[test]
    fn neighbours_are_near() -> Result {
        for (first, second, near) in [
            (5, 6, Some(Near::Follows)),
            (5, 4, Some(Near::Precedes)),
            (5, 5, None),
            (5, 7, None),
            (5, 3, None),
        ] {
            let heads = Heads::new()?;
            assert_eq!(visit(&heads, first), None);
            assert_eq!(visit(&heads, second), near);
        }
        Ok(())
    }

    #[test]
    fn window_has_two_ends() -> Result {
        for (n, near) in [
            (20, Some(Near::Follows)),
            (9, Some(Near::Precedes)),
            (10, None),
            (19, None),
            (21, None),
            (8, None),
        ] {
            let heads = Heads::new()?;
            let turn = heads.visit(1, MM, page(10), true).ok_or(EINVAL)?;
            assert_eq!(turn.near, None);
            heads.moved(turn, 1, MM, &(page(10)..page(20)));
            assert_eq!(visit(&heads, n), near);
        }
        Ok(())
    }

    #[test]
    fn page_within_begins_a_new_window() -> Result {
        let heads = Heads::new()?;
        let turn = heads.visit(1, MM, page(10), true).ok_or(EINVAL)?;
        heads.moved(turn, 1, MM, &(page(10)..page(20)));
        assert_eq!(visit(&heads, 15), None);
        assert_eq!(visit(&heads, 20), None);
        assert_eq!(visit(&heads, 16), Some(Near::Follows));
        Ok(())
    }

    #[test]
    fn end_of_a_window_counts_more_than_its_middle() -> Result {
        let heads = Heads::new()?;
        for (first, pages) in [(15, 10), (20, 3), (10, 10)] {
            let turn = heads.visit(1, MM, page(first), true).ok_or(EINVAL)?;
            heads.moved(turn, 1, MM, &(page(first)..page(first + pages)));
        }
        assert_eq!(visit(&heads, 20), Some(Near::Follows));
        assert_eq!(visit(&heads, 19), Some(Near::Precedes));
        Ok(())
    }

    #[test]
    fn what_is_forgotten_is_not_near() -> Result {
        let heads = Heads::new()?;
        for client in [1, 2] {
            assert_eq!(heads.visit(client, MM, page(5), false), None);
        }
        heads.forget(1);
        assert_eq!(visit(&heads, 6), None);
        assert!(heads.visit(2, MM, page(6), false).is_some());
        Ok(())
    }

    #[test]
    fn others_are_not_near() -> Result {
        let heads = Heads::new()?;
        assert_eq!(visit(&heads, 5), None);
        // Another file of the same set, and another address space.
        for (client, mm) in [(1 + SETS as u32, MM), (2, MM), (1, 2 * MM)] {
            assert_eq!(heads.visit(client, mm, page(6), false), None);
        }
        assert_eq!(visit(&heads, 6), Some(Near::Follows));
        Ok(())
    }

    #[test]
    fn as_many_as_there_is_room_for() -> Result {
        let heads = Heads::new()?;
        for n in 0..=HEADS {
            assert_eq!(visit(&heads, 10 * n), None);
        }
        // The first one is forgotten, and the others are not.
        assert_eq!(visit(&heads, 1), None);
        assert_eq!(visit(&heads, 10 * HEADS + 1), Some(Near::Follows));
        assert_eq!(visit(&heads, 21), Some(Near::Follows));
        Ok(())
    }
}
