// SPDX-License-Identifier: GPL-2.0

//! Exclusive access of the device to pages: the CPU cannot access them without a fault, which ends
//! it.

#![forbid(unsafe_code)]

use super::{
    open_file::Client,
    rw::{
        Faulting,
        Outcome, //
    },
};
use crate::mm::user::range::PageRange;
use kernel::{
    prelude::*,
    uaccess::UserPtr, //
};

impl Client {
    /// Takes exclusive access, and reads the pages.
    pub(in crate::driver) fn exclusive(&self, range: PageRange, ptr: UserPtr) -> Result<Outcome> {
        let pages = self.mirror().make_exclusive(range)?;
        self.device().core.stats.exclusive.add(pages);
        self.read(range, ptr, Faulting::Never)
    }

    /// Fails with `EPERM` while the device has exclusive access to any page of `range`.
    pub(in crate::driver) fn check_exclusive(&self, range: PageRange) -> Result<Outcome> {
        if self.mirror().has_exclusive(range)? {
            return Err(EPERM);
        }
        Ok(Outcome::default())
    }
}
