// SPDX-License-Identifier: GPL-2.0

//! The ioctl structures, safe to copy from and to user space.
//!
//! C headers: [`lib/test_hmm_uapi.h`](srctree/lib/test_hmm_uapi.h), `uapi/zdmirror.h`

use crate::bindings;
use kernel::{
    ffi,
    transmute::{
        AsBytes,
        FromBytes, //
    }, //
};

pub(crate) use bindings::{
    hmm_dmirror_cmd as HmmCmd,
    zdm_audit as ZdmAudit,
    zdm_fault as ZdmFault,
    zdm_fault_around as ZdmFaultAround,
    zdm_inject as ZdmInject,
    zdm_inspect as ZdmInspect,
    zdm_page as ZdmPage,
    zdm_pin as ZdmPin,
    zdm_stats as ZdmStats,
    zdm_unpin as ZdmUnpin,
    zdm_violation as ZdmViolation, //
};
pub(crate) use bindings::{
    zdm_owner_ZDM_OWNER_LOCAL as ZDM_OWNER_LOCAL,
    zdm_owner_ZDM_OWNER_NONE as ZDM_OWNER_NONE,
    zdm_owner_ZDM_OWNER_REMOTE as ZDM_OWNER_REMOTE, //
};
pub(crate) use bindings::{
    HMM_DMIRROR_CHECK_EXCLUSIVE,
    HMM_DMIRROR_EXCLUSIVE,
    HMM_DMIRROR_FLAGS,
    HMM_DMIRROR_FLAG_FAIL_ALLOC,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL,
    HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
    HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE,
    HMM_DMIRROR_PROT_ERROR,
    HMM_DMIRROR_PROT_NONE,
    HMM_DMIRROR_PROT_PMD,
    HMM_DMIRROR_PROT_PUD,
    HMM_DMIRROR_PROT_READ,
    HMM_DMIRROR_PROT_WRITE,
    HMM_DMIRROR_PROT_ZERO,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_READ_UNLOCKED,
    HMM_DMIRROR_RELEASE,
    HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_WRITE,
    MEMORY_DEVICE_COHERENT,
    MEMORY_DEVICE_GENERIC,
    MEMORY_DEVICE_PRIVATE,
    ZDM_AUDIT,
    ZDM_AUDIT_CLEAR,
    ZDM_AUDIT_MAX_RECORDS,
    ZDM_AUDIT_PASS,
    ZDM_AUDIT_QUIET,
    ZDM_FAULT,
    ZDM_FAULT_AROUND,
    ZDM_FAULT_WRITE,
    ZDM_INJECT,
    ZDM_INSPECT,
    ZDM_INSPECT_MAX_PAGES,
    ZDM_INSPECT_PFN,
    ZDM_PAGE_ANON,
    ZDM_PAGE_ANON_EXCLUSIVE,
    ZDM_PAGE_CHARGED,
    ZDM_PAGE_ERROR,
    ZDM_PAGE_LOCKED,
    ZDM_PAGE_LRU,
    ZDM_PAGE_MAPPING,
    ZDM_PAGE_MISPLACED,
    ZDM_PAGE_PMD,
    ZDM_PAGE_PUD,
    ZDM_PAGE_THERE,
    ZDM_PAGE_WRITE,
    ZDM_PAGE_ZERO,
    ZDM_PIN,
    ZDM_PIN_FAST,
    ZDM_PIN_GET,
    ZDM_PIN_LONGTERM,
    ZDM_PIN_MAX,
    ZDM_PIN_MAX_PAGES,
    ZDM_PIN_WRITE,
    ZDM_PROT_DEV_GENERIC_LOCAL,
    ZDM_PROT_DEV_GENERIC_REMOTE,
    ZDM_STATS,
    ZDM_STATS_ORDERS,
    ZDM_UNPIN,
    ZDM_UNPIN_DIRTY,
    ZDM_VIOLATION_SIZE_VER0, //
};

/// A structure that user space and the module exchange.
///
/// # Examples
///
/// ```
/// use kernel::uapi::{as_bytes_mut, ZdmFault};
///
/// let mut arg = ZdmFault::default();
/// // As a `UserSliceReader` would fill it.
/// as_bytes_mut(&mut arg).fill(0);
/// assert_eq!((arg.addr, arg.npages), (0, 0));
/// ```
pub(crate) trait UapiStruct: AsBytes + FromBytes + Default {}

macro_rules! uapi_struct {
    ($($t:ty: $size:expr),* $(,)?) => {$(
        // The size is the sum of the fields' sizes, so there is no padding to leak.
        const _: () = assert!(core::mem::size_of::<$t>() == $size);
        // SAFETY: All integers, no padding (asserted above), every bit pattern is valid.
        unsafe impl AsBytes for $t {}
        // SAFETY: The structure has integers only, for which every bit pattern is valid.
        unsafe impl FromBytes for $t {}
        impl UapiStruct for $t {}
    )*};
}

uapi_struct! {
    HmmCmd: 5 * 8,
    ZdmAudit: 6 * 8 + 4 * 4,
    ZdmViolation: 2 * 4 + 3 * 8 + 2 * 4 + 8 + 4 * 4,
    ZdmInject: 2 * 4 + 2 * 8,
    ZdmFault: 3 * 8 + 2 * 4,
    ZdmFaultAround: 2 * 4,
    ZdmInspect: 3 * 8 + 2 * 4,
    ZdmPage: 8 + 8 * 4,
    ZdmPin: 2 * 8 + 2 * 4,
    ZdmUnpin: 2 * 4,
    ZdmStats: (19 + 2 * 16) * 8,
}

/// The bytes of `value`, to be filled from user space.
pub(crate) fn as_bytes_mut<T: UapiStruct>(value: &mut T) -> &mut [u8] {
    // SAFETY: `T` is plain old data: any bytes make a valid value, and the lifetime is that of
    // the borrow.
    unsafe {
        core::slice::from_raw_parts_mut(
            core::ptr::from_mut(value).cast(),
            core::mem::size_of::<T>(),
        )
    }
}

/// Whether the current task has `CAP_SYS_ADMIN`.
pub(crate) fn is_admin() -> bool {
    // SAFETY: The caller runs for a task, whose credentials are looked at.
    unsafe { kernel::bindings::capable(kernel::bindings::CAP_SYS_ADMIN as ffi::c_int) }
}
