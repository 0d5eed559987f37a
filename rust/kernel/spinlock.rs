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

    /// A `spinlock_t` that is taken with interrupts disabled. While the lock is held, the value
    /// keeps whether interrupts were disabled before.
    pub(crate) struct SpinLockIrqBackend;

    // SAFETY: `SpinLockBackend` ensures mutual exclusion, in the same memory. `relock` is the
    // default one.
    unsafe impl Backend for SpinLockIrqBackend {
        type State = <SpinLockBackend as Backend>::State;
        type GuardState = usize;

        unsafe fn init(ptr: *mut Self::State, name: *const c_char, key: *mut lock_class_key) {
            // SAFETY: `ptr`, `name` and `key` are as the contract of `Backend::init()` wants them, which
            // is the same for both backends.
            unsafe { SpinLockBackend::init(ptr, name, key) }
        }

        unsafe fn lock(ptr: *mut Self::State) -> usize {
            // SAFETY: Enabled again as they were when the lock is given back.
            let flags = unsafe { bindings::zdm_irq_save() };
            // SAFETY: The state is initialised by the contract of `Backend::lock()`.
            let () = unsafe { SpinLockBackend::lock(ptr) };
            flags
        }

        unsafe fn unlock(ptr: *mut Self::State, flags: &usize) {
            // SAFETY: The caller owns the lock by the contract of `Backend::unlock()`.
            unsafe { SpinLockBackend::unlock(ptr, &()) };
            // SAFETY: `flags` are those of `lock` or `try_lock`, on the same CPU.
            unsafe { bindings::zdm_irq_restore(*flags) };
        }

        unsafe fn try_lock(ptr: *mut Self::State) -> Option<usize> {
            // SAFETY: Interrupts are enabled again as they were, below or in `unlock`.
            let flags = unsafe { bindings::zdm_irq_save() };
            // SAFETY: The state is initialised by the contract of `Backend::try_lock()`.
            if unsafe { SpinLockBackend::try_lock(ptr) }.is_some() {
                return Some(flags);
            }
            // SAFETY: They are those of a moment ago.
            unsafe { bindings::zdm_irq_restore(flags) };
            None
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
