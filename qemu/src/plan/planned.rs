// SPDX-License-Identifier: GPL-2.0
//! What is known before a run, for the verdict to compare with what was seen.

use std::collections::BTreeSet;

use regex::Regex;
use zdvm_guest::plan::Kind;

/// What a planned test is expected to do on this kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// To pass.
    Pass,
    /// To fail in a known way, for a known reason; a pass is as loud as an unexpected failure.
    Fail(Failure),
    /// To be skipped, for a known reason.
    Skip(String),
}

/// A failure that is known.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Why the test fails.
    pub why: String,
    /// What the test says as it fails.
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
    /// What it is expected to do.
    pub expect: Expect,
}

/// One planned suite.
#[derive(Clone, Debug)]
pub struct Suite {
    /// Its name.
    pub name: String,
    /// How its results arrive.
    pub kind: Kind,
    /// Where its plan is written, for messages.
    pub source: String,
    /// What must come.
    pub tests: Vec<Test>,
    /// Names that are known but not selected: their results are ignored.
    pub deselected: BTreeSet<String>,
    /// How many tests were left out because they are slow.
    pub with_full: usize,
    /// How many the kernel's configuration has no use for.
    pub not_applicable: usize,
}

/// A deliberate splat.
#[derive(Clone, Debug)]
pub struct Allow {
    /// The test that provokes it.
    pub test: String,
    /// What its line looks like.
    pub pattern: Regex,
    /// How many there must be.
    pub count: usize,
}

/// Lines of the log that are a known fault of the kernel and no splat, whatever test runs.
#[derive(Clone, Debug)]
pub struct Known {
    /// What they look like.
    pub pattern: Regex,
    /// Why they come.
    pub reason: String,
}

/// All that is known before the run.
#[derive(Clone, Debug, Default)]
pub struct Planned {
    /// Name of the kernel.
    pub kernel: String,
    /// Name of the machine.
    pub machine: String,
    /// Suites, in order.
    pub suites: Vec<Suite>,
    /// Suites that were left out as a whole because they are slow, and how many tests they have.
    pub left_out: Vec<(String, usize)>,
    /// Deliberate splats.
    pub allow: Vec<Allow>,
    /// Known faults of the kernel on that machine.
    pub known: Vec<Known>,
    /// Taint before the first test.
    pub taint_before: u64,
    /// Taint after the last test.
    pub taint_after: u64,
}
