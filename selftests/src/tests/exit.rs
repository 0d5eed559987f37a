// SPDX-License-Identifier: GPL-2.0

//! Processes end while their pages are on the device.

use std::time::Duration;

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, PAGES, Test, freed_since, test};
use crate::check::{OrFail, Outcome};
use crate::device::Buffer;
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("exit.while_migrated", while_migrated::<PRIVATE>),
    test("exit.killed", killed::<PRIVATE>),
    test("exit_generic.while_migrated", while_migrated::<GENERIC>),
    test("exit_generic.killed", killed::<GENERIC>),
];

/// The harness's audit would find leftovers; this test also checks that all pages were freed at
/// once.
fn while_migrated<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE + 1)?;
    let before = device.stats()?;
    Child::spawn(|| {
        let device = Target::open(ctx, NODE + 1)?;
        let buf = Buffer::filled(PAGES, 68)?;
        device.move_all(&buf, 68)?;
        // The exit runs no destructors: neither the file nor the memory is released first.
        sys::exit_now(0)
    })?
    .join()?;
    let went = device.stats()?.to_device.wrapping_sub(before.to_device);
    check_eq!(went, PAGES as u64, "pages that the child moved");
    freed_since(&device, &before, PAGES)?;

    // The file is still open in another process.
    let before = device.stats()?;
    let buf = Buffer::filled(PAGES, 69)?;
    device.move_all(&buf, 69)?;
    Child::spawn(|| sys::exit_now(0))?.join()?;
    device.expect(&buf, 0, PAGES, PAGES)?;
    buf.check(0, PAGES, 69)?;
    device.bring_back(&buf, 0, PAGES)?;
    freed_since(&device, &before, PAGES)
}

/// SIGKILL during a migration: the process ends and leaves nothing behind.
fn killed<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    for round in 0..8 {
        let before = device.stats()?;
        let child = Child::spawn(|| {
            let device = Target::open(ctx, NODE)?;
            let buf = Buffer::filled(512, 70)?;
            loop {
                device.to_device(&buf, 0, 512).or_fail("MIGRATE_TO_DEV")?;
                device.to_system(&buf, 0, 512).or_fail("MIGRATE_TO_SYS")?;
            }
        })?;
        // Wait until the migration has begun; the point of the signal varies.
        let begun = sys::wait_until(Duration::from_secs(20), || {
            device.stats().is_ok_and(|s| s.to_device > before.to_device)
        });
        std::thread::sleep(Duration::from_millis(7 * round));
        let exit = child.kill()?;
        check!(begun, "migrations of the child: expected some, found none");
        check_eq!(exit, Exit::Signal(libc::SIGKILL), "end in round {round}");
    }
    Ok(())
}
