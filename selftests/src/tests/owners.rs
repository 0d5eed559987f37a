// SPDX-License-Identifier: GPL-2.0

//! The owners of pages: a device takes only its own pages, and pages that several processes share
//! stay shared on the device.

use std::io::{Read, Write};

use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, PAGES, Test, test};
use crate::check::{OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::sys;

pub const TESTS: &[Test] = &[
    test("owners.to_system", to_system::<PRIVATE>),
    test("owners.shared_first", shared_first::<PRIVATE>),
    test("owners_coherent.to_system", to_system::<COHERENT>),
    test("owners_coherent.shared_first", shared_first::<COHERENT>),
    test("owners_generic.to_system", to_system::<GENERIC>),
    test("owners_generic.shared_first", shared_first::<GENERIC>),
];

fn filled(huge: bool, seed: u64) -> Outcome<Buffer> {
    match huge {
        true => huge_filled(1, seed),
        false => Buffer::filled(PAGES, seed),
    }
}

/// A device is asked to bring back pages of the other one, and leaves them there.
fn to_system<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let (mine, other) = (Target::open(ctx, NODE)?, Target::open(ctx, NODE + 1)?);
    for huge in [false, true] {
        let buf = filled(huge, 1950)?;
        let n = buf.pages();
        mine.move_all(&buf, 1950)?;
        let before = other.stats()?;
        // The driver may report that or do nothing.
        let _ = other.to_system(&buf, 0, n);
        mine.expect(&buf, 0, n, n)?;
        let came = other.stats()?.to_system.wrapping_sub(before.to_system);
        check_eq!(came, 0, "pages that the other device brought back");
        mine.bring_back(&buf, 0, n)?;
        buf.check(0, n, 1950)?;
    }
    Ok(())
}

/// Pages that parent and child share migrate to the device and stay shared there: neither sees the
/// writes of the other or of the other's device.
fn shared_first<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for huge in [false, true] {
        let buf = filled(huge, 1960)?;
        let n = buf.pages();
        let (mut wait, go) = sys::pipe().or_fail("pipe")?;
        let (mut told, tell) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            wait.read_exact(&mut [0]).or_fail("pipe")?;
            buf.fill(0, n / 2, 1961);
            (&tell).write_all(b"w").or_fail("pipe")?;
            wait.read_exact(&mut [0]).or_fail("pipe")?;
            buf.check(0, n / 2, 1961)?;
            buf.check(n / 2, n - n / 2, 1960)
        })?;
        target.move_all(&buf, 1960)?;
        (&go).write_all(b"g").or_fail("pipe")?;
        told.read_exact(&mut [0]).or_fail("pipe")?;
        let read = target.read(&buf, 0, n).or_fail("READ")?;
        check_bytes(&read.data, 1960, 0, "the parent's pages by the device")?;
        buf.check(0, n, 1960)?;

        // Now the device writes for the parent, and then the parent writes.
        let _ = target.to_device(&buf, 0, n);
        let data = pattern_bytes(1962, 0, n);
        target.write(&buf, 0, &data).or_fail("WRITE")?;
        buf.check(0, n, 1962)?;
        buf.fill(n / 4, n / 2, 1963);
        (&go).write_all(b"g").or_fail("pipe")?;
        child.join()?;
        buf.check(0, n / 4, 1962)?;
        buf.check(n / 4, n / 2, 1963)?;
    }
    target.expect_empty()
}
