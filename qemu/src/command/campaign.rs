// SPDX-License-Identifier: GPL-2.0
//! `zdvm test` and `zdvm bench`: the campaigns of the matrix. A kernel or a run that fails does not
//! stop the others.

use std::path::Path;

use anyhow::{Context, Result};

use crate::command::check;
use crate::command::runs::{self, OwnTree, RunArgs, Which};
use crate::command::select::Select;
use crate::job;
use crate::kernel::lanes;
use crate::plan::campaign::CampaignRun;
use crate::plan::matrix::Matrix;
use crate::report::{self, Tally};

/// The options of `zdvm test`.
#[derive(Debug, clap::Args)]
pub struct TestArgs {
    /// Only the quick tests on the kernels that build soon.
    #[arg(long)]
    short: bool,
    #[command(flatten)]
    own: OwnTree,
}

/// The options of `zdvm bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    own: OwnTree,
}

/// The runs of a campaign that apply: all of them for the kernels of the matrix.
fn applying<'a>(matrix: &'a Matrix, name: &str, own: &OwnTree) -> Result<Vec<&'a CampaignRun>> {
    let runs = matrix.campaign.get(name).with_context(|| format!("no campaign {name:?}"))?;
    Ok(runs.iter().filter(|r| own.kdir.is_none() || !r.matrix_only).collect())
}

/// The command line of `zdvm run` that makes a run.
fn arguments(run: &CampaignRun, own: &OwnTree) -> RunArgs {
    let which =
        Which { accel: run.accel.clone(), machine: run.machine.clone(), ..own.or(&run.kernels) };
    let select = Select {
        suites: run.suites.clone(),
        filter: run.filter.as_ref().map(|f| f.0.as_str().to_owned()),
        full: run.full,
    };
    RunArgs::going_on(which, select)
}

/// Makes the runs, and prints the numbers of each.
fn make_runs(repo: &Path, runs: &[&CampaignRun], own: &OwnTree) -> Result<bool> {
    let mut good = true;
    for run in runs {
        match runs::run_all(repo, &arguments(run, own)) {
            Ok(tally) => good &= tally.say(),
            Err(e) => {
                job::check_signals()?;
                eprintln!("zdvm: {e:#}");
                good = false;
            }
        }
    }
    Ok(good)
}

/// Runs `zdvm test`: builds all kernels, two at a time, then makes the checks that test zdvm itself,
/// then the runs. A kernel that cannot be built is built again by the run that needs it, which says so
/// in its verdict.
pub fn test(repo: &Path, args: &TestArgs) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    let runs = applying(&matrix, if args.short { "short" } else { "full" }, &args.own)?;
    if args.own.kdir.is_none() {
        let mut kernels: Vec<String> = Vec::new();
        for name in runs.iter().flat_map(|r| &r.kernels) {
            if !kernels.contains(name) {
                kernels.push(name.clone());
            }
        }
        lanes::build_all(repo, &matrix, &kernels)?;
    }
    let names = ["host".to_owned(), "boot".to_owned()];
    let Tally { failed, .. } =
        check::all(repo, &names, false, &args.own.or(&["patched".to_owned()]))?;
    let good = make_runs(repo, &runs, &args.own)?;
    if failed > 0 {
        report::say(&format!("zdvm: {failed} of the checks host and boot failed; see above\n"));
    }
    Ok(good && failed == 0)
}

/// Runs `zdvm bench`.
pub fn bench(repo: &Path, args: &BenchArgs) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    let runs = applying(&matrix, "bench", &args.own)?;
    make_runs(repo, &runs, &args.own)
}
