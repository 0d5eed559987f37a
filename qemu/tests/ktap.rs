// SPDX-License-Identifier: GPL-2.0
//! Runs the KTAP parser on the kernel's own examples, `tools/testing/kunit/test_data` of Linux 7.3,
//! and compares with what `kunit_tool_test.py` there expects of `kunit_parser.py`.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::path::Path;

use zdvm::judge::ktap::{self, Outcome};
use zdvm::judge::splat;

/// The numbers of passed, failed and skipped cases, and whether the text itself has an error.
type Counts = (usize, usize, usize, bool);

fn counts(file: &str) -> Counts {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/kunit").join(file);
    let bytes = fs::read(path).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let report = ktap::parse(text.lines().map(splat::message));
    let count = |outcome| report.cases.iter().filter(|c| c.outcome == outcome).count();
    (count(Outcome::Pass), count(Outcome::Fail), count(Outcome::Skip), !report.errors.is_empty())
}

/// The file, the counts, and where our parser differs from the kernel's on purpose.
const EXAMPLES: &[(&str, Counts, &str)] = &[
    ("config_printk_time.log", (10, 0, 0, false), ""),
    ("interrupted_tap_output.log", (10, 0, 0, false), ""),
    ("is_test_passed-all_passed.log", (10, 0, 0, false), ""),
    ("is_test_passed-all_passed_nested.log", (7, 0, 0, false), ""),
    ("is_test_passed-failure.log", (9, 1, 0, false), ""),
    (
        "is_test_passed-failure-nested.log",
        (1, 2, 0, true),
        "a suite that fails though its only case passed is worth a word",
    ),
    ("is_test_passed-kselftest.log", (2, 0, 1, false), ""),
    (
        "is_test_passed-missing_plan.log",
        (10, 0, 0, true),
        "without a plan nobody knows how many results are missing",
    ),
    (
        "is_test_passed-no_tests_no_plan.log",
        (1, 0, 0, false),
        "a case whose subtests are announced and do not come: the verdict's own plan finds it",
    ),
    (
        "is_test_passed-no_tests_run_no_header.log",
        (0, 0, 0, false),
        "no KTAP at all: the verdict says that not one test ran",
    ),
    (
        "is_test_passed-no_tests_run_with_header.log",
        (0, 0, 0, false),
        "an empty plan: the verdict says that not one test ran",
    ),
    ("kernel_panic_interrupt.log", (8, 0, 0, true), ""),
    ("multiple_prefixes.log", (10, 0, 0, false), ""),
    ("parse_attributes.log", (1, 0, 0, false), ""),
    ("parse_ktap_output.log", (3, 0, 0, false), ""),
    ("parse_subtest_header.log", (1, 0, 0, false), ""),
    ("pound_no_prefix.log", (10, 0, 0, false), ""),
    ("pound_sign.log", (10, 0, 0, false), ""),
    ("skip_all_tests.log", (0, 0, 5, false), ""),
    ("skip_tests.log", (4, 0, 1, false), ""),
    ("strip_hyphen.log", (2, 0, 0, false), ""),
];

#[test]
fn the_kernels_own_examples() {
    for (file, expected, differs) in EXAMPLES {
        assert_eq!(counts(file), *expected, "{file} {differs}");
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/kunit");
    assert_eq!(fs::read_dir(dir).unwrap().count(), EXAMPLES.len(), "an example has no line here");
}
