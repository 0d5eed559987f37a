// SPDX-License-Identifier: GPL-2.0
//! The files of expected results: which tests must give a result, which may fail or skip, where and
//! why, which ones a quick run leaves out, and which splats are deliberate.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use regex::Regex;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use zdvm_guest::plan::Kind;

use crate::kernel::kconfig;
use crate::plan::planned::{Allow, Expect, Failure, Suite, Test};

/// A file of expected results.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// The tests that must give a result, unless the suite's program lists them.
    #[serde(default)]
    pub tests: Vec<String>,
    /// For a suite whose program lists its tests: the [`sum`] of the names of each group. A test that is
    /// lost or renamed changes it. The group of `fork.cow` is `fork`.
    #[serde(default)]
    pub groups: BTreeMap<String, String>,
    /// Expected failures.
    #[serde(default)]
    pub fail: Vec<Exception>,
    /// Expected skips.
    #[serde(default)]
    pub skip: Vec<Exception>,
    /// The tests that a quick run leaves out.
    #[serde(default)]
    pub slow: Vec<Exception>,
    /// The symbols that tests need in a kernel's configuration.
    #[serde(default)]
    pub needs: Vec<Needs>,
    /// The tests that the programs of a kernel do not have.
    #[serde(default)]
    pub absent: Vec<Exception>,
    /// Deliberate splats.
    #[serde(default)]
    pub allow: Vec<AllowSpec>,
}

/// A statement about one test or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    /// The name of one test.
    #[serde(default)]
    pub test: Option<String>,
    /// A pattern of the names of several tests, instead of one name.
    #[serde(default)]
    pub pattern: Option<Pattern>,
    /// On these kernels; empty means on all.
    #[serde(default)]
    pub kernels: Vec<String>,
    /// On these machines; empty means on all, and `!NAME` on all but that one.
    #[serde(default)]
    pub machines: Vec<String>,
    /// The message of the failing test; only for an expected failure.
    #[serde(default)]
    pub how: Option<Pattern>,
    /// The reason.
    pub reason: String,
}

/// The symbols that some tests need in a kernel's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    /// The tests, by a pattern of their names.
    pub pattern: Pattern,
    /// Symbols, as in the matrix's `requires`.
    pub config: Vec<String>,
}

/// One deliberate splat.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowSpec {
    /// The test (for KUnit, the name of the suite).
    pub test: String,
    /// The pattern of its line.
    pub pattern: Pattern,
    /// The exact count.
    pub count: usize,
    /// On these kernels; empty means on all.
    #[serde(default)]
    pub kernels: Vec<String>,
    /// On these machines; empty means on all, and `!NAME` on all but that one.
    #[serde(default)]
    pub machines: Vec<String>,
}

/// A regular expression, compiled as the file is read.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(pub Regex);

impl TryFrom<String> for Pattern {
    type Error = regex::Error;

    fn try_from(text: String) -> Result<Self, regex::Error> {
        Regex::new(&text).map(Self)
    }
}

/// The part of the plan that is wanted.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only these suites; empty means all.
    pub suites: Vec<String>,
    /// Only tests whose name matches.
    pub filter: Option<Regex>,
    /// Whether slow tests are included.
    pub full: bool,
    /// The kernel's configuration, if tests without their symbols are to be left out.
    pub config: Option<String>,
}

/// Where a plan applies.
#[derive(Clone, Debug)]
pub struct On {
    /// The kernel whose results are expected.
    pub kernel: String,
    /// The machine.
    pub machine: String,
}

/// Where a plan applies, with the names that kernel and machine are `like`.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The kernel, and the kernel whose results it also gives.
    pub kernel: (&'a str, Option<&'a str>),
    /// The machine, and the machine whose results it also gives.
    pub machine: (&'a str, Option<&'a str>),
}

impl Place<'_> {
    fn is(&self, kernels: &[String], machines: &[String]) -> bool {
        let among = |list: &[String], (name, like): (&str, Option<&str>)| {
            let not = |n: &String| n.strip_prefix('!') == Some(name);
            let mut named = list.iter().filter(|n| !n.starts_with('!')).peekable();
            let all = named.peek().is_none();
            let is = |n: &String| n == name || Some(n.as_str()) == like;
            !list.iter().any(not) && (all || named.any(is))
        };
        among(kernels, self.kernel) && among(machines, self.machine)
    }
}

impl Exception {
    fn names(&self, test: &str) -> bool {
        self.test.as_deref().is_some_and(|t| t == test)
            || self.pattern.as_ref().is_some_and(|p| p.0.is_match(test))
    }

    fn fits(&self, test: &str, place: Place<'_>) -> bool {
        self.names(test) && place.is(&self.kernels, &self.machines)
    }

    fn check(&self, tests: &[String]) -> Result<()> {
        let said = match (&self.test, &self.pattern) {
            (Some(test), None) => test.clone(),
            (None, Some(pattern)) => format!("/{}/", pattern.0),
            _ => bail!("{:?} wants either `test` or `pattern`", self.reason),
        };
        if !tests.iter().any(|t| self.names(t)) {
            bail!("{said} is an exception, but nothing in `tests` is meant by it");
        }
        Ok(())
    }
}

/// The group of a test: its name up to the dot.
fn group(test: &str) -> &str {
    test.split_once('.').map_or(test, |(group, _)| group)
}

/// The number of tests in a group, and four digits that depend on their names.
fn sum(tests: &BTreeSet<&str>) -> String {
    let mut hash = Sha256::new();
    for test in tests {
        hash.update(test);
        hash.update("\n");
    }
    let digits = hash.finalize();
    format!("{} {:02x}{:02x}", tests.len(), digits[0], digits[1])
}

/// A set of known kernels and machines.
pub trait Known {
    /// Returns an error unless there is such a kernel.
    fn kernel(&self, name: &str) -> Result<()>;
    /// Returns an error unless there is such a machine.
    fn machine(&self, name: &str) -> Result<()>;
}

impl Expected {
    /// Takes the tests that the suite's program lists, if the file has only the sums of their names.
    pub fn fill(&mut self, list: impl FnOnce() -> Result<Vec<String>>) -> Result<()> {
        if self.groups.is_empty() {
            return Ok(());
        }
        if let Some(test) = self.tests.first() {
            bail!("{test}: the suite's program lists its tests: give the sum of each group only");
        }
        self.tests = list()?;
        let mut found: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for test in &self.tests {
            found.entry(group(test)).or_default().insert(test);
        }
        let mut wrong = String::new();
        for (name, tests) in &found {
            let (is, planned) = (sum(tests), self.groups.get(*name));
            if planned != Some(&is) {
                let before = planned.map_or("no line", String::as_str);
                let tests = Vec::from_iter(tests.iter().copied()).join(" ");
                wrong += &format!("\n{name} = \"{is}\"\n  before: {before}; now: {tests}");
            }
        }
        for (name, planned) in self.groups.iter().filter(|(n, _)| !found.contains_key(n.as_str())) {
            wrong += &format!("\nno line for {name}\n  before: {planned}; now: no test");
        }
        if !wrong.is_empty() {
            bail!(
                "tests were added, renamed or lost. If that is meant, write under [groups]:{wrong}"
            );
        }
        Ok(())
    }

    /// Refuses contradictions and names that do not exist.
    pub fn check(&self, known: &dyn Known) -> Result<()> {
        let mut seen = BTreeSet::new();
        for test in &self.tests {
            if !seen.insert(test) {
                bail!("{test} is planned twice");
            }
        }
        let exceptions =
            || self.fail.iter().chain(&self.skip).chain(&self.slow).chain(&self.absent);
        for e in exceptions() {
            e.check(&self.tests)?;
        }
        for n in &self.needs {
            if n.config.is_empty() || !self.tests.iter().any(|t| n.pattern.0.is_match(t)) {
                bail!("/{}/ needs nothing, or is no test's name", n.pattern.0);
            }
        }
        if let Some(e) = self.fail.iter().find(|e| e.how.is_none()) {
            bail!(
                "{:?}: a failure that is expected fails in a known way: `how` is wanted",
                e.reason
            );
        }
        let mut others = self.skip.iter().chain(&self.slow).chain(&self.absent);
        if let Some(e) = others.find(|e| e.how.is_some()) {
            bail!("{:?}: `how` is for [[fail]] only", e.reason);
        }
        if let Some(e) = self.absent.iter().find(|e| e.kernels.is_empty()) {
            bail!("{:?}: what no kernel has is no test: `kernels` is wanted", e.reason);
        }
        let places = exceptions().map(|e| (&e.reason, &e.kernels, &e.machines));
        let places = places.chain(self.allow.iter().map(|a| (&a.test, &a.kernels, &a.machines)));
        for (what, kernels, machines) in places {
            for name in kernels {
                known.kernel(name).with_context(|| what.clone())?;
            }
            for name in machines {
                let name = name.strip_prefix('!').unwrap_or(name);
                known.machine(name).with_context(|| what.clone())?;
            }
        }
        Ok(())
    }

    fn expect(&self, test: &str, place: Place<'_>) -> Expect {
        let fail = self.fail.iter().find(|e| e.fits(test, place));
        let skip = self.skip.iter().find(|e| e.fits(test, place));
        match (fail.and_then(|e| Some((e, e.how.as_ref()?))), skip) {
            (Some((e, how)), _) => {
                Expect::Fail(Failure { why: e.reason.clone(), how: how.0.clone() })
            }
            (None, Some(e)) => Expect::Skip(e.reason.clone()),
            (None, None) => Expect::Pass,
        }
    }

    /// The deliberate splats of this place.
    pub fn allowed(&self, place: Place<'_>) -> Vec<Allow> {
        let there = self.allow.iter().filter(|a| place.is(&a.kernels, &a.machines));
        let allow = |a: &AllowSpec| Allow {
            test: a.test.clone(),
            pattern: a.pattern.0.clone(),
            count: a.count,
        };
        there.map(allow).collect()
    }

    /// The tests that the programs of this place have.
    pub fn present<'a>(&'a self, place: Place<'a>) -> impl Iterator<Item = &'a String> {
        let absent = move |test: &str| self.absent.iter().any(|e| e.fits(test, place));
        self.tests.iter().filter(move |t| !absent(t))
    }

    /// The planned suite of this file.
    pub fn suite(
        &self,
        name: &str,
        kind: Kind,
        source: String,
        place: Place<'_>,
        selection: &Selection,
    ) -> Suite {
        let mut suite = Suite {
            name: name.to_owned(),
            kind,
            source,
            tests: Vec::new(),
            deselected: BTreeSet::new(),
            with_full: 0,
            not_applicable: 0,
        };
        // A script and KUnit run all of their tests: none can be left out.
        let slow = |test: &str| {
            !selection.full
                && !matches!(kind, Kind::Script | Kind::Kunit)
                && self.slow.iter().any(|e| e.fits(test, place))
        };
        // A script and KUnit run all of their tests, and the matrix requires their symbols of every
        // kernel.
        let config = selection.config.as_deref();
        let config = config.filter(|_| matches!(kind, Kind::Ktap | Kind::Harness));
        let lacks =
            |needs: &&Needs| config.is_some_and(|c| !kconfig::lacking(&needs.config, c).is_empty());
        let lacking: Vec<&Needs> = self.needs.iter().filter(lacks).collect();
        let applies = |test: &str| !lacking.iter().any(|n| n.pattern.0.is_match(test));
        for test in self.present(place) {
            let wanted = selection.filter.as_ref().is_none_or(|f| f.is_match(test));
            if wanted && !applies(test) {
                suite.not_applicable += 1;
                suite.deselected.insert(test.clone());
            } else if wanted && !slow(test) {
                suite.tests.push(Test { name: test.clone(), expect: self.expect(test, place) });
            } else {
                suite.with_full += usize::from(wanted);
                suite.deselected.insert(test.clone());
            }
        }
        suite
    }
}
