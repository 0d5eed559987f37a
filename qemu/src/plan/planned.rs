// SPDX-License-Identifier: GPL-2.0
//! The plan of a run, which the verdict compares with the evidence.

use std::collections::BTreeSet;

use regex::Regex;
use zdvm_guest::plan::Kind;

/// The expected result of a planned test on this kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The test passes.
    Pass,
    /// The test fails in a known way, for a known reason. A pass is a problem like an unexpected
    /// failure.
    Fail(Failure),
    /// The test is skipped, for a known reason.
    Skip(String),
}

/// A known failure.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Why the test fails.
    pub why: String,
    /// The message of the failing test.
    pub how: Regex,
}

impl PartialEq for Failure {
    fn eq(&self, other: &Self) -> bool {
        (&self.why, self.how.as_str()) == (&other.why, other.how.as_str())
    }
}

impl Eq for Failure {}

/// One planned test.
#[derive(Clone, Debug)]
pub struct Test {
    /// Its name.
    pub name: String,
    /// Its expected result.
    pub expect: Expect,
}

/// One planned suite.
#[derive(Clone, Debug)]
pub struct Suite {
    /// Its name.
    pub name: String,
    /// The form in which its results arrive.
    pub kind: Kind,
    /// The file that has its plan, for messages.
    pub source: String,
    /// The tests that must give a result.
    pub tests: Vec<Test>,
    /// The known tests that are not selected: their results are ignored.
    pub deselected: BTreeSet<String>,
    /// How many tests were left out because they are slow.
    pub with_full: usize,
    /// How many tests do not apply to the kernel's configuration.
    pub not_applicable: usize,
}

/// A deliberate splat.
#[derive(Clone, Debug)]
pub struct Allow {
    /// The test that provokes it.
    pub test: String,
    /// The pattern of its line.
    pub pattern: Regex,
    /// The exact count.
    pub count: usize,
}

/// Log lines that are a known fault of the kernel and no splat, whichever test runs.
#[derive(Clone, Debug)]
pub struct Known {
    /// The pattern of the lines.
    pub pattern: Regex,
    /// The reason.
    pub reason: String,
}

/// The plan of a run.
#[derive(Clone, Debug, Default)]
pub struct Planned {
    /// The name of the kernel.
    pub kernel: String,
    /// The name of the machine.
    pub machine: String,
    /// The suites, in order.
    pub suites: Vec<Suite>,
    /// The slow suites that were left out as a whole, each with its number of tests.
    pub left_out: Vec<(String, usize)>,
    /// Deliberate splats.
    pub allow: Vec<Allow>,
    /// The known faults of the kernel on that machine.
    pub known: Vec<Known>,
    /// Taint before the first test.
    pub taint_before: u64,
    /// Taint after the last test.
    pub taint_after: u64,
}

impl Planned {
    /// The plan as text, for the terminal.
    pub fn listing(&self) -> String {
        let mut out = format!("kernel {}, machine {}\n", self.kernel, self.machine);
        for suite in &self.suites {
            let more = match suite.with_full {
                0 => String::new(),
                n => format!(", {n} more with --full"),
            };
            let count = suite.tests.len();
            out += &format!("  suite {} ({count} tests{more}, {})\n", suite.name, suite.source);
            for test in &suite.tests {
                out += &match &test.expect {
                    Expect::Pass => format!("    {}\n", test.name),
                    Expect::Fail(known) => {
                        format!("    {} (expected to fail: {})\n", test.name, known.why)
                    }
                    Expect::Skip(why) => {
                        format!("    {} (expected to be skipped: {why})\n", test.name)
                    }
                };
            }
        }
        for (name, count) in &self.left_out {
            out += &format!("  suite {name} ({count} tests with --full)\n");
        }
        out
    }
}
