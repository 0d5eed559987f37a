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

/// What is wrong with a device, if anything.
fn judge(audit: &uapi::Audit) -> Option<String> {
    let clean = audit.found == 0
        && audit.total == 0
        && audit.used == 0
        && audit.free.checked_add(audit.used) == Some(audit.pages);
    (!clean).then(|| {
        format!(
            "{} violations found, {} since the last audit, {} pages used, {} free of {}",
            audit.found, audit.total, audit.used, audit.free, audit.pages
        )
    })
}

/// Whether the kernel counts the free pages of this device by the old rule, under which none can be
/// handed out: no test can leave one behind, and that every one of them breaks the rule is told in
/// the log when the module is loaded.
fn unusable(stats: &uapi::Stats) -> bool {
    stats.free_refs != 0 && stats.allocated == 0
}

fn audit(node: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(node).context("cannot be opened")?;
    // A scan amid frees may take a page on its way for a violation, and counts it for good: wait
    // for the frees by other means. If they do not come, the audit says so.
    let start = Instant::now();
    let stats = loop {
        let stats = uapi::stats(&file).context("ZDM_STATS")?;
        if stats.allocated == stats.freed || start.elapsed() > QUIESCENCE {
            break stats;
        }
        sleep(TICK);
    };
    if unusable(&stats) {
        return Ok(());
    }
    // What is found is told once: the next test is not to blame for it.
    match judge(&uapi::audit(&file).context("ZDM_AUDIT")?) {
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
    fn a_device_is_audited_if_it_could_be_used() {
        let stats = uapi::Stats::default();
        assert!(!unusable(&stats));
        assert!(unusable(&uapi::Stats { free_refs: 1, ..stats }));
        assert!(!unusable(&uapi::Stats { free_refs: 1, allocated: 1, freed: 1, ..stats }));
    }

    #[test]
    fn only_a_device_as_on_the_first_day_is_clean() {
        let clean = uapi::Audit { pages: 10, free: 10, ..Default::default() };
        assert_eq!(judge(&clean), None);
        assert_eq!(judge(&uapi::Audit::default()), None, "no memory yet");
        for (what, audit) in [
            ("found", uapi::Audit { found: 1, ..clean }),
            ("total", uapi::Audit { total: 1, ..clean }),
            ("used", uapi::Audit { used: 1, free: 9, ..clean }),
            ("lost", uapi::Audit { free: 9, ..clean }),
            ("overflow", uapi::Audit { used: 1, free: u64::MAX, ..clean }),
        ] {
            assert!(judge(&audit).is_some(), "{what}");
        }
    }
}
