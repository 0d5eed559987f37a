// SPDX-License-Identifier: GPL-2.0

//! When something happened last, and which task did it.
//!
//! C header: [`include/linux/sched/clock.h`](srctree/include/linux/sched/clock.h)

use crate::bindings;
use kernel::{
    current,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    types::Opaque, //
};

/// Nanoseconds on the clock of the kernel log. In any context.
pub(crate) fn log_clock() -> u64 {
    // SAFETY: The function takes no argument, and reads the clock in any context.
    unsafe { bindings::zdm_log_clock() }
}

/// Lines of the log that any opener of a device can cause, as often as it likes.
#[derive(Clone, Copy)]
pub(crate) enum Topic {
    /// A device has got memory.
    Added,
    /// Pages do not leave it.
    Stuck,
    /// There is no memory to evict with.
    Short,
}

/// Whether one more line of this kind may be logged: ten in five seconds. In any context.
pub(crate) fn may_log(topic: Topic) -> bool {
    // CAST: Topics are small.
    // SAFETY: There are as many limits as topics, and the function may be called in any context.
    unsafe { bindings::zdm_may_log(topic as u32) }
}

// Every topic has its limit.
const _: () = assert!(Topic::Short as u32 + 1 == bindings::ZDM_LOG_TOPICS);

/// Number of the current task, or of the one that an interrupt met. In any context.
pub(crate) fn current_pid() -> u32 {
    // CAST: Not negative.
    current!().pid() as u32
}

/// The clock of the kernel log as it was at a recent tick.
pub(crate) struct RecentTime(Opaque<bindings::zdm_recent>);

// SAFETY: The words are read and written by `READ_ONCE()` and `WRITE_ONCE()`, in any context.
unsafe impl Send for RecentTime {}
// SAFETY: As above.
unsafe impl Sync for RecentTime {}

impl RecentTime {
    /// As it is now.
    pub(crate) fn new() -> Self {
        let time = log_clock();
        // A tick that is over: the clock is read again when it is wanted.
        Self(Opaque::new(bindings::zdm_recent { jiffies: 0, time }))
    }
}

/// Room for when something happened, what, and by whom: 16 bytes.
///
/// A read during a write may get the time of one stamp and the rest of another.
///
/// # Examples
///
/// ```
/// use kernel::stamp::{log_clock, Stamp};
///
/// const ALLOCATED: u32 = 1;
/// let stamp = Stamp::new();
/// stamp.set(log_clock(), ALLOCATED);
/// let (_time, what, task) = stamp.get();
/// assert_eq!((what, task), (ALLOCATED, current!().pid() as u32));
/// ```
pub(crate) struct Stamp {
    time: Atomic<u64>,
    /// What in bits 0 to 31, the task in 32 to 63.
    rest: Atomic<u64>,
}

impl Stamp {
    /// Of the beginning of time.
    pub(crate) fn new() -> Self {
        Self {
            time: Atomic::new(0),
            rest: Atomic::new(0),
        }
    }

    /// `what` happens at `time`, by [`log_clock`], and the current task does it. In any context.
    pub(crate) fn set(&self, time: u64, what: u32) {
        // One call, as each atomic store would be one, too, to a function in C.
        // SAFETY: Both words may be written at any time, by `WRITE_ONCE()`.
        unsafe { bindings::zdm_stamp(self.time.as_ptr(), self.rest.as_ptr(), time, what) };
    }

    /// As [`Stamp::set`], at the time of the last tick as `recent` has it, or of the last stamp if that
    /// was later. In any context.
    pub(crate) fn set_recent(&self, recent: &RecentTime, what: u32) {
        let (time, rest) = (self.time.as_ptr(), self.rest.as_ptr());
        // SAFETY: All words may be read and written at any time, by `READ_ONCE()` and `WRITE_ONCE()`.
        unsafe { bindings::zdm_stamp_recent(time, rest, recent.0.get(), what) };
    }

    /// What happened last: when, in nanoseconds on the clock of the kernel log, what, and the task.
    pub(crate) fn get(&self) -> (u64, u32, u32) {
        let rest = self.rest.load(Relaxed);
        // CAST: The lower half, and the upper one.
        (self.time.load(Relaxed), rest as u32, (rest >> 32) as u32)
    }
}

#[kunit_tests(zdmirror_stamp)]
mod tests {
    use super::*;

    #[test]
    fn last_stamp_is_kept() {
        let stamp = Stamp::new();
        assert_eq!(stamp.get(), (0, 0, 0));
        let begin = log_clock();
        for what in [7, u32::MAX, 0] {
            stamp.set(begin, what);
            assert_eq!(stamp.get(), (begin, what, current_pid()));
        }
    }

    #[test]
    fn clock_goes_on() {
        let now = log_clock();
        assert!(now > 0 && log_clock() >= now);
    }
}
