// SPDX-License-Identifier: GPL-2.0
//! The page of a recorded run: its structure, its findings, and that it needs no other file.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::{Value, json};
use tempfile::TempDir;
use zdvm::report::html;

fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    fs::read_to_string(&path).unwrap()
}

fn test(name: &str, status: &str, reason: &str, seconds: f64) -> Value {
    json!({ "name": name, "status": status, "reason": reason, "seconds": seconds })
}

/// Makes the folder of a run: the recorded log, with `report` in the middle of a test.
fn folder(dir: &Path, kernel: &str, report: Option<&str>) -> PathBuf {
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
    let figures = "KTAP version 1\n# bench: audit of 65536 pages: 12 us\n# bench-json: {\"memory\":\"PRIVATE\",\
         \"row\":\"read, 4 KiB\",\"bytes\":65536,\"c_us\":12.0,\"c_spread\":0.1,\"rust_us\":10.0,\
         \"ratio\":1.2,\"copy_us\":3.0}\nok 1 a\n";
    fs::write(dir.join("selftests.ktap"), figures).unwrap();
    let verdict = json!({
        "kernel": kernel, "machine": "default", "release": "7.3.4", "pass": problems.is_empty(),
        "accel": "tcg", "exit": "Code(0)", "seconds": 12.5,
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

fn page(dirs: &[PathBuf], out: &Path) -> String {
    html::write(dirs, out).unwrap();
    fs::read_to_string(out).unwrap()
}

/// The structure of a page: headings, tables and details in their order, without their content.
fn structure(page: &str) -> String {
    let wanted = Regex::new(
        r#"<(h[123]|summary)>(.*?)</(?:h[123]|summary)>|<(section|header|svg|div class="(?:callout|log)")|<tr>(<t[hd].*?)</tr>"#,
    )
    .unwrap();
    let tags = Regex::new("<[^>]*>").unwrap();
    let mut out = String::new();
    for found in wanted.captures_iter(page) {
        let text = match (found.get(1), found.get(3), found.get(4)) {
            (Some(tag), ..) => format!("  {}: {}", tag.as_str(), tags.replace_all(&found[2], "")),
            (_, Some(block), _) => block.as_str().to_owned(),
            (.., Some(row)) => {
                let cells = row.as_str().replace("</td>", "|").replace("</th>", "|");
                format!("    {}", tags.replace_all(&cells, ""))
            }
            _ => continue,
        };
        out += text.trim_end();
        out.push('\n');
    }
    out
}

/// Checks that every element that is opened is closed, in order.
fn well_formed(page: &str) {
    let tag = Regex::new(r"<(/?)([a-z0-9]+)[^>]*?(/?)>").unwrap();
    let body = &page[page.find("<body>").unwrap()..];
    let mut open: Vec<String> = Vec::new();
    for found in tag.captures_iter(body) {
        match (&found[1], &found[3]) {
            ("/", _) if &found[2] == "html" => {}
            ("/", _) => assert_eq!(open.pop().as_deref(), Some(&found[2]), "{:?}", &found[0]),
            (_, "/") => {}
            _ => open.push(found[2].to_owned()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn a_clean_run() {
    let dir = TempDir::new().unwrap();
    let run = folder(dir.path(), "patched", None);
    let page = page(&[run.clone()], &run.join("report.html"));
    well_formed(&page);
    assert!(!page.contains("What failed first") && page.contains(">PASS<"));
    insta::assert_snapshot!("clean", structure(&page));
}

#[test]
fn a_failed_run_shows_its_first_fault_and_the_log_around_it() {
    let dir = TempDir::new().unwrap();
    let run = folder(dir.path(), "stock", Some("oops.report"));
    let page = page(&[run.clone()], &run.join("report.html"));
    well_formed(&page);
    insta::assert_snapshot!("failed", structure(&page));
    // The oops comes before the failed test that the verdict lists first, because the log decides.
    let first = page.find("<strong>oops</strong>").unwrap();
    assert!(first < page.find("All problems").unwrap());
    let here = Regex::new(r#"<div class="here"><span>\d+</span>(.*?)</div>"#).unwrap();
    let marked: Vec<&str> = here.captures_iter(&page).map(|c| c.get(1).unwrap().as_str()).collect();
    let report = data("oops.report");
    assert_eq!(marked, [html::escape(report.lines().nth(1).unwrap().trim_end())]);
    assert!(!page.contains("<script>"), "what a log says is text");
}

#[test]
fn kernels_side_by_side() {
    let dir = TempDir::new().unwrap();
    let runs =
        [folder(dir.path(), "stock", Some("warn.report")), folder(dir.path(), "patched", None)];
    let page = page(&runs, &dir.path().join("side.html"));
    well_formed(&page);
    let part = &page[..page.find("What failed first").unwrap()];
    insta::assert_snapshot!("side", structure(part));
}

#[test]
fn benchmarks_and_seeded_bugs_have_their_part() {
    let dir = TempDir::new().unwrap();
    let run = folder(dir.path(), "patched", None);
    let mutants = dir.path().join("mutants");
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
    let page = page(&[run, mutants], &dir.path().join("all.html"));
    well_formed(&page);
    assert!(page.contains("suite: 1 of 3") && page.contains("forgets &lt;flush_missing&gt;"));
    for (name, cell) in [
        ("put_missing", "good\">migrate.round_trip"),
        ("flush_missing", "bad\">not noticed"),
        ("wait_missing", "bad\">not reached"),
    ] {
        let row = page.split("<tr>").find(|r| r.contains(name)).unwrap();
        assert!(row.contains(cell), "{row}");
    }
    let chart = page.split("<svg class=\"bench\"").nth(1).unwrap();
    assert!(chart.contains("class=\"good\"") && chart.contains("1.20: 10 us, C driver 12 us"));
}

#[test]
fn the_page_needs_nothing_else() {
    let dir = TempDir::new().unwrap();
    let run = folder(dir.path(), "stock", Some("oops.report"));
    let page = page(&[run.clone()], &run.join("report.html"));
    for word in ["http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link"] {
        assert!(!page.contains(word), "{word}");
    }
    for word in ["prefers-color-scheme: dark", "@media print", "name=\"viewport\""] {
        assert!(page.contains(word), "{word}");
    }
}
