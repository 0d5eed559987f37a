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
        if self.objects != self.source {
            command.arg(format!("O={}", self.objects.display()));
        }
        command
    }
}

/// Fragments by file name, with their text.
pub fn fragments(matrix: &Matrix, kernel: &Kernel) -> Result<Vec<(String, String)>> {
    let read = |path: &PathBuf| {
        let full = matrix.dir.join(path);
        let text =
            fs::read_to_string(&full).with_context(|| format!("reading {}", full.display()))?;
        Ok((full.display().to_string(), text))
    };
    kernel.config.iter().map(read).collect()
}

/// Patches in the order of the series, with their text.
fn patches(matrix: &Matrix, kernel: &Kernel) -> Result<Vec<(PathBuf, String)>> {
    let Some(dir) = kernel.patches.as_ref().map(|d| matrix.dir.join(d)) else {
        return Ok(Vec::new());
    };
    let Ok(series) = fs::read_to_string(dir.join("series")) else {
        return Ok(Vec::new());
    };
    let mut out = Vec::new();
    for line in series.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let path = dir.join(line);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{} is in the series", path.display()))?;
        out.push((path, text));
    }
    Ok(out)
}

/// Versions of everything that makes an object what it is.
fn tool_versions() -> Result<String> {
    let mut out = String::new();
    for tool in ["gcc", "ld", "rustc", "bindgen", "pahole"] {
        let text = job::output(Command::new(tool).arg("--version"), tool)?;
        out.push_str(text.lines().next().unwrap_or_default());
        out.push('\n');
    }
    Ok(out)
}

/// Path of the pristine source.
fn pristine(repo: &Path, version: &str) -> Result<PathBuf> {
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

/// What a patch does, without what it says.
fn diff(patch: &str) -> &str {
    patch.find("\ndiff --git ").map_or(patch, |start| &patch[start..])
}

/// Everything that determines a build.
struct Recipe {
    source: PathBuf,
    patches: Vec<(PathBuf, String)>,
    fragments: Vec<(String, String)>,
    key: String,
}

fn recipe(repo: &Path, matrix: &Matrix, kernel: &Kernel) -> Result<Recipe> {
    let source = pristine(repo, &kernel.source)?;
    let patches = patches(matrix, kernel)?;
    let fragments = fragments(matrix, kernel)?;
    let mut parts = vec!["1 tinyconfig".to_owned(), source.display().to_string(), tool_versions()?];
    // Another word in a message, or another number in the series, is no other kernel.
    parts.extend(patches.iter().map(|(_, text)| diff(text).to_owned()));
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
    let tree =
        Tree { name: name.to_owned(), source: dir.clone(), objects: dir.clone(), ours: true };
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
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    let mut progress = Progress::new("copying the kernel source", 0);
    let mut copy = job::command("cp");
    copy.args(["-a", "--reflink=auto"]).arg(&recipe.source).arg(dir);
    job::Job::spawn(&mut copy, "cp")?.success(|| {
        progress.set(0, "");
        Ok(())
    })?;
    // The pristine tree's own marker says nothing about the copy.
    let _ = fs::remove_file(dir.join(".complete"));
    for (path, _) in &recipe.patches {
        let mut patch = Command::new("patch");
        patch.args(["-p1", "--no-backup-if-mismatch", "--batch", "--fuzz=0", "-d"]);
        patch.arg(dir).arg("-i").arg(path);
        let out = patch.output().context("starting patch")?;
        if !out.status.success() {
            bail!(
                "{} does not apply:\n{}",
                path.display(),
                String::from_utf8_lossy(&out.stdout).trim()
            );
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_make_no_other_kernel() {
        let change = "\ndiff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n";
        let patch = |subject: &str| format!("Subject: {subject}\n\nWhy.\n---\n x | 2 +-\n{change}");
        assert_eq!(diff(&patch("[PATCH 1/2] x: b")), change);
        assert_eq!(diff(&patch("[PATCH 1/3] x: c")), change);
        assert_eq!(diff("no diff"), "no diff");
    }
}
