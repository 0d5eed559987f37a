// SPDX-License-Identifier: GPL-2.0
//! Draws benchmarks: one bar per row, which points to the right where this driver is faster than
//! the C driver.

use std::fmt::Write as _;

use super::escape;
use super::model::{Figure, Run, Tone};

const WIDTH: f64 = 960.0;
/// The position of a ratio of 1.
const CENTRE: f64 = 455.0;
/// The width of a ratio of 2. What remains is for the longest name and the longest row of figures.
const DOUBLE: f64 = 75.0;
/// Bars of ratios above 4 or below 1/4 are cut; the number beside the bar is the true one.
const CUT: f64 = 2.0;
const ROW: f64 = 22.0;
const HEAD: f64 = 24.0;

/// Prints bytes in the largest unit that divides them.
fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{} KiB", b >> 10),
        b => format!("{b} bytes"),
    }
}

/// The distance of a ratio from the centre; positive is faster.
fn offset(ratio: f64) -> f64 {
    if ratio > 0.0 { ratio.log2().clamp(-CUT, CUT) * DOUBLE } else { -CUT * DOUBLE }
}

/// The colour of a row. A row whose limits have 1 between them is neither faster nor slower.
fn tone(figure: &Figure) -> Tone {
    let (low, high) = limits(figure).unwrap_or((figure.ratio, figure.ratio));
    if low >= 1.0 {
        Tone::Good
    } else if high < 1.0 {
        Tone::Bad
    } else {
        Tone::Aside
    }
}

fn limits(figure: &Figure) -> Option<(f64, f64)> {
    figure.low.zip(figure.high)
}

/// Draws the limits of a row as a line.
fn range(figure: &Figure, y: f64) -> String {
    let line = |(low, high)| {
        let (from, to) = (CENTRE + offset(low), CENTRE + offset(high));
        format!(
            "<line class=\"range\" x1=\"{from:.1}\" y1=\"{y:.0}\" x2=\"{to:.1}\" y2=\"{y:.0}\"/>"
        )
    };
    limits(figure).map_or_else(String::new, line)
}

fn picture(rows: &[&Figure]) -> String {
    let mut body = String::new();
    let mut y = HEAD;
    for figure in rows {
        let at = offset(figure.ratio);
        let tone = tone(figure);
        let limits =
            limits(figure).map_or_else(String::new, |(l, h)| format!(", ratio {l:.2} to {h:.2}"));
        let range = range(figure, y + 10.0);
        let left = CENTRE + at.min(0.0);
        let _ = writeln!(
            body,
            "<text class=\"label\" x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{}\" x=\"{left:.1}\" y=\"{:.0}\" width=\"{:.1}\" height=\"14\"><title>C driver {:.1} us, \
             this driver {:.1} us, a copy of as many bytes {:.1} us{limits}</title></rect>{range}\
             <text x=\"{:.0}\" y=\"{:.0}\">{:.2}: {:.0} us, C driver {:.0} us, copy {:.0} us</text>",
            CENTRE - CUT * DOUBLE - 10.0,
            y + 14.0,
            escape(&figure.row),
            tone.class(),
            y + 3.0,
            at.abs().max(1.0),
            figure.c_us,
            figure.rust_us,
            figure.copy_us,
            CENTRE + CUT * DOUBLE + 10.0,
            y + 14.0,
            figure.ratio,
            figure.rust_us,
            figure.c_us,
            figure.copy_us
        );
        y += ROW;
    }
    let mut marks = String::new();
    for mark in [0.25, 0.5, 1.0, 2.0, 4.0] {
        let x = CENTRE + offset(mark);
        let _ = writeln!(
            marks,
            "<line class=\"axis\" x1=\"{x:.0}\" y1=\"{HEAD:.0}\" x2=\"{x:.0}\" y2=\"{y:.0}\"/>\
             <text class=\"tick\" x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{mark}</text>",
            HEAD - 8.0
        );
    }
    format!(
        "<svg class=\"bench\" role=\"img\" aria-label=\"Time of the C driver by time of this one\" \
         viewBox=\"0 0 {WIDTH:.0} {:.0}\">\n{marks}{body}</svg>\n",
        y + 6.0
    )
}

/// Draws a picture for each kind and amount of memory that was measured; nothing without
/// benchmarks.
pub fn section(run: &Run) -> String {
    let mut groups: Vec<(&str, u64)> = Vec::new();
    for figure in &run.bench {
        let group = (figure.memory.as_str(), figure.bytes);
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    if groups.is_empty() {
        return String::new();
    }
    let mut out = "<section>\n<h2>Against the C driver</h2>\n<p class=\"soft\">Time of the C driver by time \
                   of this one, both measured in this guest by turns. Above 1 this driver is faster."
        .to_owned();
    if run.bench.iter().any(|f| tone(f) == Tone::Aside) {
        out += " The thin line shows where the median of the ratios probably is. If 1 is on that line, the \
                bar is <span class=\"aside\">of this colour</span>: the two cannot be told apart.";
    }
    out += "</p>\n";
    for (memory, bytes) in groups {
        let of = |f: &&Figure| f.memory == memory && f.bytes == bytes;
        let rows: Vec<&Figure> = run.bench.iter().filter(of).collect();
        let _ = writeln!(out, "<h3>{} memory, {}</h3>", escape(memory), size(bytes));
        out += &picture(&rows);
    }
    out + "</section>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_within_their_limits_are_neither() {
        let row = |ratio, low, high| Figure {
            memory: "PRIVATE".into(),
            row: "READ".into(),
            bytes: 4096,
            c_us: ratio,
            rust_us: 1.0,
            ratio,
            low,
            high,
            copy_us: 1.0,
        };
        for (ratio, low, high, expected, text) in [
            (1.1, None, None, Tone::Good, " 1.0 us<"),
            (0.9, None, None, Tone::Bad, " 1.0 us<"),
            (1.1, Some(1.05), Some(1.2), Tone::Good, "ratio 1.05 to 1.20<"),
            (1.1, Some(0.99), Some(1.2), Tone::Aside, "ratio 0.99 to 1.20<"),
            (0.9, Some(0.85), Some(0.95), Tone::Bad, "ratio 0.85 to 0.95<"),
        ] {
            let figure = row(ratio, low, high);
            assert_eq!(tone(&figure), expected);
            assert!(picture(&[&figure]).contains(text), "{text}");
        }
    }

    #[test]
    fn sizes_and_offsets() {
        assert_eq!(size(64 << 10), "64 KiB");
        assert_eq!(size(8 << 20), "8 MiB");
        assert_eq!(size(100), "100 bytes");
        assert!(offset(1.0).abs() < 1e-9);
        assert!((offset(2.0) - DOUBLE).abs() < 1e-9);
        assert!((offset(0.5) + DOUBLE).abs() < 1e-9);
        assert!((offset(650.0) - CUT * DOUBLE).abs() < 1e-9);
        assert!((offset(0.0) + CUT * DOUBLE).abs() < 1e-9);
    }
}
