// SPDX-License-Identifier: GPL-2.0

//! The oracle: the conditions that ZONE_DEVICE pages must meet, and the records of violations.
//!
//! The oracle reads pages through [`PageView`] only and knows nothing of the driver.
//! `Documentation/invariants.rst` numbers the invariants.

#![forbid(unsafe_code)]

mod checks;
mod foreign;
mod ledger;
mod mirror;
mod report;
mod whole;

pub(crate) use checks::{
    check_allocated,
    check_born,
    check_destination,
    check_freed,
    check_fresh,
    check_fresh_tail,
    check_idle,
    check_pagemap,
    check_settled,
    check_source,
    check_stuck,
    check_tail,
    check_tail_freed,
    check_used,
    Moment, //
};
pub(crate) use foreign::{
    check_foreign,
    explained_refs,
    Fault, //
};
pub(crate) use ledger::{
    Event,
    Ledger,
    Transition, //
};
pub(crate) use mirror::{
    check_collected,
    check_in_place,
    check_mapped,
    check_mirror, //
};
pub(crate) use report::{
    Auditor,
    Policy, //
};
pub(crate) use whole::{
    check_used_whole,
    whole_pages, //
};

use crate::{
    mm::page::view::PageView,
    uapi::{
        ZdmViolation,
        MEMORY_DEVICE_COHERENT,
        MEMORY_DEVICE_GENERIC,
        MEMORY_DEVICE_PRIVATE, //
    },
};
use kernel::{
    fmt,
    prelude::*, //
};

/// A broken rule. The uapi reports its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Invariant {
    /// After registration every page has count 0.
    Born = 1,
    /// A page is allocated only at count 0, unlocked and clean.
    HandedOut = 2,
    /// Each reference on a page in use belongs to a mapping, or to a task that is working on the
    /// page.
    Settled = 3,
    /// `folio_free` runs once per allocation, at count 0 and on a clean page.
    Freed = 4,
    /// At a quiescent point a page is free if and only if its count is 0.
    Idle = 5,
    /// A pagemap has its own reference and one for each page in use.
    Pagemap = 6,
    /// After eviction every count is 0.
    Teardown = 7,
    /// A held page does not migrate.
    Exclusivity = 9,
    /// Each mapping that a folio counts is an entry of a page table.
    Mapped = 11,
    /// The device maps the CPU's pages, with no more rights.
    Mirror = 12,
    /// A migration changes only the place of a page.
    InPlace = 13,
    /// Every field of a free or fresh struct page is explained.
    Whole = 14,
}

impl Invariant {
    fn name(self) -> &'static str {
        match self {
            Self::Born => "I1 born",
            Self::HandedOut => "I2 handed out",
            Self::Settled => "I3 settled",
            Self::Freed => "I4 freed",
            Self::Idle => "I5 idle",
            Self::Pagemap => "I6 pagemap",
            Self::Teardown => "I7 teardown",
            Self::Exclusivity => "I9 exclusivity",
            Self::Mapped => "I11 mapped",
            Self::Mirror => "I12 mirror",
            Self::InPlace => "I13 in place",
            Self::Whole => "I14 whole",
        }
    }
}

/// The failed condition of an invariant: `enum zdm_check` of the uapi.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Check {
    Refcount = 1,
    Mapcount = 2,
    Locked = 3,
    Mapping = 4,
    Order = 5,
    State = 6,
    AnonExclusive = 7,
    Memcg = 8,
    Lru = 9,
    Stuck = 10,
    Tail = 11,
    Pagemap = 12,
    Flags = 13,
    Private = 14,
    Index = 15,
    Type = 16,
    Entire = 17,
    Pins = 18,
    Deferred = 19,
    Data = 20,
    PagesMapped = 21,
    Pages = 22,
    Entries = 23,
    Frame = 24,
    Rights = 25,
    Marks = 26,
}

impl Check {
    fn name(self) -> &'static str {
        match self {
            Self::Refcount => "refcount",
            Self::Mapcount => "mapcount",
            Self::Locked => "locked",
            Self::Mapping => "mapping",
            Self::Order => "order",
            Self::State => "state",
            Self::AnonExclusive => "anon_exclusive",
            Self::Memcg => "memcg",
            Self::Lru => "lru",
            Self::Stuck => "stuck",
            Self::Tail => "tail",
            Self::Pagemap => "pagemap",
            Self::Flags => "flags",
            Self::Private => "private",
            Self::Index => "index",
            Self::Type => "type",
            Self::Entire => "entire",
            Self::Pins => "pins",
            Self::Deferred => "deferred",
            Self::Data => "zone_device_data",
            Self::PagesMapped => "nr_pages_mapped",
            Self::Pages => "nr_pages",
            Self::Entries => "entries",
            Self::Frame => "frame",
            Self::Rights => "rights",
            Self::Marks => "marks",
        }
    }
}

/// One broken invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) invariant: Invariant,
    pub(crate) check: Check,
    pub(crate) pfn: usize,
    /// The type of the memory, `enum memory_type`.
    pub(crate) memory_type: u32,
    pub(crate) order: u32,
    pub(crate) expected: u64,
    pub(crate) found: u64,
    /// The page's last transition, if it is known.
    pub(crate) last: Transition,
}

impl Violation {
    /// Makes a violation on `page`.
    pub(crate) fn on(
        page: PageView<'_>,
        invariant: Invariant,
        check: Check,
        expected: u64,
        found: u64,
    ) -> Self {
        Self {
            invariant,
            check,
            pfn: page.pfn(),
            memory_type: page.memory_type(),
            order: page.order(),
            expected,
            found,
            last: Transition::NONE,
        }
    }

    /// Adds the last transition of the page.
    pub(crate) fn after(self, last: Transition) -> Self {
        Self { last, ..self }
    }

    /// Removes everything that only `CAP_SYS_ADMIN` may see: page frame numbers, kernel addresses,
    /// and the pid of the last transition.
    pub(crate) fn redacted(self) -> Self {
        let (expected, found) = match self.check {
            Check::Mapping | Check::Memcg | Check::Private | Check::Data | Check::Frame => (0, 0),
            _ => (self.expected, self.found),
        };
        Self {
            pfn: 0,
            expected,
            found,
            last: Transition {
                pid: 0,
                ..self.last
            },
            ..self
        }
    }

    /// The name of the type of memory.
    fn type_name(&self) -> &'static str {
        match self.memory_type {
            MEMORY_DEVICE_PRIVATE => "PRIVATE",
            MEMORY_DEVICE_COHERENT => "COHERENT",
            MEMORY_DEVICE_GENERIC => "GENERIC",
            0 => "SYSTEM",
            _ => "?",
        }
    }

    /// Converts the violation for user space.
    pub(crate) fn to_uapi(self) -> ZdmViolation {
        ZdmViolation {
            invariant: self.invariant as u32,
            check: self.check as u32,
            pfn: self.pfn as u64,
            expected: self.expected,
            found: self.found,
            order: self.order,
            type_: self.memory_type,
            last_time: self.last.time,
            last_event: self.last.event as u32,
            last_pid: self.last.pid,
            last_order: self.last.order,
            reserved: 0,
        }
    }
}

/// The text of a violation in the log and in debugfs.
impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} pfn={:#x} order={} type={} check={} expected={:#x} found={:#x}",
            self.invariant.name(),
            self.pfn,
            self.order,
            self.type_name(),
            self.check.name(),
            self.expected,
            self.found,
        )
    }
}

#[kunit_tests(zdmirror_audit)]
mod tests {
    use super::*;
    use kernel::str::CString;

    #[test]
    fn redacted_violation_names_no_page() {
        let last = Transition {
            pid: 42,
            time: 7,
            ..Transition::NONE
        };
        let violation = |check| Violation {
            invariant: Invariant::Idle,
            check,
            pfn: 0x1234,
            memory_type: MEMORY_DEVICE_COHERENT,
            order: 0,
            expected: 0,
            found: 0xffff_8880_0000_1000,
            last,
        };
        for check in [Check::Mapping, Check::Memcg] {
            let found = violation(check).redacted();
            assert_eq!((found.pfn, found.found, found.last.pid), (0, 0, 0));
        }
        let found = violation(Check::Refcount).redacted();
        assert_eq!(found.found, 0xffff_8880_0000_1000);
        assert_eq!((found.pfn, found.last.pid, found.last.time), (0, 0, 7));
    }

    #[test]
    fn text_of_a_violation() -> Result {
        let violation = Violation {
            invariant: Invariant::Idle,
            check: Check::Refcount,
            pfn: 0x1234,
            memory_type: MEMORY_DEVICE_COHERENT,
            order: 9,
            expected: 0,
            found: u64::MAX,
            last: Transition::NONE,
        };
        let text = CString::try_from_fmt(fmt!("{}", violation))?;
        let expected = c"I5 idle pfn=0x1234 order=9 type=COHERENT check=refcount \
                         expected=0x0 found=0xffffffffffffffff";
        assert_eq!(text.to_bytes(), expected.to_bytes());
        Ok(())
    }
}
