// SPDX-License-Identifier: GPL-2.0

//! What the kernel does to memory of its own changes nothing about the pages of a device-dax.

use super::Setup;
use crate::check::{Fail, OrFail, Outcome};
use crate::dax::{PMD, PTE};
use crate::tests::fsdax::upkeep::OPERATIONS;
use crate::tests::{Ctx, Test, test};
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("dax.upkeep", upkeep::<PTE>),
    test("dax.upkeep_pmd", upkeep::<PMD>),
];

/// The folios that are mapped.
const FOLIOS: usize = 3;

fn upkeep<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let idle = s.idle_refs()?;
    let step = s.dax.step();
    let n = FOLIOS * step;
    for (name, run) in OPERATIONS {
        let case = || -> Outcome {
            let buf = s.dax.map(n)?;
            buf.fill(0, n, 1740);
            // Not all that the kernel is asked for is possible, in particular for a part of a folio.
            for (first, count) in [(0, n), (step, step), (n / 2, 1)] {
                let _ = run(&buf, first, count);
                s.expect(0, FOLIOS, [idle + 1, 1, 0], "afterwards")?;
                let pages = s.device.inspect(&buf, 0, n).or_fail("ZDM_INSPECT")?;
                let moved = (0..n).find(|i| pages[*i].pfn != s.dax.frame() + *i as u64);
                check_eq!(moved, None, "first page with another frame");
                check_eq!(proc::smaps(&buf, 0, n, "Rss")?, n as u64, "Rss");
                buf.check(0, n, 1740)?;
            }
            drop(buf);
            s.expect(0, FOLIOS, [idle, 0, 0], "unmapped")
        };
        case().map_err(|e| match e {
            Fail::Skip(_) => e,
            e => Fail::failed(format!("{name}: {e}")),
        })?;
    }
    let buf = s.dax.map(n)?;
    check!(
        buf.check(0, n, 1740).is_ok(),
        "data in the end: expected the pattern"
    );
    Ok(())
}
