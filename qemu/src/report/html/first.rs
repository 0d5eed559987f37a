// SPDX-License-Identifier: GPL-2.0
//! What failed first: where one fault brings many, the first one is the one to look at.

use crate::judge::splat;

use super::model::{Problem, Run};

/// Lines of the log that are shown before a line, and from it on.
const BEFORE: usize = 15;
const AFTER: usize = 45;

/// The first problem and the log around it.
#[derive(Clone, Debug, Default)]
pub struct First<'a> {
    /// The problem.
    pub problem: Option<&'a Problem>,
    /// Its line in the log, from 0; none if the log does not tell.
    pub line: Option<usize>,
    /// Lines of the log that are shown: from, up to and without.
    pub shown: (usize, usize),
}

/// The line, from 0, that a problem names: "... (console line 12)".
fn named(text: &str) -> Option<usize> {
    let (_, rest) = text.rsplit_once("(console line ")?;
    rest.trim_end_matches(')').parse::<usize>().ok()?.checked_sub(1)
}

/// Where the log says that the problem happened: its line, else the end of its test, or the
/// test's beginning if it did not end.
fn place(run: &Run, problem: &Problem) -> Option<usize> {
    if let Some(line) = named(&problem.text).filter(|l| *l < run.log.len()) {
        return Some(line);
    }
    let suite = run.verdict.suites.iter().find_map(|s| {
        problem.subject.strip_prefix(s.name.as_str()).and_then(|rest| rest.strip_prefix(": "))
    });
    let test = suite.unwrap_or(&problem.subject);
    let mut found = None;
    for (at, line) in run.log.iter().enumerate() {
        match splat::bracket(line) {
            Some((_, name)) if name == test => found = Some(at),
            // A case of KUnit has no bracket: its line says that it failed.
            _ if line.contains("not ok ") && line.ends_with(&format!(" {}", last_word(test))) => {
                found = found.or(Some(at));
            }
            _ => {}
        }
    }
    found
}

fn last_word(test: &str) -> &str {
    test.rsplit('.').next().unwrap_or(test)
}

/// What failed first in a run; nothing in a run that passed.
pub fn first(run: &Run) -> First<'_> {
    let places = run.verdict.problems.iter().map(|p| (place(run, p), p));
    // A problem without a place comes after those with one; among equals the verdict's order counts.
    let Some((line, problem)) = places.min_by_key(|(line, _)| line.unwrap_or(usize::MAX)) else {
        return First::default();
    };
    // Without a place the end of the log is what is next to the fault.
    let at = line.unwrap_or(run.log.len());
    let end = run.log.len().min(at + AFTER);
    First { problem: Some(problem), line, shown: (at.saturating_sub(BEFORE), end) }
}
