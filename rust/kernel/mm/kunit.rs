// SPDX-License-Identifier: GPL-2.0

//! A real address space for KUnit cases.
//!
//! C header: [`include/kunit/test.h`](srctree/include/kunit/test.h)

use crate::bindings;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// Maps `bytes` of private anonymous memory in the address space of the KUnit thread, which gets
/// one where it has none; both go away with the test. May sleep.
pub(crate) fn mmap_anon(bytes: usize) -> Result<usize> {
    // SAFETY: Called by a KUnit case, in its own thread.
    to_result(unsafe { bindings::zdm_kunit_attach_mm() })?;
    // SAFETY: The thread of the case has an address space, attached above.
    let address = unsafe { bindings::zdm_kunit_mmap_anon(bytes) };
    if address == 0 {
        Err(ENOMEM)
    } else {
        Ok(address)
    }
}

/// Unmaps `bytes` from `address` on in the address space of the KUnit thread. May sleep.
pub(crate) fn munmap(address: usize, bytes: usize) -> Result {
    // SAFETY: The address space is that of a test, whose memory nothing refers to.
    to_result(unsafe { bindings::vm_munmap(address, bytes) })
}
