// SPDX-License-Identifier: GPL-2.0

//! A test breaks every invariant of every kind of memory on purpose. The oracle must report exactly
//! that violation, on that page. The tests of `inject.rs` use only PRIVATE memory.

use std::fs;
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, HUGE_PAGES};
use crate::harness::Child;
use crate::module;
use crate::proc;
use crate::sys;
use crate::tests::account::{current, join_cgroup, new_cgroup};
use crate::tests::inject::{clear, the_violation};
use crate::tests::target::{Target, huge_filled};
use crate::tests::{Ctx, Test, test, with};
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = of_each_kind!("inject", "inject=1":
    "born" => born,
    "settled_ref" => settled_ref,
    "settled_ref_huge" => settled_ref_huge,
    "source_ref" => source_ref,
    "source_ref_huge" => source_ref_huge,
    "double_free" => double_free,
    "stale_mapping" => stale_mapping,
    "stale_anon_exclusive" => stale_anon_exclusive,
    "held_huge" => held_huge,
    "pagemap_ref" => pagemap_ref,
    "stuck" => stuck,
    "not_freed" => not_freed,
    "still_charged" => still_charged,
    "corrupt" => corrupt,
);

/// Tests that need all of a device's memory.
pub const SMALL: &[Test] = of_each_kind!("inject", "inject=1 devmem_chunk_mb=2":
    "stale_hand_out" => stale_hand_out,
);

/// The parameters of those tests.
pub(in crate::tests) const CHUNKS: &str = "inject=1 devmem_chunk_mb=2";

/// Tests of a single kind of memory.
pub const MORE: &[Test] = &[with(
    "inject=1",
    test("inject.pagemap_ref_stays", pagemap_ref_stays),
)];

const N: usize = 8;

/// Returns the only violation since the last `clear`, which a scan finds `found` more times.
#[track_caller]
pub(in crate::tests) fn expect(
    device: &Device,
    found: u64,
    invariant: u32,
    check: u32,
    pfn: u64,
) -> Outcome<Violation> {
    let (_, v) = the_violation(device, found)?;
    check_eq!(
        (v.invariant, v.check, v.pfn),
        (invariant, check, pfn),
        "invariant, check and page of the violation ({v:x?})"
    );
    Ok(v)
}

/// The page frame of a page on the device.
#[track_caller]
fn frame(target: &Target, buf: &Buffer, page: usize) -> Outcome<u64> {
    Ok(target.inspect_one(buf, page)?.pfn)
}

/// The page frame of a page that the CPU has mapped.
#[track_caller]
fn mapped_frame(buf: &Buffer, page: usize) -> Outcome<u64> {
    let frames = proc::frames(buf, page, 1)?;
    let first = frames.first().copied();
    first.ok_or_else(|| Fail::failed(format!("no page frame of page {page}")))
}

/// Injects a fault. Returns the page frame that was changed.
#[track_caller]
pub(in crate::tests) fn inject(device: &Device, kind: u32, addr: u64) -> Outcome<u64> {
    device
        .inject(kind, addr)
        .or_fail(&format!("ZDM_INJECT of kind {kind}"))
}

/// Checks that a scan finds nothing any more, and clears the records.
#[track_caller]
pub(in crate::tests) fn mended(target: &Target) -> Outcome {
    target.expect_empty()?;
    clear(target)
}

/// I1: memory is registered with a page that has a reference.
fn born(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::filled(N, 120)?;
    inject(&target, ZDM_INJECT_BORN_REF, 0)?;
    target
        .command(HMM_RELEASE, buf.at(0), 1, Data::Nowhere)
        .or_fail("RELEASE")?;
    target.move_all(&buf, 120)?;
    let (audit, records) = target.audit()?;
    check_eq!(audit.total, 1, "violations ({records:x?})");
    let v = records[0];
    check_eq!(
        (v.invariant, v.check, v.expected, v.found),
        (1, ZDM_CHECK_REFCOUNT, 0, 1),
        "the violation ({v:x?})"
    );
    check_eq!(v.last_event, ZDM_EVENT_BORN, "last transition of the page");
    // The page is the first one of the device.
    let lowest = frame(&target, &buf, 0)?;
    check!(
        v.pfn <= lowest && lowest - v.pfn < N as u64,
        "page of the violation: expected the first one of the memory that {lowest:#x} is in, found {v:x?}"
    );
    target.bring_back(&buf, 0, N)?;
    buf.check(0, N, 120)?;
    mended(&target)
}

/// I2: a page with a mapping is not given out. The chunks have 2 MiB, and the test uses all of
/// them.
fn stale_hand_out(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::anon(HUGE_PAGES)?;
    buf.advise(0, HUGE_PAGES, libc::MADV_NOHUGEPAGE)?;
    buf.fill(0, HUGE_PAGES, 121);
    // A device without memory, as after a RELEASE, has no free page to be spoilt.
    target.to_device(&buf, 0, 1).or_fail("MIGRATE_TO_DEV")?;
    target.to_system(&buf, 0, 1).or_fail("MIGRATE_TO_SYS")?;
    let pfn = inject(&target, ZDM_INJECT_STALE_MAPPING, 0)?;
    let result = target.to_device(&buf, 0, HUGE_PAGES);
    expect_errno(
        result.map(|_| ()),
        &[libc::ENOENT],
        "MIGRATE_TO_DEV of more than there is",
    )?;
    target.expect(&buf, 0, HUGE_PAGES, HUGE_PAGES - 1)?;
    inject(&target, ZDM_INJECT_UNDO_STALE, 0)?;
    expect(&target, 0, 2, ZDM_CHECK_MAPPING, pfn)?;
    target
        .to_system(&buf, 0, HUGE_PAGES)
        .or_fail("MIGRATE_TO_SYS")?;
    buf.check(0, HUGE_PAGES, 121)?;
    mended(&target)
}

/// I3: a folio has more references than mappings after a migration to it.
fn settled(ctx: &Ctx, node: usize, huge: bool) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = source(&target, huge, 122)?;
    inject(&target, ZDM_INJECT_SETTLED_REF, 0)?;
    target.move_all(&buf, 122)?;
    let page = target.inspect_one(&buf, 0)?;
    let order = if huge && target.moves_large() { 9 } else { 0 };
    check_eq!(page.order, order, "order of the folio");
    // The migration finds it, and so does the scan.
    let (audit, records) = target.audit()?;
    check_eq!(
        (audit.found, audit.total),
        (1, 2),
        "violations ({records:x?})"
    );
    for (v, invariant) in records.iter().zip([3, 5]) {
        check_eq!(
            (v.invariant, v.check, v.pfn, v.order, v.expected, v.found),
            (invariant, ZDM_CHECK_REFCOUNT, page.pfn, order, 1, 2),
            "the violation ({v:x?})"
        );
    }
    let pfn = inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
    check_eq!(pfn, page.pfn, "page of UNDO_GET");
    target.bring_back(&buf, 0, buf.pages())?;
    buf.check(0, buf.pages(), 122)?;
    mended(&target)
}

/// Makes memory to migrate, huge if the device takes huge pages.
fn source(target: &Target, huge: bool, seed: u64) -> Outcome<Buffer> {
    if !huge {
        return Buffer::filled(N, seed);
    }
    if !target.moves_large() {
        return Err(Fail::Skip("this kernel moves no huge pages there".into()));
    }
    huge_filled(1, seed)
}

fn settled_ref(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, false)
}

fn settled_ref_huge(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, true)
}

/// I9: a held folio of system memory migrates.
fn moved_held(ctx: &Ctx, node: usize, huge: bool) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = source(&target, huge, 123)?;
    let pfn = mapped_frame(&buf, 0)?;
    inject(&target, ZDM_INJECT_SOURCE_REF, 0)?;
    target.move_all(&buf, 123)?;
    let v = expect(&target, 0, 9, ZDM_CHECK_REFCOUNT, pfn)?;
    check_eq!(
        (v.kind, v.expected, v.found),
        (TYPE_SYSTEM, 1, 2),
        "the violation ({v:x?})"
    );
    check_eq!(
        v.order,
        if huge { 9 } else { 0 },
        "order of the folio that is held"
    );
    let held = inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
    check_eq!(held, pfn, "page of UNDO_GET");
    target.bring_back(&buf, 0, buf.pages())?;
    buf.check(0, buf.pages(), 123)?;
    mended(&target)
}

fn source_ref(ctx: &Ctx, node: usize) -> Outcome {
    moved_held(ctx, node, false)
}

fn source_ref_huge(ctx: &Ctx, node: usize) -> Outcome {
    moved_held(ctx, node, true)
}

/// I4: a free page is freed.
fn double_free(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let pfn = inject(&target, ZDM_INJECT_DOUBLE_FREE, 0)?;
    let v = expect(&target, 0, 4, ZDM_CHECK_STATE, pfn)?;
    check_eq!((v.expected, v.found), (1, 0), "the violation ({v:x?})");
    // The allocator still has the page once.
    let before = target.audit()?.0.free;
    let buf = Buffer::filled(N, 124)?;
    target.move_all(&buf, 124)?;
    check_eq!(target.audit()?.0.free, before - N as u64, "free pages");
    target.bring_back(&buf, 0, N)?;
    buf.check(0, N, 124)?;
    mended(&target)
}

/// I5: a free page has a field that a free page must not have.
fn stale(ctx: &Ctx, node: usize, kind: u32, check: u32) -> Outcome {
    let target = Target::open(ctx, node)?;
    let pfn = inject(&target, kind, 0)?;
    expect(&target, 1, 5, check, pfn)?;
    expect_errno(target.inject(kind, 0), &[libc::EBUSY], "the same once more")?;
    check_eq!(
        inject(&target, ZDM_INJECT_UNDO_STALE, 0)?,
        pfn,
        "page of UNDO_STALE"
    );
    mended(&target)
}

fn stale_mapping(ctx: &Ctx, node: usize) -> Outcome {
    stale(ctx, node, ZDM_INJECT_STALE_MAPPING, ZDM_CHECK_MAPPING)
}

fn stale_anon_exclusive(ctx: &Ctx, node: usize) -> Outcome {
    stale(
        ctx,
        node,
        ZDM_INJECT_STALE_ANON_EXCLUSIVE,
        ZDM_CHECK_ANON_EXCLUSIVE,
    )
}

/// I5: a large folio in use has a reference that nothing explains.
fn held_huge(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = source(&target, true, 125)?;
    target.move_huge(&buf, 125)?;
    let pfn = frame(&target, &buf, 0)?;
    let tail = inject(&target, ZDM_INJECT_EXTRA_GET, buf.at(HUGE_PAGES / 2))?;
    check!(
        (pfn..pfn + HUGE_PAGES as u64).contains(&tail),
        "page of EXTRA_GET: expected one of the folio at {pfn:#x}, found {tail:#x}"
    );
    let v = expect(&target, 1, 5, ZDM_CHECK_REFCOUNT, pfn)?;
    check_eq!(
        (v.order, v.expected, v.found),
        (9, 1, 2),
        "the violation ({v:x?})"
    );
    check_eq!(
        (v.last_event, v.last_order),
        (ZDM_EVENT_SETTLED, 9),
        "last transition ({v:x?})"
    );
    inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
    buf.unmap(0, HUGE_PAGES)?;
    mended(&target)
}

/// I6: the pagemap has a reference that nothing explains.
fn pagemap_ref(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let pfn = inject(&target, ZDM_INJECT_PAGEMAP_GET, 0)?;
    let v = expect(&target, 1, 6, ZDM_CHECK_PAGEMAP, pfn)?;
    check_eq!((v.expected, v.found), (0, 1), "the violation ({v:x?})");
    check_eq!(
        inject(&target, ZDM_INJECT_PAGEMAP_PUT, 0)?,
        pfn,
        "page of PAGEMAP_PUT"
    );
    mended(&target)?;
    // The count is also right with pages in use.
    let buf = Buffer::filled(N, 126)?;
    target.move_all(&buf, 126)?;
    inject(&target, ZDM_INJECT_PAGEMAP_GET, 0)?;
    expect(&target, 1, 6, ZDM_CHECK_PAGEMAP, pfn)?;
    // This scans once more, and clears the result.
    target.try_audit(ZDM_AUDIT_CLEAR).or_fail("ZDM_AUDIT")?;
    // RELEASE refuses, because unregistering the memory would never end.
    let release = || target.command(HMM_RELEASE, buf.at(0), 1, Data::Nowhere);
    expect_errno(
        release(),
        &[libc::EBUSY],
        "RELEASE of a pagemap that is held",
    )?;
    // RELEASE reports the violation, and then the scan does.
    let (audit, records) = target.audit()?;
    check_eq!(
        (audit.found, audit.total),
        (1, 2),
        "violations ({records:x?})"
    );
    check!(
        records.iter().all(|v| (v.invariant, v.pfn) == (6, pfn)),
        "violations: expected I6 of {pfn:#x}, found {records:x?}"
    );
    inject(&target, ZDM_INJECT_PAGEMAP_PUT, 0)?;
    release().or_fail("RELEASE")?;
    target.bring_back(&buf, 0, N)?;
    buf.check(0, N, 126)?;
    mended(&target)
}

/// With such a reference the memory cannot be unregistered, so the module stays; it can be unloaded
/// after the reference is dropped.
fn pagemap_ref_stays(ctx: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    inject(&device, ZDM_INJECT_PAGEMAP_GET, 0)?;
    drop(device);
    match ctx.module.try_unload() {
        Err(e) if module::busy(&e) => {}
        other => {
            return Err(Fail::failed(format!(
                "unloading with a pagemap that is held: expected EAGAIN or EBUSY, found {other:?}"
            )));
        }
    }
    let device = Device::open(0)?;
    let pfn = inject(&device, ZDM_INJECT_PAGEMAP_PUT, 0)?;
    expect(&device, 0, 6, ZDM_CHECK_PAGEMAP, pfn)?;
    clear(&device)?;
    drop(device);
    ctx.module.unload()?;
    ctx.module.load("inject=1")
}

/// I7: a page does not leave the device.
fn stuck(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::filled(N, 127)?;
    target.move_all(&buf, 127)?;
    let pfn = inject(&target, ZDM_INJECT_EXTRA_GET, buf.at(2))?;
    let result = target.command(HMM_RELEASE, buf.at(0), 1, Data::Nowhere);
    expect_errno(result, &[libc::EBUSY], "RELEASE with a page that is held")?;
    inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
    let v = expect(&target, 0, 7, ZDM_CHECK_STUCK, pfn)?;
    check_eq!(v.found, 2, "references of the violation ({v:x?})");
    target
        .command(HMM_RELEASE, buf.at(0), 1, Data::Nowhere)
        .or_fail("RELEASE")?;
    buf.check(0, N, 127)?;
    clear(&target)
}

/// I8: the source page of a migration is not freed.
fn not_freed(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = source(&target, true, 128)?;
    let pfn = mapped_frame(&buf, 0)?;
    check!(
        proc::is_large_folio(pfn)?,
        "frame {pfn:#x}: expected a huge page, found none"
    );
    inject(&target, ZDM_INJECT_SOURCE_REF, 0)?;
    target.move_huge(&buf, 128)?;
    // The page is not mapped, but still exists.
    check!(
        proc::is_large_folio(pfn)?,
        "frame {pfn:#x}: expected the huge page, found none"
    );
    inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
    check!(
        !proc::is_large_folio(pfn)?,
        "frame {pfn:#x}: expected a free page, found a huge one"
    );
    expect(&target, 0, 9, ZDM_CHECK_REFCOUNT, pfn)?;
    buf.unmap(0, HUGE_PAGES)?;
    mended(&target)
}

/// I8: an unmapped device page is not freed, and stays charged.
fn still_charged(ctx: &Ctx, node: usize) -> Outcome {
    let dir = new_cgroup()?;
    let child = Child::spawn(|| {
        join_cgroup(&dir)?;
        let target = Target::open(ctx, node)?;
        let buf = source(&target, true, 118)?;
        target.move_huge(&buf, 118)?;
        inject(&target, ZDM_INJECT_EXTRA_GET, buf.at(0))?;
        // The process has no other memory left, so the remaining charge is the leak.
        buf.unmap(0, HUGE_PAGES)?;
        let huge = HUGE_PAGES as u64;
        let held = current(&dir)?;
        inject(&target, ZDM_INJECT_UNDO_GET, 0)?;
        let mut left = held;
        sys::wait_until(Duration::from_secs(5), || {
            left = current(&dir).unwrap_or(u64::MAX);
            left + huge * 3 / 4 < held
        });
        check!(
            held >= huge && left + huge * 3 / 4 < held,
            "pages charged: expected {huge} more while one is held than after, found {held} and {left}"
        );
        mended(&target)
    })?;
    let outcome = child.join();
    fs::remove_dir(&dir).or_fail("rmdir of an empty cgroup")?;
    outcome
}

/// I10: a bit of the data is flipped on the device.
fn corrupt(ctx: &Ctx, node: usize) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::filled(N, 129)?;
    target.move_all(&buf, 129)?;
    for (page, times) in [(3, 1), (5, 2)] {
        for _ in 0..times {
            inject(&target, ZDM_INJECT_CORRUPT, buf.at(page))?;
        }
    }
    target.bring_back(&buf, 0, N)?;
    match buf.check(0, N, 129) {
        Err(Fail::Failed { what, .. }) if what.contains("page 3") => {}
        other => {
            return Err(Fail::failed(format!(
                "data with a bit flipped in page 3: expected a failure that says so, found {other:?}"
            )));
        }
    }
    buf.check(0, 3, 129)?;
    buf.check(4, N - 4, 129)?;
    mended(&target)
}
