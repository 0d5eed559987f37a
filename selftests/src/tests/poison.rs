// SPDX-License-Identifier: GPL-2.0

//! memory_failure() and soft offlining of device pages, by madvise. Pages that a driver migrates
//! are refused, because the driver has no callback, and the attempt leaves no trace.
//! `dax/poison.rs` tests pages of a device-dax.

use std::fs;

use super::chain::{SIZES, filled};
use super::counts::{IDLE, MAPPED, expect_frames, frames};
use super::leak::settled;
use super::target::huge_filled;
use super::{Ctx, Test, freed_since};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::check_bytes;
use crate::harness::Child;
use crate::sys::Exit;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("poison":
    "hard" => hard,
    "soft" => soft,
    "unsplit" => unsplit,
);

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
