// SPDX-License-Identifier: GPL-2.0
//! What a boot with a bug came to: whether it was reached, whether it was found, and by what.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use zdvm_guest::plan::AUDIT;
use zdvm_guest::wire::{self, Message};

use crate::command::mutants::watch::{reached_line, shape};
use crate::judge::splat;
use crate::judge::verdict::{Exit, Verdict};
use crate::plan::planned::Planned;

/// What notices a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// A test that fails by itself.
    Data,
    /// The module's audit, after a test or when an invariant was broken.
    Audit,
    /// A report in the kernel log.
    Splat,
    /// The kernel's death.
    Crash,
    /// A test or the guest that does not come to an end.
    Hang,
}

impl By {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Data, Self::Audit, Self::Splat, Self::Crash, Self::Hang];

    /// In a word.
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

/// One thing that was noticed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// By what.
    pub by: By,
    /// In which test.
    pub test: String,
    /// In words.
    pub text: String,
}

/// What one boot came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether the bug changed anything at all.
    pub reached: bool,
    /// What was noticed, in order.
    pub found: Vec<Finding>,
    /// What cannot be counted, if anything: a module that hangs as it is unloaded says nothing.
    pub uncounted: Option<String>,
    /// Tests that came to a result.
    pub tests: usize,
    /// How long it took.
    pub seconds: f64,
}

impl Outcome {
    /// Whether the bug was found.
    pub fn killed(&self) -> bool {
        self.reached && !self.found.is_empty()
    }

    /// Whether it was noticed in one of these tests, and not by its time alone.
    pub fn noticed_by(&self, tests: &BTreeSet<String>) -> bool {
        self.found.iter().any(|f| tests.contains(&f.test) && f.by != By::Hang)
    }

    /// Whether it was noticed in a test that noticed another one.
    pub fn same_tests(&self, other: &Self) -> bool {
        self.found.iter().any(|f| other.found.iter().any(|o| o.test == f.test))
    }

    /// Whether this is among what noticed it.
    pub fn by(&self, by: By) -> bool {
        self.killed() && self.found.iter().any(|f| f.by == by)
    }
}

/// What there is to judge.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// Name of the bug.
    pub mutant: &'a str,
    /// What was planned.
    pub planned: &'a Planned,
    /// The runner's verdict.
    pub verdict: &'a Verdict,
    /// The kernel log.
    pub console: &'a str,
    /// The status stream.
    pub wire: &'a [u8],
    /// How QEMU ended.
    pub exit: &'a Exit,
    /// Shapes of lines that come without any bug.
    pub usual: &'a BTreeSet<String>,
}

/// What tests say of themselves: the lines of KTAP that begin with their names.
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

/// Tests that had ended when the bug was reached for the first time; `None` if it never was.
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

/// A module that is being loaded (its KUnit cases run then) or unloaded, by a stack.
fn loads(text: &str) -> bool {
    text.contains("delete_module") || text.contains("finit_module")
}

/// What the lines of a failed test say.
fn told(reason: &str, notes: &[String]) -> Vec<(By, String)> {
    let mut out: Vec<(By, String)> = Vec::new();
    for text in notes {
        let by = if text.starts_with("device ") && text.contains("Violation") {
            // The record that the next line is about.
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
            // Where it hangs is said in a line of its own.
            Some((By::Hang, all)) => *all = format!("{all}; {text}"),
            Some(_) => {}
        }
    }
    // What is killed has no chance to say more.
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
        // A process that failed may have left something behind, too.
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
        // The module's own cases, which run whenever it is loaded.
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
    // The guest's end is a consequence where a test or the kernel has said something; a guest that
    // is killed by us has not crashed.
    let hang = last.iter().position(|f| f.by == By::Hang);
    match hang {
        Some(at) => found.push(last.swap_remove(at)),
        None if found.is_empty() || !matches!(evidence.exit, Exit::Code(0) | Exit::Enough) => {
            found.extend(last.into_iter().take(1));
        }
        None => {}
    }
    // A module that hangs says nothing. All stacks are in the log of a guest that hangs.
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
