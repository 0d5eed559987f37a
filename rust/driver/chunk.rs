// SPDX-License-Identifier: GPL-2.0

//! A chunk of device memory: what core mm calls the driver for.

#![forbid(unsafe_code)]

use super::{
    freed::Freed,
    migrate::copy_back,
    pool::OpenerId,
    stats::Stats, //
};
use crate::{
    audit::{
        check_freed,
        check_settled,
        check_tail_freed,
        Auditor,
        Event,
        Ledger,
        Policy,
        Violation, //
    },
    mm::{
        device_folio::FreedFolio,
        fault::{
            FaultError,
            VmFault, //
        },
        migrate::PfnBuffer,
        pagemap::{
            PagemapOps,
            PrivateOps, //
        },
        system_folio::SystemFolio,
        task::check_signals,
        PAGE_SIZE, //
    },
};
use kernel::{
    prelude::*,
    str::CStr,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// An allocation that is to fail because an opener asked for it: `HMM_DMIRROR_FLAG_FAIL_ALLOC`.
pub(super) struct FailAlloc(Atomic<u32>);

impl FailAlloc {
    /// Nobody asked.
    const NOBODY: u32 = 0;

    fn tag(opener: OpenerId) -> u32 {
        opener.number() + 1
    }

    /// Asks for the next one of `opener` to fail, or that of a CPU fault.
    pub(super) fn ask(&self, opener: OpenerId) {
        self.0.store(Self::tag(opener), Relaxed);
    }

    /// Whether `opener` asked, who has to ask again then.
    pub(super) fn take(&self, opener: OpenerId) -> bool {
        let tag = Self::tag(opener);
        self.0.load(Relaxed) == tag && self.0.cmpxchg(tag, Self::NOBODY, Relaxed).is_ok()
    }

    /// Whether anybody asked. A CPU fault does not know whose page it is on.
    fn take_any(&self) -> bool {
        self.0.load(Relaxed) != Self::NOBODY && self.0.xchg(Self::NOBODY, Relaxed) != Self::NOBODY
    }
}

/// What the chunks of a device share, and what is left of it in atomic context.
#[pin_data]
pub(super) struct Core {
    pub(super) stats: Stats,
    pub(super) fail_alloc: FailAlloc,
    #[pin]
    pub(super) auditor: Auditor,
    /// Whether chunks keep a ledger.
    keeps_ledger: bool,
}

impl Core {
    /// For a device called `name`. May sleep.
    pub(super) fn new(
        name: &'static CStr,
        policy: Policy,
        keeps_ledger: bool,
    ) -> Result<Arc<Self>> {
        let auditor = Auditor::new(policy, name)?;
        Arc::pin_init(
            pin_init!(Self {
                stats: Stats::new(),
                fail_alloc: FailAlloc(Atomic::new(FailAlloc::NOBODY)),
                auditor <- auditor,
                keeps_ledger,
            }),
            GFP_KERNEL,
        )
    }
}

/// The driver's data of one pagemap.
pub(super) struct Chunk {
    core: Arc<Core>,
    /// Its number in the device.
    number: usize,
    freed: Freed,
    ledger: Ledger,
}

impl Chunk {
    /// Chunk `number` of a device, with `pages` pages. May sleep.
    pub(super) fn new(core: Arc<Core>, number: usize, pages: usize) -> Result<Self> {
        let ledger = Ledger::new(if core.keeps_ledger { pages } else { 0 })?;
        Ok(Self {
            core,
            number,
            freed: Freed::new(pages)?,
            ledger,
        })
    }

    /// What happened to its pages last.
    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Takes the outcome of a check of page `index`, and says whether it was a violation. Does not
    /// sleep.
    #[inline]
    pub(super) fn judge(&self, index: usize, outcome: Option<Violation>) -> bool {
        outcome.is_some_and(|violation| self.report(index, violation))
    }

    #[cold]
    fn report(&self, index: usize, violation: Violation) -> bool {
        let told = violation.after(self.ledger.last(index));
        self.core.auditor.judge(Some(told))
    }

    /// Its number in the device.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    /// What came back and the pool does not know of yet.
    pub(super) fn freed(&self) -> &Freed {
        &self.freed
    }
}

/// Times that a CPU fault tries to move its page, a millisecond apart.
const FAULT_TRIES: usize = 500;

impl Chunk {
    /// Tries to move what the fault is about back once, and says whether any of it moved.
    fn fault_back(
        &self,
        fault: &VmFault<'_>,
        buffer: &mut PfnBuffer,
    ) -> core::result::Result<bool, FaultError> {
        let start = fault.address();
        // Dropping the migration on failure puts the pages back.
        let mut migration = fault.migrate(buffer)?;
        copy_back(&mut migration, &self.core.stats, false, |i, order| {
            if self.core.fail_alloc.take_any() {
                return Err(ENOMEM);
            }
            SystemFolio::alloc_vma(fault.vma(), start + i * PAGE_SIZE, order)
        })?;
        let moved = self.core.finish(migration.copied(), |pfn| {
            self.ledger.last(fault.index_of(pfn))
        });
        self.core.stats.moved_to_system(moved);
        Ok(moved.pages != 0)
    }
}

impl PagemapOps for Chunk {
    fn folio_free(&self, folio: FreedFolio<'_>) {
        let core = &self.core;
        let index = folio.index();
        if core.auditor.is_on()
            && !self.judge(index, check_freed(folio.page(), folio.handed_out()))
            // Far cheaper than page by page, which only tells more.
            && !folio.has_clean_tails()
        {
            for (i, tail) in folio.tails() {
                self.judge(i, check_tail_freed(tail));
            }
        }
        if folio.handed_out().is_some() {
            self.ledger.note(index, Event::Freed, folio.order());
            core.stats.freed.add(1 << folio.order());
            // CAST: Pages of a chunk fit `u32`: `Device::grow()` makes sure.
            self.freed.push(index as u32, folio.order());
        }
    }

    fn folio_split(&self, index: usize, order: u32) {
        self.ledger.note(index, Event::Split, order);
    }
}

impl PrivateOps for Chunk {
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError> {
        self.core.stats.cpu_faults.add(1);
        let mut buffer = PfnBuffer::new(1 << fault.order())?;
        for _ in 0..FAULT_TRIES {
            // A page that nobody maps any more was moved or unmapped by somebody else: the CPU
            // looks again.
            if self.fault_back(fault, &mut buffer)? || fault.page().mapcount() == 0 {
                return Ok(());
            }
            // Somebody holds the page for a moment, or for good. The CPU would come back for ever,
            // in the middle of a system call even when it is killed.
            check_signals()?;
            fsleep(Delta::from_millis(1));
        }
        // The fault has a reference of its own.
        let held = check_settled(fault.page(), 1);
        if held.is_none() {
            // Nobody holds it: what lacks is memory for a large folio, which core mm cannot split
            // for a fault.
            return Err(FaultError::Oom);
        }
        self.judge(fault.index(), held);
        Err(FaultError::Sigbus)
    }
}
