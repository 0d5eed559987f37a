// SPDX-License-Identifier: GPL-2.0
//! A series of patches, and a source tree in which any number of its first patches are applied.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

use crate::job;
use crate::progress::Progress;

/// One patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Its file.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

impl Patch {
    /// The name of its file.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The diff without the message.
    pub fn diff(&self) -> &str {
        diff(&self.text)
    }

    /// The files that it changes, makes or removes.
    pub fn touched(&self) -> Vec<&str> {
        let names = |l| ["--- a/", "+++ b/"].iter().find_map(|p| str::strip_prefix(l, p));
        self.diff().lines().filter_map(names).map(str::trim_end).collect()
    }

    /// The files that it changes or makes.
    pub fn files(&self) -> Vec<&str> {
        self.diff().lines().filter_map(|l| l.strip_prefix("+++ b/")).map(str::trim_end).collect()
    }
}

fn diff(patch: &str) -> &str {
    patch.find("\ndiff --git ").map_or(patch, |start| &patch[start..])
}

/// Reads the patches of a directory in the order of its `series`.
pub fn read(dir: &Path) -> Result<Vec<Patch>> {
    let list = dir.join("series");
    let series =
        fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let mut out = Vec::new();
    for line in series.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let path = dir.join(line);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{} is in the series", path.display()))?;
        out.push(Patch { path, text });
    }
    Ok(out)
}

/// Copies a source tree, with the times of its files.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("removing {}", to.display()))?;
    }
    let mut progress = Progress::new("copying the kernel source", 0);
    let mut copy = job::command("cp");
    copy.args(["-a", "--reflink=auto"]).arg(from).arg(to);
    job::Job::spawn(&mut copy, "cp")?.success(|| {
        progress.set(0, "");
        Ok(())
    })?;
    // The marker of the unpatched tree does not hold for the copy.
    let _ = fs::remove_file(to.join(".complete"));
    Ok(())
}

/// Replaces a path in all of kbuild's records of commands, `.NAME.cmd`, in a tree.
pub fn replace_in_records(tree: &Path, old: &str, new: &str) -> Result<()> {
    let mut left = vec![tree.to_owned()];
    while let Some(dir) = left.pop() {
        let entries = fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if entry.file_type()?.is_dir() {
                left.push(entry.path());
            } else if name.starts_with('.') && name.ends_with(".cmd") {
                let text = fs::read_to_string(entry.path())?;
                if text.contains(old) {
                    fs::write(entry.path(), text.replace(old, new))?;
                }
            }
        }
    }
    Ok(())
}

/// Runs patch(1) on a tree without fuzz: every hunk must have its exact context.
fn patch(tree: &Path, file: &Path, options: &[&str]) -> Result<Output> {
    let mut patch = Command::new("patch");
    patch.args(["-p1", "--no-backup-if-mismatch", "--batch", "--fuzz=0"]).args(options);
    patch.arg("-d").arg(tree).arg("-i").arg(file).output().context("starting patch")
}

/// Applies a patch.
pub fn apply(tree: &Path, file: &Path) -> Result<()> {
    let out = patch(tree, file, &[])?;
    if !out.status.success() {
        bail!(
            "{} does not apply:\n{}",
            file.display(),
            String::from_utf8_lossy(&out.stdout).trim()
        );
    }
    Ok(())
}

/// A copy of a source tree in which patches are applied and reverted one by one. The copy outlives
/// the process; an interruption costs at most a new copy.
#[derive(Debug)]
pub struct Stack {
    /// The tree.
    pub tree: PathBuf,
    /// Copies of the applied patches, by number.
    applied: PathBuf,
    /// This file exists while tree and copies may differ.
    busy: PathBuf,
}

impl Stack {
    /// Opens the stack in a directory. The second value says whether the tree was copied anew,
    /// which invalidates all objects that were built from it.
    pub fn open(dir: &Path, pristine: &Path) -> Result<(Self, bool)> {
        let stack = Self {
            tree: dir.join("source"),
            applied: dir.join("applied"),
            busy: dir.join("applied.busy"),
        };
        let fresh = !stack.applied.is_dir() || stack.busy.exists();
        if fresh {
            fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
            fs::write(&stack.busy, "")?;
            copy(pristine, &stack.tree)?;
            if stack.applied.exists() {
                fs::remove_dir_all(&stack.applied)?;
            }
            fs::create_dir(&stack.applied)?;
            fs::remove_file(&stack.busy)?;
        }
        Ok((stack, fresh))
    }

    fn file(&self, number: usize) -> PathBuf {
        self.applied.join(format!("{number:04}.patch"))
    }

    /// The texts of the applied patches, in order.
    fn texts(&self) -> Result<Vec<String>> {
        let mut out = Vec::new();
        while self.file(out.len()).exists() {
            out.push(fs::read_to_string(self.file(out.len()))?);
        }
        Ok(out)
    }

    /// Applies and reverts patches until exactly these are applied. If one of them does not apply,
    /// returns its number and the output of patch(1); the tree then has the patches before it.
    pub fn go_to(&self, patches: &[Patch]) -> Result<Option<(usize, String)>> {
        let there = self.texts()?;
        let same = there.iter().zip(patches).take_while(|(a, b)| diff(a) == b.diff()).count();
        for number in (same..there.len()).rev() {
            fs::write(&self.busy, "")?;
            let out = patch(&self.tree, &self.file(number), &["--reverse"])?;
            if !out.status.success() {
                bail!("{} cannot be taken back", self.file(number).display());
            }
            fs::remove_file(self.file(number))?;
            fs::remove_file(&self.busy)?;
        }
        for (number, wanted) in patches.iter().enumerate().skip(same) {
            // A patch that fails would leave behind the hunks that succeeded: try first.
            let out = patch(&self.tree, &wanted.path, &["--dry-run"])?;
            if !out.status.success() {
                let said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
                return Ok(Some((number, said)));
            }
            fs::write(&self.busy, "")?;
            apply(&self.tree, &wanted.path)?;
            fs::write(self.file(number), &wanted.text)?;
            fs::remove_file(&self.busy)?;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    fn change(from: &str, to: &str) -> String {
        format!("diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\n-{from}\n+{to}\n c\n")
    }

    /// Makes a directory with a tree of one file, and patches that turn its line from 0 to 1 to 2.
    fn series(dir: &Path) -> Vec<Patch> {
        fs::create_dir_all(dir.join("pristine")).unwrap();
        fs::write(dir.join("pristine/f"), "a\n0\nc\n").unwrap();
        let mut list = String::new();
        for (from, to) in [("0", "1"), ("1", "2")] {
            let name = format!("{to}.patch");
            fs::write(dir.join(&name), format!("Subject: x\n\n{}", change(from, to))).unwrap();
            list += &format!("# comment\n\n{name}\n");
        }
        fs::write(dir.join("series"), list).unwrap();
        read(dir).unwrap()
    }

    fn line(stack: &Stack) -> String {
        let text = fs::read_to_string(stack.tree.join("f")).unwrap();
        text.lines().nth(1).unwrap().to_owned()
    }

    #[test]
    fn messages_make_no_other_patch() {
        let patch = |subject: &str| Patch {
            path: PathBuf::new(),
            text: format!("Subject: {subject}\n\nWhy.\n---\n x | 2 +-\n\n{}", change("a", "b")),
        };
        let (one, other) = (patch("[PATCH 1/2] x: b"), patch("[PATCH 1/3] x: c"));
        assert_eq!(one.diff(), other.diff());
        assert!(one.diff().ends_with(&change("a", "b")));
        assert_eq!(one.files(), ["f"]);
        let bare = Patch { path: PathBuf::new(), text: "no diff".to_owned() };
        assert_eq!((bare.diff(), bare.files().len()), ("no diff", 0));
    }

    #[test]
    fn forth_and_back() {
        let temp = tempfile::tempdir().unwrap();
        let patches = series(temp.path());
        let work = temp.path().join("work");
        let pristine = temp.path().join("pristine");
        let (stack, fresh) = Stack::open(&work, &pristine).unwrap();
        assert!(fresh && line(&stack) == "0");
        for (count, expected) in [(2, "2"), (1, "1"), (0, "0"), (1, "1"), (2, "2")] {
            assert_eq!(stack.go_to(&patches[..count]).unwrap(), None);
            assert_eq!(line(&stack), expected);
        }
        let (stack, fresh) = Stack::open(&work, &pristine).unwrap();
        assert!(!fresh && line(&stack) == "2", "it outlives the process");
        assert_eq!(fs::read_to_string(pristine.join("f")).unwrap(), "a\n0\nc\n");
    }

    #[test]
    fn a_patch_that_was_edited_is_taken_back_first() {
        let temp = tempfile::tempdir().unwrap();
        let mut patches = series(temp.path());
        let (stack, _) =
            Stack::open(&temp.path().join("work"), &temp.path().join("pristine")).unwrap();
        assert_eq!(stack.go_to(&patches).unwrap(), None);
        patches[1].text = change("1", "3");
        fs::write(&patches[1].path, &patches[1].text).unwrap();
        assert_eq!(stack.go_to(&patches).unwrap(), None);
        assert_eq!(line(&stack), "3");
    }

    #[test]
    fn what_does_not_apply_changes_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let patches = series(temp.path());
        let (stack, _) =
            Stack::open(&temp.path().join("work"), &temp.path().join("pristine")).unwrap();
        let wrong = [patches[1].clone(), patches[0].clone()];
        let (number, said) = stack.go_to(&wrong).unwrap().unwrap();
        assert!(number == 0 && said.contains("FAILED"), "{said}");
        assert_eq!(line(&stack), "0");
        assert_eq!(stack.go_to(&patches).unwrap(), None);
        assert_eq!(line(&stack), "2");
    }

    #[test]
    fn after_an_interruption_the_tree_is_copied_anew() {
        let temp = tempfile::tempdir().unwrap();
        let patches = series(temp.path());
        let (work, pristine) = (temp.path().join("work"), temp.path().join("pristine"));
        let (stack, _) = Stack::open(&work, &pristine).unwrap();
        assert_eq!(stack.go_to(&patches[..1]).unwrap(), None);
        fs::write(&stack.busy, "").unwrap();
        let (stack, fresh) = Stack::open(&work, &pristine).unwrap();
        assert!(fresh && line(&stack) == "0");
        assert_eq!(stack.go_to(&patches).unwrap(), None);
        assert_eq!(line(&stack), "2");
    }
}
