// SPDX-License-Identifier: GPL-2.0
//! `zdvm doctor`: reports what only the program knows of this machine. `./zdvm doctor` runs
//! `scripts/doctor.sh`, which looks for the tools and then calls this command.

use std::path::Path;

use anyhow::Result;

use crate::kernel;
use crate::plan::matrix::Matrix;
use crate::repo;
use crate::vm::accel::Accel;
use crate::vm::kvm::Choice;

/// One line: the mark of a finding and its text.
fn line(mark: &str, text: &str) -> String {
    format!("  {mark:<9} {text}\n")
}

/// The line about KVM, from the result of earlier boots on this machine.
fn acceleration(known: Option<Accel>, device: bool) -> String {
    match known {
        Some(Accel::Kvm) => line("ok", "guests run under KVM here"),
        None => line("ok", "KVM has not been tried since this machine booted"),
        Some(_) if device => line(
            "slow",
            "no guest boots with /dev/kvm, as an earlier run found out: guests run under TCG",
        ),
        Some(_) => line("slow", "guests run under TCG"),
    }
}

/// The line about one kernel: whether the cache has it.
fn built(name: &str, key: &str, complete: bool) -> String {
    match complete {
        true => line("ok", &format!("kernel {name} is built ({name}-{key})")),
        false => {
            line("slow", &format!("kernel {name} is built first: ten minutes to half an hour"))
        }
    }
}

/// The whole report.
pub fn text(repo: &Path, matrix: &Matrix, names: &[&str]) -> Result<String> {
    let mut out = "Kernels and acceleration:\n".to_owned();
    out += &acceleration(Choice::new("auto")?.known(), Path::new("/dev/kvm").exists());
    let kernels = repo::cache("kernels")?;
    for name in names {
        let key = kernel::key_without(repo, matrix, name, 0)?;
        let complete = kernels.join(format!("{name}-{key}")).join(kernel::COMPLETE).is_file();
        out += &built(name, &key, complete);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_slow_is_marked() {
        assert!(
            acceleration(Some(Accel::Tcg), true).contains("slow      no guest boots with /dev/kvm")
        );
        assert!(acceleration(Some(Accel::Tcg), false).contains("slow      guests run under TCG"));
        assert!(acceleration(Some(Accel::Kvm), true).starts_with("  ok"));
        assert!(acceleration(None, true).starts_with("  ok"));
        assert!(built("stock", "0123456789ab", true).starts_with("  ok"));
        assert!(built("stock", "0123456789ab", false).starts_with("  slow"));
    }
}
