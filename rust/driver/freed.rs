// SPDX-License-Identifier: GPL-2.0

//! Pages of a chunk that came back and are not in the pool again yet.
//!
//! The last reference on a folio may be dropped anywhere, in interrupt context too: by the
//! completion of I/O to a pinned page, for one. `folio_free` must not wait for the pool's lock
//! there, so it leaves the page on a stack, and whoever takes that lock next empties the stack.

#![forbid(unsafe_code)]

use kernel::{
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Relaxed,
        Release, //
    }, //
};

/// The order is in the bits from here on of what a link holds, the index below.
const ORDER_SHIFT: u32 = 28;

/// End of the stack. No index is so large.
const NIL: u32 = u32::MAX;

/// In the link of a page that is not on the stack. No index is so large either.
const ABSENT: u32 = u32::MAX - 1;

/// Folios that are off the stack of a [`Freed`] and that its user did not get yet.
pub(super) struct Taken(u32);

impl Taken {
    pub(super) const NONE: Self = Self(NIL);
}

/// A stack without a lock. None of its methods but [`Freed::new`] sleeps, and they can be called in
/// any context.
///
/// There is no ABA problem, as pages are only ever taken off all at once.
pub(super) struct Freed {
    /// The page pushed last, with its order.
    head: Atomic<u32>,
    /// For each page the one that was pushed before it, with its order.
    links: KVVec<Atomic<u32>>,
}

impl Freed {
    /// For a chunk of `pages` pages. May sleep.
    pub(super) fn new(pages: usize) -> Result<Self> {
        // Less one, so that no index is that of `ABSENT`.
        if pages >= (1 << ORDER_SHIFT) - 1 {
            return Err(EINVAL);
        }
        let mut links = KVVec::with_capacity(pages, GFP_KERNEL)?;
        for _ in 0..pages {
            links.push(Atomic::new(ABSENT), GFP_KERNEL)?;
        }
        Ok(Self {
            head: Atomic::new(NIL),
            links,
        })
    }

    /// Pushes the folio of order `order` at page `index` of the chunk.
    ///
    /// `false` when it is on the stack already or there is no such page: nothing is changed then.
    pub(super) fn push(&self, index: u32, order: u32) -> bool {
        let Some(link) = self.links.get(index as usize) else {
            return false;
        };
        let mut head = self.head.load(Relaxed);
        // A kernel that frees a page twice must not make a ring of the stack. This orders nothing:
        // the page came here through a hand-out, after `take()` had let it go.
        if order > 14 || link.cmpxchg(ABSENT, head, Relaxed).is_err() {
            return false;
        }
        loop {
            // Release: who finds the page on the stack finds its link, and what was done to the
            // page before. Pages below it were published likewise, and stay so: an exchange
            // carries on the release sequence of the one whose value it replaces.
            match self
                .head
                .cmpxchg(head, index | (order << ORDER_SHIFT), Release)
            {
                Ok(_) => return true,
                Err(now) => {
                    head = now;
                    link.store(head, Relaxed);
                }
            }
        }
    }

    /// Takes up to `most` folios off and calls `f` with index and order of each, those pushed last
    /// first. `taken` holds those that are off the stack and were not given to `f` yet; it must be
    /// the same in each call. Returns whether some are left there.
    pub(super) fn take(&self, taken: &mut Taken, most: usize, mut f: impl FnMut(u32, u32)) -> bool {
        if taken.0 == NIL {
            if self.is_empty() {
                return false;
            }
            // Acquire: pairs with the release in `push()`, of every page on the stack.
            taken.0 = self.head.xchg(NIL, Acquire);
        }
        for _ in 0..most {
            let node = taken.0;
            if node == NIL {
                return false;
            }
            let index = node & ((1 << ORDER_SHIFT) - 1);
            // The page is let go before `f` can hand it out, as it may be pushed again from then
            // on. It takes the pool's lock and a reference count to get there, which order this.
            taken.0 = self.links[index as usize].xchg(ABSENT, Relaxed);
            f(index, node >> ORDER_SHIFT);
        }
        taken.0 != NIL
    }

    /// Whether nothing is on the stack. A hint unless the caller knows that nobody pushes.
    pub(super) fn is_empty(&self) -> bool {
        // A page that is missed here is met the next time.
        self.head.load(Relaxed) == NIL
    }
}

#[kunit_tests(zdmirror_freed)]
mod tests {
    use super::*;

    /// What `take()` gives, up to eight folios of it.
    fn drain(freed: &Freed) -> ([(u32, u32); 8], usize) {
        let mut out = [(0, 0); 8];
        let mut n = 0;
        freed.take(&mut Taken(NIL), usize::MAX, |index, order| {
            if let Some(place) = out.get_mut(n) {
                *place = (index, order);
            }
            n += 1;
        });
        (out, n)
    }

    #[test]
    fn portions_are_bounded() -> Result {
        let freed = Freed::new(8)?;
        let mut taken = Taken(NIL);
        for index in 0..5 {
            assert!(freed.push(index, 0));
        }
        let mut seen = 0;
        assert!(freed.take(&mut taken, 2, |_, _| seen += 1));
        assert_eq!(seen, 2);
        // What is pushed meanwhile comes after the rest.
        assert!(freed.push(4, 0));
        assert!(!freed.take(&mut taken, 3, |index, _| seen += index as usize * 10));
        assert_eq!(seen, 32);
        assert!(!freed.take(&mut taken, 3, |index, _| seen += index as usize * 100));
        assert_eq!(seen, 432);
        Ok(())
    }

    #[test]
    fn last_pushed_comes_first() -> Result {
        let freed = Freed::new(1024)?;
        assert!(freed.is_empty());
        for (index, order) in [(0, 0), (512, 9), (1023, 0)] {
            assert!(freed.push(index, order));
        }
        assert!(!freed.is_empty());
        let (out, n) = drain(&freed);
        assert_eq!(out[..n], [(1023, 0), (512, 9), (0, 0)]);
        assert!(freed.is_empty());
        assert_eq!(drain(&freed).1, 0);
        Ok(())
    }

    #[test]
    fn second_free_makes_no_ring() -> Result {
        let freed = Freed::new(4)?;
        assert!(freed.push(2, 0));
        assert!(!freed.push(2, 0));
        assert!(freed.push(1, 0));
        assert!(!freed.push(2, 9));
        let (out, n) = drain(&freed);
        assert_eq!(out[..n], [(1, 0), (2, 0)]);
        assert!(freed.push(2, 0));
        assert_eq!(drain(&freed).1, 1);
        Ok(())
    }

    #[test]
    fn page_may_come_back_while_others_are_taken() -> Result {
        let freed = Freed::new(4)?;
        freed.push(0, 0);
        freed.push(1, 0);
        let mut again = false;
        freed.take(&mut Taken(NIL), 2, |index, order| {
            again |= index == 1 && freed.push(index, order);
        });
        assert!(again);
        let (out, n) = drain(&freed);
        assert_eq!(out[..n], [(1, 0)]);
        Ok(())
    }

    #[test]
    fn bounds() -> Result {
        let freed = Freed::new(4)?;
        assert!(!freed.push(4, 0));
        assert!(!freed.push(u32::MAX, 0));
        assert!(!freed.push(0, 15));
        assert!(freed.push(3, 14));
        let (out, n) = drain(&freed);
        assert_eq!(out[..n], [(3, 14)]);
        assert!(Freed::new(1 << ORDER_SHIFT).is_err());
        assert!(Freed::new((1 << ORDER_SHIFT) - 1).is_err());
        Ok(())
    }
}
