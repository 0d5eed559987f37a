// SPDX-License-Identifier: GPL-2.0

//! Room for the arguments of a migration, and for the entries of its pages.

use super::mappings::Mappings;
use crate::{
    bindings,
    mm::{
        sync::task::NoFaults,
        PAGE_SIZE,
        PMD_ORDER, //
    },
};
use core::mem::MaybeUninit;
use kernel::prelude::*;

/// Most pages that one migration takes: one page of page table entries maps so many, and the largest folio has
/// so many.
pub(crate) const MAX_PAGES: usize = 1 << PMD_ORDER;

/// Length in bytes of `pages` pages, or of as many as the largest number can tell.
pub(crate) const fn bytes(pages: usize) -> usize {
    pages.saturating_mul(PAGE_SIZE)
}

/// Source and destination entries for migrations of up to [`MAX_PAGES`] pages, to be reused.
///
/// Dropping a buffer, or using it again, ends a migration that was forgotten ([`core::mem::forget`]), and may
/// sleep then: the pages go back to where they were, unless core mm has moved them already. Destinations that
/// core mm was not told of stay locked and in use, as a copy to them may be under way.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::pfn_buffer::{PfnBuffer, MAX_PAGES};
///
/// // For the page of a CPU fault, which needs no memory.
/// assert_eq!(PfnBuffer::new(1)?.capacity(), 1);
/// // For ranges of any length, in parts.
/// assert_eq!(PfnBuffer::new(usize::MAX)?.capacity(), MAX_PAGES);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct PfnBuffer {
    head: Head,
    entries: Entries,
}

/// What a migration has in its buffer besides the entries.
///
/// # Invariants
///
/// Unless `progress` is [`Progress::None`], core mm has set up the migration that `args` and the entries describe,
/// and has not finalized it. `args.npages` is the number of its entries.
pub(super) struct Head {
    /// The arguments of core mm. They stay in one place while the migration goes through its stages, because
    /// moving so many words would take time.
    pub(super) args: MaybeUninit<bindings::migrate_vma>,
    pub(super) progress: Progress,
    /// The task has locked the pages, until the migration is finalized. The handler of a fault has faults
    /// disabled by other means.
    pub(super) no_faults: Option<NoFaults>,
    /// The other ends of copies that were begun and not waited for.
    pub(super) mappings: Mappings,
}

/// How far the migration is that has a buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// There is none.
    None,
    /// Core mm has set it up.
    SetUp,
    /// Core mm was told to move the pages.
    Moved,
}

/// The first half is for the source.
enum Entries {
    /// For one page, as most faults need. It takes no allocation.
    One([usize; 2]),
    Many(KVVec<usize>),
}

impl PfnBuffer {
    /// Room for `pages` pages, at most [`MAX_PAGES`]. May sleep, to allocate room for more than one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, but not for a single page.
    #[inline]
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let entries = match pages.min(MAX_PAGES) {
            0 | 1 => Entries::One([0; 2]),
            pages => Entries::Many(KVVec::from_elem(0, 2 * pages, GFP_KERNEL)?),
        };
        // INVARIANT: There is no migration.
        Ok(Self {
            head: Head {
                args: MaybeUninit::uninit(),
                progress: Progress::None,
                no_faults: None,
                mappings: Mappings::new(),
            },
            entries,
        })
    }

    /// Pages that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.entries.as_slice().len() / 2
    }

    /// The head, and all entries: the first half is for the source. A migration that has the buffer, and was
    /// forgotten, is ended.
    #[inline]
    pub(super) fn parts(&mut self) -> (&mut Head, &mut [usize]) {
        self.end_forgotten();
        (&mut self.head, self.entries.as_mut_slice())
    }

    /// Ends a migration that was forgotten, if there is one.
    #[inline]
    pub(super) fn end_forgotten(&mut self) {
        if self.head.progress != Progress::None {
            self.end_migration();
        }
    }

    #[cold]
    fn end_migration(&mut self) {
        let (head, entries) = (&mut self.head, self.entries.as_mut_slice());
        // SAFETY: There is a migration, so that core mm has set up `args`, by the type invariants of `Head`.
        let args = unsafe { head.args.assume_init_mut() };
        let (src, dst) = entries.split_at_mut(entries.len() / 2);
        if head.progress == Progress::SetUp {
            // Core mm takes a source with a destination for one that has moved.
            dst.fill(0);
        }
        // The buffer may have been moved meanwhile, with the entries in it.
        (args.src, args.dst) = (src.as_mut_ptr(), dst.as_mut_ptr());
        // The devices may be gone, with which the pages were mapped.
        head.mappings.forget();
        // SAFETY: There is a migration, and the entries are valid. Destinations that core mm was not told of were
        // cleared above. The callee looks at the folios only, so that it needs no lock of the area.
        unsafe { head.end() };
    }
}

impl Drop for PfnBuffer {
    #[inline]
    fn drop(&mut self) {
        self.end_forgotten();
    }
}

impl Head {
    /// Core mm has set up a migration. Disables page faults, unless the handler of a fault has.
    ///
    /// # Safety
    ///
    /// `args` and the entries must be those of the migration, and `args.npages` the number of its entries.
    #[inline]
    pub(super) unsafe fn begin(&mut self, is_fault: bool) {
        // INVARIANT: The contract of this function says the same.
        self.progress = Progress::SetUp;
        self.no_faults = (!is_fault).then(NoFaults::new);
    }

    /// Wraps `migrate_vma_finalize()` and `migrate_device_finalize()`. May sleep.
    ///
    /// # Safety
    ///
    /// There must be a migration. Its destinations must be those that core mm was told of, and its entries valid.
    pub(super) unsafe fn end(&mut self) {
        // SAFETY: There is a migration by the contract of this function, for which core mm has set up `args`.
        let args = unsafe { self.args.assume_init_mut() };
        if args.vma.is_null() {
            // SAFETY: Core mm has set up the entries by `migrate_device_pfns()`, and not finalized them, by the
            // type invariants of `Head`.
            unsafe { bindings::migrate_device_finalize(args.src, args.dst, args.npages) };
        } else {
            // SAFETY: Core mm has set up `args` by `migrate_vma_setup()`, and not finalized it, by the type
            // invariants of `Head`.
            unsafe { bindings::migrate_vma_finalize(args) };
        }
        // INVARIANT: Finalized above.
        self.progress = Progress::None;
        self.no_faults = None;
    }
}

impl Entries {
    fn as_slice(&self) -> &[usize] {
        match self {
            Self::One(entries) => entries,
            Self::Many(entries) => entries,
        }
    }

    fn as_mut_slice(&mut self) -> &mut [usize] {
        match self {
            Self::One(entries) => entries,
            Self::Many(entries) => entries,
        }
    }
}

/// Source entries, and destination entries of which the first `len` are cleared.
#[inline]
pub(super) fn halves(entries: &mut [usize], len: usize) -> (&mut [usize], &mut [usize]) {
    let (src, dst) = entries.split_at_mut(entries.len() / 2);
    match &mut dst[..len] {
        // Most faults need one entry, for which this is faster than a call.
        [entry] => *entry = 0,
        entries => entries.fill(0),
    }
    (src, dst)
}

#[kunit_tests(zdmirror_pfn_buffer)]
mod tests {
    use super::*;

    #[test]
    fn room_for_one_page_and_many() -> Result {
        for (pages, room) in [
            (0, 1),
            (1, 1),
            (2, 2),
            (MAX_PAGES, MAX_PAGES),
            (MAX_PAGES + 1, MAX_PAGES),
        ] {
            let mut buffer = PfnBuffer::new(pages)?;
            assert_eq!(buffer.capacity(), room);
            let (src, dst) = halves(buffer.parts().1, room);
            assert_eq!((src.len(), dst.len()), (room, room));
            src.fill(1);
            dst.fill(2);
            let (src, dst) = halves(buffer.parts().1, room - 1);
            assert!(src.iter().all(|&entry| entry == 1));
            assert!(dst[..room - 1].iter().all(|&entry| entry == 0));
            assert_eq!(dst[room - 1], 2);
        }
        Ok(())
    }
}
