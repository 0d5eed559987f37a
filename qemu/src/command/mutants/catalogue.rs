// SPDX-License-Identifier: GPL-2.0
//! `qemu/kernel/mutants/mutants.toml`: what each seeded bug is, and what of the patches makes it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::kernel::series::Patch;
use crate::plan::expected::Pattern;

/// One seeded bug.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// Its name, as the kernel takes it.
    pub name: String,
    /// Of which kind.
    pub kind: String,
    /// File and function.
    pub place: String,
    /// What it does.
    pub does: String,
    /// The commit of history, or the class, that it stands for.
    pub stands_for: String,
    /// Tests that go first.
    pub likely: Option<Pattern>,
    /// Why nobody could tell it from the unchanged kernel.
    pub equivalent: Option<String>,
    /// Why it is not found.
    pub survives: Option<String>,
}

/// All of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// In the order of the table.
    pub mutant: Vec<Mutant>,
}

impl Catalogue {
    /// Reads it, and compares it with what the patches seed.
    pub fn load(dir: &Path, patches: &[Patch]) -> Result<Self> {
        let path = dir.join("mutants/mutants.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let catalogue: Self =
            toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        catalogue.check(&seeded(patches)).with_context(|| format!("in {}", path.display()))?;
        Ok(catalogue)
    }

    fn check(&self, seeded: &BTreeSet<String>) -> Result<()> {
        let mut seen = BTreeSet::new();
        for mutant in &self.mutant {
            if !seen.insert(mutant.name.clone()) {
                bail!("{} is there twice", mutant.name);
            }
            if mutant.equivalent.is_some() && mutant.survives.is_some() {
                bail!("{} cannot be both equivalent and one that survives", mutant.name);
            }
        }
        let list =
            |names: Vec<&String>| names.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ");
        let bare: Vec<&String> = seeded.difference(&seen).collect();
        if !bare.is_empty() {
            bail!("the patches seed what is not there: {}", list(bare));
        }
        let vain: Vec<&String> = seen.difference(seeded).collect();
        if !vain.is_empty() {
            bail!("no patch seeds {}", list(vain));
        }
        Ok(())
    }
}

/// Names that the patches register.
pub fn seeded(patches: &[Patch]) -> BTreeSet<String> {
    let name = |line: &str| {
        let rest = line.strip_prefix("+\t[ZDM_")?;
        let name = rest.split('"').nth(1)?;
        (name != "none" && name != "coverage").then(|| name.to_owned())
    };
    patches.iter().flat_map(|p| p.diff().lines().filter_map(name)).collect()
}

/// What of the patches makes a bug: the switch and the hunks that name the bug, without their line
/// numbers. As long as it is the same, so is what was found out about the bug.
pub fn essence(patches: &[Patch], name: &str) -> String {
    let symbol = format!("ZDM_{}", name.to_uppercase());
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names = |hunk: &str| {
        hunk.match_indices(&symbol).any(|(at, _)| !hunk[at + symbol.len()..].starts_with(word))
    };
    let mut out = String::new();
    for patch in patches {
        if patch.files().iter().any(|f| f.ends_with("/Makefile")) {
            out.push_str(patch.diff());
            continue;
        }
        for part in patch.diff().split("\ndiff --git ") {
            let (head, hunks) = part.split_once("\n@@ ").unwrap_or((part, ""));
            if head.contains("zdm_mutant") {
                continue;
            }
            for hunk in hunks.split("\n@@ ").filter(|h| names(h)) {
                out.push_str(head.lines().next().unwrap_or_default());
                // Without the numbers, and the function's name behind them.
                out.push_str(hunk.split_once('\n').map_or("", |h| h.1));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    fn patch(text: &str) -> Patch {
        Patch { path: "x.patch".into(), text: format!("Subject: x\n\n{text}") }
    }

    fn hunk(line: u32, text: &str) -> String {
        format!("@@ -{line},1 +{line},2 @@ f()\n context\n+{text}\n")
    }

    fn series(first: u32, other: &str) -> Vec<Patch> {
        let file =
            |name: &str| format!("diff --git a/{name} b/{name}\n--- a/{name}\n+++ b/{name}\n");
        vec![
            patch(&(file("mm/Makefile") + &hunk(1, "switch"))),
            patch(
                &(file("mm/zdm_mutant.c")
                    + &hunk(9, "\t[ZDM_LOST] = \"lost\",")
                    + &hunk(19, "\t[ZDM_LOST_THP] = \"lost_thp\",")
                    + &file("mm/x.c")
                    + &hunk(first, "if (zdm_mutant(ZDM_LOST))")
                    + &hunk(first + 9, other)),
            ),
        ]
    }

    #[test]
    fn what_is_seeded() {
        let names: Vec<String> = seeded(&series(5, "")).into_iter().collect();
        assert_eq!(names, ["lost", "lost_thp"]);
    }

    #[test]
    fn a_bug_is_its_own_hunks() {
        let one = essence(&series(5, "if (zdm_mutant(ZDM_LOST_THP))"), "lost");
        let moved = essence(&series(50, "another one"), "lost");
        assert_eq!(one, moved);
        assert!(one.contains("switch") && one.contains("ZDM_LOST)") && !one.contains("THP"));
        let thp = essence(&series(5, "if (zdm_mutant(ZDM_LOST_THP))"), "lost_thp");
        assert!(thp.contains("LOST_THP") && !thp.contains("ZDM_LOST)"));
    }

    fn catalogue(text: &str) -> Result<()> {
        let rest = "kind=\"k\"\nplace=\"p\"\ndoes=\"d\"\nstands_for=\"s\"\n";
        let text = text.replace("[[", &format!("{rest}[[")).replacen(rest, "", 1) + rest;
        let catalogue: Catalogue = toml::from_str(&text)?;
        catalogue.check(&seeded(&series(5, "")))
    }

    #[test]
    fn catalogue_and_patches_must_agree() {
        let good = "[[mutant]]\nname=\"lost\"\n[[mutant]]\nname=\"lost_thp\"\n";
        catalogue(good).unwrap();
        for (text, says) in [
            ("[[mutant]]\nname=\"lost\"\n", "not there: lost_thp"),
            (&*format!("{good}[[mutant]]\nname=\"more\"\n"), "no patch seeds more"),
            (&*format!("{good}[[mutant]]\nname=\"lost\"\n"), "twice"),
            (&*format!("{good}equivalent=\"a\"\nsurvives=\"b\"\n"), "both"),
        ] {
            let said = format!("{:#}", catalogue(text).unwrap_err());
            assert!(said.contains(says), "{said}");
        }
    }
}
