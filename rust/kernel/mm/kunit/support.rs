// SPDX-License-Identifier: GPL-2.0

//! A real address space for KUnit cases.
//!
//! C header: [`include/kunit/test.h`](srctree/include/kunit/test.h)

use crate::{
    bindings,
    mm::{
        user::range::PageRange,
        PAGE_SHIFT, //
    },
};
use core::ptr::NonNull;
use kernel::{
    device::{
        Bound,
        Device, //
    },
    error::to_result,
    prelude::*,
    types::NotThreadSafe,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// The module that the KUnit cases are in.
#[cfg(not(zdm_no_module_type))]
pub(crate) fn this_module() -> &'static ThisModule {
    kernel::module::this_module::<crate::LocalModule>()
}

/// The same before Linux 7.3.
#[cfg(zdm_no_module_type)]
pub(crate) fn this_module() -> &'static ThisModule {
    &crate::THIS_MODULE
}

/// References of that module; `None` where nothing counts them, as the module is part of the kernel.
pub(crate) fn module_refs() -> Option<i32> {
    // SAFETY: The module is running the caller.
    let refs = unsafe { bindings::zdm_module_refs(this_module().as_ptr()) };
    (refs >= 0).then_some(refs)
}

/// Maps `bytes` of private anonymous memory in the address space of the KUnit thread, which gets
/// one where it has none; both go away with the test. May sleep.
///
/// # Errors
///
/// `EINVAL` outside of a KUnit case, `ENOMEM`.
pub(crate) fn mmap_anon(bytes: usize) -> Result<usize> {
    mmap(bytes, false)
}

fn mmap(bytes: usize, shared: bool) -> Result<usize> {
    // SAFETY: The function looks at the current task.
    if !unsafe { bindings::zdm_kunit_running() } {
        return Err(EINVAL);
    }
    // SAFETY: The current task is the thread of a KUnit case, as checked above.
    to_result(unsafe { bindings::zdm_kunit_attach_mm() })?;
    // SAFETY: The thread of the case has an address space, attached above.
    let address = unsafe { bindings::zdm_kunit_mmap(bytes, shared) };
    if address == 0 {
        Err(ENOMEM)
    } else {
        Ok(address)
    }
}

/// As [`mmap_anon`], as a range of `pages` pages. May sleep.
///
/// # Errors
///
/// As [`mmap_anon`].
pub(crate) fn anon_range(pages: usize) -> Result<PageRange> {
    PageRange::new(mmap_anon(pages << PAGE_SHIFT)?, pages)
}

/// As [`anon_range`], of memory that is shared: its folios are in the page cache of a file without a name. May sleep.
///
/// # Errors
///
/// As [`mmap_anon`].
pub(crate) fn shared_range(pages: usize) -> Result<PageRange> {
    PageRange::new(mmap(pages << PAGE_SHIFT, true)?, pages)
}

/// Has the CPU write to each page of `range` in the address space of the KUnit thread. May sleep.
///
/// # Errors
///
/// `EFAULT` where a page cannot be written to.
pub(crate) fn touch(range: PageRange) -> Result {
    for address in range.addresses() {
        let user = UserSlice::new(UserPtr::from_addr(address), 1);
        user.writer().write_slice(&[1])?;
    }
    Ok(())
}

/// While this lives the KUnit thread sees itself as a task that was killed.
///
/// # Examples
///
/// ```
/// use kernel::mm::{kunit::support::Killed, sync::task::check_signals};
///
/// let killed = Killed::new()?;
/// assert_eq!(check_signals(), Err(EINTR));
/// drop(killed);
/// assert_eq!(check_signals(), Ok(()));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// The current task is the thread of a KUnit case, and `zdm_kunit_set_killed()` was called for it.
#[must_use = "the thread is alive again at once"]
pub(crate) struct Killed(NotThreadSafe);

impl Killed {
    /// Sets the flags of a fatal signal. Does not sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` outside of a KUnit case.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The function looks at the current task.
        if !unsafe { bindings::zdm_kunit_running() } {
            return Err(EINVAL);
        }
        // SAFETY: The current task is the thread of a KUnit case, whose flags `drop()` clears.
        unsafe { bindings::zdm_kunit_set_killed(true) };
        // INVARIANT: Called above.
        Ok(Self(NotThreadSafe))
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // SAFETY: The flags are those of the current task, as `self` does not leave it.
        unsafe { bindings::zdm_kunit_set_killed(false) };
    }
}

/// A device that can address all memory, and whose DMA addresses are not translated.
///
/// # Examples
///
/// ```
/// use kernel::{dma::DataDirection, mm::kunit::support::KunitDevice};
///
/// let device = KunitDevice::new()?;
/// // As in the probe of a driver.
/// let bound = device.device();
/// pr_debug!("direction {:?}\n", DataDirection::ToDevice);
/// # let _ = bound;
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `dev` is registered, and unregistered by `drop()` only.
pub(crate) struct KunitDevice {
    dev: NonNull<bindings::device>,
}

// SAFETY: A `struct device` belongs to no thread.
unsafe impl Send for KunitDevice {}
// SAFETY: `KunitDevice` gives shared references to a `Device` only, which is `Sync`.
unsafe impl Sync for KunitDevice {}

impl KunitDevice {
    /// Registers a platform device. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The function takes no argument. The caller may sleep.
        let dev = unsafe { bindings::zdm_kunit_device_register() };
        // INVARIANT: Registered above.
        Ok(Self {
            dev: NonNull::new(dev).ok_or(ENOMEM)?,
        })
    }

    /// The device, as a driver that is bound sees it.
    pub(crate) fn device(&self) -> &Device<Bound> {
        // SAFETY: `Device` is a transparent wrapper of `struct device`. The device stays registered while
        // `self` is borrowed, which is what a bound driver may rely on.
        unsafe { self.dev.cast().as_ref() }
    }
}

impl Drop for KunitDevice {
    fn drop(&mut self) {
        // SAFETY: The device is registered by the type invariants of `KunitDevice`.
        unsafe { bindings::zdm_kunit_device_unregister(self.dev.as_ptr()) };
    }
}

/// Unmaps `bytes` from `address` on in the address space of the KUnit thread. May sleep.
///
/// # Errors
///
/// `EINVAL` for a thread without an address space, and those of `munmap(2)`.
pub(crate) fn munmap(address: usize, bytes: usize) -> Result {
    current!().mm().ok_or(EINVAL)?;
    // SAFETY: The current task has an address space, as checked above.
    to_result(unsafe { bindings::vm_munmap(address, bytes) })
}
