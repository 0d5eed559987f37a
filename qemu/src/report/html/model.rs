// SPDX-License-Identifier: GPL-2.0
//! What a run left in its folder, as the page needs it.

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
    /// What became of it, as verdict.json says it.
    pub status: String,
    /// Why.
    #[serde(default)]
    pub reason: String,
    /// How long it took.
    #[serde(default)]
    pub seconds: Option<f64>,
}

/// Colours of results: what a reader has to look at, and what not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tone {
    /// As it should be.
    Good,
    /// As expected, and yet no pass.
    Aside,
    /// Not as it should be.
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
    /// How the result is shown. A status that this program does not know counts as bad.
    pub fn tone(&self) -> Tone {
        match self.status.as_str() {
            "Pass" => Tone::Good,
            "ExpectedFail" | "ExpectedSkip" | "NotApplicable" => Tone::Aside,
            _ => Tone::Bad,
        }
    }
}

/// One suite's results.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Suite {
    /// Its name.
    pub name: String,
    /// How many tests were planned.
    #[serde(default)]
    pub planned: usize,
    /// How many more there are with --full.
    #[serde(default)]
    pub with_full: usize,
    /// Results in the order of the plan.
    #[serde(default)]
    pub tests: Vec<Test>,
}

impl Suite {
    /// How many results have this tone.
    pub fn count(&self, tone: Tone) -> usize {
        self.tests.iter().filter(|t| t.tone() == tone).count()
    }
}

/// Why it is not a pass.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Problem {
    /// What kind.
    pub kind: String,
    /// Suite or test that it belongs to.
    pub subject: String,
    /// In words.
    pub text: String,
}

/// verdict.json.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Verdict {
    /// Name of the kernel.
    pub kernel: String,
    /// Name of the machine.
    pub machine: String,
    /// `uname -r` of the guest.
    pub release: Option<String>,
    /// Whether it is a pass.
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
    /// Results.
    #[serde(default)]
    pub suites: Vec<Suite>,
    /// Suites that were left out as a whole, and how many tests they have.
    #[serde(default)]
    pub left_out: Vec<(String, usize)>,
    /// Why it is not a pass.
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
    /// What it works on.
    pub bytes: u64,
    /// Median of the C driver, in microseconds.
    pub c_us: f64,
    /// The same of this driver.
    pub rust_us: f64,
    /// The first by the second.
    pub ratio: f64,
    /// A plain copy of as many bytes, in microseconds.
    pub copy_us: f64,
}

/// A stretch of the guest's time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The test, or the suite of a kind that is one bracket.
    pub name: String,
    /// Seconds since the guest's kernel started.
    pub begin: f64,
    /// The same; where the end is missing, the last stamp of the log.
    pub end: f64,
    /// Whether the end was seen.
    pub ended: bool,
}

/// A run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Its folder's name.
    pub folder: String,
    /// What was judged.
    pub verdict: Verdict,
    /// The kernel log, stacks decoded where that was possible.
    pub log: Vec<String>,
    /// What benchmarks said.
    pub figures: Vec<String>,
    /// Those of them that compare with the C driver.
    pub bench: Vec<Figure>,
    /// When which test ran.
    pub spans: Vec<Span>,
}

impl Run {
    /// Reads a run's folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let json = dir.join("verdict.json");
        let text =
            fs::read_to_string(&json).with_context(|| format!("reading {}", json.display()))?;
        let verdict: Verdict =
            serde_json::from_str(&text).with_context(|| format!("reading {}", json.display()))?;
        let console = read(dir, "console.log");
        let decoded = read(dir, "console.decoded.log");
        // Line numbers of the verdict are those of the raw log.
        let fits = decoded.lines().count() == console.lines().count();
        let log = if fits { &decoded } else { &console };
        let (mut figures, mut bench) = (Vec::new(), Vec::new());
        for suite in &verdict.suites {
            let ktap = read(dir, &format!("{}.ktap", suite.name));
            let figure = |l: &str| {
                Some(l.trim_start_matches('#').trim().strip_prefix("bench: ")?.to_owned())
            };
            figures.extend(ktap.lines().filter_map(figure));
            let row = |l: &str| {
                let json = l.trim_start_matches('#').trim().strip_prefix("bench-json: ")?;
                serde_json::from_str(json).ok()
            };
            bench.extend(ktap.lines().filter_map(row));
        }
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

    /// "stock on default", to tell columns apart.
    pub fn title(&self) -> String {
        format!("{} on {}", self.verdict.kernel, self.verdict.machine)
    }
}

fn read(dir: &Path, file: &str) -> String {
    let bytes = fs::read(dir.join(file)).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The time stamp of a line of the log, in seconds.
pub fn stamp(line: &str) -> Option<f64> {
    let (stamp, _) = line.trim_start().strip_prefix('[')?.split_once(']')?;
    stamp.trim().parse().ok()
}

/// When which test ran, from the brackets in the log.
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
