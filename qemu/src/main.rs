// SPDX-License-Identifier: GPL-2.0
//! The command line of zdvm. Exit status: 0 pass, 1 fail, 2 usage or environment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};
use regex::Regex;
use zdvm::command::bisect;
use zdvm::command::compare;
use zdvm::command::doctor;
use zdvm::command::examples;
use zdvm::command::gdb;
use zdvm::command::in_tree;
use zdvm::command::mutants;
use zdvm::command::mutants::plan::Detector;
use zdvm::command::mutants::run::{PARAMETER, Wish};
use zdvm::command::patchcheck;
use zdvm::command::patchcheck::Tally;
use zdvm::command::reproduce;
use zdvm::command::run::{self, Request, Setup};
use zdvm::command::select::Select;
use zdvm::job;
use zdvm::kernel;
use zdvm::kernel::Tree;
use zdvm::kernel::kdir;
use zdvm::kernel::results;
use zdvm::plan::expected::{On, Selection};
use zdvm::plan::matrix::{Matrix, Plans};
use zdvm::repo;
use zdvm::report;
use zdvm::report::html;
use zdvm::vm::kvm::Choice;

/// Builds kernels, boots them in QEMU with the zdmirror module, and judges the result.
#[derive(Debug, Parser)]
#[command(name = "zdvm", version, after_help = examples::ALL)]
struct Cli {
    /// The checkout; by default the one around the current directory.
    #[arg(long, global = true, env = "ZDVM_REPO", hide_env = true)]
    repo: Option<PathBuf>,
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Debug, Subcommand)]
enum Cmd {
    /// Build, boot, run the suites, judge.
    #[command(after_help = examples::RUN)]
    Run(RunArgs),
    /// Compare the kernel's own C driver and ours, test by test; the verdict is about ours.
    Compare(CompareArgs),
    /// Apply series patch by patch, compile the files that each touches, run checkpatch.pl; boot
    /// the result.
    PatchCheck(PatchCheckArgs),
    /// Write the abstractions as a series over the kernel; build and boot a kernel with them.
    InTree(in_tree::Args),
    /// Show that the cases that series A adds to hmm-tests fail before the fixes and pass after.
    #[command(after_help = examples::REPRODUCE)]
    Reproduce(reproduce::Args),
    /// Boot the bugs of the kernel "mutants" one by one, and see whether the tests notice them.
    Mutants(MutantsArgs),
    /// Build kernels only.
    Build {
        /// A kernel of the matrix.
        #[arg(long = "kernel", default_value = "patched")]
        kernels: Vec<String>,
    },
    /// Print the directory of a built kernel (a KDIR); build it first if necessary.
    Path {
        /// A kernel of the matrix.
        #[arg(long, default_value = "patched")]
        kernel: String,
    },
    /// Write a configuration with all symbols that zdvm needs, beside your tree.
    Kconfig {
        /// Your kernel tree.
        #[arg(long)]
        kdir: PathBuf,
        /// The directory of its objects (make's O=).
        #[arg(long)]
        objdir: Option<PathBuf>,
    },
    /// Boot to a shell with the module loaded.
    Shell(Which),
    /// Boot with gdb attached to the guest and the module's symbols loaded.
    #[command(after_help = examples::GDB)]
    Gdb {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        args: gdb::Args,
    },
    /// Judge one commit of a kernel tree, for `git bisect run`.
    #[command(after_help = examples::BISECT)]
    Bisect(bisect::Args),
    /// Say what this machine lacks, what is slow, and what will be downloaded.
    Doctor,
    /// Write the page of a run, or of several runs side by side.
    #[command(after_help = examples::REPORT)]
    Report(html::Args),
    /// Print the completion script of a shell.
    Completions {
        /// bash, zsh, fish or elvish.
        shell: clap_complete::Shell,
    },
}

/// The kernel, the module and the machine.
#[derive(Debug, Args)]
struct Which {
    /// A kernel of the matrix; may be given more than once.
    #[arg(long = "kernel", default_value = "patched")]
    kernels: Vec<String>,
    /// Use your own kernel tree, built or not, instead.
    #[arg(long, conflicts_with = "kernels")]
    kdir: Option<PathBuf>,
    /// The directory of your tree's objects (make's O=).
    #[arg(long, requires = "kdir")]
    objdir: Option<PathBuf>,
    /// The kernel of the matrix whose results your tree is expected to give; found out by its
    /// version and its patches if not given.
    #[arg(long, requires = "kdir")]
    expect: Option<String>,
    /// Use this module instead of building ours.
    #[arg(long)]
    module: Option<PathBuf>,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    accel: String,
    /// A machine of the matrix.
    #[arg(long, default_value = "default")]
    machine: String,
    /// The number of processors, if not the machine's own.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    vcpus: Option<u32>,
}

impl Which {
    fn request<'a>(&'a self, kernel: &str, suites: &'a [String]) -> Request<'a> {
        Request {
            on: On { kernel: kernel.to_owned(), machine: self.machine.clone() },
            vcpus: self.vcpus,
            module: self.module.as_deref(),
            suites,
        }
    }
}

#[derive(Debug, Args)]
struct CompareArgs {
    #[command(flatten)]
    which: Which,
    /// Write the table to Documentation/upstream.rst.
    #[arg(long)]
    write: bool,
}

#[derive(Debug, Args)]
struct PatchCheckArgs {
    /// A kernel of the matrix that has patches; may be given more than once. The default is every
    /// kernel with one series.
    #[arg(long = "kernel")]
    kernels: Vec<String>,
    /// Do not build and boot the patched kernels.
    #[arg(long)]
    no_boot: bool,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    accel: String,
    /// A machine of the matrix.
    #[arg(long, default_value = "default")]
    machine: String,
}

#[derive(Debug, Args)]
struct MutantsArgs {
    /// Boot only these bugs.
    names: Vec<String>,
    /// Print the catalogue; do not boot.
    #[arg(long)]
    list: bool,
    /// Number of guests that run at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Use only this detector; may be given more than once.
    #[arg(long = "detector")]
    detectors: Vec<Detector>,
    /// Run only tests whose name matches this regular expression.
    #[arg(long)]
    filter: Option<String>,
    /// Ignore stored results of these bugs.
    #[arg(long)]
    fresh: bool,
    /// Write the table to Documentation/mutants.rst.
    #[arg(long)]
    write: bool,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    accel: String,
    /// A machine of the matrix.
    #[arg(long, default_value = "default")]
    machine: String,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    select: Select,
    /// Multiply all time limits by this, in addition to the kernel's own factor.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    timeout_factor: u64,
    /// Number of runs.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// Print the plan; do not boot.
    #[arg(long)]
    list: bool,
    /// Switch a seeded bug on (with --kernel mutants).
    #[arg(long)]
    mutant: Option<String>,
    /// Put the files of the run into this directory.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on after a failed kernel or repetition.
    #[arg(long)]
    keep_going: bool,
}

/// The names of the kernels; for the user's own tree, the kernel whose results it is expected to
/// give.
fn names(matrix: &Matrix, which: &Which) -> Result<Vec<String>> {
    if let Some(dir) = &which.kdir {
        let source = kdir::find(dir, which.objdir.as_deref())?.source;
        let Some(name) = &which.expect else {
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

fn open(repo: &std::path::Path, matrix: &Matrix, which: &Which, name: &str) -> Result<Tree> {
    match &which.kdir {
        Some(dir) => kdir::open(matrix, matrix.kernel(name)?, dir, which.objdir.as_deref()),
        None => kernel::build(repo, matrix, name),
    }
}

/// Opens the trees of kernels by name; a tree that cannot be built gives its error. Kernels with
/// few patches are built first, because the others begin with a copy of them. Without `keep_going`
/// the first error ends the loop.
fn open_all(
    repo: &std::path::Path,
    matrix: &Matrix,
    which: &Which,
    names: &[String],
    keep_going: bool,
) -> Result<BTreeMap<String, Result<Tree>>> {
    let mut kernels = Vec::new();
    for name in names {
        kernels.push((kernel::patches(matrix, matrix.kernel(name)?)?.len(), name));
    }
    kernels.sort();
    let mut trees = BTreeMap::new();
    for (_, name) in kernels {
        let tree = open(repo, matrix, which, name);
        let tree = if keep_going { told(name, tree) } else { Ok(tree?) };
        trees.insert(name.clone(), tree);
    }
    Ok(trees)
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
        repo: &std::path::Path,
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

fn run_all(repo: &std::path::Path, args: &RunArgs) -> Result<Tally> {
    let matrix = Matrix::load(repo)?;
    let plans = matrix.plans()?;
    let mut selection = args.select.selection()?;
    let suites = matrix.selected(&selection)?;
    let choice = Choice::new(&args.which.accel)?;
    let names = names(&matrix, &args.which)?;
    if args.list {
        for name in &names {
            let request = args.which.request(name, &suites);
            report::say(&matrix.planned(&request.on, &plans, &selection)?.listing());
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

fn say(tally: Tally) -> bool {
    let Tally { passed, failed, skipped } = tally;
    report::say(&format!("zdvm: {passed} passed, {failed} failed, {skipped} skipped\n"));
    tally.failed == 0
}

fn cmd_run(repo: &std::path::Path, args: &RunArgs) -> Result<bool> {
    let tally = run_all(repo, args)?;
    Ok(args.list || say(tally))
}

fn cmd_patch_check(repo: &std::path::Path, args: &PatchCheckArgs) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    let mut kernels = args.kernels.clone();
    if kernels.is_empty() {
        // Seeded bugs on top of a series are not meant for upstream, and the clang kernel has the
        // same series as another kernel.
        let one = |kernel: &zdvm::plan::matrix::Kernel| kernel.patches.len() == 1 && !kernel.llvm;
        let patched = matrix.kernel.iter().filter(|(_, kernel)| one(kernel));
        kernels.extend(patched.map(|(name, _)| name.clone()));
    }
    let mut tally = Tally::default();
    for name in &kernels {
        let found = patchcheck::check(repo, &matrix, name)?;
        tally.passed += found.passed;
        tally.failed += found.failed;
    }
    report::say(&format!("patches: {} checks passed, {} failed\n", tally.passed, tally.failed));
    if tally.failed == 0 && !args.no_boot {
        let which = Which {
            kernels,
            kdir: None,
            objdir: None,
            expect: None,
            module: None,
            accel: args.accel.clone(),
            machine: args.machine.clone(),
            vcpus: None,
        };
        let run = RunArgs {
            which,
            select: Select::default(),
            timeout_factor: 1,
            repeat: 1,
            list: false,
            mutant: None,
            out: None,
            keep_going: true,
        };
        let found = run_all(repo, &run)?;
        tally.skipped += found.skipped;
        tally.passed += found.passed;
        tally.failed += found.failed;
    }
    Ok(say(tally))
}

fn cmd_compare(repo: &std::path::Path, args: &CompareArgs) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    let plans = matrix.plans()?;
    let choice = Choice::new(&args.which.accel)?;
    let suites = ["hmm".to_owned()];
    let mut good = true;
    for name in names(&matrix, &args.which)? {
        let tree = open(repo, &matrix, &args.which, &name)?;
        let request = args.which.request(&name, &suites);
        good &= compare::compare(repo, &matrix, &plans, &tree, &request, &choice, args.write)?;
    }
    Ok(good)
}

fn cmd_mutants(repo: &std::path::Path, args: &MutantsArgs) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    if args.list {
        mutants::run::list(&matrix)?;
        return Ok(true);
    }
    let wish = Wish {
        names: args.names.clone(),
        detectors: args.detectors.clone(),
        jobs: args.jobs,
        filter: args.filter.as_deref().map(Regex::new).transpose().context("--filter")?,
        fresh: args.fresh,
        write: args.write,
        machine: args.machine.clone(),
    };
    mutants::run::all(repo, &matrix, &Choice::new(&args.accel)?, &wish)
}

/// Prepares an interactive guest: the first kernel, with all programs.
fn interactive(repo: &std::path::Path, which: &Which) -> Result<(Setup, Matrix, Choice)> {
    let matrix = Matrix::load(repo)?;
    let choice = Choice::new(&which.accel)?;
    let names = names(&matrix, which)?;
    let name = names.first().context("no kernel is given")?;
    let tree = open(repo, &matrix, which, name)?;
    let suites = matrix.selected(&Selection::default())?;
    let setup = Setup::new(repo, &matrix, tree, &which.request(name, &suites))?;
    Ok((setup, matrix, choice))
}

fn work(cli: &Cli) -> Result<bool> {
    if let Cmd::Completions { shell } = &cli.command {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Cli::command(), "zdvm", &mut script);
        report::say(&String::from_utf8_lossy(&script));
        return Ok(true);
    }
    let repo = repo::find(cli.repo.clone())?;
    match &cli.command {
        Cmd::Run(args) => return cmd_run(&repo, args),
        Cmd::Compare(args) => return cmd_compare(&repo, args),
        Cmd::Reproduce(args) => return reproduce::command(&repo, args),
        Cmd::Mutants(args) => return cmd_mutants(&repo, args),
        Cmd::InTree(args) => return in_tree::command(&repo, args),
        Cmd::PatchCheck(args) => return cmd_patch_check(&repo, args),
        Cmd::Completions { .. } | Cmd::Bisect(_) => {}
        Cmd::Report(args) => html::command(args)?,
        Cmd::Doctor => {
            let matrix = Matrix::load(&repo)?;
            report::say(&doctor::text(&repo, &matrix, &["patched", "stock"])?);
        }
        Cmd::Build { kernels } => {
            let matrix = Matrix::load(&repo)?;
            for name in kernels {
                kernel::build(&repo, &matrix, name)?;
            }
        }
        Cmd::Path { kernel } => {
            let matrix = Matrix::load(&repo)?;
            let tree = kernel::build(&repo, &matrix, kernel)?;
            report::say(&format!("{}\n", tree.objects.display()));
        }
        Cmd::Kconfig { kdir, objdir } => {
            let matrix = Matrix::load(&repo)?;
            let file = kdir::configure(&matrix, kdir, objdir.as_deref())?;
            report::say(&format!(
                "{0}\nIt is your configuration and what was missing. Copied to .config of a build \
                 directory DIR of your own, it builds with make O=DIR; then KDIR={1} O=DIR.\n",
                file.display(),
                kdir.display()
            ));
        }
        Cmd::Shell(which) => {
            let (setup, matrix, choice) = interactive(&repo, which)?;
            run::shell(&setup, &matrix, &choice, &run::folder(&repo, None)?)?;
        }
        Cmd::Gdb { which, args } => {
            let (setup, matrix, choice) = interactive(&repo, which)?;
            return gdb::command(&setup, &matrix, &choice, &run::folder(&repo, None)?, args);
        }
    }
    Ok(true)
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            let bisect = std::env::args().nth(1).is_some_and(|a| a == "bisect");
            return match e.use_stderr() {
                true if bisect => ExitCode::from(bisect::STOP),
                true => ExitCode::from(2),
                false => ExitCode::SUCCESS,
            };
        }
    };
    if let Cmd::Bisect(args) = &cli.command {
        return bisect::command(cli.repo.clone(), args);
    }
    let result = job::watch_signals().and_then(|()| work(&cli));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("zdvm: {e:#}");
            ExitCode::from(2)
        }
    }
}
