// SPDX-License-Identifier: GPL-2.0
//! A recorded run, which a test changes in one place before it is judged.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use regex::Regex;
use zdvm::judge::verdict::{
    Allow, Evidence, Exit, Expect, Failure, Planned, Status, Suite, Test, Verdict, judge,
};
use zdvm_guest::plan::Kind;

use crate::{MIGRATE, OPEN};

pub fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A recorded run, which a test can change.
pub struct Recorded {
    pub console: String,
    /// The messages without sequence number and checksum.
    pub wire: String,
    pub exit: Exit,
    pub planned: Planned,
    /// How many bytes are cut from the end of the stream.
    pub cut: usize,
}

pub fn fails(why: &str, how: &str) -> Expect {
    Expect::Fail(Failure { why: why.to_owned(), how: Regex::new(how).unwrap() })
}

pub fn suite(name: &str, kind: Kind, tests: &[&str]) -> Suite {
    let test = |t: &&str| Test { name: (*t).to_owned(), expect: Expect::Pass };
    Suite {
        name: name.to_owned(),
        kind,
        source: format!("expected/{name}.toml"),
        tests: tests.iter().map(test).collect(),
        deselected: BTreeSet::new(),
        with_full: 0,
        not_applicable: 0,
    }
}

impl Recorded {
    pub fn clean() -> Self {
        let tests = ["migrate.round_trip", "inject.extra_get", "generic.idle"];
        let mut selftests = suite("selftests", Kind::Ktap, &tests);
        selftests.tests[2].expect = fails("stock kernels count from one", "");
        Self {
            console: data("clean.console"),
            wire: data("clean.wire"),
            exit: Exit::Code(0),
            planned: Planned {
                kernel: "stock".to_owned(),
                machine: "default".to_owned(),
                left_out: vec![],
                suites: vec![
                    suite("kunit", Kind::Kunit, &["pool.grows", "pool.shrinks"]),
                    selftests,
                    suite("hmm", Kind::Harness, &[OPEN, MIGRATE]),
                ],
                allow: vec![Allow {
                    test: "inject.extra_get".to_owned(),
                    pattern: Regex::new("zdmirror: violation: I3").unwrap(),
                    count: 1,
                }],
                known: vec![],
                taint_before: 0x40000,
                taint_after: 0x41000,
            },
            cut: 0,
        }
    }

    pub fn judge(&self) -> Verdict {
        let mut wire = String::new();
        for (seq, payload) in self.wire.lines().enumerate() {
            let seq = seq as u64;
            let mut hash = crc32fast::Hasher::new();
            hash.update(&seq.to_le_bytes());
            hash.update(payload.as_bytes());
            wire.push_str(&format!("{seq} {:08x} {payload}\n", hash.finalize()));
        }
        let wire = &wire.as_bytes()[..wire.len() - self.cut];
        let evidence = Evidence { console: &self.console, wire, exit: self.exit.clone() };
        judge(&self.planned, &evidence)
    }

    /// Replaces text in the stream; `from` must be there.
    pub fn wire(mut self, from: &str, to: &str) -> Self {
        assert!(self.wire.contains(from), "{from} is not in the recording");
        self.wire = self.wire.replacen(from, to, 1);
        self
    }

    /// Ends the stream before a line.
    pub fn wire_until(mut self, line: &str) -> Self {
        let at = self.wire.find(line).expect("in the recording");
        self.wire.truncate(at);
        self
    }

    /// Ends the console before a text.
    pub fn console_until(mut self, text: &str) -> Self {
        let at = self.console.find(text).expect("in the recording");
        let start = self.console[..at].rfind('\n').map_or(0, |n| n + 1);
        self.console.truncate(start);
        self
    }

    /// Puts the report of a kernel into the console, before the line with a text.
    pub fn report(mut self, name: &str, before: &str) -> Self {
        let at = self.console.find(before).expect("in the recording");
        let start = self.console[..at].rfind('\n').map_or(0, |n| n + 1);
        self.console.insert_str(start, &data(name));
        self
    }

    /// Asserts that the run fails with a problem of this kind, whose text or subject contains
    /// `says`.
    #[track_caller]
    pub fn red(self, kind: &str, says: &str) -> Verdict {
        let verdict = self.judge();
        assert!(!verdict.pass());
        let fits = verdict
            .problems
            .iter()
            .any(|p| p.kind == kind && (p.text.contains(says) || p.subject.contains(says)));
        assert!(fits, "no problem {kind}: {says} in {:#?}", verdict.problems);
        verdict
    }

    /// Asserts that the run fails for this reason only.
    #[track_caller]
    pub fn red_only(self, kind: &str, says: &str) -> Verdict {
        let verdict = self.red(kind, says);
        assert_eq!(verdict.problems.len(), 1, "{:#?}", verdict.problems);
        verdict
    }
}

pub fn status(verdict: &Verdict, test: &str) -> Status {
    verdict.suites.iter().flat_map(|s| &s.tests).find(|t| t.name == test).expect("planned").status
}
