// SPDX-License-Identifier: GPL-2.0
//! Watches a guest that runs with a bug, and ends it once the bug is found.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use zdvm_guest::wire::Message;

use crate::judge::splat;
use crate::plan::planned::{Expect, Planned};
use crate::vm::Watcher;

/// How long the guest runs on after a report in its log: the running test may fail, too.
const MORE: Duration = Duration::from_secs(4);
/// How long the guest runs on after that test has ended.
const LAST: Duration = Duration::from_millis(500);

/// A line of the log without the parts that differ between boots.
pub fn shape(line: &str) -> String {
    let mut out = String::new();
    for word in splat::message(line).split_whitespace() {
        // Replaces all numbers, those of processes and processors among them.
        let plain: String = word
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|part| !part.bytes().any(|b| b.is_ascii_digit()))
            .collect::<Vec<_>>()
            .join("-");
        out.push_str(&plain);
        out.push(' ');
    }
    out
}

/// The line by which the kernel says that the bug was reached.
pub fn reached_line(mutant: &str) -> String {
    format!("zdm_mutant: {mutant} reached")
}

/// Decides when a boot has shown enough.
#[derive(Debug)]
pub struct Lookout<'a> {
    planned: &'a Planned,
    /// The shapes of lines that come without any bug.
    usual: &'a BTreeSet<String>,
    reached: String,
    met: bool,
    refused: bool,
    /// Whether each result comes from a program that runs one test.
    by_process: bool,
    partial: String,
    test: Option<String>,
    until: Option<Instant>,
}

impl<'a> Lookout<'a> {
    /// Watches for one bug.
    pub fn new(planned: &'a Planned, usual: &'a BTreeSet<String>, mutant: &str) -> Self {
        use zdvm_guest::plan::Kind;
        Self {
            planned,
            usual,
            reached: reached_line(mutant),
            met: false,
            refused: false,
            by_process: planned.suites.iter().any(|s| s.kind == Kind::Harness),
            partial: String::new(),
            test: None,
            until: None,
        }
    }

    /// Whether the kernel does not know the bug.
    pub fn refused(&self) -> bool {
        self.refused
    }

    fn found(&mut self, go_on: Duration) {
        if self.met {
            let until = Instant::now() + go_on;
            self.until = Some(self.until.map_or(until, |u| u.min(until)));
        }
    }

    fn line(&mut self, line: &str) {
        if let Some((begin, name)) = splat::bracket(line) {
            self.test = begin.then_some(name);
            return;
        }
        let text = splat::message(line);
        if text.starts_with("zdm_mutant: there is no mutant") {
            self.refused = true;
        }
        if text.ends_with(&self.reached) {
            self.met = true;
        }
        if splat::kind(line).is_some() && !self.deliberate(text) {
            self.found(MORE);
        }
    }

    fn deliberate(&self, text: &str) -> bool {
        self.planned.known.iter().any(|k| k.pattern.is_match(text))
            || self
                .planned
                .allow
                .iter()
                .any(|a| Some(a.test.as_str()) == self.test.as_deref() && a.pattern.is_match(text))
            || self.usual.contains(&shape(text))
    }

    /// Whether a line of KTAP is a result that the plan does not allow.
    fn bad(&self, line: &str) -> bool {
        let (bad, rest) = match (line.strip_prefix("not ok "), line.strip_prefix("ok ")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (rest.contains("# SKIP"), rest),
            _ => return false,
        };
        let name = rest.split_whitespace().nth(1).unwrap_or_default();
        let mut tests = self.planned.suites.iter().flat_map(|s| &s.tests);
        bad && tests.any(|t| t.name == name && t.expect == Expect::Pass)
    }
}

impl Watcher for Lookout<'_> {
    fn message(&mut self, message: &Message) {
        match message {
            Message::Ktap(line) if !self.by_process && self.bad(line) => self.found(LAST),
            Message::TestEnd(_, Some(_)) => self.found(LAST),
            _ => {}
        }
    }

    fn console(&mut self, more: &str) {
        self.partial.push_str(more);
        let text = std::mem::take(&mut self.partial);
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        for line in text[..whole].lines() {
            self.line(line);
        }
        text[whole..].clone_into(&mut self.partial);
    }

    fn enough(&self) -> bool {
        self.refused || self.until.is_some_and(|until| Instant::now() > until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::planned::{Allow, Suite, Test};
    use zdvm_guest::plan::Kind;

    fn planned() -> Planned {
        let test = |name: &str, expect| Test { name: name.to_owned(), expect };
        #[allow(clippy::unwrap_used)] // A constant.
        let how = regex::Regex::new("").unwrap();
        let known = Expect::Fail(crate::plan::planned::Failure { why: "known".into(), how });
        let suite = Suite {
            name: "selftests".into(),
            kind: Kind::Ktap,
            source: String::new(),
            tests: vec![
                test("a.b", Expect::Pass),
                test("a.weak", known),
                test("a.none", Expect::Skip("known".into())),
            ],
            deselected: BTreeSet::new(),
            with_full: 0,
            not_applicable: 0,
        };
        let allow = Allow {
            test: "inject.x".into(),
            #[allow(clippy::unwrap_used)] // A constant.
            pattern: regex::Regex::new("violation: I5").unwrap(),
            count: 1,
        };
        Planned { suites: vec![suite], allow: vec![allow], ..Planned::default() }
    }

    /// Whether these lines (KTAP behind a `>`) are enough.
    fn seen(lines: &[&str]) -> bool {
        let (planned, usual) = (planned(), BTreeSet::from([shape("[1.0] WARNING: at f+0x1/0x2")]));
        let mut lookout = Lookout::new(&planned, &usual, "lost");
        for line in lines {
            match line.strip_prefix('>') {
                Some(ktap) => lookout.message(&Message::Ktap(ktap.to_owned())),
                None => lookout.console(&format!("[    1.5] {line}\r\n")),
            }
        }
        lookout.until.is_some()
    }

    const REACHED: &str = "zdm_mutant: lost reached";

    #[test]
    fn results_and_lines_after_the_bug_was_reached() {
        for line in
            [">not ok 1 a.b", ">ok 1 a.b # SKIP why", "BUG: Bad page state in x", "Oops: 0 [#1]"]
        {
            assert!(seen(&[REACHED, line]), "{line}");
            assert!(!seen(&[line]), "{line} before it");
            assert!(!seen(&[line, "zdm_mutant: lost_thp reached"]), "{line}: another bug");
        }
    }

    #[test]
    fn what_is_expected_is_no_find() {
        for line in [
            ">ok 1 a.b",
            ">not ok 2 a.weak",
            ">ok 3 a.none # SKIP known",
            ">not ok 4 other",
            "WARNING: at f+0x7/0x9",
            "all is well",
        ] {
            assert!(!seen(&[REACHED, line]), "{line}");
        }
        let violation = "zdmirror: violation: I5 idle pfn=0x1";
        assert!(!seen(&[REACHED, "zdm-selftests: begin inject.x", violation]));
        assert!(seen(&[REACHED, "zdm-selftests: begin inject.y", violation]));
    }

    #[test]
    fn a_line_may_come_in_pieces() {
        let (planned, usual) = (planned(), BTreeSet::new());
        let mut lookout = Lookout::new(&planned, &usual, "lost");
        for piece in ["[1.0] zdm_mutant: lo", "st reached\n[1.1] kernel B", "UG at mm/x.c:1!"] {
            lookout.console(piece);
        }
        assert!(lookout.met && lookout.until.is_none());
        lookout.console("\n");
        assert!(lookout.until.is_some() && !lookout.refused());
        lookout.console("[1.2] zdm_mutant: there is no mutant \"x\"\n");
        assert!(lookout.refused() && lookout.enough());
    }
}
