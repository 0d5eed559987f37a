// SPDX-License-Identifier: GPL-2.0
//! The markup of the page.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::bench;
use super::escape;
use super::first::{self, First};
use super::kills::Kills;
use super::model::{Run, Suite, Test, Tone};
use super::timeline;

/// How many problems are shown one by one: many problems have one cause.
const PROBLEMS: usize = 100;
/// How many lines of the log's end every page shows.
const TAIL: usize = 200;
/// How many tests the list of the slowest tests has.
const SLOWEST: usize = 10;

const STYLE: &str = include_str!("style.css");

fn badge(pass: bool) -> &'static str {
    if pass {
        "<span class=\"badge good\">PASS</span>"
    } else {
        "<span class=\"badge bad\">FAIL</span>"
    }
}

/// A table cell with a number; a zero has no colour.
fn number(count: usize, tone: Option<Tone>) -> String {
    let class = tone.filter(|_| count > 0).map_or("", |t| t.class());
    format!("<td class=\"n {class}\">{count}</td>")
}

/// The page of one run or several, and of seeded bugs.
pub fn page(runs: &[Run], kills: &[Kills]) -> String {
    let mut out = String::new();
    let mut names: Vec<String> = runs.iter().map(Run::title).collect();
    names.extend(kills.iter().map(|_| "seeded bugs".to_owned()));
    let _ = writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>zdvm: {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>",
        escape(&names.join(", "))
    );
    if runs.len() > 1 {
        out += &side_by_side(runs);
    }
    for run in runs {
        out += &one(run);
    }
    out.extend(kills.iter().map(Kills::section));
    out + "</body>\n</html>\n"
}

fn one(run: &Run) -> String {
    let mut out = head(run);
    out += &failed_first(run, &first::first(run));
    out += &suites(run);
    out += &problems(run);
    let picture = timeline::svg(run);
    if !picture.is_empty() {
        let _ = writeln!(
            out,
            "<section>\n<h2>Timeline</h2>\n<p class=\"soft\">Seconds since the guest's kernel \
             started. One bar is one test; its name is shown when the pointer rests on it.</p>\n\
             {picture}</section>"
        );
    }
    out += &slowest(run);
    out += &bench::section(run);
    out += &figures(run);
    out += &tail(run);
    out
}

fn head(run: &Run) -> String {
    let v = &run.verdict;
    let count = |tone| v.suites.iter().map(|s| s.count(tone)).sum::<usize>();
    let release = v.release.as_deref().unwrap_or("the guest never came up");
    format!(
        "<header>\n<h1>{} {}</h1>\n<p>{} passed, {} not as expected, {} expected to fail or to be \
         skipped. {} problems.</p>\n<p class=\"soft\">Linux {}, run with {} in {:.1} s, QEMU ended \
         with {}. Folder {}.</p>\n</header>\n",
        badge(v.pass),
        escape(&run.title()),
        count(Tone::Good),
        count(Tone::Bad),
        count(Tone::Aside),
        v.problems.len(),
        escape(release),
        escape(&v.accel),
        v.seconds,
        escape(&v.exit),
        escape(&run.folder)
    )
}

fn log(run: &Run, (from, to): (usize, usize), here: Option<usize>) -> String {
    let mut out = "<div class=\"log\">\n".to_owned();
    for (at, line) in run.log.iter().enumerate().take(to).skip(from) {
        let class = if here == Some(at) { " class=\"here\"" } else { "" };
        let _ = writeln!(out, "<div{class}><span>{}</span>{}</div>", at + 1, escape(line));
    }
    out + "</div>\n"
}

fn failed_first(run: &Run, first: &First<'_>) -> String {
    let Some(problem) = first.problem else { return String::new() };
    let place = match first.line {
        Some(line) => format!("The log around line {}:", line + 1),
        None => "The log does not say where; its end:".to_owned(),
    };
    format!(
        "<section>\n<h2>What failed first</h2>\n<div class=\"callout\"><p><strong>{}</strong> in \
         <span class=\"test\">{}</span></p>\n<p>{}</p></div>\n<p class=\"soft\">{place}</p>\n{}</section>\n",
        escape(&problem.kind),
        escape(&problem.subject),
        escape(&problem.text),
        log(run, first.shown, first.line)
    )
}

fn suites(run: &Run) -> String {
    let mut out = "<section>\n<h2>Suites</h2>\n<div class=\"wide\"><table>\n<tr><th>suite</th>\
                   <th class=\"n\">planned</th><th class=\"n\">passed</th><th class=\"n\">not as \
                   expected</th><th class=\"n\">expected to fail or skip</th>\
                   <th class=\"n\">more with --full</th></tr>\n"
        .to_owned();
    for suite in &run.verdict.suites {
        let _ = writeln!(
            out,
            "<tr><td>{}</td>{}{}{}{}{}</tr>",
            escape(&suite.name),
            number(suite.planned, None),
            number(suite.count(Tone::Good), Some(Tone::Good)),
            number(suite.count(Tone::Bad), Some(Tone::Bad)),
            number(suite.count(Tone::Aside), Some(Tone::Aside)),
            number(suite.with_full, None)
        );
    }
    for (name, count) in &run.verdict.left_out {
        let _ = writeln!(
            out,
            "<tr><td>{}</td>{}<td></td><td></td><td></td>{}</tr>",
            escape(name),
            number(0, None),
            number(*count, None)
        );
    }
    out += "</table></div>\n";
    for suite in &run.verdict.suites {
        out += &results(suite);
    }
    out + "</section>\n"
}

/// A suite's tests; those that need a reader's attention come first and are open.
fn results(suite: &Suite) -> String {
    let mut out = String::new();
    for (tone, words) in [
        (Tone::Bad, "not as expected"),
        (Tone::Aside, "expected to fail or to be skipped"),
        (Tone::Good, "passed"),
    ] {
        let tests: Vec<&Test> = suite.tests.iter().filter(|t| t.tone() == tone).collect();
        if tests.is_empty() {
            continue;
        }
        let open = if tone == Tone::Bad { " open" } else { "" };
        let _ = writeln!(
            out,
            "<details{open}><summary>{}: {} {words}</summary>\n<div class=\"wide\"><table>",
            escape(&suite.name),
            tests.len()
        );
        for test in tests {
            let seconds = test.seconds.map(|s| format!("{s:.2} s")).unwrap_or_default();
            let _ = writeln!(
                out,
                "<tr><td class=\"test\">{}</td><td class=\"{}\">{}</td><td class=\"n\">{seconds}</td>\
                 <td>{}</td></tr>",
                escape(&test.name),
                tone.class(),
                escape(&test.status),
                escape(&test.reason)
            );
        }
        out += "</table></div></details>\n";
    }
    out
}

fn problems(run: &Run) -> String {
    let problems = &run.verdict.problems;
    if problems.is_empty() {
        return String::new();
    }
    let mut out = "<section>\n<h2>All problems</h2>\n<div class=\"wide\"><table>\n\
                   <tr><th>kind</th><th>where</th><th>what</th></tr>\n"
        .to_owned();
    for p in problems.iter().take(PROBLEMS) {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td class=\"test\">{}</td><td class=\"test\">{}</td></tr>",
            escape(&p.kind),
            escape(&p.subject),
            escape(&p.text)
        );
    }
    out += "</table></div>\n";
    if let Some(more) = problems.len().checked_sub(PROBLEMS).filter(|n| *n > 0) {
        let _ = writeln!(out, "<p>And {more} more, in verdict.json.</p>");
    }
    out + "</section>\n"
}

fn slowest(run: &Run) -> String {
    let mut tests: Vec<(f64, &Test)> = run
        .verdict
        .suites
        .iter()
        .flat_map(|s| &s.tests)
        .filter_map(|t| Some((t.seconds.filter(|s| *s > 0.0)?, t)))
        .collect();
    tests.sort_by(|a, b| b.0.total_cmp(&a.0));
    let Some(most) = tests.first().map(|t| t.0) else { return String::new() };
    let mut out = "<section>\n<h2>What took longest</h2>\n<div class=\"wide\"><table>\n".to_owned();
    for (seconds, test) in tests.iter().take(SLOWEST) {
        let _ = writeln!(
            out,
            "<tr><td class=\"test\">{}</td><td class=\"n\">{seconds:.2} s</td><td style=\"width: 45%\">\
             <span class=\"bar\" style=\"width: {:.1}%\"></span></td></tr>",
            escape(&test.name),
            seconds / most * 100.0
        );
    }
    out + "</table></div>\n</section>\n"
}

/// The lines of benchmarks that no picture shows.
fn figures(run: &Run) -> String {
    if run.figures.is_empty() {
        return String::new();
    }
    let mut out =
        "<section>\n<h2>Benchmarks in words</h2>\n<div class=\"wide\"><table>\n".to_owned();
    for figure in &run.figures {
        let _ = writeln!(out, "<tr><td class=\"test\">{}</td></tr>", escape(figure));
    }
    out + "</table></div>\n</section>\n"
}

fn tail(run: &Run) -> String {
    if run.log.is_empty() {
        return String::new();
    }
    let from = run.log.len().saturating_sub(TAIL);
    format!(
        "<section class=\"screen\">\n<h2>End of the log</h2>\n<details><summary>Lines {} to {}; the \
         whole log is console.log</summary>\n{}</details>\n</section>\n",
        from + 1,
        run.log.len(),
        log(run, (from, run.log.len()), None)
    )
}

/// A run's result of a test as a cell.
fn cell(test: Option<&&Test>) -> String {
    match test {
        None => "<td class=\"soft\">not planned</td>".to_owned(),
        Some(t) => format!("<td class=\"{}\">{}</td>", t.tone().class(), escape(&t.status)),
    }
}

/// The suites and the differing tests, with a column for each run.
fn side_by_side(runs: &[Run]) -> String {
    let mut out =
        "<header>\n<h1>Side by side</h1>\n</header>\n<section>\n<div class=\"wide\"><table>\n\
                   <tr><th></th>"
            .to_owned();
    let mut verdicts = String::new();
    for run in runs {
        let _ = write!(out, "<th>{}</th>", escape(&run.title()));
        let _ = write!(verdicts, "<td>{}</td>", badge(run.verdict.pass));
    }
    let _ = writeln!(out, "</tr>\n<tr><td>verdict</td>{verdicts}</tr>");
    let mut names: Vec<&str> = Vec::new();
    for suite in runs.iter().flat_map(|r| &r.verdict.suites) {
        if !names.contains(&suite.name.as_str()) {
            names.push(&suite.name);
        }
    }
    for name in &names {
        let _ = write!(out, "<tr><td>{}</td>", escape(name));
        for run in runs {
            out += &match run.verdict.suites.iter().find(|s| s.name == **name) {
                None => "<td class=\"soft\">not run</td>".to_owned(),
                Some(suite) => {
                    let bad = suite.count(Tone::Bad);
                    let tone = if bad > 0 { Tone::Bad } else { Tone::Good };
                    format!(
                        "<td class=\"{}\">{} passed, {bad} not as expected, {} aside</td>",
                        tone.class(),
                        suite.count(Tone::Good),
                        suite.count(Tone::Aside)
                    )
                }
            };
        }
        out += "</tr>\n";
    }
    out += "</table></div>\n";
    out += &differences(runs, &names);
    out + "</section>\n"
}

fn differences(runs: &[Run], suites: &[&str]) -> String {
    let mut rows = String::new();
    // A line above says once that a run did not run a suite.
    let ran = |run: &Run, name: &str| run.verdict.suites.iter().any(|s| s.name == name);
    for name in suites.iter().filter(|name| runs.iter().all(|r| ran(r, name))) {
        let columns: Vec<BTreeMap<&str, &Test>> = runs
            .iter()
            .map(|r| {
                let tests =
                    r.verdict.suites.iter().filter(|s| s.name == *name).flat_map(|s| &s.tests);
                tests.map(|t| (t.name.as_str(), t)).collect()
            })
            .collect();
        let tests: BTreeSet<&str> = columns.iter().flat_map(|c| c.keys().copied()).collect();
        for test in tests {
            let cells: Vec<String> = columns.iter().map(|c| cell(c.get(test))).collect();
            if cells.iter().all(|c| *c == cells[0]) {
                continue;
            }
            let _ = writeln!(
                rows,
                "<tr><td class=\"test\">{}: {}</td>{}</tr>",
                escape(name),
                escape(test),
                cells.concat()
            );
        }
    }
    if rows.is_empty() {
        return "<p>Every test of these suites has the same result in all runs.</p>\n".to_owned();
    }
    let heads: Vec<String> =
        runs.iter().map(|r| format!("<th>{}</th>", escape(&r.title()))).collect();
    let heads = heads.concat();
    format!(
        "<h3>Tests that differ</h3>\n<div class=\"wide\"><table>\n<tr><th>test</th>{heads}</tr>\n{rows}</table></div>\n"
    )
}
