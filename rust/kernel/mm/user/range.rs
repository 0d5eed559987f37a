// SPDX-License-Identifier: GPL-2.0

//! Ranges of user addresses, checked once.

use crate::{
    bindings,
    mm::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
};
use kernel::prelude::*;

/// End of the addresses that user space can have, in bytes: `TASK_SIZE_MAX`.
pub(crate) fn task_size() -> usize {
    // SAFETY: The function reads a constant of the running machine.
    unsafe { bindings::zdm_task_size() }
}

/// Whole pages of user addresses, at least one.
///
/// # Examples
///
/// ```
/// use kernel::mm::user::range::PageRange;
///
/// let range = PageRange::new(0x10000, 3)?;
/// assert_eq!((range.start(), range.end(), range.pages()), (0x10000, 0x13000, 3));
/// assert_eq!(range.skip(1), PageRange::new(0x11000, 2).ok());
/// assert_eq!(range.addresses().last(), Some(0x12000));
/// let mut parts = range.batches(2).map(|part| part.pages());
/// assert_eq!((parts.next(), parts.next(), parts.next()), (Some(2), Some(1), None));
/// assert!(PageRange::new(0x10001, 1).is_err());
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - `start` and `end` are multiples of [`PAGE_SIZE`], and `start < end`.
/// - `end` is at most [`task_size`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRange {
    start: usize,
    end: usize,
}

impl PageRange {
    /// The `pages` pages from address `start`, in bytes, on.
    ///
    /// # Errors
    ///
    /// `EINVAL` unless the range starts on a page, is not empty, and ends within user addresses.
    pub(crate) fn new(start: usize, pages: usize) -> Result<Self> {
        let limit = task_size();
        if start % PAGE_SIZE != 0 || pages == 0 || pages > limit >> PAGE_SHIFT {
            return Err(EINVAL);
        }
        // `pages` is small enough for the shift.
        let end = start.checked_add(pages << PAGE_SHIFT).ok_or(EINVAL)?;
        if end > limit {
            return Err(EINVAL);
        }
        // INVARIANT: Checked above.
        Ok(Self { start, end })
    }

    /// First address, in bytes.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// End address, in bytes, exclusive.
    pub(crate) fn end(&self) -> usize {
        self.end
    }

    /// Number of pages, at least 1.
    pub(crate) fn pages(&self) -> usize {
        (self.end - self.start) >> PAGE_SHIFT
    }

    /// The address of each page, in bytes, in ascending order.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = usize> {
        (self.start..self.end).step_by(PAGE_SIZE)
    }

    /// The first `pages` pages: at least one, and at most all.
    pub(crate) fn first(&self, pages: usize) -> Self {
        let pages = pages.clamp(1, self.pages());
        // INVARIANT: Between one page and all of `self`.
        Self {
            start: self.start,
            end: self.start + (pages << PAGE_SHIFT),
        }
    }

    /// All but the first `pages` pages; `None` when no page is left.
    pub(crate) fn skip(&self, pages: usize) -> Option<Self> {
        // INVARIANT: At least one page of `self` is left.
        (pages < self.pages()).then(|| Self {
            start: self.start + (pages << PAGE_SHIFT),
            end: self.end,
        })
    }

    /// The range in parts of `pages` pages, of which the last one may be shorter.
    pub(crate) fn batches(&self, pages: usize) -> impl Iterator<Item = Self> {
        let mut left = Some(*self);
        core::iter::from_fn(move || {
            let batch = left?.first(pages);
            left = left?.skip(batch.pages());
            Some(batch)
        })
    }
}

#[kunit_tests(zdmirror_range)]
mod tests {
    use super::*;

    #[test]
    fn borders() {
        let top = task_size();
        let bad = [
            (PAGE_SIZE + 1, 1),
            (PAGE_SIZE - 1, 1),
            (PAGE_SIZE, 0),
            (PAGE_SIZE, usize::MAX),
            (PAGE_SIZE, usize::MAX >> PAGE_SHIFT),
            (PAGE_SIZE, (usize::MAX >> PAGE_SHIFT) + 1),
            (usize::MAX & !(PAGE_SIZE - 1), 1),
            (top, 1),
            (top - PAGE_SIZE, 2),
            (1 << 63, 1),
        ];
        for (start, pages) in bad {
            assert_eq!(PageRange::new(start, pages), Err(EINVAL));
        }
        for (start, pages) in [
            (0, 2),
            (PAGE_SIZE, 1),
            (top - PAGE_SIZE, 1),
            (0, top >> PAGE_SHIFT),
        ] {
            let range = PageRange::new(start, pages);
            let end = start + (pages << PAGE_SHIFT);
            assert_eq!(range.map(|r| (r.start(), r.end())), Ok((start, end)));
            assert_eq!(range.map(|r| r.pages()), Ok(pages));
        }
    }

    #[test]
    fn parts() -> Result {
        let range = PageRange::new(3 * PAGE_SIZE, 5)?;
        for (pages, first, rest) in [
            (0, 1, Some(5)),
            (1, 1, Some(4)),
            (4, 4, Some(1)),
            (5, 5, None),
            (usize::MAX, 5, None),
        ] {
            let head = range.first(pages);
            assert_eq!((head.start(), head.pages()), (range.start(), first));
            let tail = range.skip(pages);
            assert_eq!(tail.map(|r| r.pages()), rest);
            assert!(tail.is_none_or(|r| r.end() == range.end()));
        }
        for (pages, batches) in [(0, 5), (1, 5), (2, 3), (5, 1), (9, 1)] {
            assert_eq!(range.batches(pages).count(), batches);
            let mut next = range.start();
            for batch in range.batches(pages) {
                assert_eq!(batch.start(), next);
                next = batch.end();
            }
            assert_eq!(next, range.end());
        }
        assert_eq!(range.addresses().count(), 5);
        assert_eq!(range.addresses().last(), Some(7 * PAGE_SIZE));
        Ok(())
    }
}
