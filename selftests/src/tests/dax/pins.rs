// SPDX-License-Identifier: GPL-2.0

//! Pins of pages of a device-dax.

use super::{FOLIOS, Setup, touch};
use crate::check::{OrFail, Outcome};
use crate::dax::{PMD, PTE};
use crate::tests::counts::{IDLE, MAPPED, held, pinned, pinned_large};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;

pub const TESTS: &[Test] = &[
    test("dax.pin", pin::<PTE>),
    test("dax.pin_pmd", pin::<PMD>),
    test("dax.pin_unmapped", pin_unmapped::<PTE>),
    test("dax.pin_unmapped_pmd", pin_unmapped::<PMD>),
];

/// Every flavour of pin, including long-term ones, slow and fast.
fn pin<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let step = s.dax.step();
    let buf = s.dax.map(FOLIOS * step)?;
    buf.fill(0, 1, 707);
    for flags in [
        ZDM_PIN_GET,
        0,
        ZDM_PIN_WRITE,
        ZDM_PIN_LONGTERM,
        ZDM_PIN_LONGTERM | ZDM_PIN_WRITE,
    ] {
        for flags in [flags, flags | ZDM_PIN_FAST] {
            touch(&buf, &s.dax, FOLIOS)?;
            let when = format!("held with {flags:#x}");
            let id = s
                .device
                .pin(&buf, step, 1, flags)
                .or_fail(&format!("ZDM_PIN with {flags:#x}"))?;
            let counts = match (flags & ZDM_PIN_GET, step) {
                (0, 1) => pinned(MAPPED, 1),
                (0, _) => pinned_large(MAPPED, 1),
                _ => held(MAPPED, 1),
            };
            s.expect(1, 1, counts, &when)?;
            s.expect(0, 1, MAPPED, "beside it")?;
            s.expect(2, FOLIOS - 2, MAPPED, "beside it")?;
            s.device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            s.expect(0, FOLIOS, MAPPED, "let go")?;

            // Pin the whole mapping, and a range that is not mapped yet.
            let fresh = s.dax.map(FOLIOS * step)?;
            let id = s
                .device
                .pin(&fresh, 0, FOLIOS * step, flags)
                .or_fail("ZDM_PIN of all")?;
            let all = step as i32;
            let counts = match (flags & ZDM_PIN_GET, step) {
                (0, 1) => pinned([2, 2, 0], 1),
                (0, _) => pinned_large([2, 2, 0], all),
                _ => held([2, 2, 0], all),
            };
            s.expect(0, FOLIOS, counts, "held and mapped twice")?;
            s.device.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
            drop(fresh);
            s.expect(0, FOLIOS, MAPPED, "let go")?;
        }
    }
    buf.check(0, 1, 707)?;
    drop(buf);
    s.expect(0, FOLIOS, IDLE, "after all")
}

/// A pin outlives the mapping; the count is then the number of pins.
fn pin_unmapped<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let step = s.dax.step();
    for flags in [ZDM_PIN_GET, ZDM_PIN_WRITE, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE] {
        let buf = s.dax.map(FOLIOS * step)?;
        buf.fill(0, 1, 708);
        let id = s.device.pin(&buf, 0, 1, flags).or_fail("ZDM_PIN")?;
        drop(buf);
        let counts = match (flags & ZDM_PIN_GET, step) {
            (0, 1) => pinned(IDLE, 1),
            (0, _) => pinned_large(IDLE, 1),
            _ => held(IDLE, 1),
        };
        s.expect(0, 1, counts, "unmapped, but held")?;
        s.expect(1, FOLIOS - 1, IDLE, "unmapped")?;
        // A held page can be mapped again.
        let again = s.dax.map(step)?;
        again.check(0, 1, 708)?;
        let [refs, mapcount, pins] = counts;
        s.expect(0, 1, [refs + 1, mapcount + 1, pins], "mapped again")?;
        s.device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        s.expect(0, 1, MAPPED, "let go")?;
        drop(again);
        s.expect(0, FOLIOS, IDLE, "after all")?;
    }
    Ok(())
}
