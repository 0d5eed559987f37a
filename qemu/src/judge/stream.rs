// SPDX-License-Identifier: GPL-2.0
//! Sorts the messages that a guest sent over the stream by suite.

use std::collections::BTreeMap;

use zdvm_guest::plan::AUDIT;
use zdvm_guest::wire::Message;

use crate::judge::ktap::{self, Case, Outcome};

/// The messages of one suite.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) lines: Vec<String>,
    pub(super) cases: Vec<Case>,
    pub(super) errors: Vec<String>,
    /// `Some` when the suite has ended; the inner value is the reason if it did not end in order.
    pub(super) end: Option<Option<String>>,
}

#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) hello: Option<(String, u64)>,
    pub(super) taint: Option<u64>,
    pub(super) done: bool,
    pub(super) suites: BTreeMap<String, Seen>,
    pub(super) running: Option<String>,
    pub(super) test: Option<String>,
}

impl Stream {
    /// Sorts the messages. `twice` gets subject and text of each message that came twice and may
    /// come only once.
    pub(super) fn read(messages: Vec<Message>, twice: &mut Vec<(String, &'static str)>) -> Self {
        let mut s = Self::default();
        let mut test_lines: Vec<String> = Vec::new();
        for message in messages {
            match message {
                Message::Hello { release, taint } => {
                    if s.hello.replace((release, taint)).is_some() {
                        twice.push(("guest".to_owned(), "the guest came up twice"));
                    }
                }
                Message::SuiteStart(name) => {
                    if s.suites.insert(name.clone(), Seen::default()).is_some() {
                        twice.push((name.clone(), "the suite started twice"));
                    }
                    s.running = Some(name);
                }
                Message::TestStart(name) => {
                    test_lines.clear();
                    s.test = Some(name);
                }
                Message::Ktap(line) => {
                    if s.test.is_some() {
                        test_lines.push(line);
                    } else if let Some(seen) = s.running.as_ref().and_then(|n| s.suites.get_mut(n))
                    {
                        seen.lines.push(line);
                    }
                }
                Message::TestEnd(name, why) => {
                    s.test = None;
                    if let Some(seen) = s.running.as_ref().and_then(|n| s.suites.get_mut(n)) {
                        one_process(seen, &name, &std::mem::take(&mut test_lines), why);
                    }
                }
                Message::SuiteEnd(name, why) => {
                    s.running = None;
                    s.suites.entry(name).or_default().end = Some(why);
                }
                Message::Taint(mask) => s.taint = Some(mask),
                Message::Done => s.done = true,
            }
        }
        s
    }
}

/// Judges a process that had to run exactly one test: its result line and its exit status must
/// agree.
fn one_process(seen: &mut Seen, name: &str, lines: &[String], why: Option<String>) {
    let report = ktap::parse(lines.iter().map(String::as_str));
    let mut own = report.cases.into_iter().find(|c| c.name == name).unwrap_or_else(|| Case {
        name: name.to_owned(),
        outcome: Outcome::Fail,
        reason: "its process gave no result".to_owned(),
    });
    let tail = |own: &Case| {
        if own.reason.is_empty() { String::new() } else { format!(": {}", own.reason) }
    };
    if let Some(why) = why {
        if own.outcome != Outcome::Fail {
            own.outcome = Outcome::Fail;
            let but = if why.starts_with(AUDIT) { "" } else { "reported ok, but " };
            own.reason = format!("{but}{why}");
        } else {
            own.reason = format!("{why}{}", tail(&own));
        }
    } else if own.outcome == Outcome::Fail {
        own.reason = format!("exit status 0{}", tail(&own));
    }
    if own.outcome != Outcome::Fail && !report.errors.is_empty() {
        seen.errors.extend(report.errors.into_iter().map(|e| format!("{name}: {e}")));
    }
    seen.cases.push(own);
}
