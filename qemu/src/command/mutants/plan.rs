// SPDX-License-Identifier: GPL-2.0
//! Which tests run against a bug, and in which order.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use zdvm_guest::plan::Kind;

use crate::command::mutants::catalogue::Mutant;
use crate::judge::splat;
use crate::plan::planned::{Planned, Suite, Test};

/// A set of tests with a driver, which has to notice a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Detector {
    /// Our selftests with our module.
    Suite,
    /// Upstream's hmm-tests with the kernel's C driver.
    UpstreamC,
    /// Upstream's hmm-tests with our module.
    UpstreamOurs,
}

impl Detector {
    /// All detectors, in the order of the table.
    pub const ALL: [Self; 3] = [Self::Suite, Self::UpstreamC, Self::UpstreamOurs];

    /// The detector's name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Suite => "suite",
            Self::UpstreamC => "upstream-c",
            Self::UpstreamOurs => "upstream-ours",
        }
    }

    /// The detector's description.
    pub fn title(self) -> &'static str {
        match self {
            Self::Suite => "our suite",
            Self::UpstreamC => "hmm-tests with the C driver",
            Self::UpstreamOurs => "hmm-tests with our driver",
        }
    }

    /// The suite of the matrix that it runs.
    pub fn suite(self) -> &'static str {
        match self {
            Self::Suite => "selftests",
            _ => "hmm",
        }
    }
}

/// The result of a detector's tests without any bug.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Baseline {
    /// Tests that are not clean without a bug, each with the reason.
    pub bad: BTreeMap<String, String>,
    /// The shapes of reports that the kernel log has without a bug.
    pub usual: BTreeSet<String>,
    /// For each bug the tests that reach it.
    pub reach: BTreeMap<String, BTreeSet<String>>,
    /// The duration of each test.
    pub seconds: BTreeMap<String, f64>,
}

impl Baseline {
    /// Adds the tests that reach each bug, from the log of a kernel that runs with coverage on.
    pub fn cover(&mut self, console: &str) {
        let mut test = None;
        for line in console.lines() {
            if let Some((begin, name)) = splat::bracket(line) {
                test = begin.then_some(name);
                continue;
            }
            let text = splat::message(line);
            let name = text.strip_prefix("zdm_mutant: ").and_then(|t| t.strip_suffix(" reached"));
            if let Some(name) = name {
                self.reach.entry(name.to_owned()).or_default().extend(test.clone());
            }
        }
        self.seconds.extend(splat::times(console));
    }

    /// The seconds that a test takes without any bug.
    fn takes(&self, test: &Test) -> f64 {
        self.seconds.get(&test.name).copied().unwrap_or_default()
    }

    /// The tests that reach a bug, in the order in which they run: first the likely ones of the
    /// catalogue, then those that reach few other bugs, because they test this code most directly.
    fn order(&self, mutant: &Mutant) -> Vec<&str> {
        let mut width: BTreeMap<&str, usize> = BTreeMap::new();
        for test in self.reach.values().flatten() {
            *width.entry(test).or_default() += 1;
        }
        let likely = |t: &str| mutant.likely.as_ref().is_some_and(|p| p.0.is_match(t));
        let weight = |t: &str| {
            // A second of run time weighs as much as four more reached bugs.
            let wide = u32::try_from(width.get(t).copied().unwrap_or_default()).unwrap_or(u32::MAX);
            f64::from(wide) + self.seconds.get(t).copied().unwrap_or_default() * 4.0
        };
        let mut tests: Vec<&str> =
            self.reach.get(&mutant.name).into_iter().flatten().map(String::as_str).collect();
        tests.sort_by(|a, b| {
            likely(b).cmp(&likely(a)).then(weight(a).total_cmp(&weight(b))).then(a.cmp(b))
        });
        tests
    }
}

/// Seconds that one of our tests may take, unless a slow one is among those that run.
const LIMIT: f64 = 45.0;
/// Seconds that a slow one may take.
const MOST: f64 = 150.0;
/// How much longer than without any bug a test may take: a slow test on a busy machine must not look
/// like a hang.
const FACTOR: f64 = 3.0;
/// The seconds that each test of a plan may take.
pub fn limit(planned: &Planned, baseline: &Baseline) -> u64 {
    let tests = planned.suites.iter().flat_map(|s| &s.tests);
    let longest = tests.map(|t| baseline.takes(t) * FACTOR).fold(LIMIT, f64::max);
    // CAST: Rounded up, and small.
    longest.min(MOST).ceil() as u64
}

/// How many tests run first, on their own.
const FIRST: usize = 8;
/// The last test of our suite. Every run of the program ends with it.
pub const LAST: &str = "unload.clean";

/// The names of the parts into which a suite of test programs is divided.
pub const PARTS: [&str; 3] = ["first", "second", "rest"];

/// The plan for a bug: the same tests in another order. Tests that fail in the baseline are left
/// out; `keep` keeps the order. The test that noticed the bug before the tests were changed, `last`,
/// runs first and alone, so that most boots with changed tests are short.
pub fn ordered(
    planned: &Planned,
    baseline: &Baseline,
    mutant: &Mutant,
    keep: bool,
    last: Option<&str>,
) -> Planned {
    let mut order = if keep { Vec::new() } else { baseline.order(mutant) };
    let known = last.and_then(|last| order.iter().position(|t| *t == last));
    if let Some(at) = known {
        order[..=at].rotate_right(1);
    }
    let first = if known.is_some() { 1 } else { FIRST };
    let rank = |test: &Test| order.iter().position(|t| *t == test.name);
    let mut out = Planned { suites: Vec::new(), ..planned.clone() };
    for suite in &planned.suites {
        let slow = |t: &Test| suite.kind == Kind::Ktap && baseline.takes(t) * FACTOR > MOST;
        let fit = |t: &&Test| !baseline.bad.contains_key(&t.name) && !slow(t);
        let mut tests: Vec<Test> = suite.tests.iter().filter(fit).cloned().collect();
        if suite.kind != Kind::Ktap {
            tests.sort_by_key(|t| rank(t).unwrap_or(usize::MAX));
            out.suites.push(Suite { tests, ..suite.clone() });
            continue;
        }
        let last = suite.tests.iter().find(|t| t.name == LAST);
        let part = |test: &Test| match rank(test) {
            Some(n) if n < first => 0,
            Some(_) => 1,
            None => 2,
        };
        for (number, name) in PARTS.iter().enumerate() {
            let mut mine: Vec<Test> =
                tests.iter().filter(|t| t.name != LAST && part(t) == number).cloned().collect();
            if mine.is_empty() {
                continue;
            }
            mine.extend(last.cloned());
            let names: BTreeSet<&String> = mine.iter().map(|t| &t.name).collect();
            let mut deselected: BTreeSet<String> = suite
                .tests
                .iter()
                .map(|t| &t.name)
                .filter(|n| !names.contains(n))
                .cloned()
                .collect();
            // A deselected name makes the runner name the tests, even where the part is the whole
            // suite.
            deselected.insert(String::new());
            out.suites.push(Suite {
                name: (*name).to_owned(),
                tests: mine,
                deselected,
                ..suite.clone()
            });
        }
    }
    out
}

/// Leaves out the tests that do not reach the bug. The last test stays, since the module's KUnit cases
/// may reach it when the module is loaded.
pub fn shorten(planned: &mut Planned) {
    for suite in planned.suites.iter_mut().filter(|s| s.name == PARTS[2]) {
        let out = suite.tests.drain(..).partition::<Vec<Test>, _>(|t| t.name == LAST);
        suite.tests = out.0;
        suite.deselected.extend(out.1.into_iter().map(|t| t.name));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;
    use crate::plan::expected::Pattern;
    use crate::plan::planned::Expect;

    fn mutant(likely: Option<&str>) -> Mutant {
        Mutant {
            name: "lost".into(),
            kind: String::new(),
            place: String::new(),
            does: String::new(),
            stands_for: String::new(),
            likely: likely.map(|p| Pattern(regex::Regex::new(p).unwrap())),
            equivalent: None,
            survives: None,
        }
    }

    fn planned(kind: Kind, names: &[&str]) -> Planned {
        let test = |n: &&str| Test { name: (*n).to_owned(), expect: Expect::Pass };
        let suite = Suite {
            name: "selftests".into(),
            kind,
            source: String::new(),
            tests: names.iter().map(test).collect(),
            deselected: BTreeSet::new(),
            with_full: 0,
            not_applicable: 0,
        };
        Planned { suites: vec![suite], ..Planned::default() }
    }

    fn baseline() -> Baseline {
        let mut baseline = Baseline::default();
        baseline.cover(
            "[1.0] zdm-selftests: begin a\n[1.1] zdm_mutant: lost reached\n\
             [1.1] zdm_mutant: other reached\n[1.2] zdm-selftests: end a\n\
             [1.3] zdm_mutant: third reached\n\
             [2.0] zdm-selftests: begin b\n[2.1] zdm_mutant: lost reached\n[2.2] zdm-selftests: end b\n\
             [3.0] zdm-selftests: begin c\n[3.2] zdm-selftests: end c\n",
        );
        baseline
    }

    fn names(suite: &Suite) -> Vec<&str> {
        suite.tests.iter().map(|t| t.name.as_str()).collect()
    }

    #[test]
    fn who_reaches_what() {
        let baseline = baseline();
        let of = |m: &str| baseline.reach.get(m).map(|t| t.iter().cloned().collect::<Vec<_>>());
        assert_eq!(of("lost").unwrap(), ["a", "b"]);
        assert_eq!(of("third"), Some(Vec::new()), "outside any test");
        assert_eq!(of("fourth"), None);
        assert!(baseline.seconds.contains_key("c"));
    }

    #[test]
    fn who_reaches_it_goes_first_in_one_program() {
        let plan = planned(Kind::Harness, &["c", "a", "b"]);
        let plan = ordered(&plan, &baseline(), &mutant(None), false, None);
        assert_eq!(names(&plan.suites[0]), ["b", "a", "c"], "b reaches nothing else");
        let plan = planned(Kind::Harness, &["c", "a", "b"]);
        let other = ordered(&plan, &baseline(), &mutant(Some("^a$")), false, None);
        assert_eq!(names(&other.suites[0]), ["a", "b", "c"]);
        let same = ordered(&plan, &baseline(), &mutant(Some("^a$")), true, None);
        assert_eq!(names(&same.suites[0]), ["c", "a", "b"]);
    }

    #[test]
    fn who_noticed_it_before_goes_first_and_alone() {
        let plan = |last| {
            let planned = planned(Kind::Ktap, &["a", "b", "c", LAST]);
            ordered(&planned, &baseline(), &mutant(Some("^a$")), false, Some(last))
        };
        let known = plan("b");
        assert_eq!(names(&known.suites[0]), ["b", LAST]);
        assert_eq!(names(&known.suites[1]), ["a", LAST]);
        let unknown = plan("c");
        assert_eq!(names(&unknown.suites[0]), ["a", "b", LAST], "c does not reach the bug");
    }

    #[test]
    fn a_suite_of_programs_comes_in_parts() {
        let mut baseline = baseline();
        for n in 0..20 {
            baseline.reach.get_mut("lost").unwrap().insert(format!("t{n:02}"));
        }
        baseline.bad.insert("b".into(), "flaky".into());
        baseline.seconds.insert("t18".into(), 16.0);
        baseline.seconds.insert("t19".into(), 51.0);
        let all: Vec<String> = (0..20).map(|n| format!("t{n:02}")).collect();
        let mut all: Vec<&str> = all.iter().map(String::as_str).collect();
        all.extend(["a", "b", "c", LAST]);
        let plan =
            ordered(&planned(Kind::Ktap, &all), &baseline, &mutant(Some("^a$")), false, None);
        assert_eq!(plan.suites.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), PARTS);
        assert!(names(&plan.suites[0]).contains(&"a") && plan.suites[0].tests.len() == FIRST + 1);
        assert_eq!(names(&plan.suites[2]), ["c", LAST]);
        assert_eq!(limit(&plan, &baseline), 48, "three times what t18 takes");
        let count: usize = plan.suites.iter().map(|s| s.tests.len() - 1).sum();
        assert_eq!(count, all.len() - 3, "b and t19 are left out, the last comes with each");
        for suite in &plan.suites {
            assert_eq!(suite.tests.last().unwrap().name, LAST);
            assert!(!suite.deselected.is_empty() && !suite.deselected.contains(LAST));
        }
        let mut short = plan;
        shorten(&mut short);
        assert_eq!(names(&short.suites[2]), [LAST]);
        assert!(
            short.suites[2].deselected.contains("c") && short.suites[0].tests.len() == FIRST + 1
        );
    }
}
