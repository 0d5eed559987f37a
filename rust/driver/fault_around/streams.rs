// SPDX-License-Identifier: GPL-2.0

//! Streams of CPU faults predict which pages the CPU will access next.
//!
//! A fault on the page right after (or right before) that of an earlier fault, which [`heads`] finds,
//! starts a stream and brings back a window of [`MIN_WINDOW`] pages. A fault right after (or right before)
//! a window continues its stream.
//! The window of each further fault doubles while the CPU has used at least half of the pages of
//! the last one; it shrinks if the CPU has used less than a quarter.
//!
//! [`heads`]: super::heads

#![forbid(unsafe_code)]

use super::heads::Near;
use crate::mm::{
    migrate::migration::{
        bytes,
        MAX_PAGES, //
    },
    pagemap::fault::AccessOrder,
    PAGE_SHIFT,
    PAGE_SIZE, //
};
use core::ops::Range;
use kernel::prelude::*;

/// The largest number of pages of a window, which is that of the entries of a page table.
pub(in crate::driver) const MAX_WINDOW: usize = MAX_PAGES;

/// The number of pages of a stream's first window, unless the limit is lower.
pub(super) const MIN_WINDOW: usize = 16;

/// The number of streams of one file that are followed at a time.
const STREAMS: usize = 8;

/// The largest number of pages that a CPU fault brings back, as in the parameter and in
/// `ZDM_FAULT_AROUND`: 0 and 1 mean only the page of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Most(usize);

impl Most {
    pub(crate) const ONE: Self = Self(1);

    /// `EINVAL` for more pages than a page table has entries.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        match pages {
            0 | 1 => Ok(Self::ONE),
            2..=MAX_WINDOW => Ok(Self(pages)),
            _ => Err(EINVAL),
        }
    }

    pub(in crate::driver) fn pages(self) -> usize {
        self.0
    }
}

/// The place of a fault. Addresses are in bytes.
pub(in crate::driver) struct Place {
    /// Identifies the address space.
    pub(in crate::driver) mm: usize,
    /// The page of the fault.
    pub(in crate::driver) address: usize,
    /// The limits of a window.
    pub(in crate::driver) limits: Range<usize>,
    pub(in crate::driver) order: AccessOrder,
}

/// The window of a fault, and the judgement about the previous window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::driver) struct Plan {
    /// The addresses of the window, which contains the page of the fault.
    pub(in crate::driver) window: Range<usize>,
    /// The stream, for [`Streams::brought`].
    slot: usize,
    /// The number of pages of an earlier window that the CPU has used, and of those that it has
    /// not.
    pub(in crate::driver) hits: usize,
    pub(in crate::driver) waste: usize,
}

impl Plan {
    /// The number of pages of the window.
    pub(in crate::driver) fn pages(&self) -> usize {
        self.window.len() >> PAGE_SHIFT
    }
}

#[derive(Clone)]
struct Stream {
    mm: usize,
    /// The last window.
    window: Range<usize>,
    /// The number of pages that the last window would have had without limits.
    wanted: usize,
    /// The number of pages that it brought besides that of its fault, until they are judged.
    brought: usize,
}

impl Stream {
    const NONE: Self = Self {
        mm: 0,
        window: 0..0,
        wanted: 1,
        brought: 0,
    };

    /// The size of the next window, if the CPU has used `hits` of the pages that this one brought.
    fn next_size(&self, hits: usize, max: usize) -> usize {
        let wanted = if self.brought == 0 {
            self.wanted.max(MIN_WINDOW)
        } else if 2 * hits >= self.brought {
            2 * self.wanted
        } else if 4 * hits >= self.brought {
            self.wanted
        } else {
            self.wanted / 4
        };
        wanted.clamp(1, max)
    }
}

/// The streams of one file.
pub(super) struct Streams {
    streams: [Stream; STREAMS],
    /// The stream that a new stream replaces.
    oldest: usize,
}

impl Streams {
    pub(super) const fn new() -> Self {
        Self {
            streams: [const { Stream::NONE }; STREAMS],
            oldest: 0,
        }
    }

    /// Plans a window of up to `max` pages, for a fault that is `near` an earlier one. `used` counts the
    /// pages of a range that the CPU has accessed since they were mapped.
    pub(super) fn plan(
        &mut self,
        place: &Place,
        max: usize,
        near: Option<Near>,
        used: impl FnOnce(Range<usize>) -> usize,
    ) -> Plan {
        let Place { mm, address, .. } = *place;
        let same = self.streams.iter().position(|stream| {
            let Range { start, end } = stream.window;
            let is_place = match near {
                Some(Near::Follows) => address == end,
                Some(Near::Precedes) => address + PAGE_SIZE == start,
                // The page was left behind, or went to the device again.
                None => stream.window.contains(&address),
            };
            is_place && stream.mm == mm
        });
        let slot = same.unwrap_or_else(|| {
            let slot = self.oldest;
            self.oldest = (slot + 1) % STREAMS;
            slot
        });
        let stream = &mut self.streams[slot];
        let (mut hits, mut waste) = (0, 0);
        if stream.mm == mm && stream.brought > 0 {
            // One of the used pages is that of the fault.
            let accessed = used(stream.window.clone()).saturating_sub(1);
            hits = accessed.min(stream.brought);
            waste = stream.brought - hits;
        }
        if near.is_none() || same.is_none() {
            *stream = Stream::NONE;
        }
        let wanted = match place.order {
            AccessOrder::Random => 1,
            AccessOrder::Sequential if near.is_none() => max,
            AccessOrder::Unknown if near.is_none() => 1,
            _ => stream.next_size(hits, max),
        };
        let window = if near == Some(Near::Precedes) {
            let start = (address + PAGE_SIZE).saturating_sub(bytes(wanted));
            start.max(place.limits.start)..address + PAGE_SIZE
        } else {
            address..(address + bytes(wanted)).min(place.limits.end)
        };
        *stream = Stream {
            mm,
            window: window.clone(),
            wanted,
            brought: 0,
        };
        Plan {
            window,
            slot,
            hits,
            waste,
        }
    }

    /// Records that the window of `plan` has brought back `pages` pages besides that of the fault.
    pub(super) fn brought(&mut self, plan: &Plan, pages: usize) {
        let stream = &mut self.streams[plan.slot];
        // Another thread may have continued the stream.
        if stream.window == plan.window {
            stream.brought = pages;
        }
    }
}

#[kunit_tests(zdmirror_streams)]
mod tests {
    use super::*;
    use crate::driver::fault_around::heads::Heads;

    /// An address with room below it.
    const BASE: usize = bytes(MAX_WINDOW) * 100;

    const fn page(n: usize) -> usize {
        BASE + bytes(n)
    }

    fn place(n: usize, order: AccessOrder) -> Place {
        Place {
            mm: 1,
            address: page(n),
            limits: page(0)..page(4 * MAX_WINDOW),
            order,
        }
    }

    /// A file, and the places of its last faults.
    struct File {
        heads: Heads,
        streams: Streams,
    }

    impl File {
        fn new() -> Result<Self> {
            Ok(Self {
                heads: Heads::new()?,
                streams: Streams::new(),
            })
        }

        /// The plan of a fault, if the CPU has used what `used` says of an earlier window.
        fn plan(&mut self, place: &Place, max: usize, used: impl Fn(usize) -> usize) -> Plan {
            let any = place.order == AccessOrder::Sequential;
            let Some(turn) = self.heads.visit(1, place.mm, place.address, any) else {
                // The page of the fault comes back alone.
                return Plan {
                    window: place.address..place.address + PAGE_SIZE,
                    slot: 0,
                    hits: 0,
                    waste: 0,
                };
            };
            let used = |range: Range<usize>| used(range.len() >> PAGE_SHIFT);
            let plan = self.streams.plan(place, max, turn.near, used);
            self.heads.moved(turn, 1, place.mm, &plan.window);
            self.streams.brought(&plan, plan.pages() - 1);
            plan
        }

        /// The window in pages of a fault on page `n`, if the CPU has used the pages of the last one.
        fn window(&mut self, n: usize, order: AccessOrder, max: usize) -> (usize, usize) {
            let plan = self.plan(&place(n, order), max, |pages| pages);
            ((plan.window.start - BASE) >> PAGE_SHIFT, plan.pages())
        }
    }

    #[test]
    fn most_is_up_to_one_table() {
        for pages in [0, 1] {
            assert_eq!(Most::new(pages), Ok(Most::ONE));
        }
        for pages in [2, 16, MAX_WINDOW] {
            assert_eq!(Most::new(pages).map(Most::pages), Ok(pages));
        }
        for pages in [MAX_WINDOW + 1, usize::MAX] {
            assert_eq!(Most::new(pages), Err(EINVAL));
        }
    }

    #[test]
    fn forward_windows_double() -> Result {
        let mut file = File::new()?;
        let mut next = 0;
        for pages in [1, 16, 32, 64, 128, 256, 512, 512] {
            let (start, found) = file.window(next, AccessOrder::Unknown, 512);
            assert_eq!((start, found), (next, pages));
            next += pages;
        }
        Ok(())
    }

    #[test]
    fn windows_are_as_small_as_is_allowed() -> Result {
        for (max, sizes) in [(1, [1, 1, 1]), (5, [1, 5, 5]), (20, [1, 16, 20])] {
            let mut file = File::new()?;
            let mut next = 0;
            for pages in sizes {
                let found = file.window(next, AccessOrder::Unknown, max);
                assert_eq!(found, (next, pages));
                next += pages;
            }
        }
        Ok(())
    }

    #[test]
    fn backward_windows_end_at_the_fault() -> Result {
        let mut file = File::new()?;
        let mut n = 1000;
        for pages in [1, 16, 32, 64] {
            let found = file.window(n, AccessOrder::Unknown, 512);
            assert_eq!(found, (n + 1 - pages, pages));
            n -= pages;
        }
        Ok(())
    }

    #[test]
    fn limits_cut_windows() -> Result {
        let mut file = File::new()?;
        let end = 4 * MAX_WINDOW;
        file.window(end - 4, AccessOrder::Unknown, 512);
        assert_eq!(
            file.window(end - 3, AccessOrder::Unknown, 512),
            (end - 3, 3)
        );
        file.window(5, AccessOrder::Unknown, 512);
        assert_eq!(file.window(4, AccessOrder::Unknown, 512), (0, 5));
        Ok(())
    }

    #[test]
    fn advice_is_taken() -> Result {
        let mut file = File::new()?;
        assert_eq!(file.window(0, AccessOrder::Sequential, 512), (0, 512));
        assert_eq!(file.window(512, AccessOrder::Sequential, 512), (512, 512));
        for n in 0..20 {
            assert_eq!(file.window(n, AccessOrder::Random, 512), (n, 1));
        }
        Ok(())
    }

    #[test]
    fn scattered_faults_bring_one_page() -> Result {
        let mut file = File::new()?;
        for n in (0..200).step_by(3) {
            assert_eq!(file.window(n, AccessOrder::Unknown, 512), (n, 1));
        }
        Ok(())
    }

    #[test]
    fn streams_are_told_apart() -> Result {
        let mut file = File::new()?;
        for n in [0, 100, 200] {
            assert_eq!(file.window(n, AccessOrder::Unknown, 512).1, 1);
        }
        for n in [1, 101, 201] {
            assert_eq!(file.window(n, AccessOrder::Unknown, 512), (n, 16));
        }
        // The same address of another process.
        let other = Place {
            mm: 2,
            ..place(17, AccessOrder::Unknown)
        };
        assert_eq!(file.plan(&other, 512, |_| 0).pages(), 1);
        assert_eq!(file.window(17, AccessOrder::Unknown, 512), (17, 32));
        Ok(())
    }

    #[test]
    fn what_is_not_used_makes_windows_small() -> Result {
        let mut file = File::new()?;
        file.window(0, AccessOrder::Sequential, 64);
        let mut fault = |n, used, hits, waste, pages| {
            let plan = file.plan(&place(n, AccessOrder::Unknown), 512, |_| used);
            assert_eq!((plan.hits, plan.waste), (hits, waste));
            assert_eq!(plan.pages(), pages);
        };
        // The window brought 63 pages; the page of the fault is one of the used ones.
        fault(64, 20, 19, 44, 64);
        fault(128, 2, 1, 62, 16);
        fault(144, 1, 0, 15, 4);
        fault(148, 1, 0, 3, 1);
        // From a single page the stream starts to grow again.
        fault(149, 1, 0, 0, 16);
        fault(165, 16, 15, 0, 32);
        Ok(())
    }

    #[test]
    fn page_that_was_left_behind_starts_anew() -> Result {
        let mut file = File::new()?;
        file.window(0, AccessOrder::Unknown, 512);
        file.window(1, AccessOrder::Unknown, 512);
        assert_eq!(file.window(5, AccessOrder::Unknown, 512), (5, 1));
        assert_eq!(file.window(6, AccessOrder::Unknown, 512), (6, 16));
        Ok(())
    }

    #[test]
    fn what_a_stream_brought_is_judged_when_it_is_replaced() -> Result {
        let mut file = File::new()?;
        for n in 0..STREAMS {
            let order = AccessOrder::Sequential;
            assert_eq!(file.window(100 * n, order, 16), (100 * n, 16));
        }
        let plan = file.plan(&place(2000, AccessOrder::Sequential), 16, |_| 5);
        assert_eq!((plan.pages(), plan.hits, plan.waste), (16, 4, 11));
        Ok(())
    }
}
