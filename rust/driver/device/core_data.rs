// SPDX-License-Identifier: GPL-2.0

//! The data that the chunks of a device share with the device, and that freeing a page in atomic
//! context may need.

#![forbid(unsafe_code)]

use crate::{
    audit::{
        Auditor,
        Moment, //
    },
    driver::{
        devmem::ClientId,
        fault_around::files::FaultAround,
        params::Config,
        stats::Stats, //
    },
    mm::{
        module::scope::{
            ModuleScope,
            Scoped, //
        },
        sync::{
            once::read_once,
            preempted::PreemptedTasks, //
        },
    },
};
use kernel::{
    mm::Mm,
    new_mutex,
    prelude::*,
    str::CStr,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

/// The most clients whose next allocation must fail. Each CPU fault on the device looks through them.
const MAX_ASKED: usize = 256;

/// The clients whose next allocation for a migration must fail: `HMM_DMIRROR_FLAG_FAIL_ALLOC`.
#[pin_data]
pub(in crate::driver) struct FailAlloc {
    /// The number of entries in `list`, so that other allocations take no lock.
    len: Atomic<u32>,
    /// The client, and the address space that it mirrors.
    #[pin]
    list: Mutex<KVec<(ClientId, ARef<Mm>)>>,
}

impl FailAlloc {
    fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            len: Atomic::new(0),
            list <- new_mutex!(KVec::with_capacity(MAX_ASKED, GFP_KERNEL)?, "FailAlloc::list"),
        }? Error)
    }

    /// Makes the next allocation of `client`, or of a CPU fault in `mm`, fail. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOSPC` when too many clients have asked.
    pub(in crate::driver) fn ask(&self, client: ClientId, mm: &Mm) -> Result {
        let mut list = self.list.lock();
        if !list.iter().any(|(other, _)| *other == client) {
            if list.len() >= MAX_ASKED {
                return Err(ENOSPC);
            }
            // There is room for so many. An allocation might wait for memory, and CPU faults for the lock.
            let asked = (client, mm.into());
            list.push_within_capacity(asked).map_err(|_| ENOSPC)?;
            self.len.add(1, Relaxed);
        }
        Ok(())
    }

    /// Whether an allocation of `client` must fail. The next one succeeds unless the client asks
    /// again. May sleep.
    pub(in crate::driver) fn take(&self, client: ClientId) -> bool {
        self.take_first(|other, _| other == client)
    }

    /// As [`FailAlloc::take`], for a CPU fault in the address space that `is_mm` accepts.
    pub(super) fn take_for_fault(&self, is_mm: impl Fn(&Mm) -> bool) -> bool {
        self.take_first(|_, mm| is_mm(mm))
    }

    /// Whether any allocation must fail. Changes nothing, and does not sleep.
    pub(in crate::driver) fn is_asked(&self) -> bool {
        read_once(&self.len) != 0
    }

    fn take_first(&self, is_wanted: impl Fn(ClientId, &Mm) -> bool) -> bool {
        if !self.is_asked() {
            return false;
        }
        let mut list = self.list.lock();
        let place = list.iter().position(|(client, mm)| is_wanted(*client, mm));
        let taken = place.and_then(|place| list.remove(place).ok());
        if taken.is_some() {
            self.len.fetch_sub(1, Relaxed);
        }
        drop(list);
        taken.is_some()
    }
}

/// The data that the chunks of a device share.
#[pin_data]
pub(in crate::driver) struct Core {
    pub(in crate::driver) stats: Stats,
    #[pin]
    pub(in crate::driver) fail_alloc: FailAlloc,
    #[pin]
    pub(in crate::driver) auditor: Auditor,
    #[pin]
    pub(in crate::driver) around: FaultAround,
    pub(in crate::driver) preempted: Scoped<PreemptedTasks>,
    /// Whether chunks keep a ledger.
    pub(super) keeps_ledger: bool,
    /// The moment of a check about which user space gave no guarantee.
    pub(super) moment: Moment,
}

impl Core {
    /// Makes the data of the device called `name`, which registers deferred work in `scope`. May sleep.
    pub(super) fn new(
        name: &'static CStr,
        config: &Config,
        scope: &Arc<ModuleScope>,
    ) -> Result<Arc<Self>> {
        let auditor = Auditor::new(config.policy, name)?;
        let around = FaultAround::new()?;
        let preempted = PreemptedTasks::new(scope)?;
        Arc::pin_init(
            try_pin_init!(Self {
                stats: Stats::new(),
                fail_alloc <- FailAlloc::new(),
                auditor <- auditor,
                around <- around,
                preempted,
                keeps_ledger: config.ledger,
                // If faults may be injected the device is under test, and every reference counts.
                moment: if config.inject {
                    Moment::Quiet
                } else {
                    Moment::Busy
                },
            }? Error),
            GFP_KERNEL,
        )
    }
}
