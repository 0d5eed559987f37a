// SPDX-License-Identifier: GPL-2.0
//! The series of `zdvm in-tree`: what it is made of is whole, and in an order that compiles.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;
use zdvm::command::in_tree::series::{Spec, spec};
use zdvm::command::in_tree::text;

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

/// The files of a folder and of those in it, without the ending and without `mod.rs`, as paths from `top`.
fn files_below(top: &Path, dir: &Path, out: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(top, &path, out);
        } else if path.file_name().unwrap() != "mod.rs" {
            let name = path.strip_prefix(top).unwrap().with_extension("");
            out.insert(name.to_string_lossy().into_owned());
        }
    }
}

#[test]
fn each_file_is_in_the_series_or_stays_out() {
    let spec = load();
    let mut known: BTreeSet<String> = spec.out_of_tree.iter().cloned().collect();
    for name in spec.patch.iter().flat_map(|patch| &patch.rust) {
        assert!(known.insert(name.clone()), "{name} is there twice");
    }
    let mut files = BTreeSet::new();
    let top = repo().join("rust/kernel/mm");
    files_below(&top, &top, &mut files);
    assert_eq!(known, files);
}

/// The paths that a `use` declaration names, from the text between `use` and the semicolon.
fn paths(tree: &str, prefix: &str, out: &mut Vec<String>) {
    let (mut depth, mut start) = (0, 0);
    for (i, c) in tree.char_indices().chain([(tree.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let part = tree[start..i].trim();
                start = i + 1;
                match part.split_once('{') {
                    Some((path, rest)) => {
                        paths(&rest[..rest.len() - 1], &format!("{prefix}{path}"), out);
                    }
                    None if part.is_empty() => {}
                    None => out.push(format!("{prefix}{part}")),
                }
            }
            _ => {}
        }
    }
}

#[test]
fn paths_of_a_tree() {
    let mut found = Vec::new();
    paths(
        "crate::{\n    a,\n    mm::{\n        b::C,\n        d::{E, F},\n    },\n}",
        "",
        &mut found,
    );
    assert_eq!(found, ["crate::a", "crate::mm::b::C", "crate::mm::d::E", "crate::mm::d::F"]);
}

/// A patch imports nothing that comes later, and nothing that stays out. KUnit cases may.
#[test]
fn patches_are_bottom_up() {
    let spec = load();
    let import = Regex::new(r"(?ms)^(?:pub\(crate\) )?use (.*?);").unwrap();
    let end_of_line = Regex::new(r"//[^\n]*").unwrap();
    let mut files: BTreeSet<String> = spec.out_of_tree.iter().cloned().collect();
    files.extend(spec.patch.iter().flat_map(|patch| patch.rust.clone()));
    let mut there: BTreeSet<&str> = BTreeSet::new();
    let mut imports = 0;
    for patch in &spec.patch {
        there.extend(patch.rust.iter().map(String::as_str));
        for name in &patch.rust {
            let folder = name.rsplit_once('/').map_or(String::new(), |(dir, _)| format!("{dir}/"));
            let text = code(&module(name));
            let mut found = Vec::new();
            for tree in import.captures_iter(&end_of_line.replace_all(&text, "")) {
                paths(&tree[1], "", &mut found);
            }
            for path in found {
                let path = path.replace("::", "/");
                let path = match path.strip_prefix("super/") {
                    Some(rest) => format!("{folder}{rest}"),
                    None => path.strip_prefix("crate/mm/").unwrap_or_default().to_owned(),
                };
                let file = files.iter().find(|file| {
                    path.strip_prefix(file.as_str())
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                });
                if let Some(file) = file {
                    imports += 1;
                    assert!(there.contains(file.as_str()), "{name} imports {file}");
                }
            }
        }
    }
    assert!(imports > 100, "only {imports} imports found");
}

/// What the files call in C is in the files of C that the series has, as they are in the kernel tree. The functions of
/// `rust/kernel/mm/mod.rs`, which stays out, have other names there.
#[test]
fn functions_are_complete() {
    let spec = load();
    let mut helpers = String::new();
    for name in spec.patch.iter().flat_map(|patch| &patch.c) {
        let text = fs::read_to_string(repo().join(format!("rust/helpers/{name}.c"))).unwrap();
        helpers += &text::helpers(&text, &spec.defined, &spec.undefined).unwrap();
    }
    let mut files: Vec<(&str, String)> = Vec::new();
    for patch in &spec.patch {
        files.extend(patch.rust.iter().map(|name| (name.as_str(), module(name))));
        let read = |name: &String| fs::read_to_string(repo().join(name)).unwrap();
        files.extend(patch.other.iter().map(|name| (name.as_str(), read(name))));
    }
    let call = Regex::new(r"bindings::devmem_(\w+)").unwrap();
    let other = Regex::new(r"(?m)^pub\(crate\) fn (\w+)").unwrap();
    let left_out: Vec<String> =
        other.captures_iter(&module("mod")).map(|found| found[1].to_owned()).collect();
    assert!(!left_out.is_empty());
    for (name, text) in files {
        let text = code(&text::rust(&text).unwrap());
        for found in call.captures_iter(&text) {
            let function = format!("rust_helper_devmem_{}(", &found[1]);
            assert!(helpers.contains(&function), "{name} calls {function}");
        }
        for function in &left_out {
            assert!(!text.contains(function.as_str()), "{name} uses {function}");
        }
    }
}
