// SPDX-License-Identifier: GPL-2.0

//! A CPU fault on device memory moves its page back together with pages around it.

#![forbid(unsafe_code)]

use super::{
    core_data::Core,
    page_backed::{
        Migration,
        PageBacked, //
    },
};
use crate::{
    audit::Ledger,
    driver::fault_around::{
        files::Movers,
        streams::Place, //
    },
    mm::{
        migrate::migration::{
            bytes,
            CopyError,
            PfnBuffer,
            Setup, //
        },
        page::system_folio::{
            SystemFolio,
            SystemFolios, //
        },
        pagemap::fault::VmFault,
        PAGE_SHIFT, //
    },
};
use kernel::prelude::*;

impl Core {
    /// Tries once to move back the page of `fault` with the pages around it that the same file has
    /// moved to the device. Returns whether the page moved. `ledger` and `movers` belong to the
    /// fault's pagemap. May sleep.
    ///
    /// Also returns `false` if fault-around is off for the file or the window has one page.
    // Not a part of the handler, whose frame would have room for all of this in every fault.
    #[inline(never)]
    pub(super) fn fault_around(
        &self,
        ledger: &Ledger,
        movers: &Movers,
        fault: &VmFault<'_>,
    ) -> bool {
        if !fault.is_small() {
            return false;
        }
        let Some(mover) = movers.of(fault.index()) else {
            return false;
        };
        let (mm, address, order) = (fault.mm_id(), fault.address(), fault.access_order());
        // Most faults in no order end here.
        let Some(turn) = self.around.turn(mover, mm, address, order) else {
            return false;
        };
        let place = Place {
            mm,
            address,
            limits: fault.table_range(),
            order,
        };
        let used = |range| fault.accessed_pages(range);
        let Some(plan) = self.around.plan(mover, turn, &place, used) else {
            return false;
        };
        if plan.hits + plan.waste > 0 {
            self.stats.around_hits.add(plan.hits);
            self.stats.around_waste.add(plan.waste);
        }
        if plan.pages() < 2 {
            return false;
        }
        // If anything fails here, the fault may still succeed with its own page.
        let Ok(mut buffer) = PfnBuffer::new(plan.pages()) else {
            return false;
        };
        let Ok(mut migration) = fault.migrate_around(&mut buffer, plan.window.clone(), &PageBacked)
        else {
            return false;
        };
        let own = (place.address - plan.window.start) >> PAGE_SHIFT;
        if self.copy_own(&mut migration, fault, own).is_err() {
            return false;
        }
        let vma = fault.vma();
        let mut pages = SystemFolios::try_for_vma(vma, migration.len() - 1);
        for i in (0..migration.len()).filter(|&i| i != own) {
            let ours = migration
                .source_pfn(i)
                .is_some_and(|pfn| movers.of(fault.index_of(pfn)) == Some(mover));
            if !ours || migration.source(i) != Some(0) {
                continue;
            }
            let address = plan.window.start + bytes(i);
            let Ok(folio) = pages.alloc(address) else {
                // The other pages are not worth waiting for memory.
                break;
            };
            // A page with lost contents stays until it is accessed.
            let _ = migration.copy_to_system(i, 0, folio);
        }
        let Ok(migration) = migration.copied() else {
            return false;
        };
        let moved_own = migration.has_moved(own);
        let moved = self.finish(migration, |pfn| ledger.last(fault.index_of(pfn)));
        self.stats.moved_to_system(moved);
        let around = moved.pages - usize::from(moved_own);
        self.stats.around.add(around);
        self.around.brought(mover, &plan, around);
        moved_own
    }

    /// Gives the page of `fault`, which is source `own`, its destination.
    ///
    /// # Errors
    ///
    /// `EBUSY` where it cannot be moved, `ENOMEM`.
    fn copy_own(
        &self,
        migration: &mut Migration<'_, Setup>,
        fault: &VmFault<'_>,
        own: usize,
    ) -> Result {
        if migration.source(own) != Some(0) || migration.source_pfn(own).is_none() {
            return Err(EBUSY);
        }
        // The fault itself then fails as it would without a window.
        if self.fail_alloc.is_asked() {
            return Err(ENOMEM);
        }
        let folio = SystemFolio::alloc_vma(fault.vma(), fault.address(), 0)?;
        // The fault itself distinguishes a page with lost contents from a held one.
        migration
            .copy_to_system(own, 0, folio)
            .map_err(|_: CopyError| EBUSY)
    }
}
