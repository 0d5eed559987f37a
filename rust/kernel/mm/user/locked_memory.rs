// SPDX-License-Identifier: GPL-2.0

//! Pages that count against `RLIMIT_MEMLOCK`.
//!
//! C headers: [`include/linux/sched/user.h`](srctree/include/linux/sched/user.h),
//! [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h)

use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The counter of the pages that `user` has locked. Every access to it is atomic.
///
/// # Safety
///
/// For the lifetime that the caller picks there must be a reference on `user`.
unsafe fn counter<'a>(user: NonNull<bindings::user_struct>) -> &'a Atomic<i64> {
    // SAFETY: There is a reference on `user` by the contract of this function.
    let counter = unsafe { bindings::zdm_user_locked_vm(user.as_ptr()) };
    // SAFETY: The counter is a valid `atomic_long_t` for as long as the user is.
    unsafe { Atomic::from_ptr(counter.cast()) }
}

/// A number of pages that count as locked by the user of the task that made the value. Dropping the value, on
/// any task, takes them off the count.
///
/// # Examples
///
/// ```
/// use kernel::mm::user::locked_memory::LockedPages;
///
/// let charged = LockedPages::charge(16)?;
/// // The pages count as locked until here.
/// drop(charged);
/// assert_eq!(LockedPages::charge(usize::MAX).err(), Some(ENOMEM));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// Owns a reference on `user`, whose counter of locked pages includes `pages`.
pub(crate) struct LockedPages {
    user: NonNull<bindings::user_struct>,
    pages: i64,
}

// SAFETY: A user may be put, and its atomic counter changed, on any thread.
unsafe impl Send for LockedPages {}

// SAFETY: A shared reference gives access to nothing.
unsafe impl Sync for LockedPages {}

impl LockedPages {
    /// Counts `pages` pages for the user of the current task, as io_uring and `perf` count theirs.
    /// Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when the user would have more than `RLIMIT_MEMLOCK` of the current task allows,
    /// unless the task has `CAP_IPC_LOCK`.
    pub(crate) fn charge(pages: usize) -> Result<Self> {
        let pages = i64::try_from(pages).map_err(|_| ENOMEM)?;
        // SAFETY: The current task has a user.
        let user = NonNull::new(unsafe { bindings::zdm_get_current_user() }).ok_or(EINVAL)?;
        // SAFETY: The function looks at the limits of the current task.
        let limit = unsafe { bindings::zdm_memlock_limit() };
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        // SAFETY: The reference was taken above.
        let locked = unsafe { counter(user) };
        let mut before: i64 = locked.load(Relaxed);
        loop {
            let after = before.checked_add(pages).filter(|&after| after <= limit);
            let Some(after) = after else {
                // SAFETY: The reference was taken above and is not used afterwards.
                unsafe { bindings::zdm_put_user(user.as_ptr()) };
                return Err(ENOMEM);
            };
            match locked.cmpxchg(before, after, Relaxed) {
                // INVARIANT: The reference and the pages were taken above.
                Ok(_) => return Ok(Self { user, pages }),
                Err(now) => before = now,
            }
        }
    }
}

impl Drop for LockedPages {
    fn drop(&mut self) {
        // SAFETY: We own a reference on the user by the type invariants of `LockedPages`.
        unsafe { counter(self.user) }.fetch_sub(self.pages, Relaxed);
        // SAFETY: We own the reference by the type invariants of `LockedPages`, and do not use it
        // afterwards.
        unsafe { bindings::zdm_put_user(self.user.as_ptr()) };
    }
}

#[kunit_tests(zdmirror_locked_memory)]
mod tests {
    use super::*;

    #[test]
    fn pages_count_until_they_are_dropped() -> Result {
        // SAFETY: The current task has a user.
        let user = NonNull::new(unsafe { bindings::zdm_get_current_user() }).ok_or(EINVAL)?;
        // SAFETY: The reference taken above keeps the user and its counter.
        let locked = unsafe { counter(user) };
        let before = locked.load(Relaxed);
        let charged = LockedPages::charge(3)?;
        assert_eq!(locked.load(Relaxed), before + 3);
        drop(charged);
        assert_eq!(locked.load(Relaxed), before);
        assert!(LockedPages::charge(usize::MAX).is_err());
        // As many as a task without a limit may lock, and one more.
        // CAST: Not negative.
        let all = LockedPages::charge((i64::MAX - before) as usize);
        assert!(LockedPages::charge(1 << 62).is_err() || all.is_err());
        drop(all);
        assert_eq!(locked.load(Relaxed), before);
        // SAFETY: The reference was taken above and is not used afterwards.
        unsafe { bindings::zdm_put_user(user.as_ptr()) };
        Ok(())
    }
}
