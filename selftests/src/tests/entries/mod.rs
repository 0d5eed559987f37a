// SPDX-License-Identifier: GPL-2.0

//! What each operation on memory does to an entry that a device has to do with: one that maps a
//! page of the device, of another device, or a page of the system that the device mirrors. After
//! every operation the oracle compares, in strict mode, all of the device's page table with the
//! CPU's (I12), the rights and marks across the way back (I13), and mapping counts with page
//! tables (I11). So an operation needs to be here once to be judged for a forgotten or a short
//! invalidation, a right too many, a lost mark, a reference, and a count.

mod advices;
mod files;
mod maps;
mod marks;
mod meanwhile;
mod midway;
mod protections;

use std::fs;

use super::leak::settled;
use super::strict::clears_flags;
use super::target::{Place, Target};
use super::{Ctx, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, pattern_bytes};
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("entries":
    "maps" => maps_test,
    "protections" => protections_test,
    "advices" => advices_test,
    "files" => files_test,
    "meanwhile" => meanwhile_test,
    "marks" => marks_test,
    "marks_dirty" => marks_dirty,
    "marks_watched" => marks_watched,
);

pub const INJECTING: &[Test] = of_each_kind!("entries", "inject=1":
    "midway" => midway_test,
    "midway_huge" => midway_huge,
);

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Small pages of a scene.
const SMALL: usize = 12;
const STRICT: &str = "/sys/module/zdmirror/parameters/strict";

/// Strict mode for as long as this lives.
pub(super) struct Strict {
    before: String,
}

impl Strict {
    pub fn on() -> Outcome<Self> {
        let before = fs::read_to_string(STRICT).or_fail(STRICT)?;
        fs::write(STRICT, "1").or_fail(STRICT)?;
        Ok(Self { before })
    }
}

impl Drop for Strict {
    fn drop(&mut self) {
        // A test that cannot leave strict mode makes the others slow, and nothing else.
        let _ = fs::write(STRICT, &self.before);
    }
}

/// Memory with a pattern that a device has mapped for writing.
struct Scene<'a> {
    target: &'a Target,
    other: &'a Target,
    place: Place,
    huge: bool,
    seed: u64,
    buf: Buffer,
    /// The first page that is used, and how many are.
    first: usize,
    n: usize,
    /// Whether the kernel has all fixes of the series.
    complete: bool,
}

impl<'a> Scene<'a> {
    fn new(
        target: &'a Target,
        other: &'a Target,
        place: Place,
        huge: bool,
        seed: u64,
    ) -> Outcome<Self> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").or_fail("the release")?;
        // Tests of this file are skipped on a kernel without the series.
        let complete = !release.starts_with("7.2.");
        let (buf, first, n) = match huge {
            false => (Buffer::anon(3 * SMALL)?, SMALL, SMALL),
            true => (
                Buffer::anon_huge_aligned(3 * HUGE_PAGES)?,
                HUGE_PAGES,
                HUGE_PAGES,
            ),
        };
        // An area of their own, that no neighbour is joined with.
        buf.protect(0, first, libc::PROT_NONE)?;
        buf.protect(first + n, n, libc::PROT_NONE)?;
        if huge {
            buf.advise(first, n, libc::MADV_HUGEPAGE)?;
        }
        let s = Self {
            target,
            other,
            place,
            huge,
            seed,
            buf,
            first,
            n,
            complete,
        };
        s.refill(seed)?;
        Ok(s)
    }

    /// Writes the pattern of `seed`, and has the device map the pages where the scene wants them.
    #[track_caller]
    fn refill(&self, seed: u64) -> Outcome {
        self.buf.fill(self.first, self.n, seed);
        if self.huge && proc::huge(&self.buf, self.first, self.n)? != self.n {
            self.buf.advise(self.first, self.n, libc::MADV_COLLAPSE)?;
        }
        self.arrange()
    }

    #[track_caller]
    fn arrange(&self) -> Outcome {
        let to = match self.place {
            Place::System => None,
            Place::Local => Some(self.target),
            Place::Remote => Some(self.other),
        };
        if let Some(to) = to {
            proc::drain_batches()?;
            to.to_device(&self.buf, self.first, self.n)
                .or_fail("MIGRATE_TO_DEV")?;
            to.expect(&self.buf, self.first, self.n, self.n)?;
        }
        self.map()
    }

    /// Has the device map all pages for writing.
    #[track_caller]
    fn map(&self) -> Outcome {
        let (at, n) = (self.buf.at(self.first), self.n as u64);
        let mapped = self
            .target
            .fault(at, n, ZDM_FAULT_WRITE)
            .or_fail("ZDM_FAULT")?;
        check_eq!(mapped, n, "pages that the device maps");
        Ok(())
    }

    /// Whether the pages are on a device that the CPU does not reach, once the device has mapped
    /// them.
    fn is_away(&self) -> bool {
        self.place == Place::Local && !self.target.cpu_maps()
    }

    /// Checks the pattern of `seed` in `count` pages from number `at` of the scene on, by the
    /// device and the CPU.
    #[track_caller]
    fn holds(&self, at: usize, count: usize, seed: u64) -> Outcome {
        let first = self.first + at;
        if count == 0 {
            return Ok(());
        }
        let read = self.target.read(&self.buf, first, count).or_fail("READ")?;
        crate::device::check_bytes(&read.data, seed, first, "READ by the device")?;
        self.buf.check(first, count, seed)
    }

    /// Has the device write the pattern of `seed` to such pages.
    #[track_caller]
    fn write(&self, at: usize, count: usize, seed: u64) -> Outcome {
        let first = self.first + at;
        let data = pattern_bytes(seed, first, count);
        self.target
            .write(&self.buf, first, &data)
            .map(drop)
            .or_fail("WRITE")
    }

    /// The device may not write page number `at` of the scene.
    #[track_caller]
    fn denied(&self, at: usize) -> Outcome {
        let first = self.first + at;
        let data = pattern_bytes(self.seed + 9, first, 1);
        let result = self.target.write(&self.buf, first, &data);
        check!(
            result.is_err(),
            "WRITE to page {at} without the right: expected an error, found success"
        );
        Ok(())
    }

    /// An ioctl that does nothing: the oracle compares the page tables.
    #[track_caller]
    fn look(&self) -> Outcome {
        self.target.stats()?;
        self.other.stats().map(drop)
    }

    /// Each page has the mappings that it counts, and no other reference.
    #[track_caller]
    fn counted(&self, when: &str) -> Outcome {
        let pages = self.target.inspect(&self.buf, self.first, self.n);
        for (i, page) in pages.or_fail("ZDM_INSPECT")?.iter().enumerate() {
            let on_device = page.kind != 0;
            check!(
                !on_device || (page.refs == page.mapcount && page.flags & ZDM_PAGE_LRU == 0),
                "page {i} {when}: expected its mappings as references, and no list, found {page:x?}"
            );
        }
        Ok(())
    }

    /// The last word on an operation: everything is as true as before, and comes back.
    #[track_caller]
    fn done(&self) -> Outcome {
        self.look()?;
        self.buf.protect(self.first, self.n, RW)?;
        for device in [self.target, self.other] {
            if device.cpu_maps() || self.place != Place::System {
                // Not of a device, or another one's.
                let _ = device.to_system(&self.buf, self.first, self.n);
            }
        }
        self.look()?;
        self.nothing_found()
    }

    #[track_caller]
    fn nothing_found(&self) -> Outcome {
        for device in [self.target, self.other] {
            let (audit, records) = device.audit()?;
            check_eq!(audit.total, 0, "violations, of which {records:x?}");
        }
        Ok(())
    }
}

type Operation = (&'static str, fn(&Scene) -> Outcome);

/// Runs each operation on pages of both sizes in each place.
fn each(ctx: &Ctx, node: usize, seed: u64, operations: &[Operation]) -> Outcome {
    clears_flags(ctx)?;
    settled(ctx, node, |target| {
        let other = Target::open(ctx, node + 1)?;
        let _strict = Strict::on()?;
        for huge in [false, true] {
            for place in Place::ALL {
                for (name, run) in operations {
                    let one = || -> Outcome {
                        let s = Scene::new(target, &other, place, huge, seed)?;
                        run(&s)?;
                        s.done()
                    };
                    one().map_err(|e| match e {
                        Fail::Skip(_) => e,
                        e => Fail::failed(format!("{name}, {place:?}, huge {huge}: {e}")),
                    })?;
                }
            }
        }
        Ok(())
    })
}

fn maps_test(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 5000, maps::OPERATIONS)
}

fn protections_test(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 5100, protections::OPERATIONS)
}

fn files_test(ctx: &Ctx, node: usize) -> Outcome {
    files::all(ctx, node)
}

fn meanwhile_test(ctx: &Ctx, node: usize) -> Outcome {
    meanwhile::all(ctx, node)
}

fn midway_test(ctx: &Ctx, node: usize) -> Outcome {
    midway::each(ctx, node, false)
}

fn midway_huge(ctx: &Ctx, node: usize) -> Outcome {
    midway::each(ctx, node, true)
}

fn marks_test(ctx: &Ctx, node: usize) -> Outcome {
    marks::small(ctx, node)
}

fn marks_dirty(ctx: &Ctx, node: usize) -> Outcome {
    marks::huge_dirty(ctx, node)
}

fn marks_watched(ctx: &Ctx, node: usize) -> Outcome {
    marks::huge_watched(ctx, node)
}

fn advices_test(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 5200, advices::OPERATIONS)
}
