// SPDX-License-Identifier: GPL-2.0
//! The result of a boot with a bug: whether the bug was reached, whether it was found, and by what.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use zdvm_guest::plan::AUDIT;
use zdvm_guest::wire::{self, Message};

use crate::command::mutants::watch::{reached_line, shape};
use crate::judge::splat;
use crate::judge::verdict::{Exit, Verdict};
use crate::plan::planned::Planned;

/// The kind of evidence that shows a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// A test fails by its own checks.
    Data,
    /// The module's audit fails, after a test or when an invariant is broken.
    Audit,
    /// The kernel log has a report.
    Splat,
    /// The kernel dies.
    Crash,
    /// A test or the guest does not end.
    Hang,
}

impl By {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Data, Self::Audit, Self::Splat, Self::Crash, Self::Hang];

    /// The name of the kind.
    pub fn word(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Audit => "audit",
            Self::Splat => "splat",
            Self::Crash => "crash",
            Self::Hang => "hang",
        }
    }
}

/// One piece of evidence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Its kind.
    pub by: By,
    /// The test in which it appeared.
    pub test: String,
    /// Its text.
    pub text: String,
}

/// The result of one boot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether a test reached the bug.
    pub reached: bool,
    /// The evidence, in order.
    pub found: Vec<Finding>,
    /// Evidence that does not count, if any: a hang while the module is unloaded says nothing about
    /// the bug.
    pub uncounted: Option<String>,
    /// The number of tests that gave a result.
    pub tests: usize,
    /// The duration of the boot.
    pub seconds: f64,
}

impl Outcome {
    /// Whether the bug was found.
    pub fn killed(&self) -> bool {
        self.reached && !self.found.is_empty()
    }

    /// Whether one of these tests noticed the bug by anything but a hang.
    pub fn noticed_by(&self, tests: &BTreeSet<String>) -> bool {
        self.found.iter().any(|f| tests.contains(&f.test) && f.by != By::Hang)
    }

    /// Whether a test that noticed the bug in one boot also noticed it in the other.
    pub fn same_tests(&self, other: &Self) -> bool {
        self.found.iter().any(|f| other.found.iter().any(|o| o.test == f.test))
    }

    /// The result in short: what noticed the bug, `-` for nothing, `.` for not reached, `?` for a
    /// result that does not count.
    pub fn cell(&self) -> String {
        if self.killed() {
            let by = By::ALL.iter().filter(|by| self.by(**by)).map(|by| by.word());
            by.collect::<Vec<_>>().join("+")
        } else if self.uncounted.is_some() {
            "?".to_owned()
        } else if self.reached {
            "-".to_owned()
        } else {
            ".".to_owned()
        }
    }

    /// Whether there is evidence of this kind.
    pub fn by(&self, by: By) -> bool {
        self.killed() && self.found.iter().any(|f| f.by == by)
    }
}

/// The input of [`judge()`].
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The name of the bug.
    pub mutant: &'a str,
    /// The plan.
    pub planned: &'a Planned,
    /// The runner's verdict.
    pub verdict: &'a Verdict,
    /// The kernel log.
    pub console: &'a str,
    /// The status stream.
    pub wire: &'a [u8],
    /// How QEMU ended.
    pub exit: &'a Exit,
    /// The shapes of log lines that come without any bug.
    pub usual: &'a BTreeSet<String>,
}

/// The diagnostics of each test: the KTAP lines that begin with its name.
fn notes(stream: &[u8]) -> BTreeMap<String, Vec<String>> {
    let mut out: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for message in wire::decode(stream).0 {
        let Message::Ktap(line) = message else { continue };
        if let Some((test, text)) = line.strip_prefix("# ").and_then(|l| l.split_once(": ")) {
            out.entry(test.to_owned()).or_default().push(text.to_owned());
        }
    }
    out
}

/// The tests that had ended when the bug was first reached; `None` if it was never reached.
fn before(console: &str, mutant: &str) -> Option<BTreeSet<String>> {
    let line = reached_line(mutant);
    let mut ended = BTreeSet::new();
    for text in console.lines() {
        if splat::message(text) == line {
            return Some(ended);
        }
        if let Some((false, test)) = splat::bracket(text) {
            ended.insert(test);
        }
    }
    None
}

/// Whether a stack shows that a module is being loaded, which runs its KUnit cases, or unloaded.
fn loads(text: &str) -> bool {
    text.contains("delete_module") || text.contains("finit_module")
}

/// The evidence in the diagnostics of a failed test.
fn told(reason: &str, notes: &[String]) -> Vec<(By, String)> {
    let mut out: Vec<(By, String)> = Vec::new();
    for text in notes {
        let by = if text.starts_with("device ") && text.contains("Violation") {
            // The next line names the violation; this one is only its record.
            continue;
        } else if text.contains("audit of device") {
            By::Audit
        } else if text.starts_with("killed after") || text.contains("does not die") {
            By::Hang
        } else {
            By::Data
        };
        match out.iter_mut().find(|(b, _)| *b == by) {
            None => out.push((by, text.clone())),
            // A line of its own says where the test hangs.
            Some((By::Hang, all)) => *all = format!("{all}; {text}"),
            Some(_) => {}
        }
    }
    // A killed test cannot say more: its other lines prove nothing.
    if out.iter().any(|(by, _)| *by == By::Hang) {
        out.retain(|(by, _)| *by != By::Data);
    }
    if out.is_empty() {
        let by = match reason {
            _ if reason.starts_with(AUDIT) => By::Audit,
            _ if reason.contains("timed out") || reason.contains("by timeout") => By::Hang,
            _ => By::Data,
        };
        out.push((by, reason.to_owned()));
        // A failed process may also have left something behind.
        if by != By::Audit && reason.contains(AUDIT) {
            out.push((By::Audit, reason.to_owned()));
        }
    }
    out
}

fn of_splat(kind: &str) -> By {
    match kind {
        "invariant violated" => By::Audit,
        "kernel panic" => By::Crash,
        // The module's own cases run whenever the module is loaded.
        splat::KUNIT => By::Data,
        "hung task" | "soft lockup" | "hard lockup" | "RCU stall" => By::Hang,
        _ => By::Splat,
    }
}

/// Judges a boot with a bug.
pub fn judge(evidence: &Evidence<'_>) -> Outcome {
    let verdict = evidence.verdict;
    let results = verdict.suites.iter().flat_map(|s| &s.tests);
    let gone = |s: &crate::judge::verdict::Status| {
        matches!(s, crate::judge::verdict::Status::Crashed | crate::judge::verdict::Status::Missing)
    };
    let mut out =
        Outcome { tests: results.filter(|t| !gone(&t.status)).count(), ..Outcome::default() };
    let Some(before) = before(evidence.console, evidence.mutant) else { return out };
    out.reached = true;
    let notes = notes(evidence.wire);
    let stopped = *evidence.exit == Exit::Enough;
    let (mut found, mut last): (Vec<Finding>, Vec<Finding>) = (Vec::new(), Vec::new());
    for problem in &verdict.problems {
        let test = problem.subject.rsplit(": ").next().unwrap_or_default();
        if before.contains(test) {
            continue;
        }
        let finding = |by, text: &str| Finding { by, test: test.to_owned(), text: text.to_owned() };
        match problem.kind.as_str() {
            "Fail" => {
                let notes = notes.get(test).map(Vec::as_slice).unwrap_or_default();
                found.extend(told(&problem.text, notes).iter().map(|(by, t)| finding(*by, t)));
            }
            "Skip" | "UnexpectedPass" => found.push(finding(By::Data, &problem.text)),
            "deliberate splat" if !stopped => found.push(finding(By::Audit, &problem.text)),
            "timeout" => {
                let test = splat::open_test(evidence.console).unwrap_or_default();
                last.push(Finding { by: By::Hang, test, text: problem.text.clone() });
            }
            "exit" | "stream" | "boot" | "suite" | "ktap" if !stopped => {
                let test = splat::open_test(evidence.console).unwrap_or_default();
                last.push(Finding { by: By::Crash, test, text: problem.text.clone() });
            }
            _ => {}
        }
    }
    for splat in verdict.splats.iter().filter(|s| !evidence.usual.contains(&shape(&s.text))) {
        let test = splat.test.clone().unwrap_or_default();
        let deliberate = evidence.planned.known.iter().any(|k| k.pattern.is_match(&splat.text))
            || evidence
                .planned
                .allow
                .iter()
                .any(|a| a.test == test && a.pattern.is_match(&splat.text));
        if !deliberate && !before.contains(&test) {
            found.push(Finding { by: of_splat(splat.kind), test, text: splat.text.clone() });
        }
    }
    // The end of the guest is a consequence if a test or the kernel has reported something. A guest
    // that the runner kills has not crashed.
    let hang = last.iter().position(|f| f.by == By::Hang);
    match hang {
        Some(at) => found.push(last.swap_remove(at)),
        None if found.is_empty() || !matches!(evidence.exit, Exit::Code(0) | Exit::Enough) => {
            found.extend(last.into_iter().take(1));
        }
        None => {}
    }
    // A module that hangs while it is loaded or unloaded says nothing. The log of a guest that
    // hangs has all stacks.
    let stuck = |f: &Finding| {
        f.by == By::Hang
            && (loads(&f.text)
                || (hang.is_some() && f.text.contains("timeout") && loads(evidence.console)))
    };
    if !found.is_empty() && found.iter().all(stuck) {
        out.uncounted = found.first().map(|f| {
            let text: String = f.text.chars().take(200).collect();
            format!("the module hangs as it is loaded or unloaded: {text}")
        });
        found.clear();
    }
    let mut seen = BTreeSet::new();
    found.retain(|f| seen.insert((f.by, f.test.clone())));
    found.truncate(12);
    for finding in &mut found {
        finding.text = finding.text.chars().take(300).collect();
    }
    out.found = found;
    out
}

#[cfg(test)]
#[path = "finding_tests.rs"]
mod tests;
