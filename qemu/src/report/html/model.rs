// SPDX-License-Identifier: GPL-2.0
//! The data that a run left in its folder, as the page needs it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::judge::splat;

/// One test's result.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Test {
    /// Its name.
    pub name: String,
    /// Its status, as verdict.json has it.
    pub status: String,
    /// The reason.
    #[serde(default)]
    pub reason: String,
    /// Its duration.
    #[serde(default)]
    pub seconds: Option<f64>,
}

/// The colour of a result: whether a reader has to look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tone {
    /// The result is as it should be.
    Good,
    /// The result is the expected one, but no pass.
    Aside,
    /// The result is not as it should be.
    Bad,
}

impl Tone {
    /// The class in the style sheet.
    pub fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Aside => "aside",
            Self::Bad => "bad",
        }
    }
}

impl Test {
    /// The colour of the result. An unknown status counts as bad.
    pub fn tone(&self) -> Tone {
        match self.status.as_str() {
            "Pass" => Tone::Good,
            "ExpectedFail" | "ExpectedSkip" | "NotApplicable" => Tone::Aside,
            _ => Tone::Bad,
        }
    }
}

/// The results of one suite.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Suite {
    /// Its name.
    pub name: String,
    /// How many tests were planned.
    #[serde(default)]
    pub planned: usize,
    /// How many more tests run with --full.
    #[serde(default)]
    pub with_full: usize,
    /// The results in the order of the plan.
    #[serde(default)]
    pub tests: Vec<Test>,
}

impl Suite {
    /// How many results have this colour.
    pub fn count(&self, tone: Tone) -> usize {
        self.tests.iter().filter(|t| t.tone() == tone).count()
    }
}

/// A reason why the verdict is no pass.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Problem {
    /// Its kind.
    pub kind: String,
    /// The suite or test that it belongs to.
    pub subject: String,
    /// Its text.
    pub text: String,
}

/// The content of verdict.json.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Verdict {
    /// The name of the kernel.
    pub kernel: String,
    /// The name of the machine.
    pub machine: String,
    /// `uname -r` of the guest.
    pub release: Option<String>,
    /// Whether the verdict is a pass.
    pub pass: bool,
    /// How QEMU ran the guest.
    #[serde(default)]
    pub accel: String,
    /// How QEMU ended.
    #[serde(default)]
    pub exit: String,
    /// Seconds from start to end of QEMU.
    #[serde(default)]
    pub seconds: f64,
    /// The results.
    #[serde(default)]
    pub suites: Vec<Suite>,
    /// The suites that were left out as a whole, each with its number of tests.
    #[serde(default)]
    pub left_out: Vec<(String, usize)>,
    /// The reasons why the verdict is no pass.
    #[serde(default)]
    pub problems: Vec<Problem>,
}

/// A row of the suite `versus`, as the test prints it after `bench-json:`.
#[derive(Clone, Debug, Deserialize)]
pub struct Figure {
    /// The type of memory.
    pub memory: String,
    /// The operation.
    pub row: String,
    /// The number of bytes that the operation works on.
    pub bytes: u64,
    /// The median of the C driver, in microseconds.
    pub c_us: f64,
    /// The median of this driver, in microseconds.
    pub rust_us: f64,
    /// The C driver's time divided by this driver's.
    pub ratio: f64,
    /// The limits within which the median of the ratios is probably. Older runs do not have them.
    #[serde(default)]
    pub low: Option<f64>,
    #[serde(default)]
    pub high: Option<f64>,
    /// The time of a plain copy of as many bytes, in microseconds.
    pub copy_us: f64,
}

/// A span of the guest's time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The test, or the suite if it has only one bracket.
    pub name: String,
    /// The beginning, in seconds since the guest's kernel started.
    pub begin: f64,
    /// The end, in the same unit; the last time stamp of the log if the end is missing.
    pub end: f64,
    /// Whether the log has the end.
    pub ended: bool,
}

/// A run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// The name of its folder.
    pub folder: String,
    /// The verdict.
    pub verdict: Verdict,
    /// The kernel log, with decoded stacks if possible.
    pub log: Vec<String>,
    /// The output lines of benchmarks.
    pub figures: Vec<String>,
    /// The lines that compare with the C driver.
    pub bench: Vec<Figure>,
    /// The time span of each test.
    pub spans: Vec<Span>,
}

impl Run {
    /// Reads the folder of a run.
    pub fn read(dir: &Path) -> Result<Self> {
        let json = dir.join("verdict.json");
        let text = fs::read_to_string(&json).with_context(|| {
            format!("no verdict in {}: not the folder of a run that has ended", dir.display())
        })?;
        let verdict: Verdict =
            serde_json::from_str(&text).with_context(|| format!("reading {}", json.display()))?;
        let console = read(dir, "console.log");
        let decoded = read(dir, "console.decoded.log");
        // The verdict's line numbers are those of the raw log.
        let fits = decoded.lines().count() == console.lines().count();
        let log = if fits { &decoded } else { &console };
        let (mut figures, mut bench) = (Vec::new(), Vec::new());
        for suite in &verdict.suites {
            let ktap = read(dir, &format!("{}.ktap", suite.name));
            figures.extend(ktap.lines().filter_map(|l| said(l, "bench: ")).map(str::to_owned));
            let rows = ktap.lines().filter_map(|l| said(l, "bench-json: "));
            bench.extend(rows.filter_map(|json| serde_json::from_str(json).ok()));
        }
        // The chart has the rows.
        let drawn: Vec<String> =
            bench.iter().map(|f: &Figure| format!("{} {}: ", f.memory, f.row)).collect();
        figures.retain(|text| !drawn.iter().any(|row| text.starts_with(row)));
        let name = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        Ok(Self {
            folder: name.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            verdict,
            spans: spans(&console),
            log: log.lines().map(|l| splat::demangle(l.trim_end())).collect(),
            figures,
            bench,
        })
    }

    /// The title of a column, such as "stock on default".
    pub fn title(&self) -> String {
        format!("{} on {}", self.verdict.kernel, self.verdict.machine)
    }
}

fn read(dir: &Path, file: &str) -> String {
    let bytes = fs::read(dir.join(file)).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a test says under a key, in a comment line such as "# TEST: KEY text".
fn said<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (test, text) = line.trim_start().strip_prefix('#')?.split_once(key)?;
    (test.trim().is_empty() || test.ends_with(": ")).then_some(text)
}

/// The time stamp of a line of the log, in seconds.
pub fn stamp(line: &str) -> Option<f64> {
    let (stamp, _) = line.trim_start().strip_prefix('[')?.split_once(']')?;
    stamp.trim().parse().ok()
}

/// The time span of each test, from the brackets in the log.
pub fn spans(console: &str) -> Vec<Span> {
    let mut out: Vec<Span> = Vec::new();
    let mut last = 0.0;
    for line in console.lines() {
        let Some(now) = stamp(line) else { continue };
        last = now;
        match splat::bracket(line) {
            Some((true, name)) => out.push(Span { name, begin: now, end: now, ended: false }),
            Some((false, name)) => {
                let open = out.iter_mut().rev().find(|s| !s.ended && s.name == name);
                if let Some(span) = open {
                    (span.end, span.ended) = (now, true);
                }
            }
            None => {}
        }
    }
    for span in out.iter_mut().filter(|s| !s.ended) {
        span.end = last;
    }
    out
}
