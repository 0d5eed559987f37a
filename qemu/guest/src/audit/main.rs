// SPDX-License-Identifier: GPL-2.0
//! Has every device node of the module audit itself, and says what is not as on the first day.
//!
//! Status 0 and no word: no page is in use and no invariant is or was broken. A node that is not
//! there is nobody's fault; one that cannot be opened or asked is.

mod uapi;

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Exit and RCU free pages a little later than the last user leaves.
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

/// What is wrong with a device, if anything. Where the kernel keeps a reference on free pages, which
/// is the old rule of GENERIC memory, each of them is a violation in every scan, and nothing else is.
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
    // A scan amid frees may take a page on its way for a violation, and counts it for good: wait
    // for the frees by other means. If they do not come, the audit says so.
    let start = Instant::now();
    let stats = || uapi::stats(&file).context("ZDM_STATS");
    let mut now = stats()?;
    while now.allocated != now.freed && start.elapsed() < QUIESCENCE {
        sleep(TICK);
        now = stats()?;
    }
    // What is found is told once: the next test is not to blame for it. Under the old rule it is
    // found again anyway, and the log would be told anew.
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
    // All at once: a scan of some hundred thousand pages takes its time under TCG.
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
