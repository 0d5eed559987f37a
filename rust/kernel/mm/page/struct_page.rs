// SPDX-License-Identifier: GPL-2.0

//! The words of a `struct page`, read while other tasks may write them.
//!
//! Each function reads with a single load, as `READ_ONCE()` does, so that it inlines where a helper in C
//! would be a call. All of them take a pointer to a `struct page` that exists, in whatever state the
//! page is.
//!
//! C headers: [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h),
//! [`include/linux/page-flags.h`](srctree/include/linux/page-flags.h)

use crate::bindings;
use kernel::prelude::*;

/// The array of all struct pages. ZONE_DEVICE memory is there only where they are one array, at the same
/// place until the machine is shut down: `CONFIG_SPARSEMEM_VMEMMAP`.
#[derive(Clone, Copy)]
pub(in crate::mm) struct MemMap(*mut bindings::page);

impl MemMap {
    /// Where the array is.
    pub(in crate::mm) fn get() -> Self {
        // SAFETY: The function computes an address only.
        Self(unsafe { bindings::zdm_pfn_to_page(0) })
    }

    /// `pfn_to_page()`, as a number: the page need not exist.
    #[inline]
    pub(in crate::mm) fn page_of(self, pfn: usize) -> *mut bindings::page {
        self.0.wrapping_add(pfn)
    }

    /// `page_to_pfn()`.
    #[inline]
    pub(in crate::mm) fn pfn_of(self, page: *mut bindings::page) -> usize {
        (page as usize).wrapping_sub(self.0 as usize) / core::mem::size_of::<bindings::page>()
    }
}

/// Flags that neither a free page nor a page of a device that is left alone has.
const UNCLEAN: usize = 1 << bindings::pageflags_PG_locked
    | 1 << bindings::pageflags_PG_lru
    | 1 << bindings::pageflags_PG_anon_exclusive;

/// Bits of [`bits`]. A tail has none but [`TAIL`], [`ANON_EXCLUSIVE`] and [`REFERENCED`].
pub(super) const LOCKED: u32 = 0x01;
pub(super) const LRU: u32 = 0x02;
pub(super) const MAPPED: u32 = 0x04;
pub(super) const MAPPING: u32 = 0x08;
pub(super) const CHARGED: u32 = 0x10;
pub(super) const HEAD: u32 = 0x20;
pub(super) const TAIL: u32 = 0x40;
pub(super) const ANON_EXCLUSIVE: u32 = 0x80;
pub(super) const ANON: u32 = 0x100;
pub(super) const REFERENCED: u32 = 0x200;

/// `page->flags`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn flags(page: *const bindings::page) -> usize {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe { core::ptr::read_volatile(&raw const (*page).flags.f) }
}

/// `__folio_set_locked()`, which is not atomic.
///
/// # Safety
///
/// `head` must point to the `struct page` of the head of a folio that no other task uses.
#[inline]
pub(in crate::mm) unsafe fn set_locked(head: *mut bindings::page) {
    // SAFETY: `head` points to a `struct page` by the contract of this function.
    let flags = unsafe { &raw mut (*head).flags.f };
    // SAFETY: The word is one of the `struct page`, and no other task writes it.
    unsafe { flags.write_volatile(flags.read_volatile() | 1 << bindings::pageflags_PG_locked) };
}

/// `page_ref_count()`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn refs(page: *const bindings::page) -> i32 {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe { core::ptr::read_volatile(&raw const (*page)._refcount.counter) }
}

/// Word `n` of the union that follows the flags, whose uses depend on the page: the pagemap of a head
/// or the compound word of a tail (0), the data of the driver (1), the mapping (2), the index (3), `private` (4).
///
/// # Safety
///
/// `page` must point to a `struct page`, and `n` must be below 5.
#[inline]
pub(in crate::mm) unsafe fn word(page: *const bindings::page, n: usize) -> usize {
    // SAFETY: `page` points to a `struct page`, whose union has five words, by the contract of this
    // function.
    let word = unsafe { (&raw const (*page).__bindgen_anon_1).cast::<usize>().add(n) };
    // SAFETY: The word is one of the `struct page`.
    unsafe { word.read_volatile() }
}

/// The word that makes a tail a tail. It is equal in all tails of a folio.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(super) unsafe fn compound_word(page: *const bindings::page) -> usize {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe { word(page, 0) }
}

/// `PageTail()`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn is_tail(page: *const bindings::page) -> bool {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe { compound_word(page) & 1 != 0 }
}

/// `compound_head()`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn head(page: *mut bindings::page) -> *mut bindings::page {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    if unsafe { is_tail(page) } {
        // SAFETY: `page` points to a `struct page` by the contract of this function.
        unsafe { bindings::zdm_compound_head(page) }
    } else {
        page
    }
}

/// Whether the page is ZONE_DEVICE memory: `is_zone_device_page()`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(super) unsafe fn is_zone_device(page: *const bindings::page) -> bool {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let zone = unsafe { flags(page) } >> bindings::ZONES_PGSHIFT & bindings::ZONES_MASK as usize;
    zone == bindings::zone_type_ZONE_DEVICE as usize
}

/// `folio->pgmap` of the folio that begins with `head`.
///
/// # Safety
///
/// `head` must point to a `struct page` of ZONE_DEVICE memory. The result means something only while
/// the page is no tail.
#[inline]
pub(in crate::mm) unsafe fn pgmap(head: *const bindings::page) -> *mut bindings::dev_pagemap {
    // SAFETY: `head` points to a `struct page` by the contract of this function.
    unsafe { word(head, 0) as *mut bindings::dev_pagemap }
}

/// `page_pgmap()`, NULL for a page that is not ZONE_DEVICE memory.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn any_pgmap(page: *mut bindings::page) -> *mut bindings::dev_pagemap {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    if unsafe { is_zone_device(page) } {
        // SAFETY: `page` points to a `struct page` by the contract of this function, and so does the head.
        unsafe { pgmap(head(page)) }
    } else {
        core::ptr::null_mut()
    }
}

/// `is_device_private_page()`.
///
/// # Safety
///
/// `page` must point to the `struct page` of a page in use, whose folio stays whole.
#[inline]
pub(in crate::mm) unsafe fn is_private(page: *mut bindings::page) -> bool {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let pgmap = unsafe { any_pgmap(page) };
    // SAFETY: A folio in use keeps its pagemap, which its head holds while the folio is whole.
    !pgmap.is_null() && unsafe { (*pgmap).type_ } == bindings::MEMORY_DEVICE_PRIVATE
}

/// `page->zone_device_data`.
///
/// # Safety
///
/// `head` must point to a `struct page` of ZONE_DEVICE memory.
#[inline]
pub(in crate::mm) unsafe fn zone_device_data(head: *const bindings::page) -> *mut c_void {
    // SAFETY: `head` points to a `struct page` by the contract of this function.
    unsafe { word(head, 1) as *mut c_void }
}

/// Sets `page->zone_device_data`, as by `WRITE_ONCE()`: a look at a page in any state may read the word meanwhile.
///
/// # Safety
///
/// `head` must point to the `struct page` of the head of a folio of ZONE_DEVICE memory, whose data no other
/// task relies on or writes meanwhile.
#[inline]
pub(super) unsafe fn set_zone_device_data(head: *mut bindings::page, data: usize) {
    // SAFETY: `head` points to a `struct page`, whose union has five words, by the contract of this function.
    let word = unsafe { (&raw mut (*head).__bindgen_anon_1).cast::<usize>().add(1) };
    // SAFETY: The word is one of the `struct page`, and no other task writes it.
    unsafe { word.write_volatile(data) };
}

/// `page->__folio_index`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn index(page: *const bindings::page) -> usize {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe { word(page, 3) }
}

/// `page->mapping`, with its type bits.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn mapping(page: *const bindings::page) -> usize {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe { word(page, 2) }
}

/// `page->_mapcount`: one less than the entries that map the page, or its type.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn raw_mapcount(page: *const bindings::page) -> i32 {
    // SAFETY: `page` points to a `struct page` by the contract of this function. Both fields of the union
    // have 32 bits.
    unsafe {
        (&raw const (*page).__bindgen_anon_2)
            .cast::<i32>()
            .read_volatile()
    }
}

/// Page table entries that map the page, where it is a small folio without a type.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(super) unsafe fn mapcount(page: *const bindings::page) -> i32 {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let mapcount = unsafe { raw_mapcount(page) };
    // As `page_mapcount_is_type()`: types are far below what an underflow could come to.
    if mapcount < -1 << 24 {
        0
    } else {
        mapcount.wrapping_add(1)
    }
}

/// `folio_mapcount()` of the folio that begins with `head`.
///
/// # Safety
///
/// `head` must point to a `struct page`. The result means something only while the folio is whole.
#[inline]
pub(in crate::mm) unsafe fn folio_mapcount(head: *mut bindings::page) -> i32 {
    // SAFETY: `head` points to a `struct page` by the contract of this function.
    if unsafe { flags(head) } >> bindings::pageflags_PG_head & 1 == 0 {
        // SAFETY: `head` points to a `struct page` by the contract of this function.
        unsafe { mapcount(head) }
    } else {
        // SAFETY: `head` points to a `struct page` by the contract of this function, and to one with the
        // flag of a head, which has a second page.
        unsafe { bindings::zdm_large_mapcount(head) }
    }
}

/// `folio_order()` of the folio that the page is part of.
///
/// # Safety
///
/// `page` must point to a `struct page`, and if it looks like a tail its head must exist. The result means
/// something only while the folio is whole.
#[inline]
pub(super) unsafe fn folio_order(page: *mut bindings::page) -> u32 {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let head = unsafe { head(page) };
    // SAFETY: The head of `page` exists by the contract of this function.
    if unsafe { flags(head) } >> bindings::pageflags_PG_head & 1 == 0 {
        0
    } else {
        // SAFETY: The head exists by the contract of this function. With the flag of a head it has a
        // second page.
        unsafe { bindings::zdm_large_order(head) }
    }
}

/// Whether the page has as many references as its folio has mappings. A free page has none of both.
///
/// # Safety
///
/// `page` must point to a `struct page`, and if it looks like a tail its head must exist.
#[inline]
pub(in crate::mm) unsafe fn has_expected_refs(page: *mut bindings::page) -> bool {
    // SAFETY: `page` points to a `struct page` by the contract of this function, and so does its head.
    unsafe { refs(page) == folio_mapcount(head(page)) }
}

/// `page->memcg_data`, 0 without `CONFIG_MEMCG`.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(super) unsafe fn memcg_data(page: *const bindings::page) -> usize {
    #[cfg(CONFIG_MEMCG)]
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    unsafe {
        core::ptr::read_volatile(&raw const (*page).memcg_data)
    }
    #[cfg(not(CONFIG_MEMCG))]
    {
        let _ = page;
        0
    }
}

/// The properties by which a free page differs from others, read at one time. They are of the page itself, not of
/// its folio: a free page may still look like a tail of the large folio that it was part of, and then most of
/// its fields belong to that folio.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(super) unsafe fn bits(page: *const bindings::page) -> u32 {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let (flags, refs) = unsafe { (flags(page), refs(page)) };
    let flag = |flag: u32, bit: u32| if flags >> flag & 1 != 0 { bit } else { 0 };
    let any =
        bit(refs != 0, REFERENCED) | flag(bindings::pageflags_PG_anon_exclusive, ANON_EXCLUSIVE);
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    if unsafe { is_tail(page) } {
        return any | TAIL;
    }
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let (mapcount, mapping, memcg) =
        unsafe { (raw_mapcount(page), mapping(page), memcg_data(page)) };
    any | flag(bindings::pageflags_PG_locked, LOCKED)
        | flag(bindings::pageflags_PG_lru, LRU)
        | flag(bindings::pageflags_PG_head, HEAD)
        | bit(mapcount != -1, MAPPED)
        | bit(mapping != 0, MAPPING)
        | bit(mapping & bindings::FOLIO_MAPPING_ANON as usize != 0, ANON)
        | bit(memcg != 0, CHARGED)
}

/// Whether the page has something that a free page must not have. The same as [`bits`] tells, at less
/// cost where the answer is no.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn is_stale(page: *const bindings::page) -> bool {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let stale = unsafe {
        flags(page) & UNCLEAN
            | refs(page) as usize
            | mapping(page)
            | compound_word(page) & 1
            | memcg_data(page)
            // 0 where no entry maps the page.
            | !raw_mapcount(page) as usize
    };
    // The words of a tail that was left over say something else.
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    stale != 0 && unsafe { bits(page) } & !(HEAD | TAIL) != 0
}

/// Whether the page is a small folio with nothing that a free page must not have, but that it may be locked:
/// the same as [`bits`] tells, in fewer steps.
///
/// # Safety
///
/// `page` must point to a `struct page`.
#[inline]
pub(in crate::mm) unsafe fn is_clean_small(page: *const bindings::page) -> bool {
    let flags_of_others =
        UNCLEAN & !(1 << bindings::pageflags_PG_locked) | 1 << bindings::pageflags_PG_head;
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let found = unsafe {
        flags(page) & flags_of_others
            | refs(page) as usize
            | mapping(page)
            | compound_word(page) & 1
            | memcg_data(page)
            // 0 where no entry maps the page.
            | !raw_mapcount(page) as usize
    };
    found == 0
}

/// Flags that a page must not have when it is allocated: some kernels leave them to the next user.
const UNFIT: usize =
    1 << bindings::pageflags_PG_locked | 1 << bindings::pageflags_PG_anon_exclusive;

/// Counts the pages from `head` on that nothing refers to and that are no tails of another folio, up to the first
/// page for which that is not so. `head` is the first of the `n` pages of a folio that is not in use.
///
/// # Safety
///
/// There must be `n` struct pages from `head` on.
pub(in crate::mm) unsafe fn idle_pages(head: *mut bindings::page, n: usize) -> usize {
    (0..n)
        .position(|i| {
            // SAFETY: There are so many pages by the contract of this function.
            let page = unsafe { head.add(i) };
            // SAFETY: There is a `struct page` by the contract of this function.
            let (refs, word, flags) = unsafe { (refs(page), compound_word(page), flags(page)) };
            if word & 1 == 0 {
                // SAFETY: There is a `struct page` by the contract of this function.
                let mapped = unsafe { raw_mapcount(page) } != -1;
                return refs != 0 || flags & UNFIT != 0 || mapped;
            }
            // Some kernels have the address of the head there.
            let ours = word == head as usize | 1
                // SAFETY: There is a `struct page` by the contract of this function.
                || unsafe { bindings::zdm_compound_head(page) } == head;
            refs != 0 || !ours
        })
        .unwrap_or(n)
}

/// Whether all pages of the folio of `order` that begins with `head` but the first are tails, and else
/// as free pages must be.
///
/// # Safety
///
/// There must be `1 << order` struct pages from `head` on.
pub(super) unsafe fn has_clean_tails(head: *const bindings::page, order: u32) -> bool {
    (1..1 << order).all(|i| {
        // SAFETY: There are so many pages by the contract of this function.
        let page = unsafe { head.add(i) };
        // SAFETY: There is a `struct page` by the contract of this function.
        unsafe { bits(page) == TAIL }
    })
}

/// Whether the page is one of the huge page of zeroes. `is_huge_zero_folio()` needs a variable that is not
/// exported. That folio differs from others in that it is large and that rmap does not know it.
///
/// # Safety
///
/// `page` must point to a `struct page`, and if it looks like a tail its head must exist. The result means something
/// only while the page is in use and its folio whole.
pub(in crate::mm) unsafe fn is_huge_zero(page: *mut bindings::page) -> bool {
    // SAFETY: `page` points to a `struct page` by the contract of this function.
    let head = unsafe { head(page) };
    // SAFETY: The head exists by the contract of this function.
    if unsafe { flags(head) } >> bindings::pageflags_PG_head & 1 == 0 {
        return false;
    }
    // SAFETY: With the flag of a head the page has a second one.
    let is_known =
        unsafe { bindings::zdm_folio_is_rmappable(head) || bindings::zdm_folio_is_hugetlb(head) };
    // SAFETY: The head exists by the contract of this function.
    !is_known && unsafe { !is_zone_device(head) && mapping(head) == 0 }
}

/// Reads all words of the `n` struct pages from `first` on, and returns a value that depends on all of them, so that
/// the compiler leaves none out.
///
/// # Safety
///
/// There must be `n` struct pages from `first` on.
pub(in crate::mm) unsafe fn read_all(first: *const bindings::page, n: usize) -> usize {
    let first: *const usize = first.cast();
    let words = n * core::mem::size_of::<bindings::page>() / core::mem::size_of::<usize>();
    (0..words).fold(0, |all, i| {
        // SAFETY: There are so many words by the contract of this function.
        all | unsafe { first.add(i).read_volatile() }
    })
}

#[kunit_tests(zdmirror_struct_page)]
mod tests {
    use super::*;

    /// A page that nothing refers to, with `word` at `offset` as given.
    fn page_with(offset: usize, word: u32) -> bindings::page {
        // SAFETY: All fields of a `struct page` may be zero.
        let mut page: bindings::page = unsafe { core::mem::zeroed() };
        let raw = &raw mut page;
        // SAFETY: Both fields of the union have 32 bits.
        unsafe { (&raw mut (*raw).__bindgen_anon_2).cast::<i32>().write(-1) };
        if word != 0 {
            // SAFETY: `offset` is that of a field with 32 bits at least.
            unsafe { raw.cast::<u8>().add(offset).cast::<u32>().write(word) };
        }
        page
    }

    #[test]
    fn clean_small_page_is_one_without_bits() {
        let flag = |flag: u32| 1 << flag;
        let flags = core::mem::offset_of!(bindings::page, flags);
        let union = core::mem::offset_of!(bindings::page, __bindgen_anon_1);
        let mapcount = core::mem::offset_of!(bindings::page, __bindgen_anon_2);
        let refs = core::mem::offset_of!(bindings::page, _refcount);
        for (offset, word, clean) in [
            (flags, 0, true),
            (flags, flag(bindings::pageflags_PG_locked), true),
            (flags, flag(bindings::pageflags_PG_dirty), true),
            (flags, flag(bindings::pageflags_PG_lru), false),
            (flags, flag(bindings::pageflags_PG_head), false),
            (flags, flag(bindings::pageflags_PG_anon_exclusive), false),
            // The pagemap, which a tail has not, and the data of the driver.
            (union, 0x1000, true),
            (union, 0x1001, false),
            (union + 8, 0x1001, true),
            // The mapping.
            (union + 16, 1, false),
            (union + 16, 0x1000, false),
            (mapcount, 7, false),
            (refs, 1, false),
            (refs, u32::MAX, false),
        ] {
            let page = page_with(offset, word);
            // SAFETY: The page is one.
            assert_eq!(unsafe { is_clean_small(&page) }, clean);
            // SAFETY: The page is one.
            let has_none = unsafe { bits(&page) } & !LOCKED == 0;
            assert_eq!(has_none, clean);
        }
    }
}
