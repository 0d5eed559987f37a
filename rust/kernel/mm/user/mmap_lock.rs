// SPDX-License-Identifier: GPL-2.0

//! The mmap lock, for a task that must be able to end while it waits.
//!
//! The guard of [`MmWithUser`] is got by a wait that not even a fatal signal ends. A driver that works on
//! the address space of another process must not wait so: that process holds its lock for as long as it
//! likes.
//!
//! C header: [`include/linux/mmap_lock.h`](srctree/include/linux/mmap_lock.h)

use crate::{
    bindings,
    mm::sync::task::check_may_fault, //
};
use core::ops::Range;
use kernel::{
    error::to_result,
    mm::{
        virt::VmaRef,
        MmWithUser, //
    },
    prelude::*,
    types::NotThreadSafe, //
};

/// The mmap lock of an address space, held for reading.
///
/// A lock that is forgotten ([`core::mem::forget`]) stays taken, as that of
/// [`MmapReadGuard`](kernel::mm::MmapReadGuard) does: tasks that want it for writing wait for ever, the end of the
/// address space among them.
///
/// # Examples
///
/// ```
/// use kernel::mm::user::mmap_lock::MmapLock;
/// # use kernel::mm::kunit::support::anon_range;
/// # let range = anon_range(1)?;
///
/// let task = current!();
/// let mm = task.mm().ok_or(EINVAL)?;
/// let lock = MmapLock::read(mm)?;
/// let area = lock.vma_lookup(range.start()).ok_or(EFAULT)?;
/// assert!(area.end() >= range.end());
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// The current task holds the mmap lock of `mm` for reading.
#[must_use = "the lock is released at once"]
pub(crate) struct MmapLock<'a> {
    mm: &'a MmWithUser,
    // The task that has locked must unlock.
    _task: NotThreadSafe,
}

impl<'a> MmapLock<'a> {
    /// Locks the areas of `mm`. May sleep. The current task must not have the lock: another task that wants it for
    /// writing may come in between, and both would wait for ever, unless one of them is killed.
    ///
    /// Wraps `mmap_read_lock_killable()`.
    ///
    /// # Errors
    ///
    /// `EDEADLK` for a task that has a migration, or handles a fault on device memory: it has locked pages, and
    /// the lock itself in most cases. `EINTR` on a fatal signal.
    pub(crate) fn read(mm: &'a MmWithUser) -> Result<Self> {
        check_may_fault()?;
        // SAFETY: `mm` has users while it is borrowed.
        to_result(unsafe { bindings::zdm_mmap_read_lock_killable(mm.as_raw()) })?;
        // INVARIANT: The lock was taken above.
        Ok(Self {
            mm,
            _task: NotThreadSafe,
        })
    }

    /// The address space.
    pub(in crate::mm) fn mm(&self) -> &MmWithUser {
        self.mm
    }

    /// The area that address `address`, in bytes, lies in; `None` where nothing is mapped.
    ///
    /// Wraps `vma_lookup()`.
    pub(crate) fn vma_lookup(&self, address: usize) -> Option<&VmaRef> {
        // SAFETY: The mmap lock is held by the type invariants of `MmapLock`. Any address may be asked for.
        let vma = unsafe { kernel::bindings::vma_lookup(self.mm().as_raw(), address) };
        if vma.is_null() {
            return None;
        }
        // SAFETY: The area is valid while the mmap lock is held, which the guard is borrowed for.
        Some(unsafe { VmaRef::from_raw(vma) })
    }

    /// Whether a file is mapped in `addresses`, before the first hole. A fault on it may wait for ever: the
    /// contents can come from a server that does not answer. Files whose faults userfaultfd handles do not
    /// count. Their pages are in memory only, and faults that keep the mmap lock fail at once.
    pub(in crate::mm) fn has_files(&self, addresses: Range<usize>) -> bool {
        let mut start = addresses.start;
        while start < addresses.end {
            let Some(area) = self.vma_lookup(start) else {
                return false;
            };
            // SAFETY: The area is valid while the mmap lock is held, by the type invariants of `MmapLock`.
            let is_anonymous = unsafe { bindings::zdm_vma_is_anonymous(area.as_ptr()) };
            // SAFETY: The area is valid while the mmap lock is held, by the type invariants of `MmapLock`.
            if !is_anonymous && !unsafe { bindings::zdm_userfaultfd_armed(area.as_ptr()) } {
                return true;
            }
            start = area.end();
        }
        false
    }
}

impl Drop for MmapLock<'_> {
    fn drop(&mut self) {
        // SAFETY: The current task holds the lock by the type invariants of `MmapLock`.
        unsafe { kernel::bindings::mmap_read_unlock(self.mm.as_raw()) };
    }
}

/// The mmap lock of an address space, held for writing.
///
/// # Invariants
///
/// The current task holds the mmap lock of `mm` for writing.
#[must_use = "the lock is released at once"]
pub(super) struct MmapWriteLock<'a> {
    mm: &'a MmWithUser,
    // The task that has locked must unlock.
    _task: NotThreadSafe,
}

impl<'a> MmapWriteLock<'a> {
    /// Takes the lock of an address space without subscribers: only the first one needs the lock. `None` where there
    /// are some. May sleep. The current task must not have the lock, for which it would wait until it is killed.
    ///
    /// Wraps `mmap_write_lock_killable()`.
    ///
    /// # Errors
    ///
    /// `EINTR` on a fatal signal.
    pub(super) fn for_first_notifier(mm: &'a MmWithUser) -> Result<Option<Self>> {
        // SAFETY: `mm` has users while it is borrowed.
        if unsafe { bindings::zdm_mm_has_notifiers(mm.as_raw()) } {
            return Ok(None);
        }
        // SAFETY: `mm` has users while it is borrowed.
        to_result(unsafe { bindings::zdm_mmap_write_lock_killable(mm.as_raw()) })?;
        // INVARIANT: The lock was taken above.
        Ok(Some(Self {
            mm,
            _task: NotThreadSafe,
        }))
    }
}

impl Drop for MmapWriteLock<'_> {
    fn drop(&mut self) {
        // SAFETY: The current task holds the lock by the type invariants of `MmapWriteLock`.
        unsafe { bindings::zdm_mmap_write_unlock(self.mm.as_raw()) };
    }
}
