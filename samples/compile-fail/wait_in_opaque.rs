// SPDX-License-Identifier: GPL-2.0
// error: E0277

//! Deferred work is not put where it would never be disabled.

#![forbid(unsafe_code)]

use crate::mm::{module::scope::ModuleScope, sync::preempted::PreemptedTasks};
use kernel::{prelude::*, sync::Arc, types::Opaque};
use pin_init::Wrapper;

fn keep(scope: &Arc<ModuleScope>) -> Result<Pin<KBox<Opaque<PreemptedTasks>>>> {
    KBox::try_pin_init(Opaque::pin_init(PreemptedTasks::new(scope)), GFP_KERNEL)
}
