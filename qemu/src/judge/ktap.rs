// SPDX-License-Identifier: GPL-2.0
//! Reads KTAP as the kernel's `tools/testing/kunit/kunit_parser.py` does: nested by indentation,
//! several documents in a row, with other lines between them.

use std::sync::LazyLock;

use regex::Regex;

/// How many diagnostic lines a reason has at most.
const NOTES: usize = 8;

/// The outcome of a result line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `ok`.
    Pass,
    /// `not ok`, or `ok` with a directive that means a failure.
    Fail,
    /// `# SKIP`.
    Skip,
}

/// A leaf of the tree of results: one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The path joined by dots, `suite.case`.
    pub name: String,
    /// The outcome.
    pub outcome: Outcome,
    /// The text after `#` on its line, or else the diagnostic lines before it.
    pub reason: String,
}

/// The content of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The leaves, in order.
    pub cases: Vec<Case>,
    /// Errors of the document itself.
    pub errors: Vec<String>,
}

#[derive(Debug)]
struct Node {
    case: Case,
    children: Vec<Node>,
}

#[derive(Debug)]
struct Level {
    indent: usize,
    plan: Option<usize>,
    nodes: Vec<Node>,
    notes: Vec<String>,
}

impl Level {
    fn new(indent: usize) -> Self {
        Self { indent, plan: None, nodes: Vec::new(), notes: Vec::new() }
    }
}

// The patterns are constants: the tests below compile every one of them.
#[allow(clippy::expect_used)]
static RESULT: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^(ok|not ok)(?: (\d+))?(?: -)?(?: ([^#]*?))?(?:\s*# ?(.*))?$").expect("a constant")
});

fn version(text: &str) -> bool {
    text.starts_with("KTAP version ") || text.starts_with("TAP version ")
}

fn plan(text: &str) -> Option<usize> {
    text.strip_prefix("1..")?.split([' ', '#']).next()?.parse().ok()
}

/// The state of the parser.
#[derive(Debug, Default)]
struct Parser {
    levels: Vec<Level>,
    report: Report,
}

impl Parser {
    fn error(&mut self, text: String) {
        self.report.errors.push(text);
    }

    /// Closes the innermost level; its results become the children of a result one level up.
    fn close(&mut self) -> Vec<Node> {
        let Some(level) = self.levels.pop() else {
            return Vec::new();
        };
        let came = level.nodes.len();
        match level.plan {
            Some(n) if n != came => self.error(format!("plan says {n} results, {came} came")),
            None if level.indent == 0 => self.error("no plan line".to_owned()),
            _ => {}
        }
        level.nodes
    }

    /// Ends the document, innermost level first.
    fn finish(&mut self) {
        while self.levels.len() > 1 {
            let orphans = self.close();
            if !orphans.is_empty() {
                self.error("nested results without a result of their own test".to_owned());
            }
            for node in orphans {
                self.flatten(node, "");
            }
        }
        for node in self.close() {
            self.flatten(node, "");
        }
    }

    fn flatten(&mut self, node: Node, prefix: &str) {
        let name = if prefix.is_empty() {
            node.case.name.clone()
        } else {
            format!("{prefix}.{}", node.case.name)
        };
        if node.children.is_empty() {
            self.report.cases.push(Case { name, ..node.case });
            return;
        }
        let failed = node.children.iter().any(|c| c.case.outcome == Outcome::Fail);
        match (failed, node.case.outcome) {
            (true, Outcome::Pass | Outcome::Skip) => {
                self.error(format!("{name} says ok, but holds a failure"));
            }
            // A test that fails itself must be reported even if all its children passed.
            (false, Outcome::Fail) => {
                self.report.cases.push(Case { name: name.clone(), ..node.case.clone() })
            }
            _ => {}
        }
        for child in node.children {
            self.flatten(child, &name);
        }
    }

    /// The level of this indentation; makes it if it is deeper than all others.
    fn level(&mut self, indent: usize) -> &mut Level {
        if self.levels.last().is_none_or(|l| l.indent < indent) {
            self.levels.push(Level::new(indent));
        }
        let last = self.levels.len() - 1;
        &mut self.levels[last]
    }

    fn result(&mut self, indent: usize, found: &regex::Captures<'_>) {
        let mut children = Vec::new();
        while self.levels.last().is_some_and(|l| l.indent > indent) {
            let nodes = self.close();
            // Only the next deeper level has this test's own children.
            children.splice(0..0, nodes);
        }
        let word = |i| found.get(i).map_or("", |m: regex::Match<'_>| m.as_str().trim());
        let directive = word(4);
        let keyword = directive.split([' ', ':']).next().unwrap_or("").to_uppercase();
        let outcome = match (word(1), keyword.as_str()) {
            (_, "SKIP") => Outcome::Skip,
            ("ok", "XFAIL" | "TIMEOUT" | "ERROR") => Outcome::Fail,
            ("ok", _) => Outcome::Pass,
            _ => Outcome::Fail,
        };
        let level = self.level(indent);
        let expected = level.nodes.len() + 1;
        let notes = std::mem::take(&mut level.notes);
        let number: Option<usize> = word(2).parse().ok();
        let name = match word(3) {
            "" => format!("unnamed_{expected}"),
            name => name.to_owned(),
        };
        let reason = match (directive, outcome) {
            (_, Outcome::Skip) => directive[4..].trim().to_owned(),
            ("", Outcome::Fail) => shortened(&notes),
            _ => directive.to_owned(),
        };
        level.nodes.push(Node { case: Case { name: name.clone(), outcome, reason }, children });
        if number.is_some_and(|n| n != expected) {
            self.error(format!("{name} is numbered {}, not {expected}", word(2)));
        }
    }

    fn line(&mut self, line: &str) {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        let text = text.trim_end();
        if version(text) {
            if indent == 0 {
                self.finish();
            }
            self.level(indent);
        } else if let Some(count) = plan(text) {
            let twice = self.level(indent).plan.replace(count).is_some();
            if twice {
                self.error("two plan lines in one document".to_owned());
            }
        } else if let Some(found) = RESULT.captures(text) {
            // Other text may begin with "ok", too: a result has a number or a name.
            if found.get(2).is_some() || found.get(3).is_some() {
                self.result(indent, &found);
            }
        } else if let Some(note) = text.strip_prefix('#') {
            let note = note.trim();
            if !note.is_empty() && !note.starts_with("Subtest:") {
                if let Some(level) = self.levels.last_mut() {
                    level.notes.push(note.to_owned());
                }
            }
        }
    }
}

/// The first few diagnostics, which have the cause; leaves out the announcements of a harness.
fn shortened(notes: &[String]) -> String {
    let announced = |n: &&String| n.starts_with("Starting ") || n.starts_with("RUN  ");
    let telling: Vec<&str> = notes.iter().filter(|n| !announced(n)).map(String::as_str).collect();
    let mut text = telling[..telling.len().min(NOTES)].join("; ");
    if telling.len() > NOTES {
        text += &format!("; and {} more lines", telling.len() - NOTES);
    }
    text
}

/// Parses a text with any number of KTAP documents.
pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Report {
    let mut parser = Parser::default();
    for line in lines {
        parser.line(line);
    }
    parser.finish();
    parser.report
}

/// What is wrong with the totals that a kselftest program prints last, if anything. If the
/// program's exit status is lost, only the totals show that it reached its end.
pub fn wrong_totals(lines: &[String], cases: &[Case]) -> Option<String> {
    let Some(text) = lines.iter().find_map(|l| l.strip_prefix("# Totals: ")) else {
        return Some("no line with totals: the program did not come to its end".to_owned());
    };
    let said = |word: &str| {
        let value = text.split(' ').find_map(|w| w.strip_prefix(word)?.strip_prefix(':'));
        value.and_then(|v| v.parse::<usize>().ok())
    };
    let came = |outcome| Some(cases.iter().filter(|c| c.outcome == outcome).count());
    let agree = said("pass") == came(Outcome::Pass)
        && said("skip") == came(Outcome::Skip)
        && said("fail") == came(Outcome::Fail);
    (!agree).then(|| format!("its totals say {text:?}, its results do not"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(report: &Report) -> Vec<(&str, Outcome)> {
        report.cases.iter().map(|c| (c.name.as_str(), c.outcome)).collect()
    }

    #[test]
    fn kunit_debugfs_results_of_two_suites() {
        let text = "KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: pool\n    1..2\n\
                    \x20   ok 1 grows\n    ok 2 shrinks # SKIP no memory\n\
                    # pool: pass:1 fail:0 skip:1 total:2\nok 1 pool\n\
                    KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: ledger\n    1..1\n\
                    \x20   # adds: EXPECTATION FAILED at x.rs:3\n    not ok 1 adds\nnot ok 1 ledger\n";
        let report = parse(text.lines());
        assert_eq!(report.errors, Vec::<String>::new());
        assert_eq!(
            names(&report),
            [
                ("pool.grows", Outcome::Pass),
                ("pool.shrinks", Outcome::Skip),
                ("ledger.adds", Outcome::Fail)
            ]
        );
        assert_eq!(report.cases[1].reason, "no memory");
        assert_eq!(report.cases[2].reason, "adds: EXPECTATION FAILED at x.rs:3");
    }

    #[test]
    fn parameterised_cases_nest_twice() {
        let text = "KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: s\n    1..1\n\
                    \x20       KTAP version 1\n        # Subtest: p\n        1..2\n\
                    \x20       ok 1 one\n        ok 2 two\n    ok 1 p\nok 1 s\n";
        let report = parse(text.lines());
        assert_eq!(report.errors, Vec::<String>::new());
        assert_eq!(names(&report), [("s.p.one", Outcome::Pass), ("s.p.two", Outcome::Pass)]);
    }

    #[test]
    fn selftests_and_harness() {
        let text = "TAP version 13\n1..2\n# Starting 1 tests\n#  RUN x ...\nok 1 hmm.a.b\n\
                    not ok 2 - hmm.c # TIMEOUT 3 s\n# Totals: pass:1\n";
        let report = parse(text.lines());
        assert!(report.errors.is_empty());
        assert_eq!(names(&report), [("hmm.a.b", Outcome::Pass), ("hmm.c", Outcome::Fail)]);
        assert_eq!(report.cases[1].reason, "TIMEOUT 3 s");
    }

    #[test]
    fn damage_is_seen() {
        for (text, what) in [
            ("KTAP version 1\n1..3\nok 1 a\nok 2 b\n", "3 results, 2 came"),
            ("KTAP version 1\nok 1 a\n", "no plan line"),
            ("KTAP version 1\n1..2\nok 1 a\nok 3 b\n", "numbered 3"),
            ("KTAP version 1\n1..1\n1..1\nok 1 a\n", "two plan lines"),
            (
                "KTAP version 1\n1..1\n    KTAP version 1\n    1..1\n    not ok 1 b\nok 1 a\n",
                "holds a failure",
            ),
            (
                "KTAP version 1\n1..1\n    KTAP version 1\n    1..2\n    ok 1 b\n",
                "without a result of their own",
            ),
        ] {
            let report = parse(text.lines());
            assert!(report.errors.iter().any(|e| e.contains(what)), "{what}: {report:?}");
        }
    }

    #[test]
    fn failed_parent_of_good_children_is_kept() {
        let text = "KTAP version 1\n1..1\n    KTAP version 1\n    1..1\n    ok 1 b\nnot ok 1 a\n";
        let report = parse(text.lines());
        assert_eq!(names(&report), [("a", Outcome::Fail), ("a.b", Outcome::Pass)]);
    }

    #[test]
    fn prose_is_no_result() {
        let report = parse("KTAP version 1\n1..1\nok\nokay then\nok 1 a\n".lines());
        assert_eq!(names(&report), [("a", Outcome::Pass)]);
    }

    #[test]
    fn totals() {
        let lines = |totals: &str| {
            let text =
                format!("TAP version 13\n1..3\nok 1 a\nok 2 b # SKIP x\nnot ok 3 c\n{totals}");
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let cases = parse(lines("").iter().map(String::as_str)).cases;
        let says = |totals: &str| wrong_totals(&lines(totals), &cases);
        assert_eq!(says("# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:1 error:0"), None);
        for (line, why) in [
            ("", "no line with totals"),
            ("# Totals: pass:2 fail:0 xfail:0 xpass:0 skip:1 error:0", "its results do not"),
            ("# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0", "its results do not"),
            ("# Totals: ", "its results do not"),
        ] {
            assert!(says(line).is_some_and(|w| w.contains(why)), "{line}");
        }
    }

    #[test]
    fn a_reason_is_short() {
        let mut text =
            "TAP version 13\n1..1\n# Starting 1 tests\n#  RUN           a ...\n".to_owned();
        (0..100).for_each(|n| text += &format!("# x.c:{n}: Expected 1\n"));
        let report = parse((text + "not ok 1 a\n").lines());
        let reason = &report.cases[0].reason;
        assert!(reason.starts_with("x.c:0: Expected 1; x.c:1"), "{reason}");
        assert!(reason.ends_with("x.c:7: Expected 1; and 92 more lines"), "{reason}");
    }
}
