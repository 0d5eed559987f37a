// SPDX-License-Identifier: GPL-2.0
//! The kill matrix as a table: one row per seeded bug, one column per detector.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::escape;

/// The file in which `zdvm mutants` stores the matrix.
pub const FILE: &str = "matrix.json";

#[derive(Clone, Debug, Deserialize)]
struct Found {
    test: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Outcome {
    #[serde(default)]
    found: Vec<Found>,
    #[serde(default)]
    reached: bool,
    #[serde(default)]
    uncounted: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Row {
    name: String,
    does: String,
    equivalent: Option<String>,
    outcomes: BTreeMap<String, Outcome>,
}

#[derive(Clone, Debug, Deserialize)]
struct Score {
    killed: usize,
    of: usize,
}

/// The results of `zdvm mutants`.
#[derive(Clone, Debug, Deserialize)]
pub struct Kills {
    rows: Vec<Row>,
    scores: BTreeMap<String, Score>,
}

impl Kills {
    /// Reads a folder of `zdvm mutants`; `None` for any other folder.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).map(Some).with_context(|| format!("reading {}", path.display()))
    }

    /// The section of the page.
    pub fn section(&self) -> String {
        let mut out = "<section>\n<h2>Seeded bugs</h2>\n<p class=\"soft\">Each row is a bug of the kernel that \
                       is switched on by itself. A cell names the test that noticed it first.</p>\n<p>"
            .to_owned();
        let scores = self.scores.iter().filter(|(_, s)| s.of > 0);
        let scores: Vec<String> =
            scores.map(|(name, s)| format!("{}: {} of {}", escape(name), s.killed, s.of)).collect();
        let _ = writeln!(out, "{}</p>", scores.join("; "));
        out += "<div class=\"wide\"><table>\n<tr><th>bug</th>";
        for name in self.scores.keys() {
            let _ = write!(out, "<th>{}</th>", escape(name));
        }
        out += "</tr>\n";
        for row in &self.rows {
            let _ = write!(
                out,
                "<tr><td><span class=\"test\">{}</span> <span class=\"soft\">{}</span></td>",
                escape(&row.name),
                escape(&row.does)
            );
            for name in self.scores.keys() {
                out += &cell(row, row.outcomes.get(name));
            }
            out += "</tr>\n";
        }
        out + "</table></div>\n</section>\n"
    }
}

fn cell(row: &Row, outcome: Option<&Outcome>) -> String {
    let Some(outcome) = outcome else {
        return "<td class=\"soft\">not run</td>".to_owned();
    };
    // A failed test shows a bug only if the bug was reached.
    let found = outcome.found.first().filter(|_| outcome.reached);
    let (class, text) = match (found, &outcome.uncounted, &row.equivalent) {
        (Some(found), ..) => ("good", found.test.as_str()),
        (None, Some(why), _) => ("aside", why.as_str()),
        (None, None, Some(why)) => ("aside", why.as_str()),
        (None, None, None) if outcome.reached => ("bad", "not noticed"),
        (None, None, None) => ("bad", "not reached"),
    };
    format!("<td class=\"test {class}\">{}</td>", escape(text))
}
