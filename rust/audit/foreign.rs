// SPDX-License-Identifier: GPL-2.0

//! What must hold for a page of any pagemap, without knowing what its owner does with it.

#![forbid(unsafe_code)]

use crate::mm::{
    inspect::PageFacts,
    memory_type::MemoryType, //
};
use kernel::{
    fmt,
    prelude::*, //
};

/// What is wrong with a page of somebody's pagemap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The reference count is below 0.
    NegativeCount,
    /// Page table entries map a folio without references.
    MappedAtZero,
    /// More page table entries map a folio than it has references.
    MapcountAboveCount,
    /// A memory cgroup is charged for a free folio.
    ChargedAtZero,
    /// A folio of ZONE_DEVICE memory is on an LRU list.
    OnLru,
    /// A free folio of memory whose owner is told of freed folios still has a mapping.
    MappingAtZero,
    /// A free folio still has `PG_anon_exclusive`.
    ExclusiveAtZero,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NegativeCount => "count below 0",
            Self::MappedAtZero => "mapped at count 0",
            Self::MapcountAboveCount => "mapcount above count",
            Self::ChargedAtZero => "charged at count 0",
            Self::OnLru => "on an LRU list",
            Self::MappingAtZero => "mapping set at count 0",
            Self::ExclusiveAtZero => "anon_exclusive at count 0",
        })
    }
}

/// Judges one look at the first page of a folio, and at any page that is free. Does not sleep.
///
/// fs/dax and device-dax without `folio_free` keep `folio->mapping` while nothing maps a folio, so
/// a mapping is a fault only where `has_folio_free` says that freed folios go back to the owner.
pub(crate) fn check_foreign(facts: &PageFacts, has_folio_free: bool) -> Option<Fault> {
    let free = facts.refs == 0;
    if facts.refs < 0 {
        Some(Fault::NegativeCount)
    } else if free && facts.mapcount > 0 {
        Some(Fault::MappedAtZero)
    } else if facts.mapcount > facts.refs {
        Some(Fault::MapcountAboveCount)
    } else if facts.bits.is_lru() {
        Some(Fault::OnLru)
    } else if !free {
        None
    } else if facts.bits.is_charged() {
        Some(Fault::ChargedAtZero)
    } else if has_folio_free && facts.bits.has_mapping() {
        Some(Fault::MappingAtZero)
    } else if facts.anon_exclusive && facts.memory_type != 0 && has_folio_free {
        Some(Fault::ExclusiveAtZero)
    } else {
        None
    }
}

/// References that a `dev_pagemap` has for what is known: `None` where that differs between kernels.
///
/// PRIVATE and COHERENT memory has one for its registration and one per page in use. Other types
/// have one per page from the start, unless the owner is told of freed folios.
pub(crate) fn explained_refs(
    memory_type: u32,
    has_folio_free: bool,
    used: usize,
    pages: usize,
) -> Option<usize> {
    if MemoryType::counts_used_pages(memory_type) {
        Some(1 + used)
    } else if !has_folio_free {
        Some(1 + pages)
    } else {
        None
    }
}

#[kunit_tests(zdmirror_foreign)]
mod tests {
    use super::*;
    use crate::mm::{
        inspect::Ownership,
        page::PageBits, //
    };

    fn facts(refs: i32, mapcount: i32) -> PageFacts {
        PageFacts {
            pfn: 512,
            refs,
            mapcount,
            pins: 0,
            order: 0,
            index: 0,
            memory_type: MemoryType::PRIVATE,
            ownership: Ownership::Remote,
            bits: PageBits::default(),
            anon_exclusive: false,
            zero: false,
        }
    }

    #[test]
    fn counts_alone() {
        for (refs, mapcount, fault) in [
            (0, 0, None),
            (1, 0, None),
            (1, 1, None),
            (3, 2, None),
            (-1, 0, Some(Fault::NegativeCount)),
            (0, 1, Some(Fault::MappedAtZero)),
            (1, 2, Some(Fault::MapcountAboveCount)),
        ] {
            assert_eq!(check_foreign(&facts(refs, mapcount), true), fault);
        }
    }

    #[test]
    fn anon_exclusive_of_a_free_page() {
        let stale = PageFacts {
            anon_exclusive: true,
            ..facts(0, 0)
        };
        assert_eq!(check_foreign(&stale, true), Some(Fault::ExclusiveAtZero));
        assert_eq!(check_foreign(&stale, false), None);
        let used = PageFacts { refs: 1, ..stale };
        assert_eq!(check_foreign(&used, true), None);
    }

    #[test]
    fn references_by_type() {
        assert_eq!(explained_refs(MemoryType::PRIVATE, true, 3, 100), Some(4));
        assert_eq!(explained_refs(0, false, 3, 100), Some(101));
        assert_eq!(explained_refs(0, true, 3, 100), None);
    }
}
