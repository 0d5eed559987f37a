// SPDX-License-Identifier: GPL-2.0

//! A device's page table, kept up to date by an interval notifier.
//!
//! Entries hold no reference on their pages. What keeps them valid is the protocol of
//! `Documentation/mm/hmm.rst`: they are stored under the table's lock after the sequence was
//! checked, and removed under it before the CPU's page tables change.

use super::{
    notifier::{
        IntervalOps,
        NotifierRange, //
    },
    PAGE_SHIFT, //
};
use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    page::BorrowedPage,
    prelude::*,
    types::Opaque, //
};

/// What the device wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
}

/// What an entry allows, as its tag: those that an xarray leaves to pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grant {
    /// Loads.
    Read = 0,
    /// Loads and stores.
    Write = 1,
    /// Loads and stores, while the CPU has no access.
    Exclusive = 3,
}

impl Grant {
    const MASK: usize = 3;

    /// Of a mapping that is as the CPU's.
    pub(super) fn shared(write: bool) -> Self {
        if write {
            Self::Write
        } else {
            Self::Read
        }
    }
}

/// The device's page table: page number to struct page and permission.
///
/// # Invariants
///
/// Entries are NULL or pointers, tagged with a [`Grant`], to the pages that hold the contents of
/// mapped pages; they stay valid while the table is locked.
#[pin_data(PinnedDrop)]
pub(super) struct Table {
    #[pin]
    xa: Opaque<bindings::xarray>,
}

// SAFETY: The entries belong to no thread.
unsafe impl Send for Table {}

impl Table {
    /// An empty table.
    pub(super) fn new() -> impl PinInit<Self> {
        // INVARIANT: There are no entries.
        pin_init!(Self {
            // SAFETY: `xa` is valid for writes; an empty array needs no flags.
            xa <- Opaque::ffi_init(|xa| unsafe { bindings::xa_init_flags(xa, bindings::XA_FLAGS_ACCOUNT) }),
        })
    }

    fn entry(&self, index: usize) -> usize {
        // SAFETY: The array is initialised.
        unsafe { bindings::xa_load(self.xa.get(), index) as usize }
    }

    /// The page with the contents of page number `index`, if it may be accessed so.
    pub(super) fn load(&self, index: usize, access: Access) -> Option<BorrowedPage<'_>> {
        let entry = self.entry(index);
        // The tags that allow stores share a bit.
        if access == Access::Write && entry & Grant::Write as usize == 0 {
            return None;
        }
        let page = NonNull::new((entry & !Grant::MASK) as *mut bindings::page)?;
        // SAFETY: Entries are valid while the table is locked by the type invariants. The page
        // borrows the table, and users have a table through its lock only.
        Some(unsafe { BorrowedPage::from_raw(page) })
    }

    /// Whether the device has exclusive access to page number `index`.
    pub(super) fn is_exclusive(&self, index: usize) -> bool {
        self.entry(index) & Grant::MASK == Grant::Exclusive as usize
    }

    /// Stores `page`, without waiting for memory. An exclusive entry for it is left as it is.
    ///
    /// # Safety
    ///
    /// `page` must hold the contents of the page that page number `index` maps, with at least
    /// this permission, until [`IntervalOps::invalidate`] is called for it: the sequence must
    /// have been checked since the table was locked.
    pub(super) unsafe fn store(
        &self,
        index: usize,
        page: NonNull<bindings::page>,
        grant: Grant,
    ) -> Result {
        let pointer = page.as_ptr() as usize;
        let old = self.store_raw(index, pointer | grant as usize)?;
        let exclusive = pointer | Grant::Exclusive as usize;
        if old == exclusive && grant != Grant::Exclusive {
            // Who stores this looked at the page before the device was granted it exclusively,
            // which takes no right away.
            self.store_raw(index, exclusive)?;
        }
        Ok(())
    }

    /// Stores an entry and returns the one that was there.
    fn store_raw(&self, index: usize, entry: usize) -> Result<usize> {
        // Reclaim would call `invalidate()`, whose lock is held: GFP_ATOMIC does not enter it.
        // SAFETY: The array is initialised, the entry is a tagged, aligned pointer.
        let old = unsafe {
            bindings::xa_store(self.xa.get(), index, entry as *mut _, bindings::GFP_ATOMIC)
        };
        // SAFETY: What `xa_store()` returns is what `xa_err()` takes.
        to_result(unsafe { bindings::xa_err(old) })?;
        Ok(old as usize)
    }

    /// Forgets all pages from `first` to `last`, at a cost that follows how many there are.
    fn erase(&self, first: usize, last: usize) {
        // SAFETY: The array is initialised; entries own nothing.
        unsafe { bindings::zdm_xa_erase_range(self.xa.get(), first, last) };
    }
}

#[pinned_drop]
impl PinnedDrop for Table {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The array is initialised; entries own nothing.
        unsafe { bindings::xa_destroy(self.xa.get()) };
    }
}

impl IntervalOps for Table {
    /// Forgets the range.
    ///
    /// Migrations of our own are no exception, unlike with `lib/test_hmm.c`. Where a page moves,
    /// its entry points at what is about to be freed. And those who walk the page tables at the
    /// same time, which the callback also is for, must try again. What does not move is looked up
    /// again when it is wanted.
    fn invalidate(&self, range: &NotifierRange<'_>) {
        self.erase(range.start() >> PAGE_SHIFT, (range.end() - 1) >> PAGE_SHIFT);
    }
}

#[kunit_tests(zdmirror_table)]
mod tests {
    use super::*;
    use kernel::page::Page;

    fn store(table: &Table, index: usize, page: &Page, grant: Grant) -> Result {
        let page = NonNull::new(page.as_ptr()).ok_or(EINVAL)?;
        // SAFETY: Nothing is read through the entries of these cases.
        unsafe { table.store(index, page, grant) }
    }

    fn page_at(table: &Table, index: usize, access: Access) -> *mut bindings::page {
        table
            .load(index, access)
            .map_or(core::ptr::null_mut(), |page| page.as_ptr())
    }

    #[test]
    fn entries_grant_what_was_stored() -> Result {
        let page = Page::alloc_page(GFP_KERNEL)?;
        let table = KBox::pin_init(Table::new(), GFP_KERNEL)?;
        let none = core::ptr::null_mut();
        let cases = [
            (Grant::Read, page.as_ptr(), none, false),
            (Grant::Write, page.as_ptr(), page.as_ptr(), false),
            (Grant::Exclusive, page.as_ptr(), page.as_ptr(), true),
        ];
        for (i, (grant, read, write, exclusive)) in cases.into_iter().enumerate() {
            assert_eq!(page_at(&table, i, Access::Read), none);
            store(&table, i, &page, grant)?;
            assert_eq!(page_at(&table, i, Access::Read), read);
            assert_eq!(page_at(&table, i, Access::Write), write);
            assert_eq!(table.is_exclusive(i), exclusive);
        }
        Ok(())
    }

    #[test]
    fn exclusive_entry_stays_for_its_page_only() -> Result {
        let page = Page::alloc_page(GFP_KERNEL)?;
        let other = Page::alloc_page(GFP_KERNEL)?;
        let table = KBox::pin_init(Table::new(), GFP_KERNEL)?;
        store(&table, 7, &page, Grant::Exclusive)?;
        store(&table, 7, &page, Grant::Read)?;
        assert!(table.is_exclusive(7));
        store(&table, 7, &other, Grant::Read)?;
        assert!(!table.is_exclusive(7));
        assert_eq!(page_at(&table, 7, Access::Read), other.as_ptr());
        assert!(table.load(7, Access::Write).is_none());
        Ok(())
    }

    #[test]
    fn erase_takes_both_ends() -> Result {
        let page = Page::alloc_page(GFP_KERNEL)?;
        let table = KBox::pin_init(Table::new(), GFP_KERNEL)?;
        let indices = [0, 1, 62, 63, 64, 4096, usize::MAX];
        for (first, last, left) in [
            (1, 62, 5),
            (64, 64, 6),
            (2, 61, 7),
            (63, usize::MAX, 3),
            (usize::MAX, usize::MAX, 6),
            (0, usize::MAX, 0),
        ] {
            for index in indices {
                store(&table, index, &page, Grant::Write)?;
            }
            table.erase(first, last);
            let found = indices
                .iter()
                .filter(|&&index| table.load(index, Access::Read).is_some());
            assert_eq!(found.count(), left);
            for index in indices {
                let gone = table.load(index, Access::Read).is_none();
                assert_eq!(gone, (first..=last).contains(&index));
            }
        }
        Ok(())
    }
}
