// SPDX-License-Identifier: GPL-2.0
//! Kernels of the matrix: patched, configured, built once per key, and checked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::job;
use crate::kconfig;
use crate::make::{logged, make};
use crate::matrix::{Kernel, Matrix};
use crate::progress::Progress;
use crate::repo;
use crate::series::{self, Patch};

/// A built kernel.
#[derive(Clone, Debug)]
pub struct Tree {
    /// Name in messages.
    pub name: String,
    /// Its source.
    pub source: PathBuf,
    /// Where it was built; the source itself for a build in place.
    pub objects: PathBuf,
    /// Whether it is ours to write to.
    pub ours: bool,
    /// What make is told of another architecture.
    pub arch: Vec<String>,
}

impl Tree {
    /// The bootable image.
    pub fn image(&self) -> PathBuf {
        self.objects.join("arch/x86/boot/bzImage")
    }

    /// `uname -r` of it.
    pub fn release(&self) -> Result<String> {
        let path = self.objects.join("include/config/kernel.release");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().to_owned())
    }

    /// Its configuration.
    pub fn config(&self) -> Result<String> {
        let path = self.objects.join(".config");
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// A make in the source, told where the objects are.
    pub fn make(&self) -> Command {
        let mut command = make(&self.source);
        command.args(&self.arch);
        if self.objects != self.source {
            command.arg(format!("O={}", self.objects.display()));
        }
        command
    }
}

/// Fragments by file name, with their text.
pub fn fragments(matrix: &Matrix, files: &[PathBuf]) -> Result<Vec<(String, String)>> {
    let read = |path: &PathBuf| {
        let full = matrix.dir.join(path);
        let text =
            fs::read_to_string(&full).with_context(|| format!("reading {}", full.display()))?;
        Ok((full.display().to_string(), text))
    };
    files.iter().map(read).collect()
}

/// Patches in the order of the series.
pub fn patches(matrix: &Matrix, kernel: &Kernel) -> Result<Vec<Patch>> {
    kernel.patches.as_ref().map_or(Ok(Vec::new()), |dir| series::read(&matrix.dir.join(dir)))
}

/// Versions of everything that makes an object what it is.
pub fn tool_versions() -> Result<String> {
    let mut out = String::new();
    for tool in ["gcc", "ld", "rustc", "bindgen", "pahole"] {
        let text = job::output(Command::new(tool).arg("--version"), tool)?;
        out.push_str(text.lines().next().unwrap_or_default());
        out.push('\n');
    }
    Ok(out)
}

/// Path of the pristine source.
pub fn pristine(repo: &Path, version: &str) -> Result<PathBuf> {
    let mut command = job::command(repo.join("scripts/kernel-source.sh"));
    command.arg(version).stderr(std::process::Stdio::inherit());
    let out = job::output(&mut command, "scripts/kernel-source.sh")?;
    let path = PathBuf::from(out.trim());
    if !path.join("Makefile").is_file() {
        bail!(
            "scripts/kernel-source.sh {version} gave {}, which is no kernel tree",
            path.display()
        );
    }
    Ok(path)
}

/// Everything that determines a build.
struct Recipe {
    source: PathBuf,
    patches: Vec<Patch>,
    fragments: Vec<(String, String)>,
    key: String,
}

fn recipe(repo: &Path, matrix: &Matrix, kernel: &Kernel) -> Result<Recipe> {
    let source = pristine(repo, &kernel.source)?;
    let patches = patches(matrix, kernel)?;
    let fragments = fragments(matrix, &kernel.config)?;
    let mut parts = vec!["1 tinyconfig".to_owned(), source.display().to_string(), tool_versions()?];
    // Another word in a message, or another number in the series, is no other kernel.
    parts.extend(patches.iter().map(|p| p.diff().to_owned()));
    parts.push("fragments".to_owned());
    parts.extend(fragments.iter().map(|(_, text)| text.clone()));
    let key = repo::key(&parts);
    Ok(Recipe { source, patches, fragments, key })
}

/// The kernel of the matrix, built if it is not there yet.
pub fn build(repo: &Path, matrix: &Matrix, name: &str) -> Result<Tree> {
    let recipe = recipe(repo, matrix, matrix.kernel(name)?)?;
    let kernels = repo::cache("kernels")?;
    let dir = kernels.join(format!("{name}-{}", recipe.key));
    let tree = Tree {
        name: name.to_owned(),
        source: dir.clone(),
        objects: dir.clone(),
        ours: true,
        arch: Vec::new(),
    };
    let complete = dir.join(".zdvm-complete");
    let _lock = repo::lock(&kernels.join(format!("{name}-{}.lock", recipe.key)))?;
    if !complete.exists() {
        prepare(&recipe, &dir)?;
        let log = kernels.join(format!("{name}-{}.log", recipe.key));
        let _ = fs::remove_file(&log);
        configure(&tree, &recipe.fragments, &log)?;
        compile(&tree, &log)?;
        fs::write(&complete, tree.release()?)?;
        eprintln!("zdvm: kernel {name} is ready: {}", dir.display());
    }
    // The time of the marker is when the tree was last used: the oldest go first.
    fs::File::options().write(true).open(&complete)?.set_modified(SystemTime::now())?;
    prune(&kernels, name);
    Ok(tree)
}

/// A patched copy of the source. A copy that was begun and not finished is not trusted; a build
/// in it that was not finished is resumed, which make can do.
fn prepare(recipe: &Recipe, dir: &Path) -> Result<()> {
    let copied = dir.join(".zdvm-source");
    if copied.exists() {
        return Ok(());
    }
    series::copy(&recipe.source, dir)?;
    for patch in &recipe.patches {
        series::apply(dir, &patch.path)?;
    }
    fs::write(copied, "")?;
    Ok(())
}

/// tinyconfig, the fragments over it, olddefconfig; then every line must have landed.
pub fn configure(tree: &Tree, fragments: &[(String, String)], log: &Path) -> Result<()> {
    let title = format!("configuring {}", tree.name);
    logged(tree.make().arg("tinyconfig"), &title, log, None)?;
    let mut merge = job::command(tree.source.join("scripts/kconfig/merge_config.sh"));
    merge.current_dir(&tree.objects).args(["-m", "-O"]).arg(&tree.objects);
    merge.arg(tree.objects.join(".config")).args(fragments.iter().map(|(file, _)| file));
    logged(&mut merge, &title, log, None)?;
    logged(tree.make().arg("olddefconfig"), &title, log, None)?;
    let missing = kconfig::missing(fragments, &tree.config()?);
    if !missing.is_empty() {
        bail!("configuration of {}:\n  {}", tree.name, missing.join("\n  "));
    }
    Ok(())
}

/// Builds image and modules.
pub fn compile(tree: &Tree, log: &Path) -> Result<()> {
    let mut progress = Progress::new(&format!("building the kernel {}", tree.name), 0);
    let mut command = tree.make();
    command.args(["bzImage", "modules"]);
    logged(&mut command, &format!("building {}", tree.name), log, Some(&mut progress))
}

/// Removes all but the newest three trees of a kernel, if nobody uses them.
fn prune(kernels: &Path, name: &str) {
    let mut trees: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(kernels).into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let key = file.strip_prefix(name).and_then(|r| r.strip_prefix('-')).unwrap_or_default();
        if key.len() != 12 || !key.bytes().all(|b| b.is_ascii_hexdigit()) {
            continue;
        }
        let used = fs::metadata(entry.path().join(".zdvm-complete")).and_then(|m| m.modified());
        trees.push((used.unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
    }
    trees.sort();
    trees.reverse();
    for (_, path) in trees.into_iter().skip(3) {
        let lock = path.with_file_name(format!(
            "{}.lock",
            path.file_name().unwrap_or_default().to_string_lossy()
        ));
        if let Some(_held) = repo::try_lock(&lock) {
            eprintln!("zdvm: removing the old tree {}", path.display());
            let _ = fs::remove_dir_all(&path);
        }
    }
}
