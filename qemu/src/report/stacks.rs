// SPDX-License-Identifier: GPL-2.0
//! Names file and line in the stacks of a kernel log, with the kernel's own
//! `scripts/decode_stacktrace.sh`.
//!
//! The script starts several processes for each frame, and a log of tests has thousands. It therefore
//! gets each frame once, and nothing else. A "Code:" line, of which it makes several lines, would also
//! shift the numbers of all lines after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};
use regex::{Captures, Regex};

use crate::job::{self, Job};
use crate::kernel::Tree;

/// A frame: function, offset and size, and the module.
const FRAME: &str = r"[^\s(+:]+\+0x[0-9a-f]+/0x[0-9a-f]+( \[[^\]\s]+\])?";

/// Gives each frame of a text its name from `names`, which is called with all frames at once.
fn named(text: &str, names: impl FnOnce(&[&str]) -> Result<Vec<String>>) -> Result<String> {
    let frame = Regex::new(FRAME)?;
    let frames: BTreeSet<&str> = frame.find_iter(text).map(|found| found.as_str()).collect();
    let frames: Vec<&str> = frames.into_iter().collect();
    let names = names(&frames)?;
    if names.len() != frames.len() {
        bail!("{} lines for {} frames", names.len(), frames.len());
    }
    let names: BTreeMap<&str, String> = frames.into_iter().zip(names).collect();
    let name = |found: &Captures<'_>| names.get(&found[0]).cloned().unwrap_or_default();
    Ok(frame.replace_all(text, name).into_owned())
}

/// What the command, which is the script, makes of frames, one line each.
fn decoded(command: &mut Command, frames: &[&str]) -> Result<Vec<String>> {
    let (mut input, mut output) = (tempfile::tempfile()?, tempfile::tempfile()?);
    writeln!(input, "{}", frames.join("\n"))?;
    input.seek(SeekFrom::Start(0))?;
    command.stdin(input).stdout(output.try_clone()?).stderr(Stdio::null());
    Job::spawn(command, "decode_stacktrace.sh")?.success(|| Ok(()))?;
    let mut text = String::new();
    output.seek(SeekFrom::Start(0))?;
    output.read_to_string(&mut text)?;
    Ok(text.lines().map(|line| line.trim().to_owned()).collect())
}

/// Writes `console.decoded.log`, the console of a run with file and line in its stacks: for the kernel if
/// it has debug information, for the module always.
pub fn decode(tree: &Tree, module: &Path, dir: &Path) {
    let vmlinux = tree.objects.join("vmlinux");
    let script = tree.source.join("scripts/decode_stacktrace.sh");
    let (Some(modules), true, true) = (module.parent(), vmlinux.is_file(), script.is_file()) else {
        return;
    };
    let Ok(log) = fs::read(dir.join("console.log")) else { return };
    let mut command = job::command(script);
    command.arg(vmlinux).arg(&tree.objects).arg(modules);
    let done = named(&String::from_utf8_lossy(&log), |frames| decoded(&mut command, frames))
        .and_then(|text| Ok(write!(File::create(dir.join("console.decoded.log"))?, "{text}")?));
    if let Err(e) = done {
        eprintln!("zdvm: {e:#}; console.log has the raw stacks");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    const LOG: &str = "\
[    3.1] RIP: 0010:migrate_vma_finalize+0x52/0x1c0\r
[    3.2] Code: 0f 0b <48> 8b
[    3.3]  dmirror_ioctl+0x6a3/0x12b0 [zdmirror]
[    3.4]  ? __x64_sys_ioctl+0x8d/0xd0
[    3.5]  dmirror_ioctl+0x6a3/0x12b0 [zdmirror]
";

    #[test]
    fn each_frame_is_asked_for_once() {
        let names = |frames: &[&str]| {
            let expected = [
                "__x64_sys_ioctl+0x8d/0xd0",
                "dmirror_ioctl+0x6a3/0x12b0 [zdmirror]",
                "migrate_vma_finalize+0x52/0x1c0",
            ];
            assert_eq!(frames, expected);
            Ok(["b (b.c:2)", "c (c.rs:3) zdmirror", "a (a.c:1)"].map(str::to_owned).to_vec())
        };
        let text = named(LOG, names).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        assert_eq!(
            lines,
            [
                "[    3.1] RIP: 0010:a (a.c:1)",
                "[    3.2] Code: 0f 0b <48> 8b",
                "[    3.3]  c (c.rs:3) zdmirror",
                "[    3.4]  ? b (b.c:2)",
                "[    3.5]  c (c.rs:3) zdmirror",
            ]
        );
        assert!(named(LOG, |_| Ok(vec![])).is_err());
    }
}
