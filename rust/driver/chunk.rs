// SPDX-License-Identifier: GPL-2.0

//! A chunk of device memory: what core mm calls the driver for.

#![forbid(unsafe_code)]

use super::{
    pool::Pool,
    stats::Stats, //
};
use crate::{
    audit::{
        check_freed,
        check_settled,
        Auditor,
        Policy, //
    },
    mm::{
        device_folio::FreedFolio,
        fault::{
            FaultError,
            VmFault, //
        },
        migrate::PfnBuffer,
        pagemap::PagemapOps,
        system_folio::SystemFolio,
        task::check_signals,
        PAGE_SIZE, //
    },
};
use core::num::NonZeroUsize;
use kernel::{
    new_spinlock,
    prelude::*,
    str::CStr,
    sync::{
        Arc,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// What the chunks of a device share, and what is left of it in atomic context.
#[pin_data]
pub(super) struct Core {
    pub(super) stats: Stats,
    #[pin]
    pub(super) auditor: Auditor,
    #[pin]
    pub(super) pool: SpinLock<Pool>,
}

impl Core {
    /// For a device called `name` with chunks of `chunk_pages` pages. May sleep.
    pub(super) fn new(
        name: &'static CStr,
        policy: Policy,
        chunk_pages: NonZeroUsize,
    ) -> Result<Arc<Self>> {
        let pool = Pool::new(chunk_pages)?;
        Arc::pin_init(
            pin_init!(Self {
                stats: Stats::new(),
                auditor <- Auditor::new(policy, name),
                pool <- new_spinlock!(pool, "Core::pool"),
            }),
            GFP_KERNEL,
        )
    }
}

/// The driver's data of one pagemap.
pub(super) struct Chunk {
    core: Arc<Core>,
    /// Number of the first page in the pool.
    base: u32,
}

impl Chunk {
    pub(super) fn new(core: Arc<Core>, base: u32) -> Self {
        Self { core, base }
    }
}

/// Times that a CPU fault tries to move its page, a millisecond apart.
const FAULT_TRIES: usize = 500;

impl Chunk {
    /// Tries to move the faulting page back once, and says whether it moved.
    fn fault_back(
        &self,
        fault: &VmFault<'_>,
        buffer: &mut PfnBuffer,
    ) -> core::result::Result<bool, FaultError> {
        let address = fault.address();
        let mut migration = fault.migrate(buffer, address, address + PAGE_SIZE)?;
        if migration.is_selected(0) {
            // Dropping the migration on failure puts the page back.
            let mut folio = SystemFolio::alloc_vma(fault.vma(), address)?;
            migration.copy_source(0, &mut folio);
            migration.set_system_destination(0, folio);
        }
        let migration = migration.copied();
        let moved = migration.moved();
        self.core.stats.to_system.add(moved);
        migration.finalize();
        Ok(moved != 0)
    }
}

impl PagemapOps for Chunk {
    fn folio_free(&self, folio: FreedFolio<'_>) {
        let core = &self.core;
        if core.auditor.is_on() {
            core.auditor
                .judge(check_freed(folio.page(), folio.was_in_use()));
        }
        if folio.was_in_use() {
            core.stats.freed.add(1);
            // A page beyond `u32` cannot be in a pool: chunks are added with a check.
            core.pool.lock().put(self.base + folio.index() as u32, 0);
        }
    }

    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError> {
        self.core.stats.cpu_faults.add(1);
        let mut buffer = PfnBuffer::new(1)?;
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
        self.core.auditor.judge(check_settled(fault.page(), 1));
        Err(FaultError::Sigbus)
    }
}
