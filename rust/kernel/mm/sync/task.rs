// SPDX-License-Identifier: GPL-2.0

//! Reschedules, checks for fatal signals, and measures deadlines, in long loops. Keeps a task that has locked
//! pages of user memory from waiting for itself.
//!
//! C headers: [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h),
//! [`include/linux/jiffies.h`](srctree/include/linux/jiffies.h),
//! [`include/linux/uaccess.h`](srctree/include/linux/uaccess.h)

use crate::{
    bindings,
    mm::would_deadlock, //
};
use kernel::{
    prelude::*,
    types::NotThreadSafe, //
};

/// Lets other tasks run. May sleep.
pub(in crate::mm) fn cond_resched() {
    // SAFETY: The caller may sleep, as the contract of this function says; nothing else is asked.
    unsafe { bindings::zdm_cond_resched() };
}

/// Lets other tasks run. May sleep.
///
/// # Examples
///
/// ```
/// use kernel::mm::sync::task::check_signals;
///
/// for _page in 0..1000 {
///     check_signals()?;
///     // Work whose amount user space has chosen.
/// }
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
///
/// `EINTR` when the current task was killed.
pub(crate) fn check_signals() -> Result {
    cond_resched();
    // SAFETY: The function looks at the current task, which there is in any context.
    if unsafe { bindings::zdm_fatal_signal_pending() } {
        Err(EINTR)
    } else {
        Ok(())
    }
}

/// Page faults are disabled for the current task while this lives: an access to user memory that needs one
/// fails instead. The task may sleep.
///
/// Wraps `pagefault_disable()`. A task that has locked pages, and waited in a fault for one of them, would wait
/// for itself, and could not be killed.
///
/// # Examples
///
/// ```
/// use kernel::mm::sync::task::NoFaults;
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
///
/// device.migrate(range)?;
/// let no_faults = NoFaults::new();
/// // The page is on the device, and no fault brings it back.
/// assert_eq!(touch(range), Err(EFAULT));
/// drop(no_faults);
/// touch(range)?;
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// The current task has called `pagefault_disable()` once for `self`.
pub(crate) struct NoFaults(NotThreadSafe);

impl NoFaults {
    /// Disables page faults. Does not sleep.
    pub(crate) fn new() -> Self {
        // SAFETY: The function adds one to a counter of the current task, which `drop()` takes back.
        unsafe { bindings::zdm_pagefault_disable() };
        // INVARIANT: Called above.
        Self(NotThreadSafe)
    }
}

impl Drop for NoFaults {
    fn drop(&mut self) {
        // SAFETY: `pagefault_disable()` was called for `self` by the type invariants of `NoFaults`, on this
        // task, as `self` does not leave it.
        unsafe { bindings::zdm_pagefault_enable() };
    }
}

/// Makes sure that the current task may wait for any page of user memory, for the mmap lock, and for an
/// invalidation: a task that changes an address space waits for locked pages, and keeps both meanwhile.
///
/// # Errors
///
/// `EDEADLK` while page faults are disabled, as in a [`Migration`](crate::mm::migrate::migration::Migration) or in
/// [`migrate_to_ram`](crate::mm::pagemap::ops::PrivateOps::migrate_to_ram): the task has locked pages.
pub(in crate::mm) fn check_may_fault() -> Result {
    // SAFETY: The function looks at the current task.
    if unsafe { bindings::zdm_pagefault_disabled() } {
        Err(would_deadlock())
    } else {
        Ok(())
    }
}

/// A point in time, in jiffies.
pub(in crate::mm) struct Deadline(usize);

impl Deadline {
    /// The point `ms` milliseconds from now.
    pub(in crate::mm) fn after_ms(ms: u32) -> Self {
        // SAFETY: The function takes any number of milliseconds.
        Self(unsafe { bindings::zdm_jiffies_after_ms(ms) })
    }

    /// Whether it is in the past.
    pub(in crate::mm) fn passed(&self) -> bool {
        // SAFETY: The function compares numbers.
        unsafe { bindings::zdm_jiffies_passed(self.0) }
    }
}
