// SPDX-License-Identifier: GPL-2.0

//! The rights of a mapping change while its pages are on the device.

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, test};
use crate::check::Outcome;
use crate::device::Buffer;
use crate::harness::Child;

pub const TESTS: &[Test] = &[
    test("protect.mprotect_while_migrated", mprotect::<PRIVATE>),
    test(
        "protect_generic.mprotect_while_migrated",
        mprotect::<GENERIC>,
    ),
];

/// Rights that change while the page is on the device hold after its return.
fn mprotect<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(PAGES, 54)?;
    device.move_all(&buf, 54)?;
    buf.protect(0, PAGES, libc::PROT_READ)?;
    device.expect(&buf, 0, PAGES, PAGES)?;
    // The first half comes back while it is read-only.
    buf.check(0, PAGES / 2, 54)?;
    for page in [0, PAGES - 1] {
        Child::expect_segv(
            || {
                buf.set(page, 0, 1);
            },
            &format!("write to read-only page {page}"),
        )?;
    }
    buf.protect(0, PAGES, libc::PROT_READ | libc::PROT_WRITE)?;
    buf.check(0, PAGES, 54)?;
    buf.fill(0, PAGES, 55);
    buf.check(0, PAGES, 55)?;

    // Remove all access and restore it: the data stays on the device meanwhile.
    device.bring_back(&buf, 0, PAGES)?;
    device.move_all(&buf, 55)?;
    buf.protect(0, PAGES, libc::PROT_NONE)?;
    buf.protect(0, PAGES, libc::PROT_READ)?;
    buf.check(0, PAGES, 55)
}
