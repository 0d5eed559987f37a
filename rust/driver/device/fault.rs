// SPDX-License-Identifier: GPL-2.0

//! A CPU fault on device memory moves the page back.

#![forbid(unsafe_code)]

use super::{
    copy::copy_back,
    core_data::Core,
    page_backed::PageBacked, //
};
use crate::{
    audit::{
        check_settled,
        Ledger,
        Moment,
        Violation, //
    },
    driver::fault_around::files::Movers,
    mm::{
        migrate::migration::PfnBuffer,
        page::system_folio::SystemFolio,
        pagemap::fault::{
            FaultError,
            VmFault, //
        },
        sync::task::check_signals,
        PAGE_SIZE, //
    },
};
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The number of attempts of a CPU fault to move its page, a millisecond apart.
const FAULT_TRIES: usize = 500;

/// The number of reads in sequence that must find the same holders before they count as a
/// violation.
const FAULT_LOOKS: usize = 50;

impl Core {
    /// Tries once to move the pages of `fault` back. Returns whether any of them moved. `ledger`
    /// belongs to the pagemap of the fault.
    fn fault_back(
        &self,
        ledger: &Ledger,
        fault: &VmFault<'_>,
        buffer: &mut PfnBuffer,
    ) -> Result<bool, FaultError> {
        let start = fault.address();
        // Dropping the migration on failure restores the pages.
        let mut migration = fault.migrate(buffer, &PageBacked)?;
        let alloc = |i: usize, order| {
            if self.fail_alloc.take_for_fault(|mm| fault.is_in(mm)) {
                return Err(ENOMEM);
            }
            SystemFolio::alloc_vma(fault.vma(), start + i * PAGE_SIZE, order)
        };
        let poisoned = copy_back(&mut migration, &self.stats, false, alloc)?;
        let moved = self.finish(migration.copied()?, |pfn| ledger.last(fault.index_of(pfn)));
        self.stats.moved_to_system(moved);
        if moved.pages == 0 {
            self.stats.failed_migrate.add(1 << fault.order());
        }
        if moved.pages == 0 && poisoned > 0 {
            // The page stays on the device, where the next access finds it again.
            return Err(FaultError::Poisoned);
        }
        Ok(moved.pages != 0)
    }

    /// Handles `fault`. `ledger` records the transitions of the fault's pagemap, and `movers` names
    /// the clients that moved its pages. May sleep.
    pub(super) fn handle_fault(
        &self,
        ledger: &Ledger,
        movers: &Movers,
        fault: &VmFault<'_>,
    ) -> Result<(), FaultError> {
        self.stats.cpu_faults.add(1);
        if self.around.is_used() && self.fault_around(ledger, movers, fault) {
            return Ok(());
        }
        let mut buffer = PfnBuffer::new(1 << fault.order())?;
        // Another task may have moved or unmapped the page. The CPU then reads the page table again.
        if self.fault_back(ledger, fault, &mut buffer)? || fault.folio().mapcount() == 0 {
            return Ok(());
        }
        self.fault_again(ledger, fault, &mut buffer)
    }

    /// Goes on with a `fault` whose page has another holder. May sleep.
    ///
    /// If this returned, the CPU would fault again at once, and in a system call even a killed task would
    /// continue.
    #[cold]
    fn fault_again(
        &self,
        ledger: &Ledger,
        fault: &VmFault<'_>,
        buffer: &mut PfnBuffer,
    ) -> Result<(), FaultError> {
        let mut wrong = None;
        // The number of reads in sequence that found the same.
        let mut same = 0;
        for _ in 0..FAULT_TRIES {
            check_signals()?;
            fsleep(Delta::from_millis(1));
            // The fault has its own reference.
            let found = check_settled(fault.folio(), 1);
            // A task that works on the folio changes its count.
            same = if found == wrong { same + 1 } else { 0 };
            wrong = found;
            if self.fault_back(ledger, fault, buffer)? || fault.folio().mapcount() == 0 {
                return Ok(());
            }
        }
        let Some(violation) = wrong else {
            // Other tasks have worked on the page all the time. The CPU tries again.
            return Ok(());
        };
        if same >= FAULT_LOOKS && self.lasts(fault, violation) {
            self.auditor
                .judge(Some(violation.after(ledger.last(fault.index()))));
        }
        Err(FaultError::Sigbus)
    }

    /// Whether no preempted task explains `violation`, of the folio of `fault`. May sleep.
    #[cold]
    fn lasts(&self, fault: &VmFault<'_>, violation: Violation) -> bool {
        if self.moment == Moment::Quiet {
            return true;
        }
        self.preempted.wait().is_ok()
            && (0..FAULT_LOOKS).all(|_| {
                fsleep(Delta::from_millis(1));
                check_signals().is_ok() && check_settled(fault.folio(), 1) == Some(violation)
            })
    }
}
