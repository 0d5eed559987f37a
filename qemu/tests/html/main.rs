// SPDX-License-Identifier: GPL-2.0
//! The page of a recorded run: its structure, its findings, that it needs no other file, and how a
//! browser draws it.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

mod browser;
mod recorded;

use std::fs;
use std::path::{Path, PathBuf};

use recorded::{data, folder, mutants};
use regex::Regex;
use tempfile::TempDir;
use zdvm::report::html;

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
    let mutants = mutants(dir.path());
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
    // A row of the chart is not repeated in words.
    let (_, words) = page.split_once("Benchmarks in words").unwrap();
    assert!(words.contains("audit of 65536 pages: 12 us") && !words.contains("this one 10 us"));
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
