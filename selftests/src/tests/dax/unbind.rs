// SPDX-License-Identifier: GPL-2.0

//! The driver of a device-dax is unbound while its pages are mapped or held.
//!
//! The tests bind it again only after all old mappings are gone. While one of them keeps the node
//! open, device_dax of 7.3 would initialise a cdev that is in use and corrupt its list of inodes.
//! The tests do not open the node during the unbind either: the file would have no device, which
//! mmap does not expect.

use std::path::Path;
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome};
use crate::dax::{PMD, PTE};
use crate::device::{Buffer, Device, check_bytes};
use crate::gup::LongTermPin;
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::tests::counts::{IDLE, MAPPED, Waiting};
use crate::tests::dax::Setup;
use crate::tests::{Ctx, Test, test};
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
    test("dax.unbind_unpin", unpin),
];

/// The file of CONFIG_GUP_TEST.
const GUP_TEST: &str = "/sys/kernel/debug/gup_test";

/// Checks that the struct pages are gone.
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

/// Checks that an access to an address whose mapping was zapped ends in SIGBUS.
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

/// The driver is unbound and bound again, and the data stays the same.
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

/// The mappings of this process and of another one are zapped.
fn mapped<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let n = 2 * s.dax.step();
    let buf = s.dax.map(n)?;
    buf.fill(0, n, 721);
    let other = Waiting::start(
        || buf.check(0, n, 721),
        || {
            // The driver is unbound before the release of this process: the access ends in SIGBUS.
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
    drop(buf);
    s.dax.bind().or_fail("bind")?;
    let again = s.dax.map(n)?;
    again.check(0, n, 721)?;
    again.fill(0, n, 722);
    again.check(0, n, 722)
}

/// Pages that were mapped at the unbind are idle after the bind.
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
        drop(buf);
        s.dax.bind().or_fail("bind")?;
        s.expect(0, 2, IDLE, "after unbind and bind")?;
        let again = s.dax.map(n)?;
        again.check(0, 1, 723)?;
        s.expect(0, 1, MAPPED, "mapped again")?;
        drop(again);
        s.expect(0, 2, IDLE, "unmapped")?;
    }
    Ok(())
}

/// The unbind waits while a page is held. The holder keeps the page with its data; after its
/// release the unbind finishes.
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
        // The child is made before the file that pins the page, so that the child has no copy of
        // the file. If this process ends, the pin ends, and so does the unbind.
        let unbinding = Waiting::start(|| Ok(()), || s.dax.unbind().or_fail("unbind"))?;
        let holder = Device::open(0)?;
        let id = holder.pin(&buf, 0, 1, flags).or_fail("ZDM_PIN")?;
        let mut other = match Path::new(GUP_TEST) {
            path if path.exists() => Some(LongTermPin::open(path).or_fail(GUP_TEST)?),
            _ => None,
        };
        if let Some(other) = &mut other {
            other
                .start(&buf, 0, 1, false, true)
                .or_fail("PIN_LONGTERM_TEST_START")?;
        }
        let unbinding = unbinding.release()?;
        // The mapping is removed at once, and no new task can reach the pages. The holder keeps its
        // page for as long as it wants.
        let going = sys::wait_until(Duration::from_secs(5), || expect_gone(&s).is_ok());
        check!(going, "unbind after a while: expected a begin, found none");
        expect_sigbus(&buf, 0)?;
        std::thread::sleep(Duration::from_millis(300));
        check!(
            unbinding.is_running()?,
            "unbind of a device-dax with a held page: expected it to wait, found its end"
        );
        if let Some(other) = &other {
            let data = other.read().or_fail("PIN_LONGTERM_TEST_READ")?;
            check_bytes(&data, 724, 0, "data by a pin while the driver goes")?;
        }
        // The unbind waits for the last reference.
        holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        if let Some(mut other) = other.take() {
            std::thread::sleep(Duration::from_millis(100));
            check!(
                unbinding.is_running()?,
                "unbind with one holder left: expected it to wait, found its end"
            );
            other.stop().or_fail("PIN_LONGTERM_TEST_STOP")?;
        }
        unbinding.join()?;
        expect_gone(&s)?;
        expect_sigbus(&buf, 0)?;
        drop(buf);
        s.dax.bind().or_fail("bind")?;
        s.expect(0, 2, IDLE, "after unbind and bind")?;
        s.dax.map(n)?.check(0, 1, 724)?;
    }
    Ok(())
}

/// The driver is unbound again and again while another process maps and unmaps.
fn race(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let n = 4 * s.dax.step();
        for round in 0..5 {
            let file = s.dax.open()?;
            let worker = Child::spawn(|| {
                loop {
                    // The device may be without a driver now.
                    if let Ok(buf) = Buffer::of_file(&file, n, libc::MAP_SHARED) {
                        buf.set(0, 0, 1);
                        buf.get(n - 1, 0);
                    }
                }
            })?;
            std::thread::sleep(Duration::from_millis(7 * round));
            s.dax.unbind().or_fail("unbind")?;
            // The worker has ended by SIGBUS, or is killed now.
            let end = worker.end(libc::SIGKILL)?;
            check!(
                matches!(end, Exit::Signal(libc::SIGBUS | libc::SIGKILL)),
                "end of who maps meanwhile: expected SIGBUS or SIGKILL, found {end:?}"
            );
            drop(file);
            s.dax.bind().or_fail("bind")?;
        }
        let buf = s.dax.map(n)?;
        buf.fill(0, n, 725);
        buf.check(0, n, 725)?;
    }
    Ok(())
}

/// A page is released just when the unbind begins to wait for it, with one more reference in each
/// round: no wake-up is lost, and no reference is left over.
fn unpin(_: &Ctx) -> Outcome {
    const ROUNDS: u64 = 12;
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        if s.idle_refs()? != 0 {
            let why = "this kernel's device-dax does not wait for who holds a page";
            return Err(Fail::Skip(why.into()));
        }
        for round in 0..ROUNDS {
            let buf = s.dax.map(s.dax.step())?;
            buf.fill(0, 1, 726);
            let unbinding = Waiting::start(|| Ok(()), || s.dax.unbind().or_fail("unbind"))?;
            let holder = Device::open(0)?;
            let ids: Vec<u32> = (0..=round)
                .map(|i| holder.pin(&buf, 0, 1, if i % 2 == 0 { ZDM_PIN_GET } else { 0 }))
                .collect::<std::io::Result<_>>()
                .or_fail("ZDM_PIN")?;
            let unbinding = unbinding.release()?;
            // The release comes at different points of the unbind.
            std::thread::sleep(Duration::from_millis(3 * round));
            for id in ids {
                holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            }
            let gone = sys::wait_until(Duration::from_secs(20), || {
                !unbinding.is_running().unwrap_or(true)
            });
            check!(
                gone,
                "round {round}: expected the unbind to end as nobody holds a page, found it waiting"
            );
            unbinding.join()?;
            drop(buf);
            s.dax.bind().or_fail("bind")?;
            s.expect(0, 1, IDLE, "after unbind and bind")?;
        }
    }
    Ok(())
}
