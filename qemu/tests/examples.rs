// SPDX-License-Identifier: GPL-2.0
//! The examples in the documentation of `rust/kernel`: each public type has one, and each is a KUnit case.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

#[path = "../../scripts/doctests.rs"]
#[allow(clippy::pedantic)]
mod doctests;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use doctests::{Example, Kind, generate, names, scan, scan_all};

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn run_names(examples: &[Example]) -> Vec<String> {
    let all = examples.iter().zip(names(examples));
    all.filter(|(example, _)| example.kind == Kind::Run).map(|(_, name)| name).collect()
}

#[test]
fn each_public_type_has_an_example() {
    let types = scan_all(&repo()).unwrap().types;
    assert!(types.len() > 60, "only {} types found", types.len());
    let without = types.iter().filter(|t| t.file.starts_with("rust/kernel/mm/") && !t.has_example);
    let without: Vec<String> = without.map(|t| format!("{} in {}", t.name, t.file)).collect();
    assert!(without.is_empty(), "types without an example: {without:#?}");
}

#[test]
fn each_example_is_one_case() {
    let examples = scan_all(&repo()).unwrap().examples;
    let suite = generate(&examples);
    let cases = run_names(&examples);
    assert_eq!(suite.matches("#[test]\n").count(), cases.len());
    assert_eq!(cases.iter().collect::<BTreeSet<_>>().len(), cases.len(), "a name is there twice");
    // An example that is not run states the reason.
    for example in examples.iter().filter(|example| example.kind == Kind::NoRun) {
        let reason = example.code.iter().any(|line| line.trim_start().starts_with("# // no_run: "));
        assert!(reason, "{}:{} is not run, and does not say why", example.file, example.line);
    }
}

#[test]
fn each_case_is_expected() {
    let expected = fs::read_to_string(repo().join("qemu/kernel/expected/kunit.toml")).unwrap();
    let expected: BTreeSet<String> = expected
        .lines()
        .filter_map(|line| line.trim().strip_prefix("\"zdmirror_examples.")?.strip_suffix("\","))
        .map(str::to_owned)
        .collect();
    let cases: BTreeSet<String> =
        run_names(&scan_all(&repo()).unwrap().examples).into_iter().collect();
    assert_eq!(expected, cases);
}

/// Examples must also compile in the kernel tree, which has no crate but `kernel`.
#[test]
fn examples_know_the_kernel_crate_only() {
    for example in scan_all(&repo()).unwrap().examples {
        for line in &example.code {
            assert!(!line.contains("crate::"), "{}:{}: {line}", example.file, example.line);
            assert!(!line.contains("unsafe"), "{}:{}: {line}", example.file, example.line);
        }
    }
}

#[test]
fn blocks_are_found() {
    let text = "\
//! ```
//! assert!(true);
//! ```

/// ```text
/// no code
/// ```
///
/// ```
/// let a = 1;
/// # assert_eq!(a, 1);
/// ```
///
/// ```no_run
/// # // no_run: an example
/// kernel::boom();
/// ```
#[derive(Debug)]
pub(crate) struct Two;

/// None.
pub(super) struct Hidden;

/// None.
pub(in crate::mm) struct AlsoHidden;

impl Two {
    /// ```ignore
    /// ?
    /// ```
    pub(crate) fn skipped() {}
}
";
    let found = scan("rust/kernel/mm/some_file.rs", text);
    let seen: Vec<_> = found.examples.iter().map(|e| (e.line, e.item.as_str(), e.kind)).collect();
    assert_eq!(
        seen,
        [
            (1, "some_file", Kind::Run),
            (9, "Two", Kind::Run),
            (14, "Two", Kind::NoRun),
            (28, "skipped", Kind::Skip),
        ]
    );
    assert_eq!(
        names(&found.examples),
        ["some_file_some_file", "some_file_Two", "some_file_Two_2", "some_file_skipped"]
    );
    let types: Vec<_> = found.types.iter().map(|t| (t.name.as_str(), t.has_example)).collect();
    assert_eq!(types, [("Two", true)]);
    let suite = generate(&found.examples);
    // Hidden lines are code, and the crate is the one with the abstractions in it.
    assert!(suite.contains("\nassert_eq!(a, 1);\n"));
    assert!(suite.contains("\ncrate::examples::facade::boom();\n"));
    assert!(!suite.contains("no code") && !suite.contains("\n?\n"));
}

/// A failure names the line of the comment.
#[test]
fn lines_are_those_of_the_comment() {
    let found = scan(
        "rust/kernel/x.rs",
        "//\n\n/// ```\n/// let a = 1;\n/// assert!(a == 1);\n/// ```\nfn f() {}\n",
    );
    let suite = generate(&found.examples);
    let line = suite.lines().position(|line| line == "assert!(a == 1);").unwrap() + 1;
    let offset = suite.split_once("LINES: i32 = ").unwrap().1.split_once(';').unwrap().0;
    assert_eq!(line as i64 - offset.parse::<i64>().unwrap(), 5);
}
