// SPDX-License-Identifier: GPL-2.0

//! Keeping a module loaded.
//!
//! C headers: [`include/linux/module.h`](srctree/include/linux/module.h),
//! [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use crate::bindings;
use kernel::{
    prelude::*,
    types::Opaque, //
};

/// References of a module, from which on there are no more. A pin that is forgotten keeps its reference, and a count
/// that wrapped around would let the module go.
const MOST: i32 = i32::MAX / 2;

/// A reference on a module.
///
/// # Examples
///
/// ```
/// use kernel::{mm::module::pin::ModulePin, module::this_module};
///
/// let pin = ModulePin::try_take(this_module::<LocalModule>()).ok_or(ENODEV)?;
/// // The module is not unloaded until here.
/// drop(pin);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// Owns one count of the references of the module in the field.
#[must_use = "the module may be unloaded again at once"]
pub(crate) struct ModulePin(&'static ThisModule);

impl ModulePin {
    /// Takes a reference of `module`, unless the module is on its way out: its exit function runs, or
    /// will. Nor is there one before the init function of the module has succeeded, as a module whose
    /// init function fails goes whether it has references or not. Nor is there one for a module that has 2^30
    /// references already. Code that is not a module's always gets one. Does not sleep.
    ///
    /// Wraps `try_module_get()`.
    pub(crate) fn try_take(module: &'static ThisModule) -> Option<Self> {
        let raw = module.as_ptr();
        // SAFETY: A `ThisModule` is NULL or the `struct module` of the code that has it, by the contract of
        // `ThisModule::from_ptr()`. That code is running, or about to be run, so that the structure exists.
        let (is_live, refs) = unsafe {
            (
                bindings::zdm_module_is_live(raw),
                bindings::zdm_module_refs(raw),
            )
        };
        // Tasks that look at the same time are too few to exceed the limit by much.
        if !is_live || refs > MOST {
            return None;
        }
        // SAFETY: A `ThisModule` is NULL or the `struct module` of the code that has it, by the contract of
        // `ThisModule::from_ptr()`. That code is running, or about to be run, so that the structure exists.
        let taken = unsafe { bindings::zdm_module_try_get(raw) };
        // INVARIANT: The reference was taken above. Without one there is no value, whose `drop()` would put it.
        taken.then(|| Self(module))
    }

    /// Forgets the pin without dropping the reference.
    pub(in crate::mm) fn leak(self) {
        core::mem::forget(self);
    }

    /// # Safety
    ///
    /// One pin of `module` must have been leaked for every call.
    pub(in crate::mm) unsafe fn from_leaked(module: &'static ThisModule) -> Self {
        // INVARIANT: The leaked pin of `module` owned the reference, by the contract of this function.
        Self(module)
    }
}

impl Drop for ModulePin {
    fn drop(&mut self) {
        // SAFETY: `self` owns a reference of the module by the type invariants of `ModulePin`.
        unsafe { bindings::zdm_module_put(self.0.as_ptr()) };
    }
}

/// The time between [`Work::queue_later`] and the work, in milliseconds. Waking a worker costs the caller more than
/// freeing a page does, and often nothing is left to be done when the time is over.
const DELAY_MS: u32 = 20;

/// Something to be done later, in a context that may sleep: `struct delayed_work`.
///
/// # Invariants
///
/// `work` is initialised, and its function may be called for it until [`Work::disable`].
#[pin_data]
#[repr(transparent)]
pub(in crate::mm) struct Work {
    #[pin]
    work: Opaque<bindings::delayed_work>,
}

// The function gets the address of the first field, which is that of all.
const _: () = assert!(core::mem::offset_of!(bindings::delayed_work, work) == 0);

// SAFETY: A `delayed_work` does its own locking.
unsafe impl Send for Work {}
// SAFETY: A `delayed_work` does its own locking.
unsafe impl Sync for Work {}

impl Work {
    /// Work that calls `f`. May sleep.
    ///
    /// # Safety
    ///
    /// It must be sound to call `f` with a pointer to the result, until [`Work::disable`] was called, which
    /// must happen before the result is dropped.
    pub(in crate::mm) unsafe fn new(
        f: unsafe extern "C" fn(*mut bindings::work_struct),
    ) -> impl PinInit<Self> {
        // INVARIANT: The work is initialised here; the rest is what the contract of this function asks.
        pin_init!(Self {
            work <- Opaque::ffi_init(move |work| {
                // SAFETY: `work` is valid for writes.
                unsafe { bindings::zdm_work_init(work, Some(f)) }
            }),
        })
    }

    /// The work whose function was called with `raw`.
    pub(in crate::mm) fn of_raw(raw: *mut bindings::work_struct) -> *mut Self {
        raw.cast()
    }

    /// Has the work done soon, at least once after this call unless it is disabled. Does not sleep.
    pub(in crate::mm) fn queue(&self) {
        // SAFETY: The work is initialised by the type invariants of `Work`.
        unsafe { bindings::zdm_work_queue(self.work.get(), 0) };
    }

    /// As [`Work::queue`], after [`DELAY_MS`]. One work is queued by this function or by [`Work::queue`], never by both:
    /// work that waits for its time is done no earlier.
    pub(in crate::mm) fn queue_later(&self) {
        // SAFETY: The work is initialised by the type invariants of `Work`.
        unsafe { bindings::zdm_work_queue(self.work.get(), DELAY_MS) };
    }

    /// Has the work done at once that was queued before, and waits until it is. May sleep.
    pub(in crate::mm) fn flush(&self) {
        // SAFETY: The work is initialised by the type invariants of `Work`.
        unsafe { bindings::flush_delayed_work(self.work.get()) };
    }

    /// Waits until the work does not run, takes it off its queue, and makes [`Work::queue`] do nothing
    /// from then on. May sleep.
    pub(in crate::mm) fn disable(&self) {
        // SAFETY: The work is initialised by the type invariants of `Work`.
        unsafe { bindings::disable_delayed_work_sync(self.work.get()) };
    }
}

#[kunit_tests(zdmirror_module)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::{
            module_refs,
            this_module, //
        },
        module::scope::ModuleScope, //
    };
    use kernel::time::{
        delay::fsleep,
        Delta, //
    };

    #[test]
    fn init_must_have_succeeded() -> Result {
        let module = this_module();
        let scope = ModuleScope::new(module)?;
        // SAFETY: The state is as it was at the end of the case, and nothing relies on it meanwhile but what the
        // case asks.
        unsafe { bindings::zdm_kunit_set_module_live(module.as_ptr(), false) };
        let early = ModulePin::try_take(module);
        let entry = scope.enter();
        // SAFETY: As it was before the case.
        unsafe { bindings::zdm_kunit_set_module_live(module.as_ptr(), true) };
        let is_module = !module.as_ptr().is_null();
        assert_eq!(early.is_none(), is_module);
        assert_eq!(entry.is_err(), is_module);
        if let Ok(entry) = entry {
            // SAFETY: Nothing was registered.
            drop(unsafe { entry.leave() });
        }
        assert!(ModulePin::try_take(module).is_some());
        Ok(())
    }

    #[test]
    fn count_does_not_wrap_around() {
        let Some(before) = module_refs() else { return };
        let module = this_module();
        // SAFETY: The references are dropped again below, and nothing takes as many meanwhile.
        unsafe { bindings::zdm_kunit_add_module_refs(module.as_ptr(), MOST) };
        let pin = ModulePin::try_take(module);
        // SAFETY: These were added above.
        unsafe { bindings::zdm_kunit_add_module_refs(module.as_ptr(), -MOST) };
        assert_eq!(pin.is_none(), before > 0);
        drop(pin);
        assert!(ModulePin::try_take(module).is_some());
    }

    #[test]
    fn reference_that_was_refused_is_not_dropped() {
        let mut refs = module_refs();
        for _ in 0..1000 {
            if !matches!(refs, Some(2..)) {
                break;
            }
            fsleep(Delta::from_millis(1));
            refs = module_refs();
        }
        // No task has a reference but the one that loads the module, so that none drops one meanwhile.
        let Some(refs @ 0..=1) = refs else { return };
        let (module, all) = (this_module(), refs + 1);
        // SAFETY: The references are added again below. Until then the count is as that of a module whose removal has
        // begun: core code drops the one that loading the module has taken, and then says so in the state.
        unsafe { bindings::zdm_kunit_add_module_refs(module.as_ptr(), -all) };
        // A value that was made, and dropped, would have core code warn.
        let pin = ModulePin::try_take(module);
        // SAFETY: As it was before.
        unsafe { bindings::zdm_kunit_add_module_refs(module.as_ptr(), all) };
        assert!(pin.is_none());
    }
}
