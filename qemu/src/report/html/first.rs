// SPDX-License-Identifier: GPL-2.0
//! Finds what failed first: one fault often causes many failures, and the first one is next to the
//! cause.

use crate::judge::splat;

use super::model::{Problem, Run};

/// How many lines of the log are shown before a line, and from it on.
const BEFORE: usize = 15;
const AFTER: usize = 45;

/// The first problem and the log around it.
#[derive(Clone, Debug, Default)]
pub struct First<'a> {
    /// The problem.
    pub problem: Option<&'a Problem>,
    /// Its line in the log, counted from 0; `None` if the log does not show it.
    pub line: Option<usize>,
    /// The lines of the log that are shown: first, and end (exclusive).
    pub shown: (usize, usize),
}

/// The line, counted from 0, that a problem names as "... (console line 12)".
fn named(text: &str) -> Option<usize> {
    let (_, rest) = text.rsplit_once("(console line ")?;
    rest.trim_end_matches(')').parse::<usize>().ok()?.checked_sub(1)
}

/// The line of the log where the problem happened: the line that it names, else the end of its
/// test, or the test's beginning if the test did not end.
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
            // A KUnit case has no bracket; its result line says that it failed.
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

/// Finds what failed first in a run; nothing in a run that passed.
pub fn first(run: &Run) -> First<'_> {
    let places = run.verdict.problems.iter().map(|p| (place(run, p), p));
    // A problem without a place comes after those with one; equals keep the order of the verdict.
    let Some((line, problem)) = places.min_by_key(|(line, _)| line.unwrap_or(usize::MAX)) else {
        return First::default();
    };
    // A problem without a place is shown at the end of the log, which is closest to the fault.
    let at = line.unwrap_or(run.log.len());
    let end = run.log.len().min(at + AFTER);
    First { problem: Some(problem), line, shown: (at.saturating_sub(BEFORE), end) }
}
