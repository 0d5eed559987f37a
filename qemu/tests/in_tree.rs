// SPDX-License-Identifier: GPL-2.0
//! The series of `zdvm in-tree`: what it is made of is whole, and in an order that compiles.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;
use zdvm::command::in_tree::series::{Spec, spec};

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn load() -> Spec {
    spec(&repo()).unwrap()
}

fn module(name: &str) -> String {
    fs::read_to_string(repo().join(format!("rust/kernel/mm/{name}.rs"))).unwrap()
}

/// The code of a file, without comments.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

#[test]
fn each_file_is_in_the_series_or_stays_out() {
    let spec = load();
    let mut known: BTreeSet<String> = spec.out_of_tree.iter().cloned().collect();
    for name in spec.patch.iter().flat_map(|patch| &patch.rust) {
        assert!(known.insert(name.clone()), "{name} is there twice");
    }
    let dir = fs::read_dir(repo().join("rust/kernel/mm")).unwrap();
    let files: BTreeSet<String> = dir
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|name| name != "mod")
        .collect();
    assert_eq!(known, files);
}

/// A patch imports nothing that comes later, and nothing that stays out. KUnit cases may.
#[test]
fn patches_are_bottom_up() {
    let spec = load();
    let import = Regex::new(r"(?s)^use super::(\{.*?\n\}|\w+)").unwrap();
    let first = Regex::new(r"(?m)^    (\w+)(?:::|,)|^use super::(\w+)").unwrap();
    let files: BTreeSet<String> = spec.patch.iter().flat_map(|patch| patch.rust.clone()).collect();
    let mut there: BTreeSet<&str> = BTreeSet::new();
    for patch in &spec.patch {
        there.extend(patch.rust.iter().map(String::as_str));
        for name in &patch.rust {
            let text = code(&module(name));
            for part in text.split("\n\n").filter_map(|part| import.find(part)) {
                for found in first.captures_iter(part.as_str()) {
                    let name_of = found.get(1).or(found.get(2)).unwrap().as_str();
                    let is_file =
                        files.contains(name_of) || spec.out_of_tree.iter().any(|n| n == name_of);
                    assert!(!is_file || there.contains(name_of), "{name} imports {name_of}");
                }
            }
        }
    }
}

/// What the files call in C is in the files of C that the series has.
#[test]
fn helpers_are_complete() {
    let spec = load();
    let mut helpers = String::new();
    for name in spec.patch.iter().flat_map(|patch| &patch.c) {
        helpers += &fs::read_to_string(repo().join(format!("rust/helpers/{name}.c"))).unwrap();
    }
    let call = Regex::new(r"bindings::(zdm_\w+)").unwrap();
    for name in spec.patch.iter().flat_map(|patch| &patch.rust) {
        for found in call.captures_iter(&code(&module(name))) {
            let function = &found[1];
            assert!(helpers.contains(&format!("{function}(")), "{name} calls {function}");
        }
    }
}
