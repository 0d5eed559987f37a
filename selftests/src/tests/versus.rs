// SPDX-License-Identifier: GPL-2.0

//! Benchmarks: what each operation costs by the kernel tree's own C driver and by this one, as
//! ratios. The two are loaded by turns in one guest, with the same memory, and asked by the same
//! ioctls. They are run by name only and fail for wrong results, never for slow ones.

use std::time::{Duration, Instant};

use super::bench::{filled, micros, timed};
use super::target::{COHERENT, PRIVATE};
use super::{Ctx, Test, absent, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::note;
use crate::uapi::*;

pub const TESTS: &[Test] = &[
    absent(test("versus.private", |ctx| versus(ctx, PRIVATE))),
    absent(test("versus.coherent", |ctx| versus(ctx, COHERENT))),
];

/// Pages that an operation is about: 4 MiB.
const N: usize = 2 * HUGE_PAGES;
const SEED: u64 = 3000;
/// Times that each driver is loaded, and that an operation is measured then.
const LOADS: usize = 2;
const ROUNDS: usize = 3;
/// Opened and closed together, as one is too short to be measured.
const OPENS: usize = 16;

/// What an operation works on.
struct Bed {
    node: usize,
    /// Whether memory is of huge pages.
    huge: bool,
    /// What is written, and room for what is read.
    data: Vec<u8>,
}

/// An operation; how long what it is about has taken.
type Run = fn(&mut Bed) -> Outcome<Duration>;

/// An operation: its name, whether it is worth while with huge pages, too, and whether only
/// with memory that the CPU cannot reach.
struct Operation {
    name: &'static str,
    sizes: bool,
    private: bool,
    run: Run,
}

const fn operation(name: &'static str, run: Run) -> Operation {
    Operation {
        name,
        sizes: false,
        private: false,
        run,
    }
}

/// One that depends on the size of pages.
const fn sized(name: &'static str, run: Run) -> Operation {
    Operation {
        sizes: true,
        ..operation(name, run)
    }
}

const OPERATIONS: &[Operation] = &[
    operation("open and close, 16 times", |bed| {
        let opens = || (0..OPENS).try_for_each(|_| bed.device().map(drop));
        Ok(timed(opens)?.1)
    }),
    sized("READ, first", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.take(&device, HMM_READ, &buf)
    }),
    operation("READ, again", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.take(&device, HMM_READ, &buf)?;
        bed.take(&device, HMM_READ, &buf)
    }),
    sized("WRITE, first", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.give(&device, &buf)
    }),
    operation("WRITE, again", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.give(&device, &buf)?;
        bed.give(&device, &buf)
    }),
    operation("munmap of what the device has read", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.take(&device, HMM_READ, &buf)?;
        Ok(dropped(buf))
    }),
    sized("SNAPSHOT", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.command(&device, HMM_SNAPSHOT, &buf)
    }),
    operation("EXCLUSIVE", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.take(&device, HMM_EXCLUSIVE, &buf)
    }),
    operation("CPU access to what is exclusive", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        bed.take(&device, HMM_EXCLUSIVE, &buf)?;
        Ok(touched(&buf))
    }),
    sized("MIGRATE_TO_DEV", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        let time = bed.take(&device, HMM_MIGRATE_TO_DEV, &buf)?;
        buf.check(0, N, SEED)?;
        Ok(time)
    }),
    sized("MIGRATE_TO_SYS", |bed| {
        let (device, buf) = bed.migrated()?;
        let time = bed.command(&device, HMM_MIGRATE_TO_SYS, &buf)?;
        buf.check(0, N, SEED)?;
        Ok(time)
    }),
    Operation {
        private: true,
        ..sized("CPU access to what is on the device", |bed| {
            let (_device, buf) = bed.migrated()?;
            let time = touched(&buf);
            buf.check(0, N, SEED)?;
            Ok(time)
        })
    },
    // By who has moved it there: with any other file of a PRIVATE device the C driver oopses.
    sized("READ of what is on the device", |bed| {
        let (device, buf) = bed.migrated()?;
        bed.take(&device, HMM_READ, &buf)
    }),
    sized("SNAPSHOT of what is on the device", |bed| {
        let (device, buf) = bed.migrated()?;
        bed.command(&device, HMM_SNAPSHOT, &buf)
    }),
    sized("munmap of what is on the device", |bed| {
        let (_device, buf) = bed.migrated()?;
        Ok(dropped(buf))
    }),
    sized("close with memory on the device", |bed| {
        let (device, buf) = bed.migrated()?;
        let time = dropped(device);
        buf.check(0, N, SEED)?;
        Ok(time)
    }),
    operation("RELEASE", |bed| {
        let (device, buf) = bed.migrated()?;
        let time = bed.command(&device, HMM_RELEASE, &buf)?;
        buf.check(0, N, SEED)?;
        Ok(time)
    }),
];

/// How long it takes to drop something.
fn dropped<T>(it: T) -> Duration {
    let start = Instant::now();
    drop(it);
    start.elapsed()
}

/// How long it takes the CPU to look at each page.
fn touched(buf: &Buffer) -> Duration {
    let start = Instant::now();
    for page in 0..buf.pages() {
        buf.get(page, 0);
    }
    start.elapsed()
}

impl Bed {
    fn device(&self) -> Outcome<Device> {
        Device::open(self.node)
    }

    fn filled(&self) -> Outcome<Buffer> {
        filled(N, self.huge, SEED)
    }

    /// Memory of which all is on the device.
    fn migrated(&mut self) -> Outcome<(Device, Buffer)> {
        let (device, buf) = (self.device()?, self.filled()?);
        self.take(&device, HMM_MIGRATE_TO_DEV, &buf)?;
        Ok((device, buf))
    }

    /// One of upstream's commands on all of a buffer.
    fn command(&mut self, device: &Device, request: u64, buf: &Buffer) -> Outcome<Duration> {
        let what = format!("ioctl {request:#x}");
        let data = Data::Into(&mut self.data);
        let run = || {
            device
                .command(request, buf.at(0), N as u64, data)
                .or_fail(&what)
        };
        Ok(timed(run)?.1)
    }

    /// One that returns the data of all pages.
    fn take(&mut self, device: &Device, request: u64, buf: &Buffer) -> Outcome<Duration> {
        self.data.fill(0xa5);
        let time = self.command(device, request, buf)?;
        check_bytes(&self.data, SEED, 0, &format!("data of ioctl {request:#x}"))?;
        Ok(time)
    }

    /// WRITE of other data.
    fn give(&mut self, device: &Device, buf: &Buffer) -> Outcome<Duration> {
        let data = pattern_bytes(SEED + 1, 0, N);
        let data = Data::From(&data);
        let run = || {
            device
                .command(HMM_WRITE, buf.at(0), N as u64, data)
                .or_fail("WRITE")
        };
        let (_, time) = timed(run)?;
        buf.check(0, N, SEED + 1)?;
        Ok(time)
    }
}

/// An operation, and whether it is on huge pages.
type Case = (&'static Operation, bool);

/// What is measured: an operation, with huge pages or without. Of COHERENT memory the C driver has
/// no huge pages to give.
fn cases(node: usize) -> Vec<Case> {
    let private = node == PRIVATE;
    let of_size = |huge: bool| {
        let fits = move |o: &&Operation| (private || !o.private) && (!huge || (private && o.sizes));
        OPERATIONS.iter().filter(fits).map(move |o| (o, huge))
    };
    [false, true].into_iter().flat_map(of_size).collect()
}

/// Measures all with the driver that is loaded: the best time of each.
fn measure(node: usize, cases: &[Case], best: &mut [Duration]) -> Outcome {
    let mut bed = Bed {
        node,
        huge: false,
        data: vec![0; N * PAGE],
    };
    // Registering memory is no part of what is measured.
    bed.migrated()?;
    for ((operation, huge), best) in cases.iter().zip(best) {
        bed.huge = *huge;
        for _ in 0..ROUNDS {
            let time = (operation.run)(&mut bed)?;
            *best = time.min(*best);
        }
    }
    Ok(())
}

fn versus(ctx: &Ctx, node: usize) -> Outcome {
    let Some(c_driver) = ctx.module.c_driver() else {
        return Err(Fail::Skip("no test_hmm.ko beside the module".into()));
    };
    if !ctx.module.nodes().contains(&node) {
        return Err(Fail::Skip("no memory for COHERENT devices".into()));
    }
    let cases = cases(node);
    let mut theirs = vec![Duration::MAX; cases.len()];
    let mut ours = theirs.clone();
    for load in 0..LOADS {
        let mut drivers = [(&c_driver, &mut theirs), (&ctx.module, &mut ours)];
        // Neither is always the one that finds the memory as the other has left it.
        if load % 2 == 1 {
            drivers.reverse();
        }
        for (module, best) in drivers {
            module.load("")?;
            measure(node, &cases, best)?;
            module.unload()?;
        }
    }
    let kind = if node == PRIVATE {
        "PRIVATE"
    } else {
        "COHERENT"
    };
    let mut faster = 0;
    for (((operation, huge), theirs), ours) in cases.iter().zip(&theirs).zip(&ours) {
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        faster += usize::from(ratio < 1.0);
        let size = match (operation.sizes, huge) {
            (false, _) => "",
            (true, false) => ", 4 KiB",
            (true, true) => ", 2 MiB",
        };
        note(&format!(
            "bench: {kind} {}{size}: C driver {:.0} us, ratio {ratio:.2}",
            operation.name,
            micros(*theirs),
        ));
    }
    note(&format!(
        "bench: {kind}: {faster} of {} operations on 4 MiB take less time than with the C driver",
        cases.len()
    ));
    Ok(())
}
