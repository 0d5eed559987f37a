// SPDX-License-Identifier: GPL-2.0

//! Waits of core mm and of RCU that a fatal signal does not end, for tasks that can be killed.

use super::task::{
    check_signals,
    Deadline, //
};
use crate::{
    bindings,
    mm::module::pin::Work, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Full,
        Release, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// What is waited for.
pub(in crate::mm) trait Blocking: Send + Sync + 'static {
    /// Waits, and cannot be killed. May sleep.
    fn block(&self);
}

/// A wait that deferred work does for all tasks that wait at the same time, so that each of them can give up.
///
/// # Invariants
///
/// Of two numbers in `begun` and `ended` that are equal, the first was stored before the wait, the second
/// after it.
#[pin_data]
pub(in crate::mm) struct KillableWait<B: Blocking> {
    what: B,
    /// The number of the last wait that has begun.
    begun: Atomic<u64>,
    /// The number of the last one that has ended.
    ended: Atomic<u64>,
    #[pin]
    work: Work,
}

impl<B: Blocking> KillableWait<B> {
    /// The shortest and the longest sleep between two looks, in microseconds.
    const PAUSES: [i64; 2] = [50, 5000];

    /// A wait for `what`. May sleep.
    ///
    /// # Safety
    ///
    /// [`KillableWait::disable`] must be called before the result is dropped, unless no task has waited.
    pub(in crate::mm) unsafe fn new(what: B) -> impl PinInit<Self> {
        // INVARIANT: No wait has begun.
        pin_init!(Self {
            what,
            begun: Atomic::new(0),
            ended: Atomic::new(0),
            // SAFETY: `run()` needs the structure around the work, which is there until the work is disabled,
            // by the contract of this function.
            work <- unsafe { Work::new(Self::run) },
        })
    }

    /// # Safety
    ///
    /// Only to be called for the work of a pinned `KillableWait<B>`.
    unsafe extern "C" fn run(work: *mut bindings::work_struct) {
        // SAFETY: By the contract of this function.
        let this = unsafe { &*kernel::container_of!(Work::of_raw(work), Self, work) };
        let number = this.begun.fetch_add(1, Full).wrapping_add(1);
        this.what.block();
        // INVARIANT: Runs of the work follow each other, so that this is the last wait that has begun.
        this.ended.store(number, Release);
    }

    /// Waits as [`Blocking::block`] does, from now on. May sleep.
    ///
    /// # Errors
    ///
    /// `EINTR` when this task was killed, `ETIMEDOUT` when `most` milliseconds were not enough.
    pub(in crate::mm) fn wait(&self, most: Option<u32>) -> Result {
        // The work runs at least once after `queue()`. If it begins earlier, that is after this read. What the caller
        // has stored before, as the sequence of a notifier, must be visible to that run: the addition of 0 is a full
        // barrier, as the one in `run()` is.
        let wanted = self.begun.fetch_add(0, Full).wrapping_add(1);
        self.work.queue();
        let deadline = most.map(Deadline::after_ms);
        let [mut pause, longest] = Self::PAUSES;
        loop {
            // CAST: The sign is that of the distance.
            if self.ended.load(Acquire).wrapping_sub(wanted) as i64 >= 0 {
                return Ok(());
            }
            check_signals()?;
            if deadline.as_ref().is_some_and(Deadline::passed) {
                return Err(ETIMEDOUT);
            }
            fsleep(Delta::from_micros(pause));
            pause = longest.min(2 * pause);
        }
    }

    /// Waits until no wait is under way, and makes [`KillableWait::wait`] wait in vain from then on. May
    /// sleep.
    pub(in crate::mm) fn disable(&self) {
        self.work.disable();
    }
}

#[kunit_tests(zdmirror_killable)]
mod tests {
    use super::*;

    struct Nothing;

    impl Blocking for Nothing {
        fn block(&self) {}
    }

    fn nothing() -> Result<Pin<KBox<KillableWait<Nothing>>>> {
        // SAFETY: The cases disable it, and a failed assertion of KUnit leaves it where it is.
        KBox::pin_init(unsafe { KillableWait::new(Nothing) }, GFP_KERNEL)
    }

    #[test]
    fn each_wait_is_a_new_one() -> Result {
        let wait = nothing()?;
        let results = [wait.wait(None), wait.wait(Some(1000))];
        let ended = wait.ended.load(Acquire);
        // Work that is queued, but that no task waits for, ends before its memory is freed.
        wait.work.queue();
        wait.disable();
        assert_eq!(results, [Ok(()), Ok(())]);
        assert!(ended >= 2);
        Ok(())
    }

    #[test]
    fn nobody_waits_for_ever() -> Result {
        let wait = nothing()?;
        // The work is never done, as if what is waited for never came.
        wait.disable();
        assert_eq!(wait.wait(Some(20)), Err(ETIMEDOUT));
        Ok(())
    }
}
