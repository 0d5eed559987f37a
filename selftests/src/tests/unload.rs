// SPDX-License-Identifier: GPL-2.0

//! The module is unloaded, or rightly stays.

use super::{Ctx, Needs, PAGES, Test, absent, test, unloads};
use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device};
use crate::harness::Child;
use crate::module::{self, NAME};
use crate::proc;
use crate::sys;

/// Tests that unload the module; `unload.clean` is the last test of every run.
pub const TESTS: &[Test] = &[
    test("unload.busy", busy),
    unloads(Needs::Loaded(""), test("unload.idle", idle)),
    unloads(
        Needs::Loaded(""),
        test("unload.after_migration", after_migration),
    ),
    absent(test("unload.reload_10", reload_10)),
    unloads(Needs::Any, test("unload.clean", clean)),
];

/// An open file keeps the module loaded.
fn busy(ctx: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 110)?;
    device.move_all(&buf, 110)?;
    match ctx.module.try_unload() {
        Err(e) if module::busy(&e) => {}
        other => {
            return Err(Fail::failed(format!(
                "unloading with an open file: expected EAGAIN or EBUSY, found {other:?}"
            )));
        }
    }
    check!(
        proc::module_loaded(NAME)?,
        "{NAME}: expected loaded, found gone"
    );
    // Everything works as before.
    buf.check(0, PAGES, 110)?;
    device.move_all(&buf, 110)?;
    Device::open(1)?.move_all(&Buffer::filled(2, 111)?, 111)?;
    buf.check(0, PAGES, 110)
}

fn idle(ctx: &Ctx) -> Outcome {
    ctx.module.unload()
}

/// After the close the process has its data, and does not need the module any more.
fn after_migration(ctx: &Ctx) -> Outcome {
    let bufs = [Buffer::filled(PAGES, 112)?, Buffer::filled(PAGES, 113)?];
    for (n, buf) in bufs.iter().enumerate() {
        Device::open(n)?.move_all(buf, 112 + n as u64)?;
    }
    Child::spawn(|| {
        let device = Device::open(0)?;
        let buf = Buffer::filled(PAGES, 114)?;
        device.move_all(&buf, 114)?;
        sys::exit_now(0)
    })?
    .join()?;
    ctx.module.unload()?;
    for (n, buf) in bufs.iter().enumerate() {
        buf.check(0, PAGES, 112 + n as u64)?;
        buf.fill(0, PAGES, 115);
        buf.check(0, PAGES, 115)?;
    }
    Ok(())
}

pub fn reload_10(ctx: &Ctx) -> Outcome {
    let buf = Buffer::filled(8, 116)?;
    for _ in 0..10 {
        ctx.module.load("")?;
        let device = Device::open(0)?;
        device.move_all(&buf, 116)?;
        buf.check(0, 4, 116)?;
        device.to_system(&buf, 4, 2).or_fail("MIGRATE_TO_SYS")?;
        // Two pages are still on the device when the file is closed.
        drop(device);
        ctx.module.unload()?;
        buf.check(0, 8, 116)?;
    }
    Ok(())
}

/// The last test: the module can be unloaded, whatever the other tests did.
fn clean(ctx: &Ctx) -> Outcome {
    ctx.module.unload()
}
