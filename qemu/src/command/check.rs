// SPDX-License-Identifier: GPL-2.0
//! `zdvm check`: the checks of the sources. Each is a script of `scripts/check`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::command::runs::{self, OwnTree, Which};
use crate::job::{self, Job};
use crate::plan::matrix::Matrix;
use crate::report::{self, Tally};

/// One check.
struct Check {
    /// The name of its script, without the suffix.
    name: &'static str,
    /// What it checks.
    about: &'static str,
    /// Whether it needs a built kernel.
    tree: bool,
    /// Whether `--write` changes what it does.
    writes: bool,
}

const fn check(name: &'static str, about: &'static str) -> Check {
    Check { name, about, tree: false, writes: false }
}

impl Check {
    const fn with_tree(mut self) -> Self {
        self.tree = true;
        self
    }

    const fn that_writes(mut self) -> Self {
        self.writes = true;
        self
    }
}

/// All checks, the quick ones first.
const CHECKS: [Check; 11] = [
    check("rustfmt", "the format of all Rust code; --write formats it").that_writes(),
    check("unsafe", "unsafe code is in rust/kernel only, and rare"),
    check("cycles", "no modules import each other in a cycle"),
    check("host", "the tests of zdvm and of the selftests' library, on this machine"),
    check("clippy", "clippy on user space and on the module").with_tree(),
    check("compile-fail", "the compiler refuses misuses of the abstractions").with_tree(),
    check("checkpatch", "checkpatch.pl on the patches and on the C files").with_tree(),
    check("rustdoc", "the module's items are documented").with_tree(),
    check("docs", "the documentation builds as web pages"),
    check("page", "the page of a run, in a real browser; --write stores its pictures")
        .that_writes(),
    check("boot", "zdvm notices guests that go wrong on purpose").with_tree(),
];

/// The options of `zdvm check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The checks; all of them if none is named.
    names: Vec<String>,
    /// Print the checks; do not run them.
    #[arg(long)]
    list: bool,
    /// Write what is wanted, instead of checking it (rustfmt and page).
    #[arg(long)]
    write: bool,
    /// The kernel that the module is built against.
    #[arg(long, default_value = "patched", conflicts_with = "kdir")]
    kernel: String,
    #[command(flatten)]
    own: OwnTree,
}

/// Finds the named checks, or all of them.
fn find(names: &[String]) -> Result<Vec<&'static Check>> {
    if names.is_empty() {
        return Ok(CHECKS.iter().collect());
    }
    let one = |name: &String| {
        CHECKS.iter().find(|c| c.name == name).with_context(|| {
            let known: Vec<_> = CHECKS.iter().map(|c| c.name).collect();
            format!("no check {name:?}; there are: {}", known.join(", "))
        })
    };
    names.iter().map(one).collect()
}

/// Runs one check, and says how it went.
fn run(repo: &Path, check: &Check, tree: Option<&Path>, write: bool) -> Result<bool> {
    eprintln!("zdvm: check {}: {}", check.name, check.about);
    let start = Instant::now();
    let script = repo.join("scripts/check").join(check.name).with_extension("sh");
    let mut command = job::build(script);
    command.current_dir(repo);
    // make may have started this program.
    for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "KDIR", "O", "KBUILD_OUTPUT", "MO"] {
        command.env_remove(name);
    }
    command.env_remove("ZDM_TREE").env_remove("ZDM_WRITE");
    if let Some(tree) = tree {
        command.env("ZDM_TREE", tree);
    }
    if write && check.writes {
        command.env("ZDM_WRITE", "1");
    }
    let good = Job::spawn(&mut command, check.name)?.wait(|| Ok(()))?.success();
    let verdict = if good { "ok" } else { "FAILED" };
    report::say(&format!("check {}: {verdict}, {} s\n", check.name, start.elapsed().as_secs()));
    Ok(good)
}

/// Runs checks by name, also after one that fails. The first kernel of `which` is opened, and built if
/// necessary, only if a check needs it.
pub fn all(repo: &Path, names: &[String], write: bool, which: &Which) -> Result<Tally> {
    let checks = find(names)?;
    let open = || Ok(runs::open_first(repo, &Matrix::load(repo)?, which)?.1.objects);
    let tree: Option<Result<PathBuf>> = checks.iter().any(|c| c.tree).then(open);
    if let Some(Err(e)) = &tree {
        eprintln!("zdvm: no kernel for the checks: {e:#}");
    }
    let mut tally = Tally::default();
    for check in checks {
        let good = match &tree {
            Some(Err(_)) if check.tree => false,
            Some(Ok(tree)) if check.tree => run(repo, check, Some(tree), write)?,
            _ => run(repo, check, None, write)?,
        };
        tally.passed += usize::from(good);
        tally.failed += usize::from(!good);
    }
    Ok(tally)
}

/// Runs the command.
pub fn command(repo: &Path, args: &Args) -> Result<bool> {
    if args.list {
        for check in find(&args.names)? {
            report::say(&format!("{:<14}{}\n", check.name, check.about));
        }
        return Ok(true);
    }
    if args.write && !find(&args.names)?.iter().all(|c| c.writes) {
        bail!("--write is for the checks rustfmt and page: name one of them");
    }
    let which = args.own.or(std::slice::from_ref(&args.kernel));
    let tally = all(repo, &args.names, args.write, &which)?;
    report::say(&format!("checks: {} passed, {} failed\n", tally.passed, tally.failed));
    Ok(tally.failed == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test may panic.
mod tests {
    use super::*;

    #[test]
    fn every_check_has_a_script_and_every_script_is_a_check() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("scripts/check");
        let mut scripts: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .filter_map(|e| {
                e.unwrap().file_name().into_string().unwrap().strip_suffix(".sh").map(str::to_owned)
            })
            .collect();
        let mut names: Vec<String> = CHECKS.iter().map(|c| c.name.to_owned()).collect();
        scripts.sort();
        names.sort();
        assert_eq!(scripts, names);
    }

    #[test]
    fn a_check_that_does_not_exist_is_named() {
        let error = find(&["clipy".to_owned()]).err().unwrap().to_string();
        assert!(error.starts_with("no check \"clipy\"; there are: rustfmt, "), "{error}");
        assert_eq!(find(&[]).unwrap().len(), CHECKS.len());
    }
}
