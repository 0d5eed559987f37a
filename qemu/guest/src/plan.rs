// SPDX-License-Identifier: GPL-2.0
//! The guest's instructions, as a small text file in its initramfs.

use std::fmt::Write as _;

/// Path of the plan in the guest.
pub const PATH: &str = "/zdvm.plan";
/// Path of the module in the guest.
pub const MODULE: &str = "/lib/modules/zdmirror.ko";
/// Environment variable with the module's parameters, for programs that load it themselves.
pub const PARAMS_ENV: &str = "ZDM_MODULE_PARAMS";
/// The prefix of a reason that comes from the audit after a test.
pub const AUDIT: &str = "audit: ";

/// The way in which a suite runs and in which its results arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// KUnit suites of the module, which run when the module is loaded.
    Kunit,
    /// A program that runs its own tests and prints KTAP. The module is not loaded when it starts.
    Ktap,
    /// A kselftest_harness program. Each test runs in a process of its own, with the module loaded.
    Harness,
    /// A program that loads the module itself and runs a kselftest_harness program as a whole. Its
    /// exit status means nothing.
    Script,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Kunit => "kunit",
            Self::Ktap => "ktap",
            Self::Harness => "harness",
            Self::Script => "script",
        }
    }
}

/// One suite to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suite {
    /// Name, a single word.
    pub name: String,
    /// The way in which it runs.
    pub kind: Kind,
    /// Seconds that one test may take.
    pub timeout: u64,
    /// Program in the guest; `-` if there is none.
    pub program: String,
    /// The tests to run; for [`Kind::Ktap`], empty means all. For [`Kind::Script`], the arguments.
    pub tests: Vec<String>,
    /// Files of the kernel, each with the value that it has while the suite runs.
    pub settings: Vec<(String, String)>,
}

/// The whole plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Name of the module, as `rmmod` takes it.
    pub module: String,
    /// The parameters of the module, as `insmod` takes them.
    pub params: String,
    /// Program that audits the module after a test; empty for none.
    pub audit: String,
    /// Number of processors that the guest must have; 0 for any number.
    pub cpus: u32,
    /// Number of NUMA nodes that the guest must have; 0 for any number.
    pub nodes: u32,
    /// Whether to run an interactive shell instead of suites.
    pub shell: bool,
    /// Whether a suite of a harness ends with the first test that the kernel reports something in, or that
    /// does not end in time: what such a kernel says of the tests that follow is worth nothing.
    pub while_sound: bool,
    /// The suites, in order.
    pub suites: Vec<Suite>,
}

impl Plan {
    /// Writes the text of the file.
    pub fn to_text(&self) -> String {
        let mut out = format!("module {}\n", self.module);
        if !self.params.is_empty() {
            let _ = writeln!(out, "params {}", self.params);
        }
        if !self.audit.is_empty() {
            let _ = writeln!(out, "audit {}", self.audit);
        }
        for (word, number) in [("cpus", self.cpus), ("nodes", self.nodes)] {
            if number != 0 {
                let _ = writeln!(out, "{word} {number}");
            }
        }
        for (word, set) in [("shell", self.shell), ("while-sound", self.while_sound)] {
            if set {
                let _ = writeln!(out, "{word}");
            }
        }
        for s in &self.suites {
            let _ = writeln!(out, "suite {} {} {} {}", s.name, s.kind.word(), s.timeout, s.program);
            for test in &s.tests {
                let _ = writeln!(out, "test {test}");
            }
            for (file, value) in &s.settings {
                let _ = writeln!(out, "set {file} {value}");
            }
        }
        out
    }

    /// Parses the text of the file.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut plan = Self::default();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["module", name] => plan.module = name.to_owned(),
                ["params", ..] => plan.params = words[1..].join(" "),
                ["audit", program] => plan.audit = program.to_owned(),
                ["cpus" | "nodes", number] => {
                    let number = number.parse().map_err(|_| format!("bad number in {line:?}"))?;
                    *if words[0] == "cpus" { &mut plan.cpus } else { &mut plan.nodes } = number;
                }
                ["shell"] => plan.shell = true,
                ["while-sound"] => plan.while_sound = true,
                ["suite", name, kind, timeout, program] => plan.suites.push(Suite {
                    name: name.to_owned(),
                    kind: match kind {
                        "kunit" => Kind::Kunit,
                        "ktap" => Kind::Ktap,
                        "harness" => Kind::Harness,
                        "script" => Kind::Script,
                        _ => return Err(format!("unknown kind of suite in {line:?}")),
                    },
                    timeout: timeout.parse().map_err(|_| format!("bad timeout in {line:?}"))?,
                    program: program.to_owned(),
                    tests: Vec::new(),
                    settings: Vec::new(),
                }),
                ["test", name] => match plan.suites.last_mut() {
                    Some(suite) => suite.tests.push(name.to_owned()),
                    None => return Err(format!("{line:?} before any suite")),
                },
                ["set", file, value] => match plan.suites.last_mut() {
                    Some(suite) => suite.settings.push((file.to_owned(), value.to_owned())),
                    None => return Err(format!("{line:?} before any suite")),
                },
                [] => {}
                _ => return Err(format!("cannot read plan line {line:?}")),
            }
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let plan = Plan {
            module: "zdmirror".into(),
            params: "a=0x1 b=2".into(),
            audit: "/bin/zdvm-audit".into(),
            cpus: 4,
            nodes: 2,
            shell: true,
            while_sound: true,
            suites: vec![
                Suite {
                    name: "kunit".into(),
                    kind: Kind::Kunit,
                    timeout: 10,
                    program: "-".into(),
                    tests: vec![],
                    settings: vec![],
                },
                Suite {
                    name: "hmm".into(),
                    kind: Kind::Harness,
                    timeout: 20,
                    program: "/bin/hmm-tests".into(),
                    tests: vec!["hmm.a".into(), "hmm.b".into()],
                    settings: vec![("/sys/a".into(), "1".into()), ("/sys/b".into(), "x".into())],
                },
                Suite {
                    name: "smoke".into(),
                    kind: Kind::Script,
                    timeout: 20,
                    program: "/bin/test_hmm.sh".into(),
                    tests: vec!["smoke".into(), "0x100000000".into()],
                    settings: vec![],
                },
            ],
        };
        assert_eq!(Plan::parse(&plan.to_text()), Ok(plan));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["suite a b 1 -", "test x", "set /x 1", "frobnicate", "suite a ktap x -"] {
            assert!(Plan::parse(text).is_err(), "{text}");
        }
    }
}
