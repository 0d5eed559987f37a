// SPDX-License-Identifier: GPL-2.0

//! What is beside a held page, and what a pin that fails leaves behind. A large folio of which a page
//! is held can neither move nor be split: the pages around it must go all the same, each to its own
//! place. A long-term pin that fails because the page is held already must leave nothing.

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, check_bytes};
use crate::tests::entries::Strict;
use crate::tests::leak::settled;
use crate::tests::strict::clears_flags;
use crate::tests::target::{COHERENT, Target, huge_filled};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("pin": "around" => around);

/// The memory that long-term pins take pages away from.
pub const LONG: &[Test] = &[test("pin_coherent.long_failed", long_failed)];

/// The ranges that migrate, from the front half of a huge page to small pages behind it.
const RANGES: [(usize, usize); 4] = [
    (0, 2 * HUGE_PAGES),
    (HUGE_PAGES / 2, HUGE_PAGES),
    (HUGE_PAGES - 1, 2),
    (HUGE_PAGES - 200, 350),
];

/// A huge page, mapped page by page or whole, and small pages behind it.
fn mixed(by_pages: bool) -> Outcome<Buffer> {
    let buf = huge_filled(2, 2900)?;
    buf.advise(HUGE_PAGES, HUGE_PAGES, libc::MADV_DONTNEED)?;
    buf.advise(HUGE_PAGES, HUGE_PAGES, libc::MADV_NOHUGEPAGE)?;
    buf.fill(0, 2 * HUGE_PAGES, 2900);
    if by_pages {
        buf.protect(9, 1, libc::PROT_READ)?;
        buf.protect(9, 1, libc::PROT_READ | libc::PROT_WRITE)?;
    }
    Ok(buf)
}

fn around(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        // What core mm counts shows in strict mode.
        let _strict = match clears_flags(ctx) {
            Ok(()) => Some(Strict::on()?),
            Err(_) => None,
        };
        for by_pages in [false, true] {
            for (first, n) in RANGES {
                beside(target, by_pages, first, n).map_err(|e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!(
                        "{n} pages from {first} on, mapped by pages {by_pages}: {e}"
                    )),
                })?;
            }
        }
        Ok(())
    })
}

fn beside(target: &Target, by_pages: bool, first: usize, n: usize) -> Outcome {
    let buf = mixed(by_pages)?;
    proc::drain_batches()?;
    let held = HUGE_PAGES - 1;
    let frame = proc::frames(&buf, held, 1)?;
    let pin = target.pin(&buf, held, 1, 0).or_fail("ZDM_PIN")?;
    let small = first + n - HUGE_PAGES;
    for _ in 0..2 {
        // ENOENT says that a page stayed.
        let _ = target.to_device(&buf, first, n);
        target.expect(&buf, HUGE_PAGES, small, small)?;
        target.expect(&buf, held, 1, 0)?;
        check_eq!(
            proc::frames(&buf, held, 1)?,
            frame,
            "the frame that is held"
        );
        let read = target.read(&buf, 0, 2 * HUGE_PAGES).or_fail("READ")?;
        check_bytes(&read.data, 2900, 0, "READ around what is held")?;
        let back = target.to_system(&buf, first, n);
        back.or_fail("MIGRATE_TO_SYS")?;
        target.expect(&buf, 0, 2 * HUGE_PAGES, 0)?;
    }
    target.unpin(pin, 0).or_fail("ZDM_UNPIN")?;
    buf.check(0, 2 * HUGE_PAGES, 2900)?;
    buf.fill(0, 2 * HUGE_PAGES, 2901);
    buf.check(0, 2 * HUGE_PAGES, 2901)
}

/// The pages of a folio that is held already are to be held for long.
fn long_failed(ctx: &Ctx) -> Outcome {
    const TIMES: usize = 48;
    /// Other tasks use memory, too.
    const SLACK: u64 = 12 * HUGE_PAGES as u64;
    settled(ctx, COHERENT, |target| {
        let buf = huge_filled(1, 2910)?;
        let n = buf.pages();
        target.move_all(&buf, 2910)?;
        let held = target.pin(&buf, 0, 1, 0).or_fail("ZDM_PIN")?;
        let before = proc::free_pages()?;
        let mut failed = 0;
        for page in 0..TIMES {
            match target.pin(&buf, page % n, 1, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE) {
                Ok(id) => target.unpin(id, 0).or_fail("ZDM_UNPIN")?,
                Err(_) => failed += 1,
            }
        }
        check!(
            failed > 0,
            "long-term pins of a held page: expected some to fail"
        );
        let after = proc::free_pages()?;
        check!(
            after + SLACK >= before,
            "free pages after {failed} pins that failed: expected {before}, found {after}"
        );
        target.unpin(held, 0).or_fail("ZDM_UNPIN")?;
        buf.check(0, n, 2910)?;
        target.bring_back(&buf, 0, n)?;
        buf.check(0, n, 2910)
    })
}
