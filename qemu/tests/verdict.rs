// SPDX-License-Identifier: GPL-2.0
//! The verdict on recorded runs: a clean one, and the same with one thing wrong at a time.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use regex::Regex;
use zdvm::judge::verdict::{
    Allow, Evidence, Exit, Expect, Failure, Known, Planned, Status, Suite, Test, Verdict, judge,
};
use zdvm::plan::expected::{On, Selection};
use zdvm::plan::matrix::Matrix;
use zdvm_guest::plan::Kind;

const OPEN: &str = "hmm.hmm_device_private.open_close";
const MIGRATE: &str = "hmm.hmm_device_private.migrate";

fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A run as it was recorded, to be spoilt by a test.
struct Recorded {
    console: String,
    /// Messages without sequence and checksum.
    wire: String,
    exit: Exit,
    planned: Planned,
    /// Bytes to cut from the end of the stream.
    cut: usize,
}

fn fails(why: &str, how: &str) -> Expect {
    Expect::Fail(Failure { why: why.to_owned(), how: Regex::new(how).unwrap() })
}

fn suite(name: &str, kind: Kind, tests: &[&str]) -> Suite {
    let test = |t: &&str| Test { name: (*t).to_owned(), expect: Expect::Pass };
    Suite {
        name: name.to_owned(),
        kind,
        source: format!("expected/{name}.toml"),
        tests: tests.iter().map(test).collect(),
        deselected: BTreeSet::new(),
        with_full: 0,
        not_applicable: 0,
    }
}

impl Recorded {
    fn clean() -> Self {
        let tests = ["migrate.round_trip", "inject.extra_get", "generic.idle"];
        let mut selftests = suite("selftests", Kind::Ktap, &tests);
        selftests.tests[2].expect = fails("stock kernels count from one", "");
        Self {
            console: data("clean.console"),
            wire: data("clean.wire"),
            exit: Exit::Code(0),
            planned: Planned {
                kernel: "stock".to_owned(),
                machine: "default".to_owned(),
                left_out: vec![],
                suites: vec![
                    suite("kunit", Kind::Kunit, &["pool.grows", "pool.shrinks"]),
                    selftests,
                    suite("hmm", Kind::Harness, &[OPEN, MIGRATE]),
                ],
                allow: vec![Allow {
                    test: "inject.extra_get".to_owned(),
                    pattern: Regex::new("zdmirror: violation: I3").unwrap(),
                    count: 1,
                }],
                known: vec![],
                taint_before: 0x40000,
                taint_after: 0x41000,
            },
            cut: 0,
        }
    }

    fn judge(&self) -> Verdict {
        let mut wire = String::new();
        for (seq, payload) in self.wire.lines().enumerate() {
            let seq = seq as u64;
            let mut hash = crc32fast::Hasher::new();
            hash.update(&seq.to_le_bytes());
            hash.update(payload.as_bytes());
            wire.push_str(&format!("{seq} {:08x} {payload}\n", hash.finalize()));
        }
        let wire = &wire.as_bytes()[..wire.len() - self.cut];
        let evidence = Evidence { console: &self.console, wire, exit: self.exit.clone() };
        judge(&self.planned, &evidence)
    }

    /// Replaces in the stream; what is to be replaced must be there.
    fn wire(mut self, from: &str, to: &str) -> Self {
        assert!(self.wire.contains(from), "{from} is not in the recording");
        self.wire = self.wire.replacen(from, to, 1);
        self
    }

    /// Ends the stream before a line.
    fn wire_until(mut self, line: &str) -> Self {
        let at = self.wire.find(line).expect("in the recording");
        self.wire.truncate(at);
        self
    }

    /// Ends the console before a text.
    fn console_until(mut self, text: &str) -> Self {
        let at = self.console.find(text).expect("in the recording");
        let start = self.console[..at].rfind('\n').map_or(0, |n| n + 1);
        self.console.truncate(start);
        self
    }

    /// Puts a kernel's report into the console before the line with a text.
    fn report(mut self, name: &str, before: &str) -> Self {
        let at = self.console.find(before).expect("in the recording");
        let start = self.console[..at].rfind('\n').map_or(0, |n| n + 1);
        self.console.insert_str(start, &data(name));
        self
    }

    /// Must be red, with a problem of this kind whose text or subject says so.
    #[track_caller]
    fn red(self, kind: &str, says: &str) -> Verdict {
        let verdict = self.judge();
        assert!(!verdict.pass());
        let fits = verdict
            .problems
            .iter()
            .any(|p| p.kind == kind && (p.text.contains(says) || p.subject.contains(says)));
        assert!(fits, "no problem {kind}: {says} in {:#?}", verdict.problems);
        verdict
    }

    /// Must be red for one reason only.
    #[track_caller]
    fn red_only(self, kind: &str, says: &str) -> Verdict {
        let verdict = self.red(kind, says);
        assert_eq!(verdict.problems.len(), 1, "{:#?}", verdict.problems);
        verdict
    }
}

fn status(verdict: &Verdict, test: &str) -> Status {
    verdict.suites.iter().flat_map(|s| &s.tests).find(|t| t.name == test).expect("planned").status
}

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
    // A guest that dies in it has no result of it.
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
    // Nor does a failure that was told already.
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

/// A line of the log of a kernel with the old rule, and the one that cuts the flood short.
const OLD_RULE: &str = "zdmirror: violation: I1 born pfn=0x120000 order=0 type=GENERIC \
                        check=refcount expected=0x0 found=0x1 device=hmm_dmirror4";
const MORE: &str = "zdmirror: violation: more of them are counted, but not logged";

/// The known faults of a kernel of the matrix on its default machine.
fn known(kernel: &str) -> Vec<Known> {
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let matrix = Matrix::load(repo).unwrap();
    let on = On { kernel: kernel.to_owned(), machine: "default".to_owned() };
    matrix.planned(&on, &matrix.plans().unwrap(), &Selection::default()).unwrap().known
}

/// A run on a kernel of the matrix, with these lines as the module is loaded for KUnit and within
/// a test.
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
    // A program that loads the module as its tests ask for need not have loaded such a device.
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
    // Nor is it a failure that was expected of the test itself.
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

/// The smoke script in place of the harness suite: the same program, run as a whole.
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
