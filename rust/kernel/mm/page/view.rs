// SPDX-License-Identifier: GPL-2.0

//! Read-only view of a `struct page`: of ZONE_DEVICE memory, free or in use, or of other memory in
//! use.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::struct_page;
use crate::bindings;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::prelude::*;

/// Properties of a page itself, from one look at it, whatever folio it is in.
///
/// Of a tail page only [`PageBits::is_tail`], [`PageBits::is_anon_exclusive`] and
/// [`PageBits::is_referenced`] are known: its other fields belong to the folio. A free page may
/// look like a tail: `zone_device_page_init()` undoes a large folio when the page is allocated,
/// not when it is freed.
///
/// # Examples
///
/// ```
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
/// let page = device.memory().page(0).ok_or(EINVAL)?;
/// assert!(page.bits().is_clean());
/// let folio = device.alloc(0)?;
/// assert!(folio.page().bits().is_new_small());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageBits(u32);

impl PageBits {
    /// Those of the first page of a large folio, for tests.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(in crate::mm) const HEAD: Self = Self(struct_page::HEAD);

    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// `page_ref_count()` is not 0.
    pub(crate) fn is_referenced(self) -> bool {
        self.has(struct_page::REFERENCED)
    }

    /// `PG_locked`.
    pub(crate) fn is_locked(self) -> bool {
        self.has(struct_page::LOCKED)
    }

    /// `PG_lru`, which must never be set on ZONE_DEVICE memory.
    pub(crate) fn is_lru(self) -> bool {
        self.has(struct_page::LRU)
    }

    /// The page is mapped by page table entries of its own.
    pub(crate) fn is_mapped(self) -> bool {
        self.has(struct_page::MAPPED)
    }

    /// The page is the first of a large folio.
    pub(crate) fn is_head(self) -> bool {
        self.has(struct_page::HEAD)
    }

    /// The page is one of an anonymous folio.
    pub(crate) fn is_anon(self) -> bool {
        self.has(struct_page::ANON)
    }

    /// `folio->mapping` is not NULL.
    pub(crate) fn has_mapping(self) -> bool {
        self.has(struct_page::MAPPING)
    }

    /// A memory cgroup is charged.
    pub(crate) fn is_charged(self) -> bool {
        self.has(struct_page::CHARGED)
    }

    /// The page is, or was until it was freed, a tail of a large folio.
    pub(crate) fn is_tail(self) -> bool {
        self.has(struct_page::TAIL)
    }

    /// `PG_anon_exclusive`.
    pub(crate) fn is_anon_exclusive(self) -> bool {
        self.has(struct_page::ANON_EXCLUSIVE)
    }

    /// Nothing that a free page must not have, references included.
    pub(crate) fn is_clean(self) -> bool {
        self.0 & !(struct_page::HEAD | struct_page::TAIL) == 0
    }

    /// A small folio that is locked and referenced, and else as a free page must be.
    pub(crate) fn is_new_small(self) -> bool {
        self.0 == struct_page::LOCKED | struct_page::REFERENCED
    }
}

/// Fields that only a large folio has.
#[derive(Clone, Copy)]
pub(in crate::mm) struct LargeFacts {
    pub(in crate::mm) order: u32,
    pub(in crate::mm) mapcount: i32,
    pub(in crate::mm) pins: i32,
}

/// A `struct page` that stays mapped in the memory map for `'a`, in whatever state it is.
///
/// Everything that is read here may change at any time: the values are exact only while nothing
/// else can reach the page. None of the methods sleeps or takes a lock.
///
/// # Examples
///
/// ```
/// use kernel::mm::region::memory_type::MemoryType;
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
///
/// let folio = device.alloc(3)?;
/// let page = folio.page();
/// assert_eq!(page.memory_type(), MemoryType::PRIVATE);
/// assert_eq!((page.order(), page.refs(), page.mapcount()), (3, 1, 0));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - For `'a` `page` points at an initialised `struct page`.
/// - If `pgmap` is known, the page belongs to that pagemap, which stays registered for `'a`.
/// - If `pgmap` is `None`, the page is in use for `'a`, and its folio is neither split nor freed.
#[derive(Clone, Copy)]
pub(crate) struct PageView<'a> {
    page: NonNull<bindings::page>,
    /// The pagemap of a page that may be free. Such a page can become a tail at any time, and in a tail
    /// the word that holds `pgmap` in a head holds a tagged pointer to the head.
    pgmap: Option<NonNull<bindings::dev_pagemap>>,
    _pagemap: PhantomData<&'a ()>,
}

impl<'a> PageView<'a> {
    /// # Safety
    ///
    /// For the lifetime that the caller picks, `page` must be a page in use, whose folio is neither
    /// split nor freed.
    pub(in crate::mm) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: The caller keeps the folio in use and whole.
        Self {
            page,
            pgmap: None,
            _pagemap: PhantomData,
        }
    }

    /// A view of a page of `pgmap`, in whatever state the page is.
    ///
    /// # Safety
    ///
    /// `page` must point at an initialised `struct page` of `pgmap`, which must stay registered for
    /// the lifetime that the caller picks.
    pub(in crate::mm) unsafe fn of_pagemap(
        page: NonNull<bindings::page>,
        pgmap: NonNull<bindings::dev_pagemap>,
    ) -> Self {
        // INVARIANT: The caller keeps `pgmap` registered, and the page is one of it.
        Self {
            page,
            pgmap: Some(pgmap),
            _pagemap: PhantomData,
        }
    }

    pub(in crate::mm) fn as_ptr(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }

    pub(in crate::mm) fn as_non_null(&self) -> NonNull<bindings::page> {
        self.page
    }

    /// Page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { bindings::zdm_page_to_pfn(self.as_ptr()) }
    }

    /// `enum memory_type` of the pagemap and its owner; 0 and NULL where there is no pagemap, for a
    /// page of other memory than a device's.
    pub(in crate::mm) fn type_and_owner(&self) -> (u32, *mut c_void) {
        let pgmap = self.pgmap.or_else(|| {
            // SAFETY: By the type invariants of `PageView` the folio of a page without a known pagemap is
            // in use and whole, so that its head holds the pagemap.
            NonNull::new(unsafe { struct_page::any_pgmap(self.as_ptr()) })
        });
        let Some(pgmap) = pgmap else {
            return (0, core::ptr::null_mut());
        };
        // SAFETY: The pagemap stays registered: by the type invariants of `PageView`, or as one of its
        // folios is in use.
        unsafe { ((*pgmap.as_ptr()).type_, (*pgmap.as_ptr()).owner) }
    }

    /// `enum memory_type` of the pagemap, 0 where there is none.
    pub(crate) fn memory_type(&self) -> u32 {
        self.type_and_owner().0
    }

    /// `page_ref_count()`: references on this page or, for a tail page, always zero.
    pub(crate) fn refs(&self) -> i32 {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { struct_page::refs(self.as_ptr()) }
    }

    /// The first page of the folio that this is, or was until it was freed, a part of.
    pub(crate) fn head(&self) -> Self {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        let head = unsafe { struct_page::head(self.as_ptr()) };
        // INVARIANT: All pages of a folio belong to one pagemap, or are in use together.
        NonNull::new(head).map_or(*self, |page| Self { page, ..*self })
    }

    /// The page that is `n` pages further on.
    ///
    /// # Safety
    ///
    /// There must be a struct page for that page, and the invariants must hold for it as for this one.
    pub(super) unsafe fn sibling(&self, n: usize) -> Option<Self> {
        // SAFETY: There is a struct page, by the contract of this function.
        let page = unsafe { bindings::zdm_pfn_to_page(self.pfn() + n) };
        // INVARIANT: The contract of this function says the same.
        NonNull::new(page).map(|page| Self { page, ..*self })
    }

    /// The further fields of a large folio that begins with this page; `None` where there is none.
    pub(in crate::mm) fn large(&self) -> Option<LargeFacts> {
        let head = self.as_ptr();
        // The first page of a large folio has a second one, which these are in.
        self.bits().is_head().then(|| LargeFacts {
            // SAFETY: The page is the head of a large folio, which has a second page.
            order: unsafe { bindings::zdm_large_order(head) },
            // SAFETY: The page is the head of a large folio, which has a second page.
            mapcount: unsafe { bindings::zdm_large_mapcount(head) },
            // SAFETY: The page is the head of a large folio, which has a second page.
            pins: unsafe { bindings::zdm_large_pins(head) },
        })
    }

    /// Page table entries that map this page, where it is a small folio; 0 for a tail.
    pub(in crate::mm) fn own_mapcount(&self) -> i32 {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        if unsafe { struct_page::is_tail(self.as_ptr()) } {
            return 0;
        }
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { struct_page::mapcount(self.as_ptr()) }
    }

    /// The properties of this page only, without those of its folio.
    pub(crate) fn bits(&self) -> PageBits {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        PageBits(unsafe { struct_page::bits(self.as_ptr()) })
    }

    /// `folio_mapcount()`: page table entries, present or not, that map the folio.
    pub(crate) fn mapcount(&self) -> i32 {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { struct_page::folio_mapcount(struct_page::head(self.as_ptr())) }
    }

    /// Whether a task may have pinned the folio with `FOLL_PIN`. A small folio looks pinned, too, when
    /// it has as many references as a pin takes.
    pub(crate) fn may_be_pinned(&self) -> bool {
        match self.large() {
            Some(large) => large.pins > 0,
            // CAST: The bias is far below the limit.
            None => self.refs() >= bindings::GUP_PIN_COUNTING_BIAS as i32,
        }
    }

    /// `folio_order()` of the folio that the page is part of.
    pub(crate) fn order(&self) -> u32 {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { struct_page::folio_order(self.as_ptr()) }
    }

    /// `folio->mapping` as a number, with its type bits.
    pub(crate) fn mapping(&self) -> usize {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { struct_page::mapping(struct_page::head(self.as_ptr())) }
    }

    /// The page number of the address at which the anonymous page was mapped first, unless the area that it was
    /// mapped in had been moved or maps a file: a hint only. Other tasks may change it meanwhile. `None` for a
    /// page that is not anonymous, or is not mapped.
    ///
    /// Wraps `folio->index`.
    pub(crate) fn first_place(&self) -> Option<usize> {
        let head = self.head();
        // SAFETY: The page is valid by the type invariants of `PageView`.
        let index = unsafe { struct_page::index(head.as_ptr()) };
        head.bits().is_anon().then_some(index)
    }

    /// `folio_test_ksm()`: KSM has merged the folio from others.
    pub(crate) fn is_ksm(&self) -> bool {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { bindings::zdm_folio_is_ksm(self.as_ptr()) }
    }

    /// `folio->memcg_data` as a number, 0 without `CONFIG_MEMCG`.
    pub(crate) fn memcg(&self) -> usize {
        // SAFETY: The page is valid by the type invariants of `PageView`.
        unsafe { struct_page::memcg_data(struct_page::head(self.as_ptr())) }
    }
}

#[kunit_tests(zdmirror_page)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_small_folios() {
        let (locked, used) = (struct_page::LOCKED, struct_page::REFERENCED);
        let others = [
            struct_page::LRU,
            struct_page::MAPPED,
            struct_page::MAPPING,
            struct_page::CHARGED,
            struct_page::ANON_EXCLUSIVE,
            struct_page::ANON,
        ];
        let cases = [
            (0, true, false),
            (locked, false, false),
            (used, false, false),
            (locked | used, false, true),
            (struct_page::HEAD, true, false),
            (struct_page::TAIL, true, false),
        ];
        for (bits, clean, new_small) in cases {
            let page = PageBits(bits);
            assert_eq!(page.is_clean(), clean);
            assert_eq!(page.is_new_small(), new_small);
            for other in others {
                let page = PageBits(bits | other);
                assert!(!page.is_clean() && !page.is_new_small());
            }
        }
        let large = PageBits(locked | used | struct_page::HEAD);
        assert!(!large.is_new_small());
    }
}
