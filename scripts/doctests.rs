// SPDX-License-Identifier: GPL-2.0

//! Makes KUnit cases of the examples in the doc comments of `rust/kernel`, for a build of the module out
//! of the kernel tree. In the kernel tree `rustdoc` and `scripts/rustdoc_test_gen.rs` do this.
//!
//! Usage: `doctests SRC OUT`, with the folder that `rust/kernel` is in and the file to be written.
//!
//! As with `rustdoc`, `# ` hides a line, and an example whose last line begins with `Ok::<` may use `?`.
//! `no_run` examples are compiled only.

use std::{
    fs,
    io,
    path::{
        Path,
        PathBuf, //
    },
    process::ExitCode, //
};

/// The treatment of an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is compiled and run.
    Run,
    /// It is compiled.
    NoRun,
    /// It must not compile, or is ignored.
    Skip,
}

/// A block of Rust in a doc comment.
#[derive(Debug)]
pub struct Example {
    /// Path from the folder that `rust/kernel` is in.
    pub file: String,
    /// Number of the line with the fence, from 1 on.
    pub line: usize,
    /// The item that the comment documents.
    pub item: String,
    /// The treatment of the example.
    pub kind: Kind,
    /// The lines of the example, without the marks of the comment.
    pub code: Vec<String>,
}

/// A type that other files can name, and whether its comment has an example.
#[derive(Debug)]
pub struct Type {
    /// Path from the folder that `rust/kernel` is in.
    pub file: String,
    /// The name of the type.
    pub name: String,
    /// Whether the comment has an example that is compiled.
    pub has_example: bool,
}

/// The examples and types of a source file.
#[derive(Default)]
pub struct Found {
    /// The examples, in order.
    pub examples: Vec<Example>,
    /// The types, in order.
    pub types: Vec<Type>,
}

/// All source files below `rust/kernel` of `src`, in order, as paths from `src`.
pub fn files(src: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut dirs = vec![PathBuf::from("rust/kernel")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(src.join(&dir))? {
            let entry = entry?;
            let path = dir.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The text of a line of a doc comment, without the space in front.
fn doc(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let text = line
        .strip_prefix("//!")
        .or_else(|| line.strip_prefix("///").filter(|rest| !rest.starts_with('/')))?;
    Some(text.strip_prefix(' ').unwrap_or(text))
}

/// The kind of a block, from the words behind its fence; `None` for text.
fn kind(info: &str) -> Option<Kind> {
    let mut kind = Kind::Run;
    for word in info.split(',').map(str::trim) {
        match word {
            "" | "rust" => {}
            "no_run" => kind = Kind::NoRun,
            "ignore" | "compile_fail" => kind = Kind::Skip,
            _ => return None,
        }
    }
    Some(kind)
}

/// The name of the item that begins in `line`, and whether it is a type that other files can name.
fn item(line: &str) -> Option<(&str, bool)> {
    let (public, rest) = match line.trim_start().strip_prefix("pub") {
        // `pub(super)` and `pub(in PATH)` hide the item from other files or folders.
        Some(rest) => match rest.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((scope, rest)) => (scope == "crate", rest),
            None => (true, rest),
        },
        None => (false, line),
    };
    let rest = rest.trim_start();
    let rest = rest.strip_prefix("unsafe ").unwrap_or(rest);
    let (word, rest) = rest.split_once(' ')?;
    let is_type = matches!(word, "struct" | "enum" | "trait" | "union");
    if !is_type && !matches!(word, "fn" | "type" | "const" | "static" | "mod" | "macro_rules!") {
        return None;
    }
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
    Some((&rest[..end.unwrap_or(rest.len())], is_type && public))
}

/// The examples and the types of a file with this text.
pub fn scan(file: &str, text: &str) -> Found {
    let mut found = Found::default();
    let stem = Path::new(file).file_stem().and_then(|stem| stem.to_str());
    let stem = stem.unwrap_or_default();
    // The examples of the current comment.
    let mut pending: Vec<Example> = Vec::new();
    let mut open: Option<(usize, Option<Kind>, Vec<String>)> = None;
    for (n, line) in text.lines().enumerate() {
        if let Some(text) = doc(line) {
            if let Some(info) = text.trim_start().strip_prefix("```") {
                match open.take() {
                    None => open = Some((n + 1, kind(info), Vec::new())),
                    Some((line, Some(kind), code)) => pending.push(Example {
                        file: file.to_owned(),
                        line,
                        item: stem.to_owned(),
                        kind,
                        code,
                    }),
                    Some((_, None, _)) => {}
                }
            } else if let Some((_, _, code)) = &mut open {
                code.push(text.to_owned());
            }
            continue;
        }
        // An item may have attributes between its comment and its name. A comment of the file has none.
        let code = line.trim();
        let name = item(line);
        if name.is_none() && (code.starts_with("#[") || code.starts_with("//")) {
            continue;
        }
        if let Some((name, is_type)) = name {
            let indented = line.starts_with(' ');
            if is_type && !indented {
                found.types.push(Type {
                    file: file.to_owned(),
                    name: name.to_owned(),
                    has_example: pending.iter().any(|example| example.kind != Kind::Skip),
                });
            }
            for example in &mut pending {
                example.item = name.to_owned();
            }
        }
        found.examples.append(&mut pending);
    }
    found.examples.append(&mut pending);
    found
}

/// The examples and types of all files below `rust/kernel` of `src`.
pub fn scan_all(src: &Path) -> io::Result<Found> {
    let mut all = Found::default();
    for path in files(src)? {
        let text = fs::read_to_string(src.join(&path))?;
        let mut found = scan(&path.to_string_lossy(), &text);
        all.examples.append(&mut found.examples);
        all.types.append(&mut found.types);
    }
    Ok(all)
}

/// The code of a line, with hidden lines shown, and `kernel` replaced by a module of ours.
fn code(line: &str) -> String {
    let line = match line.trim_start() {
        "#" => "",
        text if text.starts_with("# ") => &text[2..],
        _ => line,
    };
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("kernel::") {
        let before = rest[..at].chars().next_back();
        let whole = !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
        out.push_str(&rest[..at]);
        out.push_str(if whole { "crate::examples::facade::" } else { "kernel::" });
        rest = &rest[at + "kernel::".len()..];
    }
    out + rest
}

/// The names of the cases, in the order of the examples: file and item, with a number where an item has
/// several.
pub fn names(examples: &[Example]) -> Vec<String> {
    let base = |example: &Example| {
        let path = example.file.trim_start_matches("rust/kernel/");
        let path = path.trim_start_matches("mm/").trim_end_matches(".rs");
        format!("{}_{}", path.replace('/', "_"), example.item)
    };
    let mut names: Vec<String> = Vec::new();
    for (i, example) in examples.iter().enumerate() {
        let same = examples[..i].iter().filter(|e| base(e) == base(example)).count();
        let number = if same == 0 { String::new() } else { format!("_{}", same + 1) };
        names.push(base(example) + &number);
    }
    names
}

/// A KUnit suite of the examples.
pub fn generate(examples: &[Example]) -> String {
    let mut out = String::from(
        "// Generated by scripts/doctests.rs from the examples in the documentation of rust/kernel.\n\
         #[::kernel::prelude::kunit_tests(zdmirror_examples)]\n\
         #[allow(non_snake_case, unreachable_pub, clippy::disallowed_names)]\n\
         mod cases {\n\
         #[allow(unused_imports)]\n\
         use crate::LocalModule;\n\
         #[allow(unused_imports)]\n\
         use ::kernel::prelude::*;\n",
    );
    for (example, name) in examples.iter().zip(names(examples)) {
        let (file, line) = (&example.file, example.line);
        let attribute = match example.kind {
            Kind::Run => "#[test]",
            Kind::NoRun => "#[allow(dead_code)]",
            Kind::Skip => continue,
        };
        let last = example.code.iter().rev().map(|line| code(line)).find(|line| !line.is_empty());
        let result = last.is_some_and(|line| line.trim_start().starts_with("Ok::<"));
        let arrow = if result { " -> Result" } else { "" };
        out += &format!(
            "{attribute}\nfn {name}(){arrow} {{\n\
             ::kernel::kunit::info(fmt!(\"    # {name}.location: {file}:{line}\\n\"));\n\
             #[allow(dead_code)] const LINES: i32 = "
        );
        // The first line of the code is the first one after the macros, of which each has three lines.
        let first = out.lines().count() + 7;
        out += &format!(
            "{};\n\
             #[allow(unused_macros)] macro_rules! assert {{ ($cond:expr $(,)?) => {{\n\
             ::kernel::kunit_assert!(\"{name}\", c\"{file}\", LINES, $cond);\n\
             }} }}\n\
             #[allow(unused_macros)] macro_rules! assert_eq {{ ($left:expr, $right:expr $(,)?) => {{\n\
             ::kernel::kunit_assert_eq!(\"{name}\", c\"{file}\", LINES, $left, $right);\n\
             }} }}\n",
            first as i64 - (line as i64 + 1)
        );
        for line in &example.code {
            out += &code(line);
            out.push('\n');
        }
        out += "}\n";
    }
    out + "}\n"
}

/// The entry of the program that Kbuild runs.
#[allow(dead_code)]
fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(src), Some(out), None) = (args.next(), args.next(), args.next()) else {
        eprintln!("usage: doctests SRC OUT");
        return ExitCode::from(2);
    };
    let written =
        scan_all(Path::new(&src)).and_then(|found| fs::write(&out, generate(&found.examples)));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("doctests: {}: {err}", Path::new(&src).display());
            ExitCode::FAILURE
        }
    }
}
