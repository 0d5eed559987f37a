// SPDX-License-Identifier: GPL-2.0

//! I11, I12 and I13: conditions that compare with page tables. Only with the module parameter
//! `strict`.

#![forbid(unsafe_code)]

use super::{
    Check,
    Invariant,
    Transition,
    Violation, //
};
use crate::mm::{
    oracle::walk::{
        Change,
        Marks,
        Untruth, //
    },
    page::view::PageView, //
};
use kernel::prelude::*;

/// Rights in the form of the uapi.
fn rights(write: bool) -> u64 {
    if write {
        3
    } else {
        1
    }
}

/// I12: makes a violation from a difference between a device's page table and the CPU's.
pub(crate) fn check_mirror(untruth: &Untruth) -> Violation {
    let same = untruth.cpu_pfn == Some(untruth.device_pfn);
    let (check, expected, found) = if same {
        (
            Check::Rights,
            rights(untruth.cpu_write),
            rights(untruth.device_write),
        )
    } else {
        let cpu = untruth.cpu_pfn.unwrap_or(0);
        (Check::Frame, cpu as u64, untruth.device_pfn as u64)
    };
    Violation {
        invariant: Invariant::Mirror,
        check,
        pfn: untruth.device_pfn,
        memory_type: 0,
        order: 0,
        expected,
        found,
        last: Transition::NONE,
    }
}

/// Whether a migration may change a page as `change` says, in an address space that no other task uses.
///
/// Allowed changes, for which the migration is not responsible:
///
/// - a page in a hole, or in the place of the page of zeroes, which has been written to as after a fault, and is
///   protected as that was;
/// - a page that khugepaged has collapsed meanwhile, which is another page;
/// - an empty page of a large folio: the split of the folio maps the page of zeroes in its place, and the
///   migration fills that with a new page, which has the area's rights;
/// - rights that grow as far as the area allows, if the task took a fault, as when a swapped page comes back;
/// - `WRITE` and `EXCLUSIVE` of areas that KSM may look at;
/// - `SOFT_DIRTY` that is set: `remove_migration_pmd()` sets it if the page is dirty;
/// - `YOUNG` that reclaim clears, or that an access sets.
fn is_in_place(change: &Change) -> bool {
    let (then, now) = (change.then.bits(), change.now.bits());
    let is = |marks, bit| marks & bit != 0;
    if !is(now, Marks::MAPPED) {
        return true;
    }
    // This also holds for a page that fills a hole.
    if is(now, Marks::WRITE) && !is(now, Marks::AREA_WRITE) {
        return false;
    }
    let is_collapsed = is(now, Marks::HUGE) && !is(then, Marks::HUGE);
    let is_refilled = is(then, Marks::LARGE) && change.is_empty;
    if is_collapsed || is_refilled {
        return true;
    }
    if !is(then, Marks::MAPPED) {
        // A page of a file is mapped as it is.
        let is_new = is(then, Marks::HOLE) && is(now, Marks::EXCLUSIVE);
        let is_protected = is(then, Marks::UFFD);
        return !is_new || is(now, Marks::SOFT_DIRTY) && (!is_protected || is(now, Marks::UFFD));
    }
    let both = |bit| is(then & now, bit);
    let mut kept = Marks::SOFT_DIRTY | Marks::UFFD | Marks::DIRTY;
    let mut not_gained = Marks::UFFD;
    if !is(now, Marks::MERGEABLE) {
        kept |= Marks::WRITE | Marks::EXCLUSIVE;
        if !change.is_faulted {
            not_gained |= Marks::WRITE | Marks::EXCLUSIVE;
        }
    }
    if both(Marks::PRESENT) && !change.is_scanned {
        kept |= Marks::YOUNG;
    }
    then & !now & kept == 0 && now & !then & not_gained == 0
}

/// I13: a page of an address space, before a migration and after it.
pub(crate) fn check_in_place(change: &Change) -> Option<Violation> {
    (!is_in_place(change)).then(|| Violation {
        invariant: Invariant::InPlace,
        check: Check::Marks,
        pfn: change.index,
        memory_type: 0,
        order: 0,
        expected: change.then.bits().into(),
        found: change.now.bits().into(),
        last: Transition::NONE,
    })
}

/// I13: core mm's account of what it has collected of a range for a migration, from page number `index` on, differs
/// from what it has collected.
pub(crate) fn check_collected(index: usize, (expected, found): (usize, usize)) -> Violation {
    Violation {
        invariant: Invariant::InPlace,
        check: Check::Entries,
        pfn: index,
        memory_type: 0,
        order: 0,
        expected: expected as u64,
        found: found as u64,
        last: Transition::NONE,
    }
}

/// I11: checks the folio of `page`, which is in use. Each mapping that the folio counts must be an entry
/// of a page table that rmap finds, because I3 and I5 accept a reference for each counted mapping.
pub(crate) fn check_mapped(page: PageView<'_>) -> Option<Violation> {
    let before = page.mapcount();
    let entries = page.entries()?;
    // Other tasks map and unmap the folio.
    if entries == before || page.mapcount() != before {
        return None;
    }
    let count = |n| u64::try_from(n).unwrap_or(0);
    let (expected, found) = (count(entries), count(before));
    Some(Violation::on(
        page,
        Invariant::Mapped,
        Check::Entries,
        expected,
        found,
    ))
}

#[kunit_tests(zdmirror_audit_mirror)]
mod tests {
    use super::*;
    use crate::mm::oracle::walk::Passing;

    const PAGE: u32 = Marks::MAPPED | Marks::AREA_WRITE | Marks::EXCLUSIVE | Marks::PRESENT;

    fn change(then: u32, now: u32) -> Change {
        Change {
            index: 7,
            then: Marks::from_bits(then),
            now: Marks::from_bits(now),
            is_faulted: false,
            is_scanned: false,
            is_empty: false,
        }
    }

    #[test]
    fn what_a_migration_may_change() {
        let w = PAGE | Marks::WRITE;
        let away = PAGE & !Marks::PRESENT;
        let cases = [
            (w, w, true),
            (w, PAGE, false),
            (PAGE, w, false),
            (w, w & !Marks::EXCLUSIVE, false),
            (PAGE | Marks::UFFD, PAGE, false),
            (PAGE, PAGE | Marks::UFFD, false),
            (w | Marks::SOFT_DIRTY, w, false),
            (w, w | Marks::SOFT_DIRTY, true),
            (w | Marks::DIRTY, away | Marks::WRITE, false),
            (w | Marks::YOUNG, w, false),
            (w | Marks::YOUNG, away | Marks::WRITE, true),
            (w, w | Marks::YOUNG, true),
            // A hole, filled with the area's rights, and with more.
            (Marks::AREA_WRITE, w, true),
            (Marks::HOLE, w | Marks::SOFT_DIRTY, true),
            (Marks::HOLE, w, false),
            (Marks::HOLE | Marks::UFFD, PAGE | Marks::SOFT_DIRTY, false),
            (
                Marks::HOLE | Marks::UFFD,
                PAGE | Marks::SOFT_DIRTY | Marks::UFFD,
                true,
            ),
            (Marks::HOLE, PAGE & !Marks::EXCLUSIVE, true),
            (0, w & !Marks::AREA_WRITE, false),
            // The page is gone: swapped out, or in motion.
            (w, Marks::AREA_WRITE, true),
            (PAGE, w | Marks::HUGE, true),
            (w | Marks::MERGEABLE, PAGE | Marks::MERGEABLE, true),
        ];
        for (then, now, is_right) in cases {
            assert_eq!(is_in_place(&change(then, now)), is_right);
        }
    }

    #[test]
    fn what_explains_a_change() {
        let w = PAGE | Marks::WRITE;
        let gained = change(PAGE, w);
        assert!(is_in_place(&Change {
            is_faulted: true,
            ..gained
        }));
        let lost = change(w | Marks::YOUNG, w);
        assert!(is_in_place(&Change {
            is_scanned: true,
            ..lost
        }));
        // The split of a small folio maps no zero page.
        let empty = |then| Change {
            is_empty: true,
            ..change(then | Marks::SOFT_DIRTY, w)
        };
        assert!(is_in_place(&empty(PAGE | Marks::LARGE)));
        assert!(!is_in_place(&empty(PAGE)));
        // Nothing explains a right that the area does not have.
        let beyond = change(Marks::MAPPED | Marks::LARGE, Marks::MAPPED | Marks::WRITE);
        assert!(!is_in_place(&Change {
            is_faulted: true,
            is_empty: true,
            ..beyond
        }));
    }

    #[test]
    fn what_is_untrue() {
        let untruth = Untruth {
            index: 7,
            device_pfn: 0x100,
            device_write: true,
            cpu_pfn: Some(0x100),
            cpu_write: false,
            passing: Passing::Nothing,
        };
        for (cpu_pfn, check, expected, found) in [
            (Some(0x100), Check::Rights, 1, 3),
            (Some(0x200), Check::Frame, 0x200, 0x100),
            (None, Check::Frame, 0, 0x100),
        ] {
            let violation = check_mirror(&Untruth { cpu_pfn, ..untruth });
            assert_eq!(
                (violation.check, violation.expected, violation.found),
                (check, expected, found)
            );
        }
    }
}
