// SPDX-License-Identifier: GPL-2.0

//! Reschedules, checks for fatal signals, and measures deadlines, in long loops.
//!
//! C headers: [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h),
//! [`include/linux/jiffies.h`](srctree/include/linux/jiffies.h)

use crate::bindings;
use kernel::prelude::*;

/// Gives others a turn. May sleep.
pub(super) fn cond_resched() {
    // SAFETY: The caller may sleep, as the contract of this function says; nothing else is asked.
    unsafe { bindings::zdm_cond_resched() };
}

/// Gives others a turn, and `EINTR` when the current task was killed. May sleep.
pub(crate) fn check_signals() -> Result {
    cond_resched();
    // SAFETY: The function looks at the current task, which there is in any context.
    if unsafe { bindings::zdm_fatal_signal_pending() } {
        Err(EINTR)
    } else {
        Ok(())
    }
}

/// A point in time, in jiffies.
pub(super) struct Deadline(usize);

impl Deadline {
    /// The point `ms` milliseconds from now.
    pub(super) fn after_ms(ms: u32) -> Self {
        // SAFETY: The function takes any number of milliseconds.
        Self(unsafe { bindings::zdm_jiffies_after_ms(ms) })
    }

    /// Whether it is in the past.
    pub(super) fn passed(&self) -> bool {
        // SAFETY: The function compares numbers.
        unsafe { bindings::zdm_jiffies_passed(self.0) }
    }
}
