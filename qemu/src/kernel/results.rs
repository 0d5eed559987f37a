// SPDX-License-Identifier: GPL-2.0
//! Finds the kernel of the matrix whose results a user's tree is expected to give, by its version
//! and by the patches of the series that it has.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::kernel;
use crate::kernel::kdir;
use crate::kernel::series::Patch;
use crate::plan::matrix::{Kernel, Matrix};

/// Tells for each patch of a series whether a source has it. The patches are reverted in a copy of
/// the files that they touch, the last one first, because a later patch may change what an earlier
/// one made.
pub fn present(patches: &[Patch], source: &Path) -> Result<Vec<bool>> {
    let copy = tempfile::Builder::new().prefix("zdvm").tempdir()?;
    for file in patches.iter().flat_map(Patch::files) {
        let (from, to) = (source.join(file), copy.path().join(file));
        if from.is_file() && !to.exists() {
            fs::create_dir_all(to.parent().unwrap_or(copy.path()))?;
            fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
        }
    }
    let mut out = vec![false; patches.len()];
    for (there, patch) in out.iter_mut().zip(patches).rev() {
        let take_out = |only_try: &[&str]| {
            let mut command = Command::new("patch");
            command.args(["-R", "-p1", "-s", "-f", "-d"]).arg(copy.path()).args(only_try);
            command.arg("-i").arg(&patch.path);
            command.output().map(|o| o.status.success()).context("starting patch")
        };
        *there = take_out(&["--dry-run"])? && take_out(&[])?;
    }
    Ok(out)
}

/// The kernels of the matrix of one release, without and with the series. The release is that of
/// the tree, or else the newest one that is older, or else the oldest one.
fn release(matrix: &Matrix, version: (u32, u32)) -> Vec<(&str, &Kernel)> {
    let number = |kernel: &Kernel| {
        let (major, minor) = kernel.source.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    };
    // A kernel that is `like` another one of its release differs only in its configuration.
    let like = |kernel: &Kernel| matrix.kernel.get(kernel.like.as_ref()?);
    let varies = |kernel: &Kernel| like(kernel).is_some_and(|other| other.source == kernel.source);
    let fits = |kernel: &Kernel| !kernel.llvm && kernel.patches.len() < 2 && !varies(kernel);
    let all = || matrix.kernel.iter().filter(|(_, k)| fits(k));
    let known = all().filter_map(|(_, k)| number(k));
    let best = known.clone().filter(|&n| n <= version).max().or_else(|| known.min());
    all().filter(|(_, k)| number(k) == best).map(|(name, k)| (name.as_str(), k)).collect()
}

/// The kernel whose results are expected of a source, and the reason as text.
pub fn expected(matrix: &Matrix, source: &Path) -> Result<(String, String)> {
    let version = kdir::version(source)?;
    let kernels = release(matrix, version);
    let plain = kernels.iter().find(|(_, k)| k.patches.is_empty());
    let patched = kernels.iter().find(|(_, k)| k.patches.len() == 1);
    let (Some((plain, _)), Some((patched, kernel))) = (plain, patched) else {
        anyhow::bail!("no kernel of the matrix is like Linux {}.{}", version.0, version.1);
    };
    let patches = kernel::patches(matrix, kernel)?;
    let there = present(&patches, source)?;
    let count = there.iter().filter(|&&p| p).count();
    let name = if count == patches.len() { patched } else { plain };
    let mut why = format!(
        "Linux {}.{} with {count} of {} patches of the series: results of {name:?} are expected",
        version.0,
        version.1,
        patches.len()
    );
    if count != 0 && count != patches.len() {
        let missing = patches.iter().zip(&there).filter(|(_, there)| !**there);
        let missing: Vec<String> = missing.map(|(p, _)| p.name()).collect();
        why += &format!("; it lacks {}", missing.join(", "));
    }
    Ok(((*name).to_owned(), why + " (EXPECT= takes another)"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    #[test]
    fn patches_are_found_in_a_source() {
        let temp = tempfile::tempdir().unwrap();
        let source = temp.path().join("source");
        fs::create_dir_all(source.join("mm")).unwrap();
        let patch = |from: &str, to: &str| {
            let text = format!(
                "Why.\n\ndiff --git a/mm/f b/mm/f\n--- a/mm/f\n+++ b/mm/f\n@@ -1 +1 @@\n-{from}\n+{to}\n"
            );
            let path = temp.path().join(format!("{to}.patch"));
            fs::write(&path, &text).unwrap();
            Patch { path, text }
        };
        // The second patch changes the line that the first one made.
        let patches = [patch("0", "1"), patch("1", "2")];
        for (text, there) in [
            ("0\n", [false, false]),
            ("1\n", [true, false]),
            ("2\n", [true, true]),
            ("x\n", [false, false]),
        ] {
            fs::write(source.join("mm/f"), text).unwrap();
            assert_eq!(present(&patches, &source).unwrap(), there, "{text}");
            assert_eq!(fs::read_to_string(source.join("mm/f")).unwrap(), text);
        }
    }

    #[test]
    fn a_version_has_its_kernels() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let matrix = Matrix::load(repo).unwrap();
        let names = |version| -> Vec<&str> {
            release(&matrix, version).into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names((7, 3)), ["patched", "stock"]);
        assert_eq!(names((7, 2)), ["patched-7.2", "stock-7.2"]);
        assert_eq!(names((8, 0)), ["patched", "stock"]);
    }
}
