// SPDX-License-Identifier: GPL-2.0

//! A look at all of a struct page, for the oracle.
//!
//! C header: [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h)

use crate::{
    bindings,
    mm::{
        page::{
            struct_page,
            view::PageView, //
        },
        pagemap::{
            dev_pagemap::DevPagemap,
            ops::PagemapOps, //
        },
    },
};
use kernel::prelude::*;

/// Flags of `page->flags`, without node, zone and section. Which there are is the configuration's.
pub(crate) mod flags {
    use crate::bindings;

    /// `PG_locked`.
    pub(crate) const LOCKED: u64 = 1 << bindings::ZDM_FLAG_LOCKED;
    /// `PG_referenced`.
    pub(crate) const REFERENCED: u64 = 1 << bindings::ZDM_FLAG_REFERENCED;
    /// `PG_uptodate`.
    pub(crate) const UPTODATE: u64 = 1 << bindings::ZDM_FLAG_UPTODATE;
    /// `PG_dirty`.
    pub(crate) const DIRTY: u64 = 1 << bindings::ZDM_FLAG_DIRTY;
    /// `PG_head`.
    pub(crate) const HEAD: u64 = 1 << bindings::ZDM_FLAG_HEAD;
    /// `PG_waiters`.
    pub(crate) const WAITERS: u64 = 1 << bindings::ZDM_FLAG_WAITERS;
    /// `PG_reserved`.
    pub(crate) const RESERVED: u64 = 1 << bindings::ZDM_FLAG_RESERVED;
    /// `PG_swapbacked`.
    pub(crate) const SWAPBACKED: u64 = 1 << bindings::ZDM_FLAG_SWAPBACKED;
    /// `PG_active`.
    pub(crate) const ACTIVE: u64 = 1 << bindings::ZDM_FLAG_ACTIVE;
    /// `PG_workingset`; of the second page of a large folio: it may be split by rmap.
    pub(crate) const WORKINGSET: u64 = 1 << bindings::ZDM_FLAG_WORKINGSET;
    /// `PG_unevictable`.
    pub(crate) const UNEVICTABLE: u64 = 1 << bindings::ZDM_FLAG_UNEVICTABLE;
    /// `PG_hwpoison`.
    pub(crate) const HWPOISON: u64 = 1 << bindings::ZDM_FLAG_HWPOISON;
}

/// The fields of a struct page that its accessors do not tell.
///
/// # Examples
///
/// ```
/// use kernel::mm::oracle::whole::{flags, PageFields};
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
///
/// let folio = device.alloc(0)?;
/// let fields: PageFields = folio.page().fields();
/// assert!(fields.flags & flags::LOCKED != 0);
/// // The address of the backing.
/// assert!(fields.data != 0);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageFields {
    /// `page->flags` as in [`flags`].
    pub(crate) flags: u64,
    /// `page->private`.
    pub(crate) private: u64,
    /// `page->index`, which is `share` for files on DAX.
    pub(crate) index: u64,
    /// `page->zone_device_data`.
    pub(crate) data: u64,
    /// `page->page_type`, which is the mapping count of a small folio less one.
    pub(crate) page_type: u32,
}

/// Those of a large folio that are in its second and its third page. A folio of order 1 has no third page.
///
/// # Examples
///
/// ```
/// use kernel::mm::oracle::whole::LargeFields;
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
///
/// let folio = device.alloc(4)?;
/// let fields: LargeFields = folio.page().large_fields().ok_or(EINVAL)?;
/// // No entry maps the folio, which is counted from -1 on.
/// assert_eq!((fields.nr_pages, fields.entire, fields.large), (16, -1, -1));
/// assert!(!fields.deferred);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LargeFields {
    /// `folio->_entire_mapcount`.
    pub(crate) entire: i32,
    /// `folio->_large_mapcount`.
    pub(crate) large: i32,
    /// `folio->_nr_pages_mapped`.
    pub(crate) pages_mapped: i32,
    /// `folio_nr_pages()`.
    pub(crate) nr_pages: u64,
    /// `folio->_pincount`.
    pub(crate) pins: i32,
    /// Whether it is on a list of folios that are to be split, which none of order 1 is.
    pub(crate) deferred: bool,
}

/// The flags of `page->flags`, without node, zone and section, which say where the page is.
const PAGE_FLAGS: usize = (1 << bindings::pageflags___NR_PAGEFLAGS) - 1;

/// `page->private`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
unsafe fn private(page: *const bindings::page) -> usize {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe { struct_page::word(page, 4) }
}

/// Counts the free pages from `first` on, of `n`, that have no flags but those of `explained`, and nothing in the
/// fields that a free page leaves empty, up to the first page for which that is not so. These fields of a tail
/// that was left over belong to its folio, and are not looked at.
///
/// # Safety
///
/// There must be `n` struct pages from `first` on.
unsafe fn whole_pages(first: *const bindings::page, n: usize, explained: usize) -> usize {
    (0..n)
        .position(|i| {
            // SAFETY: There are so many pages by the contract of this function.
            let page = unsafe { first.add(i) };
            // SAFETY: There is a `struct page` by the contract of this function.
            let tail = unsafe { struct_page::is_tail(page) };
            // SAFETY: There is a `struct page` by the contract of this function.
            let words = unsafe { private(page) | struct_page::word(page, 1) };
            // SAFETY: There is a `struct page` by the contract of this function.
            !tail && (unsafe { struct_page::flags(page) } & PAGE_FLAGS & !explained | words) != 0
        })
        .unwrap_or(n)
}

impl PageView<'_> {
    /// The fields of this page itself. Not exact while others can reach the page.
    pub(crate) fn fields(&self) -> PageFields {
        let page = self.as_ptr();
        PageFields {
            // SAFETY: The page is valid by the type invariants of `PageView`.
            flags: unsafe { struct_page::flags(page) & PAGE_FLAGS } as u64,
            // SAFETY: The page is valid by the type invariants of `PageView`.
            private: unsafe { private(page) } as u64,
            // SAFETY: The page is valid by the type invariants of `PageView`.
            index: unsafe { struct_page::index(page) } as u64,
            // SAFETY: The page is valid by the type invariants of `PageView`.
            data: unsafe { struct_page::zone_device_data(page) } as u64,
            // CAST: The same 32 bits, which are a type where they are no count.
            // SAFETY: The page is valid by the type invariants of `PageView`.
            page_type: unsafe { struct_page::raw_mapcount(page) } as u32,
        }
    }

    /// The fields of the large folio that begins with this page; `None` where none does.
    pub(crate) fn large_fields(&self) -> Option<LargeFields> {
        let head = self.as_ptr();
        // A page that is free, and was the first one of a folio, may say any order. Where a folio of an order
        // above 1 can begin, there are four pages.
        let has_third = self.large()?.order > 1 && self.pfn() % 4 == 0;
        Some(LargeFields {
            // SAFETY: `head` is the first page of a large folio, which has a second page.
            entire: unsafe { bindings::zdm_whole_entire_mapcount(head) },
            // SAFETY: `head` is the first page of a large folio, which has a second page.
            large: unsafe { bindings::zdm_whole_large_mapcount(head) },
            // SAFETY: `head` is the first page of a large folio, which has a second page.
            pages_mapped: unsafe { bindings::zdm_whole_pages_mapped(head) },
            // SAFETY: `head` is the first page of a large folio, which has a second page.
            nr_pages: unsafe { bindings::zdm_whole_nr_pages(head) } as u64,
            // SAFETY: `head` is the first page of a large folio, which has a second page.
            pins: unsafe { bindings::zdm_whole_pincount(head) },
            // SAFETY: Memory begins and ends at multiples of 2 MiB, so that there is a third page.
            deferred: has_third && unsafe { bindings::zdm_whole_is_deferred(head) },
        })
    }
}

/// Most pages that [`DevPagemap::whole_pages`] looks at.
const TWICE: usize = 512;

impl<T: PagemapOps> DevPagemap<T> {
    /// As [`DevPagemap::clean_pages`], of pages that have no flag besides those of `explained`, and
    /// nothing in the fields that a free page leaves empty.
    pub(crate) fn whole_pages(&self, index: usize, most: usize, explained: u64) -> usize {
        // The number of pages that are read twice is bounded, however many of them are not whole.
        let n = self.clean_pages(index, most.min(TWICE));
        let Some(page) = self.page(index) else {
            return 0;
        };
        // CAST: `usize` has 64 bits.
        let explained = explained as usize;
        // SAFETY: The pagemap has struct pages for the `n` pages from `index` on.
        unsafe { whole_pages(page.as_ptr(), n, explained) }
    }
}

#[kunit_tests(zdmirror_whole)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::device::EmulatedDevice,
        page::backing::Backing, //
    };

    #[test]
    fn last_folio_of_order_1_has_no_third_page() -> Result {
        let device = EmulatedDevice::new()?;
        let map = device.memory();
        let block = device.take().ok_or(ENOSPC)?;
        // The memory ends with the block, and so do its struct pages.
        let last = block.first_pfn() + block.pages() - 2;
        let folio = block.split_to(last, 1, |rest| device.put(rest));
        let folio = folio.map_err(|_| EINVAL)?;
        let folio = map.folio_init(folio, Backing::alloc(1)?);
        let folio = folio.map_err(|_| EINVAL)?;
        let fields = folio.page().large_fields().ok_or(EINVAL)?;
        assert_eq!((fields.nr_pages, fields.deferred), (2, false));
        Ok(())
    }
}
