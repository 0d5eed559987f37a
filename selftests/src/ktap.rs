// SPDX-License-Identifier: GPL-2.0

//! The KTAP writer and the selection of tests by name. Documentation/dev-tools/ktap.rst of the
//! kernel describes the format.

use std::io::{self, Write};

/// The result of one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Result {
    Pass,
    Fail(Option<String>),
    Skip(String),
}

/// Writes KTAP and counts results. Every line is flushed, because the guest may die at any time.
pub struct Writer<W: Write> {
    out: W,
    number: usize,
    failed: usize,
}

impl<W: Write> Writer<W> {
    /// Writes the version and the plan of `planned` tests.
    pub fn start(mut out: W, planned: usize) -> io::Result<Self> {
        writeln!(out, "KTAP version 1")?;
        writeln!(out, "1..{planned}")?;
        out.flush()?;
        Ok(Self {
            out,
            number: 0,
            failed: 0,
        })
    }

    /// Writes diagnostics; each line of `text` becomes a line of its own.
    pub fn note(&mut self, text: &str) -> io::Result<()> {
        for line in text.lines() {
            writeln!(self.out, "# {line}")?;
        }
        self.out.flush()
    }

    /// Writes the result line of the next test.
    pub fn result(&mut self, name: &str, result: &Result) -> io::Result<()> {
        self.number += 1;
        let n = self.number;
        match result {
            Result::Pass => writeln!(self.out, "ok {n} {name}")?,
            Result::Skip(why) => writeln!(self.out, "ok {n} {name} # SKIP {}", one_line(why))?,
            Result::Fail(why) => {
                self.failed += 1;
                match why {
                    Some(why) => writeln!(self.out, "not ok {n} {name} # {}", one_line(why))?,
                    None => writeln!(self.out, "not ok {n} {name}")?,
                }
            }
        }
        self.out.flush()
    }

    /// Reports that the remaining tests cannot run.
    pub fn bail_out(&mut self, why: &str) -> io::Result<()> {
        self.failed += 1;
        writeln!(self.out, "Bail out! {}", one_line(why))?;
        self.out.flush()
    }

    /// The number of failed tests so far.
    pub fn failed(&self) -> usize {
        self.failed
    }
}

/// Joins the lines of a text, because a result is one line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The indices of the tests that `wanted` names, in the order of the table. A name selects the test
/// with exactly this name, or else all tests with this prefix. No name selects all tests. A name
/// without a test is an error, so that a typing mistake cannot look like success.
pub fn select(names: &[&str], wanted: &[String]) -> std::result::Result<Vec<usize>, String> {
    let mut chosen = vec![wanted.is_empty(); names.len()];
    for want in wanted {
        if let Some(i) = names.iter().position(|n| n == want) {
            chosen[i] = true;
            continue;
        }
        let mut any = false;
        for (i, name) in names.iter().enumerate() {
            if name.starts_with(want.as_str()) {
                chosen[i] = true;
                any = true;
            }
        }
        if !any || want.is_empty() {
            return Err(format!("no test is named or begins with '{want}'"));
        }
    }
    Ok((0..names.len()).filter(|i| chosen[*i]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_ktap() {
        let mut out = Vec::new();
        let mut w = Writer::start(&mut out, 4).unwrap();
        w.result("a.one", &Result::Pass).unwrap();
        w.note("two\nlines").unwrap();
        w.result("a.two", &Result::Fail(None)).unwrap();
        let why = Result::Fail(Some("timed\nout".into()));
        w.result("a.three", &why).unwrap();
        w.result("a.four", &Result::Skip("no swap".into())).unwrap();
        assert_eq!(w.failed(), 2);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "KTAP version 1\n1..4\nok 1 a.one\n# two\n# lines\nnot ok 2 a.two\n\
             not ok 3 a.three # timed out\nok 4 a.four # SKIP no swap\n"
        );
    }

    #[test]
    fn bail_out_counts_as_failure() {
        let mut out = Vec::new();
        let mut w = Writer::start(&mut out, 1).unwrap();
        w.bail_out("stuck").unwrap();
        assert_eq!(w.failed(), 1);
        assert!(
            String::from_utf8(out)
                .unwrap()
                .ends_with("Bail out! stuck\n")
        );
    }

    #[test]
    fn selects_by_name_and_prefix() {
        let names = ["a.x", "a.xy", "b.x"];
        let pick = |w: &[&str]| {
            let wanted: Vec<String> = w.iter().map(|s| s.to_string()).collect();
            select(&names, &wanted)
        };
        assert_eq!(pick(&[]).unwrap(), [0, 1, 2]);
        assert_eq!(pick(&["a."]).unwrap(), [0, 1]);
        assert_eq!(pick(&["a.x"]).unwrap(), [0], "an exact name is no prefix");
        assert_eq!(pick(&["b", "a.xy"]).unwrap(), [1, 2], "order of the table");
        assert!(pick(&["c"]).is_err());
        assert!(pick(&["a.x", "nope"]).is_err());
        assert!(pick(&[""]).is_err());
    }
}
