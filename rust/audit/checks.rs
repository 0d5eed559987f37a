// SPDX-License-Identifier: GPL-2.0

//! The conditions themselves, one function per moment at which they must hold.

#![forbid(unsafe_code)]

use super::{
    Check,
    Invariant,
    Violation, //
};
use crate::mm::page::PageView;
use kernel::prelude::*;

/// What the allocator knows of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// May be handed out.
    Free,
    /// Was handed out and did not come back yet.
    Used,
}

/// The facts of a page that conditions are about; apart from the page, so that they can be tested.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Facts {
    refs: i32,
    mapcount: i32,
    order: u32,
    locked: bool,
    lru: bool,
    anon_exclusive: bool,
    mapping: usize,
    memcg: usize,
}

impl Facts {
    fn of(page: PageView<'_>) -> Self {
        Self {
            refs: page.refs(),
            mapcount: page.mapcount(),
            order: page.order(),
            locked: page.is_locked(),
            lru: page.is_lru(),
            anon_exclusive: page.is_anon_exclusive(),
            mapping: page.mapping(),
            memcg: page.memcg(),
        }
    }
}

/// A condition that failed: which, what it asks for, what was there.
type Failed = (Check, u64, u64);

fn expect(check: Check, expected: u64, found: u64) -> Option<Failed> {
    (expected != found).then_some((check, expected, found))
}

/// A count as the uapi carries it: negative ones keep their sign in 64 bits.
fn count(n: i32) -> u64 {
    // CAST: Sign extension is meant.
    i64::from(n) as u64
}

/// What holds for a page that is nobody's, first failure first.
fn free_page(f: &Facts) -> Option<Failed> {
    expect(Check::Refcount, 0, count(f.refs))
        .or_else(|| expect(Check::Mapcount, 0, count(f.mapcount)))
        .or_else(|| expect(Check::Locked, 0, f.locked.into()))
        .or_else(|| expect(Check::Lru, 0, f.lru.into()))
        .or_else(|| expect(Check::Mapping, 0, f.mapping as u64))
        .or_else(|| expect(Check::Order, 0, f.order.into()))
        .or_else(|| expect(Check::AnonExclusive, 0, f.anon_exclusive.into()))
        .or_else(|| expect(Check::Memcg, 0, f.memcg as u64))
}

/// What holds for an order-0 PRIVATE page in use at a quiescent point: each reference is that of
/// a page table entry, since nothing else can hold memory that the CPU cannot reach.
fn used_page(f: &Facts) -> Option<Failed> {
    if f.refs < 1 {
        return Some((Check::Refcount, 1, count(f.refs)));
    }
    expect(Check::Refcount, count(f.mapcount), count(f.refs))
        .or_else(|| expect(Check::Lru, 0, f.lru.into()))
}

/// What holds while a folio is freed: core mm has uncharged and cleaned it, but owns its lock bit.
fn freed_page(f: &Facts) -> Option<Failed> {
    expect(Check::Refcount, 0, count(f.refs))
        .or_else(|| expect(Check::Mapcount, 0, count(f.mapcount)))
        .or_else(|| expect(Check::Lru, 0, f.lru.into()))
        .or_else(|| expect(Check::Mapping, 0, f.mapping as u64))
        .or_else(|| expect(Check::AnonExclusive, 0, f.anon_exclusive.into()))
        .or_else(|| expect(Check::Memcg, 0, f.memcg as u64))
}

fn violation(
    page: PageView<'_>,
    invariant: Invariant,
    failed: Option<Failed>,
) -> Option<Violation> {
    failed.map(|(check, expected, found)| Violation::on(page, invariant, check, expected, found))
}

/// I1: `page` as registration left it.
pub(crate) fn check_born(page: PageView<'_>) -> Option<Violation> {
    violation(page, Invariant::Born, free_page(&Facts::of(page)))
}

/// I2: `page` is about to be handed out.
pub(crate) fn check_handed_out(page: PageView<'_>) -> Option<Violation> {
    violation(page, Invariant::HandedOut, free_page(&Facts::of(page)))
}

/// I3: `page` is in use, and `extra` references are known besides those of its mappings.
pub(crate) fn check_settled(page: PageView<'_>, extra: i32) -> Option<Violation> {
    let facts = Facts::of(page);
    let expected = count(facts.mapcount.saturating_add(extra));
    let failed = expect(Check::Refcount, expected, count(facts.refs));
    violation(page, Invariant::Settled, failed)
}

/// I4: `page` is in `folio_free`; `was_used` says whether it was handed out before.
pub(crate) fn check_freed(page: PageView<'_>, was_used: bool) -> Option<Violation> {
    let failed = expect(Check::State, 1, was_used.into()).or_else(|| freed_page(&Facts::of(page)));
    violation(page, Invariant::Freed, failed)
}

/// I5: `page` at a quiescent point.
pub(crate) fn check_idle(page: PageView<'_>, state: PageState) -> Option<Violation> {
    let facts = Facts::of(page);
    let failed = match state {
        PageState::Free => free_page(&facts),
        PageState::Used => used_page(&facts),
    };
    violation(page, Invariant::Idle, failed)
}

#[kunit_tests(zdmirror_audit_checks)]
mod tests {
    use super::*;

    const FREE: Facts = Facts {
        refs: 0,
        mapcount: 0,
        order: 0,
        locked: false,
        lru: false,
        anon_exclusive: false,
        mapping: 0,
        memcg: 0,
    };

    #[test]
    fn free_page_conditions() {
        let cases = [
            (FREE, None),
            (Facts { refs: 1, ..FREE }, Some((Check::Refcount, 0, 1))),
            (
                Facts { refs: -1, ..FREE },
                Some((Check::Refcount, 0, u64::MAX)),
            ),
            (
                Facts {
                    mapcount: 1,
                    ..FREE
                },
                Some((Check::Mapcount, 0, 1)),
            ),
            (
                Facts {
                    locked: true,
                    ..FREE
                },
                Some((Check::Locked, 0, 1)),
            ),
            (Facts { lru: true, ..FREE }, Some((Check::Lru, 0, 1))),
            (
                Facts {
                    mapping: 0x41,
                    ..FREE
                },
                Some((Check::Mapping, 0, 0x41)),
            ),
            (Facts { order: 9, ..FREE }, Some((Check::Order, 0, 9))),
            (
                Facts {
                    anon_exclusive: true,
                    ..FREE
                },
                Some((Check::AnonExclusive, 0, 1)),
            ),
            (Facts { memcg: 2, ..FREE }, Some((Check::Memcg, 0, 2))),
        ];
        for (facts, expected) in cases {
            assert_eq!(free_page(&facts), expected);
        }
    }

    #[test]
    fn used_page_conditions() {
        let used = Facts {
            refs: 1,
            mapcount: 1,
            mapping: 0x41,
            memcg: 2,
            ..FREE
        };
        let cases = [
            (used, None),
            (
                Facts {
                    refs: 3,
                    mapcount: 3,
                    ..used
                },
                None,
            ),
            (Facts { refs: 2, ..used }, Some((Check::Refcount, 1, 2))),
            (
                Facts {
                    mapcount: 0,
                    ..used
                },
                Some((Check::Refcount, 0, 1)),
            ),
            (
                Facts {
                    refs: 0,
                    mapcount: 0,
                    ..used
                },
                Some((Check::Refcount, 1, 0)),
            ),
            (Facts { lru: true, ..used }, Some((Check::Lru, 0, 1))),
        ];
        for (facts, expected) in cases {
            assert_eq!(used_page(&facts), expected);
        }
    }

    #[test]
    fn freed_page_conditions() {
        assert_eq!(freed_page(&FREE), None);
        // folio_free may meet a locked folio: migration unlocks before it puts, others may not.
        assert_eq!(
            freed_page(&Facts {
                locked: true,
                ..FREE
            }),
            None
        );
        assert_eq!(
            freed_page(&Facts {
                anon_exclusive: true,
                ..FREE
            }),
            Some((Check::AnonExclusive, 0, 1))
        );
        assert_eq!(
            freed_page(&Facts { mapping: 1, ..FREE }),
            Some((Check::Mapping, 0, 1))
        );
    }
}
