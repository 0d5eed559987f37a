// SPDX-License-Identifier: GPL-2.0
//! `qemu/kernel/mutants/mutants.toml`: the description of each seeded bug, and the hunks of the
//! patches that make it.

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
    /// Its name, as the kernel's parameter takes it.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// The file and the function.
    pub place: String,
    /// What the bug does.
    pub does: String,
    /// The commit of the kernel's history, or the class of bugs, that this bug represents.
    pub stands_for: String,
    /// Tests that run first.
    pub likely: Option<Pattern>,
    /// Why no test can tell the bug from the unchanged kernel.
    pub equivalent: Option<String>,
    /// Why the tests do not find it.
    pub survives: Option<String>,
}

/// All seeded bugs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// The bugs in the order of the table.
    pub mutant: Vec<Mutant>,
}

impl Catalogue {
    /// Reads the catalogue and compares it with the bugs that the patches seed.
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

/// The names that the patches register.
pub fn seeded(patches: &[Patch]) -> BTreeSet<String> {
    let name = |line: &str| {
        let rest = line.strip_prefix("+\t[ZDM_")?;
        let name = rest.split('"').nth(1)?;
        (name != "none" && name != "coverage").then(|| name.to_owned())
    };
    patches.iter().flat_map(|p| p.diff().lines().filter_map(name)).collect()
}

/// The parts of the patches that make a bug: the switch and the hunks that name the bug, without
/// line numbers. A stored finding about the bug is valid while this text is the same.
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
                // The hunk's header has the line numbers and the function's name: leave it out.
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
