// SPDX-License-Identifier: GPL-2.0
//! Real guests that go wrong. These tests need a built kernel:
//!
//!   ZDVM_TEST_TREE=$(zdvm path --kernel stock) cargo test -p zdvm --test boot -- --ignored
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use zdvm::judge::verdict::{Evidence, Expect, Planned, Suite, Test, Verdict, judge};
use zdvm::kernel::kdir::modinfo;
use zdvm::kernel::{COMPLETE, Tree};
use zdvm::plan::matrix::Timeouts;
use zdvm::report::stacks;
use zdvm::vm::accel::Accel;
use zdvm::vm::payload;
use zdvm::vm::{Blind, Boot, Machine};
use zdvm_guest::plan::{self, Kind, Plan};

/// The content of a guest beside the agent.
#[derive(Default)]
struct Guest {
    /// Whether the script is init itself, instead of the selftests.
    as_init: bool,
    /// Whether the guest has the module and the real selftests; the module's file is put into this
    /// path.
    with_module: bool,
}

fn tree() -> Tree {
    let tree = PathBuf::from(std::env::var_os("ZDVM_TEST_TREE").expect("ZDVM_TEST_TREE"));
    Tree { name: "test".into(), source: tree.clone(), objects: tree, ours: false, args: vec![] }
}

fn repo() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Boots with a shell script as the selftests (or as init), and judges.
fn boot(script: &str, as_init: bool) -> (Verdict, String, TempDir) {
    boot_guest(script, &Guest { as_init, ..Guest::default() })
}

fn boot_guest(script: &str, guest: &Guest) -> (Verdict, String, TempDir) {
    let (tree, repo) = (tree(), repo());
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("script");
    fs::write(&file, format!("#!/bin/busybox sh\n{script}\n")).unwrap();
    let programs = payload::programs(repo, &["zdvm-guest", "zdm-selftests"]).unwrap();
    let mut files = BTreeMap::from([("/init".to_owned(), programs.join("zdvm-guest"))]);
    let name = if guest.as_init { "/init" } else { "/bin/script" };
    files.insert(name.to_owned(), file);
    let mut test = 5;
    if guest.with_module {
        let module = payload::module(repo, &tree).unwrap();
        files.insert(plan::MODULE.to_owned(), payload::stripped(&module, dir.path()).unwrap());
        files.insert("/bin/zdm-selftests".to_owned(), programs.join("zdm-selftests"));
        test = 60;
    }
    let suite = plan::Suite {
        name: "script".into(),
        kind: Kind::Ktap,
        timeout: test,
        program: "/bin/script".into(),
        tests: vec![],
        settings: vec![
            ("/proc/sys/vm/swappiness".into(), "7".into()),
            ("/sys/kernel/nothing/of/this".into(), "1".into()),
        ],
    };
    let plan = Plan { module: "none".into(), suites: vec![suite], ..Plan::default() };
    let machine = Machine {
        qemu: "qemu-system-x86_64".into(),
        image: tree.image(),
        initrd: payload::initramfs(repo, &tree, dir.path(), &plan, &files).unwrap(),
        memory: "1G".into(),
        vcpus: 2,
        cmdline: String::new(),
        dir: dir.path().to_owned(),
        extra: vec![],
    };
    let limits = Timeouts { boot: 20, test, suite: 60, total: 120, tcg_factor: 1 };
    let Boot::Ended(exit) = machine.boot(Accel::Tcg, limits, None, &mut Blind).unwrap() else {
        panic!("mute without a limit");
    };
    let planned = Planned {
        kernel: "test".into(),
        machine: "test".into(),
        left_out: vec![],
        suites: vec![Suite {
            name: "script".into(),
            kind: Kind::Ktap,
            source: "the test".into(),
            tests: vec![Test { name: "a".into(), expect: Expect::Pass }],
            deselected: BTreeSet::new(),
            with_full: 0,
            not_applicable: 0,
        }],
        allow: vec![],
        known: vec![],
        taint_before: 0x40000,
        taint_after: 0x40000,
    };
    let console = fs::read(dir.path().join("console.log")).unwrap();
    let console = String::from_utf8_lossy(&console).into_owned();
    let wire = fs::read(dir.path().join("wire.log")).unwrap();
    let verdict = judge(&planned, &Evidence { console: &console, wire: &wire, exit });
    (verdict, console, dir)
}

/// The lines of an output in the form that every run gives them: a number is N, a path is PATH.
fn shapes(text: &str) -> BTreeSet<String> {
    let path = regex::Regex::new(r"/\S+").unwrap();
    let number = regex::Regex::new(r"[0-9]+(\.[0-9]+)?").unwrap();
    let shape = |line: &str| {
        let line = path.replace_all(line.trim(), "PATH");
        let line = number.replace_all(&line, "N").into_owned();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    text.lines().map(shape).collect()
}

/// README and tutorial show a run from its table on. A real run prints these lines, but for numbers,
/// the accelerator and the suites that it leaves out.
#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn the_documents_show_what_a_run_prints() {
    let tree = tree().source;
    let mut command = Command::new(env!("CARGO_BIN_EXE_zdvm"));
    command.args(["run", "--suite", "kunit", "--suite", "selftests"]);
    // A tree of the cache would be built anew as a user's.
    match tree.join(COMPLETE).is_file() {
        true => command.args(["--kernel", "patched"]),
        false => command.args(["--expect", "patched", "--kdir"]).arg(&tree),
    };
    let out = command
        .args(["--filter", r"^zdmirror_params|^migrate\.round_trip$"])
        .env("ZDVM_REPO", repo())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&out.stdout).into_owned();
    let printed = shapes(&printed.replace(", kvm)", ", tcg)"));
    for file in ["README.md", "Documentation/tutorial.rst"] {
        let text = fs::read_to_string(repo().join(file)).unwrap();
        let from = text.find("    suite      planned").unwrap();
        let shown: Vec<&str> = text[from..].lines().take_while(|l| !l.is_empty()).collect();
        assert!(shown.len() > 6, "{file}: {shown:?}");
        for line in
            shown.into_iter().filter(|l| !l.starts_with("    hmm ") && !l.starts_with("    smoke "))
        {
            let shape = shapes(line).pop_first().unwrap();
            assert!(printed.contains(&shape), "{file}: {line}\nnot in: {printed:#?}");
        }
    }
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn modinfo_and_the_program_agree_on_the_version() {
    let module = payload::module(repo(), &tree()).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_zdvm")).arg("--version").output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    assert_eq!(said, format!("zdvm {}", modinfo(&module, "version").unwrap()));
}

const GOOD: &str = "echo KTAP version 1; echo 1..1; echo ok 1 a";

fn has(verdict: &Verdict, kind: &str) -> bool {
    verdict.problems.iter().any(|p| p.kind == kind)
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn good() {
    let (verdict, _, _dir) = boot(GOOD, false);
    assert_eq!(verdict.problems, []);
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn settings_hold_while_the_suite_runs() {
    let say = "read n < /proc/sys/vm/swappiness; echo swappiness is $n > /dev/kmsg";
    let (verdict, console, _dir) = boot(&format!("{say}; {GOOD}"), false);
    assert_eq!(verdict.problems, []);
    assert!(console.contains("swappiness is 7"), "{console}");
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn warning_in_the_log() {
    let warn = "echo '<4>WARNING: mm/x.c:1 at f+0x1/0x2, CPU#0: a/1' > /dev/kmsg";
    let (verdict, _, _dir) = boot(&format!("{GOOD}; {warn}"), false);
    assert!(has(&verdict, "WARN"), "{:#?}", verdict.problems);
    assert_eq!(verdict.problems.len(), 1);
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn panic() {
    let (verdict, _, _dir) = boot(&format!("{GOOD}; echo c > /proc/sysrq-trigger"), false);
    assert!(has(&verdict, "kernel panic") && has(&verdict, "stream"), "{:#?}", verdict.problems);
    assert!(!has(&verdict, "timeout"), "a panic must end QEMU at once");
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn hang_in_a_test_leaves_stacks() {
    let (verdict, console, dir) = boot("echo KTAP version 1; exec /bin/busybox sleep 1000", false);
    assert!(has(&verdict, "timeout"), "{:#?}", verdict.problems);
    assert!(console.contains("sysrq: Show State"), "{console}");
    assert!(console.contains("sysrq: Show Blocked State"));
    assert!(console.contains("task:sleep") || console.contains("task:busybox"), "{console}");
    assert!(fs::read_to_string(dir.path().join("registers.txt")).unwrap().contains("RIP="));
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn hang_in_boot_leaves_stacks() {
    let (verdict, console, _dir) = boot("/bin/busybox sleep 1000", true);
    assert!(has(&verdict, "timeout") && has(&verdict, "boot"), "{:#?}", verdict.problems);
    assert!(console.contains("sysrq: Show State"), "{console}");
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn silent_end() {
    // Another process powers off cleanly before the agent's work is done.
    let (verdict, _, _dir) = boot(&format!("{GOOD}; /bin/busybox poweroff -f"), false);
    assert!(has(&verdict, "stream"), "{:#?}", verdict.problems);
}

#[test]
#[ignore = "needs a built kernel in ZDVM_TEST_TREE"]
fn panic_of_the_module_names_file_and_line() {
    // The test takes an extra reference; the audit finds it, and panics because the parameter says
    // so.
    let script = "ZDM_MODULE_PARAMS=audit=panic exec /bin/zdm-selftests inject.extra_get";
    let (verdict, console, dir) =
        boot_guest(script, &Guest { with_module: true, ..Guest::default() });
    assert!(has(&verdict, "Rust panic"), "{:#?}\n{console}", verdict.problems);
    stacks::decode(&tree(), &payload::module(repo(), &tree()).unwrap(), dir.path());
    let decoded = fs::read_to_string(dir.path().join("console.decoded.log")).unwrap();
    let trace = decoded.split_once("Call Trace:").expect("a stack").1;
    let ours = |l: &&str| l.contains("zdmirror") && l.contains("rust/audit/report.rs:");
    assert!(trace.lines().any(|l| ours(&l)), "{trace}");
    let driver = |l: &&str| l.contains("zdmirror") && l.contains("rust/driver/");
    assert!(trace.lines().any(|l| driver(&l)), "{trace}");
}
