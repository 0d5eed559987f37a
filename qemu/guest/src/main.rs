// SPDX-License-Identifier: GPL-2.0
//! Process 1 of zdvm's guests: mounts file systems, runs the plan, sends results to the host,
//! powers off.
//!
//! Standard error is the console, which the host judges as the kernel log. The agent prints there
//! only if it fails itself.

#![forbid(unsafe_code)]

mod run;
mod sys;

use std::fs;

use anyhow::{Context, Result};
use rustix::system::{RebootCommand, reboot};
use zdvm_guest::plan::{self, Plan};
use zdvm_guest::wire::Message;

fn work() -> Result<()> {
    sys::mount_all()?;
    let text = fs::read_to_string(plan::PATH).with_context(|| format!("reading {}", plan::PATH))?;
    let plan = Plan::parse(&text).map_err(anyhow::Error::msg)?;
    if plan.shell {
        return run::shell(&plan);
    }
    let mut link = sys::Link::open()?;
    sys::check_machine(plan.cpus, plan.nodes)?;
    link.send(&Message::Hello { release: sys::release()?, taint: sys::taint()? })?;
    for suite in &plan.suites {
        link.send(&Message::SuiteStart(suite.name.clone()))?;
        let end = run::suite(&mut link, &plan, suite);
        let left = sys::module_loaded(&plan.module)?
            .then(|| format!("left the module {} loaded", plan.module));
        // A module that cannot be unloaded is a problem even if other things failed.
        let why: Vec<String> =
            end.err().map(|e| format!("{e:#}")).into_iter().chain(left).collect();
        let why = (!why.is_empty()).then(|| why.join("; "));
        link.send(&Message::SuiteEnd(suite.name.clone(), why))?;
    }
    sys::kmemleak_scan();
    link.send(&Message::Taint(sys::taint()?))?;
    link.send(&Message::Done)
}

fn main() {
    // The agent kills every process and powers off: it must run only as process 1 of a guest.
    if !rustix::process::getpid().is_init() {
        eprintln!("zdvm-guest: this is process 1 of zdvm's guests and nothing else");
        std::process::exit(2);
    }
    if let Err(e) = work() {
        // Without the message Done the host does not take the run for a pass.
        eprintln!("zdvm-guest: {e:#}");
    }
    rustix::fs::sync();
    if let Err(e) = reboot(RebootCommand::PowerOff) {
        eprintln!("zdvm-guest: cannot power off: {e}");
    }
}
