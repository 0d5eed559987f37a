// SPDX-License-Identifier: GPL-2.0
//! Makes every device node of the module audit itself, and prints the faults.
//!
//! Status 0 without output means that no page is in use and that no invariant is or was broken. A
//! missing node is no fault; a node that cannot be opened or audited is one.

mod uapi;

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Exit and RCU free pages shortly after the last user has left.
const QUIESCENCE: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(10);

fn nodes() -> Result<Vec<PathBuf>> {
    let is_node =
        |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("hmm_dmirror"));
    let entries = fs::read_dir("/dev").context("reading /dev")?;
    let mut nodes: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(is_node).collect();
    nodes.sort();
    Ok(nodes)
}

/// The faults of a device, if any. Where the kernel keeps a reference on free pages, which is the
/// old rule of GENERIC memory, every scan must find exactly one violation per free page.
fn judge(audit: &uapi::Audit, free_refs: u64) -> Option<String> {
    let violations = match free_refs {
        0 => audit.found == 0 && audit.total == 0,
        _ => audit.found == audit.free && audit.total > 0,
    };
    let clean =
        violations && audit.used == 0 && audit.free.checked_add(audit.used) == Some(audit.pages);
    (!clean).then(|| {
        format!(
            "{} violations found, {} since the last audit, {} pages used, {} free of {}",
            audit.found, audit.total, audit.used, audit.free, audit.pages
        )
    })
}

fn audit(node: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(node).context("cannot be opened")?;
    // A scan during frees may report and count a page that is just being freed. Wait until the
    // statistics show that the frees are done; if they never are, the audit reports the pages in
    // use.
    let start = Instant::now();
    let stats = || uapi::stats(&file).context("ZDM_STATS");
    let mut now = stats()?;
    while now.allocated != now.freed && start.elapsed() < QUIESCENCE {
        sleep(TICK);
        now = stats()?;
    }
    // Report a finding once, so that the next test is not blamed for it. Under the old rule a
    // cleared finding would come back with every scan and flood the log.
    let clear = now.free_refs == 0;
    match judge(&uapi::audit(&file, clear).context("ZDM_AUDIT")?, now.free_refs) {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

fn work() -> Result<bool> {
    let nodes = nodes()?;
    if nodes.is_empty() {
        bail!("no /dev/hmm_dmirror*");
    }
    // Audit all devices in parallel: a scan of some hundred thousand pages takes seconds under TCG.
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = nodes.iter().map(|node| scope.spawn(|| audit(node))).collect();
        let joined = threads.into_iter().map(|t| t.join());
        joined.map(|r| r.unwrap_or_else(|_| Err(anyhow!("its audit panicked")))).collect()
    });
    let mut clean = true;
    for (node, result) in nodes.iter().zip(results) {
        if let Err(e) = result {
            let name = node.file_name().unwrap_or_default().to_string_lossy();
            println!("{name}: {e:#}");
            clean = false;
        }
    }
    Ok(clean)
}

fn main() -> ExitCode {
    match work() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            println!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_device_as_on_the_first_day_is_clean() {
        let clean = uapi::Audit { pages: 10, free: 10, ..Default::default() };
        assert_eq!(judge(&clean, 0), None);
        assert_eq!(judge(&uapi::Audit::default(), 0), None, "no memory yet");
        for (what, audit) in [
            ("found", uapi::Audit { found: 1, ..clean }),
            ("total", uapi::Audit { total: 1, ..clean }),
            ("used", uapi::Audit { used: 1, free: 9, ..clean }),
            ("lost", uapi::Audit { free: 9, ..clean }),
            ("overflow", uapi::Audit { used: 1, free: u64::MAX, ..clean }),
        ] {
            assert!(judge(&audit, 0).is_some(), "{what}");
        }
    }

    #[test]
    fn under_the_old_rule_every_free_page_is_a_violation() {
        let old = uapi::Audit { pages: 10, free: 10, found: 10, total: 30, ..Default::default() };
        assert_eq!(judge(&old, 1), None);
        assert!(judge(&old, 0).is_some());
        for (what, audit) in [
            ("none", uapi::Audit { found: 0, total: 0, ..old }),
            ("fewer", uapi::Audit { found: 9, ..old }),
            ("more", uapi::Audit { found: 11, ..old }),
            ("not counted", uapi::Audit { total: 0, ..old }),
            ("used", uapi::Audit { used: 1, free: 9, found: 9, ..old }),
        ] {
            assert!(judge(&audit, 1).is_some(), "{what}");
        }
    }
}
