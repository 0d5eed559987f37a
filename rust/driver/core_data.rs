// SPDX-License-Identifier: GPL-2.0

//! What the chunks of a device share with the device, and what a page may need when it is freed in
//! atomic context.

#![forbid(unsafe_code)]

use super::{
    pool::OpenerId,
    stats::Stats, //
};
use crate::audit::{
    Auditor,
    Policy, //
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
    pub(super) fn take_any(&self) -> bool {
        self.0.load(Relaxed) != Self::NOBODY && self.0.xchg(Self::NOBODY, Relaxed) != Self::NOBODY
    }
}

/// What the chunks of a device share.
#[pin_data]
pub(super) struct Core {
    pub(super) stats: Stats,
    pub(super) fail_alloc: FailAlloc,
    #[pin]
    pub(super) auditor: Auditor,
    /// Whether chunks keep a ledger.
    pub(super) keeps_ledger: bool,
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
