// SPDX-License-Identifier: GPL-2.0
//! Compares upstream's driver and ours test by test: the kernel tree's own test_hmm.ko and zdmirror
//! run the same unmodified hmm-tests.
//!
//! The C driver may fail. It oopses, and a test may hang or end the guest; the remaining tests then
//! run in another guest. The verdict is about our driver alone.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use zdvm_guest::plan::{AUDIT, Kind};
use zdvm_guest::wire::{self, Message};

use crate::command::run::{self, Request, Setup};
use crate::judge::splat::Splat;
use crate::judge::verdict::{Expect, Status, TestResult};
use crate::kernel::Tree;
use crate::plan::expected::Selection;
use crate::plan::matrix::{Matrix, Plans};
use crate::plan::planned::{Planned, Test};
use crate::report;
use crate::vm::kvm::Choice;

/// The result of one driver in one test.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// pass, fail, oops (the test failed and the kernel oopsed), skip, hang, died.
    pub word: &'static str,
    /// Duration, by the kernel log.
    pub seconds: Option<f64>,
    /// Number of oopses during the test.
    pub oopses: usize,
    /// Number of other reports during the test.
    pub warnings: usize,
    /// Whether the audit after the test found nothing.
    pub clean: bool,
}

impl Outcome {
    /// Whether the test passed without a report in the kernel log.
    pub fn good(&self) -> bool {
        self.word == "pass" && self.oopses == 0 && self.warnings == 0
    }
}

/// Whether a report counts as an oops; the other lines of the oops belong to it.
fn is_oops(splat: &Splat) -> bool {
    // "Oops: invalid opcode" is the end of a BUG(), and of the kind of a bad access.
    ["oops", "kernel panic"].contains(&splat.kind) || splat.text.starts_with("Oops")
}

/// Kinds that only announce an oops.
const HERALDS: &[&str] = &["bad access", "bad page", "BUG"];

fn outcome(result: &TestResult, died: Option<&'static str>, splats: &[Splat]) -> Outcome {
    let of_test = |s: &&Splat| s.test.as_deref() == Some(result.name.as_str());
    let count = |wanted: &dyn Fn(&Splat) -> bool| {
        splats.iter().filter(of_test).filter(|s| wanted(s)).count()
    };
    let oopses = count(&is_oops);
    let word = match (died, result.status) {
        (Some(word), _) => word,
        (None, Status::Pass) => "pass",
        (None, Status::Skip) => "skip",
        (None, _) if result.reason.contains("timed out") => "hang",
        (None, _) if oopses > 0 => "oops",
        (None, _) => "fail",
    };
    Outcome {
        word,
        seconds: result.seconds,
        oopses,
        warnings: count(&|s| !is_oops(s) && (oopses == 0 || !HERALDS.contains(&s.kind))),
        clean: !result.reason.contains(AUDIT),
    }
}

/// The test that was running when the stream ended.
fn open_test(stream: &[u8]) -> Option<String> {
    wire::decode(stream).0.into_iter().fold(None, |open, message| match message {
        Message::TestStart(name) => Some(name),
        Message::TestEnd(..) => None,
        _ => open,
    })
}

/// Runs all tests with a driver, in as many guests as it takes: a guest ends with the first test that
/// leaves its kernel in doubt, if `setup` says so. Guest N has the folder `guest-N` in `dir`.
pub fn theirs(
    setup: &Setup,
    matrix: &Matrix,
    planned: &Planned,
    choice: &Choice,
    dir: &Path,
) -> Result<Vec<(String, Outcome)>> {
    let mut out: Vec<(String, Outcome)> = Vec::new();
    let mut left = planned.clone();
    for guest in 1.. {
        let dir = run::folder(&setup.repo, Some(&dir.join(format!("guest-{guest}"))))?;
        let boot = run::boot(setup, matrix, &left, choice, &dir)?;
        let open = open_test(&std::fs::read(dir.join("wire.log"))?);
        let before = out.len();
        let Some(results) = boot.verdict.suites.first() else { bail!("no suite was run") };
        for result in &results.tests {
            let here = open.as_deref() == Some(result.name.as_str());
            let died = match &boot.exit {
                _ if !here => None,
                crate::judge::verdict::Exit::Timeout(..) => Some("hang"),
                _ => Some("died"),
            };
            if here || !matches!(result.status, Status::Crashed | Status::Missing) {
                let outcome = outcome(result, died, &boot.verdict.splats);
                out.push((result.name.clone(), outcome));
            }
        }
        if out.len() == before {
            bail!("not one test came to a result; see {}", dir.display());
        }
        let Some(suite) = left.suites.first_mut() else { break };
        suite.tests.retain(|t| out.iter().all(|(name, _)| *name != t.name));
        if suite.tests.is_empty() {
            break;
        }
        eprintln!("zdvm: {} tests are left, another guest", suite.tests.len());
    }
    Ok(out)
}

/// One row of the table.
#[derive(Clone, Debug)]
struct Row {
    name: String,
    theirs: Outcome,
    ours: Outcome,
}

/// The text above the table.
struct Head {
    release: String,
    machine: String,
    accel: String,
}

fn cell(o: &Outcome) -> [String; 4] {
    let number = |n: usize| if n == 0 { "-".to_owned() } else { n.to_string() };
    let seconds = o.seconds.map_or("-".to_owned(), |s| format!("{s:.2}"));
    [o.word.to_owned(), seconds, number(o.oopses), number(o.warnings)]
}

/// The table in reStructuredText. The terminal gets the same text.
fn table(rows: &[Row]) -> String {
    let names = rows.iter().map(|r| r.name.len()).max().unwrap_or(0).max(4);
    let heads = ["C", "s", "oops", "other", "ours", "s", "oops", "other", "audit"];
    let rule = |fill: &str| {
        let mut line = fill.repeat(names);
        for _ in heads {
            let _ = write!(line, "  {}", fill.repeat(6));
        }
        line + "\n"
    };
    let line = |name: &str, cells: &[String]| {
        let mut line = format!("{name:names$}");
        for cell in cells {
            let _ = write!(line, "  {cell:<6}");
        }
        line.trim_end().to_owned() + "\n"
    };
    let mut out = rule("=") + &line("test", &heads.map(str::to_owned)) + &rule("=");
    for row in rows {
        let audit = if row.ours.clean { "clean" } else { "dirty" }.to_owned();
        out += &line(&row.name, &[&cell(&row.theirs)[..], &cell(&row.ours)[..], &[audit]].concat());
    }
    out + &rule("=")
}

fn sum(rows: &[Row], which: impl Fn(&Row) -> &Outcome) -> String {
    let all = || rows.iter().map(&which);
    let seconds: f64 = all().filter_map(|o| o.seconds).sum();
    format!(
        "{} of {} pass, {} without a word in the kernel log; {} oopses, {} other reports; {seconds:.0} s",
        all().filter(|o| o.word == "pass").count(),
        rows.len(),
        all().filter(|o| o.good()).count(),
        all().map(|o| o.oopses).sum::<usize>(),
        all().map(|o| o.warnings).sum::<usize>(),
    )
}

fn document(head: &Head, rows: &[Row]) -> String {
    format!(
        ".. SPDX-License-Identifier: GPL-2.0\n\n\
         ===================================\n\
         The C driver and this one, compared\n\
         ===================================\n\n\
         Written by ``make test-upstream WRITE=1``: Linux {}, its unmodified ``hmm-tests``, each\n\
         test in a process of its own, machine ``{}``, {}. \"other\" counts WARNs and the like; times\n\
         are of one run each. \"audit\" is the module's own after the test; the C driver has none.\n\n\
         - ``lib/test_hmm.c``: {}\n\
         - zdmirror: {}\n\n{}",
        head.release,
        head.machine,
        head.accel,
        sum(rows, |r| &r.theirs),
        sum(rows, |r| &r.ours),
        table(rows)
    )
}

/// Compares the drivers on one kernel. Returns true if our driver has no fault.
pub fn compare(
    repo: &Path,
    matrix: &Matrix,
    plans: &Plans,
    tree: &Tree,
    request: &Request<'_>,
    choice: &Choice,
    write: bool,
) -> Result<bool> {
    let selection =
        Selection { suites: request.suites.to_vec(), filter: None, full: true, config: None };
    let mut planned = matrix.planned(&request.on, plans, &selection)?;
    if planned.suites.iter().any(|s| s.kind != Kind::Harness) {
        bail!("only a suite of hmm-tests can be compared");
    }
    let upstream = tree.c_driver()?;
    let dir = run::folder(repo, None)?;

    eprintln!("zdvm: upstream's driver");
    let their_request = Request { module: Some(&upstream), ..request.clone() };
    let mut setup = Setup::new(repo, matrix, tree.clone(), &their_request)?;
    setup.audited = false;
    setup.while_sound = true;
    for suite in &mut planned.suites {
        // The C driver has no expected failures, and a skip is reported as a skip.
        suite.tests.iter_mut().for_each(|t: &mut Test| t.expect = Expect::Pass);
    }
    let theirs = theirs(&setup, matrix, &planned, choice, &dir.join("upstream"))?;

    eprintln!("zdvm: our driver");
    let setup = Setup::new(repo, matrix, tree.clone(), request)?;
    let ours_dir = run::folder(repo, Some(&dir.join("ours")))?;
    let boot = run::once(&setup, matrix, plans, &selection, choice, &ours_dir)?;
    let results = boot.verdict.suites.first().context("no suite was run")?;
    let row = |result: &TestResult| {
        let theirs = theirs.iter().find(|(name, _)| *name == result.name)?;
        let died = (result.status == Status::Crashed).then_some("died");
        Some(Row {
            name: result.name.clone(),
            theirs: theirs.1.clone(),
            ours: outcome(result, died, &boot.verdict.splats),
        })
    };
    let rows: Vec<Row> = results.tests.iter().filter_map(row).collect();
    let head =
        Head { release: tree.release()?, machine: request.on.machine.clone(), accel: boot.accel() };
    report::say(&format!(
        "\n{}\nC driver: {}\nours:     {}\n",
        table(&rows),
        sum(&rows, |r| &r.theirs),
        sum(&rows, |r| &r.ours)
    ));
    if write {
        let path = repo.join("Documentation/upstream.rst");
        std::fs::write(&path, document(&head, &rows))
            .with_context(|| format!("writing {}", path.display()))?;
        report::say("written: Documentation/upstream.rst\n");
    }
    let (good, bad) = boot.verdict.counts();
    let bad = if boot.verdict.pass() { 0 } else { bad.max(1) };
    report::say(&format!("zdvm: {good} passed, {bad} failed\n"));
    Ok(boot.verdict.pass())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(status: Status, reason: &str) -> TestResult {
        TestResult { name: "a".into(), status, reason: reason.into(), seconds: Some(1.25) }
    }

    fn splat(test: &str, kind: &'static str) -> Splat {
        Splat { line: 1, kind, text: String::new(), test: Some(test.into()), place: None }
    }

    #[test]
    fn an_oops_is_counted_once() {
        let splats =
            [splat("a", "bad access"), splat("a", "oops"), splat("a", "WARN"), splat("b", "oops")];
        let got = outcome(&result(Status::Fail, "exit status 1"), None, &splats);
        assert_eq!((got.word, got.oopses, got.warnings), ("oops", 1, 1));
        assert!(!got.good());

        // As the kernel's log of a VM_BUG_ON_PAGE() has it.
        let mut end = splat("a", "bad access");
        end.text = "Oops: invalid opcode: 0000 [#1] SMP".into();
        let splats = [splat("a", "bad page"), splat("a", "BUG"), end];
        let got = outcome(&result(Status::Fail, "exit status 1"), None, &splats);
        assert_eq!((got.word, got.oopses, got.warnings), ("oops", 1, 0));
    }

    #[test]
    fn words() {
        let word = |status, reason| outcome(&result(status, reason), None, &[]).word;
        assert_eq!(word(Status::Pass, ""), "pass");
        assert_eq!(word(Status::Skip, "no device"), "skip");
        assert_eq!(word(Status::Fail, "timed out after 20 s and cannot be killed"), "hang");
        assert_eq!(word(Status::Fail, "exit status 1"), "fail");
        assert_eq!(outcome(&result(Status::Crashed, ""), Some("died"), &[]).word, "died");
    }

    #[test]
    fn the_test_that_a_stream_ends_within() {
        let mut encoder = wire::Encoder::default();
        let mut stream = String::new();
        for (message, open) in [
            (Message::SuiteStart("hmm".into()), None),
            (Message::TestStart("a".into()), Some("a")),
            (Message::TestEnd("a".into(), None), None),
            (Message::TestStart("b".into()), Some("b")),
            (Message::Ktap("noise".into()), Some("b")),
        ] {
            stream += &encoder.encode(&message);
            assert_eq!(open_test(stream.as_bytes()).as_deref(), open);
        }
    }

    #[test]
    fn a_table_has_straight_columns() {
        let bad = Outcome { word: "fail", seconds: None, oopses: 1, warnings: 200, clean: true };
        let good =
            Outcome { word: "pass", seconds: Some(100.5), oopses: 0, warnings: 0, clean: false };
        let rows = [Row { name: "hmm.variant.test".into(), theirs: bad, ours: good }];
        let text = table(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(
            lines[3]
                .contains("fail    -       1       200     pass    100.50  -       -       dirty")
        );
        assert!(lines.iter().all(|l| l.len() <= lines[0].len()));
        let head = Head { release: "7.3.4".into(), machine: "default".into(), accel: "tcg".into() };
        let text = document(&head, &rows);
        assert!(text.contains("0 of 1 pass") && text.contains("1 of 1 pass, 1 without"));
        let title: Vec<&str> = text.lines().skip(2).take(3).collect();
        assert_eq!(title[0].len(), title[1].len(), "{title:?}");
    }
}
