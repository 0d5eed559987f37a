// SPDX-License-Identifier: GPL-2.0

//! The driver of a device-dax is taken away while its pages are mapped or held.

use std::time::Duration;

use super::counts::{IDLE, MAPPED, Waiting, pinned, pinned_large};
use super::dax::Setup;
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::dax::{PMD, PTE};
use crate::device::{Buffer, Device};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("dax.unbind_idle", idle),
    test("dax.unbind_mapped", mapped::<PTE>),
    test("dax.unbind_mapped_pmd", mapped::<PMD>),
    test("dax.unbind_counts", counts),
    test("dax.unbind_pinned", held::<PTE>),
    test("dax.unbind_pinned_pmd", held::<PMD>),
    test("dax.unbind_race", race),
];

/// Checks that nothing can be seen of the pages, as there are none.
#[track_caller]
fn expect_gone(s: &Setup) -> Outcome {
    let page = s.device.inspect_frames(s.dax.frame(), 1)?[0];
    match page.flags & ZDM_PAGE_THERE {
        0 => Ok(()),
        _ => Err(Fail::failed(format!(
            "first page of a device-dax without a driver: expected none, found {page:x?}"
        ))),
    }
}

/// An access to what is mapped no more ends in SIGBUS.
#[track_caller]
fn expect_sigbus(buf: &Buffer, page: usize) -> Outcome {
    let child = Child::spawn(|| {
        buf.get(page, 0);
        Ok(())
    })?;
    match child.exit()? {
        Exit::Signal(libc::SIGBUS) => Ok(()),
        end => Err(Fail::failed(format!(
            "access to page {page} of a device-dax without a driver: expected SIGBUS, found \
             {end:?}"
        ))),
    }
}

/// Goes and comes, with the data that it had.
fn idle(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let n = s.dax.step();
        s.dax.map(n)?.fill(0, n, 720);
        for _ in 0..3 {
            s.dax.unbind().or_fail("unbind")?;
            check!(!s.dax.is_bound(), "driver: expected none, found one");
            expect_gone(&s)?;
            s.dax.bind().or_fail("bind")?;
            s.dax.map(n)?.check(0, n, 720)?;
        }
    }
    Ok(())
}

/// Mappings are zapped, of this process and of another one.
fn mapped<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let n = 2 * s.dax.step();
    let buf = s.dax.map(n)?;
    buf.fill(0, n, 721);
    let other = Waiting::start(
        || buf.check(0, n, 721),
        || {
            // Until it is let go the driver has gone: then so does this process.
            buf.get(0, 0);
            Err(Fail::failed(
                "access by another process: expected SIGBUS, found none",
            ))
        },
    )?;
    s.dax
        .unbind()
        .or_fail("unbind of a device-dax that is mapped")?;
    expect_gone(&s)?;
    expect_sigbus(&buf, 0)?;
    expect_sigbus(&buf, n - 1)?;
    check_eq!(
        other.end()?,
        Exit::Signal(libc::SIGBUS),
        "end of the other process"
    );
    s.dax.bind().or_fail("bind")?;
    let again = s.dax.map(n)?;
    again.check(0, n, 721)?;
    again.fill(0, n, 722);
    drop(buf);
    again.check(0, n, 722)
}

/// What was mapped when the driver went is idle when it is back.
fn counts(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let n = 2 * s.dax.step();
        let buf = s.dax.map(n)?;
        buf.fill(0, 1, 723);
        buf.get(n - 1, 0);
        s.expect(0, 2, MAPPED, "mapped")?;
        s.dax.unbind().or_fail("unbind")?;
        expect_gone(&s)?;
        s.dax.bind().or_fail("bind")?;
        s.expect(0, 2, IDLE, "after unbind and bind")?;
        let again = s.dax.map(n)?;
        again.check(0, 1, 723)?;
        s.expect(0, 1, MAPPED, "mapped again")?;
        drop((again, buf));
        s.expect(0, 2, IDLE, "unmapped")?;
    }
    Ok(())
}

/// While a page is held the driver waits; the page is the holder's with all that was
/// in it, and when it is let go the driver goes.
fn held<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    if s.idle_refs()? != 0 {
        let why = "this kernel's device-dax does not wait for who holds a page";
        return Err(Fail::Skip(why.into()));
    }
    let n = 2 * s.dax.step();
    for flags in [ZDM_PIN_GET, ZDM_PIN_WRITE, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE] {
        let buf = s.dax.map(n)?;
        buf.fill(0, 1, 724);
        // The child is made before the file that holds the page, so that it has no copy
        // of it: should this process end, the unbind does as well.
        let unbinding = Waiting::start(|| Ok(()), || s.dax.unbind().or_fail("unbind"))?;
        let holder = Device::open(0)?;
        let id = holder.pin(&buf, 0, 1, flags).or_fail("ZDM_PIN")?;
        let unbinding = unbinding.release()?;
        // The mapping goes at once, the pages do not.
        let mut refs = 0;
        let zapped = sys::wait_until(Duration::from_secs(5), || {
            let page = s.device.inspect_frames(s.dax.frame(), 1);
            page.is_ok_and(|p| {
                refs = p[0].refs;
                p[0].mapcount == 0
            })
        });
        check!(zapped, "mappings while it goes: expected none, found some");
        std::thread::sleep(Duration::from_millis(300));
        let page = s.device.inspect_frames(s.dax.frame(), 1)?[0];
        check_eq!(
            page.flags & ZDM_PAGE_THERE,
            ZDM_PAGE_THERE,
            "whether the page of a holder is there"
        );
        let expected = match (flags & ZDM_PIN_GET, s.dax.step()) {
            (0, 1) => pinned(IDLE, 1),
            (0, _) => pinned_large(IDLE, 1),
            _ => [1, 0, 0],
        };
        // The waiting itself may hold a reference of its own.
        let found = [refs, page.mapcount, page.pins];
        check_eq!(found, expected, "counts of a page that is held");
        check!(
            unbinding.is_running()?,
            "unbind of a device-dax with a held page: expected it to wait, found its end"
        );
        holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        unbinding.join()?;
        expect_gone(&s)?;
        expect_sigbus(&buf, 0)?;
        s.dax.bind().or_fail("bind")?;
        s.expect(0, 2, IDLE, "after unbind and bind")?;
        s.dax.map(n)?.check(0, 1, 724)?;
    }
    Ok(())
}

/// Taken away while others map and unmap, again and again.
fn race(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let n = 4 * s.dax.step();
        let file = s.dax.open()?;
        let worker = Child::spawn(|| {
            loop {
                // There may be no driver just now.
                if let Ok(buf) = Buffer::of_file(&file, n, libc::MAP_SHARED) {
                    buf.set(0, 0, 1);
                    buf.get(n - 1, 0);
                }
            }
        })?;
        for _ in 0..5 {
            s.dax.unbind().or_fail("unbind")?;
            s.dax.bind().or_fail("bind")?;
            std::thread::sleep(Duration::from_millis(20));
        }
        // It has ended by SIGBUS or does so now.
        let end = worker.end(libc::SIGKILL)?;
        check!(
            matches!(end, Exit::Signal(libc::SIGBUS | libc::SIGKILL)),
            "end of who maps meanwhile: expected SIGBUS or SIGKILL, found {end:?}"
        );
        let buf = s.dax.map(n)?;
        buf.fill(0, n, 725);
        buf.check(0, n, 725)?;
    }
    Ok(())
}
