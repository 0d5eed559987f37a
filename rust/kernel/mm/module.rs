// SPDX-License-Identifier: GPL-2.0

//! Keeping the module loaded.
//!
//! C header: [`include/linux/module.h`](srctree/include/linux/module.h)

use crate::bindings;
use kernel::str::{
    CStr,
    CStrExt as _, //
};

/// A reference on this module.
///
/// # Invariants
///
/// Owns one count of the module's references.
#[must_use = "the module may be unloaded again at once"]
pub(crate) struct ModulePin(());

impl ModulePin {
    /// Takes a reference. The caller runs in the module, for a file or with another pin, so the
    /// module cannot be on its way out. Does not sleep.
    pub(crate) fn take() -> Self {
        // SAFETY: Code of the module that is not in its exit function runs, so it is alive.
        unsafe { bindings::zdm_module_get() };
        // INVARIANT: Taken above.
        Self(())
    }

    /// Takes a reference, unless the module is on its way out. Does not sleep.
    pub(crate) fn try_take() -> Option<Self> {
        // SAFETY: Code of the module runs, so its `struct module` is there.
        let taken = unsafe { bindings::zdm_module_try_get() };
        // INVARIANT: Taken above.
        taken.then_some(Self(()))
    }

    /// Forgets the pin without dropping the reference.
    pub(super) fn leak(self) {
        core::mem::forget(self);
    }

    /// # Safety
    ///
    /// One pin must have been leaked for every call.
    pub(super) unsafe fn from_leaked() -> Self {
        // INVARIANT: By the caller's contract.
        Self(())
    }
}

impl Drop for ModulePin {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants.
        unsafe { bindings::zdm_module_put() };
    }
}

/// The `inject` parameter.
pub(crate) fn param_inject() -> bool {
    // SAFETY: With mode 0444 it does not change while the module is loaded.
    unsafe { bindings::zdm_param_inject() }
}

/// The `ledger` parameter.
pub(crate) fn param_ledger() -> bool {
    // SAFETY: As above.
    unsafe { bindings::zdm_param_ledger() }
}

/// The `audit` parameter as given, a word for [`crate::audit::Policy::parse`].
pub(crate) fn param_audit() -> &'static CStr {
    // SAFETY: A charp parameter is never NULL with a default, is NUL-terminated, and (with mode
    // 0444) does not change while the module is loaded.
    unsafe { CStr::from_char_ptr(bindings::zdm_param_audit()) }
}
