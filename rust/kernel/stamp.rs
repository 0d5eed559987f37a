// SPDX-License-Identifier: GPL-2.0

//! The time of the last event, and the task that caused it.
//!
//! C header: [`include/linux/sched/clock.h`](srctree/include/linux/sched/clock.h)

use crate::{
    bindings,
    mm::sync::once::{
        read_once,
        write_once, //
    },
};
use kernel::{
    current,
    prelude::*,
    sync::atomic::Atomic, //
};

/// Nanoseconds on the clock of the kernel log. In any context.
pub(crate) fn log_clock() -> u64 {
    // SAFETY: The function takes no argument, and reads the clock in any context.
    unsafe { bindings::zdm_log_clock() }
}

/// Lines of the log that a task with a file of a device can cause again and again, so that their rate is limited.
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

/// The number of the last tick. In any context.
#[inline]
fn jiffies() -> usize {
    let jiffies = &raw const bindings::jiffies;
    // SAFETY: A variable of the kernel, which is declared volatile: it may be read while it is written.
    unsafe { jiffies.read_volatile() }
}

/// The clock of the kernel log as it was at a recent tick.
///
/// # Examples
///
/// ```
/// use kernel::stamp::{RecentTime, Stamp};
///
/// let (recent, stamp) = (RecentTime::new(), Stamp::new());
/// stamp.set_recent(&recent, 1);
/// assert_eq!(stamp.get().1, 1);
/// ```
pub(crate) struct RecentTime {
    jiffies: Atomic<usize>,
    time: Atomic<u64>,
}

impl RecentTime {
    /// The clock as it is now.
    pub(crate) fn new() -> Self {
        Self {
            // A tick that is over: the clock is read again when it is wanted.
            jiffies: Atomic::new(0),
            time: Atomic::new(log_clock()),
        }
    }

    /// The time of the last tick. To read the clock costs more than the rest of what is done for a page.
    /// Tasks that do this at the same time may take each other's reading for that of another tick.
    #[inline]
    fn get(&self) -> u64 {
        let now = jiffies();
        if read_once(&self.jiffies) != now {
            write_once(&self.time, log_clock());
            write_once(&self.jiffies, now);
        }
        read_once(&self.time)
    }
}

/// The time of an event, its kind, and the task that caused it: 16 bytes.
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
    /// The kind in bits 0 to 31, the task in 32 to 63.
    rest: Atomic<u64>,
}

impl Stamp {
    /// A stamp of time 0, kind 0 and task 0.
    pub(crate) fn new() -> Self {
        Self {
            time: Atomic::new(0),
            rest: Atomic::new(0),
        }
    }

    /// Records an event of kind `what` at `time`, by [`log_clock`], caused by the current task. In any context.
    pub(crate) fn set(&self, time: u64, what: u32) {
        write_once(&self.time, time);
        write_once(&self.rest, u64::from(current_pid()) << 32 | u64::from(what));
    }

    /// As [`Stamp::set`], at the time of the last tick as `recent` has it, or of the last stamp if that
    /// was later. In any context.
    pub(crate) fn set_recent(&self, recent: &RecentTime, what: u32) {
        self.set(recent.get().max(read_once(&self.time)), what);
    }

    /// The last event: its time, in nanoseconds on the clock of the kernel log, its kind, and its task.
    pub(crate) fn get(&self) -> (u64, u32, u32) {
        let rest = read_once(&self.rest);
        // CAST: The lower half, and the upper one.
        (read_once(&self.time), rest as u32, (rest >> 32) as u32)
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
    fn recent_time_is_that_of_a_tick() {
        let (stamp, recent) = (Stamp::new(), RecentTime::new());
        let begin = log_clock();
        stamp.set_recent(&recent, 3);
        let (first, what, pid) = stamp.get();
        // The clock was read, as no tick was seen yet.
        assert!((begin..=log_clock()).contains(&first));
        assert_eq!((what, pid), (3, current_pid()));
        // It is read once per tick.
        let tick = jiffies();
        stamp.set_recent(&recent, 4);
        assert!(jiffies() != tick || stamp.get().0 >= first);
        // A stamp never goes back.
        stamp.set(u64::MAX, 5);
        stamp.set_recent(&recent, 6);
        assert_eq!(stamp.get(), (u64::MAX, 6, current_pid()));
    }

    #[test]
    fn clock_goes_on() {
        let now = log_clock();
        assert!(now > 0 && log_clock() >= now);
    }
}
