// SPDX-License-Identifier: GPL-2.0
//! The output of `./zdvm doctor` on machines of other distributions; versions stand in one place
//! only.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

mod common;
use common::script;

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Programs that the doctor itself uses, which every machine has. `df` and `du` are not among them: the
/// disk is part of the machine that a test describes.
const PLAIN: &[&str] = &[
    "awk",
    "bash",
    "cat",
    "cut",
    "dirname",
    "env",
    "grep",
    "id",
    "nproc",
    "readlink",
    "sed",
    "sha256sum",
    "tr",
    "uname",
];

/// A shell script that prints `text`.
fn prints(path: &Path, text: &str) {
    script(path, &format!("#!/bin/sh\nprintf '%s\\n' '{text}'\n"));
}

/// The doctor's exit status and output on a machine with room on its disk that has `programs` and this
/// os-release.
fn doctor(os_release: &str, programs: &[&str], kvm: bool) -> (i32, String) {
    doctor_with(os_release, programs, kvm, (100, 0), "sysroot")
}

/// The same on a disk with some GiB free, where the cache holds some GiB, and with ZDM_TOOLCHAIN.
fn doctor_with(
    os_release: &str,
    programs: &[&str],
    kvm: bool,
    (free, used): (u64, u64),
    toolchain: &str,
) -> (i32, String) {
    let dir = TempDir::new().unwrap();
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let find = |name: &str| {
        let path = std::env::var_os("PATH").unwrap();
        std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file())
    };
    for name in PLAIN {
        symlink(find(name).unwrap_or_else(|| panic!("no {name} here")), bin.join(name)).unwrap();
    }
    for name in programs {
        symlink(find("true").unwrap(), bin.join(name)).unwrap();
    }
    let kib = |gib: u64| gib << 20;
    prints(
        &bin.join("df"),
        &format!("Filesystem 1024-blocks Used Available\ndisk 1 1 {}", kib(free)),
    );
    prints(&bin.join("du"), &format!("{} cache", kib(used)));
    let os = dir.path().join("os-release");
    fs::write(&os, os_release).unwrap();
    let device = dir.path().join("kvm");
    if kvm {
        fs::write(&device, "").unwrap();
    }
    let out = Command::new(find("bash").unwrap())
        .arg(repo().join("scripts/doctor.sh"))
        .env_clear()
        .env("PATH", &bin)
        .env("HOME", dir.path())
        .env("ZDM_OS_RELEASE", &os)
        .env("ZDM_KVM", &device)
        .env("ZDM_TOOLCHAIN", toolchain)
        .output()
        .unwrap();
    (out.status.code().unwrap(), String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The lines below "To mend it, run:".
fn remedies(text: &str) -> Vec<String> {
    let (_, after) = text.split_once("To mend it, run:\n").unwrap_or_else(|| panic!("{text}"));
    after.lines().map(|l| l.trim().replace("sudo ", "")).collect()
}

#[test]
fn every_distribution_is_told_its_own_command() {
    let (status, text) = doctor("ID=debian\nVERSION_CODENAME=bookworm\n", &["git"], true);
    assert_eq!(status, 1);
    let first = &remedies(&text)[0];
    assert!(first.starts_with("apt-get install -y make mmdebstrap bubblewrap"), "{text}");

    let (status, text) = doctor("ID=ubuntu\nID_LIKE=debian\n", &["git", "make"], true);
    assert_eq!(status, 1);
    assert!(remedies(&text)[0].starts_with("apt-get install -y mmdebstrap bubblewrap"), "{text}");

    for (os, install) in [
        ("ID=fedora\n", "dnf install -y git make podman"),
        ("ID=arch\n", "pacman -S --needed --noconfirm git make podman"),
        ("ID=endeavouros\nID_LIKE=arch\n", "pacman -S --needed --noconfirm git make podman"),
        (
            "ID=opensuse-tumbleweed\nID_LIKE=\"opensuse suse\"\n",
            "zypper install -y git make podman",
        ),
        ("ID=gentoo\n", "install these with your package manager: git make podman"),
    ] {
        let (status, text) = doctor(os, &[], true);
        assert_eq!(status, 1, "{text}");
        let remedies = remedies(&text);
        assert_eq!(remedies[0], install, "{text}");
        assert!(remedies[1].starts_with("podman build -t zdmirror ."), "{text}");
        assert!(remedies[1].contains("--device /dev/kvm"), "{text}");
    }
}

#[test]
fn a_machine_with_podman_lacks_nothing() {
    let (status, text) = doctor("ID=fedora\n", &["git", "make", "podman"], false);
    assert_eq!(status, 0, "{text}");
    assert!(text.contains("Next: podman build"), "{text}");
    assert!(!text.contains("--device"), "there is no device to pass on: {text}");
    assert!(text.contains("slow      no "), "{text}");
}

/// With the tools of the machine itself neither a container nor a sysroot is needed, but each tool is.
#[test]
fn own_tools_are_named_one_by_one() {
    let own = |programs: &[&str]| doctor_with("ID=fedora\n", programs, false, (100, 0), "native");
    let (status, text) = own(&["git", "make", "gcc"]);
    assert_eq!(status, 1, "{text}");
    let line = text.lines().find(|l| l.contains("ZDM_TOOLCHAIN=native takes")).unwrap();
    assert!(
        line.contains(" bindgen ") && !line.contains(" gcc ") && !text.contains("podman"),
        "{text}"
    );
    let remedies = remedies(&text);
    assert!(remedies.iter().any(|r| r.starts_with("unset ZDM_TOOLCHAIN")), "{text}");
    assert!(remedies.iter().any(|r| r.starts_with("export ZDM_SOURCE=")), "no apt-get: {text}");

    let (_, tools) = line.split_once(": ").unwrap();
    let all: Vec<&str> =
        ["git", "make", "gcc", "apt-get"].into_iter().chain(tools.split(' ')).collect();
    let (status, text) = own(&all);
    assert_eq!(status, 0, "{text}");
    assert!(text.contains("Next: ./zdvm run") && !text.contains("sysroot"), "{text}");
}

#[test]
fn a_full_disk_is_named_with_its_remedy() {
    let lacks_nothing = &["git", "make", "podman"];
    let (status, text) = doctor_with("ID=fedora\n", lacks_nothing, false, (14, 0), "sysroot");
    assert_eq!(status, 1, "{text}");
    assert!(text.contains("MISSING   disk: 15 GiB are needed in "), "{text}");
    assert!(text.contains(", 14 GiB are free"), "{text}");
    assert!(remedies(&text).iter().any(|r| r.starts_with("export XDG_CACHE_HOME=")), "{text}");

    // What the cache holds need not be written again.
    let (status, text) = doctor_with("ID=fedora\n", lacks_nothing, false, (14, 1), "sysroot");
    assert_eq!(status, 0, "{text}");
    assert!(text.contains(", 1 GiB used there"), "{text}");
}

#[test]
fn what_will_be_downloaded_is_said() {
    let (_, text) = doctor("ID=debian\n", &["git", "make"], true);
    for what in ["a Debian 13 sysroot", "linux-source-7.3", "crates"] {
        assert!(text.contains(&format!("download  {what}")) || text.contains(what), "{text}");
    }
}

/// The first capture of a line of a file.
fn word(file: &str, pattern: &str) -> String {
    let text = fs::read_to_string(repo().join(file)).unwrap();
    let found = regex::RegexBuilder::new(pattern).multi_line(true).build().unwrap();
    found.captures(&text).unwrap_or_else(|| panic!("no /{pattern}/ in {file}"))[1].to_owned()
}

#[test]
fn there_is_one_version() {
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(word("Cargo.toml", r#"^version = "(.*)"$"#), version);
    assert_eq!(word("dkms.conf", r#"^PACKAGE_VERSION="(.*)"$"#), version);
    assert_eq!(word("CHANGELOG.md", r"^## ([0-9.]+)"), version);
}
