// SPDX-License-Identifier: GPL-2.0

//! Which ranges of an address space were invalidated last.
//!
//! An interval notifier has one sequence for all of its range. With that alone, the reader of one part would
//! wait for an invalidation of any other part, and begin again after it. This module records the
//! invalidations one by one, so that a reader waits for those of its own range only.

use super::range::PageRange;
use crate::mm::PAGE_SHIFT;
use core::cell::Cell;
use kernel::prelude::*;

/// Invalidations that are remembered.
const DEPTH: usize = 16;

/// Pages from `first` to `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::mm) struct Span {
    pub(in crate::mm) first: usize,
    pub(in crate::mm) last: usize,
}

impl Span {
    /// The pages of `range`.
    pub(in crate::mm) fn of(range: PageRange) -> Self {
        Self {
            first: range.start() >> PAGE_SHIFT,
            last: (range.end() - 1) >> PAGE_SHIFT,
        }
    }

    /// The same with all pages of blocks of `1 << order` pages that have some of them.
    pub(in crate::mm) fn aligned(self, order: u32) -> Self {
        let within = (1 << order) - 1;
        Self {
            first: self.first & !within,
            last: self.last | within,
        }
    }

    /// Whether the two have a page in common.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// An invalidation, with the sequence that core mm gave it.
#[derive(Clone, Copy)]
struct Change {
    span: Span,
    seq: usize,
}

/// The last invalidations of an address space, which the lock of a notifier protects.
///
/// Core mm gives all invalidations that are under way at the same time one sequence, and the next one
/// another. So those of any other sequence than the last are over.
pub(super) struct Changes {
    last: [Cell<Option<Change>>; DEPTH],
    /// Invalidations so far.
    count: Cell<usize>,
    /// The sequence that the notifier was set to last.
    set: Cell<usize>,
}

impl Changes {
    /// None so far.
    pub(super) const fn new() -> Self {
        Self {
            last: [const { Cell::new(None) }; DEPTH],
            count: Cell::new(0),
            set: Cell::new(0),
        }
    }

    /// Records that `span` is about to change. Returns the sequence that the notifier must be set to at once, if an
    /// invalidation is forgotten that may be under way.
    pub(in crate::mm) fn add(&self, span: Span, seq: usize) -> Option<usize> {
        let count = self.count.get();
        let forgotten = self.last[count % DEPTH].replace(Some(Change { span, seq }));
        self.count.set(count.wrapping_add(1));
        if forgotten?.seq == seq {
            self.set_to(seq)
        } else {
            None
        }
    }

    /// A reader of `span` begins. Returns the sequence that the notifier must be set to first, if an
    /// invalidation of the span may be under way.
    pub(super) fn begin(&self, span: &Span) -> Option<usize> {
        let overlapping = self.last.iter().filter_map(Cell::get);
        let overlapping = overlapping.filter(|change| change.span.overlaps(span));
        // The latest: sequences grow.
        let latest =
            overlapping
                .map(|change| change.seq)
                .reduce(|a, b| if is_later(a, b) { a } else { b });
        self.set_to(latest?)
    }

    /// The number of invalidations so far, for [`Changes::changed`].
    pub(super) fn count(&self) -> usize {
        self.count.get()
    }

    /// Whether `span` has changed since `count` was the number of invalidations, or may have.
    pub(super) fn changed(&self, span: &Span, count: usize) -> bool {
        let new = self.count.get().wrapping_sub(count);
        new > DEPTH
            || (0..new).any(|n| {
                let change = self.last[count.wrapping_add(n) % DEPTH].get();
                change.is_none_or(|change| change.span.overlaps(span))
            })
    }

    /// Returns `seq` if the notifier must be set to it, that is unless it was set to that or a later sequence.
    fn set_to(&self, seq: usize) -> Option<usize> {
        if !is_later(seq, self.set.get()) {
            return None;
        }
        self.set.set(seq);
        Some(seq)
    }
}

/// Whether sequence `a` is later than `b`. Sequences wrap around.
fn is_later(a: usize, b: usize) -> bool {
    // CAST: The sign is that of the distance.
    a.wrapping_sub(b) as isize > 0
}

#[kunit_tests(zdmirror_changes)]
mod tests {
    use super::*;

    fn span(first: usize, last: usize) -> Span {
        Span { first, last }
    }

    #[test]
    fn only_what_overlaps_has_changed() {
        let changes = Changes::new();
        let begun = changes.count();
        assert_eq!(changes.add(span(10, 19), 3), None);
        for (first, last, changed) in [
            (0, 9, false),
            (0, 10, true),
            (15, 15, true),
            (19, 30, true),
            (20, 30, false),
        ] {
            assert_eq!(changes.changed(&span(first, last), begun), changed);
            assert!(!changes.changed(&span(first, last), changes.count()));
        }
        assert_eq!(span(9, 10).aligned(2), span(8, 11));
    }

    #[test]
    fn reader_sets_the_sequence_of_its_range_once() {
        let changes = Changes::new();
        changes.add(span(0, 9), 3);
        changes.add(span(20, 29), 5);
        changes.add(span(5, 6), 7);
        assert_eq!(changes.begin(&span(30, 39)), None);
        assert_eq!(changes.begin(&span(20, 20)), Some(5));
        assert_eq!(changes.begin(&span(20, 20)), None);
        assert_eq!(changes.begin(&span(6, 25)), Some(7));
        // It never goes back to an earlier one.
        assert_eq!(changes.begin(&span(0, 39)), None);
    }

    #[test]
    fn what_is_forgotten_counts_as_changed() {
        let changes = Changes::new();
        let begun = changes.count();
        for n in 0..DEPTH {
            assert_eq!(changes.add(span(n, n), 3), None);
        }
        let elsewhere = span(1000, 1000);
        assert!(!changes.changed(&elsewhere, begun));
        // The first may be under way, and no reader would find it from here on.
        assert_eq!(changes.add(span(99, 99), 3), Some(3));
        assert!(changes.changed(&elsewhere, begun));
        assert_eq!(changes.begin(&span(1, 1)), None);
        // Those of an earlier sequence are over.
        assert_eq!(changes.add(span(99, 99), 5), None);
    }

    #[test]
    fn sequences_wrap_around() {
        let changes = Changes::new();
        changes.set.set(usize::MAX - 2);
        changes.add(span(0, 0), usize::MAX);
        changes.add(span(0, 0), 1);
        assert_eq!(changes.begin(&span(0, 0)), Some(1));
        assert_eq!(changes.begin(&span(0, 0)), None);
    }
}
