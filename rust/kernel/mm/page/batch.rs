// SPDX-License-Identifier: GPL-2.0

//! Pages of system memory that are allocated together.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h), `alloc_pages_bulk()`

use crate::bindings;
use core::ptr::NonNull;
use kernel::mm::virt::VmaRef;

/// Pages that are allocated at a time, at most.
const BATCH: usize = 64;

/// Pages of system memory that no other value refers to. Dropping the batch frees the pages that are left.
///
/// # Invariants
///
/// The entries from `next` to `end` are pages of order 0, and `self` owns the only reference of each.
pub(super) struct PageBatch {
    pages: [*mut bindings::page; BATCH],
    next: usize,
    end: usize,
}

impl PageBatch {
    /// No pages.
    pub(super) const fn new() -> Self {
        // INVARIANT: There are none.
        Self {
            pages: [core::ptr::null_mut(); BATCH],
            next: 0,
            end: 0,
        }
    }

    /// Whether no page is left.
    pub(super) fn is_empty(&self) -> bool {
        self.next == self.end
    }

    /// Allocates up to `wanted` pages with `gfp`, if none is left. Does nothing where the current task, or
    /// `vma`, has a memory policy, because pages that are allocated together follow none. There may be fewer
    /// pages afterwards, or none. May sleep.
    pub(super) fn refill(&mut self, wanted: usize, gfp: bindings::gfp_t, vma: Option<&VmaRef>) {
        let vma = vma.map_or(core::ptr::null_mut(), VmaRef::as_ptr);
        // SAFETY: `vma` is NULL, or valid and locked while it is borrowed.
        if !self.is_empty() || wanted < 2 || unsafe { bindings::zdm_has_mempolicy(vma) } {
            return;
        }
        let wanted = wanted.min(BATCH);
        self.pages[..wanted].fill(core::ptr::null_mut());
        // CAST: At most `BATCH`.
        // SAFETY: The array has room for `wanted` pages, and is clear so far. The caller may sleep.
        let n =
            unsafe { bindings::zdm_alloc_pages_bulk(gfp, wanted as i32, self.pages.as_mut_ptr()) };
        // INVARIANT: The function has put so many new pages there, from the first entry on.
        (self.next, self.end) = (0, n.min(wanted));
    }

    /// Takes a page, and gives its only reference away.
    pub(super) fn pop(&mut self) -> Option<NonNull<bindings::page>> {
        if self.is_empty() {
            return None;
        }
        let page = self.pages[self.next];
        // INVARIANT: The page is the caller's from here on.
        self.next += 1;
        NonNull::new(page)
    }
}

impl Drop for PageBatch {
    fn drop(&mut self) {
        while let Some(page) = self.pop() {
            // SAFETY: `pop()` gave its only reference away.
            unsafe { bindings::__free_pages(page.as_ptr(), 0) };
        }
    }
}
