// SPDX-License-Identifier: GPL-2.0
//! Finds the reports of a kernel by their text.
//!
//! The taint flags are not enough: lockdep, RCU, hung task, UBSAN, KCSAN and kmemleak reports set
//! none.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

/// One report in the kernel log.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Splat {
    /// The line in the console log, counted from 1.
    pub line: usize,
    /// The kind of report.
    pub kind: &'static str,
    /// The line without its time stamp, with Rust symbols demangled.
    pub text: String,
    /// The test that was running.
    pub test: Option<String>,
    /// The function and place that the report names, if any.
    pub place: Option<String>,
}

/// The kind of a KUnit case that fails.
pub const KUNIT: &str = "KUnit failure in the log";

/// The kinds in order of precedence: the first pattern that matches names the line. `^` is the
/// start of the message, behind the time stamp.
const KINDS: &[(&str, &str)] = &[
    ("invariant violated", r"zdmirror: (violation:|pagemap at .* stays registered)"),
    ("kernel panic", r"Kernel panic - not syncing"),
    ("Rust panic", r"rust_kernel: panicked|panicked at "),
    ("KASAN", r"BUG: KASAN:"),
    ("KCSAN", r"BUG: KCSAN:"),
    ("KFENCE", r"BUG: KFENCE:"),
    ("KMSAN", r"BUG: KMSAN:"),
    ("UBSAN", r"^UBSAN:"),
    ("kmemleak", r"kmemleak: \d+ new suspected memory leak"),
    (
        "lockdep",
        r"WARNING: (possible (circular|irq|recursive)|inconsistent lock|suspicious RCU|bad unlock|held lock freed|lock held|bad contention|Nested lock|.*locking bug)|INFO: possible (circular|recursive) locking|possible (circular locking|recursive locking|irq lock inversion)|inconsistent lock state|suspicious RCU usage|bad unlock balance|lock held when returning|still has locks held|held lock freed|Invalid wait context|INFO: trying to register non-static key|DEBUG_LOCKS_WARN_ON",
    ),
    ("sleeping in atomic", r"BUG: sleeping function called|scheduling while atomic"),
    (
        "RCU stall",
        r"rcu: INFO: rcu\w* (self-)?detected|detected (expedited )?stalls? on|rcu.*kthread starved",
    ),
    ("hung task", r"INFO: task .* blocked for more than"),
    ("soft lockup", r"BUG: soft lockup|BUG: workqueue lockup"),
    ("hard lockup", r"hard LOCKUP"),
    ("refcount", r"^refcount_t:"),
    ("list corruption", r"^list_(add|del)\w* corruption|^list_(add|del)\w* double"),
    ("bad page", r"BUG: Bad page|Bad page state|^page dumped because"),
    (
        "bad access",
        r"[Uu]nable to handle|general protection fault|double fault|stack segment:|invalid opcode:|divide error:|int3:",
    ),
    ("oops", r"^Oops|^Internal error"),
    ("BUG", r"^kernel BUG at|BUG: |^BUG "),
    ("WARN", r"^WARNING: "),
    ("out of memory", r"page allocation failure|invoked oom-killer|Out of memory: Killed"),
    ("stuck interrupt", r"nobody cared"),
];

/// The patterns of the kinds and of the brackets, compiled once.
struct Table {
    kinds: Vec<(&'static str, Regex)>,
    stamp: Regex,
    seconds: Regex,
    bracket: Regex,
    kunit: Regex,
    place: Regex,
}

// The patterns are constants: the tests below compile every one of them.
#[allow(clippy::expect_used)]
static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let re = |text: &str| Regex::new(text).expect("a constant pattern");
    Table {
        kinds: KINDS.iter().map(|&(kind, text)| (kind, re(text))).collect(),
        stamp: re(r"^(<\d+>)?\[ *\d+\.\d+\](\[ *[TC]\d+\])? ?"),
        seconds: re(r"\[ *(\d+\.\d+)\]"),
        bracket: re(r"(?:zdm-selftests|zdvm-guest): (begin|end) (\S+)"),
        kunit: re(r"^ *not ok \d+"),
        place: re(r"^(?:RIP: [0-9a-f]{4}:)(\S+)"),
    }
});

/// A line of the log without carriage return and time stamp.
pub fn message(line: &str) -> &str {
    let line = line.trim_end_matches(['\r', '\n']);
    &line[TABLE.stamp.find(line).map_or(0, |m| m.end())..]
}

/// Replaces mangled Rust symbols in a line.
pub fn demangle(line: &str) -> String {
    let symbol = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.' || c == '$';
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("_R").into_iter().chain(rest.find("_ZN")).min() {
        out.push_str(&rest[..at]);
        let tail = &rest[at..];
        let end = tail.find(|c| !symbol(c)).unwrap_or(tail.len());
        match rustc_demangle::try_demangle(&tail[..end]) {
            Ok(name) => out.push_str(&format!("{name:#}")),
            Err(_) => out.push_str(&tail[..end]),
        }
        rest = &tail[end..];
    }
    out + rest
}

/// The duration in seconds of every test that has brackets in a console log.
pub fn times(console: &str) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    let mut begin: Option<(String, f64)> = None;
    for line in console.lines() {
        let text = message(line);
        let Some(found) = TABLE.bracket.captures(text) else { continue };
        let stamp = &line[..line.len().min(line.find(text).unwrap_or_default())];
        let Some(now) = TABLE.seconds.captures(stamp).and_then(|c| c[1].parse::<f64>().ok()) else {
            continue;
        };
        if &found[1] == "begin" {
            begin = Some((found[2].to_owned(), now));
        } else if let Some((name, since)) = begin.take().filter(|(name, _)| *name == found[2]) {
            out.insert(name, now - since);
        }
    }
    out
}

/// The kind of the report that a line of the log begins, if any.
pub fn kind(line: &str) -> Option<&'static str> {
    let text = message(line);
    let kind = TABLE.kinds.iter().find(|(_, re)| re.is_match(text)).map(|(kind, _)| *kind);
    kind.or(TABLE.kunit.is_match(text).then_some(KUNIT))
}

/// Whether a line of the log is the bracket at a test's begin (true) or end (false), and the test's
/// name.
pub fn bracket(line: &str) -> Option<(bool, String)> {
    let found = TABLE.bracket.captures(message(line))?;
    Some((&found[1] == "begin", found[2].to_owned()))
}

/// Finds all reports in a console log.
pub fn scan(console: &str) -> Vec<Splat> {
    let mut out: Vec<Splat> = Vec::new();
    let mut test: Option<String> = None;
    for (index, line) in console.lines().enumerate() {
        let text = message(line);
        if let Some(found) = TABLE.bracket.captures(text) {
            test = (&found[1] == "begin").then(|| found[2].to_owned());
            continue;
        }
        if let Some(found) = TABLE.place.captures(text) {
            // Several lines of one report may match the table. All of them get the place of the
            // report.
            for near in out.iter_mut().rev().take_while(|s| index - s.line < 40) {
                near.place.get_or_insert_with(|| demangle(&found[1]));
            }
        }
        // KUnit runs again whenever the module is loaded. The results of the first run, whose
        // bracket has the name of the suite, are judged as results; a failure in a later run is a
        // report.
        if let Some(kind) = kind(line).filter(|k| *k != KUNIT || test.as_deref() != Some("kunit")) {
            out.push(Splat {
                line: index + 1,
                kind,
                text: demangle(text),
                test: test.clone(),
                place: None,
            });
        }
    }
    out
}

/// The test whose bracket is open at the end of the log.
pub fn open_test(console: &str) -> Option<String> {
    let mut test = None;
    for line in console.lines() {
        if let Some(found) = TABLE.bracket.captures(message(line)) {
            test = (&found[1] == "begin").then(|| found[2].to_owned());
        }
    }
    test
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kind has an example, as a kernel prints it.
    #[test]
    fn every_kind_has_a_line() {
        let lines = [
            (
                "invariant violated",
                "zdmirror: violation: I5 idle pfn=0x100 order=0 type=PRIVATE check=refcount expected=0 found=1",
            ),
            (
                "kernel panic",
                "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
            ),
            ("Rust panic", "rust_kernel: panicked at rust/driver/pool.rs:10:5:"),
            ("KASAN", "BUG: KASAN: slab-use-after-free in foo+0x12/0x40"),
            ("KCSAN", "BUG: KCSAN: data-race in a / b"),
            ("KFENCE", "BUG: KFENCE: use-after-free read in test+0x1/0x2"),
            ("KMSAN", "BUG: KMSAN: uninit-value in foo"),
            ("UBSAN", "UBSAN: array-index-out-of-bounds in mm/x.c:3:4"),
            ("kmemleak", "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)"),
            ("lockdep", "WARNING: possible circular locking dependency detected"),
            ("lockdep", "WARNING: possible recursive locking detected"),
            ("lockdep", "WARNING: inconsistent lock state"),
            ("lockdep", "WARNING: suspicious RCU usage"),
            ("lockdep", "WARNING: bad unlock balance detected!"),
            ("lockdep", "WARNING: held lock freed!"),
            (
                "sleeping in atomic",
                "BUG: sleeping function called from invalid context at mm/x.c:1",
            ),
            ("sleeping in atomic", "BUG: scheduling while atomic: sh/1/0x00000002"),
            ("RCU stall", "rcu: INFO: rcu_sched self-detected stall on CPU"),
            ("RCU stall", "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
            ("hung task", "INFO: task rmmod:77 blocked for more than 120 seconds."),
            ("soft lockup", "watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [x:1]"),
            ("refcount", "refcount_t: underflow; use-after-free."),
            ("refcount", "refcount_t: saturated; leaking memory."),
            ("list corruption", "list_del corruption. prev->next should be a, but was b"),
            ("bad page", "BUG: Bad page state in process hmm-tests  pfn:7ff00"),
            ("bad page", "page dumped because: nonzero mapcount"),
            ("bad access", "BUG: unable to handle page fault for address: ffffeb0000000008"),
            ("bad access", "BUG: kernel NULL pointer dereference, address: 0000000000000008"),
        ];
        for (kind, line) in lines {
            let log = format!("[    1.234567] {line}\r\n");
            let found = scan(&log);
            let kind = if line.contains("NULL pointer") { "BUG" } else { kind };
            assert_eq!(found.iter().map(|s| s.kind).collect::<Vec<_>>(), [kind], "{line}");
        }
        for (kind, line) in [
            ("bad access", "general protection fault, maybe for address 0x1: 0000 [#1] SMP"),
            ("bad access", "Oops: general protection fault, probably for non-canonical address"),
            ("bad access", "traps: PANIC: double fault, error_code: 0x0"),
            ("oops", "Oops: Oops: 0000 [#1] SMP NOPTI"),
            ("BUG", "kernel BUG at mm/memremap.c:12!"),
            ("WARN", "WARNING: CPU: 0 PID: 1 at mm/memremap.c:40 f+0x1/0x2"),
            ("WARN", "WARNING: mm/memremap.c:40 at f+0x1/0x2, CPU#0: sh/1"),
            ("out of memory", "Out of memory: Killed process 3 (x)"),
            ("hard lockup", "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0"),
            ("stuck interrupt", "irq 11: nobody cared (try booting with the \"irqpoll\" option)"),
        ] {
            let found = scan(&format!("[    0.1][   T1] {line}\n"));
            assert_eq!(found.iter().map(|s| s.kind).collect::<Vec<_>>(), [kind], "{line}");
        }
    }

    #[test]
    fn ordinary_lines_are_clean() {
        let log = "[    0.000000] Linux version 7.3.4 (zdvm@zdvm)\n\
                   [    0.10] Spectre V2 : Mitigation: Retpolines\n\
                   [    0.20] debug: unmapping init [mem 0xa-0xb]\n\
                   [    0.30] zdmirror: loading out-of-tree module taints kernel.\n\
                   [    0.40] ok 1 pool\n\
                   [    0.50] printk: legacy console [ttyS0] enabled\n\
                   [    0.60] WARNINGS are fine\n\
                   [    0.70] reboot: Power down\n";
        assert_eq!(scan(log), []);
    }

    #[test]
    fn the_running_test_and_place_are_named() {
        let log = "[ 1.0] zdvm-guest: begin hmm.a\n\
                   [ 1.1] BUG: unable to handle page fault for address: 0000000000000008\n\
                   [ 1.2] RIP: 0010:_RNvNtCs9ltgdHTiPiY_8zdmirror4pool5alloc+0x12/0x30\n\
                   [ 1.3] zdvm-guest: end hmm.a\n\
                   [ 1.4] WARNING: CPU: 0 PID: 9 at mm/x.c:1 f+0x0/0x1\n";
        let found = scan(log);
        assert_eq!(found[0].test.as_deref(), Some("hmm.a"));
        assert_eq!(found[0].place.as_deref(), Some("zdmirror::pool::alloc+0x12/0x30"));
        assert_eq!(found[1].test, None);
        assert_eq!(open_test(log), None);
        assert_eq!(open_test(&log[..60]).as_deref(), Some("hmm.a"));
    }

    #[test]
    fn kunit_failures_count_outside_their_suite_only() {
        let log = "[1.0] zdvm-guest: begin kunit\n[1.1]     not ok 1 a\n[1.2] zdvm-guest: end kunit\n\
                   [1.3] zdm-selftests: begin x\n[1.4]     not ok 1 a\n";
        let found = scan(log);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].test.as_deref(), Some("x"));
    }

    #[test]
    fn times_of_tests() {
        let log = "[    1.000000] zdvm-guest: begin hmm.a\n[    1.5] noise\n\
                   <5>[    3.250000][   T1] zdvm-guest: end hmm.a\r\n\
                   [    4.000000] zdvm-guest: begin hmm.b\n\
                   [    5.000000] zdvm-guest: begin hmm.c\n[    5.500000] zdvm-guest: end hmm.c\n\
                   [    6.000000] zdvm-guest: end hmm.d\nzdvm-guest: begin hmm.e\n";
        let times: Vec<_> = times(log).into_iter().collect();
        assert_eq!(times, [("hmm.a".to_owned(), 2.25), ("hmm.c".to_owned(), 0.5)]);
    }
}
