// SPDX-License-Identifier: GPL-2.0
//! The matrix of this checkout and its plans: machines, quick and full runs, refusals.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::path::Path;

use regex::Regex;
use zdvm::plan::expected::{Expected, On, Selection};
use zdvm::plan::matrix::{Matrix, Plans};
use zdvm::plan::planned::{Expect, Planned};
use zdvm::vm::payload;

fn repo() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn matrix() -> Matrix {
    Matrix::load(repo()).unwrap()
}

fn plans(matrix: &Matrix) -> Plans {
    payload::plans(repo(), matrix).unwrap()
}

fn on(kernel: &str, machine: &str) -> On {
    On { kernel: kernel.to_owned(), machine: machine.to_owned() }
}

fn planned(machine: &str, selection: &Selection) -> Planned {
    let matrix = matrix();
    matrix.planned(&on("stock", machine), &plans(&matrix), selection).unwrap()
}

fn full() -> Selection {
    Selection { full: true, ..Selection::default() }
}

fn names(planned: &Planned) -> Vec<&str> {
    planned.suites.iter().map(|s| s.name.as_str()).collect()
}

#[test]
fn every_kernel_has_a_plan_on_every_machine() {
    let matrix = matrix();
    let plans = plans(&matrix);
    for kernel in matrix.kernel.keys() {
        for machine in matrix.machine.keys() {
            let planned = matrix.planned(&on(kernel, machine), &plans, &full()).unwrap();
            let asked = matrix.suite.values().filter(|s| !s.by_name).count();
            assert_eq!(planned.suites.len(), asked);
            assert!(planned.suites.iter().all(|s| !s.tests.is_empty() && s.with_full == 0));
        }
    }
}

#[test]
fn the_mutants_are_seeded_over_the_series() {
    let matrix = matrix();
    let (patched, mutants) = (matrix.kernel("patched").unwrap(), matrix.kernel("mutants").unwrap());
    assert_eq!(patched.patches.len(), 1, "one directory or a list of them");
    assert_eq!(mutants.patches[..1], patched.patches[..]);
    assert_eq!(mutants.patches.len(), 2);
    let count = |kernel| zdvm::kernel::patches(&matrix, kernel).unwrap().len();
    let (catalogue, patches) = zdvm::command::mutants::run::catalogue(&matrix).unwrap();
    assert_eq!(count(mutants), count(patched) + patches.len());
    assert!(catalogue.mutant.len() >= 40);
}

#[test]
fn hmm_tests_has_78_tests() {
    for suite in ["hmm", "smoke"] {
        let planned = planned("default", &full());
        let suite = planned.suites.iter().find(|s| s.name == suite).unwrap();
        assert_eq!(suite.tests.len(), 78);
        assert!(suite.tests.iter().all(|t| t.expect == Expect::Pass));
    }
}

/// khugepaged changes the numbers that upstream's tests count.
#[test]
fn hmm_tests_run_without_khugepaged() {
    let matrix = matrix();
    for suite in ["hmm", "smoke"] {
        let settings = &matrix.suite(suite).unwrap().settings;
        let value = |name: &str| {
            let dir = "/sys/kernel/mm/transparent_hugepage/khugepaged";
            settings.get(&format!("{dir}/{name}")).map(String::as_str)
        };
        assert_eq!(value("pages_to_scan"), Some("1"));
        // The kernel takes an unsigned int.
        assert_eq!(value("scan_sleep_millisecs"), Some(&*u32::MAX.to_string()));
    }
}

#[test]
fn without_reserved_memory_the_coherent_tests_are_skipped() {
    let planned = planned("private", &full());
    let hmm = planned.suites.iter().find(|s| s.name == "hmm").unwrap();
    let (skip, pass): (Vec<_>, Vec<_>) = hmm.tests.iter().partition(|t| t.expect != Expect::Pass);
    assert_eq!((skip.len(), pass.len()), (39, 39));
    assert!(skip.iter().all(|t| t.name.contains("coherent")));
    assert!(pass.iter().all(|t| t.name.contains("private")));
}

#[test]
fn a_quick_run_leaves_out_what_is_slow() {
    let quick = planned("default", &Selection::default());
    assert_eq!(names(&quick), ["kunit", "selftests", "hmm"]);
    assert_eq!(quick.left_out, [("smoke".to_owned(), 78)]);
    let hmm = &quick.suites[2];
    assert!(hmm.with_full >= 2 && hmm.tests.len() + hmm.with_full == 78);
    assert!(hmm.tests.iter().all(|t| !t.name.contains("benchmark")));
    assert_eq!(hmm.deselected.len(), hmm.with_full);
}

#[test]
fn what_is_asked_for_by_name_is_run() {
    let suites = vec!["smoke".to_owned()];
    let smoke = planned("default", &Selection { suites, ..Selection::default() });
    assert_eq!(names(&smoke), ["smoke"]);
    assert_eq!(smoke.suites[0].tests.len(), 78, "a script cannot leave a test out");
}

#[test]
fn what_a_kernel_cannot_do_is_not_applicable() {
    let config = "CONFIG_MEMCG=y\nCONFIG_SWAP=y\nCONFIG_USERFAULTFD=y\n# CONFIG_KSM is not set\n\
                  CONFIG_TRANSPARENT_HUGEPAGE=y\nCONFIG_MEMORY_FAILURE=y\nCONFIG_FS_DAX=y\n\
                  CONFIG_TEST_HMM=m\nCONFIG_SECRETMEM=y\nCONFIG_USER_NS=y\n\
                  CONFIG_NET=y\nCONFIG_UNIX=y\nCONFIG_TASKS_RCU=y\nCONFIG_FUSE_FS=y\n\
                  CONFIG_HUGETLBFS=y\nCONFIG_VSOCKETS_LOOPBACK=y\nCONFIG_LRU_GEN=y\n\
                  CONFIG_DEBUG_FS=y\nCONFIG_HOTPLUG_CPU=y\n\
                  CONFIG_COMPACTION=y\nCONFIG_IO_URING=y\nCONFIG_MEMORY_HOTREMOVE=y\nCONFIG_PID_NS=y\n\
                  CONFIG_KVM_AMD=y\n";
    let all = planned("default", &full());
    let config = Some(config.to_owned());
    let some = planned("default", &Selection { config, ..full() });
    let suite = |planned: &Planned| planned.suites.iter().find(|s| s.name == "selftests").cloned();
    let (all, some) = (suite(&all).unwrap(), suite(&some).unwrap());
    assert_eq!((all.not_applicable, some.with_full), (0, 0));
    assert!(some.not_applicable > 100, "{}", some.not_applicable);
    assert_eq!(all.tests.len(), some.tests.len() + some.not_applicable);
    let gone = |t: &str| {
        t.starts_with("ksm")
            || t.ends_with(".ksm")
            || t.ends_with(".merged")
            || t.starts_with("entries") && t.ends_with(".advices")
            || t.starts_with("daxcross.")
            || t.starts_with("blind.dax_")
            || t.contains("dax.")
            || t.starts_with("kvm.dax")
            || t.starts_with("kvm.unbind")
            || t == "pagemaps.device_dax"
            || t == "pagemaps.p2pdma"
            || t == "pagemaps.spoilt_device_dax"
            || t == "pagemaps.spoilt_p2pdma"
    };
    assert!(some.deselected.iter().all(|t| gone(t)), "{:?}", some.deselected);
    assert!(!some.tests.iter().any(|t| gone(&t.name)));
}

#[test]
fn a_filter_is_no_wish_for_a_script() {
    let filter = Some(Regex::new("private.migrate$").unwrap());
    let one = planned("default", &Selection { filter, ..full() });
    assert_eq!(names(&one), ["hmm"]);
    assert_eq!((one.suites[0].tests.len(), one.suites[0].with_full), (1, 0));
    assert!(one.left_out.is_empty());
}

#[test]
fn arguments_of_a_script_follow_the_machine() {
    let matrix = matrix();
    let smoke = matrix.suite("smoke").unwrap();
    let there = smoke.arguments(matrix.machine("default").unwrap());
    assert_eq!(there, ["smoke", "0x100000000", "0x110000000", "0x120000000", "0x130000000"]);
    assert_eq!(smoke.arguments(matrix.machine("private").unwrap()), ["smoke"]);
    let machine = matrix.machine("default").unwrap();
    assert_eq!(machine.param("spm_addr_dev1"), Some("0x110000000"));
    assert_eq!(machine.param("spm_addr_dev"), None);
}

#[test]
fn a_known_fault_holds_where_its_devices_are() {
    let there = planned("default", &full()).known;
    assert_eq!(there.len(), 2);
    assert!(planned("private", &full()).known.is_empty());
    let matrix = matrix();
    let plans = plans(&matrix);
    let patched = matrix.planned(&on("patched", "default"), &plans, &full()).unwrap();
    assert!(patched.known.is_empty());
}

#[test]
fn the_kernel_before_gives_the_same_results_less_what_it_lacks() {
    // These tests need READ_UNLOCKED, which 7.2 lacks: no other test may differ.
    let unlocked = ["uffd.unlocked", "uffd.dontneed", "uffd.killed"];
    // Only the series for 7.3 has these fixes: with the series for 7.2 the tests fail as on a
    // kernel without a series.
    let unpatched = |name: &str| {
        name == "uffd.move_onto_huge"
            || name == "fsdax.clone_mapped"
            || name == "fsdax.unequal_unwritten"
            || name == "fsdax.short_write"
            || name == "lost.moved_table"
            || name.starts_with("ksm") && name.ends_with(".stays")
            || name.starts_with("fsdax.wait_mapped_again_")
    };
    let skipped = |name: &str| {
        matches!(
            name,
            "fsdax.clone_written"
                | "fsdax.clone_pinned_again"
                | "fsdax.clone_pinned_written"
                | "fsdax.clone_pinned_end"
                | "fsdax.clone_race"
                | "fsdax.bytes_shared"
                | "differ.small"
        ) || name.starts_with("fsdax.clone_part_")
            || name.starts_with("daxcross.") && name.ends_with("_older_reflink")
            || name.starts_with("ksm") && name.ends_with(".zeroes")
            || name.starts_with("differ") && name.ends_with(".huge")
            || name.starts_with("mirror") && name.contains(".windows")
            || name.starts_with("advice") && name.ends_with(".nothing_to_do")
            || name.starts_with("strict") && name.ends_with(".collected")
            || name.starts_with("entries")
                && [".marks", ".meanwhile", ".midway"].iter().any(|part| name.contains(part))
    };
    let matrix = matrix();
    let plans = plans(&matrix);
    for (old, new) in [("stock-7.2", "stock"), ("patched-7.2", "patched")] {
        let plan = |name: &str| matrix.planned(&on(name, "default"), &plans, &full()).unwrap();
        let series = new == "patched";
        let stock = plan("stock");
        let (old, new) = (plan(old), plan(new));
        assert_eq!(old.known.len(), new.known.len());
        assert_eq!(old.allow.len(), new.allow.len());
        for (old, new) in old.suites.iter().zip(&new.suites) {
            let gone = new.tests.iter().filter(|t| old.tests.iter().all(|o| o.name != t.name));
            let gone: Vec<&str> = gone.map(|t| t.name.as_str()).collect();
            assert_eq!(old.tests.len() + gone.len(), new.tests.len());
            let on_stock = stock.suites.iter().find(|s| s.name == new.name).unwrap();
            let no_case = |t: &str| series && on_stock.tests.iter().all(|s| s.name != t);
            let known = |t: &&str| t.ends_with("userfaultfd_read") || no_case(t);
            assert!(gone.iter().all(known), "{gone:?}");
            assert!(old.deselected.is_empty(), "what comes all the same is unplanned");
            for test in &old.tests {
                let as_new = new.tests.iter().find(|t| t.name == test.name).unwrap();
                if unlocked.contains(&test.name.as_str()) {
                    assert!(matches!(test.expect, Expect::Fail(_)), "{}", test.name);
                    assert_eq!(as_new.expect, Expect::Pass, "{}", test.name);
                } else if series && unpatched(&test.name) {
                    assert!(matches!(test.expect, Expect::Fail(_)), "{}", test.name);
                    assert_eq!(as_new.expect, Expect::Pass, "{}", test.name);
                } else if series && skipped(&test.name) {
                    assert!(matches!(test.expect, Expect::Skip(_)), "{}", test.name);
                    assert_eq!(as_new.expect, Expect::Pass, "{}", test.name);
                } else {
                    assert_eq!(test.expect, as_new.expect, "{}", test.name);
                }
            }
        }
    }
}

#[test]
fn a_machine_like_another_gives_its_results() {
    let (owner, default) = (planned("pageowner", &full()), planned("default", &full()));
    for (a, b) in owner.suites.iter().zip(&default.suites) {
        assert_eq!(a.tests.len(), b.tests.len());
        assert!(
            a.tests.iter().zip(&b.tests).all(|(a, b)| (&a.name, &a.expect) == (&b.name, &b.expect))
        );
    }
    assert_eq!((owner.known.len(), owner.allow.len()), (default.known.len(), default.allow.len()));
    let matrix = matrix();
    let (owner, default) =
        (matrix.machine("pageowner").unwrap(), matrix.machine("default").unwrap());
    assert_eq!(owner.cmdline, format!("page_owner=on {}", default.cmdline));
    assert_eq!((&owner.module_params, &owner.memory), (&default.module_params, &default.memory));
}

/// The document names tests by group and name; `*` stands for any end of a name.
#[test]
fn tests_that_the_documentation_names_are_there() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Documentation/generic.rst");
    let text = std::fs::read_to_string(path).unwrap();
    let matrix = matrix();
    let tests = &plans(&matrix)["selftests"].tests;
    let groups: Vec<&str> = tests.iter().filter_map(|t| Some(t.split_once('.')?.0)).collect();
    let name = Regex::new(r"``([a-z_]+)\.([a-z_]*)(\*?)``").unwrap();
    let mut count = 0;
    for found in name.captures_iter(&text).filter(|f| groups.contains(&&f[1])) {
        let said = format!("{}.{}", &found[1], &found[2]);
        let there =
            tests.iter().any(|t| *t == said || (!found[3].is_empty() && t.starts_with(&said)));
        assert!(there, "{said}{} is in the document and not in the plan", &found[3]);
        count += 1;
    }
    assert!(count > 40, "{count} names found: is the pattern still right?");
}

/// Whether a file of expected results is refused with an error that contains `says`.
fn refused(text: &str, says: &str) {
    let matrix = matrix();
    let error = match toml::from_str::<Expected>(text) {
        Ok(expected) => format!("{:#}", expected.check(&matrix).expect_err(text)),
        Err(e) => e.to_string(),
    };
    assert!(error.contains(says), "{error}");
}

/// What a file that has the sums of its groups says to a program that lists these tests.
fn filled(text: &str, list: &[&str]) -> Result<Vec<String>, String> {
    let mut expected: Expected = toml::from_str(text).unwrap();
    let list = list.iter().map(|t| (*t).to_owned()).collect();
    expected.fill(|| Ok(list)).map(|()| expected.tests).map_err(|e| format!("{e:#}"))
}

#[test]
fn a_test_that_is_lost_or_renamed_changes_the_sum_of_its_group() {
    let text = "[groups]\nfork = '2 7902'\nunload = '1 1c27'";
    let all = ["fork.cow", "fork.reads", "unload.clean"];
    assert_eq!(filled(text, &all).unwrap(), all);
    let says = |list: &[&str], lines: &[&str]| {
        let error = filled(text, list).unwrap_err();
        let (_, found) = error.split_once("[groups]:\n").unwrap();
        assert_eq!(found.lines().map(str::trim).collect::<Vec<_>>(), lines);
    };
    says(
        &["fork.cow", "new.one"],
        &[
            "fork = \"1 b853\"",
            "before: 2 7902; now: fork.cow",
            "new = \"1 f8c4\"",
            "before: no line; now: new.one",
            "no line for unload",
            "before: 1 1c27; now: no test",
        ],
    );
    says(
        &["fork.cow", "fork.writes", "unload.clean"],
        &["fork = \"2 7c6c\"", "before: 2 7902; now: fork.cow fork.writes"],
    );
    let error =
        filled("tests = ['fork.cow']\n[groups]\nfork = '1 b853'", &["fork.cow"]).unwrap_err();
    assert!(error.contains("lists its tests"), "{error}");
    assert_eq!(filled("tests = ['a.b']", &["c.d"]).unwrap(), ["a.b"]);
}

#[test]
fn slips_of_the_pen_are_refused() {
    refused("tests = ['a', 'a']", "planned twice");
    refused("tests = ['a']\n[[fail]]\ntest = 'b'\nhow = ''\nreason = 'x'", "nothing in `tests`");
    refused("tests = ['a']\n[[fail]]\ntest = 'a'\nreason = 'x'", "`how` is wanted");
    refused("tests = ['a']\n[[skip]]\ntest = 'a'\nhow = 'x'\nreason = 'x'", "for [[fail]] only");
    refused("tests = ['a']\n[[slow]]\npattern = '^b'\nreason = 'x'", "nothing in `tests`");
    refused("tests = ['a']\n[[skip]]\nreason = 'x'", "either `test` or `pattern`");
    refused("tests = ['a']\n[[skip]]\ntest = 'a'\npattern = 'a'\nreason = 'x'", "either");
    refused("tests = ['a']\n[[skip]]\npattern = '('\nreason = 'x'", "unclosed group");
    refused("tests = ['a']\n[[skip]]\ntest = 'a'\nreason = 'x'\nmachines = ['m']", "no machine");
    refused("tests = ['a']\n[[skip]]\ntest = 'a'\nreason = 'x'\nkernels = ['k']", "no kernel");
    refused("tests = ['a']\n[[absent]]\ntest = 'a'\nreason = 'x'", "`kernels` is wanted");
    refused("tests = ['a']\n[[skip]]\ntest = 'a'", "missing field `reason`");
    refused("tests = ['a']\n[[needs]]\npattern = 'a'\nconfig = []", "needs nothing");
    refused("rest_not_yet = true", "unknown field");
}
