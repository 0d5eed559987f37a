// SPDX-License-Identifier: GPL-2.0
//! `zdvm gdb`: runs a guest with a debugger attached, and loads the module's symbols at the
//! module's address.
//!
//! The kernels of the matrix have no debug information, so the kernel's own `lx-symbols` cannot
//! read the list of modules. The guest prints the addresses of the module's sections instead.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command::run::{self, Setup};
use crate::job::{self, Job};
use crate::plan::matrix::Matrix;
use crate::report;
use crate::vm::Machine;
use crate::vm::accel::Accel;
use crate::vm::kvm::Choice;

/// The options of this command beside those for the kernel and the machine.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stop at this function, print the stack, and end; may be given more than once.
    #[arg(long = "break", value_name = "FUNCTION", requires = "typed")]
    breaks: Vec<String>,
    /// Type this command in the guest's shell once the breakpoints are set.
    #[arg(long = "type", value_name = "COMMAND", requires = "breaks")]
    typed: Option<String>,
    /// Seconds that the guest may take to boot, and again to reach a breakpoint.
    #[arg(long, default_value_t = 180)]
    timeout: u64,
}

/// What the guest prints when its shell waits for a command.
const PROMPT: &str = "guest# ";

/// The file that gdb reads first: the kernel's symbols, the connection to the guest, the module's
/// symbols.
fn init(setup: &Setup, dir: &Path, socket: &Path) -> String {
    let objects = &setup.tree.objects;
    let scripts = objects.join("vmlinux-gdb.py");
    let source = match scripts.is_file() {
        true => format!("source {}\n", scripts.display()),
        false => String::new(),
    };
    format!(
        "set pagination off\nset confirm off\nset print demangle on\nset print asm-demangle on\n\
         file {vmlinux}\n{source}target remote {socket}\n\
         python\n\
         import re\n\
         text = open({console:?}, errors=\"replace\").read()\n\
         found = dict(re.findall(r\"zdvm: section (\\S+) (0x[0-9a-f]+)\", text))\n\
         if \".text\" in found:\n\
         \x20   others = [\"-s %s %s\" % i for i in found.items() if i[0] != \".text\"]\n\
         \x20   gdb.execute(\"add-symbol-file %s %s %s\" % ({module:?}, found[\".text\"], \" \".join(others)))\n\
         else:\n\
         \x20   print(\"zdvm: the module is not loaded yet; source this file again later\")\n\
         end\n",
        vmlinux = objects.join("vmlinux").display(),
        socket = socket.display(),
        console = dir.join("console.log").display().to_string(),
        module = setup.module.display().to_string(),
    )
}

/// The commands that gdb runs without a user.
fn script(init: &Path, ready: &Path, breaks: &[String]) -> String {
    let mut out = format!("source {}\n", init.display());
    for function in breaks {
        out += &format!("break {function}\n");
    }
    // The guest runs on after `continue`; the serial port keeps the characters that are typed
    // before that.
    out + &format!(
        "shell touch {}\ncontinue\necho zdvm: stopped at \\n\ninfo symbol $pc\nbacktrace 12\ndisconnect\n",
        ready.display()
    )
}

/// Whether gdb stopped at a breakpoint and printed a stack. "Breakpoint 1 at" only says that the
/// breakpoint is set.
fn reached(log: &str) -> bool {
    let stop = |l: &str| match l.split_once("Breakpoint ") {
        Some((_, rest)) => rest.split_once(", ").is_some_and(|(n, _)| n.parse::<u32>().is_ok()),
        None => false,
    };
    log.lines().any(stop) && log.lines().any(|l| l.starts_with("#0 "))
}

/// Waits until `done`, or until the guest has ended, a signal has come, or `limit` has passed.
fn wait(qemu: &mut Job, limit: Duration, what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !done() {
        job::check_signals()?;
        if let Some(status) = qemu.poll()? {
            bail!("QEMU ended ({status}) before {what}");
        }
        if start.elapsed() > limit {
            bail!("{what}: not within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn arguments(machine: &Machine, accel: Accel, socket: &Path, console: &[String]) -> Vec<String> {
    let mut args = machine.basics(accel);
    args.push("-append".to_owned());
    args.push(machine.append(accel).replace("ignore_loglevel", "loglevel=4"));
    args.push("-gdb".to_owned());
    args.push(format!("unix:{},server=on,wait=off", socket.display()));
    args.extend(console.iter().cloned());
    args
}

/// Runs a guest on this terminal; the user starts gdb in another one.
fn interactive(machine: &Machine, accel: Accel, socket: &Path, dir: &Path) -> Result<()> {
    let console = [
        "-chardev".to_owned(),
        format!("stdio,id=con,mux=on,signal=off,logfile={}", dir.join("console.log").display()),
        "-serial".to_owned(),
        "chardev:con".to_owned(),
        "-mon".to_owned(),
        "chardev=con".to_owned(),
    ];
    report::say(&format!(
        "zdvm: once the shell is there, in another terminal:\n\n    scripts/toolchain.sh run gdb -x {}\n\n\
         zdvm: then for example: break zdm_module_try_get, continue; and open a device here\n\n",
        dir.join("gdb.init").display()
    ));
    let mut command = std::process::Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(&machine.qemu);
    command.args(arguments(machine, accel, socket, &console));
    job::attached(&mut command, "QEMU")?;
    Ok(())
}

/// Boots, sets breakpoints and types a command. Returns whether a breakpoint was reached.
fn scripted(
    machine: &Machine,
    accel: Accel,
    socket: &Path,
    dir: &Path,
    args: &Args,
) -> Result<bool> {
    let console = ["-serial".to_owned(), "stdio".to_owned()];
    let log = dir.join("console.log");
    let mut command = job::command(&machine.qemu);
    command.args(arguments(machine, accel, socket, &console));
    command.stdin(Stdio::piped()).stdout(File::create(&log)?);
    command.stderr(File::create(dir.join("qemu-stderr.log"))?);
    let mut qemu = Job::spawn(&mut command, "QEMU")?;
    let mut keyboard = qemu.child().stdin.take().context("QEMU has no standard input")?;
    let limit = Duration::from_secs(args.timeout);
    let said = |path: &Path, text: &str| {
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).contains(text)
    };
    wait(&mut qemu, limit, "the guest's prompt", || said(&log, PROMPT))?;
    let (ready, out) = (dir.join("gdb.ready"), dir.join("gdb.log"));
    fs::write(dir.join("gdb.script"), script(&dir.join("gdb.init"), &ready, &args.breaks))?;
    let mut command = job::command("gdb");
    command.args(["-nx", "-batch", "-x"]).arg(dir.join("gdb.script")).stdin(Stdio::null());
    let file = File::create(&out)?;
    command.stdout(file.try_clone()?).stderr(file);
    let mut gdb = Job::spawn(&mut command, "gdb")?;
    let mut hit = false;
    let result = wait(&mut qemu, limit, "gdb's breakpoints", || {
        ready.exists() || !matches!(gdb.poll(), Ok(None))
    })
    .and_then(|()| {
        writeln!(keyboard, "{}", args.typed.as_deref().unwrap_or_default())?;
        keyboard.flush()?;
        // gdb kills the guest at its end, so either process may end first.
        let start = Instant::now();
        while gdb.poll()?.is_none() && start.elapsed() < limit {
            job::check_signals()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        hit = gdb.poll()?.is_some() && reached(&String::from_utf8_lossy(&fs::read(&out)?));
        Ok(())
    });
    report::say(&String::from_utf8_lossy(&fs::read(&out).unwrap_or_default()));
    result?;
    if !hit {
        report::say("zdvm: no breakpoint was reached\n");
    }
    Ok(hit)
}

/// Runs the command. Returns false if breakpoints were given and none was reached.
pub fn command(
    setup: &Setup,
    matrix: &Matrix,
    choice: &Choice,
    dir: &Path,
    args: &Args,
) -> Result<bool> {
    let mut setup = setup.clone();
    // Without KASLR the addresses in the image are those of the guest.
    setup.cmdline = format!("{} nokaslr", setup.cmdline);
    let machine = run::shell_machine(&setup, matrix, dir)?;
    let accel = choice.known().unwrap_or(Accel::Tcg);
    // The path of a socket must be short, and the run's folder may be deep.
    let control = tempfile::Builder::new().prefix("zdvm").tempdir()?;
    let socket = control.path().join("gdb");
    fs::write(dir.join("gdb.init"), init(&setup, dir, &socket))?;
    if args.breaks.is_empty() {
        interactive(&machine, accel, &socket, dir)?;
        return Ok(true);
    }
    scripted(&machine, accel, &socket, dir, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_breakpoint_that_is_set_is_not_reached() {
        let set = "Breakpoint 1 at 0xffffffffa0053ee0\nBreakpoint 2 at 0xffffffffa0053ed0\n";
        assert!(!reached(set));
        let stop = "Thread 1 hit Breakpoint 2, 0xffffffffa0053ee0 in zdm_module_get ()\n";
        assert!(!reached(&format!("{set}{stop}")), "no stack");
        assert!(reached(&format!("{set}{stop}#0  0xffffffffa0053ee0 in zdm_module_get ()\n")));
        assert!(reached("Breakpoint 1, 0xff in f ()\n#0  0xff in f ()\n"));
    }

    #[test]
    fn the_script_goes_on_only_when_everything_is_set() {
        let script = script(Path::new("/i"), Path::new("/r"), &["f".into(), "g".into()]);
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(lines[..5], ["source /i", "break f", "break g", "shell touch /r", "continue"]);
    }
}
