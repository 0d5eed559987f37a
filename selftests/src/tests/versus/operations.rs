// SPDX-License-Identifier: GPL-2.0

//! The operations that are measured.

use std::path::PathBuf;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, Data, Device, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::tests::bench::timed;
use crate::tests::target::huge_filled;
use crate::uapi::*;
use crate::{sys, threads};

const SEED: u64 = 3000;
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
pub struct Bed {
    /// The two nodes of the kind of memory that is measured.
    nodes: [PathBuf; 2],
    /// The number of processors, which several threads divide among themselves.
    cpus: usize,
    /// The number of pages that an operation works on.
    pages: usize,
    /// Whether the memory consists of huge pages.
    huge: bool,
    /// The data to write, and room for the data read.
    data: Vec<u8>,
}

/// An operation. Returns the time of the measured part.
pub type Run = fn(&mut Bed) -> Outcome<Duration>;

/// The description of an operation: its name, whether it is also measured with huge pages, and
/// whether it applies only to memory that the CPU cannot map.
pub struct Operation {
    pub name: &'static str,
    pub sizes: bool,
    pub private: bool,
    pub run: Run,
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

pub const OPERATIONS: &[Operation] = &[
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
        let (one, other) = (bed.device()?, Device::open_at(&bed.nodes[1])?);
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
    /// What the operations on `pages` pages of one driver need.
    pub fn new(nodes: [PathBuf; 2], cpus: usize, pages: usize, huge: bool) -> Self {
        let data = vec![0; pages * PAGE];
        Self {
            nodes,
            cpus,
            pages,
            huge,
            data,
        }
    }

    fn device(&self) -> Outcome<Device> {
        Device::open_at(&self.nodes[0])
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
        let cpus = self.cpus;
        let begin = Barrier::new(devices.len() + 1);
        let worker = |n: usize, device: &Device| {
            let mut data = vec![0; part * PAGE];
            sys::run_on(n % cpus).or_fail("sched_setaffinity")?;
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
    pub fn migrated(&mut self) -> Outcome<(Device, Buffer)> {
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
