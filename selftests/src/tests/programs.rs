// SPDX-License-Identifier: GPL-2.0

//! Programs in C that know nothing of these tests. Each tries one thing, and prints PASS, SKIP or FAIL.

use std::process::Command;

use super::target::Target;
use super::{Ctx, Test};
use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::Device;

pub const TESTS: &[Test] = of_each_kind!("programs":
    "holes" => holes,
    "split_to_order" => split_to_order,
    "smaps_pss_huge" => smaps_pss_huge,
    "uffd_wp_zeropage" => uffd_wp_zeropage,
);

/// Runs a program with the path of the node, and with `args`.
fn run(ctx: &Ctx, node: usize, name: &str, args: &[&str]) -> Outcome {
    drop(Target::open(ctx, node)?);
    let mut command = Command::new(format!("/bin/programs/{name}"));
    let output = command
        .arg(Device::path(node))
        .args(args)
        .output()
        .or_fail(name)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = text.lines().last().unwrap_or_default();
    if let Some(why) = said.strip_prefix("SKIP ") {
        return Err(Fail::Skip(why.into()));
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    check!(
        said == "PASS" && output.status.success(),
        "{name}: {said}; {}; {}",
        output.status,
        errors.trim()
    );
    Ok(())
}

fn holes(ctx: &Ctx, node: usize) -> Outcome {
    run(ctx, node, "holes", &[])
}

fn split_to_order(ctx: &Ctx, node: usize) -> Outcome {
    // An anonymous folio has no order 1.
    for order in ["0", "2", "4", "8"] {
        run(ctx, node, "split-to-order", &[order])?;
    }
    Ok(())
}

fn smaps_pss_huge(ctx: &Ctx, node: usize) -> Outcome {
    run(ctx, node, "smaps-pss-huge", &[])
}

fn uffd_wp_zeropage(ctx: &Ctx, node: usize) -> Outcome {
    run(ctx, node, "uffd-wp-zeropage", &[])
}
