// SPDX-License-Identifier: GPL-2.0

//! Benchmarks: the cost of each operation with the kernel tree's own C driver and with this one.
//!
//! The two drivers have the same memory in one guest and get the same ioctls. With PRIVATE memory both
//! are loaded at once, and take turns with each operation, in the order C, Rust, Rust, C. The devices
//! of COHERENT memory have fixed addresses, so there the drivers are loaded in turn. Copies of as many
//! bytes right before and after each operation show how busy the machine was. `pairs.rs` says what
//! becomes of the times. Each row is printed once as text and once as JSON, which has all times.
//! Benchmarks run only by name. A wrong result fails them, a slow one does not.

mod operations;
mod pairs;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use self::operations::{Bed, OPERATIONS, Operation};
use self::pairs::{Figures, Pair, Sample, Standing};
use super::bench::micros;
use super::target::{COHERENT, PRIVATE};
use super::{Ctx, Test, absent, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Device, HUGE_PAGES, PAGE};
use crate::harness::note;
use crate::module::Module;
use crate::sys;

pub const TESTS: &[Test] = &[
    absent(test("versus.private", |ctx| beside(ctx, 4 << 20, 12))),
    absent(test("versus.coherent", |ctx| in_turn(ctx, 4 << 20))),
    absent(test("versus.private_64k", |ctx| beside(ctx, 64 << 10, 48))),
    // The pieces are so short that many of them are not interrupted.
    absent(test("versus.private_256k", |ctx| {
        beside(ctx, 256 << 10, 32)
    })),
    absent(test("versus.private_1m", |ctx| beside(ctx, 1 << 20, 16))),
    // This test exceeds the time limit unless the limit is raised: --timeout-factor 10.
    absent(test("versus.private_32m", |ctx| beside(ctx, 32 << 20, 6))),
];

/// The time for a row of pairs, and the pairs that are measured however long they take.
const ROW: Duration = Duration::from_millis(2500);
const FEWEST: usize = 6;
/// The pairs of one line of JSON. The harness cuts notes of more than 900 characters.
const PART: usize = 16;
/// How often each driver is loaded, and how often an operation is measured per load, where only one
/// of them can be loaded.
const LOADS: usize = 2;
const ROUNDS: usize = 3;

/// A row: an operation on as many pages, and whether they are huge.
struct Case {
    operation: &'static Operation,
    pages: usize,
    huge: bool,
}

impl Case {
    fn name(&self) -> String {
        let size = match (self.operation.sizes, self.huge) {
            (false, _) => "",
            (true, false) => ", 4 KiB",
            (true, true) => ", 2 MiB",
        };
        format!("{}{size}", self.operation.name)
    }

    fn bytes(&self) -> usize {
        self.pages * PAGE
    }
}

/// The cases to measure: operations on `bytes` of small pages, and of huge ones, at least one of
/// them. The C driver has no huge pages of COHERENT memory.
fn cases(private: bool, bytes: usize) -> Vec<Case> {
    let of_size = |huge: bool| {
        let fits = move |o: &&'static Operation| {
            (private || !o.private) && (!huge || (private && o.sizes))
        };
        let pages = bytes / PAGE;
        let case = move |operation| Case {
            operation,
            pages: if huge { pages.max(HUGE_PAGES) } else { pages },
            huge,
        };
        OPERATIONS.iter().filter(fits).map(case)
    };
    [false, true].into_iter().flat_map(of_size).collect()
}

/// The time in microseconds that it takes the CPU to copy as many bytes as an operation works on.
fn copied(from: &[u8], to: &mut [u8]) -> f64 {
    let start = Instant::now();
    to.copy_from_slice(std::hint::black_box(from));
    std::hint::black_box(to);
    micros(start.elapsed())
}

/// The memory that is copied around a measured operation.
struct Copies {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Copies {
    fn new(case: &Case) -> Self {
        Self {
            from: vec![1; case.bytes()],
            to: vec![0; case.bytes()],
        }
    }

    fn sample(&mut self, case: &Case, bed: &mut Bed) -> Outcome<Sample> {
        let before = copied(&self.from, &mut self.to);
        let time = micros((case.operation.run)(bed)?);
        let after = copied(&self.from, &mut self.to);
        Ok(Sample {
            time,
            copies: before + after,
        })
    }
}

/// Lets the calling thread run on the last processor only: the first one has more to do besides.
/// Returns the number of processors.
fn on_the_last_processor() -> Outcome<usize> {
    let cpus = std::thread::available_parallelism().or_fail("processors")?;
    sys::run_on(cpus.get() - 1).or_fail("sched_setaffinity")?;
    Ok(cpus.get())
}

/// The nodes of a kind of memory, which are two in a row.
fn usual_nodes(node: usize) -> [PathBuf; 2] {
    [node, node + 1].map(|n| Device::path(n).into())
}

/// Both drivers, loaded at once. The nodes of the C driver have other names then.
struct Both<'a> {
    theirs: &'a Module,
    ours: &'a Module,
    nodes: [PathBuf; 2],
}

impl<'a> Both<'a> {
    fn load(theirs: &'a Module, ours: &'a Module) -> Outcome<Self> {
        let nodes = [0, 1].map(|n| PathBuf::from(format!("/dev/versus_c{n}")));
        let both = Self {
            theirs,
            ours,
            nodes,
        };
        theirs.load("")?;
        let loaded = both.load_ours();
        if loaded.is_err() {
            both.drop_theirs()?;
        }
        loaded.map(|()| both)
    }

    fn load_ours(&self) -> Outcome {
        for (usual, other) in usual_nodes(PRIVATE).iter().zip(&self.nodes) {
            fs::rename(usual, other).or_fail("renaming a node of the C driver")?;
        }
        self.ours.load("")
    }

    fn drop_theirs(&self) -> Outcome {
        self.theirs.unload_beside()?;
        // The kernel removes a node of the usual name only.
        let removed = self.nodes.iter().try_for_each(fs::remove_file);
        removed.or_fail("removing the nodes of the C driver")
    }

    fn unload(self) -> Outcome {
        self.drop_theirs().and(self.ours.unload())
    }

    /// Measures one case in `count` pairs, or in fewer where they take longer than [`ROW`].
    fn pairs(&self, case: &Case, cpus: usize, count: usize) -> Outcome<Vec<Pair>> {
        let bed = |nodes| Bed::new(nodes, cpus, case.pages, case.huge);
        let (mut theirs, mut ours) = (bed(self.nodes.clone()), bed(usual_nodes(PRIVATE)));
        let mut copies = Copies::new(case);
        // The first time is longer for many reasons.
        for bed in [&mut theirs, &mut ours] {
            copies.sample(case, bed)?;
        }
        let pair = |n: usize| {
            // Each driver comes first as often as the other.
            let (theirs, ours) = if n % 2 == 0 {
                let theirs = copies.sample(case, &mut theirs)?;
                (theirs, copies.sample(case, &mut ours)?)
            } else {
                let ours = copies.sample(case, &mut ours)?;
                (copies.sample(case, &mut theirs)?, ours)
            };
            Ok(Pair { theirs, ours })
        };
        let start = Instant::now();
        let goes_on = |n: &usize| *n < FEWEST || start.elapsed() < ROW;
        (0..count).take_while(goes_on).map(pair).collect()
    }
}

/// Prints a row: its figures as text and as JSON, and all pairs as JSON, with the times and the copies of the C
/// driver and of this one, and whether the figures are about the pair.
fn print(kind: &str, case: &Case, pairs: &[Pair], figures: &Figures) {
    let (name, bytes) = (case.name(), case.bytes());
    let Figures {
        ratio,
        low,
        high,
        best,
        theirs,
        ours,
        copies,
        kept,
    } = figures;
    let used = kept.iter().filter(|kept| **kept).count();
    // A sample has two copies.
    let copy = copies.median / 2.0;
    note(&format!(
        "bench: {kind} {name}: C driver {:.0} us (spread {:.0} %), this one {:.0} us ({:.0} %), ratio \
         {ratio:.2} ({low:.2} to {high:.2}), of the best {best:.2}, {used} of {} pairs, a copy by the CPU \
         {copy:.0} us ({:.0} %)",
        theirs.median,
        theirs.spread * 100.0,
        ours.median,
        ours.spread * 100.0,
        pairs.len(),
        copies.spread * 100.0,
    ));
    note(&format!(
        "bench-json: {{\"memory\":\"{kind}\",\"row\":\"{name}\",\"bytes\":{bytes},\
         \"c_us\":{:.1},\"c_spread\":{:.3},\"rust_us\":{:.1},\"rust_spread\":{:.3},\
         \"ratio\":{ratio:.3},\"low\":{low:.3},\"high\":{high:.3},\"ratio_of_best\":{best:.3},\
         \"copy_us\":{copy:.1},\"samples\":{},\"kept\":{used}}}",
        theirs.median,
        theirs.spread,
        ours.median,
        ours.spread,
        pairs.len(),
    ));
    for (part, (pairs, kept)) in pairs.chunks(PART).zip(kept.chunks(PART)).enumerate() {
        let columns = |(pair, kept): (&Pair, &bool)| {
            let Pair { theirs, ours } = pair;
            format!(
                "[{:.1},{:.1},{:.1},{:.1},{}]",
                theirs.time,
                ours.time,
                theirs.copies,
                ours.copies,
                u8::from(*kept)
            )
        };
        let all: Vec<String> = pairs.iter().zip(kept).map(columns).collect();
        note(&format!(
            "bench-pairs: {{\"memory\":\"{kind}\",\"row\":\"{name}\",\"bytes\":{bytes},\"first\":{},\
             \"pairs\":[{}]}}",
            part * PART,
            all.join(","),
        ));
    }
}

/// Prints a row, and returns what it says.
fn report(kind: &str, case: &Case, pairs: &[Pair]) -> Standing {
    let figures = Figures::of(pairs);
    print(kind, case, pairs, &figures);
    figures.standing()
}

/// Prints what all rows say together.
fn print_sum(kind: &str, bytes: usize, standings: &[Standing]) {
    let number = |standing| standings.iter().filter(|s| **s == standing).count();
    note(&format!(
        "bench: {kind}: of {} operations on {} KiB {} take less time than with the C driver, {} take more, and \
         {} as much, as far as these pairs can tell",
        standings.len(),
        bytes >> 10,
        number(Standing::Ahead),
        number(Standing::Behind),
        number(Standing::Even),
    ));
}

fn c_driver(ctx: &Ctx) -> Outcome<Module> {
    let absent = || Fail::Skip("no test_hmm.ko beside the module".into());
    ctx.module.c_driver().ok_or_else(absent)
}

/// PRIVATE memory: `count` pairs for each operation.
fn beside(ctx: &Ctx, bytes: usize, count: usize) -> Outcome {
    // Memory with an address can be that of one driver only.
    let theirs = c_driver(ctx)?.private_only();
    let cases = cases(true, bytes);
    let cpus = on_the_last_processor()?;
    let both = Both::load(&theirs, &ctx.module)?;
    let row = |case: &Case| Ok(report("PRIVATE", case, &both.pairs(case, cpus, count)?));
    let standings: Outcome<Vec<_>> = cases.iter().map(row).collect();
    let unloaded = both.unload();
    print_sum("PRIVATE", bytes, &standings?);
    unloaded
}

/// COHERENT memory: the drivers take turns in being loaded.
fn in_turn(ctx: &Ctx, bytes: usize) -> Outcome {
    let theirs = c_driver(ctx)?;
    if !ctx.module.nodes().contains(&COHERENT) {
        return Err(Fail::Skip("no memory for COHERENT devices".into()));
    }
    let cases = cases(false, bytes);
    let cpus = on_the_last_processor()?;
    let mut samples = [(); 2].map(|()| vec![Vec::new(); cases.len()]);
    for load in 0..LOADS {
        let [of_theirs, of_ours] = &mut samples;
        let mut drivers = [(&theirs, of_theirs), (&ctx.module, of_ours)];
        // The two drivers take turns in coming first, so that neither always finds the memory that
        // the other one has used.
        if load % 2 == 1 {
            drivers.reverse();
        }
        for (module, samples) in drivers {
            module.load("")?;
            for (case, samples) in cases.iter().zip(samples) {
                let mut bed = Bed::new(usual_nodes(COHERENT), cpus, case.pages, case.huge);
                let mut copies = Copies::new(case);
                copies.sample(case, &mut bed)?;
                for _ in 0..ROUNDS {
                    samples.push(copies.sample(case, &mut bed)?);
                }
            }
            module.unload()?;
        }
    }
    let [theirs, ours] = samples;
    let pairs = |(theirs, ours): (Vec<Sample>, Vec<Sample>)| {
        let both = theirs.into_iter().zip(ours);
        both.map(|(theirs, ours)| Pair { theirs, ours }).collect()
    };
    let all = theirs.into_iter().zip(ours).map(pairs);
    let rows = cases.iter().zip(all);
    let standings: Vec<_> = rows
        .map(|(case, pairs): (_, Vec<Pair>)| report("COHERENT", case, &pairs))
        .collect();
    print_sum("COHERENT", bytes, &standings);
    Ok(())
}
