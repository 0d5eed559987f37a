// SPDX-License-Identifier: GPL-2.0

//! Benchmarks: the cost of each operation with the kernel tree's own C driver and with this one.
//!
//! The two drivers are loaded in turn in one guest, with the same memory, and get the same ioctls,
//! in the order C, Rust, Rust, C. A row has the median of all rounds, the distance of the quartiles
//! as its spread, and the time of a plain copy of as many bytes at the same moment. The ratio is
//! the C driver's time divided by ours: above 1 this driver is faster. Each row is printed once as
//! text and once as JSON. Benchmarks run only by name. A wrong result fails them, a slow one does
//! not.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::bench::{micros, timed};
use super::target::{COHERENT, PRIVATE, huge_filled};
use super::{Ctx, Test, absent, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::note;
use crate::threads;
use crate::uapi::*;

pub const TESTS: &[Test] = &[
    absent(test("versus.private", |ctx| versus(ctx, PRIVATE, 4 << 20))),
    absent(test("versus.coherent", |ctx| {
        versus(ctx, COHERENT, 4 << 20)
    })),
    absent(test("versus.private_64k", |ctx| {
        versus(ctx, PRIVATE, 64 << 10)
    })),
    absent(test("versus.private_1m", |ctx| {
        versus(ctx, PRIVATE, 1 << 20)
    })),
    // This test exceeds the time limit unless the limit is raised: --timeout-factor 6.
    absent(test("versus.private_32m", |ctx| {
        versus(ctx, PRIVATE, 32 << 20)
    })),
];

const SEED: u64 = 3000;
/// How often each driver is loaded, and how often an operation is measured per load.
const LOADS: usize = 2;
const ROUNDS: usize = 3;
/// The pages of one call in the benchmarks of small pieces: 64 KiB.
const PIECE: usize = 16;

/// Whether a command met a page that is not on the device.
fn is_absent(err: &std::io::Error) -> bool {
    err.raw_os_error() == Some(libc::ENOENT)
}

/// The number of files that are opened and closed together, because a single one is too fast to
/// measure.
const OPENS: usize = 16;

/// The input of an operation.
struct Bed {
    node: usize,
    /// The number of pages that an operation works on.
    pages: usize,
    /// Whether the memory consists of huge pages.
    huge: bool,
    /// The data to write, and room for the data read.
    data: Vec<u8>,
}

/// An operation. Returns the time of the measured part.
type Run = fn(&mut Bed) -> Outcome<Duration>;

/// The description of an operation: its name, whether it is also measured with huge pages, and
/// whether it applies only to memory that the CPU cannot map.
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

/// An operation that depends on the size of pages.
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
        buf.check(0, bed.pages, SEED)?;
        Ok(time)
    }),
    sized("MIGRATE_TO_SYS", |bed| {
        let (device, buf) = bed.migrated()?;
        let time = bed.command(&device, HMM_MIGRATE_TO_SYS, &buf)?;
        buf.check(0, bed.pages, SEED)?;
        Ok(time)
    }),
    Operation {
        private: true,
        ..sized("CPU access to what is on the device", |bed| {
            let (_device, buf) = bed.migrated()?;
            let time = touched(&buf);
            buf.check(0, bed.pages, SEED)?;
            Ok(time)
        })
    },
    Operation {
        private: true,
        ..operation("CPU access at random to what is on the device", |bed| {
            let (_device, buf) = bed.migrated()?;
            let time = touched_at_random(&buf);
            buf.check(0, bed.pages, SEED)?;
            Ok(time)
        })
    },
    // The C driver has no fault-around: with it each page takes a fault.
    Operation {
        private: true,
        ..operation("CPU access in order, fault-around on", |bed| {
            let (device, buf) = bed.migrated()?;
            let _ = device.fault_around(ZDM_FAULT_AROUND_MAX);
            let time = touched(&buf);
            buf.check(0, bed.pages, SEED)?;
            Ok(time)
        })
    },
    Operation {
        private: true,
        ..operation("CPU access at random, fault-around on", |bed| {
            let (device, buf) = bed.migrated()?;
            let _ = device.fault_around(ZDM_FAULT_AROUND_MAX);
            let time = touched_at_random(&buf);
            buf.check(0, bed.pages, SEED)?;
            Ok(time)
        })
    },
    sized("MIGRATE_TO_DEV in pieces of 64 KiB", |bed| {
        let (device, buf) = (bed.device()?, bed.filled()?);
        let time = bed.pieces(&device, HMM_MIGRATE_TO_DEV, &buf)?;
        buf.check(0, bed.pages, SEED)?;
        Ok(time)
    }),
    operation("MIGRATE_TO_SYS in pieces of 64 KiB", |bed| {
        let (device, buf) = bed.migrated()?;
        let time = bed.pieces(&device, HMM_MIGRATE_TO_SYS, &buf)?;
        buf.check(0, bed.pages, SEED)?;
        Ok(time)
    }),
    operation("there and back, one thread", |bed| {
        let device = bed.device()?;
        bed.there_and_back(&[&device])
    }),
    operation("there and back, two threads on one file", |bed| {
        let device = bed.device()?;
        bed.there_and_back(&[&device, &device])
    }),
    operation("there and back, two threads on two files", |bed| {
        let (one, other) = (bed.device()?, bed.device()?);
        bed.there_and_back(&[&one, &other])
    }),
    operation("there and back, two threads on two devices", |bed| {
        // The nodes of one kind of memory are two in a row.
        let (one, other) = (bed.device()?, Device::open(bed.node + 1)?);
        bed.there_and_back(&[&one, &other])
    }),
    operation("there and back, four threads on one file", |bed| {
        let device = bed.device()?;
        bed.there_and_back(&[&device; 4])
    }),
    // The file that moved the memory reads it: with another file of a PRIVATE device the C driver
    // oopses.
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
        buf.check(0, bed.pages, SEED)?;
        Ok(time)
    }),
    operation("RELEASE", |bed| {
        let (device, buf) = bed.migrated()?;
        let time = bed.command(&device, HMM_RELEASE, &buf)?;
        buf.check(0, bed.pages, SEED)?;
        Ok(time)
    }),
];

/// The time that it takes to drop a value.
fn dropped<T>(it: T) -> Duration {
    let start = Instant::now();
    drop(it);
    start.elapsed()
}

/// The time that it takes the CPU to read each page.
fn touched(buf: &Buffer) -> Duration {
    let start = Instant::now();
    for page in 0..buf.pages() {
        buf.get(page, 0);
    }
    start.elapsed()
}

/// The time that it takes the CPU to read each page in random order.
fn touched_at_random(buf: &Buffer) -> Duration {
    let pages = buf.pages();
    let start = Instant::now();
    for n in 0..pages {
        // This visits each page once: the factor is odd, and the number of pages is a power of two.
        buf.get((n * 0x9e37 + 11) % pages, 0);
    }
    start.elapsed()
}

impl Bed {
    fn device(&self) -> Outcome<Device> {
        Device::open(self.node)
    }

    fn filled(&self) -> Outcome<Buffer> {
        filled(self.pages, self.huge)
    }

    /// Executes a command for each piece of a buffer, and ignores the returned data.
    fn pieces(&mut self, device: &Device, request: u64, buf: &Buffer) -> Outcome<Duration> {
        let run = || {
            (0..buf.pages()).step_by(PIECE).try_for_each(|first| {
                let n = PIECE.min(buf.pages() - first);
                device
                    .command(request, buf.at(first), n as u64, Data::Into(&mut self.data))
                    .map(drop)
                    .or_fail("a piece of 64 KiB")
            })
        };
        Ok(timed(run)?.1)
    }

    /// One thread for each of `devices` moves its part of the memory to the device and back.
    fn there_and_back(&self, devices: &[&Device]) -> Outcome<Duration> {
        let buf = self.filled()?;
        let part = buf.pages() / devices.len();
        let begin = Barrier::new(devices.len() + 1);
        let worker = |n: usize, device: &Device| {
            let mut data = vec![0; part * PAGE];
            let (at, len) = (buf.at(n * part), part as u64);
            begin.wait();
            for request in [HMM_MIGRATE_TO_DEV, HMM_MIGRATE_TO_SYS] {
                let result = device.command(request, at, len, Data::Into(&mut data));
                // A page that another processor has at hand stays, which either driver reports when it
                // reads all pages back. The others have moved.
                if !result.as_ref().is_err_and(is_absent) {
                    result.or_fail("a migration of one of several threads")?;
                }
            }
            Ok(())
        };
        let time = std::thread::scope(|scope| {
            let threads: Vec<_> = devices
                .iter()
                .enumerate()
                .map(|(n, device)| scope.spawn(move || worker(n, device)))
                .collect();
            begin.wait();
            let start = Instant::now();
            for thread in threads {
                threads::join(thread)?;
            }
            Ok(start.elapsed())
        })?;
        buf.check(0, buf.pages(), SEED)?;
        Ok(time)
    }

    /// Makes memory that is entirely on the device.
    fn migrated(&mut self) -> Outcome<(Device, Buffer)> {
        let (device, buf) = (self.device()?, self.filled()?);
        self.take(&device, HMM_MIGRATE_TO_DEV, &buf)?;
        Ok((device, buf))
    }

    /// Executes one of upstream's commands on a whole buffer.
    fn command(&mut self, device: &Device, request: u64, buf: &Buffer) -> Outcome<Duration> {
        let what = format!("ioctl {request:#x}");
        let data = Data::Into(&mut self.data);
        let run = || {
            device
                .command(request, buf.at(0), buf.pages() as u64, data)
                .or_fail(&what)
        };
        Ok(timed(run)?.1)
    }

    /// Executes a command that returns the data of all pages.
    fn take(&mut self, device: &Device, request: u64, buf: &Buffer) -> Outcome<Duration> {
        self.data.fill(0xa5);
        let time = self.command(device, request, buf)?;
        check_bytes(&self.data, SEED, 0, &format!("data of ioctl {request:#x}"))?;
        Ok(time)
    }

    /// Writes other data with WRITE.
    fn give(&mut self, device: &Device, buf: &Buffer) -> Outcome<Duration> {
        let data = pattern_bytes(SEED + 1, 0, buf.pages());
        let data = Data::From(&data);
        let run = || {
            device
                .command(HMM_WRITE, buf.at(0), buf.pages() as u64, data)
                .or_fail("WRITE")
        };
        let (_, time) = timed(run)?;
        buf.check(0, buf.pages(), SEED + 1)?;
        Ok(time)
    }
}

/// An operation, and whether it uses huge pages.
type Case = (&'static Operation, bool);

/// The cases to measure: operations with small and with huge pages. The C driver has no huge pages
/// of COHERENT memory.
fn cases(node: usize, pages: usize) -> Vec<Case> {
    let private = node == PRIVATE;
    let of_size = |huge: bool| {
        let large = private && pages >= HUGE_PAGES;
        let fits = move |o: &&Operation| (private || !o.private) && (!huge || (large && o.sizes));
        OPERATIONS.iter().filter(fits).map(move |o| (o, huge))
    };
    [false, true].into_iter().flat_map(of_size).collect()
}

/// The times of one operation, each with the time of a copy of as many bytes, which shows how busy
/// the machine was.
#[derive(Clone, Default)]
struct Samples {
    times: Vec<Duration>,
    copies: Vec<Duration>,
}

impl Samples {
    fn add(&mut self, time: Duration, copy: Duration) {
        self.times.push(time);
        self.copies.push(copy);
    }

    fn median(&self) -> (f64, f64) {
        median_and_spread(self.times.iter().map(|t| micros(*t)).collect())
    }

    /// The shortest time in microseconds, which other work on the machine disturbed least.
    fn best(&self) -> f64 {
        self.times.iter().min().map_or(f64::NAN, |t| micros(*t))
    }
}

/// The median, and the distance of the quartiles as a fraction of it.
fn median_and_spread(mut sorted: Vec<f64>) -> (f64, f64) {
    sorted.sort_by(f64::total_cmp);
    let at = |part: usize| {
        let last = sorted.len().saturating_sub(1);
        sorted.get(last * part / 4).copied().unwrap_or(f64::NAN)
    };
    (at(2), (at(3) - at(1)) / at(2))
}

/// Memory with the pattern of [`SEED`], huge or small pages.
fn filled(pages: usize, huge: bool) -> Outcome<Buffer> {
    if huge {
        return huge_filled(pages / HUGE_PAGES, SEED);
    }
    let buf = Buffer::anon(pages)?;
    buf.advise(0, pages, libc::MADV_NOHUGEPAGE)?;
    buf.fill(0, pages, SEED);
    Ok(buf)
}

/// The time that it takes the CPU to copy as many bytes as the operation works on.
fn copied(from: &[u8], to: &mut [u8]) -> Duration {
    let start = Instant::now();
    to.copy_from_slice(std::hint::black_box(from));
    std::hint::black_box(to);
    start.elapsed()
}

/// Measures all cases with the loaded driver.
fn measure(node: usize, pages: usize, cases: &[Case], samples: &mut [Samples]) -> Outcome {
    let mut bed = Bed {
        node,
        pages,
        huge: false,
        data: vec![0; pages * PAGE],
    };
    let (from, mut to) = (vec![1; pages * PAGE], vec![0; pages * PAGE]);
    // Register memory before measuring.
    bed.migrated()?;
    for ((operation, huge), samples) in cases.iter().zip(samples) {
        bed.huge = *huge;
        for _ in 0..ROUNDS {
            let copy = copied(&from, &mut to);
            samples.add((operation.run)(&mut bed)?, copy);
        }
    }
    Ok(())
}

/// A line of the table.
struct Row {
    kind: &'static str,
    name: String,
    bytes: usize,
    theirs: Samples,
    ours: Samples,
}

impl Row {
    /// The C driver's time divided by ours.
    fn ratio(&self) -> f64 {
        self.theirs.median().0 / self.ours.median().0
    }

    fn print(&self) {
        let ((theirs, their_spread), (ours, our_spread)) =
            (self.theirs.median(), self.ours.median());
        let copies = self.theirs.copies.iter().chain(&self.ours.copies);
        let (copy, copy_spread) = median_and_spread(copies.map(|t| micros(*t)).collect());
        let (ratio, best) = (self.ratio(), self.theirs.best() / self.ours.best());
        let Self {
            kind, name, bytes, ..
        } = self;
        note(&format!(
            "bench: {kind} {name}: C driver {theirs:.0} us (spread {:.0} %), this one {ours:.0} us \
             ({:.0} %), ratio {ratio:.2}, of the best {best:.2}, a copy by the CPU {copy:.0} us ({:.0} %)",
            their_spread * 100.0,
            our_spread * 100.0,
            copy_spread * 100.0,
        ));
        note(&format!(
            "bench-json: {{\"memory\":\"{kind}\",\"row\":\"{name}\",\"bytes\":{bytes},\
             \"c_us\":{theirs:.1},\"c_spread\":{their_spread:.3},\"rust_us\":{ours:.1},\
             \"rust_spread\":{our_spread:.3},\"ratio\":{ratio:.3},\"ratio_of_best\":{best:.3},\
             \"copy_us\":{copy:.1},\"samples\":{}}}",
            self.ours.times.len(),
        ));
    }
}

fn versus(ctx: &Ctx, node: usize, bytes: usize) -> Outcome {
    let Some(c_driver) = ctx.module.c_driver() else {
        return Err(Fail::Skip("no test_hmm.ko beside the module".into()));
    };
    if !ctx.module.nodes().contains(&node) {
        return Err(Fail::Skip("no memory for COHERENT devices".into()));
    }
    let pages = bytes / PAGE;
    let cases = cases(node, pages);
    let mut theirs = vec![Samples::default(); cases.len()];
    let mut ours = theirs.clone();
    for load in 0..LOADS {
        let mut drivers = [(&c_driver, &mut theirs), (&ctx.module, &mut ours)];
        // The two drivers take turns in coming first, so that neither always finds the memory that
        // the other one has used.
        if load % 2 == 1 {
            drivers.reverse();
        }
        for (module, samples) in drivers {
            module.load("")?;
            measure(node, pages, &cases, samples)?;
            module.unload()?;
        }
    }
    let kind = if node == PRIVATE {
        "PRIVATE"
    } else {
        "COHERENT"
    };
    let row = |(((operation, huge), theirs), ours): ((&Case, Samples), Samples)| {
        let size = match (operation.sizes, huge) {
            (false, _) => "",
            (true, false) => ", 4 KiB",
            (true, true) => ", 2 MiB",
        };
        Row {
            kind,
            name: format!("{}{size}", operation.name),
            bytes,
            theirs,
            ours,
        }
    };
    let rows: Vec<Row> = cases.iter().zip(theirs).zip(ours).map(row).collect();
    rows.iter().for_each(Row::print);
    let faster = rows.iter().filter(|row| row.ratio() > 1.0).count();
    note(&format!(
        "bench: {kind}: {faster} of {} operations on {} KiB take less time than with the C driver",
        rows.len(),
        bytes >> 10
    ));
    Ok(())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn median_and_spread_of_a_few() {
        for (times, expected) in [
            (&[7.0][..], (7.0, 0.0)),
            (&[30.0, 10.0, 20.0], (20.0, 0.5)),
            (&[9.0, 1.0, 5.0, 3.0, 7.0], (5.0, 0.8)),
        ] {
            assert_eq!(median_and_spread(times.to_vec()), expected);
        }
    }
}
