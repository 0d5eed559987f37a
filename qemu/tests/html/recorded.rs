// SPDX-License-Identifier: GPL-2.0
//! Folders as runs leave them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// A recorded file.
pub fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    fs::read_to_string(&path).unwrap()
}

fn test(name: &str, status: &str, reason: &str, seconds: f64) -> Value {
    json!({ "name": name, "status": status, "reason": reason, "seconds": seconds })
}

/// Makes the folder of a run: the recorded log, with `report` in the middle of a test.
pub fn folder(dir: &Path, kernel: &str, report: Option<&str>) -> PathBuf {
    let dir = dir.join(kernel);
    fs::create_dir(&dir).unwrap();
    let mut console = data("clean.console");
    let mut problems = vec![];
    let mut status = "Pass";
    if let Some(report) = report {
        let at = console.find("end migrate.round_trip").unwrap();
        let start = console[..at].rfind('\n').unwrap() + 1;
        let line = console[..start].lines().count() + 2;
        console.insert_str(start, &data(report));
        status = "Fail";
        problems = vec![
            json!({ "kind": "Fail", "subject": "selftests: generic.idle", "text": "count is 1, not 0" }),
            json!({ "kind": "oops", "subject": "migrate.round_trip",
                "text": format!("Oops: 0002 <script>alert(1)</script> (console line {line})") }),
            json!({ "kind": "taint", "subject": "kernel", "text": "D" }),
        ];
    }
    fs::write(dir.join("console.log"), console).unwrap();
    let figures = "KTAP version 1\n# bench.audit: bench: audit of 65536 pages: 12 us\n\
         # versus.private: bench: PRIVATE read, 4 KiB: C driver 12 us, this one 10 us\n\
         # versus.private: bench-json: {\"memory\":\"PRIVATE\",\
         \"row\":\"read, 4 KiB\",\"bytes\":65536,\"c_us\":12.0,\"c_spread\":0.1,\"rust_us\":10.0,\
         \"ratio\":1.2,\"copy_us\":3.0}\nok 1 a\n";
    fs::write(dir.join("selftests.ktap"), figures).unwrap();
    let verdict = json!({
        "kernel": kernel, "machine": "default", "release": "7.3.4", "pass": problems.is_empty(),
        "accel": "tcg", "exit": "status 0", "seconds": 12.5,
        "left_out": [["smoke", 78]], "splats": [], "problems": problems,
        "suites": [
            { "name": "selftests", "planned": 3, "with_full": 302, "tests": [
                test("migrate.round_trip", status, "", 0.5),
                test("inject.extra_get", "Pass", "", 0.25),
                test("generic.idle", "ExpectedFail", "stock kernels count from one", 0.01),
            ]},
            { "name": "hmm", "planned": 1, "with_full": 0, "tests": [
                test("hmm.hmm_device_private.open_close", "Pass", "", 0.02),
            ]},
        ],
    });
    fs::write(dir.join("verdict.json"), verdict.to_string()).unwrap();
    dir
}

/// Makes the folder of `zdvm mutants`.
pub fn mutants(dir: &Path) -> PathBuf {
    let mutants = dir.join("mutants");
    fs::create_dir(&mutants).unwrap();
    let found = json!([{ "test": "migrate.round_trip", "by": "Result", "what": "count is 2" }]);
    let outcome =
        |reached: bool, found: &Value| json!({ "reached": reached, "found": found, "tests": 9 });
    let row = |name: &str, suite: Value| {
        json!({ "name": name, "does": format!("forgets <{name}>"), "equivalent": null,
            "outcomes": { "suite": suite } })
    };
    let matrix = json!({
        "scores": { "suite": { "killed": 1, "of": 3 } },
        "rows": [
            row("put_missing", outcome(true, &found)),
            row("flush_missing", outcome(true, &json!([]))),
            row("wait_missing", outcome(false, &found)),
        ],
    });
    fs::write(mutants.join("matrix.json"), matrix.to_string()).unwrap();
    mutants
}
