// SPDX-License-Identifier: GPL-2.0
//! Shows that the reproducers of series A work: the cases that the series adds to hmm-tests fail on
//! the kernel without the fixes and pass on the kernel with them.
//!
//! Both kernels run the same program, which is built from the tree with the series, with our
//! module. Cases that do not fail without the fixes run once more, on both kernels, with the C
//! driver of the kernel's own tree: our module may do by itself what the fix does for every driver,
//! and some fixes are fixes of the C driver. A case may crash the kernel without the fixes; the
//! remaining cases then run in another guest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use regex::Regex;

use crate::command::compare::{self, Outcome};
use crate::command::run::{self, Request, Setup};
use crate::kernel::{self, Tree};
use crate::plan::expected::{On, Selection};
use crate::plan::matrix::{Matrix, Plans};
use crate::plan::planned::{Expect, Planned};
use crate::report;
use crate::vm::kvm::Choice;
use crate::vm::payload;

/// The suite of the matrix that runs hmm-tests.
const SUITE: &str = "hmm";
/// The variants that series C adds are no reproducers.
const OF_SERIES_C: &str = "_device_generic.";

/// The options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The kernel without the fixes.
    #[arg(long, default_value = "stock")]
    before: String,
    /// The kernel with the fixes.
    #[arg(long, default_value = "patched")]
    after: String,
    /// Run only cases whose name matches this regular expression.
    #[arg(long)]
    filter: Option<String>,
    /// Write the table to Documentation/reproducers.rst.
    #[arg(long)]
    write: bool,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    accel: String,
    /// A machine of qemu/kernel/matrix.toml.
    #[arg(long, default_value = "default")]
    machine: String,
}

impl Args {
    fn on(&self, kernel: &str) -> On {
        On { kernel: kernel.to_owned(), machine: self.machine.clone() }
    }

    /// The cases that the series adds, all of them expected to pass.
    fn cases(&self, matrix: &Matrix, plans: &Plans) -> Result<Planned> {
        let filter = self.filter.as_deref().map(Regex::new).transpose().context("--filter")?;
        let selection =
            Selection { suites: vec![SUITE.to_owned()], filter, full: true, config: None };
        let before = matrix.planned(&self.on(&self.before), plans, &selection)?;
        let mut after = matrix.planned(&self.on(&self.after), plans, &selection)?;
        let there =
            |name: &str| before.suites.iter().flat_map(|s| &s.tests).any(|t| t.name == name);
        for suite in &mut after.suites {
            suite.tests.retain(|t| !there(&t.name) && !t.name.contains(OF_SERIES_C));
            suite.tests.iter_mut().for_each(|t| t.expect = Expect::Pass);
        }
        if after.suites.iter().all(|s| s.tests.is_empty()) {
            bail!("no case matches that {} has and {} lacks", self.after, self.before);
        }
        Ok(after)
    }
}

/// The driver that a case ran with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Driver {
    Ours,
    /// lib/test_hmm.c of the kernel that runs.
    C,
}

impl Driver {
    fn name(self) -> &'static str {
        match self {
            Driver::Ours => "zdmirror",
            Driver::C => "test_hmm",
        }
    }
}

/// The last part of `fixture.variant.case`.
fn case(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// One variant of a case with one driver.
#[derive(Clone, Debug)]
struct Row {
    /// `fixture.variant.case`.
    name: String,
    driver: Driver,
    before: Outcome,
    after: Outcome,
}

impl Row {
    fn case(&self) -> &str {
        case(&self.name)
    }
}

fn by_case(rows: &[Row]) -> BTreeMap<&str, Vec<&Row>> {
    let mut cases: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        cases.entry(row.case()).or_default().push(row);
    }
    cases
}

fn never_fails_before(variants: &[&Row]) -> bool {
    variants.iter().all(|row| row.before.good() || row.before.word == "skip")
}

/// The cases that do not show their fix: each must fail in one of its variants before, and pass in
/// all of them after, with the same driver.
fn problems(rows: &[Row]) -> Vec<String> {
    let mut out = Vec::new();
    for (case, variants) in by_case(rows) {
        if never_fails_before(&variants) {
            out.push(format!("{case}: does not fail without the fixes"));
        }
        // A case that a variant skips on both kernels does not apply to that type of memory.
        let applies = |row: &&&Row| row.before.word != "skip" || row.after.word != "skip";
        for row in variants.iter().filter(applies).filter(|row| !row.after.good()) {
            let (name, driver, word) = (&row.name, row.driver.name(), row.after.word);
            out.push(format!("{name}: {word} with the fixes, with {driver}"));
        }
    }
    out
}

/// The table in reStructuredText. The terminal gets the same text.
fn table(rows: &[Row]) -> String {
    let names = rows.iter().map(|r| r.name.len()).max().unwrap_or(0).max(4);
    let rule = format!("{}  ========  ======  ======  ======  ======\n", "=".repeat(names));
    let number = |n: usize| if n == 0 { "-".to_owned() } else { n.to_string() };
    let mut out = rule.clone();
    let _ = writeln!(out, "{:names$}  driver    before  oops    other   after", "case");
    out += &rule;
    for Row { name, driver, before, after } in rows {
        let (oopses, others) = (number(before.oopses), number(before.warnings));
        let _ = writeln!(
            out,
            "{name:names$}  {:<8}  {:<6}  {oopses:<6}  {others:<6}  {}",
            driver.name(),
            before.word,
            after.word
        );
    }
    out + &rule
}

fn document(args: &Args, releases: (&str, &str), rows: &[Row]) -> String {
    let problems = problems(rows);
    let verdict = match problems.is_empty() {
        true => {
            "Every case fails before in at least one variant, and passes after in all, with the same \
             driver."
                .to_owned()
        }
        false => format!("Not as it should be:\n\n- {}", problems.join("\n- ")),
    };
    format!(
        ".. SPDX-License-Identifier: GPL-2.0\n\n\
         ==================================\n\
         Reproducers of series A, run twice\n\
         ==================================\n\n\
         Written by ``./zdvm reproduce --write``. \"Before\" is Linux {} without the series (kernel\n\
         ``{}``), \"after\" is Linux {} with it (kernel ``{}``). The program, hmm-tests of the\n\
         series, is the same. Cases that do not fail before with zdmirror were run with ``test_hmm``,\n\
         the C driver of the tree of either kernel. \"oops\" and \"other\" count the reports in the kernel\n\
         log before; \"died\" means that the kernel did not survive the case.\n\n{verdict}\n\n{}",
        releases.0,
        args.before,
        releases.1,
        args.after,
        table(rows)
    )
}

/// The cases that do not fail before in any variant.
fn unshown(rows: &[Row]) -> BTreeSet<&str> {
    let cases = by_case(rows).into_iter();
    cases.filter(|(_, variants)| never_fails_before(variants)).map(|(case, _)| case).collect()
}

/// The data that the runs with either driver share.
struct Bench<'a> {
    repo: &'a Path,
    args: &'a Args,
    matrix: &'a Matrix,
    before: Tree,
    after: Tree,
    choice: Choice,
    dir: PathBuf,
}

impl Bench<'_> {
    fn setup(&self, driver: Driver, tree: &Tree, name: &str) -> Result<Setup> {
        let suites = [SUITE.to_owned()];
        let module = match driver {
            Driver::Ours => None,
            Driver::C => Some(tree.c_driver()?),
        };
        let on = self.args.on(name);
        let request = Request { on, vcpus: None, module: module.as_deref(), suites: &suites };
        let mut setup = Setup::new(self.repo, self.matrix, tree.clone(), &request)?;
        setup.audited = driver == Driver::Ours;
        setup.while_sound = true;
        Ok(setup)
    }

    /// Runs the cases on both kernels.
    fn rows(&self, driver: Driver, cases: &Planned) -> Result<Vec<Row>> {
        let after = self.setup(driver, &self.after, &self.args.after)?;
        let mut before = self.setup(driver, &self.before, &self.args.before)?;
        // The program of the tree without the series does not have the cases.
        before.programs.clone_from(&after.programs);
        before.lists.clone_from(&after.lists);
        let run = |what: &str, setup: &Setup| {
            eprintln!("zdvm: {what} the fixes, with {}", driver.name());
            let dir = self.dir.join(format!("{what}-{}", driver.name()));
            compare::theirs(setup, self.matrix, cases, &self.choice, &dir)
        };
        let mut outcomes = run("without", &before)?;
        let with = run("with", &after)?;
        let rows = with.into_iter().filter_map(|(name, after)| {
            let at = outcomes.iter().position(|(other, _)| *other == name)?;
            Some(Row { before: outcomes.swap_remove(at).1, name, driver, after })
        });
        Ok(rows.collect())
    }
}

/// Runs the cases on both kernels. Returns true if each fails before and passes after.
pub fn command(repo: &Path, args: &Args) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    let choice = Choice::new(&args.accel)?;
    let plans = payload::plans(repo, &matrix)?;
    let cases = args.cases(&matrix, &plans)?;
    let bench = Bench {
        repo,
        args,
        matrix: &matrix,
        before: kernel::build(repo, &matrix, &args.before)?,
        after: kernel::build(repo, &matrix, &args.after)?,
        choice,
        dir: run::folder(repo, None)?,
    };
    let mut rows = bench.rows(Driver::Ours, &cases)?;
    let mut again = cases;
    let unshown = unshown(&rows);
    again.suites.iter_mut().for_each(|s| s.tests.retain(|t| unshown.contains(case(&t.name))));
    if again.suites.iter().any(|s| !s.tests.is_empty()) {
        rows.extend(bench.rows(Driver::C, &again)?);
    }

    report::say(&format!("\n{}", table(&rows)));
    let problems = problems(&rows);
    problems.iter().for_each(|problem| report::say(&format!("  {problem}\n")));
    if args.write {
        let path = repo.join("Documentation/reproducers.rst");
        let releases = (&*bench.before.release()?, &*bench.after.release()?);
        std::fs::write(&path, document(args, releases, &rows))
            .with_context(|| format!("writing {}", path.display()))?;
        report::say("written: Documentation/reproducers.rst\n");
    }
    report::say(&format!("zdvm: {} cases, {} problems\n", rows.len(), problems.len()));
    Ok(problems.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(word: &'static str, oopses: usize) -> Outcome {
        Outcome { word, seconds: None, oopses, warnings: 0, clean: true }
    }

    fn row(name: &str, before: Outcome, after: Outcome) -> Row {
        Row { name: name.to_owned(), driver: Driver::Ours, before, after }
    }

    #[test]
    fn a_case_fails_in_one_variant_and_passes_in_all() {
        let good = [
            row("hmm.private.a", outcome("fail", 0), outcome("pass", 0)),
            row("hmm.coherent.a", outcome("pass", 0), outcome("pass", 0)),
            row("hmm.private.b", outcome("pass", 1), outcome("pass", 0)),
        ];
        assert!(problems(&good).is_empty());
    }

    #[test]
    fn a_case_that_never_fails_is_no_reproducer() {
        let rows = [
            row("hmm.private.a", outcome("pass", 0), outcome("pass", 0)),
            row("hmm.coherent.a", outcome("skip", 0), outcome("pass", 0)),
        ];
        assert_eq!(problems(&rows), ["a: does not fail without the fixes"]);
    }

    #[test]
    fn a_variant_that_is_skipped_on_both_kernels_does_not_count() {
        let rows = [
            row("hmm.private.a", outcome("fail", 0), outcome("pass", 0)),
            row("hmm.coherent.a", outcome("skip", 0), outcome("skip", 0)),
        ];
        assert!(problems(&rows).is_empty());
        let rows = [
            row("hmm.private.a", outcome("fail", 0), outcome("skip", 0)),
            row("hmm.coherent.a", outcome("skip", 0), outcome("skip", 0)),
        ];
        assert_eq!(problems(&rows), ["hmm.private.a: skip with the fixes, with zdmirror"]);
    }

    #[test]
    fn a_case_that_fails_after_is_named_with_its_variant() {
        let rows = [row("hmm.private.a", outcome("died", 1), outcome("fail", 0))];
        assert_eq!(problems(&rows), ["hmm.private.a: fail with the fixes, with zdmirror"]);
        assert!(table(&rows).contains("hmm.private.a  zdmirror  died    1       -       fail"));
    }

    #[test]
    fn a_case_that_fails_with_the_other_driver_is_a_reproducer() {
        let mut rows = vec![
            row("hmm.private.a", outcome("pass", 0), outcome("pass", 0)),
            row("hmm.private.b", outcome("fail", 0), outcome("pass", 0)),
        ];
        assert_eq!(Vec::from_iter(unshown(&rows)), ["a"]);
        let mut other = row("hmm.private.a", outcome("fail", 0), outcome("pass", 0));
        other.driver = Driver::C;
        rows.push(other);
        assert!(problems(&rows).is_empty());
        assert!(table(&rows).contains("hmm.private.a  test_hmm  fail "));
    }
}
