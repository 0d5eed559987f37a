// SPDX-License-Identifier: GPL-2.0
//! One boot of QEMU: starts, watches and ends it.

pub mod accel;
pub mod kvm;
pub mod payload;
pub mod script;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use zdvm_guest::wire::{Decoder, Message, PORT_NAME};

use crate::job::{self, Job};
use crate::judge::verdict::Exit;
use crate::plan::matrix::Timeouts;
use crate::vm::accel::Accel;

/// The description of a guest.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The emulator.
    pub qemu: PathBuf,
    /// bzImage.
    pub image: PathBuf,
    /// initramfs.
    pub initrd: PathBuf,
    /// `-m`.
    pub memory: String,
    /// `-smp`.
    pub vcpus: u32,
    /// Additional options of the kernel command line.
    pub cmdline: String,
    /// The directory of console.log, wire.log and other files.
    pub dir: PathBuf,
    /// Additional arguments of QEMU.
    pub extra: Vec<String>,
}

/// The result of a boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// QEMU has ended.
    Ended(Exit),
    /// Not one line came within the time for proving an accelerator.
    Mute,
}

/// Watches a running guest.
pub trait Watcher {
    /// A message of the status stream has come.
    fn message(&mut self, message: &Message);
    /// More text has come on the console.
    fn console(&mut self, _more: &str) {}
    /// Whether enough has been seen, so that the guest may be ended.
    fn enough(&self) -> bool {
        false
    }
}

/// A watcher that ignores everything.
#[derive(Debug)]
pub struct Blind;

impl Watcher for Blind {
    fn message(&mut self, _message: &Message) {}
}

/// A watcher that stores all messages.
impl Watcher for Vec<Message> {
    fn message(&mut self, message: &Message) {
        self.push(message.clone());
    }
}

/// The progress of a guest, which decides the limits that apply.
#[derive(Debug)]
struct Watch {
    limits: Timeouts,
    start: Instant,
    suite: Option<Instant>,
    hello: bool,
    active: Instant,
}

impl Watch {
    fn new(limits: Timeouts) -> Self {
        let now = Instant::now();
        Self { limits, start: now, suite: None, hello: false, active: now }
    }

    fn message(&mut self, message: &Message) {
        self.active = Instant::now();
        match message {
            Message::Hello { .. } => self.hello = true,
            Message::SuiteStart(_) => self.suite = Some(self.active),
            Message::SuiteEnd(..) => self.suite = None,
            _ => {}
        }
    }

    /// The limit that has passed, if any.
    fn expired(&self) -> Option<Exit> {
        let over = |since: Instant, secs: u64| since.elapsed() > Duration::from_secs(secs);
        // The guest ends a hung test itself if it can: give it time to do so first.
        let silence = self.limits.test + self.limits.test.min(10);
        let (what, secs) = if over(self.start, self.limits.total) {
            ("total", self.limits.total)
        } else if !self.hello && over(self.start, self.limits.boot) {
            ("boot", self.limits.boot)
        } else if self.suite.is_some_and(|s| over(s, self.limits.suite)) {
            ("suite", self.limits.suite)
        } else if self.hello && over(self.active, silence) {
            ("test", silence)
        } else {
            return None;
        };
        Some(Exit::Timeout(what.to_owned(), secs))
    }
}

impl Machine {
    /// The arguments of QEMU for an accelerator; `control` is the directory of sockets.
    pub fn arguments(&self, accel: Accel, control: &Path) -> Vec<String> {
        let mut args = self.basics(accel);
        args.push("-append".to_owned());
        args.push(self.append(accel));
        for word in [
            "-chardev",
            "stdio,id=console,signal=off",
            "-serial",
            "chardev:console",
            "-device",
            "virtio-serial-pci",
            "-chardev",
        ] {
            args.push(word.to_owned());
        }
        args.push(format!("file,id=status,path={}", self.dir.join("wire.log").display()));
        args.push("-device".to_owned());
        args.push(format!("virtserialport,chardev=status,name={PORT_NAME}"));
        args.push("-qmp".to_owned());
        args.push(format!("unix:{},server=on,wait=off", control.join("qmp").display()));
        args.extend(self.extra.iter().cloned());
        args
    }

    /// The processor, memory, kernel and initramfs in [`Machine::arguments`].
    pub fn basics(&self, accel: Accel) -> Vec<String> {
        let mut args: Vec<String> = accel.arguments().iter().map(|a| (*a).to_owned()).collect();
        for word in ["-nodefaults", "-display", "none", "-no-reboot", "-m"] {
            args.push(word.to_owned());
        }
        args.push(self.memory.clone());
        args.push("-smp".to_owned());
        args.push(self.vcpus.to_string());
        args.push("-kernel".to_owned());
        args.push(self.image.display().to_string());
        args.push("-initrd".to_owned());
        args.push(self.initrd.display().to_string());
        args
    }

    /// The kernel's command line.
    pub fn append(&self, accel: Accel) -> String {
        // A panic ends QEMU at once (-no-reboot). An oops must not: the log shows it. User space
        // may write to the log without a rate limit, so that no bracket of a test is lost.
        let mut line = "console=ttyS0 ignore_loglevel printk.time=1 printk_devkmsg=on panic=-1 \
                        sysrq_always_enabled"
            .to_owned();
        if accel != Accel::Kvm {
            // On a busy host the emulated timer may stand still while the kernel counts ticks in a
            // short loop. The kernel would take that for a broken IO-APIC and panic. All time stamp counters are
            // the host's; the watchdog that compares them spins until another processor answers, which was
            // seen to last for ever with more processors than the host has.
            line.push_str(
                " no_timer_check tsc=reliable watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=60",
            );
        }
        if !self.cmdline.is_empty() {
            line.push(' ');
            line.push_str(&self.cmdline);
        }
        line
    }

    /// Whether the last boot printed any line on its console.
    pub fn has_spoken(&self) -> bool {
        fs::metadata(self.dir.join("console.log")).is_ok_and(|m| m.len() > 0)
    }

    /// Boots and watches the guest to its end. `mute_after` ends the boot if no line comes in that
    /// time.
    pub fn boot(
        &self,
        accel: Accel,
        limits: Timeouts,
        mute_after: Option<Duration>,
        watcher: &mut dyn Watcher,
    ) -> Result<Boot> {
        // The path of a socket must be short, and the run's folder may be deep.
        let control = tempfile::Builder::new().prefix("zdvm").tempdir()?;
        let args = self.arguments(accel, control.path());
        fs::write(self.dir.join("qemu-command.txt"), shell_line(&self.qemu, &args))?;
        let console = self.dir.join("console.log");
        let wire = self.dir.join("wire.log");
        File::create(&wire)?;
        let mut command = job::command(&self.qemu);
        command.args(&args).stdin(Stdio::piped()).stdout(File::create(&console)?);
        command.stderr(File::create(self.dir.join("qemu-stderr.log"))?);
        let mut job = Job::spawn(&mut command, "QEMU")?;
        let mut keyboard = job.child().stdin.take();
        let (mut stream, mut log) = (File::open(&wire)?, File::open(&console)?);
        let (mut decoder, mut watch) = (Decoder::default(), Watch::new(limits));
        let mut said = 0;
        loop {
            let ended = job.poll()?;
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes)?;
            for message in decoder.feed(&bytes) {
                watch.message(&message);
                watcher.message(&message);
            }
            if let Some(status) = ended {
                return Ok(Boot::Ended(exit(status)));
            }
            job::check_signals()?;
            let mut more = Vec::new();
            log.read_to_end(&mut more)?;
            if !more.is_empty() {
                said += more.len();
                // KUnit prints only on the console, one line per case.
                watch.active = Instant::now();
                watcher.console(&String::from_utf8_lossy(&more));
            }
            if watcher.enough() {
                return Ok(Boot::Ended(Exit::Enough));
            }
            if said == 0 && mute_after.is_some_and(|limit| watch.start.elapsed() > limit) {
                return Ok(Boot::Mute);
            }
            if let Some(exit) = watch.expired() {
                let mut keys = |key: u8| {
                    keyboard
                        .as_mut()
                        .map_or(Ok(()), |k| k.write_all(&[key]).and_then(|()| k.flush()))
                };
                if let Err(e) = dump(&mut job, control.path(), &console, &self.dir, &mut keys) {
                    eprintln!("zdvm: no stacks of the hung guest: {e:#}");
                }
                return Ok(Boot::Ended(exit));
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Runs an interactive guest on this terminal.
    pub fn interact(&self, accel: Accel) -> Result<ExitStatus> {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.qemu).args(self.basics(accel));
        command.arg("-append").arg(self.append(accel).replace("ignore_loglevel", "loglevel=4"));
        command.args(["-serial", "mon:stdio"]).args(&self.extra);
        job::attached(&mut command, "QEMU")
    }
}

fn exit(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or_default()),
    }
}

fn shell_line(program: &Path, args: &[String]) -> String {
    let program = program.to_string_lossy();
    let words = std::iter::once(&*program).chain(args.iter().map(String::as_str));
    // Only a NUL cannot be quoted, and no argument has one.
    shlex::try_join(words).unwrap_or_default() + "\n"
}

/// Makes a hung guest print all stacks into its console log (SysRq: break, then a letter). Also
/// writes the registers to a file, in case the guest no longer reacts.
fn dump(
    job: &mut Job,
    control: &Path,
    console: &Path,
    dir: &Path,
    key: &mut dyn FnMut(u8) -> std::io::Result<()>,
) -> Result<()> {
    let socket = UnixStream::connect(control.join("qmp")).context("connecting to QMP")?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let stream = qapi::Stream::new(std::io::BufReader::new(&socket), &socket);
    let mut qmp = qapi::Qmp::new(stream);
    qmp.handshake().context("QMP handshake")?;
    let registers = qmp.execute(&qapi::qmp::human_monitor_command {
        cpu_index: None,
        command_line: "info registers -a".to_owned(),
    })?;
    fs::write(dir.join("registers.txt"), registers)?;
    for letter in *b"lwt" {
        qmp.execute(&qapi::qmp::chardev_send_break { id: "console".to_owned() })?;
        // The break must arrive before the letter does.
        sleep(Duration::from_millis(100));
        key(letter)?;
        settle(job, console)?;
    }
    Ok(())
}

/// Waits until the console has been quiet for a while.
fn settle(job: &mut Job, console: &Path) -> Result<()> {
    let start = Instant::now();
    let (mut size, mut since) = (fs::metadata(console)?.len(), Instant::now());
    while start.elapsed() < Duration::from_secs(15) && since.elapsed() < Duration::from_millis(700)
    {
        if job.poll()?.is_some() {
            break;
        }
        sleep(Duration::from_millis(50));
        let now = fs::metadata(console)?.len();
        if now != size {
            (size, since) = (now, Instant::now());
        }
    }
    Ok(())
}
