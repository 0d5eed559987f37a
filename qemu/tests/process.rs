// SPDX-License-Identifier: GPL-2.0
//! QEMU as a process, with shell scripts in its place: KVM that hangs, timeouts, death, Ctrl-C.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use zdvm::judge::verdict::Exit;
use zdvm::plan::matrix::Timeouts;
use zdvm::vm::accel::Accel;
use zdvm::vm::kvm::Choice;
use zdvm::vm::{Blind, Boot, Machine};
use zdvm_guest::wire::{Encoder, Message};

mod common;

const LIMITS: Timeouts = Timeouts { boot: 2, test: 2, suite: 10, total: 20, tcg_factor: 1 };

/// A machine whose QEMU is a script.
fn machine(dir: &Path, script: &str) -> Machine {
    let qemu = dir.join("qemu");
    common::script(&qemu, &format!("#!/bin/sh\n{script}\n"));
    Machine {
        qemu,
        image: "bzImage".into(),
        initrd: "initrd".into(),
        memory: "1M".into(),
        vcpus: 1,
        cmdline: String::new(),
        dir: dir.to_owned(),
        extra: vec![],
    }
}

/// A choice without a remembered answer, for a /dev/kvm that opens.
fn choice(dir: &Path) -> Choice {
    let device = dir.join("kvm");
    fs::write(&device, "").unwrap();
    Choice::at(dir.join("memory"), device, Duration::from_millis(500))
}

fn alive(pid: &str) -> bool {
    // A zombie is dead; its parent has only not waited for it yet.
    fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
        .is_ok_and(|s| !s.rsplit(')').next().unwrap_or_default().trim().starts_with('Z'))
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "waited too long for {what}");
        sleep(Duration::from_millis(20));
    }
}

fn pid_in(dir: &Path) -> String {
    let path = dir.join("pid");
    wait_for("QEMU's pid", || fs::read_to_string(&path).is_ok_and(|t| t.ends_with('\n')));
    fs::read_to_string(path).unwrap()
}

/// Silent for ever under KVM; prints a guest's line under TCG.
const TRAP: &str = r#"
echo "$$" >> "$(dirname "$0")/pids"
case "$*" in
*kvm*) while :; do sleep 0.1; done ;;
*tcg*) echo "[    0.000000] Linux version"; exit 0 ;;
esac"#;

#[test]
fn kvm_trap() {
    let dir = TempDir::new().unwrap();
    let (machine, choice) = (machine(dir.path(), TRAP), choice(dir.path()));
    assert_eq!(choice.known(), None);
    let start = Instant::now();
    let (accel, exit) = choice.boot(&machine, LIMITS, &mut Blind).unwrap();
    assert_eq!((accel, exit), (Accel::Tcg, Exit::Code(0)));
    assert!(start.elapsed() < Duration::from_secs(10));
    // The answer is remembered: KVM is not tried again, and the first try leaves nothing.
    assert_eq!(choice.known(), Some(Accel::Tcg));
    choice.boot(&machine, LIMITS, &mut Blind).unwrap();
    let pids = fs::read_to_string(dir.path().join("pids")).unwrap();
    assert_eq!(pids.lines().count(), 3);
    assert!(pids.lines().all(|p| !alive(p)));
}

#[test]
fn kvm_that_aborts() {
    let dir = TempDir::new().unwrap();
    let script = r#"case "$*" in *kvm*) exit 1 ;; esac; echo up"#;
    let (machine, choice) = (machine(dir.path(), script), choice(dir.path()));
    let (accel, exit) = choice.boot(&machine, LIMITS, &mut Blind).unwrap();
    assert_eq!((accel, exit), (Accel::Tcg, Exit::Code(0)));
}

#[test]
fn kvm_that_works_is_kept() {
    let dir = TempDir::new().unwrap();
    let (machine, choice) = (machine(dir.path(), "echo up"), choice(dir.path()));
    assert_eq!(choice.boot(&machine, LIMITS, &mut Blind).unwrap().0, Accel::Kvm);
    assert_eq!(choice.known(), Some(Accel::Kvm));
}

#[test]
fn an_answer_is_believed_for_a_day_and_for_one_device() {
    let dir = TempDir::new().unwrap();
    let (machine, choice) = (machine(dir.path(), "echo up"), choice(dir.path()));
    choice.boot(&machine, LIMITS, &mut Blind).unwrap();
    assert_eq!(choice.known(), Some(Accel::Kvm));
    let memory = dir.path().join("memory");
    let old = std::time::SystemTime::now() - Duration::from_secs(25 * 60 * 60);
    fs::File::options().write(true).open(&memory).unwrap().set_modified(old).unwrap();
    assert_eq!(choice.known(), None);
    choice.boot(&machine, LIMITS, &mut Blind).unwrap();
    assert_eq!(choice.known(), Some(Accel::Kvm));
    // Other rights may make KVM usable.
    let device = dir.path().join("kvm");
    fs::set_permissions(&device, std::os::unix::fs::PermissionsExt::from_mode(0o660)).unwrap();
    assert_eq!(choice.known(), None);
}

#[test]
fn no_device_is_tcg() {
    let dir = TempDir::new().unwrap();
    let choice = Choice::at(dir.path().join("m"), dir.path().join("none"), Duration::ZERO);
    assert_eq!(choice.known(), Some(Accel::Tcg));
}

#[test]
fn boot_timeout() {
    let dir = TempDir::new().unwrap();
    let script = r#"echo $$ > "$(dirname "$0")/pid"; echo up; exec sleep 1000"#;
    let machine = machine(dir.path(), script);
    let boot = machine.boot(Accel::Tcg, LIMITS, None, &mut Blind).unwrap();
    assert_eq!(boot, Boot::Ended(Exit::Timeout("boot".into(), 2)));
    assert!(!alive(&pid_in(dir.path())));
}

#[test]
fn silence_in_a_suite() {
    let dir = TempDir::new().unwrap();
    let mut encoder = Encoder::default();
    let hello = Message::Hello { release: "7.3.4".into(), taint: 0 };
    let text = encoder.encode(&hello) + &encoder.encode(&Message::SuiteStart("hmm".into()));
    fs::write(dir.path().join("said"), text).unwrap();
    let script = r#"cd "$(dirname "$0")"; echo up; cat said >> wire.log; exec sleep 1000"#;
    let mut seen = Vec::new();
    let boot = machine(dir.path(), script).boot(Accel::Tcg, LIMITS, None, &mut seen).unwrap();
    assert_eq!(boot, Boot::Ended(Exit::Timeout("test".into(), 4)));
    assert_eq!(seen.len(), 2);
}

#[test]
fn qemu_killed_half_way() {
    let dir = TempDir::new().unwrap();
    let boot =
        machine(dir.path(), "echo up; kill -9 $$").boot(Accel::Tcg, LIMITS, None, &mut Blind);
    assert_eq!(boot.unwrap(), Boot::Ended(Exit::Signal(9)));
}

/// The child process of the tests below: boots a QEMU that never ends.
#[test]
#[ignore = "started by the tests of signals"]
fn child_that_boots() {
    let dir = PathBuf::from(std::env::var_os("ZDVM_TEST_DIR").unwrap());
    zdvm::job::watch_signals().unwrap();
    let limits = Timeouts { boot: 100, total: 100, ..LIMITS };
    let script = r#"echo $$ > "$(dirname "$0")/pid"; echo up; while :; do sleep 0.1; done"#;
    let error = machine(&dir, script).boot(Accel::Tcg, limits, None, &mut Blind).unwrap_err();
    fs::write(dir.join("error"), format!("{error:#}")).unwrap();
}

/// A child process with a guest on its terminal, whose QEMU ignores SIGTERM.
#[test]
#[ignore = "started by the tests of signals"]
fn child_that_shows_a_shell() {
    let dir = PathBuf::from(std::env::var_os("ZDVM_TEST_DIR").unwrap());
    zdvm::job::watch_signals().unwrap();
    let script = r#"trap '' TERM; echo $$ > "$(dirname "$0")/pid"; while :; do sleep 0.1; done"#;
    let error = machine(&dir, script).interact(Accel::Tcg).unwrap_err();
    fs::write(dir.join("error"), format!("{error:#}")).unwrap();
}

/// Another child process: a build in progress whose compiler ignores SIGTERM.
#[test]
#[ignore = "started by the tests of signals"]
fn child_that_builds() {
    let dir = PathBuf::from(std::env::var_os("ZDVM_TEST_DIR").unwrap());
    zdvm::job::watch_signals().unwrap();
    let compiler = "trap '' TERM; echo $$ > pid.new; mv pid.new pid; while :; do sleep 0.1; done";
    let makefile = format!("all:\n\t@$(MAKE) deep\ndeep:\n\t@{}\n", compiler.replace('$', "$$"));
    fs::write(dir.join("Makefile"), makefile).unwrap();
    let error = zdvm::kernel::make::logged(
        &mut zdvm::kernel::make::make(&dir),
        "a build",
        &dir.join("log"),
        None,
    );
    fs::write(dir.join("error"), format!("{:#}", error.unwrap_err())).unwrap();
}

/// Runs a command that starts a process with its number in a file of `dir`, and sends the command a signal.
/// Returns the command's status when both have ended.
fn ended_by(signal: &str, command: &mut Command, dir: &Path) -> ExitStatus {
    command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let mut child = command.spawn().unwrap();
    let started = pid_in(dir);
    assert!(alive(&started));
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let status = child.wait().unwrap();
    wait_for("the end of what it had started", || !alive(&started));
    status
}

fn signalled(role: &str, signal: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", role]).env("ZDVM_TEST_DIR", dir.path());
    let status = ended_by(signal, &mut command, dir.path());
    assert_eq!(status.signal().is_some(), signal == "-KILL");
    dir
}

#[test]
fn a_build_ends_with_us() {
    for (signal, number) in [("-INT", 2), ("-TERM", 15)] {
        let dir = signalled("child_that_builds", signal);
        let error = fs::read_to_string(dir.path().join("error")).unwrap();
        assert_eq!(error, format!("interrupted by signal {number}"));
    }
    signalled("child_that_builds", "-KILL");
}

/// `./zdvm` builds the program before it starts it.
#[test]
fn what_precedes_the_program_ends_with_the_wrapper() {
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let dir = TempDir::new().unwrap();
    let script = |name: &str, text: &str| common::script(&dir.path().join(name), text);
    let wrapper = dir.path().join("zdvm");
    script("zdvm", &fs::read_to_string(repo.join("zdvm")).unwrap());
    let tools = "#!/bin/sh\n[ \"$1\" = run ] || echo making a sysroot >&2\n";
    script("scripts/toolchain.sh", tools);
    let compiler = "echo $$ > pid.new; mv pid.new pid; while :; do sleep 0.1; done";
    let compiler = compiler.replace('$', "$$");
    script("Makefile", &format!("target/debug/zdvm:\n\t@$(MAKE) deep\ndeep:\n\t@{compiler}\n"));
    for (command, status) in [("run", 2), ("bisect", 128)] {
        for signal in ["-TERM", "-INT", "-HUP"] {
            let _ = fs::remove_file(dir.path().join("pid"));
            // The program that runs these tests may ignore signals, as nohup does.
            let mut wrapped = Command::new("env");
            wrapped.arg("--default-signal").arg(&wrapper).arg(command);
            let end = ended_by(signal, &mut wrapped, dir.path());
            assert_eq!(end.code(), Some(status), "{command} {signal}");
        }
    }
    // What takes minutes is announced, once.
    script("Makefile", "target/debug/zdvm:\n\t@true\n");
    let out = Command::new(&wrapper).arg("run").output().unwrap();
    assert!(out.status.success());
    assert_eq!(String::from_utf8_lossy(&out.stderr), "making a sysroot\n");
}

#[test]
fn ctrl_c_and_sigterm_leave_no_qemu() {
    for (signal, number) in [("-INT", 2), ("-TERM", 15)] {
        let dir = signalled("child_that_boots", signal);
        let error = fs::read_to_string(dir.path().join("error")).unwrap();
        assert_eq!(error, format!("interrupted by signal {number}"));
    }
}

#[test]
fn a_shell_ends_with_us() {
    for (signal, number) in [("-INT", 2), ("-TERM", 15), ("-HUP", 1)] {
        let dir = signalled("child_that_shows_a_shell", signal);
        let error = fs::read_to_string(dir.path().join("error")).unwrap();
        assert_eq!(error, format!("interrupted by signal {number}"));
    }
    signalled("child_that_shows_a_shell", "-KILL");
}

#[test]
fn even_our_own_death_leaves_no_qemu() {
    signalled("child_that_boots", "-KILL");
}
