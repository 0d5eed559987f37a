// SPDX-License-Identifier: GPL-2.0
//! Makes the verdict from the plan and the evidence, without input or output.
//!
//! A pass needs every planned result, each as expected for this kernel; a clean kernel log; the
//! expected taint; and a clean power-off. Anything that is not proved good is a problem, and one
//! problem is enough to fail.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::Serialize;
use zdvm_guest::plan::{AUDIT, Kind};
use zdvm_guest::wire;

use crate::judge::ktap::{self, Case, Outcome};
use crate::judge::splat::{self, Splat};
use crate::judge::stream::{Seen, Stream};
use crate::judge::taint;
pub use crate::plan::planned::{Allow, Expect, Failure, Known, Planned, Suite, Test};

/// How QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Exit {
    /// It ended by itself, with this status.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// The runner killed it, because the watcher had seen enough.
    Enough,
    /// The runner killed it, because this limit, in seconds, had passed.
    Timeout(String, u64),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(status) => write!(f, "status {status}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Enough => f.write_str("the runner's signal, which had seen enough"),
            Self::Timeout(limit, seconds) => {
                write!(f, "the runner's signal, when the limit {limit} of {seconds} s had passed")
            }
        }
    }
}

/// The evidence of a run.
#[derive(Clone, Debug)]
pub struct Evidence<'a> {
    /// The kernel log.
    pub console: &'a str,
    /// The status stream.
    pub wire: &'a [u8],
    /// How QEMU ended.
    pub exit: Exit,
}

/// The status of one test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Status {
    /// Passed, as expected.
    Pass,
    /// Failed, unexpected.
    Fail,
    /// Failed, as expected.
    ExpectedFail,
    /// Passed where a failure was expected.
    UnexpectedPass,
    /// Skipped, unexpected.
    Skip,
    /// Skipped, as expected.
    ExpectedSkip,
    /// No result, though the suite ended in order.
    Missing,
    /// No result, because the suite or the guest ended early.
    Crashed,
    /// A result of a test that is not in the plan.
    Unplanned,
}

impl Status {
    /// Whether the verdict can still be a pass.
    pub fn good(self) -> bool {
        matches!(self, Self::Pass | Self::ExpectedFail | Self::ExpectedSkip)
    }
}

/// The result of one test.
#[derive(Clone, Debug, Serialize)]
pub struct TestResult {
    /// Its name.
    pub name: String,
    /// Its status.
    pub status: Status,
    /// The reason.
    pub reason: String,
    /// Its duration, by the time stamps of the kernel log.
    pub seconds: Option<f64>,
}

/// The results of one suite.
#[derive(Clone, Debug, Serialize)]
pub struct SuiteResult {
    /// Its name.
    pub name: String,
    /// How many tests were planned.
    pub planned: usize,
    /// How many tests were left out because they are slow.
    pub with_full: usize,
    /// How many tests do not apply to the kernel's configuration.
    pub not_applicable: usize,
    /// The results: the planned ones in order, then unplanned ones.
    pub tests: Vec<TestResult>,
}

impl SuiteResult {
    /// How many tests have one of these statuses.
    pub fn count(&self, which: &[Status]) -> usize {
        self.tests.iter().filter(|t| which.contains(&t.status)).count()
    }
}

/// A reason why the verdict is no pass.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Problem {
    /// Its kind: a status, the kind of a splat, `taint`, `exit`, `stream`, ...
    pub kind: String,
    /// The suite or test that it belongs to.
    pub subject: String,
    /// Its text.
    pub text: String,
}

/// The verdict.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The name of the kernel.
    pub kernel: String,
    /// The name of the machine.
    pub machine: String,
    /// `uname -r` of the guest.
    pub release: Option<String>,
    /// The results.
    pub suites: Vec<SuiteResult>,
    /// The suites that were left out as a whole, each with its number of tests.
    pub left_out: Vec<(String, usize)>,
    /// Every report in the kernel log, deliberate ones included.
    pub splats: Vec<Splat>,
    /// The reasons why the verdict is no pass; empty for a pass.
    pub problems: Vec<Problem>,
}

impl Verdict {
    /// Whether the verdict is a pass.
    pub fn pass(&self) -> bool {
        self.problems.is_empty()
    }

    /// The number of tests that passed, and of tests whose result was not the expected one. Tests
    /// that [`Verdict::excused`] counts are in neither.
    pub fn counts(&self) -> (usize, usize) {
        let all = self.suites.iter().flat_map(|s| &s.tests);
        let bad = all.clone().filter(|t| !t.status.good()).count();
        (all.filter(|t| t.status == Status::Pass).count(), bad)
    }

    /// The number of tests that failed as expected, and of tests that were skipped as expected:
    /// neither proves anything good.
    pub fn excused(&self) -> (usize, usize) {
        let count = |status| self.suites.iter().map(|s| s.count(&[status])).sum();
        (count(Status::ExpectedFail), count(Status::ExpectedSkip))
    }
}

fn problem(kind: &str, subject: &str, text: impl Into<String>) -> Problem {
    Problem { kind: kind.to_owned(), subject: subject.to_owned(), text: text.into() }
}

/// Folds the results of a parameterised KUnit case into one: the plan has the name of the case, not
/// of its parameters.
fn fold_parameters(cases: Vec<Case>) -> Vec<Case> {
    let mut out: Vec<Case> = Vec::new();
    let mut folded: HashMap<String, usize> = HashMap::new();
    for mut case in cases {
        let name: String = case.name.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
        if name == case.name {
            out.push(case);
            continue;
        }
        if let Some(&at) = folded.get(&name) {
            if out[at].outcome == Outcome::Pass && case.outcome != Outcome::Pass {
                out[at].outcome = case.outcome;
                out[at].reason = format!("{}: {}", case.name, case.reason);
            }
        } else {
            folded.insert(name.clone(), out.len());
            case.name = name;
            out.push(case);
        }
    }
    out
}

fn judge_test(test: &Test, case: &Case) -> (Status, String) {
    let text = |s: &str| if s.is_empty() { "no reason given".to_owned() } else { s.to_owned() };
    match (case.outcome, &test.expect) {
        (Outcome::Pass, Expect::Pass) => (Status::Pass, String::new()),
        // An expected failure does not excuse a finding of the audit.
        (Outcome::Fail, Expect::Fail(_)) if case.reason.contains(AUDIT) => {
            (Status::Fail, case.reason.clone())
        }
        (Outcome::Fail, Expect::Fail(known)) if known.how.is_match(&case.reason) => {
            (Status::ExpectedFail, known.why.clone())
        }
        (Outcome::Fail, Expect::Fail(known)) => {
            let said = text(&case.reason);
            (Status::Fail, format!("not the failure that is known (/{}/): {said}", known.how))
        }
        (Outcome::Skip, Expect::Skip(why)) => (Status::ExpectedSkip, why.clone()),
        (Outcome::Pass, Expect::Fail(Failure { why, .. }) | Expect::Skip(why)) => {
            (Status::UnexpectedPass, format!("passed, though expected not to: {why}"))
        }
        (Outcome::Fail, _) => (Status::Fail, text(&case.reason)),
        (Outcome::Skip, _) => {
            (Status::Skip, format!("skipped, and a skip is no pass: {}", text(&case.reason)))
        }
    }
}

/// The status and reason of results that did not come.
struct Absence {
    status: Status,
    reason: String,
}

fn judge_suite(
    plan: &Suite,
    seen: Option<&mut Seen>,
    absence: &Absence,
    problems: &mut Vec<Problem>,
) -> SuiteResult {
    let mut results = SuiteResult {
        name: plan.name.clone(),
        planned: plan.tests.len(),
        with_full: plan.with_full,
        not_applicable: plan.not_applicable,
        tests: Vec::new(),
    };
    let mut absence = Absence { status: absence.status, reason: absence.reason.clone() };
    let mut cases = Vec::new();
    if let Some(seen) = seen {
        if plan.kind == Kind::Harness {
            cases = std::mem::take(&mut seen.cases);
        } else {
            let report = ktap::parse(seen.lines.iter().map(String::as_str));
            cases = report.cases;
            seen.errors.extend(report.errors);
            if plan.kind == Kind::Script {
                seen.errors.extend(ktap::wrong_totals(&seen.lines, &cases));
            }
        }
        if plan.kind == Kind::Kunit {
            cases = fold_parameters(cases);
        }
        if let Some(end) = &seen.end {
            if let Some(why) = end {
                // A KTAP program that reports a failure exits with 1; the failed result already
                // says so.
                let told =
                    why == "exit status 1" && cases.iter().any(|c| c.outcome == Outcome::Fail);
                if !told {
                    problems.push(problem(
                        "suite",
                        &plan.name,
                        format!("did not end in order: {why}"),
                    ));
                }
                absence = Absence {
                    status: Status::Crashed,
                    reason: format!("no result: the suite ended with {why}"),
                };
            } else {
                absence = Absence {
                    status: Status::Missing,
                    reason: "no result, though the suite ended in order".to_owned(),
                };
            }
        }
        for error in &seen.errors {
            problems.push(problem("ktap", &plan.name, error.clone()));
        }
    }
    if plan.tests.is_empty() && plan.not_applicable == 0 {
        problems.push(problem(
            "suite",
            &plan.name,
            format!("no test planned; write them into {}", plan.source),
        ));
    }
    if !plan.tests.is_empty() && !cases.iter().any(|c| c.outcome != Outcome::Skip) {
        problems.push(problem("suite", &plan.name, "not one test ran"));
    }
    let mut came: BTreeMap<String, Vec<Case>> = BTreeMap::new();
    let mut order = Vec::new();
    for case in cases {
        order.push(case.name.clone());
        came.entry(case.name.clone()).or_default().push(case);
    }
    for test in &plan.tests {
        let (status, reason) = match came.remove(&test.name).as_deref() {
            None | Some([]) => (absence.status, absence.reason.clone()),
            Some([case]) => judge_test(test, case),
            Some(more) => (Status::Fail, format!("{} results for one test", more.len())),
        };
        results.tests.push(TestResult { name: test.name.clone(), status, reason, seconds: None });
    }
    for name in order {
        let Some(cases) = came.remove(&name) else { continue };
        if plan.deselected.contains(&name) {
            // A program runs the named tests and then the one that ends every run, which unloads
            // the module. A filter must not hide a failure of that test.
            let failed = cases.iter().find(|c| c.outcome == Outcome::Fail);
            if let Some(case) = failed.filter(|_| plan.kind == Kind::Ktap) {
                results.tests.push(TestResult {
                    name,
                    status: Status::Fail,
                    reason: format!("not selected, but it ran and failed: {}", case.reason),
                    seconds: None,
                });
            }
        } else {
            results.tests.push(TestResult {
                name,
                status: Status::Unplanned,
                reason: format!("unplanned: add it to {}", plan.source),
                seconds: None,
            });
        }
    }
    for test in results.tests.iter().filter(|t| !t.status.good()) {
        let subject = format!("{}: {}", plan.name, test.name);
        problems.push(problem(&format!("{:?}", test.status), &subject, test.reason.clone()));
    }
    results
}

/// Judges the kernel log. Returns whether a test made a warning that it is allowed.
fn judge_log(
    planned: &Planned,
    results: &[SuiteResult],
    splats: &[Splat],
    problems: &mut Vec<Problem>,
) -> bool {
    let mut warned = false;
    let mut counts = vec![0; planned.allow.len()];
    let mut came = vec![false; planned.known.len()];
    for splat in splats {
        let fits = |a: &Allow| {
            Some(a.test.as_str()) == splat.test.as_deref() && a.pattern.is_match(&splat.text)
        };
        // A report that a test is allowed counts for the test, even if the kernel is also known to
        // make it.
        if let Some(at) = planned.allow.iter().position(fits) {
            counts[at] += 1;
            warned |= splat.kind == "WARN";
            continue;
        }
        if let Some(at) = planned.known.iter().position(|k| k.pattern.is_match(&splat.text)) {
            came[at] = true;
            continue;
        }
        let place = splat.place.as_ref().map(|p| format!(" in {p}")).unwrap_or_default();
        let subject = splat.test.as_deref().unwrap_or("outside any test");
        problems.push(problem(
            splat.kind,
            subject,
            format!("{}{place} (console line {})", splat.text, splat.line),
        ));
    }
    for (allow, count) in planned.allow.iter().zip(counts) {
        let ran = |t: &&TestResult| {
            !matches!(
                t.status,
                Status::Missing | Status::Crashed | Status::Skip | Status::ExpectedSkip
            )
        };
        let test = results.iter().flat_map(|s| &s.tests).filter(ran).find(|t| t.name == allow.test);
        let suite = results.iter().find(|s| s.name == allow.test);
        if (test.is_some() || suite.is_some()) && count != allow.count {
            let text = format!(
                "{count} lines like /{}/ in the log, {} must be",
                allow.pattern, allow.count
            );
            problems.push(problem("deliberate splat", &allow.test, text));
        }
    }
    judge_known(planned, results, &came, problems);
    warned
}

/// Reports the known faults of the kernel that did not appear: they are fixed, or the test for them
/// is gone.
fn judge_known(
    planned: &Planned,
    results: &[SuiteResult],
    came: &[bool],
    problems: &mut Vec<Problem>,
) {
    // In these suites the runner itself loads the module, with the full parameters of the machine.
    // The programs of other suites load it with parameters of their own.
    let loads = |s: &&Suite| matches!(s.kind, Kind::Kunit | Kind::Harness);
    let ran = |t: &TestResult| !matches!(t.status, Status::Missing | Status::Crashed);
    let loaded = planned.suites.iter().filter(loads).any(|suite| {
        results.iter().filter(|r| r.name == suite.name).any(|r| r.tests.iter().any(ran))
    });
    for (known, _) in planned.known.iter().zip(came).filter(|(_, came)| loaded && !**came) {
        let text = format!(
            "no line like /{}/ in the log, though one must come on this kernel: {}",
            known.pattern, known.reason
        );
        problems.push(problem("known fault", &planned.kernel, text));
    }
}

fn judge_exit(stream: &Stream, evidence: &Evidence<'_>, problems: &mut Vec<Problem>) {
    let last = || {
        let line = evidence.console.lines().rev().find(|l| !splat::message(l).trim().is_empty());
        line.map_or("the console is empty".to_owned(), |l| {
            format!("last console line: {}", splat::message(l))
        })
    };
    let within = match (&stream.hello, &stream.running) {
        (None, _) => "boot".to_owned(),
        (_, Some(suite)) => suite.clone(),
        _ => "power-off".to_owned(),
    };
    match &evidence.exit {
        Exit::Timeout(what, secs) => {
            let text = format!(
                "{what} timeout after {secs} s; all stacks are in the console log; {}",
                last()
            );
            problems.push(problem("timeout", &within, text));
        }
        Exit::Signal(n) => {
            problems.push(problem("exit", &within, format!("QEMU was killed by signal {n}")))
        }
        Exit::Code(0) | Exit::Enough => {}
        Exit::Code(n) => {
            problems.push(problem("exit", &within, format!("QEMU ended with status {n}")))
        }
    }
    // The agent prints on the console only the brackets of tests and its own fatal error.
    let agent =
        |l: &&str| splat::message(l).starts_with("zdvm-guest: ") && splat::bracket(l).is_none();
    if let Some(line) = evidence.console.lines().find(agent) {
        problems.push(problem("guest", &within, splat::message(line)));
    }
    if stream.hello.is_none() {
        problems.push(problem("boot", "guest", format!("the guest never came up; {}", last())));
    } else if !stream.done {
        problems.push(problem(
            "stream",
            &within,
            format!("the guest ended before its work was done; {}", last()),
        ));
    }
    let down =
        evidence.console.lines().any(|l| splat::message(l).starts_with("reboot: Power down"));
    if evidence.exit == Exit::Code(0) && !down {
        problems.push(problem(
            "exit",
            &within,
            format!("no power-off in the kernel log; {}", last()),
        ));
    }
}

/// Judges a run.
pub fn judge(planned: &Planned, evidence: &Evidence<'_>) -> Verdict {
    let mut problems = Vec::new();
    let (messages, damage) = wire::decode(evidence.wire);
    let mut twice = Vec::new();
    let mut stream = Stream::read(messages, &mut twice);
    problems.extend(twice.iter().map(|(subject, text)| problem("stream", subject, *text)));
    if let Some(damage) = damage {
        problems.push(problem("stream", "guest", damage));
    }
    let splats = splat::scan(evidence.console);
    let open = stream.test.clone().or_else(|| splat::open_test(evidence.console));
    let reason = match (&open, &stream.running) {
        (Some(test), _) => format!("no result: the guest ended within {test}"),
        (None, Some(suite)) => format!("no result: the guest ended within the suite {suite}"),
        (None, None) => "no result: the suite never started".to_owned(),
    };
    let absence = Absence { status: Status::Crashed, reason };
    if planned.suites.is_empty() {
        problems.push(problem("plan", "run", "no suite was planned"));
    }
    let mut suites = Vec::new();
    for plan in &planned.suites {
        let seen = stream.suites.get_mut(&plan.name);
        suites.push(judge_suite(plan, seen, &absence, &mut problems));
    }
    let times = splat::times(evidence.console);
    for test in suites.iter_mut().flat_map(|s| &mut s.tests) {
        test.seconds = times.get(&test.name).copied();
    }
    for name in stream.suites.keys().filter(|n| planned.suites.iter().all(|s| s.name != **n)) {
        problems.push(problem("suite", name, "unplanned suite"));
    }
    let warned = judge_log(planned, &suites, &splats, &mut problems);
    // A warning that a test is allowed taints the kernel, too.
    let taint_after = planned.taint_after | if warned { taint::WARNED } else { 0 };
    judge_exit(&stream, evidence, &mut problems);
    let masks = [
        ("before the tests", stream.hello.as_ref().map(|h| h.1), planned.taint_before),
        ("after the tests", stream.taint, taint_after),
    ];
    for (when, got, wanted) in masks {
        // A stream without a mask has been reported as cut short above.
        if let Some(got) = got.filter(|&g| g != wanted) {
            let text = format!("{when} {}, expected {}", taint::show(got), taint::show(wanted));
            problems.push(problem("taint", "guest", text));
        }
    }
    Verdict {
        kernel: planned.kernel.clone(),
        machine: planned.machine.clone(),
        release: stream.hello.map(|h| h.0),
        suites,
        left_out: planned.left_out.clone(),
        splats,
        problems,
    }
}
