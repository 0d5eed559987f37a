// SPDX-License-Identifier: GPL-2.0
//! Runs make and similar commands: the output goes to a log, objects are counted, and a failure
//! shows the end of the log.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::job::{self, Job};
use crate::progress::Progress;

/// A make of a kernel tree, with reproducible output that ccache can share.
pub fn make(dir: &Path) -> Command {
    let mut command = job::build("make");
    let jobs = available_parallelism().map_or(2, usize::from);
    command.arg(format!("-j{jobs}")).arg("-C").arg(dir);
    // The place of a tree and the user that builds it must not make two objects differ.
    for (name, value) in [
        ("KBUILD_BUILD_USER", "zdvm"),
        ("KBUILD_BUILD_HOST", "zdvm"),
        ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
        ("CCACHE_NOHASHDIR", "1"),
        ("CCACHE_MAXSIZE", "5G"),
        ("LC_ALL", "C"),
    ] {
        command.env(name, value);
    }
    for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "KDIR", "O", "KBUILD_OUTPUT", "MO"] {
        // `make test` runs this program: the kernel's make must not inherit its variables.
        command.env_remove(name);
    }
    command
}

/// The part of a log that explains a failure.
fn failure(log: &Path) -> String {
    let text = fs::read(log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let telling = |l: &&str| {
        l.contains("error") || l.contains("Error") || l.contains("***") || l.contains("mrproper")
    };
    let mut lines: Vec<&str> = text.lines().filter(telling).take(30).collect();
    if lines.is_empty() {
        lines = text.lines().rev().take(20).collect();
        lines.reverse();
    }
    lines.join("\n")
}

/// How long a command may run before its title is printed.
const SILENCE: Duration = Duration::from_secs(2);

/// Runs a command and appends its output to a log.
pub fn logged(
    command: &mut Command,
    title: &str,
    log: &Path,
    progress: Option<&mut Progress>,
) -> Result<()> {
    let out = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("opening {}", log.display()))?;
    let mut read = File::open(log)?;
    read.seek(SeekFrom::End(0))?;
    command.stdin(std::process::Stdio::null()).stdout(out.try_clone()?).stderr(out);
    let mut job = Job::spawn(command, title)?;
    let (mut progress, mut lines, mut last, mut partial) =
        (progress, 0, String::new(), String::new());
    let start = Instant::now();
    let mut said = progress.is_some();
    let result = job.success(|| {
        // Commands without a progress bar can take minutes on a busy machine.
        if !said && start.elapsed() > SILENCE {
            said = true;
            eprintln!("zdvm: {title}");
        }
        let Some(progress) = progress.as_deref_mut() else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        read.read_to_end(&mut bytes)?;
        partial.push_str(&String::from_utf8_lossy(&bytes));
        while let Some(end) = partial.find('\n') {
            let line: String = partial.drain(..=end).collect();
            lines += 1;
            line.trim().clone_into(&mut last);
        }
        progress.set(lines, &last);
        Ok(())
    });
    result.map_err(|e| {
        if e.downcast_ref::<job::Interrupted>().is_some() {
            return e;
        }
        anyhow!("{e:#}; from its log:\n{}\nthe whole log: {}", failure(log), log.display())
    })
}
