// SPDX-License-Identifier: GPL-2.0

//! Benchmarks of the oracle's cost. They run only by name and print ratios of times that are
//! measured side by side. A wrong result fails them, a slow one does not.

use std::time::{Duration, Instant};

use super::target::{PRIVATE, Target, huge_filled};
use super::{Ctx, Test, absent, test, with};
use crate::check::{OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, Device, HUGE_PAGES};
use crate::harness::note;
use crate::uapi::*;

pub const TESTS: &[Test] = &[
    with("devmem_chunk_mb=1024", test("bench.audit", audit)),
    with("devmem_chunk_mb=1024", test("bench.audit_used", audit_used)),
    absent(test("bench.ledger", ledger)),
];

/// The pages of a migrated buffer: 8 MiB.
const N: usize = 4 * HUGE_PAGES;
const ROUNDS: usize = 20;

pub fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Returns the result of `work` and its duration.
pub fn timed<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<(T, Duration)> {
    let start = Instant::now();
    let result = work()?;
    Ok((result, start.elapsed()))
}

/// The best time of a scan and of a plain pass, measured in turn.
fn scan_and_pass(device: &Device, what: &str) -> Outcome {
    let (mut scan, mut pass) = (Duration::MAX, Duration::MAX);
    let mut pages = 0;
    for _ in 0..ROUNDS {
        let ((audit, _), time) = timed(|| device.try_audit(ZDM_AUDIT_PASS).or_fail("a pass"))?;
        pass = pass.min(time);
        pages = audit.pages;
        let ((audit, _), time) = timed(|| device.audit())?;
        check_eq!(
            (audit.found, audit.pages),
            (0, pages),
            "violations and pages"
        );
        scan = scan.min(time);
    }
    note(&format!(
        "bench: audit of {pages} pages, {what}: {:.0} us, plain pass {:.0} us, ratio {:.2}",
        micros(scan),
        micros(pass),
        scan.as_secs_f64() / pass.as_secs_f64()
    ));
    Ok(())
}

/// A pagemap of 1 GiB that is free.
fn audit(_: &Ctx) -> Outcome {
    scan_and_pass(&Device::open(0)?, "all free")
}

/// The same pagemap with small and huge folios in use.
fn audit_used(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let (small, huge) = (filled(N, false, 130)?, filled(N, true, 130)?);
    target.move_all(&small, 130)?;
    target.move_all(&huge, 130)?;
    scan_and_pass(&target, "4096 in use")
}

/// Pages with the pattern of `seed`, huge or small.
fn filled(n: usize, huge: bool, seed: u64) -> Outcome<Buffer> {
    if huge {
        return huge_filled(n / HUGE_PAGES, seed);
    }
    let buf = Buffer::anon(n)?;
    buf.advise(0, n, libc::MADV_NOHUGEPAGE)?;
    buf.fill(0, n, seed);
    Ok(buf)
}

/// The best times of a migration to the device and of one back.
fn trip(buf: &Buffer) -> Outcome<[Duration; 2]> {
    let device = Device::open(0)?;
    let mut best = [Duration::MAX; 2];
    for _ in 0..ROUNDS {
        let (_, there) = timed(|| device.to_device(buf, 0, N).or_fail("MIGRATE_TO_DEV"))?;
        let (_, back) = timed(|| device.to_system(buf, 0, N).or_fail("MIGRATE_TO_SYS"))?;
        best = [best[0].min(there), best[1].min(back)];
    }
    buf.check(0, N, 130)?;
    Ok(best)
}

/// Migration with a ledger, without one, without any checks, and in strict mode.
fn ledger(ctx: &Ctx) -> Outcome {
    const KINDS: [&str; 4] = ["ledger=0", "ledger=1", "audit=off ledger=0", "strict=1"];
    let bufs = [filled(N, false, 130)?, filled(N, true, 130)?];
    let mut best = [[[Duration::MAX; 2]; 2]; KINDS.len()];
    for _ in 0..3 {
        for (parameters, best) in KINDS.iter().zip(&mut best) {
            ctx.module.load(parameters)?;
            for (buf, best) in bufs.iter().zip(best) {
                let now = trip(buf)?;
                *best = [best[0].min(now[0]), best[1].min(now[1])];
            }
            ctx.module.unload()?;
        }
    }
    let [without, with, unchecked, strict] = best;
    for (size, folio) in ["4 KiB", "2 MiB"].iter().enumerate() {
        for (way, direction) in ["to the device", "to the system"].iter().enumerate() {
            let seconds = |best: [[Duration; 2]; 2]| best[size][way].as_secs_f64();
            note(&format!(
                "bench: 8 MiB {direction} in {folio}: {:.0} us without a ledger, ratio with it \
                 {:.3}, without any checks {:.3}, in strict mode {:.2}",
                micros(without[size][way]),
                seconds(with) / seconds(without),
                seconds(unchecked) / seconds(without),
                seconds(strict) / seconds(without),
            ));
        }
    }
    Ok(())
}
