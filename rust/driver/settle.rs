// SPDX-License-Identifier: GPL-2.0

//! What is checked of every migration: when core mm has moved the contents, and when it is done.
//!
//! Others may hold a page for a moment that they found before it moved, or that is mapped again: a
//! count that is not what it must be is looked at again before it is reported.

#![forbid(unsafe_code)]

use super::{
    chunk::{
        Chunk,
        Core, //
    },
    device::Device,
    inject::Held, //
};
use crate::{
    audit::{
        check_destination,
        check_settled,
        check_source,
        Event,
        Transition,
        Violation, //
    },
    mm::{
        memory_type::MemoryType,
        migrate::{
            Copied,
            Migration,
            Moved, //
        },
        registration::PagemapRef, //
    },
    stamp::log_clock,
};
use kernel::time::{
    delay::fsleep,
    Delta, //
};

/// Looks, a millisecond apart, before a count is taken for one that stays.
const TRIES: usize = 50;

/// Folios of one migration that are looked at again.
const SUSPECTS: usize = 8;

/// What `check` finds, if it goes on to find it. May sleep.
fn lasting(mut check: impl FnMut() -> Option<Violation>) -> Option<Violation> {
    let mut found = check()?;
    for _ in 0..TRIES {
        fsleep(Delta::from_millis(1));
        found = check()?;
    }
    Some(found)
}

impl Core {
    /// I3 and I9, when core mm has moved the contents and nothing is mapped yet. `last` knows what
    /// happened to a page frame of the device before. Whether all was found well; may sleep.
    fn check_moved(
        &self,
        migration: &Migration<'_, Copied>,
        last: impl Fn(usize) -> Transition,
    ) -> bool {
        if !self.auditor.is_on() {
            return false;
        }
        let judge = |outcome: Option<Violation>| {
            outcome.is_some_and(|v| self.auditor.judge(Some(v.after(last(v.pfn)))))
        };
        let mut broken = false;
        // All of them, but for those that are found well at one look.
        for folio in migration.suspects() {
            if let Some(source) = folio.source {
                let held = folio.source_refs;
                broken |= judge(lasting(|| check_source(source, held)));
            } else if folio.destination.memory_type() != MemoryType::PRIVATE {
                // What was no page is mapped already, and the CPU may be at work on it.
                continue;
            }
            let page = folio.destination;
            broken |= judge(lasting(|| check_destination(page)));
        }
        !broken
    }

    /// Moves to the system what `migration` has copied, with all that is to be checked, and says what
    /// that came to. `last` as above. May sleep.
    pub(super) fn finish(
        &self,
        migration: Migration<'_, Copied>,
        last: impl Fn(usize) -> Transition,
    ) -> Moved {
        self.check_moved(&migration, last);
        let moved = migration.moved();
        drop(migration.finalize());
        moved
    }
}

/// A folio of the device that a migration has just moved to.
struct Settled {
    chunk: PagemapRef<Chunk>,
    index: usize,
    order: u32,
}

impl Settled {
    /// I3 of this moment; nothing once the folio is no longer what it was.
    fn check(&self) -> Option<Violation> {
        if self.chunk.order_in_use(self.index) != Some(self.order) {
            return None;
        }
        let page = self.chunk.page(self.index)?;
        let violation = check_settled(page, 0)?;
        // Who can reach a page by its mappings may also hold it, and for long.
        let only_mapped = page.memory_type() == MemoryType::PRIVATE;
        (only_mapped || page.refs() < page.mapcount()).then_some(violation)
    }

    /// The same, if each look finds it as the one before: whoever is at work on a page changes it.
    fn lasting(&self) -> Option<Violation> {
        let first = self.check()?;
        for _ in 0..TRIES {
            fsleep(Delta::from_millis(1));
            if self.check()? != first {
                return None;
            }
        }
        Some(first)
    }
}

impl Device {
    /// Moves to the device what `migration` has copied, with all that is to be checked, and says what
    /// that came to. What `held` asks for is kept. May sleep.
    pub(super) fn settle(&self, migration: Migration<'_, Copied>, held: &mut Held) -> Moved {
        held.take_from(&migration);
        // What is wrong already is said once.
        let check = self
            .core
            .check_moved(&migration, |pfn| self.last_of_pfn(pfn));
        let moved = migration.moved();
        let done = migration.finalize();
        let mut suspects = [const { None }; SUSPECTS];
        let mut found = 0;
        let mut near: Option<PagemapRef<Chunk>> = None;
        let now = log_clock();
        for (pfn, order) in done.destinations() {
            // Most are in the same chunk.
            let known = near
                .take()
                .and_then(|chunk| chunk.index_of_pfn(pfn).map(|index| (chunk, index)));
            let Some((chunk, index)) = known.or_else(|| self.locate_pfn(pfn)) else {
                continue;
            };
            chunk
                .ops()
                .ledger()
                .note_at(now, index, Event::Settled, order);
            let settled = Settled {
                chunk,
                index,
                order,
            };
            if check && found < SUSPECTS && settled.check().is_some() {
                near = self.chunk(settled.chunk.ops().number());
                suspects[found] = Some(settled);
                found += 1;
            } else {
                near = Some(settled.chunk);
            }
        }
        drop(done);
        for settled in suspects.iter().flatten() {
            let outcome = settled.lasting();
            settled.chunk.ops().judge(settled.index, outcome);
        }
        moved
    }

    /// What happened to page frame `pfn` last, if it is one of the device's.
    pub(super) fn last_of_pfn(&self, pfn: usize) -> Transition {
        self.locate_pfn(pfn)
            .map_or(Transition::NONE, |(chunk, index)| {
                chunk.ops().ledger().last(index)
            })
    }
}
