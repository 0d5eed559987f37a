// SPDX-License-Identifier: GPL-2.0

//! Whether rmap finds every mapping of a page: a page names the place where it is mapped, and the entries that map it
//! are as many as its mapcount says.
//!
//! C header: [`include/linux/rmap.h`](srctree/include/linux/rmap.h)

use crate::bindings;
use crate::mm::{
    hmm::mirror::HmmMirror,
    page::view::PageView,
    user::{
        mmap_lock::MmapLock,
        range::PageRange, //
    }, //
};
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Looks at a page that names another place than that where it is mapped, before that is true.
const PLACE_TRIES: usize = 10;

impl HmmMirror {
    /// Calls `f` with the number in `range` of each page whose folio names another place than that where it is
    /// mapped: another file, another anon_vma, or another index in it. rmap does not find such a mapping. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone, `EINTR` on a fatal signal.
    pub(crate) fn misplaced(&self, range: PageRange, mut f: impl FnMut(usize)) -> Result {
        let mm = self.mm().mmget_not_zero().ok_or(EINVAL)?;
        let lock = MmapLock::read(&mm)?;
        for (number, address) in range.addresses().enumerate() {
            // A task that changes the page and its entry one after the other needs a moment.
            let is_misplaced = (0..PLACE_TRIES).all(|n| {
                if n > 0 {
                    fsleep(Delta::from_micros(100));
                }
                // SAFETY: The mmap lock is held by the type invariants of `MmapLock`.
                unsafe { bindings::zdm_is_misplaced(lock.mm().as_raw(), address) }
            });
            if is_misplaced {
                f(number);
            }
        }
        Ok(())
    }
}

impl PageView<'_> {
    /// Entries of page tables that map the anonymous folio of this page where its index says that they
    /// are: what [`PageView::mapcount`] must be. `None` where another task is at work on the folio, or
    /// rmap knows it by other means. Does not sleep.
    pub(crate) fn entries(&self) -> Option<i32> {
        // SAFETY: The page is valid by the type invariants of `PageView`. The helper looks whether it is
        // mapped after it took the lock that unmapping waits for.
        let found = unsafe { bindings::zdm_count_entries(self.head().as_ptr()) };
        (found >= 0).then_some(found)
    }
}
