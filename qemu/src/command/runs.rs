// SPDX-License-Identifier: GPL-2.0
//! `zdvm run`: some kernels, one after the other, each as often as asked for. One boot is
//! [`run::once`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::command::mutants::catalogue;
use crate::command::mutants::run::{KERNEL, PARAMETER};
use crate::command::run::{self, Request, Setup};
use crate::command::select::Select;
use crate::kernel::kdir;
use crate::kernel::lanes;
use crate::kernel::results;
use crate::kernel::{self, Tree};
use crate::plan::expected::{On, Selection};
use crate::plan::matrix::{Matrix, Plans};
use crate::report::html;
use crate::report::{self, Tally};
use crate::vm::kvm::Choice;
use crate::vm::payload;

/// The kernel, the module and the machine.
#[derive(Debug, Args)]
pub struct Which {
    /// A kernel of qemu/kernel/matrix.toml; may be given more than once.
    #[arg(long = "kernel", default_value = "patched")]
    pub kernels: Vec<String>,
    /// Use your own kernel tree, built or not, instead.
    #[arg(long, conflicts_with = "kernels")]
    pub kdir: Option<PathBuf>,
    /// The directory of your tree's objects (make's O=).
    #[arg(long, requires = "kdir")]
    pub objdir: Option<PathBuf>,
    /// The kernel of qemu/kernel/matrix.toml whose results your tree is expected to give; found out
    /// by its version and its patches if not given.
    #[arg(long, requires = "kdir")]
    pub expect: Option<String>,
    /// Use this module instead of building ours.
    #[arg(long)]
    pub module: Option<PathBuf>,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    pub accel: String,
    /// A machine of qemu/kernel/matrix.toml.
    #[arg(long, default_value = "default")]
    pub machine: String,
    /// The number of processors, if not the machine's own.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub vcpus: Option<u32>,
}

impl Which {
    /// What one kernel of the command line is run with.
    pub fn request<'a>(&'a self, kernel: &str, suites: &'a [String]) -> Request<'a> {
        Request {
            on: On { kernel: kernel.to_owned(), machine: self.machine.clone() },
            vcpus: self.vcpus,
            module: self.module.as_deref(),
            suites,
        }
    }
}

/// The user's own kernel tree, if a command is not about the kernels of the matrix.
#[derive(Debug, Args)]
pub struct OwnTree {
    /// Use your own kernel tree, built or not, instead of the kernels of qemu/kernel/matrix.toml.
    #[arg(long)]
    pub kdir: Option<PathBuf>,
    /// The directory of your tree's objects (make's O=).
    #[arg(long, requires = "kdir")]
    objdir: Option<PathBuf>,
    /// The kernel of qemu/kernel/matrix.toml whose results your tree is expected to give; found out
    /// by its version and its patches if not given.
    #[arg(long, requires = "kdir")]
    expect: Option<String>,
}

impl OwnTree {
    /// The own tree, or else these kernels of the matrix, on the default machine.
    pub fn or(&self, kernels: &[String]) -> Which {
        Which {
            kernels: kernels.to_vec(),
            kdir: self.kdir.clone(),
            objdir: self.objdir.clone(),
            expect: self.expect.clone(),
            module: None,
            accel: "auto".to_owned(),
            machine: "default".to_owned(),
            vcpus: None,
        }
    }
}

/// The options of `zdvm run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The kernels and the machine.
    #[command(flatten)]
    pub which: Which,
    /// The tests.
    #[command(flatten)]
    pub select: Select,
    /// Multiply all time limits by this, in addition to the kernel's own factor.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout_factor: u64,
    /// Number of runs.
    #[arg(long, default_value_t = 1)]
    pub repeat: u32,
    /// Print the plan; do not boot.
    #[arg(long)]
    pub list: bool,
    /// Switch a seeded bug on (with --kernel mutants).
    #[arg(long)]
    pub mutant: Option<String>,
    /// Put the files of the run into this directory.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Go on after a failed kernel or repetition.
    #[arg(long)]
    pub keep_going: bool,
}

impl RunArgs {
    /// A run that goes on after a failed kernel, for a command that makes runs itself.
    pub fn going_on(which: Which, select: Select) -> Self {
        Self {
            which,
            select,
            timeout_factor: 1,
            repeat: 1,
            list: false,
            mutant: None,
            out: None,
            keep_going: true,
        }
    }
}

/// The names of the kernels; for the user's own tree, the kernel whose results it is expected to
/// give.
pub fn names(matrix: &Matrix, which: &Which) -> Result<Vec<String>> {
    if let Some(dir) = &which.kdir {
        let Some(name) = &which.expect else {
            let source = kdir::find(dir, which.objdir.as_deref())?.source;
            let (name, why) = results::expected(matrix, &source)?;
            eprintln!("zdvm: {why}");
            return Ok(vec![name]);
        };
        matrix.kernel(name)?;
        return Ok(vec![name.clone()]);
    }
    for name in &which.kernels {
        matrix.kernel(name)?;
    }
    Ok(which.kernels.clone())
}

/// Opens the tree of a kernel, and builds it if necessary.
pub fn open(repo: &Path, matrix: &Matrix, which: &Which, name: &str) -> Result<Tree> {
    if which.module.is_none() {
        // Before the kernel is built, which takes minutes.
        payload::check_source(repo)?;
    }
    match &which.kdir {
        Some(dir) => kdir::open(matrix, matrix.kernel(name)?, dir, which.objdir.as_deref()),
        None => kernel::build(repo, matrix, name),
    }
}

/// Opens the tree of the first kernel, and builds it if necessary. Returns its name, too.
pub fn open_first(repo: &Path, matrix: &Matrix, which: &Which) -> Result<(String, Tree)> {
    let name = names(matrix, which)?.into_iter().next().context("no kernel is given")?;
    let tree = open(repo, matrix, which, &name)?;
    Ok((name, tree))
}

/// Opens the trees of kernels by name; a tree that cannot be built gives its error. Without
/// `keep_going` the first error ends the loop. The kernels of the matrix are built two at a time if a
/// failure of one does not end the others.
fn open_all(
    repo: &Path,
    matrix: &Matrix,
    which: &Which,
    names: &[String],
    keep_going: bool,
) -> Result<BTreeMap<String, Result<Tree>>> {
    if keep_going && which.kdir.is_none() {
        return lanes::build_all(repo, matrix, names);
    }
    let mut kernels = Vec::new();
    for name in names {
        kernels.push((kernel::patches(matrix, matrix.kernel(name)?)?.len(), name));
    }
    // Kernels with few patches first, because the others begin with a copy of them.
    kernels.sort();
    let mut trees = BTreeMap::new();
    for (_, name) in kernels {
        let tree = open(repo, matrix, which, name);
        let tree = if keep_going { told(name, tree) } else { Ok(tree?) };
        trees.insert(name.clone(), tree);
    }
    Ok(trees)
}

/// Refuses a seeded bug that a kernel of the command line does not have: the run would pass without
/// it. A tree of the user's own is not looked into.
fn check_mutant(matrix: &Matrix, which: &Which, mutant: &str) -> Result<()> {
    for name in which.kernels.iter().filter(|_| which.kdir.is_none()) {
        let seeded = catalogue::seeded(&kernel::patches(matrix, matrix.kernel(name)?)?);
        if seeded.is_empty() {
            bail!("kernel {name} has no seeded bugs: give --kernel {KERNEL} with --mutant");
        }
        if !seeded.contains(mutant) {
            bail!("no mutant {mutant:?} in kernel {name}; `zdvm mutants --list` shows them");
        }
    }
    Ok(())
}

/// Prints an error at once, because other kernels follow.
fn told<T>(name: &str, result: Result<T>) -> Result<T> {
    result.inspect_err(|e| eprintln!("zdvm: kernel {name}: {e:#}"))
}

/// The results of the runs of a command.
#[derive(Default)]
struct Runs {
    tally: Tally,
    turns: u32,
    clean: u32,
    dirs: Vec<PathBuf>,
    /// The kernels without a verdict: the kernel, or the module for it, did not build.
    unjudged: Vec<String>,
}

impl Runs {
    fn good(&self) -> bool {
        self.clean == self.turns && self.unjudged.is_empty()
    }

    /// Runs one kernel as often as the command line says.
    fn kernel(
        &mut self,
        repo: &Path,
        matrix: &Matrix,
        (args, plans, selection, choice): (&RunArgs, &Plans, &Selection, &Choice),
        (name, request, tree): (&str, &Request<'_>, Tree),
    ) -> Result<()> {
        let mut setup = Setup::new(repo, matrix, tree, request)?;
        setup.timeout_factor = args.timeout_factor;
        if let Some(mutant) = &args.mutant {
            setup.cmdline = format!("{PARAMETER}={mutant}");
        }
        for turn in 1..=args.repeat {
            let sub = (args.repeat > 1 || args.which.kernels.len() > 1)
                .then(|| args.out.as_ref().map(|o| o.join(format!("{name}-{turn}"))));
            let out = sub.flatten().or_else(|| args.out.clone());
            let dir = run::folder(repo, out.as_deref())?;
            self.dirs.push(dir.clone());
            let verdict = run::once(&setup, matrix, plans, selection, choice, &dir)?.verdict;
            let (p, f) = verdict.counts();
            self.tally.passed += p;
            // A problem that belongs to no test must not count as "0 failed".
            self.tally.failed += if verdict.pass() { 0 } else { f.max(1) };
            self.tally.skipped += verdict.excused().0 + verdict.excused().1;
            self.turns += 1;
            self.clean += u32::from(verdict.pass());
            if !self.good() && !args.keep_going {
                break;
            }
        }
        Ok(())
    }
}

/// Runs the kernels of the command line. Returns the number of results of all boots.
pub fn run_all(repo: &Path, args: &RunArgs) -> Result<Tally> {
    let matrix = Matrix::load(repo)?;
    let mut selection = args.select.selection()?;
    let suites = matrix.selected(&selection)?;
    let choice = Choice::new(&args.which.accel)?;
    let names = names(&matrix, &args.which)?;
    if let Some(mutant) = &args.mutant {
        check_mutant(&matrix, &args.which, mutant)?;
    }
    matrix.machine(&args.which.machine)?;
    // Other mistakes are found before the selftests are built, and a mistyped filter before a kernel is.
    let plans = payload::plans(repo, &matrix)?;
    let mut planned = Vec::new();
    for name in &names {
        let request = args.which.request(name, &suites);
        planned.push(run::planned(&matrix, &request.on, &plans, &selection)?);
    }
    if args.list {
        for planned in planned {
            report::say(&planned.listing());
        }
        return Ok(Tally::default());
    }
    let mut trees = open_all(repo, &matrix, &args.which, &names, args.keep_going)?;
    let mut runs = Runs::default();
    for name in &names {
        let request = args.which.request(name, &suites);
        let Some(tree) = trees.remove(name) else { continue };
        let result = tree.and_then(|tree| {
            selection.config = Some(tree.config()?);
            let how = (args, &plans, &selection, &choice);
            let result = runs.kernel(repo, &matrix, how, (name, &request, tree));
            if args.keep_going { told(name, result) } else { result }
        });
        match result {
            Ok(()) => {}
            Err(e) if !args.keep_going => return Err(e),
            Err(_) => runs.unjudged.push(name.clone()),
        }
        if !runs.good() && !args.keep_going {
            break;
        }
    }
    let Runs { mut tally, turns, clean, dirs, unjudged } = runs;
    // The page in the last folder shows all runs.
    if let Some(last) = dirs.last().filter(|_| dirs.len() > 1) {
        html::write(&dirs, &last.join(html::FILE))?;
    }
    if args.repeat > 1 {
        report::say(&format!("zdvm: {clean} of {turns} repetitions were clean\n"));
    }
    if !unjudged.is_empty() {
        report::say(&format!("zdvm: not judged: {}; see above\n", unjudged.join(", ")));
        tally.failed += unjudged.len();
    }
    Ok(tally)
}
