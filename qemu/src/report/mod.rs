// SPDX-License-Identifier: GPL-2.0
//! Writes a verdict for people and programs: one table, JSON, JUnit XML.

pub mod html;
pub mod stacks;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde::Serialize;

use crate::judge::verdict::{Status, SuiteResult, Verdict};

/// How many problems of one kind and subject are shown one by one.
const SHOWN: usize = 8;

/// A judged run.
#[derive(Debug, Serialize)]
pub struct Run<'a> {
    /// The verdict.
    #[serde(flatten)]
    pub verdict: &'a Verdict,
    /// Whether the verdict is a pass.
    pub pass: bool,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// How QEMU ended.
    pub exit: String,
    /// Seconds from start to end of QEMU.
    pub seconds: f64,
}

/// The number of checks by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Checks that passed.
    pub passed: usize,
    /// Checks that failed or could not be made.
    pub failed: usize,
    /// Tests of a boot that failed or were skipped as expected.
    pub skipped: usize,
}

impl Tally {
    /// Prints the numbers, and returns whether nothing failed.
    pub fn say(self) -> bool {
        let Self { passed, failed, skipped } = self;
        say(&format!("zdvm: {passed} passed, {failed} failed, {skipped} skipped\n"));
        failed == 0
    }
}

fn row(suite: &SuiteResult) -> [usize; 8] {
    [
        suite.planned,
        suite.count(&[Status::Pass]),
        suite.count(&[Status::Fail, Status::UnexpectedPass, Status::Unplanned]),
        suite.count(&[Status::Skip, Status::ExpectedSkip]),
        suite.count(&[Status::ExpectedFail]),
        suite.count(&[Status::Missing, Status::Crashed]),
        suite.not_applicable,
        suite.with_full,
    ]
}

/// Prints to standard output. A closed pipe (`| head`) is no error.
pub fn say(text: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
}

/// The summary table.
pub fn table(verdict: &Verdict) -> String {
    let heads = [
        "planned",
        "passed",
        "failed",
        "skipped",
        "xfail",
        "missing/crashed",
        "not applicable",
        "with --full",
    ];
    let names = verdict.suites.iter().map(|s| &s.name).chain(verdict.left_out.iter().map(|l| &l.0));
    let width = names.map(String::len).max().unwrap_or(0).max(6);
    let mut out = format!("{:width$}", "suite");
    for head in heads {
        let _ = write!(out, "  {head}");
    }
    out.push('\n');
    let left_out = verdict.left_out.iter().map(|(name, n)| (name, [0, 0, 0, 0, 0, 0, 0, *n]));
    for (name, numbers) in verdict.suites.iter().map(|s| (&s.name, row(s))).chain(left_out) {
        let _ = write!(out, "{name:width$}");
        for (head, n) in heads.iter().zip(numbers) {
            let _ = write!(out, "  {n:>w$}", w = head.len());
        }
        out.push('\n');
    }
    out
}

/// Prints every problem on a line of its own; many similar problems are cut short and counted.
pub fn problems(verdict: &Verdict) -> String {
    let mut out = String::new();
    let mut seen: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for p in &verdict.problems {
        let n = seen.entry((&p.kind, &p.subject)).or_default();
        *n += 1;
        if *n <= SHOWN {
            let _ = writeln!(out, "  {}: {}: {}", p.kind, p.subject, p.text);
        }
    }
    for ((kind, subject), n) in seen.into_iter().filter(|(_, n)| *n > SHOWN) {
        let _ = writeln!(out, "  {kind}: {subject}: and {} more", n - SHOWN);
    }
    out
}

/// The last lines of the output: verdict and folder.
pub fn verdict_line(run: &Run<'_>, dir: &Path) -> String {
    let (good, bad) = run.verdict.counts();
    let (failed, skipped) = run.verdict.excused();
    format!(
        "verdict: {} (kernel {}, machine {}, {good} passed, {bad} failed, {failed} failed as \
         expected, {skipped} skipped, {:.1} s, {})\nfolder: {}\n",
        if run.pass { "PASS" } else { "FAIL" },
        run.verdict.kernel,
        run.verdict.machine,
        run.seconds,
        run.accel,
        dir.display()
    )
}

/// Writes verdict.json and junit.xml.
pub fn write(run: &Run<'_>, dir: &Path) -> Result<()> {
    let json = dir.join("verdict.json");
    fs::write(&json, serde_json::to_string_pretty(run)? + "\n")
        .with_context(|| format!("writing {}", json.display()))?;
    let xml = dir.join("junit.xml");
    fs::write(&xml, junit(run)?).with_context(|| format!("writing {}", xml.display()))
}

fn junit(run: &Run<'_>) -> Result<String> {
    let mut report = Report::new(format!("zdvm {}", run.verdict.kernel));
    report.set_time(Duration::from_secs_f64(run.seconds));
    for suite in &run.verdict.suites {
        let mut out = TestSuite::new(&*suite.name);
        for test in &suite.tests {
            let mut status = match test.status {
                Status::Pass => TestCaseStatus::success(),
                Status::ExpectedFail | Status::ExpectedSkip => TestCaseStatus::skipped(),
                Status::Missing | Status::Crashed => {
                    TestCaseStatus::non_success(NonSuccessKind::Error)
                }
                _ => TestCaseStatus::non_success(NonSuccessKind::Failure),
            };
            if !test.reason.is_empty() {
                status.set_message(format!("{:?}: {}", test.status, test.reason));
            }
            let mut case = TestCase::new(&*test.name, status);
            if let Some(seconds) = test.seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()) {
                case.set_time(seconds);
            }
            case.set_classname(format!("{}.{}", run.verdict.kernel, suite.name));
            out.add_test_case(case);
        }
        report.add_test_suite(out);
    }
    // A problem that belongs to no test must fail in JUnit, too.
    let mut whole = TestSuite::new("run");
    let own: Vec<_> = run
        .verdict
        .problems
        .iter()
        .filter(|p| {
            !run.verdict.suites.iter().any(|s| p.subject.starts_with(&format!("{}: ", s.name)))
        })
        .collect();
    let status = if own.is_empty() {
        TestCaseStatus::success()
    } else {
        let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
        let lines: Vec<String> =
            own.iter().map(|p| format!("{}: {}: {}", p.kind, p.subject, p.text)).collect();
        status.set_message(format!("{} problems beside test results", lines.len()));
        status.set_description(lines.join("\n"));
        status
    };
    whole.add_test_case(TestCase::new("log, taint, power-off", status));
    report.add_test_suite(whole);
    Ok(report.to_string()?)
}
