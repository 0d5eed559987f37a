// SPDX-License-Identifier: GPL-2.0
//! Draws the guest's time: one band per suite, one bar per test.

use std::fmt::Write as _;

use super::escape;
use super::model::{Run, Tone};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 110.0;
const BAND: f64 = 30.0;
const HEAD: f64 = 8.0;

/// The step between marks of the axis, such that there are between four and ten marks.
fn step(seconds: f64) -> f64 {
    let steps = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];
    steps.into_iter().find(|s| seconds / s <= 10.0).unwrap_or(1800.0)
}

/// Draws the time line as inline SVG; nothing if the log has no test.
pub fn svg(run: &Run) -> String {
    let Some(end) = run.spans.iter().map(|s| s.end).reduce(f64::max).filter(|e| *e > 0.0) else {
        return String::new();
    };
    // A bracket that belongs to no suite (a program's own) gets a band of its own.
    let suite_of = |name: &str| {
        let suites = &run.verdict.suites;
        let has =
            |s: &&super::model::Suite| s.name == name || s.tests.iter().any(|t| t.name == name);
        suites.iter().find(has).map_or("other", |s| s.name.as_str())
    };
    let mut bands: Vec<&str> = Vec::new();
    for span in &run.spans {
        let suite = suite_of(&span.name);
        if !bands.contains(&suite) {
            bands.push(suite);
        }
    }
    let x = |seconds: f64| LEFT + seconds / end * (WIDTH - LEFT - 10.0);
    let mut height = HEAD;
    let mut body = String::new();
    for band in &bands {
        let _ = writeln!(
            body,
            "<text class=\"label\" x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            height + 18.0,
            escape(band)
        );
        for span in run.spans.iter().filter(|s| suite_of(&s.name) == *band) {
            let tone = run
                .verdict
                .suites
                .iter()
                .flat_map(|s| &s.tests)
                .find(|t| t.name == span.name)
                .map_or(if span.ended { Tone::Good } else { Tone::Bad }, |t| t.tone());
            let width = (x(span.end) - x(span.begin)).max(1.0);
            let note = if span.ended { "" } else { ", did not end" };
            let _ = writeln!(
                body,
                "<rect class=\"{}\" x=\"{:.1}\" y=\"{:.0}\" width=\"{width:.1}\" height=\"20\"><title>{}: \
                 {:.2} s, from {:.2} s on{note}</title></rect>",
                tone.class(),
                x(span.begin),
                height + 4.0,
                escape(&span.name),
                span.end - span.begin,
                span.begin
            );
        }
        height += BAND;
    }
    let step = step(end);
    let mut mark = 0.0;
    while mark <= end {
        let at = x(mark);
        let digits = usize::from(step < 1.0);
        let _ = writeln!(
            body,
            "<line class=\"axis\" x1=\"{at:.1}\" y1=\"{HEAD}\" x2=\"{at:.1}\" y2=\"{height:.0}\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{mark:.digits$} s</text>",
            height + 14.0
        );
        mark += step;
    }
    format!(
        "<svg class=\"timeline\" role=\"img\" aria-label=\"Timeline of the guest\" viewBox=\"0 0 {WIDTH} {:.0}\">\n{body}</svg>\n",
        height + 20.0
    )
}
