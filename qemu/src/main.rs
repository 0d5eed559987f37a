// SPDX-License-Identifier: GPL-2.0
//! The command line of zdvm. Exit status: 0 pass, 1 fail, 2 usage or environment.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};
use regex::Regex;
use zdvm::command::bisect;
use zdvm::command::campaign;
use zdvm::command::check;
use zdvm::command::compare;
use zdvm::command::doctor;
use zdvm::command::examples;
use zdvm::command::gdb;
use zdvm::command::in_tree;
use zdvm::command::mutants;
use zdvm::command::mutants::plan::Detector;
use zdvm::command::mutants::run::Wish;
use zdvm::command::patchcheck;
use zdvm::command::reproduce;
use zdvm::command::run::{self, Setup};
use zdvm::command::runs::{self, RunArgs, Which};
use zdvm::command::select::Select;
use zdvm::job;
use zdvm::kernel;
use zdvm::kernel::{kdir, lanes};
use zdvm::plan::expected::Selection;
use zdvm::plan::matrix::Matrix;
use zdvm::repo;
use zdvm::report::html;
use zdvm::report::{self, Tally};
use zdvm::vm::kvm::Choice;
use zdvm::vm::payload;

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
    /// Run all tests: of zdvm on this machine, and of the module on the kernels of
    /// qemu/kernel/matrix.toml.
    #[command(after_help = examples::TEST)]
    Test(campaign::TestArgs),
    /// Measure the C driver against ours, and the cost of the oracle, by the clock and by
    /// instructions.
    #[command(after_help = examples::BENCH)]
    Bench(campaign::BenchArgs),
    /// Check the sources: format, lints, patches, documentation.
    #[command(after_help = examples::CHECK)]
    Check(check::Args),
    /// Compare the kernel's own C driver and ours, test by test; the verdict is about ours.
    #[command(after_help = examples::COMPARE)]
    Compare(CompareArgs),
    /// Apply series patch by patch, compile the files that each touches, run checkpatch.pl; boot
    /// the result.
    #[command(after_help = examples::PATCH_CHECK)]
    PatchCheck(PatchCheckArgs),
    /// Write the abstractions as a series over the kernel; build and boot a kernel with them.
    #[command(after_help = examples::IN_TREE)]
    InTree(in_tree::Args),
    /// Show that the cases that series A adds to hmm-tests fail before the fixes and pass after.
    #[command(after_help = examples::REPRODUCE)]
    Reproduce(reproduce::Args),
    /// Boot the bugs of the kernel "mutants" one by one, and see whether the tests notice them.
    #[command(after_help = examples::MUTANTS)]
    Mutants(MutantsArgs),
    /// Build kernels only.
    #[command(after_help = examples::BUILD)]
    Build {
        /// A kernel of qemu/kernel/matrix.toml.
        #[arg(long = "kernel", default_value = "patched")]
        kernels: Vec<String>,
    },
    /// Print the directory of a built kernel (a KDIR); build it first if necessary.
    #[command(after_help = examples::PATH)]
    Path {
        /// A kernel of qemu/kernel/matrix.toml.
        #[arg(long, default_value = "patched")]
        kernel: String,
    },
    /// Write a configuration with all symbols that zdvm needs, beside your tree.
    #[command(after_help = examples::KCONFIG)]
    Kconfig {
        /// Your kernel tree.
        #[arg(long)]
        kdir: PathBuf,
        /// The directory of its objects (make's O=).
        #[arg(long)]
        objdir: Option<PathBuf>,
    },
    /// Boot to a shell with the module loaded.
    #[command(after_help = examples::SHELL)]
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
    #[command(after_help = examples::COMPLETIONS)]
    Completions {
        /// bash, zsh, fish or elvish.
        shell: clap_complete::Shell,
    },
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
    /// A kernel of qemu/kernel/matrix.toml that has patches; may be given more than once. The default
    /// is every kernel with one series.
    #[arg(long = "kernel")]
    kernels: Vec<String>,
    /// Do not build and boot the patched kernels.
    #[arg(long)]
    no_boot: bool,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    accel: String,
    /// A machine of qemu/kernel/matrix.toml.
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
    /// Of our suite run only the tests that reach the bug.
    #[arg(long)]
    short: bool,
    /// Ignore stored results of these bugs.
    #[arg(long)]
    fresh: bool,
    /// Write the table to Documentation/mutants.rst.
    #[arg(long)]
    write: bool,
    /// auto, kvm, tcg or icount (TCG, with clocks that count instructions).
    #[arg(long, default_value = "auto")]
    accel: String,
    /// A machine of qemu/kernel/matrix.toml.
    #[arg(long, default_value = "default")]
    machine: String,
}

fn cmd_run(repo: &std::path::Path, args: &RunArgs) -> Result<bool> {
    let tally = runs::run_all(repo, args)?;
    Ok(args.list || tally.say())
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
        let run = RunArgs::going_on(which, Select::default());
        let found = runs::run_all(repo, &run)?;
        tally.skipped += found.skipped;
        tally.passed += found.passed;
        tally.failed += found.failed;
    }
    Ok(tally.say())
}

fn cmd_compare(repo: &std::path::Path, args: &CompareArgs) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    let choice = Choice::new(&args.which.accel)?;
    let plans = payload::plans(repo, &matrix)?;
    let suites = ["hmm".to_owned()];
    let mut good = true;
    for name in runs::names(&matrix, &args.which)? {
        let tree = runs::open(repo, &matrix, &args.which, &name)?;
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
        short: args.short,
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
    let (name, tree) = runs::open_first(repo, &matrix, which)?;
    let suites = matrix.selected(&Selection::default())?;
    let setup = Setup::new(repo, &matrix, tree, &which.request(&name, &suites))?;
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
        Cmd::Test(args) => return campaign::test(&repo, args),
        Cmd::Bench(args) => return campaign::bench(&repo, args),
        Cmd::Check(args) => return check::command(&repo, args),
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
            for (_, tree) in lanes::build_all(&repo, &matrix, kernels)? {
                tree?;
            }
        }
        Cmd::Path { kernel } => {
            let matrix = Matrix::load(&repo)?;
            let tree = kernel::build(&repo, &matrix, kernel)?;
            report::say(&format!("{}\n", tree.objects.display()));
        }
        Cmd::Kconfig { kdir, objdir } => {
            let matrix = Matrix::load(&repo)?;
            let written = kdir::configure(&matrix, kdir, objdir.as_deref())?;
            report::say(&kdir::advice(&written, kdir, objdir.as_deref()));
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
