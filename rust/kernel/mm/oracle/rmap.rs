// SPDX-License-Identifier: GPL-2.0

//! Whether rmap finds every mapping of a page: a page names the place where it is mapped, and the entries that map it
//! are as many as its mapcount says.
//!
//! C header: [`include/linux/rmap.h`](srctree/include/linux/rmap.h)

use crate::bindings;
use crate::mm::{
    hmm::{
        inspect::PageFacts,
        mirror::HmmMirror,
        snapshot::Seen, //
    },
    page::view::PageView,
    user::{
        mmap_lock::MmapLock,
        range::PageRange, //
    },
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

/// Whether the folio of the page that `address` maps names another place than that: another file, another anon_vma,
/// or another index in it. rmap does not find such a mapping. May sleep.
fn is_misplaced(lock: &MmapLock<'_>, address: usize) -> bool {
    // A task that changes the page and its entry one after the other needs a moment.
    (0..PLACE_TRIES).all(|n| {
        if n > 0 {
            fsleep(Delta::from_micros(100));
        }
        // SAFETY: The mmap lock is held by the type invariants of `MmapLock`.
        unsafe { bindings::zdm_is_misplaced(lock.mm().as_raw(), address) }
    })
}

impl HmmMirror {
    /// As [`HmmMirror::inspect`], but that `f` is also told whether the page's folio names another place than that
    /// where it is mapped. May sleep.
    ///
    /// # Errors
    ///
    /// As [`HmmMirror::inspect`].
    pub(crate) fn inspect_places<T>(
        &self,
        range: PageRange,
        out: &mut [T],
        f: impl Fn(Seen, Option<PageFacts>, bool) -> T,
    ) -> Result {
        self.inspect_marked(range, out, is_misplaced, f)
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
