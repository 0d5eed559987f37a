// SPDX-License-Identifier: GPL-2.0
//! The kernels of the matrix: patched, configured, built once per key, and checked.

pub mod compiler;
pub mod kconfig;
pub mod kdir;
pub mod lanes;
pub mod make;
pub mod results;
pub mod series;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::job;
use crate::kernel::make::{logged, make};
use crate::kernel::series::Patch;
use crate::plan::matrix::{Kernel, Matrix};
use crate::progress::Progress;
use crate::repo;

/// A built kernel.
#[derive(Clone, Debug)]
pub struct Tree {
    /// The name in messages.
    pub name: String,
    /// The source.
    pub source: PathBuf,
    /// The build directory, which is the source itself for a build in place.
    pub objects: PathBuf,
    /// Whether the directory belongs to zdvm, which may write to it.
    pub ours: bool,
    /// Arguments of make beside the targets: another architecture, other compilers.
    pub args: Vec<String>,
}

impl Tree {
    /// The bootable image.
    pub fn image(&self) -> PathBuf {
        self.objects.join("arch/x86/boot/bzImage")
    }

    /// The kernel's release, as `uname -r` prints it.
    pub fn release(&self) -> Result<String> {
        let path = self.objects.join("include/config/kernel.release");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().to_owned())
    }

    /// The kernel's configuration.
    pub fn config(&self) -> Result<String> {
        let path = self.objects.join(".config");
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// The tree's own driver, which test_hmm.sh loads.
    pub fn c_driver(&self) -> Result<PathBuf> {
        let file = self.objects.join("lib/test_hmm.ko");
        if !file.is_file() {
            bail!("{}: the kernel was built without CONFIG_TEST_HMM=m", file.display());
        }
        Ok(file)
    }

    /// A make in the source directory that builds in the objects' directory.
    pub fn make(&self) -> Command {
        let mut command = make(&self.source);
        command.args(&self.args);
        if !self.ours {
            // The user's own make runs without these variables, and would rebuild because of them.
            for name in ["KBUILD_BUILD_USER", "KBUILD_BUILD_HOST", "KBUILD_BUILD_TIMESTAMP"] {
                command.env_remove(name);
            }
        }
        if self.objects != self.source {
            command.arg(format!("O={}", self.objects.display()));
        }
        command
    }
}

/// The fragments by file name, with their text.
pub fn fragments(matrix: &Matrix, files: &[PathBuf]) -> Result<Vec<(String, String)>> {
    let read = |path: &PathBuf| {
        let full = matrix.dir.join(path);
        let text =
            fs::read_to_string(&full).with_context(|| format!("reading {}", full.display()))?;
        Ok((full.display().to_string(), text))
    };
    files.iter().map(read).collect()
}

/// The patches in the order of the series.
pub fn patches(matrix: &Matrix, kernel: &Kernel) -> Result<Vec<Patch>> {
    let mut out = Vec::new();
    for dir in &kernel.patches {
        out.extend(series::read(&matrix.dir.join(dir))?);
    }
    Ok(out)
}

/// The versions of all tools that influence an object.
pub fn tool_versions() -> Result<String> {
    versions(&["gcc", "ld", "rustc", "bindgen", "pahole"])
}

fn versions(tools: &[&str]) -> Result<String> {
    let mut out = String::new();
    for tool in tools {
        let text = job::output(Command::new(tool).arg("--version"), tool)?;
        out.push_str(text.lines().next().unwrap_or_default());
        out.push('\n');
    }
    Ok(out)
}

/// The path of the unpatched source.
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

/// The input of a build.
struct Recipe {
    source: PathBuf,
    tools: String,
    patches: Vec<Patch>,
    fragments: Vec<(String, String)>,
    /// Arguments of make for other compilers.
    args: Vec<String>,
}

impl Recipe {
    fn new(repo: &Path, matrix: &Matrix, kernel: &Kernel) -> Result<Self> {
        let mut tools = tool_versions()?;
        if kernel.llvm {
            tools.push_str(&versions(&["clang", "ld.lld"])?);
        }
        Ok(Self {
            source: pristine(repo, &kernel.source)?,
            tools,
            patches: patches(matrix, kernel)?,
            fragments: fragments(matrix, &kernel.config)?,
            args: kernel.llvm.then(|| "LLVM=1".to_owned()).into_iter().collect(),
        })
    }

    /// The key of a build with this many of the patches.
    fn key(&self, count: usize) -> String {
        let head = ["1 tinyconfig".to_owned(), self.source.display().to_string()];
        let mut parts: Vec<&str> = head.iter().map(String::as_str).chain([&*self.tools]).collect();
        // A patch's message and its number in the series do not change the kernel.
        parts.extend(self.patches.iter().take(count).map(Patch::diff));
        parts.push("fragments");
        parts.extend(self.fragments.iter().map(|(_, text)| text.as_str()));
        repo::key(&parts)
    }

    /// The names of the files that the patches change, make or remove.
    fn files(&self) -> BTreeSet<String> {
        self.patches.iter().flat_map(Patch::touched).map(str::to_owned).collect()
    }

    /// The content of the marker [`SOURCE`] of a tree: the key of the tree without patches, and the
    /// files that its patches touch.
    fn marker(&self) -> String {
        let files: Vec<String> = self.files().into_iter().collect();
        format!("{}\n{}\n", self.key(0), files.join("\n"))
    }

    /// Makes a directory with the files that the patches touch, patched.
    fn stage(&self) -> Result<tempfile::TempDir> {
        let stage = tempfile::tempdir().context("making a directory for patched files")?;
        for file in self.files() {
            let from = self.source.join(&file);
            if from.exists() {
                write(&stage.path().join(&file), &fs::read(from)?)?;
            }
        }
        for patch in &self.patches {
            series::apply(stage.path(), &patch.path)?;
        }
        Ok(stage)
    }

    /// The files that must change to make `tree`, a tree of the cache, equal to ours, each with its
    /// new content, or `None` for a file to remove. They are among the files that its patches or
    /// ours touch. Returns `None` if the tree has another source, configuration or tools.
    fn changes(&self, tree: &Path, stage: &Path) -> Option<Vec<(String, Option<Vec<u8>>)>> {
        let marker = fs::read_to_string(tree.join(SOURCE)).ok()?;
        let mut lines = marker.lines();
        if lines.next()? != self.key(0) {
            return None;
        }
        let ours = self.files();
        let theirs = lines.filter(|l| !l.is_empty()).map(str::to_owned);
        let all: BTreeSet<String> = theirs.chain(ours.iter().cloned()).collect();
        let wanted = |file: &str| {
            let from = if ours.contains(file) { stage } else { self.source.as_path() };
            fs::read(from.join(file)).ok()
        };
        let differs = |file: String| {
            let wanted = wanted(&file);
            (fs::read(tree.join(&file)).ok() != wanted).then_some((file, wanted))
        };
        Some(all.into_iter().filter_map(differs).collect())
    }

    /// The complete tree in which the fewest files must change, with these changes. A lock keeps
    /// the tree from being removed while it is copied.
    fn seed(&self, kernels: &Path, stage: &Path) -> Option<Seed> {
        let mut trees: Vec<PathBuf> =
            fs::read_dir(kernels).into_iter().flatten().flatten().map(|e| e.path()).collect();
        trees.sort();
        let mut best: Option<Seed> = None;
        for tree in trees.into_iter().filter(|t| t.join(COMPLETE).is_file()) {
            let Some(changes) = self.changes(&tree, stage) else { continue };
            if best.as_ref().is_some_and(|b| b.changes.len() <= changes.len()) {
                continue;
            }
            let mut lock = tree.as_os_str().to_owned();
            lock.push(".lock");
            // A holder that builds or removes the tree is not waited for, but one that only looks
            // whether it is built is.
            if let Some(lock) = repo::lock_soon(Path::new(&lock)) {
                best = Some(Seed { tree, changes, _lock: lock });
            }
        }
        best
    }
}

/// A built tree that a new one begins as a copy of.
struct Seed {
    tree: PathBuf,
    changes: Vec<(String, Option<Vec<u8>>)>,
    _lock: repo::Lock,
}

/// Writes a file, and makes the directories above it.
fn write(path: &Path, text: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// The marker in a tree that is patched; see [`Recipe::marker`].
const SOURCE: &str = ".zdvm-source";
/// The marker in a tree that is also built.
pub const COMPLETE: &str = ".zdvm-complete";

/// The key of a kernel of the matrix without its last patches.
pub fn key_without(repo: &Path, matrix: &Matrix, name: &str, last: usize) -> Result<String> {
    let recipe = Recipe::new(repo, matrix, matrix.kernel(name)?)?;
    Ok(recipe.key(recipe.patches.len().saturating_sub(last)))
}

/// Returns the kernel of the matrix; builds it if the cache does not have it.
pub fn build(repo: &Path, matrix: &Matrix, name: &str) -> Result<Tree> {
    let recipe = Recipe::new(repo, matrix, matrix.kernel(name)?)?;
    let key = recipe.key(recipe.patches.len());
    let kernels = repo::cache("kernels")?;
    let dir = kernels.join(format!("{name}-{key}"));
    let tree = Tree {
        name: name.to_owned(),
        source: dir.clone(),
        objects: dir.clone(),
        ours: true,
        args: recipe.args.clone(),
    };
    let complete = dir.join(COMPLETE);
    let _lock = repo::lock(&kernels.join(format!("{name}-{key}.lock")))?;
    if !complete.exists() {
        prepare(&recipe, &kernels, &dir)?;
        let log = kernels.join(format!("{name}-{key}.log"));
        let _ = fs::remove_file(&log);
        configure(&tree, &recipe.fragments, &log)?;
        compile(&tree, &log)?;
        fs::write(&complete, tree.release()?)?;
        eprintln!("zdvm: kernel {name} is ready: {}", dir.display());
    }
    // The time of the marker is the last use of the tree; `prune()` removes the oldest ones.
    fs::File::options().write(true).open(&complete)?.set_modified(SystemTime::now())?;
    prune(&kernels, name);
    Ok(tree)
}

/// Makes a patched tree. If the cache has a built tree, the new one is a copy of it in which only
/// the differing files change, so that make compiles only what depends on them; otherwise it is a
/// copy of the source. An unfinished copy has another name and is never used. An unfinished build
/// is resumed, because make can do that.
fn prepare(recipe: &Recipe, kernels: &Path, dir: &Path) -> Result<()> {
    if dir.join(SOURCE).exists() {
        return Ok(());
    }
    let mut new = dir.as_os_str().to_owned();
    new.push(NEW);
    let new = PathBuf::from(new);
    let stage = recipe.stage()?;
    if let Some(seed) = recipe.seed(kernels, stage.path()) {
        let (from, count) = (&seed.tree, seed.changes.len());
        eprintln!("zdvm: beginning with {}, in which {count} files differ", from.display());
        series::copy(from, &new)?;
        // Some commands contain the path of the tree; make would take them for changed commands.
        let place = |path: &Path| path.to_string_lossy().into_owned();
        series::replace_in_records(&new, &place(from), &place(dir))?;
        for marker in [COMPLETE, SOURCE] {
            let marker = new.join(marker);
            fs::remove_file(&marker).with_context(|| format!("removing {}", marker.display()))?;
        }
        for (file, text) in &seed.changes {
            let file = new.join(file);
            match text {
                Some(text) => write(&file, text)?,
                None => fs::remove_file(&file)
                    .with_context(|| format!("removing {}", file.display()))?,
            }
        }
    } else {
        series::copy(&recipe.source, &new)?;
        for patch in &recipe.patches {
            series::apply(&new, &patch.path)?;
        }
    }
    fs::write(new.join(SOURCE), recipe.marker())?;
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    fs::rename(&new, dir).with_context(|| format!("renaming {}", new.display()))
}

/// Makes the configuration: tinyconfig, the fragments over it, olddefconfig. Every line of the
/// fragments must be in the result.
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

/// Builds the image and the modules.
pub fn compile(tree: &Tree, log: &Path) -> Result<()> {
    let mut progress = Progress::new(&format!("building the kernel {}", tree.name), 0);
    let mut command = tree.make();
    command.args(["bzImage", "modules"]);
    logged(&mut command, &format!("building {}", tree.name), log, Some(&mut progress))
}

/// The suffix of the name of a tree that is being made.
const NEW: &str = ".new";

/// Removes all but the newest three trees of a kernel, and unfinished copies, unless their lock is
/// held.
fn prune(kernels: &Path, name: &str) {
    let mut trees: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(kernels).into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let key = file.strip_prefix(name).and_then(|r| r.strip_prefix('-')).unwrap_or_default();
        let key = key.strip_suffix(NEW).unwrap_or(key);
        if key.len() != 12 || !key.bytes().all(|b| b.is_ascii_hexdigit()) {
            continue;
        }
        let used = fs::metadata(entry.path().join(COMPLETE)).and_then(|m| m.modified());
        trees.push((used.unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
    }
    trees.sort();
    trees.reverse();
    let begun = |path: &Path| path.to_string_lossy().ends_with(NEW);
    let (begun, trees): (Vec<_>, Vec<_>) = trees.into_iter().partition(|(_, p)| begun(p));
    for (_, path) in begun.into_iter().chain(trees.into_iter().skip(3)) {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let file = file.strip_suffix(NEW).unwrap_or(&file);
        let lock = path.with_file_name(format!("{file}.lock"));
        if let Some(_held) = repo::try_lock(&lock) {
            eprintln!("zdvm: removing the old tree {}", path.display());
            let _ = fs::remove_dir_all(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    /// A source of one file, and patches that turn its line from 0 to 1 to 2.
    fn recipe(dir: &Path) -> Recipe {
        let source = dir.join("pristine");
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("f"), "0\n").unwrap();
        let patch = |from: &str, to: &str| {
            let diff =
                format!("diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-{from}\n+{to}\n");
            let (path, text) = (dir.join(format!("{to}.patch")), format!("Why.\n\n{diff}"));
            fs::write(&path, &text).unwrap();
            Patch { path, text }
        };
        Recipe {
            source,
            tools: "cc 1\n".to_owned(),
            patches: vec![patch("0", "1"), patch("1", "2")],
            fragments: vec![("base.config".to_owned(), "CONFIG_A=y\n".to_owned())],
            args: vec![],
        }
    }

    /// Makes a tree in the cache, built or not, which differs from others in a file that make made.
    fn tree(kernels: &Path, name: &str, line: &str, marker: &str, complete: bool) -> PathBuf {
        let dir = kernels.join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("f"), format!("{line}\n")).unwrap();
        fs::write(dir.join("f.o"), name).unwrap();
        fs::create_dir_all(dir.join("rust")).unwrap();
        fs::write(dir.join("rust/.f.o.cmd"), format!("OBJTREE={} rustc", dir.display())).unwrap();
        fs::write(dir.join(SOURCE), marker).unwrap();
        if complete {
            fs::write(dir.join(COMPLETE), "7.3.4").unwrap();
        }
        dir
    }

    fn read(file: PathBuf) -> String {
        fs::read_to_string(file).unwrap()
    }

    #[test]
    fn a_build_begins_with_the_tree_that_differs_least() {
        let temp = tempfile::tempdir().unwrap();
        let (recipe, kernels) = (recipe(temp.path()), temp.path().join("kernels"));
        let dir = kernels.join(format!("own-{}", recipe.key(2)));
        fs::create_dir_all(&kernels).unwrap();
        let stage = recipe.stage().unwrap();
        assert_eq!(read(stage.path().join("f")), "2\n");
        let seed = |kernels: &Path| recipe.seed(kernels, stage.path());
        assert!(seed(&kernels).is_none());
        let none = format!("{}\n\n", recipe.key(0));
        let stock = tree(&kernels, "stock-a", "0", &none, true);
        // One tree has a file of another patch, and one has the content that our patches would
        // make.
        let more = format!("{}\nf\ng\n", recipe.key(0));
        let one = tree(&kernels, "one-a", "1", &more, true);
        fs::write(one.join("g"), "theirs").unwrap();
        tree(&kernels, "two-a", "2", &recipe.marker(), false);
        tree(&kernels, "other-a", "2", &more.replacen(|_: char| true, "-", 1), true);
        let first = seed(&kernels).unwrap();
        assert_eq!(
            (&first.tree, first.changes.len()),
            (&stock, 1),
            "what is not complete is no seed"
        );
        let other = seed(&kernels).unwrap();
        assert_eq!((&other.tree, other.changes.len()), (&one, 2), "nor is what somebody holds");
        assert_eq!(other.changes[1], ("g".to_owned(), None));
        drop((first, other));
        fs::remove_dir_all(stock).unwrap();
        prepare(&recipe, &kernels, &dir).unwrap();
        assert_eq!(read(dir.join("f")), "2\n");
        assert!(!dir.join("g").exists());
        assert_eq!(read(dir.join("f.o")), "one-a");
        assert_eq!(read(dir.join("rust/.f.o.cmd")), format!("OBJTREE={} rustc", dir.display()));
        assert_eq!(read(dir.join(SOURCE)), recipe.marker());
        assert!(!dir.join(COMPLETE).exists());
        let times = |d: &Path| fs::metadata(d.join("f.o")).unwrap().modified().unwrap();
        assert_eq!(times(&dir), times(&one), "make goes by the times");
        assert_eq!(read(one.join("f")), "1\n");
    }

    #[test]
    fn what_was_interrupted_is_begun_anew() {
        let temp = tempfile::tempdir().unwrap();
        let (recipe, kernels) = (recipe(temp.path()), temp.path().join("kernels"));
        let name = format!("own-{}", recipe.key(2));
        tree(&kernels, "stock-a", "0", &format!("{}\n", recipe.key(0)), true);
        // An interrupted copy has the markers of its seed, and perhaps half of a patch.
        tree(&kernels, &format!("{name}{NEW}"), "half", "", true);
        prepare(&recipe, &kernels, &kernels.join(&name)).unwrap();
        assert_eq!(read(kernels.join(&name).join("f")), "2\n");
        assert!(!kernels.join(format!("{name}{NEW}")).exists());
        assert!(!kernels.join(&name).join(COMPLETE).exists());
        // The same holds without a seed.
        let name = format!("own-{}", recipe.key(1));
        tree(&kernels, &name, "half", "", false);
        fs::remove_file(kernels.join(&name).join(SOURCE)).unwrap();
        let first =
            Recipe { patches: recipe.patches[..1].to_vec(), tools: "cc 2".into(), ..recipe };
        let stage = first.stage().unwrap();
        assert!(first.seed(&kernels, stage.path()).is_none(), "other tools, other trees");
        prepare(&first, &kernels, &kernels.join(&name)).unwrap();
        assert_eq!(read(kernels.join(&name).join("f")), "1\n");
        // A build that was interrupted is resumed.
        fs::write(kernels.join(&name).join("f"), "mine\n").unwrap();
        prepare(&first, &kernels, &kernels.join(&name)).unwrap();
        assert_eq!(read(kernels.join(&name).join("f")), "mine\n");
    }

    #[test]
    fn old_trees_and_what_was_begun_go() {
        let temp = tempfile::tempdir().unwrap();
        let kernels = temp.path();
        let names: Vec<String> = (0..5).map(|n| format!("own-{n:012x}")).collect();
        for (age, name) in (0..).zip(&names) {
            let marker = tree(kernels, name, "0", "", true).join(COMPLETE);
            let used = SystemTime::now() - std::time::Duration::from_secs(60 * age);
            fs::File::options().write(true).open(marker).unwrap().set_modified(used).unwrap();
        }
        for name in [format!("{}{NEW}", names[0]), format!("other-{}", "0".repeat(12))] {
            tree(kernels, &name, "0", "", false);
        }
        let used = repo::try_lock(&kernels.join(format!("{}.lock", names[4]))).unwrap();
        prune(kernels, "own");
        let there = |name: &str| kernels.join(name).is_dir();
        assert_eq!(
            names.iter().map(|n| there(n)).collect::<Vec<_>>(),
            [true, true, true, false, true]
        );
        assert!(!there(&format!("{}{NEW}", names[0])) && there("other-000000000000"));
        drop(used);
    }
}
