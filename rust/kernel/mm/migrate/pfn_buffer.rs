// SPDX-License-Identifier: GPL-2.0

//! Room for the arguments of a migration, and for the entries of its pages.

use crate::{
    bindings,
    mm::{
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
    /// The arguments of core mm. They stay in one place while the migration goes through its stages, because
    /// moving so many words would take time.
    args: MaybeUninit<bindings::migrate_vma>,
    entries: Entries,
}

/// The first half is for the source.
enum Entries {
    /// For one page, as most faults need. It takes no allocation.
    One([usize; 2]),
    Many(KVVec<usize>),
}

impl PfnBuffer {
    /// Room for `pages` pages, at most [`MAX_PAGES`]. May sleep, to allocate room for more than one.
    #[inline]
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let entries = match pages.min(MAX_PAGES) {
            0 | 1 => Entries::One([0; 2]),
            pages => Entries::Many(KVVec::from_elem(0, 2 * pages, GFP_KERNEL)?),
        };
        Ok(Self {
            args: MaybeUninit::uninit(),
            entries,
        })
    }

    /// Pages that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.entries.as_slice().len() / 2
    }

    /// Room for the arguments, and all entries: the first half is for the source.
    pub(super) fn parts(&mut self) -> (&mut MaybeUninit<bindings::migrate_vma>, &mut [usize]) {
        (&mut self.args, self.entries.as_mut_slice())
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
