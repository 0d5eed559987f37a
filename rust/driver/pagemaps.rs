// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/zdmirror/pagemaps`: every ZONE_DEVICE pagemap of the system, with its broken
//! pages. Each read is a new survey; `watch -n 5 cat pagemaps` repeats it.

#![forbid(unsafe_code)]

use crate::{
    audit::{
        check_foreign,
        explained_refs,
        Fault, //
    },
    debugfs::{
        Dir,
        Source,
        Text,
        TextFile, //
    },
    mm::{
        hmm::inspect::{
            inspect_pfns,
            PageFacts, //
        },
        module::scope::ModuleScope,
        oracle::survey,
        region::{
            memory_type::MemoryType,
            owner::PgmapOwner, //
        },
        PUD_ORDER, //
    },
};
use core::ops::Range;
use kernel::{
    prelude::*,
    sync::Arc,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The number of broken pages that are listed per pagemap. All of them are counted.
const LISTED: usize = 16;

/// The time in milliseconds between the two reads that must find the same fault.
const PAUSE_MS: i64 = 2;

/// The file, for as long as it lives.
pub(crate) struct PagemapsFile {
    _file: TextFile<Pagemaps>,
}

impl PagemapsFile {
    /// Makes the file in `root`. May sleep.
    pub(crate) fn new(root: &Arc<Dir>, scope: &Arc<ModuleScope>) -> Result<Self> {
        let source = Pagemaps(PgmapOwner::in_scope(scope.clone())?);
        Ok(Self {
            _file: TextFile::new(root.clone(), c"pagemaps", source)?,
        })
    }
}

/// The survey. The owner has no pagemap; it only represents the caller.
struct Pagemaps(Arc<PgmapOwner>);

/// The counts of a survey for one range of a pagemap, in base pages except `folios`.
struct Tally {
    pages: usize,
    free: usize,
    used: usize,
    pinned: usize,
    mapped: usize,
    folios: [usize; PUD_ORDER as usize + 1],
    broken: usize,
    /// The page frame, fault and counts of the first broken folios.
    list: KVec<(PageFacts, Fault)>,
}

impl Tally {
    fn new() -> Result<Self> {
        Ok(Self {
            pages: 0,
            free: 0,
            used: 0,
            pinned: 0,
            mapped: 0,
            folios: [0; PUD_ORDER as usize + 1],
            broken: 0,
            list: KVec::with_capacity(LISTED, GFP_KERNEL)?,
        })
    }

    /// Adds the facts of a free page, or of the first page of a folio in use.
    fn add(&mut self, facts: &PageFacts) {
        let unused = facts.refs <= MemoryType::free_refs(facts.memory_type) && facts.mapcount == 0;
        // A free page may still look like a part of its last large folio.
        let order = if unused { 0 } else { facts.order };
        let pages = 1 << order;
        self.pages += pages;
        if unused {
            self.free += pages;
            return;
        }
        self.used += pages;
        self.pinned += if facts.pins > 0 { pages } else { 0 };
        self.mapped += if facts.mapcount > 0 { pages } else { 0 };
        if let Some(folios) = self.folios.get_mut(order as usize) {
            *folios += 1;
        }
    }

    fn record(&mut self, facts: &PageFacts, fault: Fault) {
        self.broken += 1;
        if self.list.len() < LISTED {
            // The list was allocated with room for it.
            let _full = self.list.push_within_capacity((*facts, fault));
        }
    }
}

impl Pagemaps {
    /// Whether a second read, a moment later, finds the same fault with the same counts. Pages that
    /// are allocated, split or freed meanwhile are in motion, and not broken. May sleep.
    fn still_broken(&self, first: &PageFacts, fault: Fault) -> bool {
        fsleep(Delta::from_millis(PAUSE_MS));
        let mut again = [None];
        let looked = inspect_pfns(first.pfn, &mut again, &self.0, |facts| facts);
        let [again] = again;
        looked.is_ok()
            && again.is_some_and(|facts| facts == *first && check_foreign(&facts) == Some(fault))
    }

    fn survey(&self, range: &Range<usize>, text: &mut Text) -> Result {
        let mut tally = Tally::new()?;
        let surveyed = survey::examine(range, &self.0, |facts| {
            tally.add(facts);
            match check_foreign(facts) {
                Some(fault) if self.still_broken(facts, fault) => {
                    tally.record(facts, fault);
                }
                _ => {}
            }
            Ok(())
        })?;
        let Some(says) = surveyed else {
            return text.line(fmt!("pagemap {:#x} gone", range.start));
        };
        let name = MemoryType::name(says.memory_type);
        match says.function {
            Some(function) => text.line(fmt!(
                "pagemap {:#x}-{:#x} {} {}",
                range.start,
                range.end,
                name,
                function
            ))?,
            None => text.line(fmt!(
                "pagemap {:#x}-{:#x} {} -",
                range.start,
                range.end,
                name
            ))?,
        }
        let explained = explained_refs(
            says.memory_type,
            says.has_folio_free,
            tally.used,
            tally.pages,
        );
        match explained {
            Some(explained) => {
                text.line(fmt!("  references {} explained {}", says.refs, explained))?;
            }
            None => text.line(fmt!("  references {}", says.refs))?,
        }
        text.line(fmt!(
            "  pages {} free {} used {} mapped {} pinned {}",
            tally.pages,
            tally.free,
            tally.used,
            tally.mapped,
            tally.pinned
        ))?;
        for (order, folios) in tally.folios.iter().enumerate().filter(|(_, n)| **n > 0) {
            text.line(fmt!("  folios of order {} in use {}", order, folios))?;
        }
        text.line(fmt!("  broken {}", tally.broken))?;
        for (facts, fault) in &tally.list {
            text.line(fmt!(
                "    pfn {:#x} order {} count {} mapcount {} pins {}: {}",
                facts.pfn,
                facts.order,
                facts.refs,
                facts.mapcount,
                facts.pins,
                fault
            ))?;
        }
        Ok(())
    }
}

impl Source for Pagemaps {
    fn write(&self, text: &mut Text) -> Result {
        for range in &survey::find()? {
            self.survey(range, text)?;
        }
        Ok(())
    }
}
