// SPDX-License-Identifier: GPL-2.0
//! `zdvm patch-check`: checks a series patch by patch. Each patch must apply, must leave every file
//! that it touches compilable in every configuration of the matrix, and must be clean for
//! checkpatch.pl.
//!
//! Results are stored until the patch, the configuration or the tools change. The check can
//! therefore be interrupted at any time, and costs next to nothing when nothing has changed.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::job;
use crate::kernel::make::logged;
use crate::kernel::series::{Patch, Stack};
use crate::kernel::{self, Tree};
use crate::plan::matrix::{CompileSpec, Matrix};
use crate::progress::Progress;
use crate::repo;
use crate::report::{self, Tally};

/// The options of checkpatch.pl. Commit ids can only be checked in a git tree with the full
/// history, so they are ignored.
const CHECKPATCH: [&str; 6] =
    ["--strict", "--quiet", "--no-tree", "--ignore", "UNKNOWN_COMMIT_ID", "-"];

/// The result of a check as text of the report. A good result may have more lines below the first
/// for later use.
type Finding = std::result::Result<String, String>;

/// One configuration, ready to compile in.
struct Config<'a> {
    name: &'a str,
    spec: &'a CompileSpec,
    fragments: Vec<(String, String)>,
    /// The key of everything but the source.
    key: String,
}

/// The data that all checks of one series share.
struct Check<'a> {
    stack: Stack,
    dir: PathBuf,
    source: PathBuf,
    configs: Vec<Config<'a>>,
    log: PathBuf,
}

/// Whether kbuild's record of an object says that the object is made from this file.
fn made_from(record: &str, file: &str) -> bool {
    let is = |word: &str| word.strip_suffix(file).is_some_and(|p| p.is_empty() || p.ends_with('/'));
    record.split_whitespace().any(is)
}

/// Whether each file that a patch touches is part of an object of some configuration.
fn covered(patch: &Patch, objects: &[Finding]) -> Finding {
    let seen =
        |file: &str| objects.iter().flatten().any(|said| said.lines().skip(1).any(|l| l == file));
    let files = compiled(patch);
    let bare: Vec<&str> = files.iter().copied().filter(|f| !seen(f)).collect();
    if bare.is_empty() {
        Ok(format!("{} of {} files compiled", files.len(), patch.files().len()))
    } else {
        Err(format!("no object of [compile] is made from {}", bare.join(", ")))
    }
}

/// Files of a patch that must be part of some object.
fn compiled(patch: &Patch) -> Vec<&str> {
    let code = |f: &&str| {
        let ext = Path::new(f).extension().and_then(|e| e.to_str());
        let elsewhere = ["Documentation/", "tools/"].iter().any(|dir| f.starts_with(dir));
        matches!(ext, Some("c" | "h" | "S")) && !elsewhere
    };
    patch.files().into_iter().filter(code).collect()
}

fn modified(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|m| m.modified()).ok()
}

impl Check<'_> {
    fn tree(&self, config: &Config<'_>) -> Tree {
        let mut args = Vec::new();
        args.extend(config.spec.arch.as_ref().map(|a| format!("ARCH={a}")));
        args.extend(config.spec.cross.as_ref().map(|c| format!("CROSS_COMPILE={c}-")));
        Tree {
            name: config.name.to_owned(),
            source: self.stack.tree.clone(),
            objects: self.dir.join(config.name),
            ours: true,
            args,
        }
    }

    /// Returns the stored result of a key, or calls `find` and stores its result.
    fn once(&self, parts: &[&str], find: impl FnOnce() -> Result<Finding>) -> Result<Finding> {
        let known = self.dir.join("found").join(repo::key(parts));
        if let Ok(said) = fs::read_to_string(&known) {
            return Ok(Ok(said));
        }
        let finding = find()?;
        // A bad result is not stored, so that it is determined again.
        if let Ok(said) = &finding {
            fs::write(&known, said)?;
        }
        Ok(finding)
    }

    /// Configures a build directory, unless it is configured with these very fragments.
    fn configure(&self, tree: &Tree, config: &Config<'_>) -> Result<()> {
        let configured = tree.objects.join(".zdvm-configured");
        if fs::read_to_string(&configured).is_ok_and(|key| key == config.key) {
            return Ok(());
        }
        if tree.objects.exists() {
            fs::remove_dir_all(&tree.objects)?;
        }
        fs::create_dir_all(&tree.objects)?;
        kernel::configure(tree, &config.fragments, &self.log)?;
        fs::write(configured, &config.key)?;
        Ok(())
    }

    /// Compiles the objects of a configuration. The result says how many objects were made, and
    /// which files of the patch they are made from.
    fn objects(&self, config: &Config<'_>, patch: &Patch) -> Result<Finding> {
        let tree = self.tree(config);
        self.configure(&tree, config)?;
        let files: Vec<PathBuf> =
            config.spec.objects.iter().map(|o| tree.objects.join(o)).collect();
        let before: Vec<_> = files.iter().map(|f| modified(f)).collect();
        let mut make = tree.make();
        make.args(&config.spec.objects);
        let title = format!("compiling {} with {}", config.name, patch.name());
        let mut progress = Progress::new(&title, 0);
        if let Err(e) = logged(&mut make, &title, &self.log, Some(&mut progress)) {
            if e.downcast_ref::<job::Interrupted>().is_some() {
                return Err(e);
            }
            return Ok(Err(format!("{e:#}")));
        }
        let after: Vec<_> = files.iter().map(|f| modified(f)).collect();
        if let Some(at) = after.iter().position(Option::is_none) {
            return Ok(Err(format!("make is content, but there is no {}", files[at].display())));
        }
        let made = before.iter().zip(&after).filter(|(b, a)| b != a).count();
        let mut said = format!("{made} of {} objects", files.len());
        let mut records = Vec::new();
        for object in &config.spec.objects {
            let (dir, name) = object.rsplit_once('/').unwrap_or((".", object));
            let record = tree.objects.join(dir).join(format!(".{name}.cmd"));
            let text = fs::read_to_string(&record);
            records.push(text.with_context(|| format!("reading {}", record.display()))?);
        }
        for file in compiled(patch).iter().filter(|f| records.iter().any(|r| made_from(r, f))) {
            let _ = write!(said, "\n{file}");
        }
        Ok(Ok(said))
    }

    fn checkpatch(&self, patch: &Patch) -> Result<Finding> {
        let out = Command::new("perl")
            .arg(self.source.join("scripts/checkpatch.pl"))
            .args(CHECKPATCH)
            .stdin(Stdio::from(File::open(&patch.path)?))
            .output()
            .context("starting checkpatch.pl")?;
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(match said.trim() {
            "" if out.status.success() => Ok("checkpatch clean".to_owned()),
            said => Err(format!("checkpatch ({}):\n{said}", out.status)),
        })
    }

    /// All results about the last of these patches; `None` if it does not apply.
    fn patch(&self, patches: &[Patch]) -> Result<Option<Vec<Finding>>> {
        let Some(last) = patches.last() else { return Ok(None) };
        let diffs: Vec<&str> = patches.iter().map(Patch::diff).collect();
        let source = self.source.display().to_string();
        let key = |what| [&[what, source.as_str()][..], &diffs].concat();
        let mut found = Vec::new();
        let applies = self.once(&key("applies"), || {
            Ok(match self.stack.go_to(patches)? {
                None => Ok("applies".to_owned()),
                Some((number, said)) => {
                    Err(format!("{} does not apply:\n{said}", patches[number].name()))
                }
            })
        })?;
        let lost = applies.is_err();
        found.push(applies);
        if lost {
            return Ok(Some(found));
        }
        for config in &self.configs {
            let key = [&key("objects")[..], &[config.key.as_str()]].concat();
            let finding = self.once(&key, || {
                if let Some((_, said)) = self.stack.go_to(patches)? {
                    bail!("{} applied before and does not now:\n{said}", last.name());
                }
                self.objects(config, last)
            })?;
            let named = |said: String| format!("{} {said}", config.name);
            found.push(finding.map(named).map_err(named));
        }
        if found.iter().all(Finding::is_ok) {
            found.push(covered(last, &found));
        }
        let key = ["checkpatch", source.as_str(), last.text.as_str()];
        found.push(self.once(&key, || self.checkpatch(last))?);
        Ok(Some(found))
    }
}

/// One line of the report, with the bad results below it.
fn line(name: &str, found: &[Finding]) -> String {
    let words = found.iter().map(|f| match f {
        Ok(said) => said.lines().next().unwrap_or_default().to_owned(),
        Err(said) => format!("FAILED {}", said.lines().next().unwrap_or_default()),
    });
    let mut out = format!("{name}: {}\n", words.collect::<Vec<_>>().join("; "));
    for said in found.iter().filter_map(|f| f.as_ref().err()) {
        for line in said.lines().skip(1) {
            let _ = writeln!(out, "    {line}");
        }
    }
    out
}

/// Checks the series of a kernel of the matrix and prints the results.
pub fn check(repo: &Path, matrix: &Matrix, name: &str) -> Result<Tally> {
    let kernel = matrix.kernel(name)?;
    let patches = kernel::patches(matrix, kernel)?;
    if patches.is_empty() {
        bail!("kernel {name} has no patches");
    }
    let source = kernel::pristine(repo, &kernel.source)?;
    let tools = kernel::tool_versions()?;
    let mut configs = Vec::new();
    for (name, spec) in &matrix.compile {
        let fragments = kernel::fragments(matrix, &spec.config)?;
        let gcc = format!("{}gcc", spec.cross.as_ref().map_or(String::new(), |c| format!("{c}-")));
        let version =
            job::output(Command::new(&gcc).arg("--version"), &gcc).with_context(|| {
                let cross = spec.cross.as_deref().unwrap_or_default();
                format!("[compile.{name}] wants {gcc}: scripts/toolchain.sh cross {cross}")
            })?;
        let mut parts = vec![tools.clone(), version, format!("{:?}", spec.arch)];
        parts.extend(fragments.iter().map(|(_, text)| text.clone()));
        parts.extend(spec.objects.iter().cloned());
        configs.push(Config { name, spec, fragments, key: repo::key(&parts) });
    }
    let base = repo::cache("patch-check")?;
    let key = format!("{}-{}", kernel.source, repo::key([source.display().to_string()]));
    let dir = base.join(&key);
    let _lock = repo::lock(&base.join(format!("{key}.lock")))?;
    let (stack, fresh) = Stack::open(&dir, &source)?;
    if fresh {
        for config in &configs {
            let _ = fs::remove_dir_all(dir.join(config.name));
        }
    }
    fs::create_dir_all(dir.join("found"))?;
    let log = dir.join("log");
    let _ = fs::remove_file(&log);
    let check = Check { stack, dir, source, configs, log };
    run(&check, name, &patches)
}

fn run(check: &Check<'_>, kernel: &str, patches: &[Patch]) -> Result<Tally> {
    let mut tally = Tally::default();
    for count in 1..=patches.len() {
        job::check_signals()?;
        let Some(found) = check.patch(&patches[..count])? else { break };
        tally.passed += found.iter().filter(|f| f.is_ok()).count();
        tally.failed += found.iter().filter(|f| f.is_err()).count();
        report::say(&line(&format!("{kernel} {}", patches[count - 1].name()), &found));
        if found.first().is_some_and(Result::is_err) {
            let rest = patches.len() - count;
            tally.failed += rest;
            report::say(&format!("{kernel}: {rest} patches after it were not looked at\n"));
            break;
        }
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    fn patch(files: &[&str]) -> Patch {
        let one =
            |f: &&str| format!("\ndiff --git a/{f} b/{f}\n--- a/{f}\n+++ b/{f}\n@@ -1 +1 @@\n");
        Patch { path: PathBuf::from("x.patch"), text: files.iter().map(one).collect() }
    }

    #[test]
    fn kbuild_says_what_an_object_is_made_from() {
        let record = "savedcmd_mm/hmm.o := gcc -c -o mm/hmm.o /src/mm/hmm.c\n\
                      source_mm/hmm.o := /src/mm/hmm.c\n\
                      deps_mm/hmm.o := \\\n    $(wildcard include/config/X) \\\n  /src/include/linux/memremap.h \\\n";
        for (file, yes) in [
            ("mm/hmm.c", true),
            ("include/linux/memremap.h", true),
            ("linux/memremap.h", true),
            ("memremap.c", false),
            ("mremap.h", false),
            ("mm/memremap.h", false),
        ] {
            assert_eq!(made_from(record, file), yes, "{file}");
        }
    }

    #[test]
    fn every_file_of_code_must_be_compiled() {
        let objects = [
            Ok("a 1 of 2 objects\nmm/a.c".to_owned()),
            Ok("b 0 of 1 objects\ninclude/b.h".to_owned()),
        ];
        let good =
            patch(&["mm/a.c", "include/b.h", "Documentation/mm/c.rst", "mm/Kconfig", "tools/d.c"]);
        assert_eq!(covered(&good, &objects), Ok("2 of 5 files compiled".to_owned()));
        let bare = covered(&patch(&["mm/a.c", "mm/c.c", "include/d.h"]), &objects).unwrap_err();
        assert!(bare.ends_with("from mm/c.c, include/d.h"), "{bare}");
        let failed = [Err("a does not compile\nmm/a.c".to_owned())];
        assert!(covered(&patch(&["mm/a.c"]), &failed).is_err());
    }

    #[test]
    fn what_fails_is_told_in_full() {
        let found = [
            Ok("applies".to_owned()),
            Err("x86 make failed:\nmm/a.c:1: error".to_owned()),
            Ok("b 1 of 1 objects\nmm/a.c".to_owned()),
        ];
        let text = "p: applies; FAILED x86 make failed:; b 1 of 1 objects\n    mm/a.c:1: error\n";
        assert_eq!(line("p", &found), text);
    }
}
