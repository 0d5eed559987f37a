// SPDX-License-Identifier: GPL-2.0

//! Checks of every migration after core mm has moved the contents.
//!
//! Another task may hold a page for a moment, because the task found the page before the page moved
//! or after it was mapped again. A wrong count is therefore read again before it is reported.

#![forbid(unsafe_code)]

use super::{
    core_data::Core,
    page_backed::Migration, //
};
use crate::{
    audit::{
        check_destination,
        check_source,
        Moment,
        Transition,
        Violation, //
    },
    mm::{
        migrate::{
            migration::Copied,
            moved::Moved, //
        },
        region::memory_type::MemoryType,
        sync::{
            preempted::PreemptedTasks,
            task::check_signals, //
        },
    },
};
use core::ops::Range;
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The number of reads, a millisecond apart, before a count is taken as permanent.
const TRIES: usize = 50;

/// The number of folios of one migration whose counts are read again.
pub(in crate::driver) const SUSPECTS: usize = 8;

/// The looks that must find the same before it counts, by their numbers. [`TRIES`] are enough to find a task
/// out that goes on with its work. One that was preempted in the midst of it is another matter: there are as
/// many looks after a wait for it. At a quiet moment there is no such task.
pub(in crate::driver) fn looks(moment: Moment) -> Range<usize> {
    match moment {
        Moment::Quiet => 0..TRIES,
        Moment::Busy => 0..2 * TRIES,
    }
}

/// Sleeps before look number `look` of [`looks`], for a millisecond, and before the first one that is to find
/// preempted tasks gone on until they have.
///
/// # Errors
///
/// As [`PreemptedTasks::wait`]; then nothing that was found counts.
pub(in crate::driver) fn sleep_before(look: usize, preempted: &PreemptedTasks) -> Result {
    if look == TRIES {
        preempted.wait()?;
    }
    fsleep(Delta::from_millis(1));
    Ok(())
}

/// The first violations that one read of the moved folios of `migration` finds.
fn suspects(migration: &Migration<'_, Copied>) -> [Option<Violation>; SUSPECTS] {
    let mut found = [None; SUSPECTS];
    let wrong = migration.suspects().flat_map(|folio| {
        let held = folio.source_refs;
        let source = folio.source.and_then(|source| check_source(source, held));
        // The destination of a hole is already mapped unless it is PRIVATE, and the CPU may be
        // accessing it.
        let is_quiet =
            folio.source.is_some() || folio.destination.memory_type() == MemoryType::PRIVATE;
        let destination = check_destination(folio.destination).filter(|_| is_quiet);
        [source, destination].into_iter().flatten()
    });
    for (place, violation) in found.iter_mut().zip(wrong) {
        *place = Some(violation);
    }
    found
}

impl Core {
    /// Checks I3 and I9 after core mm has moved the contents and before anything is mapped. Returns
    /// whether there was no violation. `last` returns the last transition of a page frame of the
    /// device. May sleep for [`TRIES`] milliseconds, however many folios are suspect, and once more at a
    /// busy moment, after the wait for preempted tasks, which is bounded. A killed task reports nothing, nor
    /// does one that has waited in vain.
    #[inline]
    pub(in crate::driver) fn check_moved(
        &self,
        migration: &Migration<'_, Copied>,
        last: impl Fn(usize) -> Transition,
    ) -> bool {
        if !self.auditor.is_on() {
            return false;
        }
        // Usually there is no suspect, and no room is needed for any.
        !migration.has_suspects() || self.check_again(migration, last)
    }

    /// As [`Core::check_moved`], after a look that has found suspects.
    #[cold]
    fn check_again(
        &self,
        migration: &Migration<'_, Copied>,
        last: impl Fn(usize) -> Transition,
    ) -> bool {
        let mut found = suspects(migration);
        for look in looks(self.moment) {
            if found.iter().all(Option::is_none) {
                return true;
            }
            if check_signals().is_err() || sleep_before(look, &self.preempted).is_err() {
                return false;
            }
            // A task that works on a folio changes its count.
            let again = suspects(migration);
            for violation in &mut found {
                let healed = |v: &mut Violation| !again.iter().flatten().any(|other| other == v);
                if violation.take_if(healed).is_some() {
                    self.auditor.heal(1);
                }
            }
        }
        for v in found.into_iter().flatten() {
            self.auditor.judge(Some(v.after(last(v.pfn))));
        }
        false
    }

    /// Finalizes the migration to the system of the copied pages of `migration`, with all checks,
    /// and returns the number of moved pages. `last` is that of `check_moved()`. May sleep.
    #[inline]
    pub(in crate::driver) fn finish(
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
