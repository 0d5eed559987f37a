// SPDX-License-Identifier: GPL-2.0
//! `zdvm in-tree`: writes the abstractions of the module as a series of patches over the kernel, split
//! as it would be sent, and shows that the kernel builds with the series and runs its examples at boot.

pub mod series;
pub mod text;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::job::{self, Job};
use crate::judge::ktap::{self, Outcome};
use crate::kernel::make::logged;
use crate::kernel::{self, Tree, kconfig};
use crate::plan::matrix::Matrix;
use crate::progress::Progress;
use crate::repo;
use crate::report;

/// The longest time for the boot with all examples, in seconds.
const BOOT_SECONDS: u64 = 900;

/// The options of checkpatch.pl. The first patch adds the maintainer of the files of the others.
const CHECKPATCH: [&str; 6] =
    ["--strict", "--quiet", "--no-tree", "--ignore", "FILE_PATH_CHANGES", "-"];

/// Options of the kernel besides those of the fragments of the matrix.
const CONFIG: &str = "CONFIG_RUST_KERNEL_DOCTESTS=y\nCONFIG_SAMPLES=y\nCONFIG_SAMPLES_RUST=y\n\
                      CONFIG_SAMPLE_RUST_DMEM=y\n";

/// Options of `zdvm in-tree`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also build a kernel with the series, and its examples.
    #[arg(long)]
    pub build: bool,
    /// Also boot that kernel, which runs every example.
    #[arg(long)]
    pub boot: bool,
    /// The kernel of qemu/kernel/matrix.toml that the build begins with.
    #[arg(long, value_name = "NAME", default_value = "stock")]
    pub kernel: String,
    /// The directory for the patches.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Runs checkpatch.pl on a patch; returns what it finds.
fn checkpatch(source: &Path, patch: &Path) -> Result<String> {
    let out = Command::new("perl")
        .arg(source.join("scripts/checkpatch.pl"))
        .args(CHECKPATCH)
        .stdin(Stdio::from(fs::File::open(patch)?))
        .output()
        .context("starting checkpatch.pl")?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(said + &String::from_utf8_lossy(&out.stderr))
}

/// Writes the patches, checks them, and builds and boots as the options ask. Returns whether every
/// step passed.
pub fn command(repo: &Path, args: &Args) -> Result<bool> {
    let matrix = Matrix::load(repo)?;
    let source = kernel::pristine(repo, &matrix.kernel(&args.kernel)?.source)?;
    let dir = args.out.clone().unwrap_or_else(|| repo.join("build/in-tree"));
    let files = series::write(repo, &source, &dir)?;
    let mut good = true;
    for name in &files.patches {
        let said = checkpatch(&source, &dir.join(name))?;
        good &= said.trim().is_empty();
        let state = if said.trim().is_empty() { "checkpatch clean" } else { "FAILED checkpatch" };
        report::say(&format!("{name}: applies; {state}\n{said}"));
    }
    report::say(&format!("zdvm: {} patches are in {}\n", files.patches.len(), dir.display()));
    if args.build || args.boot {
        let tree = build(repo, &matrix, &args.kernel, &files)?;
        report::say(&format!("zdvm: built {}\n", tree.image().display()));
        if args.boot {
            good &= boot(&tree, &dir)?;
        }
    }
    Ok(good)
}

/// Builds the kernel, in a copy of a tree of the matrix, so that make builds only the changed
/// files.
fn build(repo: &Path, matrix: &Matrix, name: &str, files: &series::Files) -> Result<Tree> {
    let seed = kernel::build(repo, matrix, name)?;
    let base = repo::cache("in-tree")?;
    let key = seed.source.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let dir = base.join(&key);
    let _lock = repo::lock(&base.join(format!("{key}.lock")))?;
    if !dir.join(".config").exists() {
        let new = base.join(format!("{key}.new"));
        kernel::series::copy(&seed.source, &new)?;
        let place = |path: &Path| path.to_string_lossy().into_owned();
        kernel::series::replace_in_records(&new, &place(&seed.source), &place(&dir))?;
        fs::rename(&new, &dir)?;
    }
    for (file, text) in &files.files {
        let path = dir.join(file);
        // An unchanged file keeps its time, so that make does not build it again.
        if fs::read_to_string(&path).ok().as_ref() != Some(text) {
            if let Some(above) = path.parent() {
                fs::create_dir_all(above)?;
            }
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    let config = dir.join(".config");
    let text = fs::read_to_string(&config)?;
    let tree = Tree {
        name: format!("{name} with the series"),
        source: dir.clone(),
        objects: dir,
        ours: true,
        args: seed.args,
    };
    let log = base.join(format!("{key}.log"));
    let _ = fs::remove_file(&log);
    if !CONFIG.lines().all(|line| text.lines().any(|l| l == line)) {
        // A second line for an option is a warning.
        let ours = kconfig::parse(CONFIG);
        let is_ours = |line: &&str| kconfig::parse(line).keys().any(|s| ours.contains_key(s));
        let others = text.lines().filter(|line| !is_ours(line));
        let others: String = others.flat_map(|line| [line, "\n"]).collect();
        fs::write(&config, others + CONFIG)?;
        logged(tree.make().arg("olddefconfig"), "configuring", &log, None)?;
        let text = fs::read_to_string(&config)?;
        if let Some(line) = CONFIG.lines().find(|line| !text.lines().any(|l| l == *line)) {
            bail!("{line} did not land in {}", config.display());
        }
    }
    let mut progress = Progress::new("building the kernel with the series", 0);
    logged(tree.make().arg("bzImage"), "building", &log, Some(&mut progress))?;
    let warnings = fs::read_to_string(&log)?.matches("warning").count();
    if warnings > 0 {
        bail!("the build has {warnings} warnings: {}", log.display());
    }
    Ok(tree)
}

/// Boots the kernel, which runs its KUnit cases and then panics because it has no root file system,
/// and judges the suites of the examples and of the new files.
fn boot(tree: &Tree, dir: &Path) -> Result<bool> {
    let console = dir.join("console.log");
    let mut command = job::command("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-cpu", "max", "-m", "2G"])
        .args(["-smp", "2", "-serial"])
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(tree.image())
        .args(["-append", "console=ttyS0 panic=-1 kunit.filter_glob=rust_*"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut job = Job::spawn(&mut command, "qemu-system-x86_64")?;
    let start = Instant::now();
    job.wait(|| {
        if start.elapsed() > Duration::from_secs(BOOT_SECONDS) {
            bail!("the kernel is not through with its examples after {BOOT_SECONDS} s");
        }
        Ok(())
    })?;
    let text = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
    let (lines, splats) = judged(&text);
    let report = ktap::parse(lines.iter().map(String::as_str));
    let count = |wanted: Outcome| report.cases.iter().filter(|c| c.outcome == wanted).count();
    for case in report.cases.iter().filter(|case| case.outcome == Outcome::Fail) {
        report::say(&format!("Fail: {}: {}\n", case.name, case.reason));
    }
    for line in splats.iter().chain(&report.errors) {
        report::say(&format!("Fail: {line}\n"));
    }
    let is_ours = |name: &str| name.contains("rust_doctest_kernel_mm_");
    let examples = report.cases.iter().filter(|case| is_ours(&case.name)).count();
    report::say(&format!(
        "zdvm: {} KUnit cases at boot passed, {} failed, {} skipped; {examples} of them are examples \
         of the series; the console is in {}\n",
        count(Outcome::Pass),
        count(Outcome::Fail),
        count(Outcome::Skip),
        console.display()
    ));
    Ok(count(Outcome::Fail) == 0 && examples > 0 && splats.is_empty() && report.errors.is_empty())
}

/// The lines of the KTAP document of a boot, and lines that must not be there.
fn judged(console: &str) -> (Vec<String>, Vec<String>) {
    let mut lines = Vec::new();
    let mut splats = Vec::new();
    let mut inside = false;
    for line in console.lines().map(str::trim_end) {
        let text =
            line.split_once("] ").filter(|(time, _)| time.starts_with('[')).map_or(line, |l| l.1);
        if text == "KTAP version 1" && !inside {
            inside = true;
        }
        if text.contains("Kernel panic") {
            break;
        }
        if ["BUG:", "WARNING:", "Oops"].iter().any(|word| text.contains(word)) {
            splats.push(text.to_owned());
        }
        if inside {
            lines.push(text.to_owned());
        }
    }
    (lines, splats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_of_a_boot() {
        let console = "[    0.1] Linux version 7.3\n[    1.0] KTAP version 1\n[    1.0] 1..1\n\
                       [    1.1]     KTAP version 1\n[    1.1]     # Subtest: a\n[    1.1]     1..1\n\
                       [    1.2]     ok 1 b\n[    1.2] ok 1 a\n[    1.3] Kernel panic - not syncing\n\
                       [    1.4] BUG: after the end\n";
        let (lines, splats) = judged(console);
        assert!(splats.is_empty());
        let report = ktap::parse(lines.iter().map(String::as_str));
        assert_eq!(report.cases.len(), 1);
        assert_eq!(report.cases[0].name, "a.b");
        assert_eq!(judged("[ 1.0] WARNING: at x\n").1, ["WARNING: at x"]);
    }
}
