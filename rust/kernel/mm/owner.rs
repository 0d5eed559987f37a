// SPDX-License-Identifier: GPL-2.0

//! The owner of pagemaps, as core mm and HMM compare it.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Identifies the owner of pagemaps to core mm: `dev_pagemap.owner`.
///
/// The address of this object is the identity, so that no two owners that live at the same time
/// are equal and none can be made up.
///
/// # Examples
///
/// ```
/// # use crate::mm::owner::PgmapOwner;
/// let (a, b) = (PgmapOwner::new()?, PgmapOwner::new()?);
/// assert!(!core::ptr::eq(&*a, &*b));
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct PgmapOwner {
    // Not zero-sized, for the sake of a unique address.
    _address: u8,
}

impl PgmapOwner {
    /// Makes a new identity. May sleep.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self { _address: 0 }, GFP_KERNEL)?)
    }

    pub(super) fn as_ptr(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

#[kunit_tests(zdmirror_owner)]
mod tests {
    use super::*;

    #[test]
    fn no_two_owners_are_equal() -> Result {
        let (a, b) = (PgmapOwner::new()?, PgmapOwner::new()?);
        assert_ne!(a.as_ptr(), b.as_ptr());
        assert_eq!(a.as_ptr(), a.clone().as_ptr());
        Ok(())
    }
}
