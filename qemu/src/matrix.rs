// SPDX-License-Identifier: GPL-2.0
//! `qemu/kernel/matrix.toml` and the files of expected results that it names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use regex::Regex;
use serde::Deserialize;
use zdvm_guest::plan::Kind;

use crate::taint;
use crate::verdict::{Allow, Expect, Planned, Suite, Test};

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// Symbols that a kernel must have.
    pub requires: Vec<String>,
    /// Limits, for KVM.
    pub timeouts: Timeouts,
    /// Kernels by name.
    pub kernel: BTreeMap<String, Kernel>,
    /// Suites by name.
    pub suite: BTreeMap<String, SuiteSpec>,
    /// Order in which suites run.
    pub order: Vec<String>,
    /// Where the file is.
    #[serde(skip)]
    pub dir: PathBuf,
}

/// Limits in seconds.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// Until the guest says hello.
    pub boot: u64,
    /// Silence of a running suite.
    pub test: u64,
    /// A whole suite.
    pub suite: u64,
    /// A whole boot.
    pub total: u64,
    /// All of the above times this under TCG.
    pub tcg_factor: u64,
}

/// One kernel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Version, as `scripts/kernel-source.sh` takes it.
    pub source: String,
    /// Directory with patches and their `series`, beside the matrix.
    pub patches: Option<PathBuf>,
    /// Configuration fragments, beside the matrix, merged in order.
    pub config: Vec<PathBuf>,
    /// `-m`.
    pub memory: String,
    /// `-smp`.
    pub vcpus: u32,
    /// More kernel command line.
    #[serde(default)]
    pub cmdline_extra: String,
    /// Taint letters before the first test.
    #[serde(default)]
    pub taint_before: String,
    /// Taint letters after the last test.
    pub taint_after: String,
}

/// One suite.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuiteSpec {
    /// `kunit`, `ktap` or `harness`.
    pub kind: String,
    /// File with its plan, beside the matrix.
    pub expected: PathBuf,
    /// Program in the guest.
    #[serde(default)]
    pub program: Option<String>,
}

impl SuiteSpec {
    /// How it is run.
    pub fn kind(&self) -> Result<Kind> {
        Ok(match self.kind.as_str() {
            "kunit" => Kind::Kunit,
            "ktap" => Kind::Ktap,
            "harness" => Kind::Harness,
            other => bail!("unknown kind of suite {other:?}: kunit, ktap or harness"),
        })
    }
}

/// A file of expected results.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// Tests that must come.
    #[serde(default)]
    pub tests: Vec<String>,
    /// What the program lists beyond `tests` is known, but not expected to work yet.
    #[serde(default)]
    pub rest_not_yet: bool,
    /// Expected failures.
    #[serde(default)]
    pub fail: Vec<Exception>,
    /// Expected skips.
    #[serde(default)]
    pub skip: Vec<Exception>,
    /// Deliberate splats.
    #[serde(default)]
    pub allow: Vec<AllowSpec>,
}

/// One expected failure or skip.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    /// The test.
    pub test: String,
    /// On these kernels; empty means on all.
    #[serde(default)]
    pub kernels: Vec<String>,
    /// Why.
    pub reason: String,
}

/// One deliberate splat.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowSpec {
    /// The test (for KUnit, the suite's name).
    pub test: String,
    /// Regular expression for its line.
    pub pattern: String,
    /// Exact count.
    pub count: usize,
    /// On these kernels; empty means on all.
    #[serde(default)]
    pub kernels: Vec<String>,
}

fn applies(kernels: &[String], kernel: &str) -> bool {
    kernels.is_empty() || kernels.iter().any(|k| k == kernel)
}

/// What of the plan is wanted this time.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only these suites; empty means all.
    pub suites: Vec<String>,
    /// Only tests whose name matches.
    pub filter: Option<Regex>,
    /// Also what is not expected to work yet.
    pub all: bool,
}

/// The expectations of one suite, read but not yet selected from.
pub type Plans = BTreeMap<String, Expected>;

impl Matrix {
    /// Reads the matrix of a checkout.
    pub fn load(repo: &Path) -> Result<Self> {
        let dir = repo.join("qemu/kernel");
        let path = dir.join("matrix.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut matrix: Self =
            toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        matrix.dir = dir;
        for name in &matrix.order {
            matrix.suite(name)?;
        }
        for name in matrix.suite.keys() {
            if !matrix.order.contains(name) {
                bail!("suite {name} is not in `order` of {}", path.display());
            }
        }
        Ok(matrix)
    }

    /// A kernel by name.
    pub fn kernel(&self, name: &str) -> Result<&Kernel> {
        let known = || self.kernel.keys().cloned().collect::<Vec<_>>().join(", ");
        self.kernel
            .get(name)
            .with_context(|| format!("no kernel {name:?} in the matrix; there are: {}", known()))
    }

    /// A suite by name.
    pub fn suite(&self, name: &str) -> Result<&SuiteSpec> {
        let known = || self.order.join(", ");
        self.suite
            .get(name)
            .with_context(|| format!("no suite {name:?} in the matrix; there are: {}", known()))
    }

    /// Suites wanted, in order.
    pub fn selected(&self, selection: &Selection) -> Result<Vec<String>> {
        for name in &selection.suites {
            self.suite(name)?;
        }
        let wanted = |n: &&String| selection.suites.is_empty() || selection.suites.contains(n);
        Ok(self.order.iter().filter(wanted).cloned().collect())
    }

    /// Reads every suite's file of expected results.
    pub fn plans(&self) -> Result<Plans> {
        let mut plans = Plans::new();
        for (name, spec) in &self.suite {
            let path = self.dir.join(&spec.expected);
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let plan: Expected =
                toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
            plan.check().with_context(|| format!("in {}", path.display()))?;
            plans.insert(name.clone(), plan);
        }
        Ok(plans)
    }

    /// What is planned for a kernel. `lists` has, where known, the programs' own lists of tests.
    pub fn planned(
        &self,
        kernel: &str,
        plans: &Plans,
        lists: &BTreeMap<String, Vec<String>>,
        selection: &Selection,
    ) -> Result<Planned> {
        let spec = self.kernel(kernel)?;
        let mut planned = Planned {
            kernel: kernel.to_owned(),
            suites: Vec::new(),
            allow: Vec::new(),
            taint_before: taint::parse(&spec.taint_before)?,
            taint_after: taint::parse(&spec.taint_after)?,
        };
        for name in self.selected(selection)? {
            let (Some(expected), spec) = (plans.get(&name), self.suite(&name)?) else {
                bail!("no plan for the suite {name}");
            };
            let source = format!("qemu/kernel/{}", spec.expected.display());
            let list = lists.get(&name).map(Vec::as_slice);
            let suite = expected.suite(&name, spec.kind()?, source, kernel, list, selection);
            // A filter that leaves nothing of a suite leaves the suite out.
            if selection.filter.is_some() && suite.tests.is_empty() {
                continue;
            }
            planned.suites.push(suite);
            for a in expected.allow.iter().filter(|a| applies(&a.kernels, kernel)) {
                planned.allow.push(Allow {
                    test: a.test.clone(),
                    pattern: Regex::new(&a.pattern)?,
                    count: a.count,
                });
            }
        }
        Ok(planned)
    }
}

impl Expected {
    fn check(&self) -> Result<()> {
        let mut seen = BTreeSet::new();
        for test in &self.tests {
            if !seen.insert(test) {
                bail!("{test} is planned twice");
            }
        }
        for e in self.fail.iter().chain(&self.skip) {
            if !self.rest_not_yet && !seen.contains(&e.test) {
                bail!("{} is an exception, but not in `tests`", e.test);
            }
        }
        for a in &self.allow {
            Regex::new(&a.pattern).with_context(|| format!("pattern of {}", a.test))?;
        }
        Ok(())
    }

    fn expect(&self, test: &str, kernel: &str) -> Expect {
        let find = |list: &[Exception]| {
            let fits = |e: &&Exception| e.test == test && applies(&e.kernels, kernel);
            list.iter().find(fits).map(|e| e.reason.clone())
        };
        match (find(&self.fail), find(&self.skip)) {
            (Some(why), _) => Expect::Fail(why),
            (None, Some(why)) => Expect::Skip(why),
            (None, None) => Expect::Pass,
        }
    }

    fn suite(
        &self,
        name: &str,
        kind: Kind,
        source: String,
        kernel: &str,
        list: Option<&[String]>,
        selection: &Selection,
    ) -> Suite {
        let mut suite = Suite {
            name: name.to_owned(),
            kind,
            source,
            tests: Vec::new(),
            deselected: BTreeSet::new(),
            not_yet: 0,
        };
        let wanted = |test: &str| selection.filter.as_ref().is_none_or(|f| f.is_match(test));
        for test in &self.tests {
            if wanted(test) {
                suite.tests.push(Test { name: test.clone(), expect: self.expect(test, kernel) });
            } else {
                suite.deselected.insert(test.clone());
            }
        }
        if self.rest_not_yet {
            for test in list.unwrap_or_default() {
                if self.tests.contains(test) || !wanted(test) {
                    continue;
                }
                suite.not_yet += 1;
                if selection.all {
                    let expect = match self.expect(test, kernel) {
                        Expect::Pass => Expect::Fail("not expected to work yet".to_owned()),
                        other => other,
                    };
                    suite.tests.push(Test { name: test.clone(), expect });
                } else {
                    suite.deselected.insert(test.clone());
                }
            }
        }
        suite
    }
}
