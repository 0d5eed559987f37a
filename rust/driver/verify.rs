// SPDX-License-Identifier: GPL-2.0

//! Checks of every migration, made when core mm has moved the contents.
//!
//! Another task may hold a page for a moment, because the task found the page before the page moved
//! or after it was mapped again. A wrong count is therefore read again before it is reported.

#![forbid(unsafe_code)]

use super::core_data::Core;
use crate::{
    audit::{
        check_destination,
        check_source,
        Transition,
        Violation, //
    },
    mm::{
        memory_type::MemoryType,
        migrate::{
            Copied,
            Migration,
            Moved, //
        }, //
    },
};
use kernel::time::{
    delay::fsleep,
    Delta, //
};

/// Looks, a millisecond apart, before a count is taken for one that stays.
pub(super) const TRIES: usize = 50;

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
    pub(super) fn check_moved(
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
