// SPDX-License-Identifier: GPL-2.0
//! The verdict on recorded runs: a clean one, and the same run with one fault at a time.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use zdvm::judge::verdict::{Exit, Expect, Status};
use zdvm_guest::plan::Kind;

use crate::recorded::{Recorded, fails, status};

mod known;
mod recorded;

const OPEN: &str = "hmm.hmm_device_private.open_close";
const MIGRATE: &str = "hmm.hmm_device_private.migrate";

#[test]
fn clean_is_a_pass() {
    let verdict = Recorded::clean().judge();
    assert_eq!(verdict.problems, []);
    assert_eq!((verdict.counts(), verdict.excused()), ((6, 0), (1, 0)));
    assert_eq!(status(&verdict, "generic.idle"), Status::ExpectedFail);
    assert_eq!(verdict.release.as_deref(), Some("7.3.4"));
}

#[test]
fn panic() {
    let mut run = Recorded::clean()
        .report("panic.report", "zdm-selftests: end migrate.round_trip")
        .wire_until("ktap ok 1 migrate.round_trip");
    run = run.console_until("zdm-selftests: end migrate.round_trip");
    // -no-reboot turns the reboot of a panic into an exit with 0.
    let verdict = run.red("kernel panic", "Attempted to kill init");
    assert_eq!(status(&verdict, "migrate.round_trip"), Status::Crashed);
    assert_eq!(status(&verdict, OPEN), Status::Crashed);
    assert_eq!(status(&verdict, "pool.grows"), Status::Pass);
    let place = verdict.splats[0].place.as_deref().expect("a place");
    assert!(place.contains("zdmirror::pool::Pool") && place.contains("alloc"), "{place}");
    assert!(verdict.problems.iter().any(|p| p.text.contains("within migrate.round_trip")));
}

#[test]
fn oops_with_exit_0_and_all_tests_ok() {
    let run = Recorded::clean().report("oops.report", &format!("zdvm-guest: end {MIGRATE}"));
    let verdict = run.red("bad access", "migrate_vma_finalize");
    assert_eq!(verdict.counts(), (6, 0));
    assert!(verdict.problems.iter().all(|p| p.subject == MIGRATE), "{:#?}", verdict.problems);
}

#[test]
fn lockdep_and_warn() {
    let at = format!("zdvm-guest: end {MIGRATE}");
    Recorded::clean().report("lockdep.report", &at).red_only("lockdep", "circular");
    Recorded::clean().report("warn.report", &at).red_only("WARN", "free_zone_device_folio");
    Recorded::clean().report("warn.report", "Preparing to").red_only("WARN", "outside any test");
}

#[test]
fn hang_in_boot() {
    let mut run = Recorded::clean().console_until("Run /init");
    run.wire.clear();
    run.exit = Exit::Timeout("boot".to_owned(), 60);
    let verdict = run.red("timeout", "boot timeout after 60 s");
    assert!(verdict.problems.iter().any(|p| p.kind == "boot"));
    assert!(verdict.suites.iter().flat_map(|s| &s.tests).all(|t| t.status == Status::Crashed));
}

#[test]
fn mute_guest() {
    let mut run = Recorded::clean();
    run.wire.clear();
    run.console.clear();
    run.red("boot", "the console is empty");
}

#[test]
fn hang_in_a_test() {
    let mut run = Recorded::clean()
        .wire_until("ktap TAP version 13\nktap 1..1\nktap ok 1 hmm.hmm_device_private.migrate")
        .console_until(&format!("zdvm-guest: end {MIGRATE}"));
    run.exit = Exit::Timeout("test".to_owned(), 90);
    let verdict = run.red("timeout", "hmm");
    assert_eq!(status(&verdict, MIGRATE), Status::Crashed);
    assert_eq!(status(&verdict, OPEN), Status::Pass);
    assert!(verdict.problems.iter().any(|p| p.text.contains(&format!("within {MIGRATE}"))));
}

#[test]
fn test_killed_by_the_guest_for_its_time() {
    let from = "ktap TAP version 13\nktap 1..1\nktap ok 1 hmm.hmm_device_private.migrate\n\
                test-end hmm.hmm_device_private.migrate ok";
    let to = "test-end hmm.hmm_device_private.migrate timed out after 60 s";
    Recorded::clean().wire(from, to).red_only("Fail", "timed out after 60 s");
}

#[test]
fn missing_result() {
    let verdict = Recorded::clean()
        .wire("ktap 1..3\nktap ok 1 migrate.round_trip\n", "ktap 1..2\n")
        .wire("ok 2 inject", "ok 1 inject")
        .wire("ok 3 generic", "ok 2 generic")
        .wire("selftests exit status 1", "selftests ok")
        .red_only("Missing", "migrate.round_trip");
    assert_eq!(verdict.counts(), (5, 1));
}

#[test]
fn missing_result_that_the_plan_line_admits() {
    Recorded::clean()
        .wire("ktap ok 1 migrate.round_trip\n", "")
        .red("ktap", "plan says 3 results, 2 came");
}

#[test]
fn what_the_agent_died_of_is_told() {
    let mut run = Recorded::clean().console_until("zdvm-guest: begin kunit");
    run.wire.clear();
    run.console.push_str("[    1.0] zdvm-guest: the guest has 2 of cpu, 4 were asked for\n");
    run.red("guest", "the guest has 2 of cpu, 4 were asked for");
}

#[test]
fn cut_stream() {
    let mut run = Recorded::clean();
    run.cut = 4;
    run.red("stream", "ends within a line");
    let mut run = Recorded::clean();
    run.cut = "42 00000000 done\n".len();
    run.red_only("stream", "ended before its work was done");
}

#[test]
fn cut_console() {
    Recorded::clean().console_until("reboot: Power down").red_only("exit", "no power-off");
}

#[test]
fn skip_is_no_pass() {
    let run =
        || Recorded::clean().wire("1 migrate.round_trip", "1 migrate.round_trip # SKIP no device");
    run().red_only("Skip", "no device");
    let mut expected = run();
    expected.planned.suites[1].tests[0].expect = Expect::Skip("no device here".to_owned());
    assert_eq!(expected.judge().problems, []);
    let mut ran = Recorded::clean();
    ran.planned.suites[1].tests[0].expect = Expect::Skip("no device here".to_owned());
    ran.red_only("UnexpectedPass", "migrate.round_trip");
}

#[test]
fn unexpected_pass() {
    Recorded::clean()
        .wire("not ok 3 generic.idle", "ok 3 generic.idle")
        .wire("selftests exit status 1", "selftests ok")
        .red_only("UnexpectedPass", "stock kernels count from one");
}

#[test]
fn a_failure_that_is_known_is_known_by_what_it_says() {
    let mut run = Recorded::clean();
    run.planned.suites[1].tests[2].expect = fails("counts from one", "^idle count is 1");
    let verdict = run.judge();
    assert_eq!(verdict.problems, []);
    assert_eq!((verdict.counts(), verdict.excused()), ((6, 0), (1, 0)));
    for other in ["idle count is 7, not 0", "timed out after 60 s"] {
        let mut run = Recorded::clean().wire("idle count is 1, not 0", other);
        run.planned.suites[1].tests[2].expect = fails("counts from one", "^idle count is 1");
        run.red_only(
            "Fail",
            &format!("not the failure that is known (/^idle count is 1/): {other}"),
        );
    }
    // A guest that dies during a test has no result of the test.
    let mut run = Recorded::clean()
        .wire_until("ktap not ok 3 generic.idle")
        .console_until("zdm-selftests: end generic.idle");
    run.planned.suites[1].tests[2].expect = fails("counts from one", "");
    let verdict = run.red("Crashed", "generic.idle");
    assert_eq!(verdict.excused(), (0, 0));
}

#[test]
fn a_filter_does_not_hide_a_module_that_stays() {
    let unload = |result: &str| {
        let mut run = Recorded::clean()
            .wire("ktap 1..3", "ktap 1..4")
            .wire("not ok 3 generic.idle", &format!("not ok 3 generic.idle\nktap {result}"));
        run.planned.suites[1].deselected.insert("unload.clean".to_owned());
        run
    };
    assert_eq!(unload("ok 4 unload.clean").judge().problems, []);
    unload("not ok 4 unload.clean # module busy")
        .red_only("Fail", "it ran and failed: module busy");
    // A failed test explains the exit status 1, but not a module that stays loaded.
    Recorded::clean()
        .wire("selftests exit status 1", "selftests exit status 1; left the module zdmirror loaded")
        .red_only("suite", "left the module zdmirror loaded");
}

#[test]
fn unexpected_failure() {
    Recorded::clean()
        .wire("ok 1 migrate.round_trip", "not ok 1 migrate.round_trip")
        .red_only("Fail", "migrate.round_trip");
}

#[test]
fn kunit_failure_with_its_note() {
    Recorded::clean()
        .wire(
            "ktap     ok 2 shrinks",
            "ktap     # shrinks: ASSERTION FAILED\nktap     not ok 2 shrinks",
        )
        .wire("ktap ok 1 pool", "ktap not ok 1 pool")
        .red_only("Fail", "ASSERTION FAILED");
}

#[test]
fn unplanned_result() {
    Recorded::clean()
        .wire("1..3", "1..4")
        .wire("ktap not ok 3 generic.idle", "ktap not ok 3 generic.idle\nktap ok 4 brand.new")
        .red_only("Unplanned", "add it to expected/selftests.toml");
    let mut deselected = Recorded::clean();
    let test = deselected.planned.suites[0].tests.remove(1);
    deselected.planned.suites[0].deselected.insert(test.name);
    assert_eq!(deselected.judge().problems, []);
}

#[test]
fn duplicate_result() {
    Recorded::clean()
        .wire("1..3", "1..4")
        .wire(
            "ktap not ok 3 generic.idle",
            "ktap not ok 3 generic.idle\nktap ok 4 migrate.round_trip",
        )
        .red_only("Fail", "2 results for one test");
}

#[test]
fn wrong_taint() {
    Recorded::clean().wire("taint 266240", "taint 266752").red_only("taint", "0x41200(WON)");
    Recorded::clean().wire("taint 266240", "taint 262144").red_only("taint", "0x40000(N)");
    Recorded::clean().wire("hello 262144", "hello 262656").red_only("taint", "before the tests");
}

#[test]
fn no_tests() {
    let mut run = Recorded::clean();
    run.planned.suites[2].tests.clear();
    let from = run.wire.find("test-start").unwrap();
    let to = run.wire.find("suite-end hmm").unwrap();
    run.wire.replace_range(from..to, "");
    run.red("suite", "no test planned");
    let mut run = Recorded::clean();
    run.planned.suites.clear();
    run.red("plan", "no suite was planned");
}

#[test]
fn all_skipped_is_no_run() {
    let mut run = Recorded::clean()
        .wire("ok 1 grows", "ok 1 grows # SKIP x")
        .wire("ok 2 shrinks", "ok 2 shrinks # SKIP x");
    for test in &mut run.planned.suites[0].tests {
        test.expect = Expect::Skip("x".to_owned());
    }
    run.red_only("suite", "not one test ran");
}

#[test]
fn allow_list_counts_exactly() {
    let line = "zdmirror: violation: I3 free";
    let mut none = Recorded::clean();
    none.console = none.console.replace(line, "zdmirror: I3 free");
    none.red_only("deliberate splat", "0 lines like");

    let mut two = Recorded::clean();
    let at = two.console.find("zdm-selftests: end inject").unwrap();
    let start = two.console[..at].rfind('\n').unwrap() + 1;
    two.console.insert_str(start, &format!("[    3.3] {line} pfn=0x2\n"));
    two.red_only("deliberate splat", "2 lines like");

    let mut other = Recorded::clean();
    let at = other.console.find("zdm-selftests: end migrate").unwrap();
    let start = other.console[..at].rfind('\n').unwrap() + 1;
    other.console.insert_str(start, &format!("[    3.3] {line} pfn=0x2\n"));
    let verdict = other.red_only("invariant violated", "migrate.round_trip");
    assert!(
        verdict.problems[0].text.contains("I3") && verdict.problems[0].text.contains("pfn=0x2")
    );
}

#[test]
fn word_and_exit_of_a_test_must_agree() {
    Recorded::clean()
        .wire(
            "test-end hmm.hmm_device_private.migrate ok",
            "test-end hmm.hmm_device_private.migrate exit status 1",
        )
        .red_only("Fail", "reported ok, but exit status 1");
    Recorded::clean()
        .wire("ktap ok 1 hmm.hmm_device_private.migrate\n", "")
        .red_only("Fail", "gave no result");
}

const MIGRATE_OK: &str = "test-end hmm.hmm_device_private.migrate ok";

#[test]
fn what_the_audit_finds_fails_the_test() {
    let left = "test-end hmm.hmm_device_private.migrate audit: hmm_dmirror0: 3 pages used";
    let verdict = Recorded::clean().wire(MIGRATE_OK, left).red_only("Fail", "audit: hmm_dmirror0");
    assert!(verdict.problems[0].text.starts_with("audit: "), "{:#?}", verdict.problems);
    // An expected failure of the test does not excuse the audit's finding.
    let mut excused = Recorded::clean().wire(MIGRATE_OK, left);
    excused.planned.suites[2].tests[1].expect = fails("known", "");
    excused.red_only("Fail", "audit: hmm_dmirror0");
    let mut both =
        Recorded::clean().wire(MIGRATE_OK, &left.replace("audit", "exit status 1; audit"));
    both.planned.suites[2].tests[1].expect = fails("known", "");
    both.red_only("Fail", "audit: hmm_dmirror0");
}

#[test]
fn tests_are_timed_by_the_log() {
    let verdict = Recorded::clean().judge();
    let hmm = &verdict.suites[2].tests;
    assert!(hmm.iter().all(|t| t.seconds.is_some_and(|s| s >= 0.0)), "{hmm:?}");
}

/// Puts the smoke script in place of the harness suite: the same program, run as a whole.
fn script(totals: &str) -> Recorded {
    let mut run = Recorded::clean();
    let from = run.wire.find("test-start").unwrap();
    let to = run.wire.find("suite-end hmm").unwrap();
    let tap =
        format!("ktap TAP version 13\nktap 1..2\nktap ok 1 {OPEN}\nktap ok 2 {MIGRATE}\n{totals}");
    run.wire.replace_range(from..to, &tap);
    run.planned.suites[2].kind = Kind::Script;
    run
}

#[test]
fn a_script_is_judged_by_results_and_totals() {
    let good = "ktap # Totals: pass:2 fail:0 xfail:0 xpass:0 skip:0 error:0\n";
    let run = script(good);
    assert_eq!(run.judge().problems, []);
    assert_eq!(status(&run.judge(), MIGRATE), Status::Pass);
    script("").red_only("ktap", "no line with totals");
    script(&good.replace("fail:0", "fail:1")).red_only("ktap", "its results do not");
    script(good).wire(&format!("ktap ok 2 {MIGRATE}\n"), "").red("Missing", MIGRATE);
}

#[test]
fn what_is_left_out_is_no_pass() {
    let mut run = Recorded::clean();
    let slow = run.planned.suites[2].tests.remove(1);
    run.planned.suites[2].deselected.insert(slow.name);
    run.planned.suites[2].with_full = 1;
    run.planned.left_out.push(("smoke".to_owned(), 78));
    let verdict = run.judge();
    assert!(verdict.pass() && verdict.counts() == (5, 0), "{verdict:#?}");
    let table = zdvm::report::table(&verdict);
    let row = |name: &str| {
        let line = table.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect::<Vec<usize>>()
    };
    assert_eq!(row("hmm"), [1, 1, 0, 0, 0, 0, 0, 1]);
    assert_eq!(row("smoke"), [0, 0, 0, 0, 0, 0, 0, 78]);
}

#[test]
fn suite_that_dies() {
    let run = Recorded::clean()
        .wire("ktap ok 2 inject.extra_get\nktap # idle count is 1, not 0\nktap not ok 3 generic.idle\n", "")
        .wire("selftests exit status 1", "selftests killed by signal 11");
    let verdict = run.red("suite", "killed by signal 11");
    assert_eq!(status(&verdict, "inject.extra_get"), Status::Crashed);
    assert_eq!(status(&verdict, "migrate.round_trip"), Status::Pass);
}

#[test]
fn exit_1_needs_a_failure_to_explain_it() {
    Recorded::clean()
        .wire("suite-end kunit ok", "suite-end kunit exit status 1")
        .red_only("suite", "exit status 1");
}

#[test]
fn module_left_behind() {
    Recorded::clean()
        .wire("suite-end hmm ok", "suite-end hmm left the module zdmirror loaded")
        .red_only("suite", "left the module");
}

#[test]
fn qemu_dies() {
    let mut run = Recorded::clean();
    run.exit = Exit::Signal(9);
    run.red_only("exit", "signal 9");
    let mut run = Recorded::clean();
    run.exit = Exit::Code(1);
    run.red_only("exit", "status 1");
}
