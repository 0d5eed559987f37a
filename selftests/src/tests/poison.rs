// SPDX-License-Identifier: GPL-2.0

//! memory_failure() and soft offlining of device pages, by madvise. Pages that a driver migrates
//! are refused, because the driver has no callback, and the attempt leaves no trace. A device-dax
//! page is unmapped from all processes, which get SIGBUS.

use std::fs;
use std::io::{Read, Write};
use std::time::Duration;

use super::chain::{SIZES, filled};
use super::counts::{IDLE, MAPPED, Waiting, expect_frames, frames};
use super::dax::Setup;
use super::leak::settled;
use super::target::huge_filled;
use super::{Ctx, Test, freed_since, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::dax::{PMD, PTE};
use crate::device::{Buffer, check_bytes};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("poison":
    "hard" => hard,
    "soft" => soft,
    "unsplit" => unsplit,
);

/// Tests of device-dax, which has tests of its own.
pub const DAX: &[Test] = &[
    test("dax.poison", dax_poison::<PTE>),
    test("dax.poison_pmd", dax_poison::<PMD>),
    test("dax.soft_offline", dax_soft_offline),
];

const CORRUPT: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
const UNPOISON: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";

/// Gives failed pages of system memory back to the page allocator.
fn unpoison(frames: &[u64]) -> Outcome {
    if !fs::exists(UNPOISON).or_fail(UNPOISON)? {
        return Err(Fail::Skip("no CONFIG_HWPOISON_INJECT".into()));
    }
    for frame in frames {
        fs::write(UNPOISON, frame.to_string()).or_fail(UNPOISON)?;
    }
    Ok(())
}

/// A device page is reported as broken. The kernel refuses where the page stays on the device.
/// Where the CPU cannot map it there, the page first comes back, and the system page fails.
fn hard(ctx: &Ctx, node: usize) -> Outcome {
    unpoison(&[])?;
    for huge in SIZES {
        settled(ctx, node, |target| {
            if target.cpu_maps() && !target.moves_large() {
                return Err(Fail::Skip(
                    "this kernel takes the page's anon_vma for an inode and oopses".into(),
                ));
            }
            let buf = filled(huge, 1700)?;
            let n = buf.pages();
            target.move_all(&buf, 1700)?;
            let pfns = frames(target, &buf, 0, n)?;
            let page = n / 3;
            let before = target.stats()?;
            if target.cpu_maps() {
                for page in [0, page, n - 1] {
                    let result = buf.try_advise(page, 1, libc::MADV_HWPOISON);
                    expect_errno(result, &[libc::ENXIO], "MADV_HWPOISON")?;
                }
                target.expect(&buf, 0, n, n)?;
                check_eq!(&frames(target, &buf, 0, n)?, &pfns, "frames");
                if huge {
                    let counts = target.inspect_one(&buf, 0)?;
                    check_eq!((counts.refs, counts.mapcount), (1, 1), "counts");
                } else {
                    expect_frames(target, &pfns, MAPPED, "after MADV_HWPOISON")?;
                }
                buf.check(0, n, 1700)?;
                target.bring_back(&buf, 0, n)?;
                return buf.check(0, n, 1700);
            }
            // The failure comes after the migration; the device's page is still good.
            buf.get(page, 0);
            freed_since(target, &before, if huge { n } else { 1 })?;
            let broken = proc::frames(&buf, page, 1)?;
            buf.advise(page, 1, libc::MADV_HWPOISON)?;
            let reader = Child::spawn(|| {
                buf.get(page, 0);
                Ok(())
            })?;
            check_eq!(
                reader.exit()?,
                Exit::Signal(libc::SIGBUS),
                "end of who reads a broken page"
            );
            let result = target.read(&buf, page, 1);
            expect_errno(result, &[libc::EFAULT], "READ of a broken page")?;
            // The other pages of the range migrate and come back.
            let result = target.to_device(&buf, 0, n);
            expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of a broken page")?;
            target.expect(&buf, 0, n, n - 1)?;
            buf.check(0, page, 1700)?;
            buf.check(page + 1, n - page - 1, 1700)?;
            drop(buf);
            expect_frames(target, &pfns, IDLE, "when all has gone")?;
            unpoison(&broken)
        })?;
    }
    Ok(())
}

/// If a huge page cannot be split when one of its pages fails, it stays mapped with the broken
/// page. It does not migrate, because the copy would read the broken page.
fn unsplit(ctx: &Ctx, node: usize) -> Outcome {
    unpoison(&[])?;
    settled(ctx, node, |target| {
        let buf = huge_filled(1, 1720)?;
        let n = buf.pages();
        proc::drain_batches()?;
        let broken = proc::frames(&buf, n / 3, 1)?;
        let pin = target.pin(&buf, 0, 1, 0).or_fail("ZDM_PIN")?;
        // A failure by page frame number sends no signal to processes that do not access the page.
        let _ = fs::write(CORRUPT, broken[0].to_string());
        target.unpin(pin, 0).or_fail("ZDM_UNPIN")?;
        if proc::huge(&buf, 0, n)? != n {
            return Err(Fail::Skip("this kernel has split the pinned page".into()));
        }
        let result = target.to_device(&buf, 0, n);
        expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of a broken page")?;
        target.expect(&buf, n / 3, 1, 0)?;
        check_eq!(proc::frames(&buf, n / 3, 1)?, broken, "the broken frame");
        if target.moves_large() {
            target.expect(&buf, 0, n, 0)?;
        }
        buf.check(0, n / 3, 1720)?;
        buf.check(n / 3 + 1, n - n / 3 - 1, 1720)?;
        drop(buf);
        unpoison(&broken)
    })
}

/// Soft offlining is for system memory only.
fn soft(ctx: &Ctx, node: usize) -> Outcome {
    unpoison(&[])?;
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1710)?;
            let n = buf.pages();
            target.move_all(&buf, 1710)?;
            let pfns = frames(target, &buf, 0, n)?;
            if target.cpu_maps() {
                for page in [0, n / 3, n - 1] {
                    let result = buf.try_advise(page, 1, libc::MADV_SOFT_OFFLINE);
                    expect_errno(result, &[libc::EIO], "MADV_SOFT_OFFLINE")?;
                }
                target.expect(&buf, 0, n, n)?;
                let counts = target.inspect_one(&buf, n / 3)?;
                check_eq!((counts.refs, counts.mapcount), (1, 1), "counts");
                return buf.check(0, n, 1710);
            }
            // PRIVATE pages come back, and then move away from the distrusted page.
            let page = n / 3;
            buf.get(page, 0);
            let broken = proc::frames(&buf, page, 1)?;
            buf.advise(page, 1, libc::MADV_SOFT_OFFLINE)?;
            buf.check(0, n, 1710)?;
            let now = proc::frames(&buf, page, 1)?;
            check!(
                now != broken,
                "frame after MADV_SOFT_OFFLINE: expected another one, found the same"
            );
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            let read = target.read(&buf, 0, n).or_fail("READ")?;
            check_bytes(&read.data, 1710, 0, "READ")?;
            drop(buf);
            expect_frames(target, &pfns, IDLE, "when all has gone")?;
            unpoison(&broken)
        })?;
    }
    Ok(())
}

/// A broken page of a device-dax is unmapped everywhere, with all pages of the same fault, and
/// processes that map it and asked for the signal get SIGBUS. The page then has the counts of an
/// idle page, its neighbours are mapped as before, and the device can be used and bound again.
fn dax_poison<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let idle = s.idle_refs()?;
    let step = s.dax.step();
    // A process that ignores the signal survives; these children must not ignore it.
    sys::on_signal(libc::SIGBUS, false).or_fail("signal")?;
    let buf = s.dax.map(3 * step)?;
    buf.fill(0, 3 * step, 1720);
    s.expect(0, 3, [idle + 1, 1, 0], "mapped")?;
    let (mut ready, say) = sys::pipe().or_fail("pipe")?;
    let bystander = Child::spawn(|| {
        sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
        // Other processes get the signal only when they access the page.
        sys::want_memory_failures().or_fail("prctl")?;
        let own = s.dax.map(3 * step)?;
        own.check(0, 3 * step, 1720)?;
        (&say).write_all(b"r").or_fail("pipe")?;
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    })?;
    drop(say);
    let n = ready.read(&mut [0]).or_fail("pipe")?;
    check_eq!(n, 1, "word of the bystander that it has mapped all");
    let broken = step + step / 2;
    let sufferer = Child::spawn(|| {
        sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
        let own = s.dax.map(3 * step)?;
        own.check(0, 3 * step, 1720)?;
        own.advise(broken, 1, libc::MADV_HWPOISON)?;
        Err(Fail::failed("MADV_HWPOISON: expected SIGBUS, found none"))
    })?;
    let end = Exit::Signal(libc::SIGBUS);
    check_eq!(
        sufferer.exit()?,
        end,
        "end of who says that a page is broken"
    );
    check_eq!(bystander.exit()?, end, "end of who has it mapped");
    s.expect(1, 1, [idle, 0, 0], "broken")?;
    for neighbour in [0, 2] {
        s.expect(neighbour, 1, [idle + 1, 1, 0], "beside a broken one")?;
    }
    // The page is not really broken, and the kernel allows later accesses.
    buf.check(0, 3 * step, 1720)?;
    s.expect(1, 1, [idle + 1, 1, 0], "mapped again")?;
    drop(buf);
    s.expect(0, 3, [idle, 0, 0], "in the end")?;
    s.dax.unbind().or_fail("unbind")?;
    s.dax.bind().or_fail("bind")?;
    s.expect(0, 3, [idle, 0, 0], "bound anew")?;
    s.dax.map(3 * step)?.check(0, 3 * step, 1720)
}

fn dax_soft_offline(_: &Ctx) -> Outcome {
    let s = Setup::new(PTE)?;
    let idle = s.idle_refs()?;
    let buf: Buffer = s.dax.map(4)?;
    buf.fill(0, 4, 1730);
    let child = Waiting::start(|| Ok(()), || buf.check(0, 4, 1730))?;
    let result = buf.try_advise(1, 1, libc::MADV_SOFT_OFFLINE);
    expect_errno(result, &[libc::EIO], "MADV_SOFT_OFFLINE")?;
    child.join()?;
    s.expect(0, 4, [idle + 1, 1, 0], "after MADV_SOFT_OFFLINE")?;
    buf.check(0, 4, 1730)
}
