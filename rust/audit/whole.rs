// SPDX-License-Identifier: GPL-2.0

//! I14: every field of a struct page. The fields of a free page, or of a page that was just
//! allocated, must be explained: there is a mask for each field, with the reason for each bit.
//!
//! Only with the module parameter `strict`, because every page is read once more.

#![forbid(unsafe_code)]

use super::{
    Check,
    Invariant,
    Violation, //
};
use crate::{
    mm::{
        oracle::whole::{
            flags,
            LargeFields,
            PageFields, //
        },
        page::view::PageView,
        pagemap::{
            dev_pagemap::DevPagemap,
            ops::PagemapOps, //
        },
    },
    params::param_strict, //
};
use kernel::prelude::*;

/// The state of the checked page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    /// The page is free.
    Free,
    /// The page is the first of a folio of this order that was just allocated; no other task has
    /// seen it.
    Fresh { order: u32 },
    /// The page is the first of a folio of this order, in `folio_free`.
    Freed { order: u32 },
    /// The page is a tail of a large folio that was just allocated; no other task has seen it.
    FreshTail { is_second: bool },
}

/// Flags that any page of a device may have, and why:
///
/// - `RESERVED`: `memmap_init_zone_device()` sets it, as the page allocator does not own the page. It
///   may be missing: `__split_folio_to_order()` clears it in the new folios and sets it nowhere.
/// - `HWPOISON`: the hardware has lost the page; that is reported elsewhere.
const ANY: u64 = flags::RESERVED | flags::HWPOISON;

/// Flags that a page keeps of its last user, until `zone_device_page_init()` clears them, and why:
///
/// - `UPTODATE`, `DIRTY`, `REFERENCED`, `SWAPBACKED`, `ACTIVE`, `WORKINGSET`, `UNEVICTABLE`:
///   `folio_migrate_flags()` copies them from the folio whose contents move.
/// - `WAITERS`: a task waited for the lock of the page; the last one to unlock it leaves the flag.
const LEFT: u64 = flags::UPTODATE
    | flags::DIRTY
    | flags::REFERENCED
    | flags::SWAPBACKED
    | flags::ACTIVE
    | flags::WORKINGSET
    | flags::UNEVICTABLE
    | flags::WAITERS;

/// The flags of a free page: those above, and `HEAD`, because core mm leaves a large folio as it is
/// until its pages are allocated again.
const FREE: u64 = ANY | LEFT | flags::HEAD;

/// The flags of the second page of a large folio besides [`ANY`]: the lowest eight bits have the
/// order, and `WORKINGSET` is `large_rmappable`.
const SECOND: u64 = 0xff | flags::WORKINGSET;

/// The explained flags. `LOCKED`: a folio is locked when it is allocated, and core mm owns the lock
/// bit in `folio_free`.
const fn explained(whole: Whole) -> u64 {
    match whole {
        Whole::Free => FREE,
        Whole::Fresh { order: 0 } => ANY | flags::LOCKED,
        Whole::Fresh { .. } => ANY | flags::LOCKED | flags::HEAD,
        Whole::Freed { order: 0 } => ANY | LEFT | flags::LOCKED,
        Whole::Freed { .. } => FREE | flags::LOCKED,
        Whole::FreshTail { is_second: true } => ANY | SECOND,
        Whole::FreshTail { is_second: false } => ANY,
    }
}

/// `page->page_type` of an unmapped page without a type.
const NO_TYPE: u32 = u32::MAX;

/// The mapping count of an unmapped large folio.
const UNMAPPED: i32 = -1;

type Failed = (Check, u64, u64);

fn expect(check: Check, expected: u64, found: u64) -> Option<Failed> {
    (expected != found).then_some((check, expected, found))
}

/// A count in the form of the uapi.
fn count(n: i32) -> u64 {
    // CAST: The sign extension is intended.
    i64::from(n) as u64
}

/// The first unexplained field of a page; the flags come first.
fn page_fields(f: &PageFields, whole: Whole) -> Option<Failed> {
    let flags = expect(Check::Flags, 0, f.flags & !explained(whole));
    match whole {
        // The other fields of a tail belong to the folio.
        Whole::FreshTail { .. } => flags,
        // The old index stays until the page is allocated again.
        Whole::Free | Whole::Freed { .. } => flags
            .or_else(|| own_fields(f))
            // The page loses its backing before the driver sees it freed.
            .or_else(|| expect(Check::Data, 0, f.data)),
        Whole::Fresh { .. } => flags
            .or_else(|| own_fields(f))
            .or_else(|| expect(Check::Index, 0, f.index)),
    }
}

/// The fields that are empty in free and fresh pages: buffers or an entry of the swap cache, a
/// type, or mappings.
fn own_fields(f: &PageFields) -> Option<Failed> {
    expect(Check::Private, 0, f.private)
        .or_else(|| expect(Check::Type, NO_TYPE.into(), f.page_type.into()))
}

/// The first unexplained field of an unmapped large folio of `order`.
fn large_fields(f: &LargeFields, order: u32) -> Option<Failed> {
    expect(Check::Entire, count(UNMAPPED), count(f.entire))
        .or_else(|| expect(Check::Mapcount, count(UNMAPPED), count(f.large)))
        .or_else(|| expect(Check::PagesMapped, 0, count(f.pages_mapped)))
        .or_else(|| expect(Check::Pages, 1 << order, f.nr_pages))
        .or_else(|| expect(Check::Pins, 0, count(f.pins)))
        .or_else(|| expect(Check::Deferred, 0, f.deferred.into()))
}

/// I14: checks `page`, if strict mode is on.
#[inline]
pub(super) fn check_whole(page: PageView<'_>, whole: Whole) -> Option<Violation> {
    if param_strict() {
        look_at(page, whole)
    } else {
        None
    }
}

#[cold]
fn look_at(page: PageView<'_>, whole: Whole) -> Option<Violation> {
    let is_tail = matches!(whole, Whole::FreshTail { .. });
    // In a tail some fields belong to its folio.
    if page.bits().is_tail() != is_tail {
        return None;
    }
    let large = match whole {
        Whole::Fresh { order: 1.. } | Whole::Freed { order: 1.. } => page.large_fields(),
        _ => None,
    };
    let failed = page_fields(&page.fields(), whole)
        .or_else(|| large.and_then(|fields| large_fields(&fields, page.order())));
    failed.map(|(check, expected, found)| {
        Violation::on(page, Invariant::Whole, check, expected, found)
    })
}

/// What a folio in use, which is mapped and not in motion, must have, and must not have.
fn used_fields(f: &PageFields, large: Option<&LargeFields>) -> Option<Failed> {
    // Without this flag a page that comes back and is swapped out cannot be read again.
    expect(Check::Flags, flags::UPTODATE, f.flags & flags::UPTODATE)
        // Neither buffers nor an entry of the swap cache are a device page's.
        .or_else(|| expect(Check::Private, 0, f.private))
        .or_else(|| expect(Check::Deferred, 0, large?.deferred.into()))
}

/// I14: checks the folio in use that begins with `page`.
pub(crate) fn check_used_whole(page: PageView<'_>) -> Option<Violation> {
    let settles = || {
        let bits = page.bits();
        bits.is_mapped() && !bits.is_locked() && !bits.is_tail()
    };
    if !settles() {
        return None;
    }
    let failed = used_fields(&page.fields(), page.large_fields().as_ref());
    let (check, expected, found) = failed.filter(|_| settles())?;
    Some(Violation::on(
        page,
        Invariant::Whole,
        check,
        expected,
        found,
    ))
}

/// I14: checks tail page `page` of a folio that was just allocated.
pub(super) fn check_whole_tail(page: PageView<'_>) -> Option<Violation> {
    let is_second = page.pfn() == page.head().pfn() + 1;
    check_whole(page, Whole::FreshTail { is_second })
}

/// How many of the `n` pages from `index` on are free and need no closer check.
#[inline]
pub(crate) fn whole_pages<T: PagemapOps>(map: &DevPagemap<T>, index: usize, n: usize) -> usize {
    if param_strict() {
        map.whole_pages(index, n, FREE)
    } else {
        map.clean_pages(index, n)
    }
}

#[kunit_tests(zdmirror_audit_whole)]
mod tests {
    use super::*;

    const CLEAN: PageFields = PageFields {
        flags: flags::RESERVED,
        private: 0,
        index: 0,
        page_type: NO_TYPE,
        data: 0,
    };

    #[test]
    fn fields_of_pages_in_use() {
        let used = PageFields {
            flags: flags::RESERVED | flags::UPTODATE | flags::DIRTY,
            ..CLEAN
        };
        assert_eq!(used_fields(&used, None), None);
        let swapped = PageFields { private: 7, ..used };
        assert_eq!(used_fields(&swapped, None), Some((Check::Private, 0, 7)));
        let is_read = Some((Check::Flags, flags::UPTODATE, 0));
        assert_eq!(used_fields(&CLEAN, None), is_read);
    }

    #[test]
    fn fields_of_pages() {
        let active = 1 << 63;
        let fresh = Whole::Fresh { order: 0 };
        let cases = [
            (CLEAN, Whole::Free, None),
            (PageFields { flags: 0, ..CLEAN }, Whole::Free, None),
            (
                PageFields { data: 1, ..CLEAN },
                Whole::Free,
                Some(Check::Data),
            ),
            (PageFields { data: 1, ..CLEAN }, fresh, None),
            (
                PageFields {
                    flags: flags::RESERVED | active,
                    ..CLEAN
                },
                Whole::Free,
                Some(Check::Flags),
            ),
            (
                PageFields {
                    flags: flags::RESERVED | flags::LOCKED,
                    ..CLEAN
                },
                Whole::Free,
                Some(Check::Flags),
            ),
            (
                PageFields {
                    flags: flags::RESERVED | flags::LOCKED,
                    ..CLEAN
                },
                fresh,
                None,
            ),
            (
                PageFields {
                    flags: flags::RESERVED | flags::HEAD,
                    ..CLEAN
                },
                fresh,
                Some(Check::Flags),
            ),
            (
                PageFields {
                    private: 1,
                    ..CLEAN
                },
                Whole::Free,
                Some(Check::Private),
            ),
            (
                PageFields {
                    page_type: 0,
                    ..CLEAN
                },
                Whole::Free,
                Some(Check::Type),
            ),
            (PageFields { index: 7, ..CLEAN }, Whole::Free, None),
            (PageFields { index: 7, ..CLEAN }, fresh, Some(Check::Index)),
        ];
        for (fields, whole, expected) in cases {
            assert_eq!(
                page_fields(&fields, whole).map(|(check, ..)| check),
                expected
            );
        }
    }

    #[test]
    fn fields_of_large_folios() {
        let clean = LargeFields {
            entire: -1,
            large: -1,
            pages_mapped: 0,
            nr_pages: 512,
            pins: 0,
            deferred: false,
        };
        let cases = [
            (clean, None),
            (LargeFields { entire: 0, ..clean }, Some(Check::Entire)),
            (LargeFields { large: 3, ..clean }, Some(Check::Mapcount)),
            (LargeFields { pins: 1, ..clean }, Some(Check::Pins)),
            (
                LargeFields {
                    nr_pages: 1,
                    ..clean
                },
                Some(Check::Pages),
            ),
            (
                LargeFields {
                    pages_mapped: 1,
                    ..clean
                },
                Some(Check::PagesMapped),
            ),
            (
                LargeFields {
                    deferred: true,
                    ..clean
                },
                Some(Check::Deferred),
            ),
        ];
        for (fields, expected) in cases {
            assert_eq!(large_fields(&fields, 9).map(|(check, ..)| check), expected);
        }
    }
}
