// SPDX-License-Identifier: GPL-2.0

//! The records of broken invariants, and a pass without checks.

use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES};
use crate::harness::Child;
use crate::sys;
use crate::tests::inject::clear;
use crate::tests::inject::each::{CHUNKS, expect, inject, mended};
use crate::tests::target::{PRIVATE, Target, huge_filled};
use crate::tests::{Ctx, Test, test, with};
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    with("inject=1", test("inject.ledger", ledger)),
    with("inject=1", test("inject.records", records)),
    test("inject.pass", pass),
];

/// The chunks are small enough to use all of their pages.
pub const SMALL: &[Test] = &[with(CHUNKS, test("inject.ledger_freed", ledger_freed))];

/// A violation has the last transition of the page, its time, and the task that made it.
fn ledger(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let me = sys::pid() as u32;
    // The page is in use: this task moved it there.
    let buf = Buffer::filled(1, 119)?;
    target.move_all(&buf, 119)?;
    let pfn = inject(&target, ZDM_INJECT_EXTRA_GET, buf.at(0))?;
    let moved = expect(&target, 1, 5, ZDM_CHECK_REFCOUNT, pfn)?;
    check_eq!(
        (moved.last_event, moved.last_pid, moved.last_order),
        (ZDM_EVENT_SETTLED, me, 0),
        "last transition ({moved:x?})"
    );
    inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
    clear(&target)?;
    // The page is in use as a part of a former huge page.
    let huge = huge_filled(1, 117)?;
    target.move_huge(&huge, 117)?;
    // The rest is not mapped by a PMD, so that a fault splits the folio.
    huge.unmap(0, 1)?;
    huge.get(1, 0);
    let pfn = inject(&target, ZDM_INJECT_EXTRA_GET, huge.at(7))?;
    let split = expect(&target, 1, 5, ZDM_CHECK_REFCOUNT, pfn)?;
    check_eq!(
        (split.last_event, split.last_pid, split.last_order),
        (ZDM_EVENT_SPLIT, me, 0),
        "last transition ({split:x?})"
    );
    check!(
        split.last_time > moved.last_time,
        "last transition: expected a later one, found {split:x?} after {moved:x?}"
    );
    inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
    huge.check(1, HUGE_PAGES - 1, 117)?;
    // The page was never used.
    clear(&target)?;
    let pfn = inject(&target, ZDM_INJECT_STALE_MAPPING, 0)?;
    let born = expect(&target, 1, 5, ZDM_CHECK_MAPPING, pfn)?;
    check_eq!(
        born.last_event,
        ZDM_EVENT_BORN,
        "last transition ({born:x?})"
    );
    check!(
        born.last_time < moved.last_time,
        "last transition: expected an earlier one, found {born:x?} and {moved:x?}"
    );
    inject(&target, ZDM_INJECT_UNDO_STALE, 0)?;
    buf.check(0, 1, 119)?;
    mended(&target)
}

/// The last transition of a page that is free again, on a device whose pages were all used.
fn ledger_freed(ctx: &Ctx) -> Outcome {
    // The first device has a page that another test has quarantined.
    let target = Target::open(ctx, PRIVATE + 1)?;
    let buf = Buffer::anon(HUGE_PAGES)?;
    buf.advise(0, HUGE_PAGES, libc::MADV_NOHUGEPAGE)?;
    buf.fill(0, HUGE_PAGES, 116);
    target.move_all(&buf, 116)?;
    target.bring_back(&buf, 0, HUGE_PAGES)?;
    let pfn = inject(&target, ZDM_INJECT_STALE_ANON_EXCLUSIVE, 0)?;
    let freed = expect(&target, 1, 5, ZDM_CHECK_ANON_EXCLUSIVE, pfn)?;
    check_eq!(
        (freed.last_event, freed.last_pid, freed.last_order),
        (ZDM_EVENT_FREED, sys::pid() as u32, 0),
        "last transition ({freed:x?})"
    );
    inject(&target, ZDM_INJECT_UNDO_STALE, 0)?;
    mended(&target)
}

/// Records have the requested size: that of the first version, of this one, and of a future one,
/// which is filled up with zeroes.
fn records(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let pfn = inject(&target, ZDM_INJECT_DOUBLE_FREE, 0)?;
    let whole = size_of::<Violation>();
    let first = ZDM_VIOLATION_SIZE_VER0 as usize;
    for (asked, size) in [
        (0, first),
        (first, first),
        (whole, whole),
        (whole + 100, whole + 100),
    ] {
        let mut bytes = vec![0x5a_u8; size * 2];
        let mut audit = Audit {
            records: bytes.as_mut_ptr() as u64,
            nr_records: 2,
            record_size: asked as u32,
            ..Audit::default()
        };
        target.audit_with(&mut audit).or_fail("ZDM_AUDIT")?;
        check_eq!(audit.nr_records, 1, "records of size {asked}");
        let there = u64::from_ne_bytes(bytes[8..16].try_into().unwrap_or_default());
        check_eq!(there, pfn, "page of the record of size {asked}");
        let event = bytes[48];
        let known = u8::from(size >= whole) * ZDM_EVENT_BORN as u8;
        check_eq!(
            if size >= whole { event } else { 0 },
            known,
            "event of size {asked}"
        );
        let (zeroes, rest) = bytes[whole.min(size)..].split_at(size - whole.min(size));
        check!(
            zeroes.iter().all(|&b| b == 0),
            "what is not known of size {asked}: {zeroes:x?}"
        );
        check!(
            rest.iter().all(|&b| b == 0x5a),
            "bytes behind a record of size {asked} were written"
        );
    }
    for (size, reserved, errno) in [
        (1, 0, libc::EINVAL),
        (first as u32 - 1, 0, libc::EINVAL),
        (4097, 0, libc::E2BIG),
        (u32::MAX, 0, libc::E2BIG),
        (0, 1, libc::EINVAL),
    ] {
        let mut audit = Audit {
            record_size: size,
            reserved,
            ..Audit::default()
        };
        let what = format!("ZDM_AUDIT with a record size of {size}, reserved {reserved}");
        expect_errno(target.audit_with(&mut audit), &[errno], &what)?;
    }
    mended(&target)
}

/// A pass reads all pages, finds nothing, and needs root.
fn pass(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let (scan, _) = target.audit()?;
    let (pass, _) = target.try_audit(ZDM_AUDIT_PASS).or_fail("ZDM_AUDIT_PASS")?;
    check_eq!(pass.pages, scan.pages, "pages that a pass reads");
    check_eq!(
        (pass.free, pass.used, pass.found),
        (0, 0, 0),
        "what a pass finds"
    );
    let both = target.try_audit(ZDM_AUDIT_PASS | ZDM_AUDIT_CLEAR);
    expect_errno(both, &[libc::EINVAL], "ZDM_AUDIT_PASS and ZDM_AUDIT_CLEAR")?;
    Child::spawn(|| {
        sys::become_nobody().or_fail("setresuid")?;
        let result = target.try_audit(ZDM_AUDIT_PASS);
        expect_errno(
            result,
            &[libc::EPERM],
            "ZDM_AUDIT_PASS without CAP_SYS_ADMIN",
        )
    })?
    .join()
}
