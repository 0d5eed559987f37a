// SPDX-License-Identifier: GPL-2.0
//! How QEMU runs the guest's code, and what that does to limits.

use crate::plan::matrix::Timeouts;

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
        limits.times(if self == Self::Kvm { 1 } else { limits.tcg_factor })
    }

    /// In one word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::Icount => "icount",
        }
    }
}
