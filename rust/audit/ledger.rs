// SPDX-License-Identifier: GPL-2.0

//! The last transition of each page of a chunk: the event, its time, the order of the folio, and
//! the task.
//!
//! The ledger only adds detail to reports; no check depends on it. The record of a large folio is
//! that of its first page.

#![forbid(unsafe_code)]

use crate::stamp::{
    current_pid,
    log_clock,
    RecentTime,
    Stamp, //
};
use kernel::{
    fmt,
    prelude::*, //
};

/// A transition of a page: `enum zdm_event` of the uapi.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Event {
    /// No transition is known.
    None = 0,
    /// The memory was registered.
    Born = 1,
    /// The page was allocated for a migration.
    HandedOut = 2,
    /// The migration to the page has finished.
    Settled = 3,
    /// The large folio with the page was split.
    Split = 4,
    /// The last reference was dropped.
    Freed = 5,
    /// The page failed the free-page checks and was quarantined.
    SetAside = 6,
}

impl Event {
    fn from_bits(bits: u32) -> Self {
        match bits & 0xff {
            1 => Self::Born,
            2 => Self::HandedOut,
            3 => Self::Settled,
            4 => Self::Split,
            5 => Self::Freed,
            6 => Self::SetAside,
            _ => Self::None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "unknown",
            Self::Born => "born",
            Self::HandedOut => "handed out",
            Self::Settled => "settled",
            Self::Split => "split",
            Self::Freed => "freed",
            Self::SetAside => "set aside",
        }
    }
}

/// The last transition of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transition {
    pub(crate) event: Event,
    /// The time in nanoseconds, by the clock of the kernel log.
    pub(crate) time: u64,
    /// The task, or the task that was interrupted.
    pub(crate) pid: u32,
    /// The order of the folio.
    pub(crate) order: u32,
}

impl Transition {
    pub(crate) const NONE: Self = Self {
        event: Event::None,
        time: 0,
        pid: 0,
        order: 0,
    };
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The log prints its times in microseconds, too.
        let micros = self.time / 1000;
        write!(
            f,
            "{} as a folio of order {} at {}.{:06} by pid {}",
            self.event.name(),
            self.order,
            micros / 1_000_000,
            micros % 1_000_000,
            self.pid,
        )
    }
}

/// Encodes a transition in a stamp: the event in bits 0 to 7, the order in bits 8 to 15.
fn word(event: Event, order: u32) -> u32 {
    event as u32 | (order & 0xff) << 8
}

/// A stamp for each page of a chunk, or none without a ledger. Only [`Ledger::new`] sleeps.
///
/// If a page has two transitions at the same time, its stamp may mix them. That is harmless,
/// because no decision depends on the ledger.
pub(crate) struct Ledger {
    entries: KVVec<Stamp>,
    recent: RecentTime,
    born: Transition,
}

impl Ledger {
    /// Makes the ledger of a chunk of `pages` pages, which are registered now. May sleep.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let mut entries = KVVec::with_capacity(pages, GFP_KERNEL)?;
        for _ in 0..pages {
            entries.push(Stamp::new(), GFP_KERNEL)?;
        }
        let event = if pages > 0 { Event::Born } else { Event::None };
        Ok(Self {
            entries,
            recent: RecentTime::new(),
            born: Transition {
                event,
                time: log_clock(),
                pid: current_pid(),
                order: 0,
            },
        })
    }

    /// Records a transition of page `index`, the first of a folio of `order`, with the present
    /// time.
    pub(crate) fn note(&self, index: usize, event: Event, order: u32) {
        if !self.entries.is_empty() {
            self.note_at(log_clock(), index, event, order);
        }
    }

    /// As [`Ledger::note`], with a time from [`log_clock`]. Reading the clock costs more than the
    /// rest, so the pages of one migration share a time.
    pub(crate) fn note_at(&self, time: u64, index: usize, event: Event, order: u32) {
        if let Some(entry) = self.entries.get(index) {
            entry.set(time, word(event, order));
        }
    }

    /// As [`Ledger::note`], with the time of the last tick. For transitions of single pages, where
    /// reading the clock would cost more than the rest.
    pub(crate) fn note_recent(&self, index: usize, event: Event, order: u32) {
        if let Some(entry) = self.entries.get(index) {
            entry.set_recent(&self.recent, word(event, order));
        }
    }

    /// The last transition of page `index`.
    pub(crate) fn last(&self, index: usize) -> Transition {
        let Some(entry) = self.entries.get(index) else {
            return Transition::NONE;
        };
        let (time, word, pid) = entry.get();
        match Event::from_bits(word) {
            Event::None => self.born,
            event => Transition {
                event,
                time,
                pid,
                order: word >> 8 & 0xff,
            },
        }
    }
}

#[kunit_tests(zdmirror_ledger)]
mod tests {
    use super::*;
    use kernel::str::CString;

    #[test]
    fn last_transition_of_each_page() -> Result {
        let ledger = Ledger::new(4)?;
        let begin = log_clock();
        assert_eq!(ledger.last(3).event, Event::Born);
        assert!(ledger.last(3).time <= begin);
        let events = [
            Event::HandedOut,
            Event::Settled,
            Event::Split,
            Event::Freed,
            Event::SetAside,
        ];
        for (order, event) in (5..).zip(events) {
            ledger.note(1, event, order);
            let last = ledger.last(1);
            assert_eq!((last.event, last.order), (event, order));
            assert_eq!(last.pid, current_pid());
            assert!((begin..=log_clock()).contains(&last.time));
        }
        assert_eq!(ledger.last(0).event, Event::Born);
        assert_eq!(ledger.last(4), Transition::NONE);
        Ok(())
    }

    #[test]
    fn recent_transition_is_not_before_the_last_one() -> Result {
        let ledger = Ledger::new(2)?;
        for _ in 0..3 {
            ledger.note(0, Event::HandedOut, 0);
            let allocated = ledger.last(0);
            ledger.note_recent(0, Event::Freed, 0);
            let freed = ledger.last(0);
            assert_eq!((freed.event, freed.pid), (Event::Freed, current_pid()));
            assert!((allocated.time..=log_clock()).contains(&freed.time));
        }
        ledger.note_recent(2, Event::Freed, 0);
        assert_eq!(ledger.last(1).event, Event::Born);
        Ok(())
    }

    #[test]
    fn no_ledger_knows_nothing() -> Result {
        let ledger = Ledger::new(0)?;
        ledger.note(0, Event::Freed, 0);
        assert_eq!(ledger.last(0), Transition::NONE);
        Ok(())
    }

    #[test]
    fn text_has_the_time_of_the_log() -> Result {
        let last = Transition {
            event: Event::Freed,
            time: 12_000_345_678,
            pid: 99,
            order: 9,
        };
        let text = CString::try_from_fmt(fmt!("{}", last))?;
        assert_eq!(
            text.to_bytes(),
            b"freed as a folio of order 9 at 12.000345 by pid 99"
        );
        Ok(())
    }
}
