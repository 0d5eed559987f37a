// SPDX-License-Identifier: GPL-2.0

//! Parameters of this module that `module!` has no types for.
//!
//! C header: [`include/linux/moduleparam.h`](srctree/include/linux/moduleparam.h)

use crate::bindings;
use kernel::prelude::*;

/// The `inject` parameter.
pub(crate) fn param_inject() -> bool {
    // SAFETY: With mode 0444 it does not change while the module is loaded.
    unsafe { bindings::zdm_param_inject() }
}

/// The `strict` parameter, which may be changed while the module is loaded.
#[inline]
pub(crate) fn param_strict() -> bool {
    let strict = &raw const bindings::zdm_strict;
    // SAFETY: A variable of this module, in which only 0 and 1 are stored. A volatile read is what
    // READ_ONCE() is.
    unsafe { strict.read_volatile() }
}

/// The `ledger` parameter.
pub(crate) fn param_ledger() -> bool {
    // SAFETY: With mode 0444 it does not change while the module is loaded.
    unsafe { bindings::zdm_param_ledger() }
}

/// The `audit` parameter as given, a word for [`crate::audit::Policy::parse`].
pub(crate) fn param_audit() -> &'static CStr {
    // SAFETY: A charp parameter is never NULL with a default, is NUL-terminated, and (with mode
    // 0444) does not change while the module is loaded.
    unsafe { CStr::from_char_ptr(bindings::zdm_param_audit()) }
}
