// SPDX-License-Identifier: GPL-2.0

//! A chunk of device memory, with the callbacks of its pagemap.

#![forbid(unsafe_code)]

use super::core_data::Core;
use crate::{
    audit::{
        check_freed,
        check_tail_freed,
        Event,
        Ledger,
        Violation, //
    },
    driver::fault_around::files::Movers,
    mm::{
        page::device_folio::FreedFolio,
        pagemap::{
            fault::{
                FaultError,
                VmFault, //
            },
            ops::{
                PagemapOps,
                PrivateOps, //
            },
        },
        region::{
            frames::Frames,
            free_stack::FreeStack, //
        },
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The driver's data of one pagemap.
pub(in crate::driver) struct Chunk {
    core: Arc<Core>,
    /// The number of the chunk in the device.
    number: usize,
    /// Freed folios that the allocator has not taken back yet.
    freed: FreeStack,
    ledger: Ledger,
    movers: Movers,
}

impl Chunk {
    /// Chunk `number` of a device, with the pages of `frames`. May sleep.
    pub(super) fn new(core: Arc<Core>, number: usize, frames: Frames) -> Result<Self> {
        let ledger = Ledger::new(if core.keeps_ledger { frames.pages() } else { 0 })?;
        Ok(Self {
            core,
            number,
            freed: FreeStack::new(frames)?,
            ledger,
            movers: Movers::new(frames.pages())?,
        })
    }

    /// The last transitions of its pages.
    pub(in crate::driver) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The clients that moved its pages to the device.
    pub(in crate::driver) fn movers(&self) -> &Movers {
        &self.movers
    }

    /// Takes the result of a check of page `index`. Returns whether it was a violation. Does not
    /// sleep.
    #[inline]
    pub(in crate::driver) fn judge(&self, index: usize, outcome: Option<Violation>) -> bool {
        outcome.is_some_and(|violation| self.report(index, violation))
    }

    /// Counts suspects that a later look did not find in the same state.
    pub(in crate::driver) fn heal(&self, suspects: u64) {
        self.core.auditor.heal(suspects);
    }

    #[cold]
    fn report(&self, index: usize, violation: Violation) -> bool {
        let told = violation.after(self.ledger.last(index));
        self.core.auditor.judge(Some(told))
    }

    /// The number of the chunk in the device.
    pub(in crate::driver) fn number(&self) -> usize {
        self.number
    }

    /// Freed folios that the allocator has not taken back yet.
    pub(super) fn freed(&self) -> &FreeStack {
        &self.freed
    }
}

impl PagemapOps for Chunk {
    const NAME: &'static CStr = c"hmm_dmirror";

    // There is one caller, and a call would take all of `folio` through memory.
    #[inline(always)]
    fn folio_free(&self, folio: FreedFolio<'_>) {
        let core = &self.core;
        let index = folio.index();
        if core.auditor.is_on()
            && !self.judge(index, check_freed(folio.page(), folio.is_clean_small(), folio.allocated_order()))
            // Checking all tails at once is cheaper. The per-page check below only adds detail
            // to the report.
            && !folio.has_clean_tails()
        {
            for (i, tail) in folio.tails() {
                self.judge(i, check_tail_freed(tail));
            }
        }
        if let Some(free) = folio.into_free() {
            self.ledger.note_recent(index, Event::Freed, free.order());
            // The stack has room for all pages of the chunk. A refused folio would never be
            // allocated again, and the memory would stay registered.
            let _ = self.freed.push(free);
        }
    }

    fn folio_split(&self, index: usize, order: u32) {
        self.ledger.note(index, Event::Split, order);
    }
}

impl PrivateOps for Chunk {
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError> {
        self.core.handle_fault(&self.ledger, &self.movers, fault)
    }
}
