// SPDX-License-Identifier: GPL-2.0

//! Spinlocks that interrupts may take: those of the kernel crate, or the like where it has none
//! (before Linux 7.3).

#[cfg(not(zdm_no_spinlock_irq))]
pub(crate) use kernel::{
    new_spinlock_irq,
    sync::SpinLockIrq, //
};

#[cfg(zdm_no_spinlock_irq)]
pub(crate) use compat::{
    new_spinlock_irq,
    SpinLockIrq, //
};

#[cfg(zdm_no_spinlock_irq)]
mod compat {
    use crate::bindings;
    use kernel::{
        bindings::lock_class_key,
        ffi::c_char,
        sync::lock::{
            spinlock::SpinLockBackend,
            Backend,
            Lock, //
        }, //
    };

    /// A spinlock under which interrupts are disabled on this CPU.
    pub(crate) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

    /// A `spinlock_t` that is taken with interrupts disabled. They are enabled again, if they were before, with
    /// the last lock that is given back.
    pub(crate) struct SpinLockIrqBackend;

    // SAFETY: `SpinLockBackend` ensures mutual exclusion, in the same memory. `relock` is the
    // default one.
    unsafe impl Backend for SpinLockIrqBackend {
        type State = <SpinLockBackend as Backend>::State;
        type GuardState = ();

        unsafe fn init(ptr: *mut Self::State, name: *const c_char, key: *mut lock_class_key) {
            // SAFETY: `ptr`, `name` and `key` are as the contract of `Backend::init()` wants them, which
            // is the same for both backends.
            unsafe { SpinLockBackend::init(ptr, name, key) }
        }

        unsafe fn lock(ptr: *mut Self::State) {
            // SAFETY: `unlock()` enables interrupts again.
            unsafe { bindings::zdm_irq_disable() };
            // SAFETY: The state is initialised by the contract of `Backend::lock()`.
            unsafe { SpinLockBackend::lock(ptr) };
        }

        unsafe fn unlock(ptr: *mut Self::State, state: &()) {
            // SAFETY: The caller owns the lock by the contract of `Backend::unlock()`.
            unsafe { SpinLockBackend::unlock(ptr, state) };
            // SAFETY: `lock()` or `try_lock()` has disabled interrupts, so that the task is on the same
            // processor.
            unsafe { bindings::zdm_irq_enable() };
        }

        unsafe fn try_lock(ptr: *mut Self::State) -> Option<()> {
            // SAFETY: Interrupts are enabled again below or in `unlock()`.
            unsafe { bindings::zdm_irq_disable() };
            // SAFETY: The state is initialised by the contract of `Backend::try_lock()`.
            let locked = unsafe { SpinLockBackend::try_lock(ptr) };
            if locked.is_none() {
                // SAFETY: Interrupts were disabled above.
                unsafe { bindings::zdm_irq_enable() };
            }
            locked
        }

        unsafe fn assert_is_held(ptr: *mut Self::State) {
            // SAFETY: The state is initialised by the contract of `Backend::assert_is_held()`.
            unsafe { SpinLockBackend::assert_is_held(ptr) }
        }
    }

    /// As `new_spinlock!`.
    macro_rules! new_spinlock_irq {
        ($inner:expr, $name:literal $(,)?) => {
            $crate::spinlock::SpinLockIrq::new(
                $inner,
                ::kernel::optional_name!($name),
                ::kernel::static_lock_class!(),
            )
        };
    }
    pub(crate) use new_spinlock_irq;
}

#[kernel::prelude::kunit_tests(zdmirror_spinlock)]
mod tests {
    use super::*;
    use kernel::prelude::*;

    #[test]
    fn locks_are_given_back_in_any_order() -> Result {
        pin_init::stack_pin_init!(let first = new_spinlock_irq!(1, "first"));
        pin_init::stack_pin_init!(let second = new_spinlock_irq!(2, "second"));
        let (one, two) = (first.lock(), second.lock());
        drop(one);
        assert_eq!(*two, 2);
        drop(two);
        // With interrupts disabled an allocation must not sleep.
        let value = *first.lock();
        drop(KBox::new(value, GFP_KERNEL)?);
        Ok(())
    }
}
