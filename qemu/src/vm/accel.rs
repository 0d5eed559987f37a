// SPDX-License-Identifier: GPL-2.0
//! The ways in which QEMU runs the guest's code, and their time limits.

use crate::plan::matrix::Timeouts;

/// Without fast string instructions the kernel copies and clears pages in plain loops. TCG
/// translates loops, but executes a "rep movs" or "rep stos" one element at a time.
const TCG_CPU: &str = "max,-erms,-fsrm,-fsrs";

/// How QEMU runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Translation of instructions.
    Tcg,
    /// Translation, with the guest's clocks counting instructions, one nanosecond each. The time of
    /// an operation then does not depend on other work of the host.
    Icount,
}

impl Accel {
    /// The arguments of QEMU.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", TCG_CPU],
            Self::Icount => {
                &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", TCG_CPU]
            }
        }
    }

    /// Scales time limits.
    pub fn scale(self, limits: Timeouts) -> Timeouts {
        limits.times(if self == Self::Kvm { 1 } else { limits.tcg_factor })
    }

    /// The name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::Icount => "icount",
        }
    }
}
