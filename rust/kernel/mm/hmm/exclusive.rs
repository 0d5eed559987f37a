// SPDX-License-Identifier: GPL-2.0

//! Device-exclusive access: the device may access a page, the CPU may not until it faults.
//!
//! C header: [`include/linux/rmap.h`](srctree/include/linux/rmap.h), `make_device_exclusive()`

use super::{
    access::{
        Access,
        Grant, //
    },
    mirror::HmmMirror, //
};
use crate::{
    bindings,
    mm::{
        sync::task::{
            check_may_fault,
            check_signals,
            Deadline, //
        },
        user::{
            changes::Span,
            mmap_lock::MmapLock,
            range::PageRange, //
        },
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
};
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    mm::MmWithUser,
    prelude::*, //
};

/// A page that the CPU cannot access, nor get back while this lives.
///
/// # Invariants
///
/// We own the lock of the folio of `page` and a reference.
struct ExclusivePage<'a> {
    page: NonNull<bindings::page>,
    // It is released after the folio. fork(), which does not wait for a locked folio of an exclusive page before
    // our series, and fails, waits for this lock.
    _lock: MmapLock<'a>,
}

impl<'a> ExclusivePage<'a> {
    /// Takes the page at `address` from the CPU, after faulting it in for writing. `owner` is told
    /// to interval notifiers. `EAGAIN` for `no_file` where a file is mapped. May sleep; the mmap lock must not
    /// be held.
    fn make(mm: &'a MmWithUser, address: usize, owner: *mut c_void, no_file: bool) -> Result<Self> {
        let mut folio = core::ptr::null_mut();
        let lock = MmapLock::read(mm)?;
        if no_file && lock.has_files(address..address + PAGE_SIZE) {
            return Err(EAGAIN);
        }
        // SAFETY: The mmap lock is held; `owner` is not dereferenced, `folio` is written only.
        let page = from_err_ptr(unsafe {
            bindings::make_device_exclusive(mm.as_raw(), address, owner, &mut folio)
        })?;
        // INVARIANT: The folio came locked and referenced, and it is that of `page`.
        Ok(Self {
            page: NonNull::new(page).ok_or(EFAULT)?,
            _lock: lock,
        })
    }
}

impl Drop for ExclusivePage<'_> {
    fn drop(&mut self) {
        // SAFETY: We own the lock by the type invariants of `ExclusivePage`.
        unsafe { bindings::zdm_folio_unlock(self.page.as_ptr()) };
        // SAFETY: We own a reference by the type invariants of `ExclusivePage`.
        unsafe { bindings::zdm_folio_put(self.page.as_ptr()) };
    }
}

impl HmmMirror {
    /// Gets exclusive access to each page of `range`, until the CPU wants it back, and returns how
    /// many pages were not exclusive before. May sleep; the mmap lock must not be held.
    ///
    /// Wraps `make_device_exclusive()`.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone, `EFAULT` where nothing writable is mapped, `EOPNOTSUPP`
    /// for memory that is not anonymous, `EBUSY` when a page is taken back for a second, `EDEADLK` for a
    /// task that has a migration, `EINTR` for one that was killed, `ENOMEM`. The device keeps
    /// its access to the pages before the one that failed.
    pub(crate) fn make_exclusive(&self, range: PageRange) -> Result<usize> {
        check_may_fault()?;
        let mm = self.mm().mmget_not_zero().ok_or(EINVAL)?;
        let mut pages = 0;
        for address in range.addresses() {
            if self.make_page_exclusive(&mm, address)? {
                pages += 1;
            }
        }
        Ok(pages)
    }

    fn make_page_exclusive(&self, mm: &MmWithUser, address: usize) -> Result<bool> {
        let index = address >> PAGE_SHIFT;
        let span = Span {
            first: index,
            last: index,
        };
        let deadline = Deadline::after_ms(bindings::HMM_RANGE_DEFAULT_TIMEOUT);
        // Whether the last step was to fault in the page of a file.
        let mut faulted = false;
        loop {
            check_signals()?;
            let seq = self.notifier.read_begin(span)?;
            if self.notifier.lock().is_exclusive(index) {
                return Ok(false);
            }
            let owner = self.notifier.exclusive_owner();
            let page = match ExclusivePage::make(mm, address, owner, !faulted) {
                Err(err) if err == EAGAIN => {
                    self.fault_file_in(address)?;
                    faulted = true;
                    continue;
                }
                other => other?,
            };
            faulted = false;
            let result = match self.notifier.lock_if_fresh(seq) {
                // SAFETY: The CPU mapped the page by an entry that was writable, and the sequence was
                // checked under the lock that the table is behind.
                Some(table) => unsafe { table.store(index, page.page, Grant::Exclusive) },
                None => Err(EBUSY),
            };
            // The fault below wants the lock of the folio.
            drop(page);
            let Err(err) = result else {
                return Ok(true);
            };
            // This precedes the start of the sequence: `make_device_exclusive()` first takes
            // exclusive pages back, which is an invalidation, and would make each try fail the
            // next.
            give_back(mm, address);
            if err != EBUSY || deadline.passed() {
                return Err(err);
            }
        }
    }

    /// Faults in the page at `address`, of a private mapping of a file, for `make_device_exclusive()`, which
    /// keeps the mmap lock meanwhile: a task that waits there for the server of the file cannot be killed.
    /// May sleep.
    fn fault_file_in(&self, address: usize) -> Result {
        match self.fault(PageRange::new(address, 1)?, Access::Write) {
            Err(err) if err == EINTR => Err(err),
            // `make_device_exclusive()` returns the error.
            _ => Ok(()),
        }
    }

    /// Whether the device has exclusive access to any page of `range`. May sleep.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
    /// # let device = EmulatedDevice::new()?;
    /// # let range = anon_range(2)?;
    /// # let mirror = device.mirror()?;
    /// assert_eq!(mirror.make_exclusive(range)?, 2);
    /// assert!(mirror.has_exclusive(range)?);
    /// // The CPU takes both pages back.
    /// touch(range)?;
    /// assert!(!mirror.has_exclusive(range)?);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `EINTR` for a task that was killed.
    pub(crate) fn has_exclusive(&self, range: PageRange) -> Result<bool> {
        for address in range.addresses() {
            check_signals()?;
            if self.notifier.lock().is_exclusive(address >> PAGE_SHIFT) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Lets the CPU access `address` again, as a fault of its own would. May sleep.
fn give_back(mm: &MmWithUser, address: usize) {
    let flags = bindings::fault_flag_FAULT_FLAG_WRITE | bindings::fault_flag_FAULT_FLAG_REMOTE;
    let Ok(_lock) = MmapLock::read(mm) else {
        return;
    };
    // A failure means that the area has changed, which the next try finds out too. An exclusive
    // entry that the table does not know does no harm, because the next access of the CPU ends it.
    // SAFETY: The mmap lock is held, and the callee does not drop it, because the last argument is
    // NULL.
    unsafe {
        bindings::fixup_user_fault(mm.as_raw(), address, flags, core::ptr::null_mut());
    }
}
