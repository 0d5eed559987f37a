// SPDX-License-Identifier: GPL-2.0

//! The conditions of the invariants, with one function per moment at which they must hold.

#![forbid(unsafe_code)]

use super::{
    whole::{
        check_whole,
        check_whole_tail,
        Whole, //
    },
    Check,
    Invariant,
    Violation, //
};
use crate::{
    mm::page::view::PageView,
    uapi::MEMORY_DEVICE_PRIVATE, //
};
use kernel::prelude::*;

/// The facts of a page that the conditions use. They are separate from the page so that they can be
/// tested.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Facts {
    refs: i32,
    mapcount: i32,
    order: u32,
    locked: bool,
    lru: bool,
    tail: bool,
    anon_exclusive: bool,
    mapping: usize,
    memcg: usize,
}

impl Facts {
    /// The facts of the folio in use whose head is `page`.
    fn of_folio(page: PageView<'_>) -> Self {
        let bits = page.bits();
        Self {
            refs: page.refs(),
            mapcount: page.mapcount(),
            order: page.order(),
            locked: bits.is_locked(),
            lru: bits.is_lru(),
            tail: bits.is_tail(),
            anon_exclusive: bits.is_anon_exclusive(),
            mapping: page.mapping(),
            memcg: page.memcg(),
        }
    }

    /// The facts of a single page, whatever folio it belongs to or belonged to until it was freed.
    /// Facts of the folio are 0 for a tail.
    fn of_page(page: PageView<'_>) -> Self {
        let bits = page.bits();
        Self {
            refs: page.refs(),
            mapcount: if bits.is_mapped() { page.mapcount() } else { 0 },
            order: 0,
            locked: bits.is_locked(),
            lru: bits.is_lru(),
            tail: bits.is_tail(),
            anon_exclusive: bits.is_anon_exclusive(),
            mapping: if bits.has_mapping() {
                page.mapping()
            } else {
                0
            },
            memcg: if bits.is_charged() { page.memcg() } else { 0 },
        }
    }
}

/// The guarantee about the moment at which pages are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Nothing migrates, faults or unmaps pages of the device, and no task holds any of them.
    Quiet,
    /// There is no guarantee. A locked folio may be in motion for as long as its migration waits
    /// for memory. Memory that the CPU can access may have unknown holders, because any task may
    /// pin pages that it maps.
    Busy,
}

impl Moment {
    /// The facts of a folio in use that the moment does not explain; `None` if it explains all.
    /// `is_private` says that only the device can access the memory.
    fn unexplained(self, f: &Facts, is_private: bool) -> Option<Facts> {
        match self {
            Self::Quiet => Some(*f),
            Self::Busy if f.locked => None,
            Self::Busy if is_private => Some(*f),
            Self::Busy => Some(Facts {
                refs: f.refs.min(f.mapcount.max(1)),
                mapcount: f.mapcount.max(1),
                ..*f
            }),
        }
    }
}

/// A failed condition: the condition, the expected value and the value found.
type Failed = (Check, u64, u64);

fn expect(check: Check, expected: u64, found: u64) -> Option<Failed> {
    (expected != found).then_some((check, expected, found))
}

/// A count in the form of the uapi: negative ones keep their sign in 64 bits.
fn count(n: i32) -> u64 {
    // CAST: The sign extension is intended.
    i64::from(n) as u64
}

/// The first failed condition of a free page. The order of the page does not matter: core mm leaves
/// a large folio as it is until its pages are allocated again.
fn free_page(f: &Facts) -> Option<Failed> {
    expect(Check::Refcount, 0, count(f.refs))
        .or_else(|| expect(Check::Mapcount, 0, count(f.mapcount)))
        .or_else(|| expect(Check::Locked, 0, f.locked.into()))
        .or_else(|| expect(Check::Lru, 0, f.lru.into()))
        .or_else(|| expect(Check::Mapping, 0, f.mapping as u64))
        .or_else(|| expect(Check::AnonExclusive, 0, f.anon_exclusive.into()))
        .or_else(|| expect(Check::Memcg, 0, f.memcg as u64))
}

/// The conditions of a folio of `order` right after it was allocated: it has one reference, the
/// driver's; it is locked; and nothing is left of the previous use of its pages.
fn fresh_folio(f: &Facts, order: u32) -> Option<Failed> {
    expect(Check::Tail, 0, f.tail.into())
        .or_else(|| expect(Check::Order, order.into(), f.order.into()))
        .or_else(|| expect(Check::Refcount, 1, count(f.refs)))
        .or_else(|| expect(Check::Locked, 1, f.locked.into()))
        .or_else(|| {
            let rest = Facts {
                refs: 0,
                locked: false,
                ..*f
            };
            free_page(&rest)
        })
}

/// The conditions of a folio of `order` in use at a quiescent point: each reference belongs to a
/// page table entry, because no task holds a page.
fn used_folio(f: &Facts, order: u32) -> Option<Failed> {
    if f.refs < 1 {
        return Some((Check::Refcount, 1, count(f.refs)));
    }
    expect(Check::Tail, 0, f.tail.into())
        .or_else(|| expect(Check::Order, order.into(), f.order.into()))
        .or_else(|| expect(Check::Refcount, count(f.mapcount), count(f.refs)))
        .or_else(|| expect(Check::Lru, 0, f.lru.into()))
}

/// The conditions of a page of a folio in use other than its first.
fn tail_page(f: &Facts) -> Option<Failed> {
    expect(Check::Tail, 1, f.tail.into()).or_else(|| expect(Check::Refcount, 0, count(f.refs)))
}

/// The conditions of a folio that was allocated with `order`, while it is freed: core mm has
/// uncharged and cleaned it, but owns its lock bit.
fn freed_folio(f: &Facts, order: u32) -> Option<Failed> {
    expect(Check::Refcount, 0, count(f.refs))
        .or_else(|| expect(Check::Order, order.into(), f.order.into()))
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

/// Checks a page that must be free, with one read, and more closely if that does not suffice.
fn check_free(page: PageView<'_>, invariant: Invariant) -> Option<Violation> {
    if page.bits().is_clean() {
        return None;
    }
    violation(page, invariant, free_page(&Facts::of_page(page)))
}

/// I1: checks `page` as registration left it.
pub(crate) fn check_born(page: PageView<'_>) -> Option<Violation> {
    check_free(page, Invariant::Born).or_else(|| check_whole(page, Whole::Free))
}

/// I2: checks `page`, of a folio or alone, before it is allocated.
pub(crate) fn check_allocated(page: PageView<'_>) -> Option<Violation> {
    check_free(page, Invariant::HandedOut).or_else(|| check_whole(page, Whole::Free))
}

/// I2: checks the folio of `order` that begins with `page` after it was allocated.
pub(crate) fn check_fresh(page: PageView<'_>, order: u32) -> Option<Violation> {
    // One read checks everything but the count.
    if order == 0 && page.bits().is_new_small() && page.refs() == 1 {
        return check_whole(page, Whole::Fresh { order });
    }
    let failed = fresh_folio(&Facts::of_folio(page), order);
    violation(page, Invariant::HandedOut, failed)
        .or_else(|| check_whole(page, Whole::Fresh { order }))
}

/// I2: checks a page other than the first of a folio after it was allocated.
pub(crate) fn check_fresh_tail(page: PageView<'_>) -> Option<Violation> {
    let bits = page.bits();
    if bits.is_tail() && bits.is_clean() {
        return check_whole_tail(page);
    }
    let facts = Facts::of_page(page);
    let failed = tail_page(&facts).or_else(|| free_page(&facts));
    violation(page, Invariant::HandedOut, failed).or_else(|| check_whole_tail(page))
}

/// I3: checks the folio of `page`, which is in use and has `extra` known references besides those
/// of its mappings.
pub(crate) fn check_settled(page: PageView<'_>, extra: i32) -> Option<Violation> {
    let refs = count(page.refs());
    let expected = count(page.mapcount().saturating_add(extra));
    let failed = expect(Check::Refcount, expected, refs);
    violation(page, Invariant::Settled, failed)
}

/// I3: checks the folio of `page` after core mm has moved contents to it, before the migration is
/// finalized. No other task can reach an unmapped page, so the driver's reference is the only one
/// besides those of mappings. KSM is an exception: it finds its folios by number, takes a
/// reference, and waits for the lock.
pub(crate) fn check_destination(page: PageView<'_>) -> Option<Violation> {
    check_settled(page, 1).filter(|_| !page.is_ksm())
}

/// I9: checks the folio of `page` after core mm has moved its contents away. The migration holds
/// `held` references on it; the holder of any other one would continue to use the old page. KSM is
/// an exception: it may have found the folio just before, waits for the lock, and then sees that
/// the folio has moved.
pub(crate) fn check_source(page: PageView<'_>, held: i32) -> Option<Violation> {
    let failed = expect(Check::Refcount, count(held), count(page.refs()));
    violation(page, Invariant::Exclusivity, failed).filter(|_| !page.is_ksm())
}

/// I6: reports that the pagemap of `page`, its first one, has `excess` unexplained references.
pub(crate) fn check_pagemap(page: PageView<'_>, excess: i64) -> Option<Violation> {
    // CAST: The sign extension is intended.
    let failed = expect(Check::Pagemap, 0, excess as u64);
    violation(page, Invariant::Pagemap, failed)
}

/// I4: checks the folio that begins with `page` in `folio_free`. `allocated` is the order with
/// which it was allocated, `None` if it was not. `clean` says that one look at the page has found a small
/// folio that may be freed.
pub(crate) fn check_freed(
    page: PageView<'_>,
    clean: bool,
    allocated: Option<u32>,
) -> Option<Violation> {
    // One read checks all of a small folio.
    if allocated == Some(0) && clean {
        return check_whole(page, Whole::Freed { order: 0 });
    }
    let failed = match allocated {
        Some(order) => freed_folio(&Facts::of_folio(page), order),
        None => Some((Check::State, 1, 0)),
    };
    violation(page, Invariant::Freed, failed).or_else(|| {
        let order = allocated?;
        check_whole(page, Whole::Freed { order })
    })
}

/// I4: checks `page`, a tail of a folio that is being freed.
pub(crate) fn check_tail_freed(page: PageView<'_>) -> Option<Violation> {
    check_free(page, Invariant::Freed)
}

/// I5: checks `page`, which is not in use, at a quiescent point.
pub(crate) fn check_idle(page: PageView<'_>) -> Option<Violation> {
    check_free(page, Invariant::Idle).or_else(|| check_whole(page, Whole::Free))
}

/// I5: checks the folio of `order` in use that begins with `page`, at a quiescent point.
pub(crate) fn check_used(page: PageView<'_>, order: u32, moment: Moment) -> Option<Violation> {
    let is_private = page.memory_type() == MEMORY_DEVICE_PRIVATE;
    let facts = moment.unexplained(&Facts::of_folio(page), is_private)?;
    violation(page, Invariant::Idle, used_folio(&facts, order))
}

/// I7: checks the folio of `page`, which did not leave the device, for reasons that `moment` does
/// not explain. A folio whose only holders are its mappings is a violation, too, because it could
/// have moved.
pub(crate) fn check_stuck(page: PageView<'_>, moment: Moment) -> Option<Violation> {
    let facts = Facts::of_folio(page);
    let is_private = page.memory_type() == MEMORY_DEVICE_PRIVATE;
    let is_held = !is_private && facts.refs > facts.mapcount;
    if moment == Moment::Busy && (facts.locked || is_held) {
        return None;
    }
    let refs = u64::try_from(facts.refs).unwrap_or(0);
    violation(page, Invariant::Teardown, Some((Check::Stuck, 0, refs)))
}

/// I5: checks `page`, a tail of a large folio in use, at a quiescent point.
pub(crate) fn check_tail(page: PageView<'_>, moment: Moment) -> Option<Violation> {
    if moment == Moment::Busy && page.head().bits().is_locked() {
        return None;
    }
    violation(page, Invariant::Idle, tail_page(&Facts::of_page(page)))
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
        tail: false,
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
            (Facts { order: 9, ..FREE }, None),
            (Facts { tail: true, ..FREE }, None),
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
    fn used_folio_conditions() {
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
            (Facts { order: 9, ..used }, Some((Check::Order, 0, 9))),
            (Facts { tail: true, ..used }, Some((Check::Tail, 0, 1))),
        ];
        for (facts, expected) in cases {
            assert_eq!(used_folio(&facts, 0), expected);
        }
    }

    #[test]
    fn busy_moments_explain_locks_and_holders() {
        let used = Facts {
            refs: 1,
            mapcount: 1,
            ..FREE
        };
        let held = Facts { refs: 1025, ..used };
        let left = Facts {
            refs: 1,
            mapcount: 0,
            ..FREE
        };
        let lost = Facts { refs: 0, ..used };
        let locked = Facts {
            locked: true,
            ..left
        };
        let wrong = |facts: &Facts, moment: Moment, is_private| {
            moment
                .unexplained(facts, is_private)
                .is_some_and(|facts| used_folio(&facts, 0).is_some())
        };
        for (facts, quiet, busy_private, busy_reachable) in [
            (used, false, false, false),
            (held, true, true, false),
            (left, true, true, false),
            (lost, true, true, true),
            (locked, true, false, false),
        ] {
            for is_private in [true, false] {
                assert_eq!(wrong(&facts, Moment::Quiet, is_private), quiet);
            }
            assert_eq!(wrong(&facts, Moment::Busy, true), busy_private);
            assert_eq!(wrong(&facts, Moment::Busy, false), busy_reachable);
        }
    }

    #[test]
    fn freed_folio_conditions() {
        assert_eq!(freed_folio(&FREE, 0), None);
        assert_eq!(freed_folio(&FREE, 9), Some((Check::Order, 9, 0)));
        // folio_free may meet a locked folio: migration unlocks before it puts, other users may
        // not.
        assert_eq!(
            freed_folio(
                &Facts {
                    locked: true,
                    ..FREE
                },
                0
            ),
            None
        );
        assert_eq!(
            freed_folio(
                &Facts {
                    anon_exclusive: true,
                    ..FREE
                },
                0
            ),
            Some((Check::AnonExclusive, 0, 1))
        );
        assert_eq!(
            freed_folio(&Facts { mapping: 1, ..FREE }, 0),
            Some((Check::Mapping, 0, 1))
        );
    }
    #[test]
    fn fresh_folio_conditions() {
        let fresh = Facts {
            refs: 1,
            locked: true,
            order: 9,
            ..FREE
        };
        let cases = [
            (fresh, None),
            (Facts { order: 0, ..fresh }, Some((Check::Order, 9, 0))),
            (Facts { refs: 2, ..fresh }, Some((Check::Refcount, 1, 2))),
            (Facts { refs: 0, ..fresh }, Some((Check::Refcount, 1, 0))),
            (
                Facts {
                    locked: false,
                    ..fresh
                },
                Some((Check::Locked, 1, 0)),
            ),
            (
                Facts {
                    mapping: 1,
                    ..fresh
                },
                Some((Check::Mapping, 0, 1)),
            ),
            (
                Facts {
                    tail: true,
                    ..fresh
                },
                Some((Check::Tail, 0, 1)),
            ),
        ];
        for (facts, expected) in cases {
            assert_eq!(fresh_folio(&facts, 9), expected);
        }
    }

    #[test]
    fn tail_page_conditions() {
        let tail = Facts { tail: true, ..FREE };
        assert_eq!(tail_page(&tail), None);
        assert_eq!(tail_page(&FREE), Some((Check::Tail, 1, 0)));
        assert_eq!(
            tail_page(&Facts { refs: 1, ..tail }),
            Some((Check::Refcount, 0, 1))
        );
    }
}
