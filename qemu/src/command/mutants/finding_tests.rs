// SPDX-License-Identifier: GPL-2.0
#![allow(clippy::unwrap_used)] // A test may panic.

use super::*;
use crate::judge::verdict::{self, judge as judge_run};
use crate::plan::planned::{Expect, Suite, Test};
use zdvm_guest::plan::Kind;
use zdvm_guest::wire::Encoder;

/// A boot of two tests, given as lines: lines with `>` are KTAP, the others are kernel log.
fn boot(lines: &[&str], exit: Exit) -> Outcome {
    let test = |name: &str| Test { name: name.to_owned(), expect: Expect::Pass };
    let planned = Planned {
        suites: vec![Suite {
            name: "first".into(),
            kind: Kind::Ktap,
            source: String::new(),
            tests: vec![test("a.one"), test("a.two")],
            deselected: BTreeSet::new(),
            with_full: 0,
            not_applicable: 0,
        }],
        ..Planned::default()
    };
    let mut encoder = Encoder::default();
    let mut wire = encoder.encode(&Message::Hello { release: "7.3.4".into(), taint: 0 });
    wire += &encoder.encode(&Message::SuiteStart("first".into()));
    let mut console = String::new();
    for line in lines {
        match line.strip_prefix('>') {
            Some("end") => {
                wire += &encoder.encode(&Message::SuiteEnd("first".into(), None));
                wire += &encoder.encode(&Message::Taint(0));
                wire += &encoder.encode(&Message::Done);
                console += "[9.0] reboot: Power down\n";
            }
            Some(ktap) => wire += &encoder.encode(&Message::Ktap(ktap.to_owned())),
            None => console += &format!("[    1.5] {line}\n"),
        }
    }
    let wire = wire.into_bytes();
    let seen = verdict::Evidence { console: &console, wire: &wire, exit: exit.clone() };
    let verdict = judge_run(&planned, &seen);
    judge(&Evidence {
        mutant: "lost",
        planned: &planned,
        verdict: &verdict,
        console: &console,
        wire: &wire,
        exit: &exit,
        usual: &BTreeSet::from([shape("WARNING: always at f+0x1/0x2")]),
    })
}

const HEAD: [&str; 3] = [">KTAP version 1", ">1..2", "zdm-selftests: begin a.one"];
const REACHED: &str = "zdm_mutant: lost reached";
const END: &str = "zdm-selftests: end a.one";

fn with(lines: &[&str], exit: Exit) -> Outcome {
    boot(&[&HEAD[..], lines].concat(), exit)
}

fn by(outcome: &Outcome) -> Vec<&'static str> {
    outcome.found.iter().map(|f| f.by.word()).collect()
}

#[test]
fn a_test_that_fails_by_itself_or_by_the_audit() {
    let audit = ">#  a.one: x";
    let _ = audit;
    for (notes, words) in [
        (vec![">  # x", "># a.one: expected 1, found 2"], vec!["data"]),
        (
            vec!["># a.one: device 0: Violation { id: 5 }", "># a.one: audit of device 0 after"],
            vec!["audit"],
        ),
        (
            vec!["># a.one: lost a byte", "># a.one: audit of device 0 after the test"],
            vec!["data", "audit"],
        ),
        (vec!["># a.one: killed after 40 s; stack: wait_page_idle"], vec!["hang"]),
    ] {
        let lines = [&[REACHED][..], &notes, &[">not ok 1 a.one", END]].concat();
        let outcome = with(&lines, Exit::Enough);
        assert!(outcome.killed(), "{notes:?}");
        assert_eq!(by(&outcome), words, "{notes:?}");
        assert_eq!(outcome.found[0].test, "a.one");
    }
}

#[test]
fn what_the_kernel_says() {
    for (line, word) in [
        ("zdmirror: violation: I5 idle pfn=0x1", "audit"),
        ("BUG: Bad page state in process x", "splat"),
        ("Kernel panic - not syncing: x", "crash"),
        ("    not ok 1 round_trip", "data"),
        ("INFO: task x:7 blocked for more than 120 seconds.", "hang"),
    ] {
        assert_eq!(by(&with(&[REACHED, line], Exit::Enough)), [word], "{line}");
    }
    assert!(by(&with(&[REACHED, "WARNING: always at f+0x7/0x9"], Exit::Enough)).is_empty());
}

#[test]
fn nothing_found_is_nothing() {
    let all = [REACHED, ">ok 1 a.one", END, ">ok 2 a.two", ">end"];
    let outcome = with(&all, Exit::Code(0));
    assert!(outcome.reached && !outcome.killed() && outcome.tests == 2, "{outcome:?}");
    let never = with(&[">not ok 1 a.one", END, ">ok 2 a.two", ">end"], Exit::Code(0));
    assert!(!never.reached && !never.killed());
}

#[test]
fn what_was_before_is_not_the_bug_s() {
    let lines = [">not ok 1 a.one", "BUG: x", END, "zdm-selftests: begin a.two", REACHED];
    let rest = [">ok 2 a.two", "zdm-selftests: end a.two", ">end"];
    let outcome = with(&[&lines[..], &rest].concat(), Exit::Code(0));
    assert!(outcome.reached && !outcome.killed(), "{outcome:?}");
}

#[test]
fn a_guest_that_dies_or_hangs() {
    assert_eq!(by(&with(&[REACHED], Exit::Code(0))), ["crash"]);
    assert_eq!(by(&with(&[REACHED], Exit::Signal(11))), ["crash"]);
    assert_eq!(by(&with(&[REACHED], Exit::Timeout("test".into(), 70))), ["hang"]);
    let said = with(&[REACHED, "Oops: 0 [#1]"], Exit::Timeout("test".into(), 70));
    assert_eq!(by(&said), ["splat", "hang"]);
}

#[test]
fn our_module_s_hang_is_no_find() {
    let note = "># a.one: killed after 40 s; stack: memunmap_pages; __x64_sys_delete_module";
    let first = "># a.one: process 7 or a child of it does not die";
    let outcome = with(&[REACHED, first, note, ">not ok 1 a.one", END], Exit::Enough);
    assert!(!outcome.killed() && outcome.uncounted.is_some(), "{outcome:?}");
    let note = "># a.one: killed after 40 s; stack: kunit_run_tests; __x64_sys_finit_module";
    let outcome = with(&[REACHED, note, ">not ok 1 a.one # module", END], Exit::Enough);
    assert!(!outcome.killed() && outcome.uncounted.is_some(), "{outcome:?}");
    let stack = "  __x64_sys_delete_module+0x1/0x2";
    let outcome = with(&[REACHED, stack], Exit::Timeout("test".into(), 70));
    assert!(!outcome.killed() && outcome.uncounted.is_some(), "{outcome:?}");
    // A hang counts if another driver's memory is removed.
    let note = "># a.one: killed after 40 s; stack: memunmap_pages; unbind_store";
    assert!(with(&[REACHED, note, ">not ok 1 a.one", END], Exit::Enough).killed());
}

#[test]
fn who_noticed() {
    let of = |test: &str| {
        let finding = Finding { by: By::Data, test: test.into(), text: String::new() };
        Outcome { reached: true, found: vec![finding], ..Outcome::default() }
    };
    let reach = BTreeSet::from(["a.one".to_owned()]);
    assert!(of("a.one").noticed_by(&reach) && !of("a.two").noticed_by(&reach));
    assert!(of("a.two").same_tests(&of("a.two")) && !of("a.two").same_tests(&of("a.one")));
    assert!(!Outcome::default().noticed_by(&reach));
    let mut late = of("a.one");
    late.found[0].by = By::Hang;
    assert!(!late.noticed_by(&reach) && late.same_tests(&of("a.one")));
}
