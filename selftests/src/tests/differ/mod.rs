// SPDX-License-Identifier: GPL-2.0

//! Two copies of the same memory take the same random operations. One lives in system memory. The
//! pages of the other are moved to devices and back meanwhile, read and written by them, and taken
//! for exclusive access. User space must see no difference: data, results of calls, which pages
//! exist, their rights and marks (pagemap, PAGEMAP_SCAN, the entries), mincore(2) and smaps are
//! compared after every operation. Strict mode judges the device's side of each, too.
//!
//! A failure names the seed and the last steps.

mod compare;
mod steps;

pub(super) use self::steps::WP_ASYNC;

use super::allocator::Random;
use super::counts::Waiting;
use super::entries::Strict;
use super::leak::settled;
use super::strict::{clears_flags, needs_all_fixes};
use super::target::{COHERENT, GENERIC, PRIVATE, Target};
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES};
use crate::harness::note;
use crate::swap::Swap;
use crate::uffd::Uffd;
use crate::{proc, sys};

pub const TESTS: &[Test] = &[
    test("differ.small", |ctx| {
        needs_all_fixes(ctx)?;
        small(ctx, PRIVATE)
    }),
    test("differ_coherent.small", |ctx| small(ctx, COHERENT)),
    test("differ_generic.small", |ctx| small(ctx, GENERIC)),
    test("differ.huge", |ctx| huge(ctx, PRIVATE)),
    test("differ_coherent.huge", |ctx| huge(ctx, COHERENT)),
    test("differ_generic.huge", |ctx| huge(ctx, GENERIC)),
];

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Small pages of a copy.
const SMALL: usize = 40;

/// One of the two copies: `n` pages of a mapping that has no accessible neighbour.
pub(super) struct Copy {
    pub buf: Buffer,
    pub first: usize,
}

impl Copy {
    fn new(n: usize, huge: bool) -> Outcome<Self> {
        let buf = Buffer::anon_huge_aligned(n.next_multiple_of(HUGE_PAGES) + 2 * HUGE_PAGES)?;
        let first = HUGE_PAGES;
        buf.protect(0, first, libc::PROT_NONE)?;
        buf.protect(first + n, buf.pages() - first - n, libc::PROT_NONE)?;
        if huge {
            buf.advise(first, n, libc::MADV_HUGEPAGE)?;
        }
        buf.fill(first, n, 1);
        if huge {
            if proc::huge(&buf, first, n)? != n {
                buf.advise(first, n, libc::MADV_COLLAPSE)?;
            }
            // From here on no page becomes huge by itself: that fills holes.
            buf.advise(first, n, libc::MADV_NOHUGEPAGE)?;
        }
        Ok(Self { buf, first })
    }
}

/// The state of the test.
pub(super) struct Pair<'a> {
    pub ctx: &'a Ctx,
    pub target: &'a Target,
    pub other: Target,
    pub random: Random,
    /// The copy that devices use, and the one that stays.
    pub away: Copy,
    pub home: Copy,
    pub n: usize,
    /// For each page the rights of its area.
    pub rights: Vec<i32>,
    /// Watches writes to both copies.
    pub uffd: Uffd,
    pub child: Option<Waiting>,
    /// Whether pages are swapped out, in one copy only.
    pub swap: bool,
}

impl<'a> Pair<'a> {
    fn new(ctx: &'a Ctx, target: &'a Target, huge: bool, swap: bool, seed: u64) -> Outcome<Self> {
        let n = if huge { HUGE_PAGES } else { SMALL };
        let pair = Self {
            ctx,
            target,
            other: Target::open(ctx, target.node() + 1)?,
            random: Random(seed),
            away: Copy::new(n, huge)?,
            home: Copy::new(n, huge)?,
            n,
            rights: vec![RW; n],
            uffd: Uffd::with_features(steps::WP_ASYNC).or_fail("userfaultfd")?,
            child: None,
            swap,
        };
        for copy in [&pair.away, &pair.home] {
            pair.uffd
                .register_writes(&copy.buf, copy.first, n)
                .or_fail("UFFDIO_REGISTER")?;
        }
        Ok(pair)
    }

    /// Takes steps, and compares after each.
    fn run(&mut self, steps: usize) -> Outcome<String> {
        let all: usize = steps::STEPS.iter().map(|s| s.1).sum();
        let mut trail: Vec<&str> = Vec::new();
        let mut taken = vec![0; steps::STEPS.len()];
        for step in 0..steps {
            let mut chance = self.random.below(all);
            let kind = steps::STEPS.iter().position(|s| {
                let hit = chance < s.1;
                chance = chance.wrapping_sub(s.1);
                hit
            });
            let Some(kind) = kind else { continue };
            let (name, _, run) = steps::STEPS[kind];
            taken[kind] += 1;
            trail.push(name);
            run(self).and_then(|()| self.compare()).map_err(|e| {
                let last = &trail[trail.len().saturating_sub(6)..];
                Fail::failed(format!("step {step} of {}: {e}", last.join(", ")))
            })?;
        }
        if let Some(child) = self.child.take() {
            child.join()?;
        }
        self.compare_all()?;
        let taken = steps::STEPS.iter().zip(taken);
        Ok(taken
            .map(|(s, n)| format!("{} {n}", s.0))
            .collect::<Vec<_>>()
            .join(", "))
    }

    /// A random range of pages: mostly few, sometimes all.
    fn range(&mut self) -> (usize, usize) {
        if self.random.below(6) == 0 {
            return (0, self.n);
        }
        let first = self.random.below(self.n);
        let most = (self.n - first).min(12);
        (first, 1 + self.random.below(most))
    }

    /// The runs of pages in a range whose rights include `wanted`.
    fn runs(&self, (first, n): (usize, usize), wanted: i32) -> Vec<(usize, usize)> {
        let fit = |right: &i32| right & wanted == wanted;
        let mut at = first;
        let mut runs = Vec::new();
        for run in self.rights[first..first + n].chunk_by(|a, b| fit(a) == fit(b)) {
            if fit(&run[0]) {
                runs.push((at, run.len()));
            }
            at += run.len();
        }
        runs
    }
}

/// Runs one life of a pair in a process and a cgroup of its own.
fn live(ctx: &Ctx, node: usize, huge: bool, swap: bool, seed: u64, steps: usize) -> Outcome {
    clears_flags(ctx)?;
    let named = |e: Fail| match e {
        Fail::Skip(why) => Fail::Skip(why),
        e => Fail::failed(format!("ZDM_SEED={seed}, huge {huge}, swap {swap}: {e}")),
    };
    settled(ctx, node, |target| {
        let life = || -> Outcome {
            sys::huge_pages_where_advised().or_fail("PR_SET_THP_DISABLE")?;
            let _swap = swap.then(Swap::on).transpose()?;
            let _strict = Strict::on()?;
            let mut pair = Pair::new(ctx, target, huge, swap, seed)?;
            let taken = pair.run(steps)?;
            note(&format!(
                "ZDM_SEED={seed}, huge {huge}, swap {swap}: {taken}"
            ));
            Ok(())
        };
        life().map_err(named)
    })
}

/// The seeds are fixed.
fn small(ctx: &Ctx, node: usize) -> Outcome {
    (1..=3).try_for_each(|seed| live(ctx, node, false, false, seed, 150))
}

/// Without the series both copies get marks that they should not have.
fn huge(ctx: &Ctx, node: usize) -> Outcome {
    needs_all_fixes(ctx)?;
    (1..=3).try_for_each(|seed| live(ctx, node, true, false, seed, 60))
}
