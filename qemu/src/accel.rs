// SPDX-License-Identifier: GPL-2.0
//! KVM if it really boots, else TCG.
//!
//! There are machines whose /dev/kvm opens, answers every ioctl and never gets a guest past its
//! BIOS. Only a guest's first line proves KVM; the answer is remembered until the host reboots.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::matrix::Timeouts;
use crate::repo;
use crate::verdict::Exit;
use crate::vm::{Boot, Machine, Watcher};

/// How long a guest under KVM may take to its first line.
const PROOF: Duration = Duration::from_secs(4);

/// Without fast string instructions the kernel copies and clears pages in plain loops, which TCG
/// translates; a "rep movs" it executes one element at a time.
const TCG_CPU: &str = "max,-erms,-fsrm";

/// How QEMU runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Hardware.
    Kvm,
    /// Translation.
    Tcg,
    /// Translation where the guest's clocks count its instructions, one for a nanosecond. It says
    /// what code costs on a machine that is busy with other things, too.
    Icount,
}

impl Accel {
    /// QEMU's arguments.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", TCG_CPU],
            Self::Icount => {
                &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", TCG_CPU]
            }
        }
    }

    /// Limits scaled for it.
    pub fn scale(self, limits: Timeouts) -> Timeouts {
        let factor = if self == Self::Kvm { 1 } else { limits.tcg_factor };
        Timeouts {
            boot: limits.boot * factor,
            test: limits.test * factor,
            suite: limits.suite * factor,
            total: limits.total * factor,
            tcg_factor: limits.tcg_factor,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::Icount => "icount",
        }
    }
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
        match fs::read_to_string(&self.memory).as_deref() {
            Ok("kvm") => Some(Accel::Kvm),
            Ok("tcg") => Some(Accel::Tcg),
            _ => None,
        }
    }

    fn remember(&self, accel: Accel) -> Result<()> {
        fs::write(&self.memory, accel.word())
            .with_context(|| format!("writing {}", self.memory.display()))
    }

    /// Boots with the best that works; says which it was.
    pub fn boot(
        &self,
        machine: &Machine,
        limits: Timeouts,
        watcher: &mut dyn Watcher,
    ) -> Result<(Accel, Exit)> {
        if self.known().is_none() {
            let limits = Accel::Kvm.scale(limits);
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
                         (remembered until the host reboots)"
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
