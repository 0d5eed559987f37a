// SPDX-License-Identifier: GPL-2.0
//! Checks the documents: their commands exist, their examples compile, and their tables look as
//! printed.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use regex::Regex;
use tempfile::TempDir;
use zdvm::judge::verdict::Verdict;

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(file: &str) -> String {
    fs::read_to_string(repo().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// README, CONTRIBUTING, all files of Documentation and the examples for CI, by name.
fn documents() -> Vec<(String, String)> {
    let mut names = vec!["README.md".to_owned(), "CONTRIBUTING.md".to_owned()];
    for (dir, suffix) in [("Documentation", ".rst"), ("Documentation/ci", ".yml")] {
        for entry in fs::read_dir(repo().join(dir)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(suffix) {
                names.push(format!("{dir}/{name}"));
            }
        }
    }
    assert!(names.iter().any(|n| n.ends_with("github.yml")), "{names:?}");
    names.into_iter().map(|n| (n.clone(), read(&n))).collect()
}

fn help(arguments: &[&str]) -> Option<String> {
    let out = Command::new(env!("CARGO_BIN_EXE_zdvm")).args(arguments).arg("--help").output();
    let out = out.unwrap();
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

#[test]
fn commands_and_options_exist() {
    let used = Regex::new(r"zdvm ([a-z][a-z-]+)((?: +[^ `\n|#]+)*)").unwrap();
    let option = Regex::new(r"^(--[a-z-]+)").unwrap();
    let mut seen = BTreeSet::new();
    for (name, text) in documents() {
        for found in used.captures_iter(&text) {
            let place = found.get(0).unwrap();
            // "zdvm" in running text ("zdvm builds") is no command.
            let code =
                text[..place.start()].ends_with("./") || text[..place.start()].ends_with("/");
            if !code {
                continue;
            }
            let command = &found[1];
            let help = help(&[command]).unwrap_or_else(|| panic!("{name}: no command {command}"));
            for option in found[2].split_whitespace().filter_map(|w| option.captures(w)) {
                assert!(help.contains(&option[1]), "{name}: {command} has no {}", &option[1]);
            }
            seen.insert(command.to_owned());
        }
    }
    for command in ["run", "doctor", "bisect", "report", "mutants", "shell"] {
        assert!(seen.contains(command), "{command} is documented nowhere");
    }
}

#[test]
fn links_lead_somewhere() {
    let link = Regex::new(r"\]\(([^)#:]+)\)|:doc:`([a-z-]+)`").unwrap();
    for (name, text) in documents() {
        for found in link.captures_iter(&text) {
            let target = match (found.get(1), found.get(2)) {
                (Some(file), _) => file.as_str().to_owned(),
                (_, Some(doc)) => format!("Documentation/{}.rst", doc.as_str()),
                _ => continue,
            };
            assert!(repo().join(&target).exists(), "{name}: {target}");
        }
    }
}

#[test]
fn the_readme_shows_a_table_as_it_is_printed() {
    let empty = Verdict {
        kernel: String::new(),
        machine: String::new(),
        release: None,
        suites: vec![],
        left_out: vec![("selftests".into(), 302)],
        splats: vec![],
        problems: vec![],
    };
    let table = zdvm::report::table(&empty);
    for file in ["README.md", "Documentation/tutorial.rst"] {
        let text = read(file);
        let head = table.lines().next().unwrap();
        assert!(text.contains(head), "{file} has no line {head:?}");
        // All results of a row together are the planned number, and those of all rows stand in the
        // line of the verdict.
        for (from, _) in text.match_indices(head) {
            let mut sums = [0; 8];
            let mut lines = text[from..].lines().skip(1);
            let verdict = lines.by_ref().find(|line| {
                let numbers = line.split_whitespace().skip(1).map(str::parse::<usize>);
                let Ok(numbers) = numbers.collect::<Result<Vec<_>, _>>() else { return true };
                assert_eq!(numbers[0], numbers[1..6].iter().sum::<usize>(), "{file}: {line}");
                sums.iter_mut().zip(numbers).for_each(|(sum, n)| *sum += n);
                false
            });
            let [_, passed, failed, skipped, xfail, ..] = sums;
            let counts = format!(
                "{passed} passed, {failed} failed, {xfail} failed as expected, {skipped} skipped, "
            );
            let verdict = verdict.unwrap_or_default();
            assert!(verdict.contains(&counts), "{file}: {counts}is not in {verdict}");
        }
    }
}

/// The words in double backticks in the first column of the tables below a title.
fn first_column(page: &str, title: &str) -> BTreeSet<String> {
    let head = format!("\n{title}\n{}\n", "=".repeat(title.len()));
    let (_, rest) = page.split_once(&head).unwrap_or_else(|| panic!("no section {title}"));
    let end = Regex::new(r"\n[A-Za-z][^\n]*\n={3,}\n").unwrap();
    let section = end.find(rest).map_or(rest, |next| &rest[..next.start()]);
    let name = Regex::new("``([a-z0-9_.-]+)``").unwrap();
    // The rulers around a table have its width in signs of equality.
    let (mut width, mut out) = (0, BTreeSet::new());
    for line in section.lines() {
        if line.starts_with("===") {
            width = line.find(' ').unwrap_or(0);
        } else if line.is_empty() {
            width = 0;
        }
        let cell = line.get(..width.min(line.len())).unwrap_or_default();
        out.extend(name.captures_iter(cell).map(|n| n[1].to_owned()));
    }
    out
}

#[test]
fn the_runner_page_names_every_kernel_machine_suite_and_parameter() {
    let page = read("Documentation/runner.rst");
    let matrix = zdvm::plan::matrix::Matrix::load(&repo()).unwrap();
    assert_eq!(first_column(&page, "Kernels"), matrix.kernel.keys().cloned().collect());
    assert_eq!(first_column(&page, "Machines"), matrix.machine.keys().cloned().collect());
    assert_eq!(first_column(&page, "Suites"), matrix.suite.keys().cloned().collect());
    let in_rust = Regex::new(r"(?m)^        ([a-z0-9_]+): [a-z0-9]+ \{$").unwrap();
    let in_c = Regex::new(r"(?m)^module_param(?:_named)?\(([a-z_]+),").unwrap();
    let (rust, c) = (read("rust/zdmirror.rs"), read("rust/helpers/params.c"));
    let parameters = in_rust.captures_iter(&rust).chain(in_c.captures_iter(&c));
    let parameters: BTreeSet<String> = parameters.map(|p| p[1].to_owned()).collect();
    assert!(parameters.len() > 8, "{parameters:?}");
    assert_eq!(first_column(&page, "The module"), parameters);
}

/// The `#define`s of ioctls in a header.
fn ioctls(header: &str) -> Vec<String> {
    let define = Regex::new(r"(?m)^#define\s+(ZDM_[A-Z_]+)\s+_IO[WR]+\(").unwrap();
    define.captures_iter(&read(header)).map(|c| c[1].to_owned()).collect()
}

#[test]
fn every_ioctl_is_described_and_its_example_compiles() {
    let abi = read("Documentation/abi.rst");
    let example = Regex::new(r"(?m)^   /\* abi: ([A-Z_ ]+) \*/\n((?:   .*\n|\n)+)").unwrap();
    let mut shown = BTreeSet::new();
    let mut program = "#include <stdint.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n\
                       #include \"zdmirror.h\"\nvoid check(int);\n"
        .to_owned();
    for (number, found) in example.captures_iter(&abi).enumerate() {
        let names: Vec<&str> = found[1].split(' ').collect();
        // Upstream's ioctls come from the header of the kernel that the module is built against.
        if names.iter().all(|n| n.starts_with("ZDM_")) {
            program += &format!("void e{number}(int fd, void *addr)\n{{\n{}}}\n", &found[2]);
        }
        shown.extend(names.into_iter().map(str::to_owned));
    }
    for name in ioctls("uapi/zdmirror.h") {
        assert!(shown.contains(&name), "{name} has no example in abi.rst");
    }
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("examples.c");
    fs::write(&file, program).unwrap();
    let out = Command::new("gcc")
        .args(["-fsyntax-only", "-Wall", "-Werror", "-Wno-format", "-I"])
        .arg(repo().join("uapi"))
        .arg(&file)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn invariants_have_a_line_each() {
    let (page, oracle) = (read("Documentation/invariants.rst"), read("Documentation/oracle.rst"));
    for n in 1..=10 {
        assert!(page.contains(&format!("\nI{n} ")), "I{n} in invariants.rst");
        assert!(oracle.contains(&format!("I{n}")), "I{n} in oracle.rst");
    }
}
