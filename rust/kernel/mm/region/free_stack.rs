// SPDX-License-Identifier: GPL-2.0

//! Free folios on their way from `folio_free`, which runs in any context, to an allocator.

use super::{
    frames::Frames,
    free_folio::FreeFolio, //
};
use crate::mm::sync::{
    cache_line::CacheLine,
    once::{
        read_once,
        write_once, //
    },
};
use kernel::{
    alloc::flags::__GFP_NOWARN,
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Release, //
    }, //
};

/// Position of the order in the value of a link. The index is in the bits below.
const ORDER_SHIFT: u32 = 28;

/// End of the stack. No index is so large, as its order would be 15.
const NIL: u32 = u32::MAX;

/// A stack of free folios of one region, without a lock: `folio_free` runs in any context, and can
/// leave folios there for the allocator.
///
/// The stack is only ever emptied as a whole, so that there is no ABA problem.
///
/// # Examples
///
/// ```
/// use kernel::mm::region::free_stack::FreeStack;
/// # use kernel::mm::region::{frames::Frames, free_folio::{FreeFolio, BLOCK_PAGES}};
/// # let (frames, folio) = (Frames::for_test(BLOCK_PAGES), FreeFolio::for_test(0));
///
/// let stack = FreeStack::new(frames)?;
/// // In `folio_free()`, in any context:
/// stack.push(folio).map_err(|_| EINVAL)?;
/// // In the allocator:
/// let folio = stack.pop().ok_or(ENOSPC)?;
/// assert!(stack.is_empty());
/// # drop(folio);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// As those of [`FreeFolio`], for the folios of `head` and `rest` and each that a chain of `links` leads to from
/// there.
pub(crate) struct FreeStack {
    first_pfn: usize,
    /// The folio that was pushed last, index and order.
    head: CacheLine<Atomic<u32>>,
    /// The folio that was pushed last of those that a bounded `take()` has left.
    rest: Atomic<u32>,
    /// For the first page of each folio on the stack, the folio that was pushed before it.
    links: KVVec<Atomic<u32>>,
}

impl FreeStack {
    /// For the pages of `frames`. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for more than 1 << 28 pages, `ENOMEM`.
    pub(crate) fn new(frames: Frames) -> Result<Self> {
        if frames.pages() > 1 << ORDER_SHIFT {
            return Err(EINVAL);
        }
        let mut links = KVVec::with_capacity(frames.pages(), GFP_KERNEL | __GFP_NOWARN)?;
        for _ in 0..frames.pages() {
            links.push(Atomic::new(NIL), GFP_KERNEL)?;
        }
        Ok(Self {
            first_pfn: frames.first_pfn(),
            head: CacheLine(Atomic::new(NIL)),
            rest: Atomic::new(NIL),
            links,
        })
    }

    /// Pushes `folio`. Does not sleep, and can be called in any context.
    ///
    /// # Errors
    ///
    /// Gives `folio` back when it is one of another region.
    pub(crate) fn push(&self, folio: FreeFolio) -> Result<(), FreeFolio> {
        let index = folio.first_pfn().wrapping_sub(self.first_pfn);
        let Some(link) = self.links.get(index) else {
            return Err(folio);
        };
        // CAST: `new()` made sure that indices fit.
        let node = index as u32 | (folio.order() << ORDER_SHIFT);
        let mut head = read_once(&self.head);
        loop {
            // INVARIANT: The folio is consumed, so that no other task uses its link.
            write_once(link, head);
            // Release: a task that takes the folio off the stack sees its link, and what was done to its pages
            // before. The same holds for the folios below it: an exchange carries on the release sequence of
            // the exchange whose value it replaces.
            match self.head.cmpxchg(head, node, Release) {
                Ok(_) => return Ok(()),
                Err(now) => head = now,
            }
        }
    }

    /// Takes up to `most` folios off and calls `f` with each, the one that was pushed last first. Returns
    /// whether some are left. `f` may push folios. In any context.
    pub(crate) fn take(&self, most: usize, mut f: impl FnMut(FreeFolio)) -> bool {
        // Acquire, here and below: pairs with the release in `push()`, of every folio on the stack.
        let mut node = self.rest.xchg(NIL, Acquire);
        // No more are free at a time. With a larger number an `f` that pushes each folio again would never end.
        for _ in 0..most.min(self.links.len()) {
            if node == NIL {
                if !self.has_new() {
                    return false;
                }
                node = self.head.xchg(NIL, Acquire);
            }
            if node == NIL {
                return false;
            }
            f(self.take_off(&mut node));
        }
        if node == NIL {
            return self.has_new();
        }
        if self.rest.cmpxchg(NIL, node, Release).is_err() {
            // Another task takes folios off at the same time, and has left a rest.
            while node != NIL {
                let _ = self.push(self.take_off(&mut node));
            }
        }
        true
    }

    /// Takes the folio off that was pushed last, if there is one. In any context.
    pub(crate) fn pop(&self) -> Option<FreeFolio> {
        let mut popped = None;
        self.take(1, |folio| popped = Some(folio));
        popped
    }

    /// Takes the first folio off the chain that begins with `node`, which the caller has taken off the
    /// stack.
    fn take_off(&self, node: &mut u32) -> FreeFolio {
        let index = (*node & ((1 << ORDER_SHIFT) - 1)) as usize;
        let order = *node >> ORDER_SHIFT;
        // The link is read before the caller gets the folio, which may be pushed again from then on.
        *node = read_once(&self.links[index]);
        // SAFETY: By the type invariants of `FreeStack` no other value had the folio, which was taken off the
        // chain.
        unsafe { FreeFolio::from_raw(self.first_pfn + index, order) }
    }

    /// Whether folios were pushed that no call of [`FreeStack::take`] has seen.
    fn has_new(&self) -> bool {
        // A folio that is pushed at this moment is found the next time.
        read_once(&self.head) != NIL
    }

    /// Whether the stack is empty. This is a hint unless the caller knows that no task pushes or takes. In any
    /// context.
    pub(crate) fn is_empty(&self) -> bool {
        !self.has_new() && read_once(&self.rest) == NIL
    }
}

#[kunit_tests(zdmirror_free_stack)]
mod tests {
    use super::*;
    use crate::mm::{
        region::free_folio::{
            FreePages,
            BLOCK_PAGES, //
        },
        PMD_ORDER, //
    };

    #[test]
    fn stack_gives_back_what_was_pushed() -> Result {
        let frames = Frames::for_test(2 * BLOCK_PAGES);
        let stack = FreeStack::new(frames)?;
        assert!(stack.is_empty());
        let (low, high) = FreeFolio::for_test(0).split().map_err(|_| EINVAL)?;
        let expected = [high.first_pfn(), low.first_pfn()];
        stack.push(low).map_err(|_| EINVAL)?;
        stack.push(high).map_err(|_| EINVAL)?;
        assert!(stack.push(FreeFolio::for_test(2)).is_err());
        let mut n = 0;
        let mut kept = None;
        let more = stack.take(2, |folio| {
            assert_eq!(folio.first_pfn(), expected[n]);
            assert_eq!(folio.order(), PMD_ORDER - 1);
            n += 1;
            // A folio may come back while the others are taken.
            kept = if n == 1 {
                stack.push(folio).err()
            } else {
                Some(folio)
            };
        });
        assert_eq!(n, 2);
        assert!(more && kept.is_some() && !stack.is_empty());
        assert!(!stack.take(1, |folio| assert_eq!(folio.first_pfn(), expected[0])));
        assert!(stack.is_empty());
        Ok(())
    }

    #[test]
    fn portions_are_bounded() -> Result {
        let stack = FreeStack::new(Frames::for_test(BLOCK_PAGES))?;
        let block = FreeFolio::for_test(0);
        let first = block.first_pfn();
        let mut pages = FreePages::new(block).map_err(|_| EINVAL)?;
        for _ in 0..5 {
            let page = pages.take(0).ok_or(EINVAL)?;
            stack.push(page).map_err(|_| EINVAL)?;
        }
        let mut seen = KVec::new();
        let mut see = |folio: FreeFolio| {
            let _ = seen.push(folio.first_pfn() - first, GFP_KERNEL);
            let _ = pages.put(folio);
        };
        assert!(stack.take(2, &mut see));
        // Those that are left are on the stack.
        assert!(!stack.is_empty());
        assert!(stack.take(2, &mut see));
        assert!(!stack.take(2, &mut see) && stack.is_empty());
        assert!(!stack.take(2, &mut see));
        assert_eq!(seen[..], [4, 3, 2, 1, 0]);
        assert_eq!(pages.len(), BLOCK_PAGES);
        // A call that has taken the rest continues with the folios that were pushed meanwhile.
        for _ in 0..3 {
            let page = pages.take(0).ok_or(EINVAL)?;
            stack.push(page).map_err(|_| EINVAL)?;
        }
        let mut left = 0;
        assert!(stack.take(1, |folio| drop(stack.push(folio))));
        assert!(!stack.take(usize::MAX, |_| left += 1));
        assert_eq!(left, 3);
        // A folio that comes back each time is taken as often as there are pages.
        let page = pages.take(0).ok_or(EINVAL)?;
        stack.push(page).map_err(|_| EINVAL)?;
        let mut turns = 0;
        assert!(stack.take(usize::MAX, |folio| {
            turns += 1;
            drop(stack.push(folio));
        }));
        assert_eq!(turns, BLOCK_PAGES);
        Ok(())
    }
}
