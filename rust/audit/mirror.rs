// SPDX-License-Identifier: GPL-2.0

//! I11, I12 and I13: what page tables must bear out. With the module parameter `strict` only.

#![forbid(unsafe_code)]

use super::{
    Check,
    Invariant,
    Transition,
    Violation, //
};
use crate::mm::{
    page::PageView,
    walk::{
        Marks,
        Untruth, //
    }, //
};
use kernel::prelude::*;

/// Rights as the uapi carries them.
fn rights(write: bool) -> u64 {
    if write {
        3
    } else {
        1
    }
}

/// I12: what a comparison of a device's page table with the CPU's has found.
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

/// Whether a migration may leave a page with the marks `now` that had `then`, in an address space that no
/// other task uses.
fn is_in_place(then: Marks, now: Marks) -> bool {
    let (then, now) = (then.bits(), now.bits());
    let is = |marks, bit| marks & bit != 0;
    if !is(now, Marks::MAPPED) {
        return true;
    }
    // A page that fills a hole, too.
    if is(now, Marks::WRITE) && !is(now, Marks::AREA_WRITE) {
        return false;
    }
    // What khugepaged has collapsed is another page.
    let is_collapsed = is(now, Marks::HUGE) && !is(then, Marks::HUGE);
    if !is(then, Marks::MAPPED) || is_collapsed {
        return true;
    }
    // remove_migration_pmd() sets the mark where the page is dirty.
    let lost = then & !now & Marks::SOFT_DIRTY;
    let mut same = Marks::UFFD;
    if !is(now, Marks::MERGEABLE) {
        same |= Marks::WRITE | Marks::EXCLUSIVE;
    }
    lost == 0 && (then ^ now) & same == 0
}

/// I13: page number `index` of an address space, before a migration and after it.
pub(crate) fn check_in_place(index: usize, then: Marks, now: Marks) -> Option<Violation> {
    (!is_in_place(then, now)).then(|| Violation {
        invariant: Invariant::InPlace,
        check: Check::Marks,
        pfn: index,
        memory_type: 0,
        order: 0,
        expected: then.bits().into(),
        found: now.bits().into(),
        last: Transition::NONE,
    })
}

/// I11: the folio of `page` is in use. Each mapping that it counts is an entry of a page table, which
/// rmap finds; a count that nothing stands behind passes for a reference that is explained.
pub(crate) fn check_mapped(page: PageView<'_>) -> Option<Violation> {
    let before = page.mapcount();
    let entries = page.entries()?;
    // Other tasks map and unmap it.
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

    #[test]
    fn what_is_untrue() {
        let untruth = Untruth {
            index: 7,
            device_pfn: 0x100,
            device_write: true,
            cpu_pfn: Some(0x100),
            cpu_write: false,
            passes: false,
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
