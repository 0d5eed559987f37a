// SPDX-License-Identifier: GPL-2.0

//! The owner of pagemaps, as core mm and HMM compare it.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use crate::mm::module::scope::ModuleScope;
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
/// use kernel::{mm::region::owner::PgmapOwner, module::this_module};
///
/// let one = PgmapOwner::new(this_module::<LocalModule>())?;
/// let other = PgmapOwner::new(this_module::<LocalModule>())?;
/// assert!(!core::ptr::eq(&*one, &*other));
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct PgmapOwner {
    // A field of non-zero size: the address of each owner is unique.
    scope: Arc<ModuleScope>,
}

impl PgmapOwner {
    /// Makes a new identity for the driver of `module`, which stays loaded while memory of this owner is
    /// registered. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Arc<Self>> {
        Self::in_scope(ModuleScope::new(module)?)
    }

    /// Makes a new identity for a driver whose registrations are in `scope`. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn in_scope(scope: Arc<ModuleScope>) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { scope }, GFP_KERNEL)?)
    }

    /// The module of the driver.
    pub(crate) fn module(&self) -> &'static ThisModule {
        self.scope.module()
    }

    /// The registrations of the driver's module.
    pub(in crate::mm) fn scope(&self) -> &Arc<ModuleScope> {
        &self.scope
    }

    pub(in crate::mm) fn as_ptr(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

#[kunit_tests(zdmirror_owner)]
mod tests {
    use super::*;
    use crate::mm::kunit::support::this_module;

    #[test]
    fn no_two_owners_are_equal() -> Result {
        let (a, b) = (
            PgmapOwner::new(this_module())?,
            PgmapOwner::new(this_module())?,
        );
        assert_ne!(a.as_ptr(), b.as_ptr());
        assert_eq!(a.as_ptr(), a.clone().as_ptr());
        Ok(())
    }
}
