// SPDX-License-Identifier: GPL-2.0

//! Invalidations that last longer than they need to, for tests.
//!
//! Between the notice of a change and the change itself any other task may change the same pages. On its
//! own this takes microseconds; a test that wants to act in between holds the invalidation.

use super::changes::Span;
use crate::mm::sync::task::Deadline;
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Full,
        Relaxed, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
};

/// Milliseconds for which an invalidation is held at most.
const LONGEST: u32 = 1000;
/// How often it looks whether it may end, in milliseconds.
const STEP: i64 = 1;

/// No invalidation is to be held.
const NONE: usize = 0;
/// One is being held.
const HELD: usize = usize::MAX;

/// The next invalidation of a page, which is to be held.
///
/// The value is [`NONE`], [`HELD`], or the number of the page.
pub(super) struct Hold(Atomic<usize>);

impl Hold {
    pub(super) fn new() -> Self {
        Self(Atomic::new(NONE))
    }

    /// Asks for the next invalidation of page number `page` to be held.
    ///
    /// # Errors
    ///
    /// `EBUSY` when one is held or asked for, `EINVAL` for a page that no process has.
    pub(super) fn ask(&self, page: usize) -> Result {
        if page == NONE || page == HELD {
            return Err(EINVAL);
        }
        self.0
            .cmpxchg(NONE, page, Full)
            .map(drop)
            .map_err(|_| EBUSY)
    }

    /// Whether an invalidation is held now.
    pub(super) fn is_held(&self) -> bool {
        self.0.load(Relaxed) == HELD
    }

    /// Ends what was asked for. Returns whether an invalidation was held.
    pub(super) fn let_go(&self) -> bool {
        self.0.xchg(NONE, Full) == HELD
    }

    /// Ends the invalidation that is held and asks for the next one of page number `page`, without a gap in which
    /// that could pass.
    ///
    /// # Errors
    ///
    /// `ENOENT` when none is held, `EINVAL` for a page that no process has.
    pub(super) fn go_on(&self, page: usize) -> Result {
        if page == NONE || page == HELD {
            return Err(EINVAL);
        }
        self.0
            .cmpxchg(HELD, page, Full)
            .map(drop)
            .map_err(|_| ENOENT)
    }

    /// Waits, if the invalidation of `span` is to be held. May sleep then.
    pub(super) fn wait(&self, span: &Span) {
        let page = self.0.load(Relaxed);
        if page == NONE || page == HELD || page < span.first || page > span.last {
            return;
        }
        if self.0.cmpxchg(page, HELD, Full).is_err() {
            return;
        }
        let deadline = Deadline::after_ms(LONGEST);
        while self.is_held() && !deadline.passed() {
            fsleep(Delta::from_millis(STEP));
        }
        // The task that let it go may have asked for another one already, which stays.
        let _ = self.0.cmpxchg(HELD, NONE, Full);
    }
}
