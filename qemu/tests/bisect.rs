// SPDX-License-Identifier: GPL-2.0
//! `git bisect run zdvm bisect` on an invented history of twelve commits: one does not build, one
//! does not boot, and one brings a bug. Shell scripts stand in for the kernel's make and for QEMU;
//! git, the program and its exit statuses are real.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use tempfile::TempDir;
use zdvm_guest::wire::{Encoder, Message};

mod common;
use common::script;

const MATRIX: &str = r#"
order = ["kunit"]
requires = ["CONFIG_A=y"]
compile = {}
[timeouts]
boot = 10
test = 10
suite = 20
total = 30
tcg_factor = 1
[kernel.stock]
source = "7.3"
config = ["config/base.config"]
taint_after = ""
[machine.default]
memory = "1M"
vcpus = 1
[suite.kunit]
kind = "kunit"
expected = "expected/kunit.toml"
"#;

/// Stands in for the kernel's make: makes a configuration, and an image that has the state of the
/// commit.
const MAKEFILE: &str = r#"
VERSION = 7
PATCHLEVEL = 3
O ?= .
tinyconfig:
	@mkdir -p $(O)
	@echo "CONFIG_RUSTC_VERSION_TEXT=\"$$(rustc --version)\"" > $(O)/.config
olddefconfig:
	@true
bzImage: modules
	@echo "built $$(cat state)" >> $(O)/builds
	@! grep -q unbuildable state || { echo "mm/gup.c:1: error: expected ';'"; exit 1; }
	@mkdir -p $(O)/arch/x86/boot $(O)/include/config $(O)/usr $(O)/rust
	@cat image state > $(O)/arch/x86/boot/bzImage
	@echo 7.3.4 > $(O)/include/config/kernel.release
	@touch $(O)/rust/libkernel.rmeta
	@cp archiver $(O)/usr/gen_init_cpio
modules:
	@true
"#;

const MERGE: &str = "#!/bin/sh\nobjects=$3\nconfig=$4\nshift 4\ncat \"$@\" >> \"$config\"\n";

/// Stands in for the module and the guest's programs, as far as the test reads them.
const REPO_MAKEFILE: &str = "modules:\n\
    \t@printf 'name=zdmirror\\000vermagic=7.3.4 SMP\\000' > $(MO)/zdmirror.ko\n";
const CARGO: &str = "#!/bin/sh\nd=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release\nmkdir -p $d\n\
    touch $d/zdvm-guest $d/zdvm-audit\n";

/// Stands in for QEMU: replays the recorded wire and console that the end of the image names. The
/// test "b" of a flaky kernel fails only in the kernel's first boot.
const QEMU: &str = r#"#!/bin/sh
while [ $# -gt 0 ]; do
	case $1 in
	-kernel) image=$2 ;;
	file,id=status,path=*) wire=${1#*path=} ;;
	esac
	shift
done
state=$(tail -n 1 "$image")
echo "boot $state" >> DIR/boots
case $state in
unbootable) echo "[    0.100000] Kernel panic - not syncing: made up"; exit 0 ;;
bad) cp DIR/bad.wire "$wire" ;;
flaky)
	if [ -e DIR/once ]; then cp DIR/good.wire "$wire"; else cp DIR/bad.wire "$wire"; touch DIR/once; fi ;;
*) cp DIR/good.wire "$wire" ;;
esac
echo "[    1.000000] reboot: Power down"
"#;

/// The messages of a guest with a suite of two cases, the second of which may fail.
fn wire(second: &str) -> String {
    let mut messages = vec![
        Message::Hello { release: "7.3.4".into(), taint: 0 },
        Message::SuiteStart("kunit".into()),
    ];
    for line in [
        "KTAP version 1",
        "1..1",
        "    KTAP version 1",
        "    # Subtest: pool",
        "    1..2",
        "    ok 1 a",
        second,
    ] {
        messages.push(Message::Ktap(line.into()));
    }
    let whole = if second.contains("not ok") { "not ok 1 pool" } else { "ok 1 pool" };
    messages.extend([
        Message::Ktap(whole.into()),
        Message::SuiteEnd("kunit".into(), None),
        Message::Taint(0),
        Message::Done,
    ]);
    let mut encoder = Encoder::default();
    messages.iter().map(|m| encoder.encode(m)).collect()
}

struct World {
    dir: TempDir,
    commits: Vec<String>,
}

impl World {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a tree whose commits have these states.
    fn new(states: &[&str]) -> Self {
        let mut world = Self { dir: TempDir::new().unwrap(), commits: Vec::new() };
        let at = |name: &str| world.path(name);
        fs::create_dir_all(at("repo/qemu/kernel/config")).unwrap();
        fs::create_dir_all(at("repo/qemu/kernel/expected")).unwrap();
        fs::write(at("repo/qemu/kernel/matrix.toml"), MATRIX).unwrap();
        fs::write(at("repo/qemu/kernel/config/base.config"), "CONFIG_A=y\n").unwrap();
        fs::write(at("repo/qemu/kernel/expected/kunit.toml"), "tests = [\"pool.a\", \"pool.b\"]\n")
            .unwrap();
        fs::write(at("repo/Makefile"), REPO_MAKEFILE).unwrap();
        script(&at("bin/cargo"), CARGO);
        script(&at("bin/qemu"), &QEMU.replace("DIR", &world.dir.path().display().to_string()));
        fs::write(at("good.wire"), wire("    ok 2 b")).unwrap();
        fs::write(at("bad.wire"), wire("    not ok 2 b")).unwrap();
        fs::create_dir(at("linux")).unwrap();
        fs::write(at("linux/Makefile"), MAKEFILE).unwrap();
        fs::write(at("linux/Kbuild"), "").unwrap();
        script(&at("linux/scripts/kconfig/merge_config.sh"), MERGE);
        script(&at("linux/archiver"), "#!/bin/sh\ncat \"$1\"\n");
        let mut image = vec![0_u8; 0x240];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x20_u16.to_le_bytes());
        image[0x220..0x226].copy_from_slice(b"7.3.4 ");
        image.push(b'\n');
        fs::write(at("linux/image"), image).unwrap();
        world.git(&["init", "-q"]);
        for (number, state) in states.iter().enumerate() {
            fs::write(world.path("linux/state"), format!("{state}\n")).unwrap();
            fs::write(world.path("linux/number"), number.to_string()).unwrap();
            world.git(&["add", "-A"]);
            world.git(&["commit", "-q", "-m", &format!("{number} {state}")]);
            let id = world.git(&["rev-parse", "HEAD"]);
            world.commits.push(id.trim().to_owned());
        }
        world
    }

    fn command(&self, program: &str) -> Command {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(program);
        command
            .current_dir(self.path("linux"))
            .env("PATH", path)
            .env("HOME", self.dir.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("ZDVM_QEMU", self.path("bin/qemu"))
            .env("ZDVM_REPO", self.path("repo"));
        for (name, value) in [("NAME", "A"), ("EMAIL", "a@example.org")] {
            command.env(format!("GIT_AUTHOR_{name}"), value);
            command.env(format!("GIT_COMMITTER_{name}"), value);
        }
        command
    }

    fn git(&self, args: &[&str]) -> String {
        let out = self.command("git").args(args).output().unwrap();
        assert!(out.status.success(), "git {args:?}: {}", text(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn bisect(&self, more: &[&str]) -> Output {
        let program = env!("CARGO_BIN_EXE_zdvm");
        self.command(program).args(["bisect", "--accel", "tcg"]).args(more).output().unwrap()
    }

    fn lines(&self, file: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path(file)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

#[test]
fn the_bad_one_of_twelve_commits() {
    let mut states = ["good"; 12];
    states[8..].fill("bad");
    (states[5], states[6]) = ("unbuildable", "unbootable");
    let world = World::new(&states);
    world.git(&["bisect", "start", &world.commits[11], &world.commits[0]]);
    let program = env!("CARGO_BIN_EXE_zdvm");
    let out = world
        .command("git")
        .args(["bisect", "run", program, "bisect", "--accel", "tcg", "--filter", r"^pool\."])
        .output()
        .unwrap();
    let said = text(&out);
    assert!(said.contains(&format!("{} is the first bad commit", world.commits[8])), "{said}");
    let log = world.git(&["bisect", "log"]);
    assert!(log.contains("git bisect skip"), "neither the fifth nor the sixth was met: {log}");
    let boots = world.lines("boots");
    let bad = boots.iter().filter(|l| *l == "boot bad").count();
    assert!(bad >= 2 && bad % 2 == 0, "a failure is confirmed by a second boot: {boots:?}");
    assert!(world.git(&["status", "--porcelain"]).is_empty(), "the tree is not written to");
}

#[test]
fn exit_statuses() {
    for (state, options, status, boots) in [
        ("good", &[][..], 0, 1),
        ("bad", &[], 1, 2),
        ("flaky", &[], 0, 3),
        ("unbootable", &[], 125, 2),
        ("unbootable", &["--unbootable", "bad"], 1, 2),
        ("unbuildable", &[], 125, 0),
        ("unbuildable", &["--unbuildable", "bad"], 1, 0),
        ("good", &["--filter", "^nothing_of_this_name"], 128, 0),
        ("good", &["--filter", "("], 128, 0),
        ("good", &["--kdir", "/nonexistent"], 128, 0),
        ("good", &["--no-such-option"], 128, 0),
    ] {
        let world = World::new(&[state]);
        let out = world.bisect(options);
        assert_eq!(out.status.code(), Some(status), "{state} {options:?}: {}", text(&out));
        assert_eq!(world.lines("boots").len(), boots, "{state} {options:?}: {}", text(&out));
    }
}

#[test]
fn builds_share_one_directory() {
    let world = World::new(&["good", "good"]);
    for commit in &world.commits {
        world.git(&["checkout", "-q", commit]);
        assert_eq!(world.bisect(&[]).status.code(), Some(0));
    }
    let kernels = fs::read_dir(world.path("cache/zdmirror/kernels")).unwrap();
    let dirs = kernels.flatten().filter(|e| e.path().is_dir()).count();
    assert_eq!(dirs, 1);
    // A tree that is configured in place cannot be built elsewhere, and nothing here removes .config.
    fs::write(world.path("linux/.config"), "").unwrap();
    let out = world.bisect(&[]);
    assert_eq!(out.status.code(), Some(128));
    assert!(text(&out).contains("worktree add"), "{}", text(&out));
}
