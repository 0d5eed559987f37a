// SPDX-License-Identifier: GPL-2.0

//! Tasks that must not wait for the end of a registration.
//!
//! The end of a registration waits for calls of the module that are under way. A task that is in such a call would
//! wait for itself, or for a task that waits for it. So would a task that has locked pages of user memory, for a
//! reader of a file that touches one of them.

use crate::{
    bindings,
    mm::would_deadlock, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Full,
        Relaxed, //
    },
    task::Task,
    types::NotThreadSafe, //
};

/// Most tasks that are in a callback at the same time.
const MOST: usize = 256;

/// The addresses of the tasks that are in a callback; 0 for a place that is not taken.
static TASKS: [Atomic<usize>; MOST] = [const { Atomic::new(0) }; MOST];

/// The current task is in a callback of the module while this lives.
///
/// # Examples
///
/// ```
/// use kernel::mm::module::callback::{check_may_wait, Callback};
///
/// /// The kernel calls this, and waits for its end before it forgets the module's function.
/// fn called() -> Result {
///     let _callback = Callback::enter()?;
///     assert!(check_may_wait().is_err());
///     Ok(())
/// }
/// # called()?;
/// # assert!(check_may_wait().is_ok());
/// # Ok::<(), Error>(())
/// ```
#[must_use = "the callback ends at once"]
pub(crate) struct Callback {
    place: &'static Atomic<usize>,
    _task: NotThreadSafe,
}

impl Callback {
    /// Begins a callback of the current task. Does not sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` while 256 tasks are in callbacks.
    pub(crate) fn enter() -> Result<Self> {
        let task = Task::current_raw() as usize;
        let place = TASKS
            .iter()
            .find(|place| place.load(Relaxed) == 0 && place.cmpxchg(0, task, Full).is_ok());
        Ok(Self {
            place: place.ok_or(EBUSY)?,
            _task: NotThreadSafe,
        })
    }
}

impl Drop for Callback {
    fn drop(&mut self) {
        self.place.store(0, Relaxed);
    }
}

/// Makes sure that the current task may wait for the end of a registration. Does not sleep.
///
/// # Errors
///
/// `EDEADLK` in a [`Callback`], and while page faults are disabled, as in a
/// [`Migration`](crate::mm::migrate::migration::Migration) and in
/// [`migrate_to_ram`](crate::mm::pagemap::ops::PrivateOps::migrate_to_ram).
pub(crate) fn check_may_wait() -> Result {
    let task = Task::current_raw() as usize;
    // SAFETY: The function looks at the current task.
    let has_locks = unsafe { bindings::zdm_pagefault_disabled() };
    // A task sees its own stores.
    if has_locks || TASKS.iter().any(|place| place.load(Relaxed) == task) {
        Err(would_deadlock())
    } else {
        Ok(())
    }
}

#[kunit_tests(zdmirror_callback)]
mod tests {
    use super::*;

    #[test]
    fn callbacks_are_counted() -> Result {
        assert_eq!(check_may_wait(), Ok(()));
        let mut callbacks = KVec::new();
        while let Ok(callback) = Callback::enter() {
            assert_eq!(check_may_wait(), Err(would_deadlock()));
            callbacks.push(callback, GFP_KERNEL)?;
        }
        assert!(callbacks.len() <= MOST);
        assert_eq!(Callback::enter().err(), Some(EBUSY));
        drop(callbacks);
        assert_eq!(check_may_wait(), Ok(()));
        Ok(())
    }
}
