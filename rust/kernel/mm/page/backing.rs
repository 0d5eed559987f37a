// SPDX-License-Identifier: GPL-2.0

//! Memory behind PRIVATE pages of a device without memory of its own.
//!
//! A driver that emulates device memory attaches a block of system memory to a device folio. It is no folio itself: core
//! mm never sees it, and when the device folio is split the block is, too.
//!
//! C header: [`include/linux/gfp.h`](srctree/include/linux/gfp.h)

use super::{
    batch::PageBatch,
    struct_page, //
};
use crate::{
    bindings,
    mm::PMD_ORDER, //
};
use core::ptr::NonNull;
use kernel::prelude::*;

/// Low bits of [`RawBacking`] that hold the order of a block in one piece.
const ORDER_BITS: usize = 0xf;

// Pointers to struct pages, which are an array that begins at a multiple of more, have none of these bits.
const _: () = assert!(core::mem::size_of::<bindings::page>() % (ORDER_BITS + 1) == 0);

/// The value of those bits for a single page that is to be kept. No block has this order.
const KEPT: usize = 0xf;

const _: () = assert!(PMD_ORDER < KEPT as u32);

/// Memory for a device folio that is not allocated yet. Dropping it frees the memory.
///
/// # Examples
///
/// ```
/// use kernel::mm::page::backing::Backing;
///
/// assert_eq!(Backing::alloc(2)?.order(), 2);
/// // The device has memory of its own.
/// assert_eq!(Backing::none(2)?.order(), 2);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - Owns the block of `order`, in one piece, that starts at `block`, if there is one.
/// - `order` is at most [`PMD_ORDER`].
pub(crate) struct Backing {
    block: Option<NonNull<bindings::page>>,
    order: u32,
}

// SAFETY: No other value refers to the block, so it may change threads.
unsafe impl Send for Backing {}

impl Backing {
    /// Allocates a block of system memory for a PRIVATE folio of `order`. May sleep. A caller can do without a large
    /// block, so that the allocation of one makes little effort. The memory is not cleared: a migration fills it.
    ///
    /// Wraps `alloc_pages()`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an order above [`PMD_ORDER`], `ENOMEM` when memory is short.
    pub(crate) fn alloc(order: u32) -> Result<Self> {
        let none = Self::none(order)?;
        let patience = if order > 0 { bindings::GFP_NORETRY } else { 0 };
        let gfp = bindings::GFP_HIGHUSER | bindings::__GFP_NOWARN | patience;
        // SAFETY: The order is one that the page allocator has. The caller may sleep.
        let page = unsafe { bindings::zdm_alloc_pages(gfp, order) };
        // INVARIANT: The block is new.
        Ok(Self {
            block: Some(NonNull::new(page).ok_or(ENOMEM)?),
            order: none.order,
        })
    }

    /// A block for a PRIVATE folio of order 0 out of `batch`, which gets new blocks together if it is empty
    /// and `wanted`, with this one, are. May sleep.
    ///
    /// Wraps `alloc_pages_bulk()`.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when memory is short.
    pub(crate) fn alloc_from(batch: &mut BackingBatch, wanted: usize) -> Result<Self> {
        let gfp = bindings::GFP_HIGHUSER | bindings::__GFP_NOWARN;
        batch.0.refill(wanted, gfp, None);
        match batch.0.pop() {
            // INVARIANT: The page is new, and its only reference ours.
            Some(page) => Ok(Self {
                block: Some(page),
                order: 0,
            }),
            None => Self::alloc(0),
        }
    }

    /// No block, for a folio of `order` whose contents are in the device's own memory, or in memory
    /// that the CPU reaches.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an order above [`PMD_ORDER`].
    pub(crate) fn none(order: u32) -> Result<Self> {
        if order > PMD_ORDER {
            return Err(EINVAL);
        }
        // INVARIANT: There is nothing to own, and the order is checked above.
        Ok(Self { block: None, order })
    }

    /// Order of the folio that it is for.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// Whether there is a block.
    pub(in crate::mm) fn is_some(&self) -> bool {
        self.block.is_some()
    }

    /// Gives the block away.
    pub(in crate::mm) fn into_raw(self) -> RawBacking {
        let address = self.block.map_or(0, |block| block.as_ptr() as usize);
        let raw = match address {
            0 => RawBacking(0),
            address => RawBacking(address | self.order as usize),
        };
        core::mem::forget(self);
        raw
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Some(block) = self.block {
            // SAFETY: We own the block by the type invariants of `Backing`.
            unsafe { bindings::__free_pages(block.as_ptr(), self.order) };
        }
    }
}

/// Blocks of order 0 for [`Backing::alloc_from`]. Dropping it frees those that were not taken.
///
/// # Examples
///
/// ```
/// use kernel::mm::page::backing::{Backing, BackingBatch};
///
/// let mut batch = BackingBatch::new();
/// // Three blocks will be wanted in all.
/// for wanted in (1..=3).rev() {
///     assert_eq!(Backing::alloc_from(&mut batch, wanted)?.order(), 0);
/// }
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct BackingBatch(PageBatch);

impl BackingBatch {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self(PageBatch::new())
    }
}

/// A block as `zone_device_data` of the head page carries it: the address of the first page and
/// the order in which it is in one piece, 0 after a split, [`KEPT`] for a page that is kept when its
/// folio is freed. All zeroes is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::mm) struct RawBacking(usize);

impl RawBacking {
    /// No backing.
    pub(in crate::mm) const NONE: Self = Self(0);

    /// The backing of the folio that begins with `head`.
    ///
    /// # Safety
    ///
    /// `head` must be the head page of a folio of a [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap).
    pub(in crate::mm) unsafe fn of(head: *mut bindings::page) -> Self {
        // SAFETY: `head` is a page of ZONE_DEVICE memory by the contract of this function.
        Self(unsafe { struct_page::zone_device_data(head) } as usize)
    }

    /// Stores it as the backing of the folio that begins with `head`.
    ///
    /// # Safety
    ///
    /// As [`RawBacking::of`], and no other task may use `head`'s backing meanwhile.
    pub(in crate::mm) unsafe fn store(self, head: *mut bindings::page) {
        // SAFETY: `head` is a head page whose backing no other task uses, by the contract of this
        // function.
        unsafe { struct_page::set_zone_device_data(head, self.0) };
    }

    /// Whether it is a block of one page, not to be kept so far.
    pub(in crate::mm) fn is_single(self) -> bool {
        self.0 != 0 && self.0 & ORDER_BITS == 0
    }

    /// The same block of one page, to be kept.
    pub(in crate::mm) fn marked(self) -> Self {
        Self(self.0 | KEPT)
    }

    /// The block as a number that is not 0; `None` for a block that is not to be kept.
    pub(in crate::mm) fn to_kept(self) -> Option<usize> {
        (self.0 & ORDER_BITS == KEPT).then_some(self.0)
    }

    /// The block that is kept as `kept`, which is not 0.
    pub(in crate::mm) fn from_kept(kept: usize) -> Self {
        Self(kept)
    }

    /// Page `i` of the block, NULL when there is none.
    pub(super) fn page(self, i: usize) -> *mut bindings::page {
        let first = (self.0 & !ORDER_BITS) as *mut bindings::page;
        if first.is_null() {
            first
        } else {
            first.wrapping_add(i)
        }
    }

    /// Takes a block in one piece apart, so that each page can be freed by itself. Does not sleep.
    ///
    /// # Safety
    ///
    /// No other task may free or split the block meanwhile.
    pub(in crate::mm) unsafe fn split(self) -> Self {
        let order = (self.0 & ORDER_BITS) as u32;
        if order > 0 {
            // SAFETY: The block is in one piece, by the encoding.
            unsafe { bindings::split_page(self.page(0), order) };
        }
        Self(self.0 & !ORDER_BITS)
    }

    /// The part of a block that was split which starts at page `i`.
    pub(in crate::mm) fn part(self, i: usize) -> Self {
        Self(self.page(i) as usize)
    }

    /// Frees the backing of a folio of `order`. Does not sleep.
    ///
    /// # Safety
    ///
    /// The folio must be the only user of the block, and not use it afterwards.
    pub(in crate::mm) unsafe fn free(self, order: u32) {
        if self.page(0).is_null() {
            return;
        }
        if self.0 & ORDER_BITS == order as usize {
            // SAFETY: The block is in one piece and ours by the contract of this function.
            unsafe { bindings::__free_pages(self.page(0), order) };
            return;
        }
        for i in 0..1 << order {
            // SAFETY: The block was split into pages of order 0, these are the folio's.
            unsafe { bindings::__free_pages(self.page(i), 0) };
        }
    }
}

/// Whether the contents of `page` may be dropped, or not be written back, for want of a mark. Those of device
/// memory that contents migrate to may not, and what comes back from there is marked.
///
/// # Safety
///
/// `page` must point to the `struct page` of a page that is mapped, and stays so.
pub(in crate::mm) unsafe fn is_cleanable(page: *mut bindings::page) -> bool {
    // SAFETY: There is a `struct page` by the contract of this function.
    let pgmap = unsafe { struct_page::any_pgmap(page) };
    // SAFETY: A pagemap outlives the mappings of its pages, of which this is one.
    pgmap.is_null() || unsafe { (*pgmap).type_ } == bindings::MEMORY_DEVICE_FS_DAX
}

/// The page that the CPU finds the contents of `page` in: the backing of a PRIVATE page, or
/// `page` itself. NULL when a PRIVATE page has no backing, that is when it is not in use.
///
/// # Safety
///
/// `page` must be a page in use that no task frees or splits meanwhile and, where it is PRIVATE,
/// one of a [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap).
pub(in crate::mm) unsafe fn contents(page: *mut bindings::page) -> *mut bindings::page {
    // SAFETY: The page is in use, and its folio whole, by the contract of this function.
    if !unsafe { struct_page::is_private(page) } {
        return page;
    }
    // SAFETY: The page is in use by the contract of this function.
    let head = unsafe { struct_page::head(page) };
    // SAFETY: Pages of a folio have struct pages in a row.
    let nth = unsafe { page.offset_from(head) };
    // SAFETY: `head` is the head of a folio of a `DevPagemap`, by the contract of this function.
    // CAST: Not negative: the head is the first page.
    unsafe { RawBacking::of(head) }.page(nth as usize)
}

#[kunit_tests(zdmirror_backing)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_bounded() -> Result {
        for order in [PMD_ORDER + 1, 31, 32, 63, 64, u32::MAX] {
            assert_eq!(Backing::alloc(order).err(), Some(EINVAL));
            assert_eq!(Backing::none(order).err(), Some(EINVAL));
        }
        for (backing, is_some) in [(Backing::alloc(1)?, true), (Backing::none(1)?, false)] {
            assert_eq!((backing.order(), backing.is_some()), (1, is_some));
        }
        Ok(())
    }
}
