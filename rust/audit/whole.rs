// SPDX-License-Identifier: GPL-2.0

//! I14: all of a struct page. Whatever a page that is free, or that was just handed out, has in
//! any of its fields must be explained: a mask for each field, and the reason for what is in it.
//!
//! With the module parameter `strict` only: every page is read once more.

#![forbid(unsafe_code)]

use super::{
    Check,
    Invariant,
    Violation, //
};
use crate::mm::{
    module::param_strict,
    page::PageView,
    pagemap::DevPagemap,
    pagemap_ops::PagemapOps,
    whole::{
        flags,
        LargeFields,
        PageFields, //
    }, //
};
use kernel::prelude::*;

/// Which page is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    /// It is nobody's.
    Free,
    /// It is the first of a folio of this order that was handed out, and nobody has seen it yet.
    Fresh { order: u32 },
    /// It is the first of a folio of this order, in `folio_free`.
    Freed { order: u32 },
    /// It is another page of a large folio that was handed out, and nobody has seen it yet.
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

/// Flags of a free page: those, and `HEAD`, as core mm leaves a large folio as it is until its pages
/// are handed out.
const FREE: u64 = ANY | LEFT | flags::HEAD;

/// Flags of the second page of a large folio besides [`ANY`]: the lowest eight bits hold the order,
/// and `WORKINGSET` is `large_rmappable`.
const SECOND: u64 = 0xff | flags::WORKINGSET;

/// Flags that are explained. `LOCKED`: a fresh folio is handed out locked, and in `folio_free` core mm
/// owns the lock bit.
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

/// `page->page_type` of a page that nobody maps and that has no type.
const NO_TYPE: u32 = u32::MAX;

/// Mapping counts of large folios begin with this.
const UNMAPPED: i32 = -1;

type Failed = (Check, u64, u64);

fn expect(check: Check, expected: u64, found: u64) -> Option<Failed> {
    (expected != found).then_some((check, expected, found))
}

/// A count as the uapi carries it.
fn count(n: i32) -> u64 {
    // CAST: Sign extension is meant.
    i64::from(n) as u64
}

/// What is not explained in the fields of a page, first of all its flags.
fn page_fields(f: &PageFields, whole: Whole) -> Option<Failed> {
    let flags = expect(Check::Flags, 0, f.flags & !explained(whole));
    match whole {
        // The other fields of a tail belong to the folio.
        Whole::FreshTail { .. } => flags,
        // Where the page was mapped is left until it is handed out again.
        Whole::Free | Whole::Freed { .. } => flags
            .or_else(|| own_fields(f))
            // The backing leaves the page before the driver sees it freed.
            .or_else(|| expect(Check::Data, 0, f.data)),
        Whole::Fresh { .. } => flags
            .or_else(|| own_fields(f))
            .or_else(|| expect(Check::Index, 0, f.index)),
    }
}

/// Of those, what neither a free nor a fresh page has: buffers or an entry of the swap cache, a type
/// or mappings.
fn own_fields(f: &PageFields) -> Option<Failed> {
    expect(Check::Private, 0, f.private)
        .or_else(|| expect(Check::Type, NO_TYPE.into(), f.page_type.into()))
}

/// What is not explained in those of a large folio of `order` that nobody maps.
fn large_fields(f: &LargeFields, order: u32) -> Option<Failed> {
    expect(Check::Entire, count(UNMAPPED), count(f.entire))
        .or_else(|| expect(Check::Mapcount, count(UNMAPPED), count(f.large)))
        .or_else(|| expect(Check::PagesMapped, 0, count(f.pages_mapped)))
        .or_else(|| expect(Check::Pages, 1 << order, f.nr_pages))
        .or_else(|| expect(Check::Pins, 0, count(f.pins)))
        .or_else(|| expect(Check::Deferred, 0, f.deferred.into()))
}

/// I14, of `page`, where that is wanted.
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
    // A tail has fields of its folio where other pages have their own.
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

/// I14, of tail page `page` of a folio that was just handed out.
pub(super) fn check_whole_tail(page: PageView<'_>) -> Option<Violation> {
    let is_second = page.pfn() == page.head().pfn() + 1;
    check_whole(page, Whole::FreshTail { is_second })
}

/// Of the pages from `index` on, up to `n`, how many are free and need no closer look.
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
