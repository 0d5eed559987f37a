// SPDX-License-Identifier: GPL-2.0

//! The conditions that a page of any pagemap must meet, independent of its owner.

#![forbid(unsafe_code)]

use crate::mm::{
    hmm::inspect::PageFacts,
    region::memory_type::MemoryType, //
};
use kernel::{
    fmt,
    prelude::*, //
};

/// A fault of a page of any pagemap.
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
    /// A free folio of PRIVATE or COHERENT memory still has a mapping.
    MappingAtZero,
    /// A free folio of PRIVATE or COHERENT memory still has `PG_anon_exclusive`.
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

/// Checks the facts of the first page of a folio, or of a free page. Does not sleep.
///
/// fs/dax and device-dax keep `folio->mapping` while a folio is unmapped. Core mm clears the
/// mapping of a freed folio only for PRIVATE and COHERENT memory, so only there is it a fault.
pub(crate) fn check_foreign(facts: &PageFacts) -> Option<Fault> {
    let free = facts.refs == 0;
    let is_cleared = MemoryType::counts_used_pages(facts.memory_type);
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
    } else if is_cleared && facts.bits.has_mapping() {
        Some(Fault::MappingAtZero)
    } else if is_cleared && facts.anon_exclusive {
        Some(Fault::ExclusiveAtZero)
    } else {
        None
    }
}

/// The number of explained references of a `dev_pagemap`; `None` if the number differs between
/// kernels.
///
/// PRIVATE and COHERENT memory has one for its registration and one per page in use. Other types
/// have one per page from the start, unless the owner has `folio_free`.
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
        hmm::inspect::Ownership,
        page::view::PageBits, //
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
            assert_eq!(check_foreign(&facts(refs, mapcount)), fault);
        }
    }

    #[test]
    fn anon_exclusive_of_a_free_page() {
        let stale = PageFacts {
            anon_exclusive: true,
            ..facts(0, 0)
        };
        assert_eq!(check_foreign(&stale), Some(Fault::ExclusiveAtZero));
        // The memory has another type.
        let other = PageFacts {
            memory_type: 0,
            anon_exclusive: true,
            ..facts(0, 0)
        };
        assert_eq!(check_foreign(&other), None);
        let used = PageFacts {
            refs: 1,
            anon_exclusive: true,
            ..facts(0, 0)
        };
        assert_eq!(check_foreign(&used), None);
    }

    #[test]
    fn references_by_type() {
        assert_eq!(explained_refs(MemoryType::PRIVATE, true, 3, 100), Some(4));
        assert_eq!(explained_refs(0, false, 3, 100), Some(101));
        assert_eq!(explained_refs(0, true, 3, 100), None);
    }
}
