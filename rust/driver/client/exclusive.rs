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

/// How often exclusive access is taken, as a page may be taken back before it is read.
const TRIES: usize = 10;

impl Client {
    /// Takes exclusive access, and reads the pages. Core mm may take a page back in between, as khugepaged does
    /// when it looks at an area of huge pages; then the device takes it once more.
    pub(in crate::driver) fn exclusive(&self, range: PageRange, ptr: UserPtr) -> Result<Outcome> {
        let mut more = 1..TRIES;
        loop {
            let pages = self.mirror().make_exclusive(range)?;
            self.device().core.stats.exclusive.add(pages);
            match self.read(range, ptr, Faulting::Never) {
                Err(err) if err == ENOENT && more.next().is_some() => {}
                other => return other,
            }
        }
    }

    /// Fails with `EPERM` while the device has exclusive access to any page of `range`.
    pub(in crate::driver) fn check_exclusive(&self, range: PageRange) -> Result<Outcome> {
        if self.mirror().has_exclusive(range)? {
            return Err(EPERM);
        }
        Ok(Outcome::default())
    }
}
