// SPDX-License-Identifier: GPL-2.0
//! `qemu/kernel/mutants/verdicts.toml`: what each detector said about each bug last, and of which
//! series that kernel was. A run of a few bugs renews their verdicts; the others keep theirs, and the
//! table in Documentation/mutants.rst says which of them are of another series.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::command::mutants::finding::{By, Finding, Outcome};
use crate::command::mutants::plan::Detector;
use crate::kernel::series::Patch;
use crate::repo;

/// The verdict of one detector about one bug.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// What noticed the bug, joined by `+`; `-` if nothing did, `.` if no test reaches it, `?` if the
    /// result does not count.
    pub by: String,
    /// The test that noticed it, if that is known.
    #[serde(default)]
    pub test: String,
    /// The key of the series, see [`series()`].
    pub series: String,
}

impl Verdict {
    /// The verdict of a boot.
    pub fn new(outcome: &Outcome, series: &str) -> Self {
        let found = outcome.found.first().filter(|_| outcome.killed());
        Self {
            by: outcome.cell(),
            test: found.map(|f| f.test.clone()).unwrap_or_default(),
            series: series.to_owned(),
        }
    }

    /// The result that this verdict summarises.
    pub fn outcome(&self) -> Outcome {
        let kind = |word: &str| By::ALL.into_iter().find(|by| by.word() == word);
        let found: Vec<Finding> = self
            .by
            .split('+')
            .filter_map(kind)
            .map(|by| Finding { by, test: self.test.clone(), text: String::new() })
            .collect();
        Outcome {
            reached: self.by != ".",
            found,
            uncounted: (self.by == "?").then(String::new),
            ..Outcome::default()
        }
    }
}

/// All verdicts, by detector and bug.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Verdicts(BTreeMap<String, BTreeMap<String, Verdict>>);

impl Verdicts {
    /// The file below the directory of the matrix.
    pub fn path(matrix: &Path) -> PathBuf {
        matrix.join("mutants/verdicts.toml")
    }

    /// Reads the file.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("in {}", path.display()))
    }

    /// The verdict about a bug.
    pub fn get(&self, detector: Detector, mutant: &str) -> Option<&Verdict> {
        self.0.get(detector.word())?.get(mutant)
    }

    /// Renews a verdict.
    pub fn set(&mut self, detector: Detector, mutant: &str, verdict: Verdict) {
        self.0.entry(detector.word().to_owned()).or_default().insert(mutant.to_owned(), verdict);
    }

    /// Forgets the bugs that are not in the catalogue any more.
    pub fn retain(&mut self, known: impl Fn(&str) -> bool) {
        self.0.values_mut().for_each(|of| of.retain(|mutant, _| known(mutant)));
    }

    /// The text of the file.
    pub fn text(&self) -> String {
        let mut out = String::from(
            "# SPDX-License-Identifier: GPL-2.0\n\
             # What each detector said about each bug last. `./zdvm mutants NAMES --write` renews it.\n",
        );
        for (detector, of) in &self.0 {
            let _ = write!(out, "\n[{detector}]\n");
            for (mutant, Verdict { by, test, series }) in of {
                let test =
                    if test.is_empty() { String::new() } else { format!(", test = \"{test}\"") };
                let _ =
                    writeln!(out, "{mutant} = {{ by = \"{by}\"{test}, series = \"{series}\" }}");
            }
        }
        out
    }
}

/// The key of a series: of what its patches change, whatever their messages say.
pub fn series(patches: &[Patch]) -> String {
    let mut key = repo::key(patches.iter().map(Patch::diff));
    key.truncate(7);
    key
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    fn verdict(by: &str, test: &str) -> Verdict {
        Verdict { by: by.into(), test: test.into(), series: "abc".into() }
    }

    #[test]
    fn a_verdict_is_what_the_boot_said() {
        for (by, test) in [("data+audit", "a.b"), ("hang", "a.b"), ("-", ""), (".", ""), ("?", "")]
        {
            let verdict = verdict(by, test);
            assert_eq!(Verdict::new(&verdict.outcome(), "abc"), verdict);
        }
    }

    #[test]
    fn the_file_is_read_as_it_is_written() {
        let mut all = Verdicts::default();
        all.set(Detector::Suite, "lost", verdict("data", "a.b"));
        all.set(Detector::Suite, "gone", verdict("-", ""));
        all.set(Detector::UpstreamC, "lost", verdict(".", ""));
        let read = |all: &Verdicts| toml::from_str::<Verdicts>(&all.text()).unwrap();
        assert_eq!(read(&all), all);
        all.retain(|mutant| mutant != "gone");
        assert!(all.get(Detector::Suite, "gone").is_none());
        assert_eq!(read(&all).get(Detector::Suite, "lost"), Some(&verdict("data", "a.b")));
    }
}
