// SPDX-License-Identifier: GPL-2.0

//! The rule itself on GENERIC memory: a page is free if and only if its count is zero. Kernels with
//! the old rule keep one reference on free pages. `refused` and `one_line` test the module there;
//! the other tests fail there.

use super::counts::{IDLE, MAPPED, expect_frames};
use super::target::{GENERIC, old_rule, open};
use super::{Ctx, PAGES, Test, absent, freed_since, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, check_bytes, pattern_bytes};
use crate::module::NAME;
use crate::sys::KernelLog;
use crate::uapi::*;
use crate::{check, check_eq, proc};

/// These tests run first, so that the memory is unused before `born`.
pub const TESTS: &[Test] = &[
    test("generic_rule.born", born),
    test("generic_rule.idle", idle),
    test("generic_rule.migrates", migrates),
    test("generic_rule.refused", refused),
];

/// Tests that load the module themselves.
pub const RELOADING: &[Test] = &[absent(test("generic_rule.one_line", one_line))];

/// Every page of both devices has count zero before its first use.
fn born(ctx: &Ctx) -> Outcome {
    let device = open(ctx, GENERIC)?;
    let mut seen = 0;
    for range in ctx.module.frames(GENERIC) {
        let n = (range.end - range.start) as usize;
        let pages = device.inspect_frames(range.start, n)?;
        seen += pages.len();
        for (pfn, page) in range.zip(&pages) {
            check_eq!(page.pfn, pfn, "page frame");
            check_eq!(page.kind, TYPE_GENERIC, "type of page frame {pfn:#x}");
            check_eq!(page.flags, ZDM_PAGE_THERE, "flags of page frame {pfn:#x}");
            check_eq!((page.order, page.index), (0, 0), "folio of {pfn:#x}");
            check_eq!(
                [page.refs, page.mapcount, page.pins],
                IDLE,
                "[references, mappings, pins] of page frame {pfn:#x}"
            );
        }
    }
    let owned = device.audit()?.0.pages + open(ctx, GENERIC + 1)?.audit()?.0.pages;
    check_eq!(seen as u64, owned, "page frames of both devices");
    Ok(())
}

/// All pages at rest have count zero, which an audit checks.
fn idle(ctx: &Ctx) -> Outcome {
    for n in [GENERIC, GENERIC + 1] {
        let device = open(ctx, n)?;
        let (audit, records) = device.audit()?;
        check_eq!(audit.used, 0, "used pages of {}", Device::path(n));
        check_eq!(
            (audit.found, audit.total),
            (0, 0),
            "violations on {} ({records:x?})",
            Device::path(n)
        );
        check_eq!(device.stats()?.free_refs, 0, "stats.free_refs");
    }
    Ok(())
}

/// The driver manages the life of the pages: they can be migration targets, and their counts are
/// zero again when they are freed.
fn migrates(ctx: &Ctx) -> Outcome {
    let device = open(ctx, GENERIC)?;
    let buf = Buffer::filled(PAGES, 610)?;
    let before = device.stats()?;
    let moved = device.to_device(&buf, 0, PAGES).or_fail("MIGRATE_TO_DEV")?;
    check_bytes(&moved.data, 610, 0, "returned data")?;
    let frames = proc::frames(&buf, 0, PAGES)?;
    expect_frames(&device, &frames, MAPPED, "on the device")?;
    buf.check(0, PAGES, 610)?;
    buf.unmap(0, PAGES)?;
    freed_since(&device, &before, PAGES)?;
    expect_frames(&device, &frames, IDLE, "after munmap")
}

/// Under the old rule the device exists, but refuses to be a migration target, and nothing moves.
/// Under the new rule this refusal never comes.
fn refused(ctx: &Ctx) -> Outcome {
    for n in [GENERIC, GENERIC + 1] {
        let device = open(ctx, n)?;
        let old = old_rule(ctx, &device, n)?;
        let buf = Buffer::filled(PAGES, 611)?;
        let before = device.stats()?;
        let result = device.to_device(&buf, 0, PAGES);
        if !old {
            result.or_fail("MIGRATE_TO_DEV")?;
            device.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
            buf.check(0, PAGES, 611)?;
            continue;
        }
        let frames = proc::frames(&buf, 0, PAGES)?;
        expect_errno(result, &[libc::EOPNOTSUPP], "MIGRATE_TO_DEV")?;
        let again = device.to_device(&buf, 3, 1);
        expect_errno(again, &[libc::EOPNOTSUPP], "MIGRATE_TO_DEV of one page")?;
        check_eq!(proc::frames(&buf, 0, PAGES)?, frames, "pages of the buffer");
        let after = device.stats()?;
        check_eq!(after.to_device, before.to_device, "stats.to_device");
        check_eq!(after.allocated, before.allocated, "stats.allocated");

        // Everything else works: access to system memory, inspection, audit, RELEASE.
        let read = device.read(&buf, 0, PAGES).or_fail("READ")?;
        check_bytes(&read.data, 611, 0, "READ")?;
        device
            .write(&buf, 8, &pattern_bytes(612, 8, 8))
            .or_fail("WRITE")?;
        buf.check(0, 8, 611)?;
        buf.check(8, 8, 612)?;
        buf.check(16, PAGES - 16, 611)?;
        let seen = device.snapshot(&buf, 0, PAGES).or_fail("SNAPSHOT")?;
        check_eq!(seen, vec![PROT_WRITE; PAGES], "SNAPSHOT");
        device.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
        let (audit, _) = device.audit()?;
        check_eq!(audit.used, 0, "used pages in the audit");
        check_eq!(audit.free, audit.pages, "free pages in the audit");
        check_eq!(audit.found, audit.pages, "violations, one for each page");
        device.release().or_fail("RELEASE")?;
        device.audit()?;
        buf.check(16, PAGES - 16, 611)?;
    }
    Ok(())
}

/// Where nothing can migrate to a device, the log says so once per device, and again after a
/// reload. The module can be unloaded afterwards.
fn one_line(ctx: &Ctx) -> Outcome {
    for _ in 0..2 {
        ctx.module.load("")?;
        let told = lines_of_a_load(ctx);
        // The next test needs the module unloaded.
        ctx.module.unload()?;
        told?;
    }
    Ok(())
}

fn lines_of_a_load(ctx: &Ctx) -> Outcome {
    let mut log = KernelLog::open().or_fail("/dev/kmsg")?;
    let mut old = false;
    for n in [GENERIC, GENERIC + 1, GENERIC, GENERIC + 1] {
        let device = open(ctx, n)?;
        old = old_rule(ctx, &device, n)?;
        let buf = Buffer::filled(4, 613)?;
        for _ in 0..2 {
            let result = device.to_device(&buf, 0, 4);
            check_eq!(result.is_err(), old, "whether MIGRATE_TO_DEV fails");
        }
        buf.check(0, 4, 613)?;
    }
    let lines = log.rest().or_fail("/dev/kmsg")?;
    for n in [GENERIC, GENERIC + 1] {
        let name = format!("hmm_dmirror{n}");
        let about = |l: &&String| {
            let words = [NAME, &name, "GENERIC"];
            words.iter().all(|w| l.contains(w)) && !l.contains("violation")
        };
        let said: Vec<&String> = lines.iter().filter(about).collect();
        check!(
            said.len() == usize::from(old),
            "lines of the log on {name}: expected {}, found {said:?}",
            usize::from(old)
        );
    }
    Ok(())
}
