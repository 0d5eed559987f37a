// SPDX-License-Identifier: GPL-2.0
//! `zdvm bisect`: judges one commit of a kernel tree for `git bisect run`.
//!
//! git reads the exit status: 0 is good, 1 is bad, 125 cannot be tested, 128 stops the bisection. A
//! commit is bad only if the same test failed in two boots, because a test that fails at random
//! would send the bisection the wrong way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Error, Result, bail};
use clap::ValueEnum;

use crate::command::run::{self, Request, Setup};
use crate::command::select::Select;
use crate::job;
use crate::judge::verdict::{Status, Verdict};
use crate::kernel::compiler;
use crate::kernel::kconfig;
use crate::kernel::kdir;
use crate::kernel::{self, Tree};
use crate::plan::expected::On;
use crate::plan::matrix::Matrix;
use crate::repo;
use crate::report;
use crate::vm::kvm::Choice;
use crate::vm::payload;

/// Exit status that stops `git bisect run`.
pub const STOP: u8 = 128;

/// The verdict on a commit that cannot be tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Taken {
    /// Exit 125: git tries a neighbour.
    Skip,
    /// Exit 1: the commit has the bug.
    Bad,
    /// Exit 0.
    Good,
}

/// The command line.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The kernel tree that is bisected.
    #[arg(long, default_value = ".")]
    kdir: PathBuf,
    /// Build in this directory, and keep the .config that is there; the default is a directory of
    /// the cache.
    #[arg(long)]
    objdir: Option<PathBuf>,
    /// The kernel of qemu/kernel/matrix.toml whose configuration and results the tree is expected to
    /// have.
    #[arg(long, default_value = "stock")]
    expect: String,
    #[command(flatten)]
    select: Select,
    /// The verdict on a commit whose kernel or module does not build.
    #[arg(long, value_enum, default_value = "skip")]
    unbuildable: Taken,
    /// The verdict on a commit whose kernel does not boot.
    #[arg(long, value_enum, default_value = "skip")]
    unbootable: Taken,
    /// The largest number of boots; two boots that fail in the same test end the command earlier.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..))]
    attempts: u32,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    accel: String,
    /// A machine of qemu/kernel/matrix.toml.
    #[arg(long, default_value = "default")]
    machine: String,
}

/// The result of one boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The guest never came up.
    NoBoot,
    /// The guest came up, but no test ran.
    NothingRan,
    /// Tests ran; these failed. The set may be empty.
    Ran(BTreeSet<String>),
}

/// The decision about a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The boots so far prove nothing: boot once more.
    Again,
    /// The commit is good.
    Good,
    /// The commit is bad: these tests failed twice.
    Bad(BTreeSet<String>),
    /// The kernel does not boot.
    NoBoot,
    /// The commit cannot be tested, for this reason.
    Skip(&'static str),
}

/// Decides from the boots so far; the caller makes at most `most` boots.
///
/// - A first boot without a failure is good. This command does not search for a failure that is
///   rarer than one boot; `--filter` and a test that repeats do.
/// - The same failure in two boots is bad.
/// - Two boots without a failure outweigh one with a failure.
/// - A kernel that fails to boot twice does not boot.
pub fn decide(attempts: &[Attempt], most: usize) -> Decision {
    let mut failures: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut clean, mut dead) = (0, 0);
    for attempt in attempts {
        match attempt {
            Attempt::NothingRan => return Decision::Skip("not one of the tests ran"),
            Attempt::NoBoot => dead += 1,
            Attempt::Ran(failed) if failed.is_empty() => clean += 1,
            Attempt::Ran(failed) => {
                for test in failed {
                    *failures.entry(test).or_default() += 1;
                }
            }
        }
    }
    let twice: BTreeSet<String> =
        failures.iter().filter(|(_, n)| **n >= 2).map(|(test, _)| (*test).to_owned()).collect();
    if !twice.is_empty() {
        return Decision::Bad(twice);
    }
    if dead >= 2 {
        return Decision::NoBoot;
    }
    if clean >= 2 || (clean == 1 && failures.is_empty()) {
        return Decision::Good;
    }
    if attempts.len() < most {
        return Decision::Again;
    }
    match dead {
        0 => Decision::Skip("no test failed in two boots, and no two boots were clean"),
        _ => Decision::Skip("the boots contradict each other"),
    }
}

/// The exit status that `git bisect run` reads.
pub fn status(decision: &Decision, unbootable: Taken) -> u8 {
    match decision {
        Decision::Good => 0,
        Decision::Bad(_) => 1,
        Decision::NoBoot => taken(unbootable),
        Decision::Skip(_) | Decision::Again => 125,
    }
}

fn taken(as_what: Taken) -> u8 {
    match as_what {
        Taken::Good => 0,
        Taken::Bad => 1,
        Taken::Skip => 125,
    }
}

/// Kinds of problems that only say that this version of the kernel has other tests than the plan.
/// They are the same before and after the commit that is searched for.
const OF_THE_VERSION: &[&str] =
    &["Unplanned", "UnexpectedPass", "Missing", "Skip", "known fault", "suite", "deliberate splat"];

/// Reduces a verdict to what two boots can be compared by.
pub fn attempt(verdict: &Verdict) -> Attempt {
    if verdict.release.is_none() {
        return Attempt::NoBoot;
    }
    let failed: BTreeSet<String> = verdict
        .problems
        .iter()
        .filter(|p| !OF_THE_VERSION.contains(&p.kind.as_str()))
        .map(|p| {
            let suite = verdict.suites.iter().find_map(|s| {
                p.subject.strip_prefix(s.name.as_str()).and_then(|rest| rest.strip_prefix(": "))
            });
            suite.unwrap_or(&p.subject).to_owned()
        })
        .collect();
    let gave_result = |status| !matches!(status, Status::Missing | Status::Skip);
    let ran = verdict.suites.iter().flat_map(|s| &s.tests).any(|t| gave_result(t.status));
    if failed.is_empty() && !ran { Attempt::NothingRan } else { Attempt::Ran(failed) }
}

/// Whether this machine caused an error, which then says nothing about the commit.
fn environment(e: &Error) -> bool {
    let text = format!("{e:#}");
    let ours = ["No space left on device", "Cannot allocate memory", "Killed"];
    e.downcast_ref::<job::Interrupted>().is_some() || ours.iter().any(|w| text.contains(w))
}

/// The result of a step. The outer error is this machine's; the inner error says that the commit
/// cannot be built.
type Built<T> = std::result::Result<T, Error>;

/// Sorts an error: an error of this machine stops the bisection, an error of the commit is
/// returned.
fn of_commit<T>(result: Result<T>) -> Result<Built<T>> {
    match result {
        Err(e) if environment(&e) => Err(e),
        other => Ok(other),
    }
}

/// The kernel tree, if a bisection can work in it. An error here is about the place, not about the
/// commit: it must not make git skip all of them.
fn place(args: &Args) -> Result<PathBuf> {
    let source =
        args.kdir.canonicalize().with_context(|| format!("--kdir {}", args.kdir.display()))?;
    if !source.join("Kbuild").is_file() || kdir::version(&source).is_err() {
        bail!("{} is no kernel tree (--kdir DIR names one)", source.display());
    }
    if kdir::is_in_place(&source) {
        bail!(
            "{0} is configured or built in place, and kbuild takes no build directory beside that. A \
             worktree leaves it as it is: git -C {0} worktree add --detach ../bisect, then bisect in there",
            source.display()
        );
    }
    Ok(source)
}

/// Builds the commit that is checked out, in the objects of the previous commit.
fn build(matrix: &Matrix, args: &Args, source: PathBuf) -> Result<Built<Tree>> {
    let like = matrix.kernel(&args.expect)?;
    let kernels = repo::cache("kernels")?;
    let name = format!("bisect-{}", repo::key([source.display().to_string()]));
    let objects = args.objdir.clone().unwrap_or_else(|| kernels.join(&name));
    fs::create_dir_all(&objects).with_context(|| format!("making {}", objects.display()))?;
    let objects = objects.canonicalize()?;
    let _lock = repo::lock(&kernels.join(format!("{name}.lock")))?;
    let log = kernels.join(format!("{name}.log"));
    let _ = fs::remove_file(&log);
    let mut tree = Tree {
        name: source.display().to_string(),
        source: source.clone(),
        objects: objects.clone(),
        ours: args.objdir.is_none(),
        args: Vec::new(),
    };
    let fragments = kernel::fragments(matrix, &like.config)?;
    let arguments = match tree.objects.join(".config").is_file() {
        true => Some(compiler::arguments(&tree.config()?, &compiler::version)),
        false => None,
    };
    let configured = match arguments {
        Some(Ok(arguments)) => {
            tree.args = arguments;
            again(&tree, &fragments, tree.ours, &log)
        }
        Some(Err(e)) if !tree.ours => return Err(e),
        // A signal during the configuration of the first commit leaves half a .config.
        _ => kernel::configure(&tree, &fragments, &log),
    };
    // `kdir::open()` builds a tree that has a configuration.
    match of_commit(configured)? {
        Ok(()) => of_commit(kdir::open(matrix, like, &source, Some(&objects))),
        Err(e) => Ok(Err(e)),
    }
}

/// Adapts the configuration of the previous commit to the options of this one.
fn again(tree: &Tree, fragments: &[(String, String)], ours: bool, log: &Path) -> Result<()> {
    let mut command = tree.make();
    crate::kernel::make::logged(command.arg("olddefconfig"), "configuring", log, None)?;
    // An option that the previous commit did not have is missing in .config: set it again.
    if ours && !kconfig::missing(fragments, &tree.config()?).is_empty() {
        kernel::configure(tree, fragments, log)?;
    }
    Ok(())
}

fn skip(what: &str, e: &Error, as_what: Taken) -> u8 {
    report::say(&format!("zdvm: bisect: {what}: {e:#}\n"));
    say(taken(as_what))
}

fn say(status: u8) -> u8 {
    let word = match status {
        0 => "is good",
        1 => "is bad",
        _ => "cannot be tested",
    };
    report::say(&format!("zdvm: bisect: this commit {word} (exit status {status})\n"));
    status
}

fn work(repo: &Path, args: &Args) -> Result<u8> {
    let matrix = Matrix::load(repo)?;
    let source = place(args)?;
    let selection = args.select.selection()?;
    let suites = matrix.selected(&selection)?;
    let choice = Choice::new(&args.accel)?;
    let plans = payload::plans(repo, &matrix)?;
    let tree = match build(&matrix, args, source)? {
        Ok(tree) => tree,
        Err(e) => return Ok(skip("the kernel does not build", &e, args.unbuildable)),
    };
    let module = match of_commit(payload::module(repo, &tree))? {
        Ok(module) => module,
        Err(e) => return Ok(skip("the module does not build", &e, args.unbuildable)),
    };
    let on = On { kernel: args.expect.clone(), machine: args.machine.clone() };
    let request = Request { on, vcpus: None, module: Some(&module), suites: &suites };
    let setup = Setup::new(repo, &matrix, tree, &request)?;
    let mut attempts = Vec::new();
    let decision = loop {
        let dir = run::folder(repo, None)?;
        let boot = run::once(&setup, &matrix, &plans, &selection, &choice, &dir)?;
        attempts.push(attempt(&boot.verdict));
        match decide(&attempts, usize::try_from(args.attempts)?) {
            Decision::Again => report::say("zdvm: bisect: booting once more to be sure\n"),
            decision => break decision,
        }
    };
    match &decision {
        Decision::Bad(tests) => {
            let tests: Vec<&str> = tests.iter().map(String::as_str).collect();
            report::say(&format!("zdvm: bisect: failed twice: {}\n", tests.join(", ")));
        }
        Decision::Skip(why) => report::say(&format!("zdvm: bisect: {why}\n")),
        Decision::NoBoot => report::say("zdvm: bisect: the kernel does not boot\n"),
        _ => {}
    }
    Ok(say(status(&decision, args.unbootable)))
}

/// Runs the command. Exit statuses 0, 1 and 125 are only used for statements about the commit.
pub fn command(repo: Option<PathBuf>, args: &Args) -> ExitCode {
    let result =
        job::watch_signals().and_then(|()| repo::find(repo)).and_then(|repo| work(&repo, args));
    match result {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("zdvm: bisect stops: {e:#}");
            ExitCode::from(STOP)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;
    use crate::judge::verdict::{Problem, SuiteResult, TestResult};

    fn ran(names: &[&str]) -> Attempt {
        Attempt::Ran(names.iter().map(|n| (*n).to_owned()).collect())
    }

    fn bad(names: &[&str]) -> Decision {
        Decision::Bad(names.iter().map(|n| (*n).to_owned()).collect())
    }

    #[test]
    fn decisions() {
        use Attempt::{NoBoot, NothingRan};
        use Decision::{Again, Good, Skip};
        let unsure = Skip("no test failed in two boots, and no two boots were clean");
        let contradicts = Skip("the boots contradict each other");
        let cases: Vec<(Vec<Attempt>, Decision)> = vec![
            (vec![], Again),
            (vec![ran(&[])], Good),
            (vec![ran(&["a"])], Again),
            (vec![ran(&["a"]), ran(&["a"])], bad(&["a"])),
            (vec![ran(&["a", "b"]), ran(&["b", "c"])], bad(&["b"])),
            (vec![ran(&["a"]), ran(&["b"])], Again),
            (vec![ran(&["a"]), ran(&["b"]), ran(&["c"])], unsure.clone()),
            (vec![ran(&["a"]), ran(&[])], Again),
            (vec![ran(&["a"]), ran(&[]), ran(&[])], Good),
            (vec![ran(&["a"]), ran(&[]), ran(&["a"])], bad(&["a"])),
            (vec![ran(&["a"]), ran(&[]), ran(&["b"])], unsure),
            (vec![NoBoot], Again),
            (vec![NoBoot, NoBoot], Decision::NoBoot),
            (vec![NoBoot, ran(&[])], Good),
            (vec![NoBoot, ran(&["a"])], Again),
            (vec![NoBoot, ran(&["a"]), NoBoot], Decision::NoBoot),
            (vec![NoBoot, ran(&["a"]), ran(&["b"])], contradicts),
            (vec![NothingRan], Skip("not one of the tests ran")),
        ];
        for (attempts, expected) in cases {
            assert_eq!(decide(&attempts, 3), expected, "{attempts:?}");
        }
    }

    #[test]
    fn exit_statuses() {
        assert_eq!(status(&Decision::Good, Taken::Skip), 0);
        assert_eq!(status(&bad(&["a"]), Taken::Skip), 1);
        assert_eq!(status(&Decision::Skip("why"), Taken::Bad), 125);
        for (as_what, expected) in [(Taken::Skip, 125), (Taken::Bad, 1), (Taken::Good, 0)] {
            assert_eq!(status(&Decision::NoBoot, as_what), expected);
        }
    }

    #[test]
    fn a_full_disk_is_no_bad_commit() {
        assert!(environment(&anyhow::anyhow!("cc1: fatal error: No space left on device")));
        assert!(environment(&job::Interrupted(2).into()));
        assert!(!environment(&anyhow::anyhow!("mm/memory.c:1: error: expected ';'")));
    }

    fn verdict(problems: &[(&str, &str)], statuses: &[Status]) -> Verdict {
        let test = |status: &Status| TestResult {
            name: "t".into(),
            status: *status,
            reason: String::new(),
            seconds: None,
        };
        let problem = |(kind, subject): &(&str, &str)| Problem {
            kind: (*kind).into(),
            subject: (*subject).into(),
            text: String::new(),
        };
        Verdict {
            kernel: "stock".into(),
            machine: "default".into(),
            release: Some("7.3.4".into()),
            suites: vec![SuiteResult {
                name: "selftests".into(),
                planned: statuses.len(),
                with_full: 0,
                not_applicable: 0,
                tests: statuses.iter().map(test).collect(),
            }],
            left_out: vec![],
            splats: vec![],
            problems: problems.iter().map(problem).collect(),
        }
    }

    #[test]
    fn verdicts_are_reduced_to_what_two_boots_share() {
        let result = [("Fail", "selftests: fork.cow"), ("WARN", "fork.cow"), ("taint", "kernel")];
        let seen = attempt(&verdict(&result, &[Status::Fail]));
        assert_eq!(seen, ran(&["fork.cow", "kernel"]));
        let version = [("Unplanned", "selftests: new"), ("Missing", "selftests: old")];
        assert_eq!(attempt(&verdict(&version, &[Status::Pass])), ran(&[]));
        assert_eq!(attempt(&verdict(&version, &[Status::Missing])), Attempt::NothingRan);
        let mut dead = verdict(&[("boot", "guest")], &[Status::Crashed]);
        dead.release = None;
        assert_eq!(attempt(&dead), Attempt::NoBoot);
    }
}
