// SPDX-License-Identifier: GPL-2.0

//! Waits until tasks that were preempted in the kernel have gone on.
//!
//! C header: [`include/linux/rcupdate.h`](srctree/include/linux/rcupdate.h)

use super::killable::{
    Blocking,
    KillableWait, //
};
use crate::{
    bindings,
    mm::module::scope::{
        Callbacks,
        ModuleScope,
        Scoped, //
    }, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The longest wait, in milliseconds.
const MOST: u32 = 10_000;

/// The end of what preempted tasks were in the midst of.
struct GracePeriod;

impl Blocking for GracePeriod {
    fn block(&self) {
        // SAFETY: The caller may sleep, as the trait says; nothing else is asked.
        unsafe { bindings::zdm_wait_for_preempted() };
    }
}

/// Waits until tasks that were preempted in the kernel have gone on, to user mode or to sleep of their own
/// accord: what they were in the midst of is over.
///
/// Wraps `synchronize_rcu_tasks()`, which takes as long as the scheduler keeps such a task waiting. A kernel
/// with preemption but without `CONFIG_TASKS_RCU` does not know when such tasks have gone on; there the wait
/// proves nothing.
///
/// # Examples
///
/// ```
/// use kernel::mm::{module::scope::{ModuleScope, Scoped}, sync::preempted::PreemptedTasks};
/// use kernel::module::this_module;
///
/// let scope = ModuleScope::new(this_module::<LocalModule>())?;
/// let preempted: Scoped<PreemptedTasks> = PreemptedTasks::new(&scope)?;
/// preempted.wait()?;
/// # Ok::<(), Error>(())
/// ```
#[pin_data(PinnedDrop)]
pub(crate) struct PreemptedTasks {
    #[pin]
    wait: KillableWait<GracePeriod>,
}

impl PreemptedTasks {
    /// Registers the wait in `scope`, because deferred work calls a function of the module. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` when the module is on its way out, `ENOMEM`.
    pub(crate) fn new(scope: &Arc<ModuleScope>) -> Result<Scoped<Self>> {
        let init = try_pin_init!(Self {
            // SAFETY: `drop()` disables it.
            wait <- unsafe { KillableWait::new(GracePeriod) },
        }? Error);
        Scoped::new(scope, init)
    }

    /// Waits until each task that is preempted in the kernel has gone on. May sleep, for no longer than 10 s
    /// unless this task is preempted itself.
    ///
    /// # Errors
    ///
    /// `EINTR` when this task was killed, `ETIMEDOUT` when 10 s were not enough.
    pub(crate) fn wait(&self) -> Result {
        self.wait.wait(Some(MOST))
    }
}

impl Callbacks for PreemptedTasks {
    fn end(&self) {
        self.wait.disable();
    }
}

#[pinned_drop]
impl PinnedDrop for PreemptedTasks {
    fn drop(self: Pin<&mut Self>) {
        self.end();
    }
}
