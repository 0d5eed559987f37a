// SPDX-License-Identifier: GPL-2.0

//! Pages that another CPU still has in a batch, with a reference on each: a migration asks all CPUs
//! to put them on their lists. Most tests do that themselves before they migrate pages, so that a
//! migration that does not would pass them.

use super::leak::settled;
use super::{Ctx, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::Buffer;
use crate::harness::note;
use crate::{check, proc, sys, threads};

pub const TESTS: &[Test] = of_each_kind!("batches": "other_cpu" => other_cpu);

/// Fewer pages than a batch holds.
const N: usize = 8;
/// How often each kind of batch is tried. A page may be in use for another reason at any moment.
const ROUNDS: usize = 8;

/// What the other CPU does, after which it has the pages in a batch.
type Use = fn(&Buffer) -> Outcome;

const USES: [(&str, Use); 4] = [
    ("a first access", |_| Ok(())),
    ("MADV_COLD", |buf| {
        proc::drain_batches()?;
        buf.advise(0, N, libc::MADV_COLD)
    }),
    ("mlock", |buf| {
        proc::drain_batches()?;
        buf.lock(0, N, true)
    }),
    ("munlock", |buf| {
        buf.lock(0, N, true)?;
        proc::drain_batches()?;
        buf.lock(0, N, false)
    }),
];

fn other_cpu(ctx: &Ctx, node: usize) -> Outcome {
    let cpus = std::thread::available_parallelism().or_fail("the number of CPUs")?;
    if cpus.get() < 2 {
        return Err(Fail::Skip("there is one CPU".into()));
    }
    settled(ctx, node, |target| {
        sys::run_on(0).or_fail("sched_setaffinity")?;
        for (name, run) in USES {
            let mut all = 0;
            for round in 0..ROUNDS as u64 {
                let buf = std::thread::scope(|scope| {
                    threads::join(scope.spawn(|| {
                        sys::run_on(1).or_fail("sched_setaffinity")?;
                        let buf = Buffer::filled(N, 1900 + round)?;
                        run(&buf)?;
                        Ok(buf)
                    }))
                })?;
                // ENOENT says that a page stayed.
                let _ = target.to_device(&buf, 0, N);
                all += usize::from(target.on_device(&buf, 0, N)? == N);
                buf.lock(0, N, false)?;
                buf.check(0, N, 1900 + round)?;
            }
            note(&format!(
                "{name}: all pages went in {all} of {ROUNDS} rounds"
            ));
            check!(
                all > ROUNDS / 2,
                "{name} by another CPU: expected all pages to go in most rounds, found {all} of {ROUNDS}"
            );
        }
        Ok(())
    })
}
