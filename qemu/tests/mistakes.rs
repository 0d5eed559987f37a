// SPDX-License-Identifier: GPL-2.0
//! Mistyped commands: each gives an exit status that is no verdict, and a sentence that names the
//! mistake. Nothing is built before that, except the program that lists the tests for a filter.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Checks the exit status, and that the output has the words.
#[track_caller]
fn expect(out: &Output, status: i32, words: &[&str]) {
    let text =
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.status.code(), Some(status), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

/// Runs zdvm with a cache of its own, which stays empty if nothing is built.
#[track_caller]
fn zdvm(here: &Path, arguments: &[&str], status: i32, words: &[&str]) {
    with_cache(
        &TempDir::new().unwrap(),
        here,
        arguments,
        status,
        words,
        &["kernels", "modules", "guest"],
    );
}

/// Runs zdvm with a cache that has the guest's programs, and stays empty otherwise.
#[track_caller]
fn listing(arguments: &[&str], status: i32, words: &[&str]) {
    let cache = TempDir::new().unwrap();
    fs::create_dir(cache.path().join("zdmirror")).unwrap();
    let programs = zdvm::repo::cache("guest").unwrap();
    std::os::unix::fs::symlink(programs, cache.path().join("zdmirror/guest")).unwrap();
    with_cache(&cache, &repo(), arguments, status, words, &["kernels", "modules"]);
}

#[track_caller]
fn with_cache(
    cache: &TempDir,
    here: &Path,
    arguments: &[&str],
    status: i32,
    words: &[&str],
    empty: &[&str],
) {
    let out = Command::new(env!("CARGO_BIN_EXE_zdvm"))
        .args(arguments)
        .current_dir(here)
        .env("ZDVM_REPO", repo())
        .env("XDG_CACHE_HOME", cache.path())
        .output()
        .unwrap();
    expect(&out, status, words);
    for dir in empty {
        let dir = cache.path().join("zdmirror").join(dir);
        let files = fs::read_dir(&dir).into_iter().flatten().count();
        assert_eq!(files, 0, "{} has files", dir.display());
    }
}

#[test]
fn names_that_do_not_exist() {
    let run = |arguments: &[&str], words: &[&str]| zdvm(&repo(), arguments, 2, words);
    run(&["run", "--kernel", "pached"], &["no kernel \"pached\"", "patched"]);
    run(&["run", "--suite", "selftest"], &["no suite \"selftest\"", "selftests"]);
    run(&["run", "--machine", "smal"], &["no machine \"smal\"", "small"]);
    run(&["run", "--accel", "kwm"], &["--accel kwm", "kvm"]);
    run(&["run", "--filter", "("], &["--filter", "unclosed group"]);
    run(&["runn"], &["unrecognized subcommand", "'run'"]);
    run(&["report", "/nonexistent"], &["/nonexistent is no folder"]);
    let empty = TempDir::new().unwrap();
    run(&["report", empty.path().to_str().unwrap()], &["no verdict in", "run that has ended"]);
}

#[test]
fn a_filter_that_matches_nothing() {
    for list in [&["--list"][..], &[]] {
        let arguments = [&["run", "--filter", "^nosuch"], list].concat();
        listing(&arguments, 2, &["no test matches", "--list --full"]);
        let arguments = [&["run", "--filter", "^dax.pud$"], list].concat();
        listing(&arguments, 2, &["slow", "--full only (tests: 1)"]);
    }
}

/// Without these checks the run would pass, because no bug was switched on.
#[test]
fn a_seeded_bug_needs_its_kernel() {
    let run = |arguments: &[&str], words: &[&str]| zdvm(&repo(), arguments, 2, words);
    run(&["run", "--mutant", "fork_no_ref"], &["no seeded bugs", "--kernel mutants"]);
    run(&["run", "--kernel", "mutants", "--mutant", "fork_no_reff"], &["no mutant", "--list"]);
}

/// Exit status 125 would make `git bisect run` skip every commit.
#[test]
fn a_bisection_in_the_wrong_place_stops() {
    let dir = TempDir::new().unwrap();
    zdvm(dir.path(), &["bisect"], 128, &["no kernel tree", "--kdir"]);
    // This repository has a Makefile and a Kbuild file, too.
    zdvm(&repo(), &["bisect"], 128, &["no kernel tree", "--kdir"]);
    write(&dir.path().join("Makefile"), "VERSION = 7\nPATCHLEVEL = 3\n");
    write(&dir.path().join("Kbuild"), "");
    write(&dir.path().join(".config"), "CONFIG_MINE=y\n");
    zdvm(dir.path(), &["bisect"], 128, &["in place", "worktree add"]);
    assert!(dir.path().join(".config").is_file());
}

/// `make` says it in a sentence, too, although it runs without zdvm.
#[test]
fn a_directory_that_is_no_built_kernel_tree() {
    let dir = TempDir::new().unwrap();
    let tree = dir.path().join("tree");
    let make = |kdir: &Path, words: &[&str]| {
        let kdir = format!("KDIR={}", kdir.display());
        let out = Command::new("make").arg("-C").arg(repo()).arg(kdir).output().unwrap();
        expect(&out, 2, words);
    };
    make(&tree, &["no kernel source or build directory"]);
    write(&tree.join("Makefile"), "VERSION = 7\nPATCHLEVEL = 3\n");
    make(&tree, &["not configured here", "O=DIR"]);
    write(&tree.join(".config"), "CONFIG_64BIT=y\n");
    make(&tree, &["without CONFIG_RUST", "make kconfig"]);
    write(&tree.join(".config"), "CONFIG_RUST=y\n");
    make(&tree, &["libkernel.rmeta", "build the kernel first"]);
    write(&tree.join("rust/libkernel.rmeta"), "");
    write(&tree.join(".config"), "CONFIG_RUST=y\nCONFIG_RUSTC_VERSION_TEXT=\"rustc 0.9\"\n");
    make(&tree, &["was built with \"rustc 0.9\", here is \"rustc 1.", "ZDM_TOOLCHAIN=native"]);
}

/// The checks of the module name the tree only; `make` says what its command line leaves open.
#[test]
fn the_compilers_of_a_tree_are_found_out() {
    let dir = TempDir::new().unwrap();
    write(&dir.path().join(".config"), "CONFIG_CC_IS_CLANG=y\nCONFIG_LD_IS_LLD=y\n");
    for (words, says) in
        [(&[][..], "LLVM=1\n"), (&["c", "given"], "LLVM=1\n"), (&["given", "rust"], "")]
    {
        let script = repo().join("scripts/tree-compilers.sh");
        let out = Command::new(script).arg(dir.path()).args(words).output().unwrap();
        assert!(out.status.success());
        assert_eq!(String::from_utf8_lossy(&out.stdout), says, "{words:?}");
    }
}
