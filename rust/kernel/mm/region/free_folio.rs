// SPDX-License-Identifier: GPL-2.0

//! Free device memory as values.
//!
//! Registering memory yields a [`FreeRegion`], which is cut into [`FreeFolio`]s. Only the owner of a
//! [`FreeFolio`] can allocate its pages. Allocating them consumes the value, and `folio_free` returns one.
//! A folio that is allocated twice, freed twice, or returned early can therefore not be written down.
//!
//! [`FreePages`] keeps the free pages of a block of [`PMD_ORDER`] in a bit each, for allocators.

use super::frames::Frames;
use crate::mm::{
    PAGE_SIZE,
    PMD_ORDER, //
};
use core::num::NonZeroUsize;
use kernel::{
    prelude::*,
    sizes::SZ_2M, //
};

/// Pages of a block of [`PMD_ORDER`].
pub(crate) const BLOCK_PAGES: usize = 1 << PMD_ORDER;

// Regions, which are aligned to 2 MiB, are cut into blocks without a rest.
const _: () = assert!(SZ_2M % (BLOCK_PAGES * PAGE_SIZE) == 0);

/// A folio of device memory that is free, as a value that can neither be copied nor made up.
///
/// Dropping it is safe: its pages are not allocated again, and their memory stays registered.
///
/// # Examples
///
/// ```
/// use kernel::mm::region::free_folio::FreeFolio;
///
/// # fn example(folio: FreeFolio) -> Result<FreeFolio, FreeFolio> {
/// let order = folio.order();
/// let (low, high) = folio.split()?;
/// assert_eq!((low.order(), high.order()), (order - 1, order - 1));
/// assert_eq!(low.first_pfn() + low.pages(), high.first_pfn());
/// let folio = low.merge(high).map_err(|(low, _)| low)?;
/// assert_eq!(folio.order(), order);
/// # Ok(folio)
/// # }
/// # assert!(example(FreeFolio::for_test(0)).is_ok());
/// ```
///
/// # Invariants
///
/// - The low bits are [`FreeFolio::MARK`] and the order, at most [`PMD_ORDER`]; above them is the number of
///   the first page frame, which is aligned to the order.
/// - The pages belong to a registered [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap), are not allocated, and no
///   other value of this module contains one of them. (Values of KUnit cases name frames that no
///   pagemap can have.)
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the pages of a free folio that is dropped are never allocated again"]
pub(crate) struct FreeFolio(NonZeroUsize);

impl FreeFolio {
    const ORDER: usize = 0xf;
    const MARK: usize = 0x10;
    const SHIFT: u32 = 5;

    /// The only value that contains these pages, as each caller says.
    fn new(first_pfn: usize, order: u32) -> Self {
        // INVARIANT: The callers are the functions of this module that consume a value with these pages, and
        // `from_raw()`.
        // CAST: `usize` has 64 bits.
        let low = NonZeroUsize::MIN.saturating_add(Self::MARK - 1 + order as usize);
        Self(low | (first_pfn << Self::SHIFT))
    }

    /// # Safety
    ///
    /// The folio of `order` at page frame `first_pfn` must be one of a registered
    /// [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap), aligned, of an order up to [`PMD_ORDER`], and free, and no
    /// value may contain one of its pages.
    pub(in crate::mm) unsafe fn from_raw(first_pfn: usize, order: u32) -> Self {
        Self::new(first_pfn, order)
    }

    /// Number of the first page frame.
    pub(crate) fn first_pfn(&self) -> usize {
        self.0.get() >> Self::SHIFT
    }

    /// Its order.
    pub(crate) fn order(&self) -> u32 {
        // CAST: Four bits.
        (self.0.get() & Self::ORDER) as u32
    }

    /// Number of base pages.
    pub(crate) fn pages(&self) -> usize {
        1 << self.order()
    }

    /// Cuts the folio into its two halves, the lower one first.
    ///
    /// # Errors
    ///
    /// Gives a folio of order 0 back, which has no halves.
    pub(crate) fn split(self) -> Result<(Self, Self), Self> {
        let Some(order) = self.order().checked_sub(1) else {
            return Err(self);
        };
        let first = self.first_pfn();
        Ok((
            Self::new(first, order),
            Self::new(first + (1 << order), order),
        ))
    }

    /// Makes one folio of two halves, in either order.
    ///
    /// # Errors
    ///
    /// Gives both back when they are not the halves of one folio, or when it would be larger than
    /// [`PMD_ORDER`].
    pub(crate) fn merge(self, other: Self) -> Result<Self, (Self, Self)> {
        let order = self.order();
        let buddies = self.first_pfn() ^ other.first_pfn() == 1 << order;
        if other.order() != order || !buddies || order >= PMD_ORDER {
            return Err((self, other));
        }
        Ok(Self::new(
            self.first_pfn().min(other.first_pfn()),
            order + 1,
        ))
    }

    /// Cuts the folio down to its part of `order` that contains page frame `pfn`. `rest` gets the parts
    /// that are left over.
    ///
    /// # Errors
    ///
    /// Gives the folio back when it does not contain `pfn` or is smaller than `order`.
    pub(crate) fn split_to(
        mut self,
        pfn: usize,
        order: u32,
        mut rest: impl FnMut(Self),
    ) -> Result<Self, Self> {
        if pfn < self.first_pfn() || pfn - self.first_pfn() >= self.pages() || order > self.order()
        {
            return Err(self);
        }
        while self.order() > order {
            let (low, high) = self.split()?;
            let (part, other) = if pfn < high.first_pfn() {
                (low, high)
            } else {
                (high, low)
            };
            rest(other);
            self = part;
        }
        Ok(self)
    }

    /// A block of [`PMD_ORDER`] for KUnit cases. Its frames are beyond all physical addresses, so that no
    /// pagemap accepts it.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn for_test(block: usize) -> Self {
        // No block wraps around to a page that there is.
        Self::new((1 << 52) + block % (1 << 16) * BLOCK_PAGES, PMD_ORDER)
    }
}

/// The pages of a registered region that were not cut into folios yet. Iterating it yields blocks of
/// [`PMD_ORDER`].
///
/// # Examples
///
/// ```
/// use kernel::{
///     mm::{
///         pagemap::registration::Registration,
///         region::{free_folio::BLOCK_PAGES, owner::PgmapOwner},
///     },
///     module::this_module,
///     sizes::SZ_2M,
/// };
/// # use kernel::mm::kunit::device::NoPages;
///
/// let owner = PgmapOwner::new(this_module::<LocalModule>())?;
/// let (map, region) = Registration::private(2 * SZ_2M, owner, |_frames| Ok(NoPages))?;
/// assert_eq!(region.blocks(), 2);
/// for folio in region {
///     assert_eq!(folio.pages(), BLOCK_PAGES);
///     // An allocator would keep the folio.
///     map.retire(folio).map_err(|_| EINVAL)?;
/// }
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// As those of [`FreeFolio`], for the page frames from `next` to `end`, which are multiples of
/// [`BLOCK_PAGES`].
#[must_use = "pages that are not taken out of the region are never allocated"]
pub(crate) struct FreeRegion {
    next: usize,
    end: usize,
}

impl FreeRegion {
    /// # Safety
    ///
    /// As [`FreeFolio::from_raw`], for all pages of `frames`; both ends must be multiples of
    /// [`BLOCK_PAGES`].
    pub(in crate::mm) unsafe fn from_raw(frames: Frames) -> Self {
        // INVARIANT: The contract of this function says the same.
        Self {
            next: frames.first_pfn(),
            end: frames.first_pfn() + frames.pages(),
        }
    }

    /// Blocks that are left.
    pub(crate) fn blocks(&self) -> usize {
        (self.end - self.next) / BLOCK_PAGES
    }

    /// A region for KUnit cases, as [`FreeFolio::for_test`].
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn for_test(blocks: core::ops::Range<usize>) -> Self {
        let pfn = |block: usize| (1 << 52) + block.min(1 << 16) * BLOCK_PAGES;
        Self {
            next: pfn(blocks.start),
            end: pfn(blocks.end.max(blocks.start)),
        }
    }
}

impl Iterator for FreeRegion {
    type Item = FreeFolio;

    fn next(&mut self) -> Option<FreeFolio> {
        if self.next >= self.end {
            return None;
        }
        let first = self.next;
        // INVARIANT: These pages are the folio's from here on.
        self.next += BLOCK_PAGES;
        Some(FreeFolio::new(first, PMD_ORDER))
    }
}

const BITS: usize = u64::BITS as usize;
const WORDS: usize = BLOCK_PAGES / BITS;

/// Those pages of one block of [`PMD_ORDER`] that are free, as one bit each.
///
/// # Examples
///
/// ```
/// use kernel::mm::region::free_folio::{FreeFolio, FreePages, BLOCK_PAGES};
/// # let block = FreeFolio::for_test(0);
///
/// let mut pages = FreePages::new(block).map_err(|_| EINVAL)?;
/// let folio = pages.take(4).ok_or(ENOSPC)?;
/// assert_eq!(pages.len(), BLOCK_PAGES - 16);
/// assert!(!pages.contains(folio.first_pfn(), 0));
/// pages.put(folio).map_err(|_| EINVAL)?;
/// assert_eq!(pages.len(), BLOCK_PAGES);
/// // Several pages at a time, and a look at one that stays free.
/// let mut batch = [const { None }; 8];
/// assert_eq!(pages.take_pages(&mut batch), 8);
/// let first = pages.first_pfn();
/// assert!(pages.with(first, |_| ()).is_none());
/// assert_eq!(pages.with(first + 8, |page| page.order()), Some(0));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// As those of [`FreeFolio`], for each page whose bit in `map` is set; `len` bits are.
pub(crate) struct FreePages {
    first_pfn: usize,
    len: u32,
    map: [u64; WORDS],
}

impl FreePages {
    /// All pages of `folio`.
    ///
    /// # Errors
    ///
    /// Gives `folio` back when it is not of [`PMD_ORDER`].
    pub(crate) fn new(folio: FreeFolio) -> Result<Self, FreeFolio> {
        let mut pages = Self {
            first_pfn: folio.first_pfn() & !(BLOCK_PAGES - 1),
            len: 0,
            map: [0; WORDS],
        };
        if folio.order() == PMD_ORDER {
            pages.put(folio)?;
            Ok(pages)
        } else {
            Err(folio)
        }
    }

    /// No pages of the same block.
    pub(crate) fn none_of(&self) -> Self {
        Self {
            first_pfn: self.first_pfn,
            len: 0,
            map: [0; WORDS],
        }
    }

    /// Number of pages that are free.
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    /// Number of the first page frame of the block.
    pub(crate) fn first_pfn(&self) -> usize {
        self.first_pfn
    }

    /// Adds the pages of `folio`.
    ///
    /// # Errors
    ///
    /// Gives `folio` back when it belongs to another block.
    pub(crate) fn put(&mut self, folio: FreeFolio) -> Result<(), FreeFolio> {
        if folio.first_pfn() & !(BLOCK_PAGES - 1) != self.first_pfn {
            return Err(folio);
        }
        // INVARIANT: `folio` is consumed, so that the bits are not set yet.
        for (word, mask) in span(folio.first_pfn() % BLOCK_PAGES, folio.order()) {
            self.map[word] |= mask;
        }
        // CAST: At most `BLOCK_PAGES`.
        self.len += folio.pages() as u32;
        Ok(())
    }

    /// Takes the lowest pages that are free as folios of order 0 into `out`, and returns how many.
    pub(crate) fn take_pages(&mut self, out: &mut [Option<FreeFolio>]) -> usize {
        let mut taken = 0;
        for (word, map) in self.map.iter_mut().enumerate() {
            while *map != 0 && taken < out.len() {
                let index = word * BITS + map.trailing_zeros() as usize;
                // INVARIANT: The page moves from `map` to the folio.
                out[taken] = Some(FreeFolio::new(self.first_pfn + index, 0));
                *map &= *map - 1;
                taken += 1;
            }
        }
        // CAST: At most `BLOCK_PAGES`.
        self.len -= taken as u32;
        taken
    }

    /// Whether a folio of `order` is free.
    pub(crate) fn has(&self, order: u32) -> bool {
        self.find(order).is_some()
    }

    /// Takes the lowest folio of `order` that is free.
    pub(crate) fn take(&mut self, order: u32) -> Option<FreeFolio> {
        let index = self.find(order)?;
        self.take_at(self.first_pfn + index, order)
    }

    /// Takes the folio of `order` at page frame `pfn`, if all of it is free.
    pub(crate) fn take_at(&mut self, pfn: usize, order: u32) -> Option<FreeFolio> {
        if !self.contains(pfn, order) {
            return None;
        }
        // INVARIANT: The pages move from `map` to the folio.
        for (word, mask) in span(pfn - self.first_pfn, order) {
            self.map[word] &= !mask;
        }
        self.len -= 1 << order;
        Some(FreeFolio::new(pfn, order))
    }

    /// Whether the folio of `order` at page frame `pfn` is free.
    pub(crate) fn contains(&self, pfn: usize, order: u32) -> bool {
        let index = pfn.wrapping_sub(self.first_pfn);
        order <= PMD_ORDER
            && index < BLOCK_PAGES
            && index % (1 << order) == 0
            && span(index, order).all(|(word, mask)| self.map[word] & mask == mask)
    }

    /// Calls `f` with page frame `pfn` as a folio of order 0, if it is free. The page stays free. `None` where it is
    /// not free, or belongs to another block.
    pub(crate) fn with<R>(&self, pfn: usize, f: impl FnOnce(&FreeFolio) -> R) -> Option<R> {
        if !self.contains(pfn, 0) {
            return None;
        }
        // The set is borrowed, so that the page stays free while `f` runs, and `f` cannot keep the folio.
        let folio = FreeFolio::new(pfn, 0);
        Some(f(&folio))
    }

    /// Number of the highest page frame that is free.
    pub(crate) fn highest(&self) -> Option<usize> {
        let (word, map) = self.map.iter().enumerate().rfind(|(_, &map)| map != 0)?;
        Some(self.first_pfn + word * BITS + (BITS - 1 - map.leading_zeros() as usize))
    }

    /// Index of the lowest folio of `order` that is free.
    fn find(&self, order: u32) -> Option<usize> {
        if order > PMD_ORDER || self.len() < 1 << order {
            return None;
        }
        if order >= BITS.ilog2() {
            let words = (1 << order) / BITS;
            let full = |map: &[u64]| map.iter().all(|&map| map == u64::MAX);
            return Some(self.map.chunks(words).position(full)? * words * BITS);
        }
        // One bit per aligned run of the order, at its start.
        let starts = u64::MAX / (u64::MAX >> (BITS - (1 << order)));
        self.map.iter().enumerate().find_map(|(word, &map)| {
            let runs = (0..order).fold(map, |map, step| map & (map >> (1 << step))) & starts;
            (runs != 0).then(|| word * BITS + runs.trailing_zeros() as usize)
        })
    }
}

/// Words and bits of the folio of `order` at `index`, which is aligned.
fn span(index: usize, order: u32) -> impl Iterator<Item = (usize, u64)> {
    let pages = 1usize << order;
    let mask = if pages >= BITS {
        u64::MAX
    } else {
        (u64::MAX >> (BITS - pages)) << (index % BITS)
    };
    let first = index / BITS;
    (first..first + pages.div_ceil(BITS)).map(move |word| (word, mask))
}

#[kunit_tests(zdmirror_free_folio)]
mod tests {
    use super::*;

    #[test]
    fn halves_merge_again() -> Result {
        let folio = FreeFolio::for_test(3);
        let first = folio.first_pfn();
        assert_eq!((folio.order(), folio.pages()), (PMD_ORDER, BLOCK_PAGES));
        let (low, high) = folio.split().map_err(|_| EINVAL)?;
        assert_eq!((low.first_pfn(), low.order()), (first, PMD_ORDER - 1));
        assert_eq!(high.first_pfn(), first + BLOCK_PAGES / 2);
        let folio = high.merge(low).map_err(|_| EINVAL)?;
        assert_eq!((folio.first_pfn(), folio.order()), (first, PMD_ORDER));
        // Two blocks are no folio.
        assert!(folio.merge(FreeFolio::for_test(2)).is_err());
        Ok(())
    }

    #[test]
    fn only_buddies_merge() -> Result {
        let mut rest = KVec::new();
        let folio = FreeFolio::for_test(0);
        let pfn = folio.first_pfn() + 5;
        let page = folio
            .split_to(pfn, 0, |part| {
                let _ = rest.push(part, GFP_KERNEL);
            })
            .map_err(|_| EINVAL)?;
        assert_eq!((page.first_pfn(), page.order()), (pfn, 0));
        assert_eq!(rest.len(), PMD_ORDER as usize);
        let page = page.split().err().ok_or(EINVAL)?;
        let mut folio = page;
        // The smallest part is the only one that fits, at each step.
        while let Some(part) = rest.pop() {
            if let Some(other) = rest.pop() {
                let (back, other) = folio.merge(other).err().ok_or(EINVAL)?;
                folio = back;
                rest.push(other, GFP_KERNEL)?;
            }
            folio = folio.merge(part).map_err(|_| EINVAL)?;
        }
        assert_eq!(folio.order(), PMD_ORDER);
        assert!(folio.split_to(pfn + BLOCK_PAGES, 0, |_| {}).is_err());
        Ok(())
    }

    #[test]
    fn region_yields_each_block_once() {
        let mut region = FreeRegion::for_test(4..7);
        assert_eq!(region.blocks(), 3);
        for block in 4..7 {
            assert_eq!(region.next(), Some(FreeFolio::for_test(block)));
        }
        assert_eq!(region.next(), None);
        assert_eq!(region.blocks(), 0);
    }

    #[test]
    fn pages_of_a_block_by_order() -> Result {
        let block = FreeFolio::for_test(1);
        let first = block.first_pfn();
        let mut pages = FreePages::new(block).map_err(|_| EINVAL)?;
        for order in 0..=PMD_ORDER {
            assert!(pages.has(order));
            let folio = pages.take(order).ok_or(EINVAL)?;
            assert_eq!((folio.first_pfn(), folio.order()), (first, order));
            assert_eq!(pages.len(), BLOCK_PAGES - folio.pages());
            assert!(!pages.contains(first, 0));
            pages.put(folio).map_err(|_| EINVAL)?;
        }
        assert!(!pages.has(PMD_ORDER + 1));
        // With its first page gone the block has one folio of each smaller order, all aligned.
        let page = pages.take(0).ok_or(EINVAL)?;
        assert!(!pages.has(PMD_ORDER));
        for order in (0..PMD_ORDER).rev() {
            let folio = pages.take(order).ok_or(EINVAL)?;
            assert_eq!(folio.first_pfn(), first + folio.pages());
            assert!(!pages.has(order));
        }
        assert_eq!((pages.len(), pages.highest()), (0, None));
        assert!(pages.with(first, |_| ()).is_none());
        pages.put(page).map_err(|_| EINVAL)?;
        assert_eq!(pages.with(first, |folio| folio.first_pfn()), Some(first));
        assert_eq!(pages.highest(), Some(first));
        Ok(())
    }

    #[test]
    fn pages_of_other_blocks_are_refused() -> Result {
        let mut pages = FreePages::new(FreeFolio::for_test(1)).map_err(|_| EINVAL)?;
        let first = pages.first_pfn();
        assert!(pages.put(FreeFolio::for_test(2)).is_err());
        let bad = [
            (first - 1, 0),
            (first + BLOCK_PAGES, 0),
            (first + 1, 1),
            (first, PMD_ORDER + 1),
        ];
        for (pfn, order) in bad {
            assert!(pages.take_at(pfn, order).is_none());
        }
        let (half, _) = FreeFolio::for_test(4).split().map_err(|_| EINVAL)?;
        assert!(FreePages::new(half).is_err());
        let mut out = [const { None }; 3];
        assert_eq!(pages.take_pages(&mut out), 3);
        assert_eq!(out[2].as_ref().map(FreeFolio::first_pfn), Some(first + 2));
        assert_eq!(pages.len(), BLOCK_PAGES - 3);
        assert_eq!(pages.none_of().len(), 0);
        Ok(())
    }
}
