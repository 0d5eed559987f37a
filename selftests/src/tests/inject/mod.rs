// SPDX-License-Identifier: GPL-2.0

//! Tests the oracle: a test breaks an invariant on purpose. The audit must report it once, with the
//! right page, and must be silent when the invariant holds again.

pub mod each;
pub mod records;

use super::{Ctx, Test, expect_on_device, freed_since, test, with};
use crate::check;
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, Device, check_bytes};
use crate::harness::Child;
use crate::proc;
use crate::sys;
use crate::uapi::*;

pub const TESTS: &[Test] = &[test("inject.not_allowed", not_allowed)];

/// Tests that need injection.
pub const INJECTING: &[Test] = &[
    with("inject=1", test("inject.not_root", not_root)),
    with("inject=1", test("inject.bad", bad)),
    with("inject=1", test("inject.extra_get", extra_get)),
    with("inject=1", test("inject.held_page_fault", held_page_fault)),
    with("inject=1", test("inject.free_page_ref", free_page_ref)),
    with("inject=1", test("inject.alloc_twice", alloc_twice)),
];

/// Clears the records, so that the harness's audit is that of an unused device.
pub(super) fn clear(device: &Device) -> Outcome {
    device.try_audit(ZDM_AUDIT_CLEAR).or_fail("ZDM_AUDIT")?;
    let (audit, records) = device.audit()?;
    check_eq!(audit.total, 0, "total after ZDM_AUDIT_CLEAR");
    check_eq!(records.len(), 0, "records after ZDM_AUDIT_CLEAR");
    Ok(())
}

/// Returns the only violation that the audit reports.
pub(super) fn the_violation(device: &Device, found: u64) -> Outcome<(Audit, Violation)> {
    let (audit, records) = device.audit()?;
    check_eq!(audit.found, found, "violations that the scan found");
    check_eq!(audit.total, 1, "violations in total ({records:x?})");
    match records[..] {
        [one] => Ok((audit, one)),
        _ => Err(Fail::failed(format!(
            "records: expected one, found {records:x?}"
        ))),
    }
}

/// Moves a page to the device. Returns its page frame number by pagemap.
fn one_on_device(device: &Device, buf: &Buffer) -> Outcome<u64> {
    device.to_device(buf, 0, 1).or_fail("MIGRATE_TO_DEV")?;
    expect_on_device(buf, 0, 1, 1)?;
    proc::on_device(buf, 0, 1)?
        .first()
        .copied()
        .ok_or_else(|| Fail::failed("pfn in pagemap: expected one, found none"))
}

fn not_allowed(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 100)?;
    one_on_device(&device, &buf)?;
    for kind in ZDM_INJECT_EXTRA_GET..=ZDM_INJECT_CORRUPT {
        let result = device.inject(kind, buf.at(0));
        let what = format!("ZDM_INJECT of kind {kind} with inject=0");
        expect_errno(result, &[libc::EPERM], &what)?;
    }
    buf.check(0, 1, 100)
}

fn not_root(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 101)?;
    one_on_device(&device, &buf)?;
    // Use a child, because a process cannot regain its capabilities.
    Child::spawn(|| {
        sys::become_nobody().or_fail("setresuid")?;
        for kind in ZDM_INJECT_EXTRA_GET..=ZDM_INJECT_CORRUPT {
            let result = device.inject(kind, buf.at(0));
            let what = format!("ZDM_INJECT of kind {kind} without CAP_SYS_ADMIN");
            expect_errno(result, &[libc::EPERM], &what)?;
        }
        let result = device.try_audit(ZDM_AUDIT_CLEAR);
        let what = "ZDM_AUDIT_CLEAR without CAP_SYS_ADMIN";
        expect_errno(result, &[libc::EPERM], what)
    })?
    .join()?;
    buf.check(0, 1, 101)
}

fn bad(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(2, 102)?;
    for kind in [0, ZDM_INJECT_GO_ON + 1, u32::MAX] {
        let what = format!("ZDM_INJECT of kind {kind}");
        expect_errno(device.inject(kind, buf.at(0)), &[libc::EINVAL], &what)?;
    }
    let result = device.inject(ZDM_INJECT_EXTRA_GET, buf.at(0));
    let what = "ZDM_INJECT_EXTRA_GET of a page in system memory";
    expect_errno(result, &[libc::ENOENT], what)?;
    buf.unmap(1, 1)?;
    let result = device.inject(ZDM_INJECT_EXTRA_GET, buf.at(1));
    expect_errno(result, &[libc::ENOENT], "ZDM_INJECT_EXTRA_GET of a hole")?;
    for kind in [
        ZDM_INJECT_UNDO_GET,
        ZDM_INJECT_UNDO_FREE_PAGE_REF,
        ZDM_INJECT_UNDO_STALE,
        ZDM_INJECT_PAGEMAP_PUT,
    ] {
        let result = device.inject(kind, buf.at(0));
        let what = format!("ZDM_INJECT of kind {kind} with nothing to undo");
        expect_errno(result, &[libc::ENOENT], &what)?;
    }
    // The page belongs to the other device.
    let other = Device::open(1)?;
    one_on_device(&other, &buf)?;
    let result = device.inject(ZDM_INJECT_EXTRA_GET, buf.at(0));
    let what = "ZDM_INJECT_EXTRA_GET of another device's page";
    expect_errno(result, &[libc::ENOENT], what)?;
    buf.check(0, 1, 102)
}

/// A reference that nothing explains keeps a page from being freed.
fn extra_get(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 103)?;
    let pfn = one_on_device(&device, &buf)?;
    let before = device.stats()?;
    let got = device
        .inject(ZDM_INJECT_EXTRA_GET, buf.at(0))
        .or_fail("ZDM_INJECT_EXTRA_GET")?;
    check_eq!(got, pfn, "pfn that ZDM_INJECT_EXTRA_GET touched");
    buf.unmap(0, 1)?;

    let (audit, v) = the_violation(&device, 1)?;
    check_eq!(audit.used, 1, "used pages in the audit");
    check!(
        matches!(v.invariant, 3 | 5),
        "invariant of a page in use that nobody maps: expected 3 or 5, found {v:x?}"
    );
    check_eq!(v.pfn, pfn, "pfn of the violation");
    check_eq!(v.check, ZDM_CHECK_REFCOUNT, "check of the violation");
    check_eq!(v.found, 1, "reference count of the violation");
    let freed = device.stats()?.freed;
    check_eq!(
        freed,
        before.freed,
        "freed pages while the reference is held"
    );

    device
        .inject(ZDM_INJECT_UNDO_GET, buf.at(0))
        .or_fail("ZDM_INJECT_UNDO_GET")?;
    freed_since(&device, &before, 1)?;
    let (audit, _) = device.audit()?;
    check_eq!(audit.found, 0, "violations after ZDM_INJECT_UNDO_GET");
    check_eq!(audit.used, 0, "used pages after ZDM_INJECT_UNDO_GET");
    clear(&device)
}

/// A held page cannot come back: an access of the kernel fails instead of being retried for ever,
/// and no data is lost.
fn held_page_fault(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 106)?;
    let pfn = one_on_device(&device, &buf)?;
    device
        .inject(ZDM_INJECT_EXTRA_GET, buf.at(0))
        .or_fail("ZDM_INJECT_EXTRA_GET")?;
    let file = sys::memfd("zdm-held").or_fail("memfd_create")?;
    let result = buf.write_to(&file, 0, 1);
    expect_errno(result, &[libc::EFAULT], "write(2) from a page that is held")?;
    let (audit, records) = device.try_audit(0).or_fail("ZDM_AUDIT")?;
    check_eq!(audit.used, 1, "used pages in the audit");
    match records.first() {
        Some(v) => {
            check_eq!(v.invariant, 3, "invariant of the fault's violation");
            check_eq!(v.check, ZDM_CHECK_REFCOUNT, "check of the violation");
            check_eq!(v.pfn, pfn, "pfn of the violation");
            // A mapping and the fault explain two references; three are found.
            check_eq!((v.expected, v.found), (2, 3), "reference counts");
        }
        None => return Err(Fail::failed("records: expected I3, found none")),
    }

    device
        .inject(ZDM_INJECT_UNDO_GET, buf.at(0))
        .or_fail("ZDM_INJECT_UNDO_GET")?;
    buf.check(0, 1, 106)?;
    clear(&device)
}

/// The old rule: a free page has a reference count of one.
fn free_page_ref(_: &Ctx) -> Outcome {
    let device = Device::open(1)?;
    let pfn = device
        .inject(ZDM_INJECT_FREE_PAGE_REF, 0)
        .or_fail("ZDM_INJECT_FREE_PAGE_REF")?;
    let (audit, v) = the_violation(&device, 1)?;
    check_eq!(audit.used, 0, "used pages in the audit");
    check_eq!(v.invariant, 5, "invariant of the violation");
    check_eq!(v.check, ZDM_CHECK_REFCOUNT, "check of the violation");
    check_eq!(v.pfn, pfn, "pfn of the violation");
    check_eq!(v.expected, 0, "expected value in the violation");
    check_eq!(v.found, 1, "found value in the violation");

    // The other device is not affected.
    let (audit, _) = Device::open(0)?.audit()?;
    check_eq!(audit.total, 0, "violations on the other device");

    device
        .inject(ZDM_INJECT_UNDO_FREE_PAGE_REF, 0)
        .or_fail("ZDM_INJECT_UNDO_FREE_PAGE_REF")?;
    let (audit, _) = device.audit()?;
    check_eq!(audit.found, 0, "violations after the undoing");
    clear(&device)
}

/// The allocator is made to offer a page that is in use.
fn alloc_twice(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let (one, two) = (Buffer::filled(1, 104)?, Buffer::filled(4, 105)?);
    let pfn = one_on_device(&device, &one)?;
    let got = device
        .inject(ZDM_INJECT_ALLOC_TWICE, one.at(0))
        .or_fail("ZDM_INJECT_ALLOC_TWICE")?;
    check_eq!(got, pfn, "pfn that ZDM_INJECT_ALLOC_TWICE touched");

    // The driver takes another page, so that no data is lost.
    device.move_all(&two, 105)?;
    let pfns = proc::on_device(&two, 0, 4)?;
    check!(
        !pfns.contains(&pfn),
        "pfns of the second buffer: expected others than {pfn:#x}, found {pfns:x?}"
    );
    let read = device.read(&one, 0, 1).or_fail("READ")?;
    check_bytes(&read.data, 104, 0, "the page that was offered twice")?;

    let (audit, v) = the_violation(&device, 0)?;
    check_eq!(audit.used, 5, "used pages in the audit");
    check_eq!(v.invariant, 2, "invariant of the violation");
    check_eq!(v.pfn, pfn, "pfn of the violation");
    one.check(0, 1, 104)?;
    two.check(0, 4, 105)?;
    clear(&device)
}
