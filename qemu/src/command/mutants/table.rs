// SPDX-License-Identifier: GPL-2.0
//! The kill matrix, bug by detector: as text, as JSON and as a part of Documentation/mutants.rst.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::command::mutants::catalogue::Mutant;
use crate::command::mutants::finding::Outcome;
use crate::command::mutants::plan::Detector;
use crate::command::mutants::verdicts::Verdicts;

/// The share of bugs that our suite has to find, in hundredths.
const WANTED: usize = 97;

/// One row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    name: String,
    kind: String,
    place: String,
    does: String,
    stands_for: String,
    equivalent: Option<String>,
    survives: Option<String>,
    outcomes: BTreeMap<&'static str, Outcome>,
}

impl Row {
    fn of(&self, detector: Detector) -> Option<&Outcome> {
        self.outcomes.get(detector.word())
    }

    fn killed(&self, detector: Detector) -> bool {
        self.of(detector).is_some_and(Outcome::killed)
    }

    /// The cell of a detector, empty if it did not run.
    fn cell(&self, detector: Detector) -> String {
        self.of(detector).map(Outcome::cell).unwrap_or_default()
    }
}

/// How many of the bugs that can be told from the unchanged kernel a detector has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Score {
    /// The number of bugs found.
    pub killed: usize,
    /// The number of bugs tested.
    pub of: usize,
}

impl Score {
    fn enough(self) -> bool {
        self.killed * 100 >= self.of * WANTED
    }

    fn say(self) -> String {
        let tenths = (self.killed * 1000).checked_div(self.of).unwrap_or_default();
        format!("{} of {} ({}.{} %)", self.killed, self.of, tenths / 10, tenths % 10)
    }
}

/// The whole matrix.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    rows: Vec<Row>,
    scores: BTreeMap<&'static str, Score>,
}

impl Table {
    /// Builds the matrix of these bugs.
    pub fn new(
        mutants: &[&Mutant],
        results: &BTreeMap<(String, Detector), Outcome>,
        detectors: &[Detector],
    ) -> Self {
        let row = |m: &&Mutant| Row {
            name: m.name.clone(),
            kind: m.kind.clone(),
            place: m.place.clone(),
            does: m.does.clone(),
            stands_for: m.stands_for.clone(),
            equivalent: m.equivalent.clone(),
            survives: m.survives.clone(),
            outcomes: detectors
                .iter()
                .filter_map(|d| Some((d.word(), results.get(&(m.name.clone(), *d))?.clone())))
                .collect(),
        };
        let rows: Vec<Row> = mutants.iter().map(row).collect();
        let score = |d: &Detector| {
            let real = rows.iter().filter(|r| r.equivalent.is_none() && r.of(*d).is_some());
            let killed = real.clone().filter(|r| r.killed(*d)).count();
            (d.word(), Score { killed, of: real.count() })
        };
        let scores = detectors.iter().map(score).collect();
        Self { rows, scores }
    }

    fn score(&self, detector: Detector) -> Option<Score> {
        self.scores.get(detector.word()).copied().filter(|s| s.of > 0)
    }

    fn scores(&self, bullet: &str) -> String {
        let mut out = String::new();
        for detector in Detector::ALL {
            if let Some(score) = self.score(detector) {
                let _ = writeln!(out, "{bullet}{}: {}", detector.title(), score.say());
            }
        }
        out
    }

    /// The cells of a row: its name, what our suite says and the test, what the others say.
    fn cells(row: &Row) -> Vec<String> {
        let found = row.of(Detector::Suite).filter(|o| o.killed());
        let test = found.and_then(|o| o.found.first()).map_or("", |f| f.test.as_str());
        vec![
            row.name.clone(),
            row.cell(Detector::Suite),
            test.to_owned(),
            row.cell(Detector::UpstreamC),
            row.cell(Detector::UpstreamOurs),
        ]
    }

    /// The matrix for a terminal.
    pub fn text(&self) -> String {
        let rows = std::iter::once(HEADS.map(str::to_owned).to_vec());
        let rows = grid(&rows.chain(self.rows.iter().map(Self::cells)).collect::<Vec<_>>());
        let mut out = format!("{}\n", rows.replace('\\', " "));
        for row in &self.rows {
            if let Some(why) = row.of(Detector::Suite).and_then(|o| o.uncounted.as_ref()) {
                let _ = writeln!(out, "{}: {why}", row.name);
            }
        }
        out + &self.scores("")
    }

    /// Faults of the tests, and contradictions between the results and the catalogue.
    pub fn problems(&self) -> Vec<String> {
        let mut out = Vec::new();
        for row in &self.rows {
            let Some(outcome) = row.of(Detector::Suite) else { continue };
            let by_any = Detector::ALL.iter().any(|d| row.killed(*d));
            match (outcome.killed(), &row.equivalent, &row.survives) {
                (true, _, Some(_)) => {
                    out.push(format!("{} is said to survive, and is found", row.name));
                }
                (false, None, None) => {
                    out.push(format!("{} survives, and nothing says why", row.name));
                }
                _ if by_any && row.equivalent.is_some() => {
                    out.push(format!("{} is said to be equivalent, and is found", row.name));
                }
                _ => {}
            }
        }
        if let Some(score) = self.score(Detector::Suite).filter(|s| !s.enough()) {
            out.push(format!("our suite finds {}, {WANTED} % are wanted", score.say()));
        }
        out
    }

    /// The matrix of what is recorded.
    pub fn recorded(mutants: &[&Mutant], verdicts: &Verdicts) -> Self {
        let mut results = BTreeMap::new();
        for (mutant, detector) in mutants.iter().flat_map(|m| Detector::ALL.map(|d| (m, d))) {
            if let Some(verdict) = verdicts.get(detector, &mutant.name) {
                results.insert((mutant.name.clone(), detector), verdict.outcome());
            }
        }
        Self::new(mutants, &results, &Detector::ALL)
    }

    /// The scores, those of verdicts of this series first.
    fn scores_of(&self, verdicts: &Verdicts, series: &str) -> String {
        let mut out = String::new();
        for detector in Detector::ALL {
            let of_now = |r: &&Row| {
                r.equivalent.is_none()
                    && verdicts.get(detector, &r.name).is_some_and(|v| v.series == series)
            };
            let now = self.rows.iter().filter(of_now);
            let killed = now.clone().filter(|r| r.killed(detector)).count();
            let now = Score { killed, of: now.count() };
            let Some(all) = self.score(detector) else { continue };
            let _ = write!(out, "- {}: {} with this series", detector.title(), now.say());
            if all.of > now.of {
                let _ = write!(out, "; with all verdicts {}", all.say());
            }
            out.push('\n');
        }
        out
    }

    /// The table of what is recorded. Our suite's column names the series of its verdict; what another
    /// detector said about an earlier series has a star.
    fn recorded_grid(&self, verdicts: &Verdicts, series: &str) -> String {
        let heads = [&HEADS[..3], &["series"], &HEADS[3..]].concat();
        let mut rows = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        for row in &self.rows {
            let of = |detector| verdicts.get(detector, &row.name).map_or("", |v| v.series.as_str());
            let mut cells = Self::cells(row);
            for (at, detector) in [(3, Detector::UpstreamC), (4, Detector::UpstreamOurs)] {
                if !cells[at].is_empty() && of(detector) != series {
                    cells[at].push_str(" \\*");
                }
            }
            cells.insert(3, of(Detector::Suite).to_owned());
            rows.push(cells);
        }
        grid(&rows)
    }

    /// The generated part of Documentation/mutants.rst.
    pub fn document(&self, release: &str, verdicts: &Verdicts, series: &str) -> String {
        let mut out = format!(
            "Linux {release}, {} mutants. The series in ``qemu/kernel/patches/7.3`` is ``{series}``.\n\n{}\n",
            self.rows.len(),
            self.scores_of(verdicts, series),
        );
        let none: Vec<String> = self
            .rows
            .iter()
            .filter(|r| r.of(Detector::Suite).is_none())
            .map(|r| format!("``{}``", r.name))
            .collect();
        if !none.is_empty() {
            let _ = write!(out, "Our suite has not been run against {}.\n\n", none.join(", "));
        }
        let _ = writeln!(out, "{}", self.recorded_grid(verdicts, series));
        let list = |title: &str, why: &dyn Fn(&Row) -> Option<String>| {
            let mut text = String::new();
            for row in &self.rows {
                if let Some(why) = why(row) {
                    let _ = write!(text, "``{}``\n    {}. {why}\n\n", row.name, upper(&row.does));
                }
            }
            if text.is_empty() {
                return text;
            }
            format!("{title}\n{}\n\n{text}", "-".repeat(title.len()))
        };
        out += &list("What survives, and why", &|r| {
            r.survives.clone().filter(|_| !r.killed(Detector::Suite))
        });
        out += &list("Equivalent to no bug", &|r| r.equivalent.clone());
        out += "What each one is\n----------------\n\n";
        let mut kind = "";
        for row in &self.rows {
            if row.kind != kind {
                kind = &row.kind;
                let _ = write!(out, "*{}*\n\n", upper(kind));
            }
            let (name, does) = (&row.name, upper(&row.does));
            let _ = write!(
                out,
                "``{name}``\n    {}: {does}. Stands for {}.\n\n",
                row.place, row.stands_for
            );
        }
        out
    }
}

/// The columns of the table.
const HEADS: [&str; 5] = ["mutant", "suite", "in", "C driver", "ours"];

/// A table of these rows, the first of which has the names of the columns, as reStructuredText.
fn grid(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let cell = |text: &String| if text.is_empty() { "\\".to_owned() } else { text.clone() };
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(cell).collect()).collect();
    let width = |at: usize| rows.iter().map(|r| r[at].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let rule = widths.iter().map(|w| "=".repeat(*w)).collect::<Vec<_>>().join("  ") + "\n";
    let mut out = rule.clone();
    for (number, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:w$}"));
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
        if number == 0 {
            out += &rule;
        }
    }
    out + &rule
}

fn upper(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

/// The lines before and after the generated part.
const MARKS: [&str; 2] = [".. begin of what zdvm writes\n", ".. end of what zdvm writes\n"];

/// The document with its generated part replaced.
pub fn renew(document: &str, part: &str) -> Result<String> {
    let [begin, end] = MARKS;
    let (head, rest) = document.split_once(begin).context("Documentation/mutants.rst: no begin")?;
    let (_, tail) = rest.split_once(end).context("Documentation/mutants.rst: no end")?;
    Ok(format!("{head}{begin}\n{part}{end}{tail}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;
    use crate::command::mutants::finding::{By, Finding};
    use crate::command::mutants::verdicts::Verdict;

    fn mutant(name: &str) -> Mutant {
        Mutant {
            name: name.into(),
            kind: "kind".into(),
            place: "mm/x.c: f()".into(),
            does: "does it".into(),
            stands_for: "it".into(),
            likely: None,
            equivalent: None,
            survives: None,
        }
    }

    fn outcome(reached: bool, by: &[By]) -> Outcome {
        let finding = |by: &By| Finding { by: *by, test: "a.b".into(), text: "x".into() };
        Outcome { reached, found: by.iter().map(finding).collect(), ..Outcome::default() }
    }

    fn table(mutants: &[Mutant], suite: &[Outcome], c: &[Outcome]) -> Table {
        let mut results = BTreeMap::new();
        for (list, detector) in [(suite, Detector::Suite), (c, Detector::UpstreamC)] {
            for (mutant, outcome) in mutants.iter().zip(list) {
                results.insert((mutant.name.clone(), detector), outcome.clone());
            }
        }
        let mutants: Vec<&Mutant> = mutants.iter().collect();
        Table::new(&mutants, &results, &Detector::ALL)
    }

    #[test]
    fn cells_and_scores() {
        let mutants = ["one", "two", "three", "four"].map(mutant);
        let hang = Outcome { uncounted: Some("hangs".into()), ..outcome(true, &[]) };
        let table = table(
            &mutants,
            &[outcome(true, &[By::Audit, By::Data]), outcome(true, &[]), outcome(false, &[]), hang],
            &[outcome(true, &[By::Splat])],
        );
        let text = table.text();
        let row = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("one"), ["one", "data+audit", "a.b", "splat"]);
        assert_eq!(row("two"), ["two", "-"]);
        assert_eq!(row("three"), ["three", "."]);
        assert_eq!(row("four"), ["four", "?"]);
        assert!(text.contains("our suite: 1 of 4 (25.0 %)"), "{text}");
        assert!(text.contains("C driver: 1 of 1 (100.0 %)"), "{text}");
    }

    #[test]
    fn problems() {
        let found = || outcome(true, &[By::Data]);
        let with = |f: &dyn Fn(&mut Mutant), outcome: Outcome| {
            let mut mutant = mutant("one");
            f(&mut mutant);
            table(&[mutant], &[outcome], &[]).problems()
        };
        assert!(with(&|_| (), found()).is_empty());
        let said = with(&|_| (), outcome(true, &[]));
        assert!(said[0].contains("nothing says why") && said[1].contains("97 %"), "{said:?}");
        let said = with(&|m| m.survives = Some("x".into()), outcome(true, &[]));
        assert!(said.len() == 1 && said[0].contains("97 %"), "{said:?}");
        assert!(with(&|m| m.survives = Some("x".into()), found())[0].contains("said to survive"));
        assert!(with(&|m| m.equivalent = Some("x".into()), outcome(true, &[])).is_empty());
        let said = with(&|m| m.equivalent = Some("x".into()), found());
        assert!(said[0].contains("said to be equivalent"), "{said:?}");
    }

    #[test]
    fn three_of_a_hundred_may_survive() {
        assert!(Score { killed: 97, of: 100 }.enough() && !Score { killed: 96, of: 100 }.enough());
    }

    #[test]
    fn the_document_keeps_what_people_wrote() {
        let old = format!("title\n\n{}replaced\n{}tail\n", MARKS[0], MARKS[1]);
        let mutants = ["one", "two"].map(mutant);
        let mut mutants = mutants.to_vec();
        mutants[1].survives = Some("No test looks there.".into());
        let mut verdicts = Verdicts::default();
        let mut say = |detector, name: &str, outcome, series| {
            verdicts.set(detector, name, Verdict::new(&outcome, series));
        };
        say(Detector::Suite, "one", outcome(true, &[By::Data]), "now");
        say(Detector::Suite, "two", outcome(true, &[]), "old");
        say(Detector::UpstreamC, "one", outcome(true, &[By::Splat]), "old");
        let list: Vec<&Mutant> = mutants.iter().collect();
        let table = Table::recorded(&list, &verdicts);
        let document = table.document("7.3.4", &verdicts, "now");
        let new = renew(&old, &document).unwrap();
        assert!(new.starts_with("title\n\n.. begin") && new.ends_with("tail\n"));
        assert!(
            !new.contains("replaced") && new.contains("``two``\n    Does it. No test looks there.")
        );
        assert_eq!(renew(&new, &document).unwrap(), new);
        let row = |name: &str| {
            let line = document.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("one"), ["one", "data", "a.b", "now", "splat", "\\*", "\\"]);
        assert_eq!(row("two"), ["two", "-", "\\", "old", "\\", "\\"]);
        assert!(
            document
                .contains("our suite: 1 of 1 (100.0 %) with this series; with all verdicts 1 of 2")
        );
        assert!(
            document
                .contains("C driver: 0 of 0 (0.0 %) with this series; with all verdicts 1 of 1")
        );
        assert!(renew("nothing", "x").is_err());
    }
}
