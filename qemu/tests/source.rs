// SPDX-License-Identifier: GPL-2.0
//! The kernel source that a user names (`SOURCE=`), with an imitation of a few files.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

fn script() -> Command {
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new(repo.join("scripts/kernel-source.sh"));
    command.arg("7.3");
    command
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// A folder with a source in `linux` and a cache in `cache`.
fn source() -> TempDir {
    let dir = TempDir::new().unwrap();
    write(&dir.path().join("linux/Makefile"), "VERSION = 7\nPATCHLEVEL = 3\n");
    write(&dir.path().join("linux/mm/memory.c"), "old\n");
    write(&dir.path().join("linux/.git/objects/large"), "history\n");
    dir
}

fn fetch(dir: &Path, source: &str) -> Output {
    let mut command = script();
    command.env("ZDM_SOURCE", dir.join(source)).env("XDG_CACHE_HOME", dir.join("cache"));
    command.output().unwrap()
}

#[track_caller]
fn path(out: &Output) -> PathBuf {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    PathBuf::from(String::from_utf8_lossy(&out.stdout).trim())
}

/// The name of the source is part of the key of a kernel: with the same name the kernel of the old
/// source would be booted.
#[test]
fn an_edited_source_has_another_name() {
    let dir = source();
    let first = path(&fetch(dir.path(), "linux"));
    assert_eq!(path(&fetch(dir.path(), "linux")), first, "nothing has changed");
    write(&dir.path().join("linux/.git/index"), "git status\n");
    assert_eq!(path(&fetch(dir.path(), "linux")), first, "no file of the source has changed");
    write(&dir.path().join("linux/mm/memory.c"), "new\n");
    let second = path(&fetch(dir.path(), "linux"));
    assert_ne!(first, second);
    assert_eq!(fs::read_to_string(second.join("mm/memory.c")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(first.join("mm/memory.c")).unwrap(), "old\n");
    assert!(second.join(".complete").is_file() && !second.join(".git").exists());
}

#[test]
fn a_tarball_is_unpacked_once() {
    let dir = source();
    let mut tar = Command::new("tar");
    tar.current_dir(dir.path()).args(["-cf", "linux.tar", "linux"]);
    assert!(tar.status().unwrap().success());
    let first = path(&fetch(dir.path(), "linux.tar"));
    assert_eq!(fs::read_to_string(first.join("mm/memory.c")).unwrap(), "old\n");
    let again = fetch(dir.path(), "linux.tar");
    assert!(again.stderr.is_empty(), "{}", String::from_utf8_lossy(&again.stderr));
    assert_eq!(path(&again), first);
}

#[track_caller]
fn refused(out: &Output, says: &str) {
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && out.stdout.is_empty() && text.contains(says), "{text:?}");
}

#[test]
fn what_is_no_source_is_said() {
    let dir = source();
    refused(&fetch(dir.path(), "linus"), "no such file");
    write(&dir.path().join("empty/README"), "");
    refused(&fetch(dir.path(), "empty"), "holds no kernel tree");
    write(&dir.path().join("linux/Makefile"), "VERSION = 7\nPATCHLEVEL = 2\n");
    refused(
        &fetch(dir.path(), "linux"),
        "is Linux 7.2; the kernels that are asked for are Linux 7.3",
    );
    write(&dir.path().join("linux/include/config/auto.conf"), "");
    refused(&fetch(dir.path(), "linux"), "built in place");
}

/// Without Debian's package manager only a source of the user's own is left.
#[test]
fn without_apt_the_remedy_is_named() {
    let dir = source();
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let places: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect();
    for name in ["bash", "mkdir", "flock", "cat"] {
        let program = places.iter().map(|d| d.join(name)).find(|p| p.is_file());
        std::os::unix::fs::symlink(program.unwrap(), bin.join(name)).unwrap();
    }
    let mut command = script();
    command.env_remove("ZDM_SOURCE").env("XDG_CACHE_HOME", dir.path().join("cache"));
    refused(
        &command.env("PATH", &bin).output().unwrap(),
        "no apt-get here: name a tree or a tarball",
    );
}
