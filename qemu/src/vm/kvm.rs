// SPDX-License-Identifier: GPL-2.0
//! KVM if it really boots, else TCG.
//!
//! There are machines whose /dev/kvm opens, answers every ioctl and never gets a guest past its
//! BIOS. Only a guest's first line proves KVM; the answer is remembered for a day, unless the host
//! reboots or /dev/kvm changes before.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::judge::verdict::Exit;
use crate::plan::matrix::Timeouts;
use crate::repo;
use crate::vm::accel::Accel;
use crate::vm::{Boot, Machine, Watcher};

/// How long a guest under KVM may take to its first line.
const PROOF: Duration = Duration::from_secs(4);

/// How long an answer is believed.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What /dev/kvm is like: another module that makes it, other rights, another node.
fn device_state(device: &Path) -> String {
    let Ok(m) = fs::metadata(device) else { return "none".to_owned() };
    format!("{} {} {} {:o} {}.{}", m.rdev(), m.uid(), m.gid(), m.mode(), m.ctime(), m.ctime_nsec())
}

/// What is known about KVM here.
#[derive(Debug)]
pub struct Choice {
    forced: Option<Accel>,
    memory: PathBuf,
    device: PathBuf,
    proof: Duration,
}

impl Choice {
    /// `--accel`: auto, kvm, tcg or icount.
    pub fn new(option: &str) -> Result<Self> {
        let forced = match option {
            "auto" => None,
            "kvm" => Some(Accel::Kvm),
            "tcg" => Some(Accel::Tcg),
            "icount" => Some(Accel::Icount),
            other => bail!("--accel {other}: auto, kvm, tcg or icount"),
        };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let memory = repo::cache("accel")?.join(repo::key([boot, host]));
        Ok(Self { forced, memory, device: PathBuf::from("/dev/kvm"), proof: PROOF })
    }

    /// For tests: another place to remember, another device, less patience.
    pub fn at(memory: PathBuf, device: PathBuf, proof: Duration) -> Self {
        Self { forced: None, memory, device, proof }
    }

    /// What is known already, if anything.
    pub fn known(&self) -> Option<Accel> {
        if self.forced.is_some() {
            return self.forced;
        }
        if OpenOptions::new().read(true).write(true).open(&self.device).is_err() {
            return Some(Accel::Tcg);
        }
        let text = fs::read_to_string(&self.memory).ok()?;
        let written = fs::metadata(&self.memory).and_then(|m| m.modified()).ok()?;
        // A time in the future is a clock that was wrong: no reason to believe it.
        let fresh = SystemTime::now().duration_since(written).is_ok_and(|age| age < DAY);
        let (word, device) = text.split_once('\n')?;
        if !fresh || device != device_state(&self.device) {
            return None;
        }
        match word {
            "kvm" => Some(Accel::Kvm),
            "tcg" => Some(Accel::Tcg),
            _ => None,
        }
    }

    fn remember(&self, accel: Accel) -> Result<()> {
        let text = format!("{}\n{}", accel.word(), device_state(&self.device));
        fs::write(&self.memory, text).with_context(|| format!("writing {}", self.memory.display()))
    }

    /// Boots with the best that works; says which it was.
    pub fn boot(
        &self,
        machine: &Machine,
        limits: Timeouts,
        watcher: &mut dyn Watcher,
    ) -> Result<(Accel, Exit)> {
        if self.known().is_none() {
            // The guest has its limits already, which are those of TCG until more is known.
            let limits = Accel::Tcg.scale(limits);
            match machine.boot(Accel::Kvm, limits, Some(self.proof), watcher)? {
                // One line is proof, whatever came of the guest afterwards; a QEMU that ends
                // without a word has proved nothing.
                Boot::Ended(exit) if machine.has_spoken() => {
                    self.remember(Accel::Kvm)?;
                    return Ok((Accel::Kvm, exit));
                }
                _ => {
                    eprintln!(
                        "zdvm: /dev/kvm is here, but no guest boots with it; using TCG \
                         (tried anew in a day, or when /dev/kvm changes)"
                    );
                    self.remember(Accel::Tcg)?;
                }
            }
        }
        let accel = self.known().unwrap_or(Accel::Tcg);
        match machine.boot(accel, accel.scale(limits), None, watcher)? {
            Boot::Ended(exit) => Ok((accel, exit)),
            Boot::Mute => bail!("a guest cannot be mute without a limit"),
        }
    }
}
