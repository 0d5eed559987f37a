// SPDX-License-Identifier: GPL-2.0
//! Uses KVM if a guest really boots with it, else TCG.
//!
//! On some machines /dev/kvm opens and answers every ioctl, but no guest gets past its BIOS. Only
//! the first line of a guest proves KVM. The answer is remembered for a day, or until the host
//! reboots or /dev/kvm changes.

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

/// How long a guest under KVM may take to print its first line.
const PROOF: Duration = Duration::from_secs(4);

/// How long an answer is valid.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Describes /dev/kvm: another module, other rights or another node change the text.
fn device_state(device: &Path) -> String {
    let Ok(m) = fs::metadata(device) else { return "none".to_owned() };
    format!("{} {} {} {:o} {}.{}", m.rdev(), m.uid(), m.gid(), m.mode(), m.ctime(), m.ctime_nsec())
}

/// The choice of the accelerator.
#[derive(Debug)]
pub struct Choice {
    forced: Option<Accel>,
    memory: PathBuf,
    device: PathBuf,
    proof: Duration,
}

impl Choice {
    /// Parses `--accel`: auto, kvm, tcg or icount.
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

    /// For tests: takes another file for the answer, another device and a shorter limit.
    pub fn at(memory: PathBuf, device: PathBuf, proof: Duration) -> Self {
        Self { forced: None, memory, device, proof }
    }

    /// The remembered answer, if there is one.
    pub fn known(&self) -> Option<Accel> {
        if self.forced.is_some() {
            return self.forced;
        }
        if OpenOptions::new().read(true).write(true).open(&self.device).is_err() {
            return Some(Accel::Tcg);
        }
        let text = fs::read_to_string(&self.memory).ok()?;
        let written = fs::metadata(&self.memory).and_then(|m| m.modified()).ok()?;
        // A time in the future comes from a wrong clock: ignore the answer.
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

    /// Boots with the best accelerator that works. Returns the one used.
    pub fn boot(
        &self,
        machine: &Machine,
        limits: Timeouts,
        watcher: &mut dyn Watcher,
    ) -> Result<(Accel, Exit)> {
        if self.known().is_none() {
            // The guest has read its own limits already: use those of TCG until KVM is proved.
            let limits = Accel::Tcg.scale(limits);
            match machine.boot(Accel::Kvm, limits, Some(self.proof), watcher)? {
                // One line is proof, whatever happened to the guest later. A QEMU that ends without
                // a line has proved nothing.
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
