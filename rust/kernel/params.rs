// SPDX-License-Identifier: GPL-2.0

//! Parameters of this module that `module!` has no types for, and those that only the administrator may choose.
//!
//! C header: [`include/linux/moduleparam.h`](srctree/include/linux/moduleparam.h)

use crate::{
    bindings,
    given,
    mm::region::frames::{
        RegionError,
        ReservedRegion, //
    },
    module_parameters, //
};
use kernel::{
    prelude::*,
    sizes::SZ_1M, //
};

/// Takes the memory of a device at physical address `start`, which must be the value of a parameter for such an
/// address. The memory is as long as the parameter for its size says, and not as a driver chooses, because memory of the
/// firmware may follow. Calls it `name` in `/proc/iomem`. May sleep.
///
/// # Errors
///
/// [`RegionError::NotReserved`] for any other address, else as [`ReservedRegion::request`].
pub(crate) fn reserved_region(start: u64, name: &CStr) -> Result<ReservedRegion, RegionError> {
    let addresses: [u64; 4] = [
        given(module_parameters::spm_addr_dev0.value()),
        given(module_parameters::spm_addr_dev1.value()),
        given(module_parameters::generic_addr_dev0.value()),
        given(module_parameters::generic_addr_dev1.value()),
    ];
    if start == 0 || !addresses.contains(&start) {
        return Err(RegionError::NotReserved);
    }
    let mb: usize = given(module_parameters::devmem_chunk_mb.value());
    let bytes = mb.checked_mul(SZ_1M).ok_or(RegionError::OutOfRange)?;
    // SAFETY: The administrator has loaded the module with this address and this size, as those of memory that was
    // set aside.
    unsafe { ReservedRegion::request(start, bytes, name) }
}

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

#[kunit_tests(zdmirror_reserved)]
mod tests {
    use super::*;
    use kernel::sizes::SZ_2M;

    #[test]
    fn address_that_was_not_given_is_refused() {
        // No device has its memory at the first addresses, whether they are set aside or not.
        let refused = reserved_region(SZ_2M as u64, c"kunit");
        assert_eq!(refused.err(), Some(RegionError::NotReserved));
    }
}
