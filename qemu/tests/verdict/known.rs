// SPDX-License-Identifier: GPL-2.0
//! Log lines that are a known fault of one kernel.

use std::path::Path;

use regex::Regex;
use zdvm::judge::verdict::{Allow, Known};
use zdvm::plan::expected::{On, Selection};
use zdvm::plan::matrix::Matrix;
use zdvm::vm::payload;
use zdvm_guest::plan::Kind;

use crate::MIGRATE;
use crate::recorded::Recorded;

/// A log line of a kernel with the old rule, and the line that says that more are suppressed.
const OLD_RULE: &str = "zdmirror: violation: I1 born pfn=0x120000 order=0 type=GENERIC \
                        check=refcount expected=0x0 found=0x1 device=hmm_dmirror4";
const MORE: &str = "zdmirror: violation: more of them are counted, but not logged";

/// The known faults of a kernel of the matrix on its default machine.
fn known(kernel: &str) -> Vec<Known> {
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let matrix = Matrix::load(repo).unwrap();
    let on = On { kernel: kernel.to_owned(), machine: "default".to_owned() };
    let plans = payload::plans(repo, &matrix).unwrap();
    matrix.planned(&on, &plans, &Selection::default()).unwrap().known
}

/// A run on a kernel of the matrix, with these lines while KUnit's load of the module runs and
/// within a test.
fn with_lines(kernel: &str, lines: &[&str]) -> Recorded {
    let mut run = Recorded::clean();
    run.planned.kernel = kernel.to_owned();
    run.planned.known = known(kernel);
    for before in ["zdvm-guest: end kunit", &format!("zdvm-guest: end {MIGRATE}")] {
        let at = run.console.find(before).expect("in the recording");
        let start = run.console[..at].rfind('\n').map_or(0, |n| n + 1);
        let text = lines.iter().fold(String::new(), |t, l| t + "[    3.3] " + l + "\n");
        run.console.insert_str(start, &text);
    }
    run
}

#[test]
fn a_known_fault_of_the_kernel_is_no_splat() {
    let run = with_lines("stock", &[OLD_RULE, &OLD_RULE.replace("I1 born", "I5 idle"), MORE]);
    let verdict = run.judge();
    assert_eq!(verdict.problems, []);
    assert_eq!(verdict.counts(), (6, 0));
    assert_eq!(verdict.splats.len(), 7, "they are told all the same");
}

#[test]
fn a_known_fault_excuses_nothing_else() {
    let good = [OLD_RULE, MORE];
    for (from, to) in [
        ("type=GENERIC", "type=PRIVATE"),
        ("type=GENERIC", "type=COHERENT"),
        ("I1 born", "I2 handed out"),
        ("found=0x1 ", "found=0x2 "),
        ("found=0x1 ", "found=0x10 "),
        ("check=refcount", "check=mapcount"),
        ("order=0", "order=9"),
        ("hmm_dmirror4", "hmm_dmirror2"),
        ("hmm_dmirror4", "kunit"),
    ] {
        let other = OLD_RULE.replace(from, to);
        assert_ne!(other, OLD_RULE);
        let verdict =
            with_lines("stock", &[good[0], good[1], &other]).red("invariant violated", to.trim());
        assert_eq!(verdict.problems.len(), 2, "{:#?}", verdict.problems);
    }
}

#[test]
fn a_known_fault_must_come() {
    with_lines("stock", &[MORE]).red_only("known fault", "type=GENERIC");
    with_lines("stock", &[OLD_RULE]).red_only("known fault", "more of them");
    let none = || with_lines("stock", &[]);
    assert_eq!(none().red("known fault", "on this kernel").problems.len(), 2);
    // A program loads the module with the parameters of its tests, which need not make such a
    // device.
    let mut ktap = none();
    ktap.planned.suites.retain(|s| s.kind == Kind::Ktap);
    let verdict = ktap.judge();
    assert!(verdict.problems.iter().all(|p| p.kind != "known fault"), "{:#?}", verdict.problems);
}

#[test]
fn a_fault_of_one_kernel_is_none_of_another() {
    let verdict = with_lines("patched", &[OLD_RULE]).red("invariant violated", "type=GENERIC");
    assert_eq!(verdict.problems.len(), 2, "{:#?}", verdict.problems);
    assert_eq!(with_lines("patched", &[]).judge().problems, []);
    with_lines("patched", &[MORE]).red("invariant violated", "more of them");
}

#[test]
fn a_test_that_provokes_what_the_kernel_does_anyway_is_counted() {
    let mut run = with_lines("stock", &[OLD_RULE, MORE]);
    run.planned.allow.push(Allow {
        test: MIGRATE.to_owned(),
        pattern: Regex::new("violation: I1 born").unwrap(),
        count: 2,
    });
    run.red_only("deliberate splat", "1 lines like");
}
