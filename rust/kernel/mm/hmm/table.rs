// SPDX-License-Identifier: GPL-2.0

//! A device's page table, kept up to date by an interval notifier.
//!
//! Entries hold no reference on their pages. The protocol of `Documentation/mm/hmm.rst` keeps them
//! valid: they are stored under the table's lock after the sequence was checked, and removed under
//! the lock before the CPU's page tables change.

use super::access::{
    Access,
    Grant, //
};
use crate::{
    bindings,
    mm::{
        user::{
            notifier::{
                IntervalOps,
                NotifierRange, //
            },
            watches::Watches, //
        },
        PMD_ORDER, //
    },
};
use core::{
    cell::Cell,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    page::BorrowedPage,
    prelude::*,
    types::Opaque, //
};

/// Page numbers of a block: what one PMD maps.
pub(super) const BLOCK: usize = 1 << PMD_ORDER;

/// The entries of a block: NULL or pointers, tagged with a [`Grant`].
type Leaf = [usize; BLOCK];

/// Marks a pointer to the first page of a block that one entry maps as a whole. The two lower bits belong to
/// `xarray`.
const WHOLE: usize = 4;
/// Marks such a block that may be stored to. The device has exclusive access to single pages only.
const WHOLE_WRITE: usize = 8;

// Pointers to pages, and to leaves, which are larger, have none of these bits.
const _: () = assert!(core::mem::size_of::<bindings::page>() % (2 * WHOLE_WRITE) == 0);
const _: () = assert!(core::mem::align_of::<bindings::page>() > Grant::MASK);

/// A block of page numbers.
#[derive(Clone, Copy)]
enum Block {
    /// Nothing is mapped.
    Absent,
    /// Some pages are mapped, each by an entry of its own.
    Leaf(NonNull<Leaf>),
    /// All pages are mapped, with one grant, in a row from this one on.
    Whole(*mut bindings::page, usize),
}

impl Block {
    fn of_raw(raw: usize) -> Self {
        if raw & WHOLE != 0 {
            let first = raw & !(WHOLE | WHOLE_WRITE);
            let grant = Grant::shared(raw & WHOLE_WRITE != 0);
            return Self::Whole(first as *mut bindings::page, grant as usize);
        }
        NonNull::new(raw as *mut Leaf).map_or(Self::Absent, Self::Leaf)
    }
}

/// Leaves that are found without the array.
const RECENT: usize = 16;

/// The number of a block, and its leaf.
type Recent = (usize, NonNull<Leaf>);

/// The device's page table: page number to struct page and permission.
///
/// It has a leaf for each block of page numbers, so that storing and forgetting a page is a store to
/// memory, and one entry for a block that a large folio maps.
///
/// # Invariants
///
/// - The lock of a notifier is held while there is a reference to the table, or no other task knows the table.
/// - `xa` is initialised, and holds, for the number of a block, NULL, a pointer to a leaf that the table owns, or a pointer to
///   the first page of a block that is mapped as a whole, tagged with [`WHOLE`] and [`WHOLE_WRITE`].
/// - Entries point to the pages that hold the contents of mapped pages; they stay valid while the table is
///   locked.
/// - `recent` holds numbers of blocks and their leaves, as `xa` has them, each at its number's place.
#[pin_data(PinnedDrop)]
pub(in crate::mm) struct Table {
    #[pin]
    xa: Opaque<bindings::xarray>,
    recent: [Cell<Option<Recent>>; RECENT],
    /// Migrations that look out for changes by others.
    pub(in crate::mm) watches: Watches,
}

// SAFETY: The entries belong to no thread, and tasks are only compared.
unsafe impl Send for Table {}

impl Table {
    /// An empty table.
    pub(super) fn new() -> impl PinInit<Self> {
        // INVARIANT: There are no entries.
        pin_init!(Self {
            xa <- Opaque::ffi_init(|xa| {
                // SAFETY: `xa` is valid for writes; an empty array needs no flags.
                unsafe { bindings::xa_init_flags(xa, bindings::XA_FLAGS_ACCOUNT) }
            }),
            recent: [const { Cell::new(None) }; RECENT],
            watches: Watches::new(),
        })
    }

    fn block(&self, number: usize) -> Block {
        if let Some(leaf) = self.recent_leaf(number) {
            return Block::Leaf(leaf);
        }
        // SAFETY: The array is initialised by the type invariants of `Table`.
        let block = Block::of_raw(unsafe { bindings::xa_load(self.xa.get(), number) } as usize);
        if let Block::Leaf(leaf) = block {
            self.remember(number, leaf);
        }
        block
    }

    /// Remembers that `leaf` is what the array has for block `number`.
    fn remember(&self, number: usize, leaf: NonNull<Leaf>) {
        self.recent[number % RECENT].set(Some((number, leaf)));
    }

    /// The leaf of block `number`, if it is one of those that were used last.
    fn recent_leaf(&self, number: usize) -> Option<NonNull<Leaf>> {
        let (recent, leaf) = self.recent[number % RECENT].get()?;
        (recent == number).then_some(leaf)
    }

    fn entry(&self, index: usize) -> usize {
        let n = index % BLOCK;
        match self.block(index >> PMD_ORDER) {
            Block::Absent => 0,
            Block::Whole(first, grant) => first.wrapping_add(n) as usize | grant,
            // SAFETY: The leaf is the table's, which only this task uses, by the type invariants of `Table`.
            Block::Leaf(leaf) => unsafe { (*leaf.as_ptr())[n] },
        }
    }

    /// The page with the contents of page number `index`, if it may be accessed so.
    pub(in crate::mm) fn load(&self, index: usize, access: Access) -> Option<BorrowedPage<'_>> {
        let entry = self.entry(index);
        // The tags that allow stores share a bit.
        if access == Access::Write && entry & Grant::Write as usize == 0 {
            return None;
        }
        let page = NonNull::new((entry & !Grant::MASK) as *mut bindings::page)?;
        // SAFETY: Entries are valid while the table is locked by the type invariants of `Table`. The page
        // borrows the table, and users have a table through its lock only.
        Some(unsafe { BorrowedPage::from_raw(page) })
    }

    /// Whether the device has exclusive access to page number `index`.
    pub(super) fn is_exclusive(&self, index: usize) -> bool {
        self.entry(index) & Grant::MASK == Grant::Exclusive as usize
    }

    /// The first entry for page number `from` or a later one: page number, page, and what it grants.
    pub(in crate::mm) fn next(&self, from: usize) -> Option<(usize, *mut bindings::page, Grant)> {
        let (last, any) = (usize::MAX, bindings::XA_PRESENT);
        let mut number = from >> PMD_ORDER;
        loop {
            // SAFETY: The array is initialised by the type invariants of `Table`, and `number` is ours to write.
            let raw = unsafe { bindings::xa_find(self.xa.get(), &mut number, last, any) };
            if raw.is_null() {
                return None;
            }
            let start = number << PMD_ORDER;
            let first = from.max(start) - start;
            let found = match Block::of_raw(raw as usize) {
                Block::Absent => None,
                Block::Whole(page, grant) => {
                    Some((first, page.wrapping_add(first) as usize | grant))
                }
                Block::Leaf(leaf) => {
                    // SAFETY: The leaf is the table's, which only this task uses, by the type invariants of `Table`.
                    let leaf = unsafe { leaf.as_ref() };
                    let n = (first..BLOCK).find(|&n| leaf[n] != 0);
                    n.map(|n| (n, leaf[n]))
                }
            };
            if let Some((n, entry)) = found {
                let page = (entry & !Grant::MASK) as *mut bindings::page;
                return Some((start + n, page, Grant::of(entry)));
            }
            // Numbers of blocks are far from the largest number.
            number += 1;
        }
    }

    /// Stores `page`, without waiting for memory. An exclusive entry for it is left as it is.
    ///
    /// # Safety
    ///
    /// `page` must hold the contents of the page that page number `index` maps, with at least
    /// this permission, until [`IntervalOps::invalidate`] is called for it: the sequence must
    /// have been checked since the table was locked.
    #[inline]
    pub(in crate::mm) unsafe fn store(
        &self,
        index: usize,
        page: NonNull<bindings::page>,
        grant: Grant,
    ) -> Result {
        let mut leaf = self.leaf(index >> PMD_ORDER)?;
        // SAFETY: The leaf is the table's, which only this task uses, by the type invariants of `Table`.
        set_entry(&mut unsafe { leaf.as_mut() }[index % BLOCK], page, grant);
        Ok(())
    }

    /// Stores all pages of the block that begins with page number `index`, of which `page` is the first,
    /// as [`Table::store`], with a grant that is not exclusive.
    ///
    /// # Safety
    ///
    /// As that of [`Table::store`], for each of the [`BLOCK`] pages in a row.
    pub(super) unsafe fn store_block(
        &self,
        index: usize,
        page: NonNull<bindings::page>,
        write: bool,
    ) -> Result {
        let grant = Grant::shared(write);
        let number = index >> PMD_ORDER;
        if let Block::Leaf(mut leaf) = self.block(number) {
            // SAFETY: The leaf is the table's, which only this task uses, by the type invariants of `Table`.
            for (n, entry) in unsafe { leaf.as_mut() }.iter_mut().enumerate() {
                if let Some(page) = NonNull::new(page.as_ptr().wrapping_add(n)) {
                    set_entry(entry, page, grant);
                }
            }
            return Ok(());
        }
        let write = if write { WHOLE_WRITE } else { 0 };
        let entry = page.as_ptr() as usize | WHOLE | write;
        // INVARIANT: The block is mapped as a whole, by the contract of this function.
        self.store_raw(number, entry)
    }

    /// The leaf of block `number`. A block that one entry stands for gets one.
    #[inline]
    fn leaf(&self, number: usize) -> Result<NonNull<Leaf>> {
        (self.recent_leaf(number)).map_or_else(|| self.other_leaf(number), Ok)
    }

    fn other_leaf(&self, number: usize) -> Result<NonNull<Leaf>> {
        let (first, grant) = match self.block(number) {
            Block::Leaf(leaf) => return Ok(leaf),
            Block::Absent => (core::ptr::null_mut(), 0),
            Block::Whole(first, grant) => (first, grant),
        };
        // Reclaim would call `invalidate()`, whose lock is held: GFP_ATOMIC does not enter it.
        let flags = GFP_ATOMIC | (GFP_KERNEL_ACCOUNT & !GFP_KERNEL);
        let mut leaf = KBox::<Leaf>::init(pin_init::init_zeroed(), flags)?;
        if !first.is_null() {
            for (n, entry) in leaf.iter_mut().enumerate() {
                *entry = first.wrapping_add(n) as usize | grant;
            }
        }
        let leaf = KBox::into_raw(leaf);
        if let Err(err) = self.store_raw(number, leaf as usize) {
            // SAFETY: The leaf is a `KBox` that no other value refers to.
            drop(unsafe { KBox::from_raw(leaf) });
            return Err(err);
        }
        // INVARIANT: The table owns the leaf from here on.
        NonNull::new(leaf).ok_or(ENOMEM)
    }

    /// Stores the array's entry for block `number`, in which there is no leaf.
    fn store_raw(&self, number: usize, raw: usize) -> Result {
        // SAFETY: The array is initialised, and the entry is an aligned pointer, whose lowest two bits are
        // not set.
        let old = unsafe {
            bindings::xa_store(self.xa.get(), number, raw as *mut _, bindings::GFP_ATOMIC)
        };
        // SAFETY: `xa_err()` takes the result of `xa_store()`.
        to_result(unsafe { bindings::xa_err(old) })
    }

    /// Forgets all pages from `first` to `last`, at a cost that follows how many blocks there are. A block
    /// that one entry stands for is forgotten as a whole: a leaf for the rest would have to be allocated.
    #[inline]
    fn erase(&self, first: usize, last: usize) {
        let number = first >> PMD_ORDER;
        // A fault invalidates a few pages of a block that was used before.
        let recent = self
            .recent_leaf(number)
            .filter(|_| number == last >> PMD_ORDER && last - first < BLOCK - 1);
        if let Some(mut leaf) = recent {
            // SAFETY: The leaf is the table's, which only this task uses, by the type invariants of `Table`.
            let leaf = unsafe { leaf.as_mut() };
            leaf[first % BLOCK..=last % BLOCK].fill(0);
        } else {
            self.erase_blocks(first, last);
        }
    }

    fn erase_blocks(&self, first: usize, last: usize) {
        let end = last >> PMD_ORDER;
        let mut number = first >> PMD_ORDER;
        loop {
            // SAFETY: The array is initialised by the type invariants of `Table`, and `number` is ours to write.
            let raw =
                unsafe { bindings::xa_find(self.xa.get(), &mut number, end, bindings::XA_PRESENT) };
            if raw.is_null() {
                return;
            }
            let start = number << PMD_ORDER;
            let from = first.max(start) - start;
            let to = (last - start).min(BLOCK - 1);
            match Block::of_raw(raw as usize) {
                Block::Leaf(mut leaf) if (from, to) != (0, BLOCK - 1) => {
                    self.remember(number, leaf);
                    // SAFETY: The leaf is the table's, which only this task uses, by the type invariants of `Table`.
                    let leaf = unsafe { leaf.as_mut() };
                    leaf[from..=to].fill(0);
                }
                block => self.remove(number, block),
            }
            if number >= end {
                return;
            }
            number += 1;
        }
    }

    /// Removes what there is for block `number`, which is `block`.
    fn remove(&self, number: usize, block: Block) {
        // INVARIANT: The leaf may be gone.
        self.recent[number % RECENT].set(None);
        // SAFETY: The array is initialised by the type invariants of `Table`.
        unsafe { bindings::xa_erase(self.xa.get(), number) };
        if let Block::Leaf(leaf) = block {
            // INVARIANT: The array has forgotten the leaf, which was the table's.
            // SAFETY: `leaf()` made it of a `KBox`.
            drop(unsafe { KBox::from_raw(leaf.as_ptr()) });
        }
    }

    /// Frees the leaf of block `number` if no page of the block is mapped. Without this, areas that come
    /// and go would leave a leaf wherever they have been, while the CPU's page tables are freed.
    fn trim(&self, number: usize) {
        let block = self.block(number);
        if let Block::Leaf(leaf) = block {
            // SAFETY: The leaf is the table's, which only this task uses, by the type invariants of `Table`.
            if unsafe { leaf.as_ref() }.iter().all(|&entry| entry == 0) {
                self.remove(number, block);
            }
        }
    }
}

/// Stores an entry for `page`. An exclusive entry for the page stays: the caller looked at the page
/// before the device was granted exclusive access, which takes no right away.
fn set_entry(entry: &mut usize, page: NonNull<bindings::page>, grant: Grant) {
    let pointer = page.as_ptr() as usize;
    if *entry != pointer | Grant::Exclusive as usize {
        *entry = pointer | grant as usize;
    }
}

#[pinned_drop]
impl PinnedDrop for Table {
    fn drop(self: Pin<&mut Self>) {
        self.erase(0, usize::MAX);
        // SAFETY: The array is initialised, and empty.
        unsafe { bindings::xa_destroy(self.xa.get()) };
    }
}

impl IntervalOps for Table {
    /// Forgets the range.
    ///
    /// This includes our own migrations, unlike with `lib/test_hmm.c`. When a page moves, its entry
    /// points to a page that is about to be freed. Besides, tasks that walk the page tables at the
    /// same time must try again, which the callback also causes. A page that does not move is
    /// looked up again when the device accesses it.
    fn invalidate(&self, range: &NotifierRange<'_>) {
        let span = range.span();
        self.watches.disturb(&span, range.is_migration());
        self.erase(span.first, span.last);
        if range.is_unmap() {
            // Those in between are gone already.
            for number in [span.first >> PMD_ORDER, span.last >> PMD_ORDER] {
                self.trim(number);
            }
        }
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
    fn entries_come_in_order() -> Result {
        let page = Page::alloc_page(GFP_KERNEL)?;
        let table = KBox::pin_init(Table::new(), GFP_KERNEL)?;
        assert!(table.next(0).is_none());
        for (index, grant) in [
            (5, Grant::Read),
            (64, Grant::Write),
            (usize::MAX, Grant::Exclusive),
        ] {
            store(&table, index, &page, grant)?;
        }
        for (from, index, grant) in [
            (0, 5, Grant::Read),
            (5, 5, Grant::Read),
            (6, 64, Grant::Write),
            (65, usize::MAX, Grant::Exclusive),
        ] {
            assert_eq!(table.next(from), Some((index, page.as_ptr(), grant)));
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
        let indices = [0, 1, 62, 63, 64, 511, 512, 1023, 4096, usize::MAX];
        for (first, last, left) in [
            (1, 62, 8),
            (64, 64, 9),
            (2, 61, 10),
            (63, usize::MAX, 3),
            (511, 512, 8),
            (512, 1023, 8),
            (0, 511, 4),
            (0, 512, 3),
            (usize::MAX, usize::MAX, 9),
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

    #[test]
    fn leaf_without_pages_is_freed() -> Result {
        let page = Page::alloc_page(GFP_KERNEL)?;
        let table = KBox::pin_init(Table::new(), GFP_KERNEL)?;
        let has_leaf = || matches!(table.block(2), Block::Leaf(_));
        let index = 2 * BLOCK;
        for n in [0, BLOCK - 1] {
            store(&table, index + n, &page, Grant::Write)?;
        }
        for (first, last, leaf) in [(1, 1, true), (0, BLOCK - 2, true), (7, BLOCK - 1, false)] {
            table.erase(index + first, index + last);
            table.trim(2);
            assert_eq!(has_leaf(), leaf);
        }
        // There is nothing left to be freed.
        table.trim(2);
        store(&table, index, &page, Grant::Read)?;
        assert_eq!(page_at(&table, index, Access::Read), page.as_ptr());
        Ok(())
    }

    #[test]
    fn block_is_one_entry_until_a_page_differs() -> Result {
        let page = Page::alloc_page(GFP_KERNEL)?;
        let first = NonNull::new(page.as_ptr()).ok_or(EINVAL)?;
        let table = KBox::pin_init(Table::new(), GFP_KERNEL)?;
        let whole = |table: &Table| matches!(table.block(3), Block::Whole(..));
        let at = |n: usize| first.as_ptr().wrapping_add(n);
        let index = 3 * BLOCK;
        // SAFETY: Nothing is read through the entries of these cases.
        unsafe { table.store_block(index, first, true) }?;
        assert!(whole(&table));
        for n in [0, 1, BLOCK - 1] {
            assert_eq!(page_at(&table, index + n, Access::Write), at(n));
        }
        assert!(table.load(index - 1, Access::Read).is_none());
        assert!(table.load(index + BLOCK, Access::Read).is_none());
        // One page loses a right, the others keep theirs.
        store(&table, index + 7, &page, Grant::Read)?;
        assert!(!whole(&table));
        assert_eq!(page_at(&table, index + 7, Access::Read), first.as_ptr());
        assert!(table.load(index + 7, Access::Write).is_none());
        assert_eq!(page_at(&table, index + 8, Access::Write), at(8));
        // An exclusive entry for the same page stays.
        store(&table, index, &page, Grant::Exclusive)?;
        // SAFETY: Nothing is read through the entries of these cases.
        unsafe { table.store_block(index, first, false) }?;
        assert!(table.is_exclusive(index) && !table.is_exclusive(index + 1));
        assert!(table.load(index + 1, Access::Write).is_none());
        // A block with one entry is erased as a whole, even where the range covers a part of it.
        table.erase(index + 1, index + BLOCK - 1);
        assert!(table.is_exclusive(index));
        table.erase(index, index);
        // SAFETY: Nothing is read through the entries of these cases.
        unsafe { table.store_block(index + BLOCK, first, false) }?;
        table.erase(index + BLOCK + 5, index + BLOCK + 5);
        assert!(table.load(index + BLOCK, Access::Read).is_none());
        Ok(())
    }
}
