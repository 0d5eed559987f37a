// SPDX-License-Identifier: GPL-2.0

//! Chains of processes that share pages on the device. A process that writes gets a page of its
//! own, and no process sees the writes of another (I10), whichever ends first. Small and huge
//! pages.

use std::io::{Read, Write};
use std::os::unix::process::parent_id;
use std::time::{Duration, Instant};

use super::counts::Waiting;
use super::fight::in_turn;
use super::leak::settled;
use super::target::{GENERIC, PRIVATE, Target, huge_filled, old_rule, open};
use super::{Ctx, PAGES, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, PAGE, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::sys;
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = of_each_kind!("chain":
    "write_each_level" => write_each_level,
    "parent_first" => parent_first,
    "device_write" => device_write,
    "exclusive" => exclusive,
    "mixture" => mixture,
    "siblings" => siblings,
    "again_and_again" => again_and_again,
    "zap_migrated" => zap_migrated,
);

/// Both sizes of folios.
pub const SIZES: [bool; 2] = [false, true];

/// The first, the middle and the last of `n` pages.
pub fn spread(n: usize) -> [usize; 3] {
    [0, n / 2, n - 1]
}

/// A buffer of small pages, or one huge page, with the pattern of `seed`.
#[track_caller]
pub fn filled(huge: bool, seed: u64) -> Outcome<Buffer> {
    match huge {
        false => Buffer::filled(PAGES, seed),
        true => huge_filled(1, seed),
    }
}

/// The expected content of each page of a buffer: the pattern of a seed.
#[derive(Clone)]
pub struct Image(Vec<u64>);

impl Image {
    pub fn new(n: usize, seed: u64) -> Self {
        Self(vec![seed; n])
    }

    /// Writes the pattern of `seed` to pages.
    pub fn fill(&mut self, buf: &Buffer, first: usize, n: usize, seed: u64) {
        buf.fill(first, n, seed);
        self.0[first..first + n].fill(seed);
    }

    /// Records that pages hold the pattern of `seed` now.
    pub fn set(&mut self, first: usize, n: usize, seed: u64) {
        self.0[first..first + n].fill(seed);
    }

    /// Runs of pages with the same seed.
    fn runs(&self) -> impl Iterator<Item = (usize, usize, u64)> {
        let mut first = 0;
        self.0.chunk_by(|a, b| a == b).map(move |run| {
            first += run.len();
            (first - run.len(), run.len(), run[0])
        })
    }

    /// Checks every byte by CPU accesses.
    #[track_caller]
    pub fn check(&self, buf: &Buffer) -> Outcome {
        for (first, n, seed) in self.runs() {
            buf.check(first, n, seed)?;
        }
        Ok(())
    }

    /// Checks bytes of all pages, which `what` has read.
    #[track_caller]
    pub fn check_bytes(&self, bytes: &[u8], what: &str) -> Outcome {
        for (first, n, seed) in self.runs() {
            check_bytes(&bytes[first * PAGE..(first + n) * PAGE], seed, first, what)?;
        }
        Ok(())
    }

    /// Moves all pages to the device, which must take all of them, and checks the data.
    #[track_caller]
    pub fn send(&self, target: &Target, buf: &Buffer) -> Outcome {
        let n = buf.pages();
        target.drain_held(buf)?;
        let moved = target.to_device(buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
        target.expect(buf, 0, n, n)?;
        self.check_bytes(&moved.data, "data that MIGRATE_TO_DEV returned")
    }

    /// Checks every byte by device accesses.
    #[track_caller]
    pub fn check_device(&self, target: &Target, buf: &Buffer) -> Outcome {
        // Other processes may use the same pages.
        let read = in_turn(|| target.read(buf, 0, buf.pages())).or_fail("READ")?;
        self.check_bytes(&read.data, "READ by the device")
    }
}

/// Checks that none of the pages can be written in place: neither by the CPU nor, where PRIVATE
/// pages are, by the device.
#[track_caller]
pub fn expect_no_write(target: &Target, buf: &Buffer, when: &str) -> Outcome {
    let pages = target.inspect(buf, 0, buf.pages()).or_fail("ZDM_INSPECT")?;
    match pages.iter().position(|p| p.flags & ZDM_PAGE_WRITE != 0) {
        None => Ok(()),
        Some(page) => Err(Fail::failed(format!(
            "page {page} {when}: expected no right to write, found {:x?}",
            pages[page]
        ))),
    }
}

/// A process of the chain: writes to its own part, moves everything to the device, and starts the
/// next process, which inherits the memory.
fn level(ctx: &Ctx, node: usize, buf: &Buffer, mut image: Image, depth: u64) -> Outcome {
    const LEVELS: u64 = 4;
    image.check(buf)?;
    // Open a file for this process's memory.
    let target = Target::open(ctx, node)?;
    let step = buf.pages() / 8;
    let first = depth as usize * step;
    image.fill(buf, first, step + 3, 1100 + depth);
    image.send(&target, buf)?;
    if depth + 1 < LEVELS {
        let child = Child::spawn(|| level(ctx, node, buf, image.clone(), depth + 1))?;
        // Every other process works at the same time as its descendants.
        if depth % 2 == 0 {
            image.fill(buf, first + 1, 2, 1200 + depth);
        }
        child.join()?;
    }
    image.check(buf)?;
    image.send(&target, buf)?;
    image.check_device(&target, buf)?;
    target.bring_back(buf, 0, buf.pages())?;
    image.check(buf)
}

/// Four generations, each of which writes and migrates. (Fixed in 6.0 by 1118234e4bc2: fork of
/// device pages that were still marked exclusive; in 5.17 by e1f84eef313f: fault on a shared page.)
fn write_each_level(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1100)?;
            let image = Image::new(buf.pages(), 1100);
            image.send(target, &buf)?;
            Child::spawn(|| level(ctx, node, &buf, image.clone(), 0))?.join()?;
            image.check_device(target, &buf)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

/// The oldest process ends first, and its file with it. The youngest process has all of the data,
/// and then owns the pages.
fn parent_first(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |outer| {
            let (mut done, say) = sys::pipe().or_fail("pipe")?;
            let (mut gone, hold) = sys::pipe().or_fail("pipe")?;
            // Each process closes its own copy.
            let mut hold = Some(hold);
            let first = Child::spawn(|| {
                let target = Target::open(ctx, node)?;
                let buf = filled(huge, 1110)?;
                let mut image = Image::new(buf.pages(), 1110);
                image.send(&target, &buf)?;
                let oldest = std::process::id();
                let _second = Child::spawn(|| {
                    // `zap_migrated` tests concurrent unmapping and migration.
                    let ended = || parent_id() != oldest;
                    check!(
                        sys::wait_until(Duration::from_secs(20), ended),
                        "the oldest: expected its end in 20 s, found none"
                    );
                    image.fill(&buf, 1, 2, 1111);
                    let _third = Child::spawn(|| {
                        drop((hold.take(), target));
                        // The pipe ends when both processes have ended.
                        let n = gone.read(&mut [0]).or_fail("pipe")?;
                        check_eq!(n, 0, "bytes from the ancestors");
                        image.check(&buf)?;
                        image.fill(&buf, 4, 3, 1112);
                        let own = Target::open(ctx, node)?;
                        image.send(&own, &buf)?;
                        image.check_device(&own, &buf)?;
                        own.bring_back(&buf, 0, buf.pages())?;
                        image.check(&buf)?;
                        (&say).write_all(b"d").or_fail("pipe")
                    })?;
                    sys::exit_now(0)
                })?;
                sys::exit_now(0)
            })?;
            drop((hold.take(), say));
            first.join()?;
            let n = done.read(&mut [0]).or_fail("pipe")?;
            check_eq!(n, 1, "word of the youngest process that it is done");
            outer.expect_empty()
        })?;
    }
    Ok(())
}

/// One process unmaps a huge page while another one migrates it, when both have migration entries
/// for it, which hold no reference. (Since 7.2 the zap asked the folio instead of the entry whether
/// it is device private, and dropped a mapping a second time; fixed by series A.)
fn zap_migrated(ctx: &Ctx, node: usize) -> Outcome {
    const ROUNDS: u32 = 40;
    // GENERIC memory shows whether the kernel has the series.
    if node == PRIVATE && old_rule(ctx, &open(ctx, GENERIC)?, GENERIC)? {
        return Err(Fail::Skip("this kernel would oops".into()));
    }
    settled(ctx, node, |target| {
        // The shortest migration so far: on a busy machine some take much longer.
        let mut shortest = Duration::from_millis(20);
        for round in 0..ROUNDS {
            let buf = huge_filled(1, 1190)?;
            let n = buf.pages();
            target.move_all(&buf, 1190)?;
            let (mut go, mut say) = sys::pipe().or_fail("pipe")?;
            let delay = shortest * (round % 20) / 16;
            let child = Child::spawn(|| {
                let byte = go.read(&mut [0]).or_fail("pipe")?;
                let start = Instant::now();
                while start.elapsed() < delay {
                    std::hint::spin_loop();
                }
                check_eq!(byte, 1, "words to begin");
                buf.unmap(0, n)
            })?;
            say.write_all(b"g").or_fail("pipe")?;
            let start = Instant::now();
            if target.cpu_maps() {
                // An unmapping task may hold the page for a moment longer, and then the page stays.
                let _ = target.to_system(&buf, 0, n);
            } else {
                buf.get(n - 1, 0);
            }
            shortest = shortest.min(start.elapsed());
            child.join()?;
            target.bring_back(&buf, 0, n)?;
            buf.check(0, n, 1190)?;
        }
        Ok(())
    })
}

/// A write of the device for one process is invisible to the others. A kernel that lets a device
/// write to a shared page leaks data between processes.
fn device_write(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1120)?;
            let n = buf.pages();
            let mut image = Image::new(n, 1120);
            image.send(target, &buf)?;
            let old = image.clone();
            let child = Waiting::start(
                || {
                    let grandchild = Waiting::start(|| Ok(()), || old.check(&buf))?;
                    let own = Target::open(ctx, node)?;
                    expect_no_write(&own, &buf, "with a grandchild")?;
                    let mut image = old.clone();
                    own.write(&buf, 2, &pattern_bytes(1121, 2, 5))
                        .or_fail("WRITE by the child's device")?;
                    image.set(2, 5, 1121);
                    image.check(&buf)?;
                    grandchild.join()?;
                    image.check(&buf)
                },
                || Image::check(&with(&old, 2, 5, 1121), &buf),
            )?;
            expect_no_write(target, &buf, "with a child")?;
            image.check(&buf)?;
            target
                .write(&buf, 4, &pattern_bytes(1122, 4, n - 8))
                .or_fail("WRITE by the parent's device")?;
            image.set(4, n - 8, 1122);
            child.join()?;
            image.check_device(target, &buf)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

fn with(image: &Image, first: usize, n: usize, seed: u64) -> Image {
    let mut image = image.clone();
    image.set(first, n, seed);
    image
}

/// No shared page is marked as exclusive, because the mark allows a write that the other process
/// would see. The last process that has the page gets the mark back by a write.
fn exclusive(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1130)?;
            let mut image = Image::new(buf.pages(), 1130);
            image.send(target, &buf)?;
            let own = |page: usize, expected: bool, when: &str| -> Outcome {
                let found = target.inspect_one(&buf, page)?;
                let exclusive = found.flags & ZDM_PAGE_ANON_EXCLUSIVE != 0;
                check!(
                    exclusive == expected,
                    "page {page} {when}: expected exclusive {expected}, found {found:x?}"
                );
                Ok(())
            };
            own(0, true, "after migration")?;
            let child = Waiting::start(|| image.check_after(&buf), || image.check(&buf))?;
            // A read by the child may have brought PRIVATE pages back for both processes. A huge
            // entry has the mark only on the first page.
            for page in 0..buf.pages() {
                own(page, false, "after fork")?;
            }
            image.clone().send(target, &buf)?;
            own(0, false, "after fork and migration")?;
            expect_no_write(target, &buf, "after fork and migration")?;
            child.join()?;
            image.fill(&buf, 0, buf.pages(), 1131);
            image.check_device(target, &buf)?;
            own(0, true, "after the write of who is left")?;
            image.send(target, &buf)?;
            own(0, true, "after migration of one's own page")?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

impl Image {
    /// Checks only the first pages.
    fn check_after(&self, buf: &Buffer) -> Outcome {
        buf.check(0, 2, self.0[0])
    }
}

/// Pages on the device, in system memory, of zeroes, and missing ones lie next to each other. Three
/// processes write all of them, each in another order.
fn mixture(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        const N: usize = 40;
        let buf = Buffer::anon(N)?;
        buf.fill(0, 16, 1140);
        buf.check_zero(16, 8)?;
        target.to_device(&buf, 0, 8).or_fail("MIGRATE_TO_DEV")?;
        target.to_device(&buf, 20, 8).or_fail("MIGRATE_TO_DEV")?;
        target.expect(&buf, 0, N, 16)?;
        let turn = |who: usize| -> Outcome {
            buf.check(0, 16, 1140)?;
            buf.check_zero(16, N - 16)?;
            for i in 0..N {
                let page = (i * 7 + who * 13) % N;
                buf.fill(page, 1, 1141 + who as u64);
            }
            buf.check(0, N, 1141 + who as u64)?;
            let own = Target::open(ctx, node)?;
            own.move_all_again(&buf, 1141 + who as u64)
        };
        let child = Child::spawn(|| {
            let grandchild = Child::spawn(|| turn(2))?;
            turn(1)?;
            grandchild.join()?;
            buf.check(0, N, 1142)
        })?;
        turn(0)?;
        child.join()?;
        buf.check(0, N, 1141)
    })
}

impl Target {
    /// Moves a whole buffer, some of which may already be on the device.
    #[track_caller]
    fn move_all_again(&self, buf: &Buffer, seed: u64) -> Outcome {
        Image::new(buf.pages(), seed).send(self, buf)
    }
}

/// Many children write at once to different pages of the same huge page, or to small ones, while
/// the parent migrates them there and back.
fn siblings(ctx: &Ctx, node: usize) -> Outcome {
    const CHILDREN: usize = 6;
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1150)?;
            let n = buf.pages();
            let image = Image::new(n, 1150);
            image.send(target, &buf)?;
            let children: Vec<_> = (0..CHILDREN)
                .map(|i| {
                    Child::spawn(|| {
                        let mut image = image.clone();
                        for page in (i..n).step_by(CHILDREN + 1) {
                            image.fill(&buf, page, 1, 1151 + i as u64);
                        }
                        image.check(&buf)?;
                        let own = Target::open(ctx, node)?;
                        // Pages that other processes use at this moment stay.
                        let _ = own.to_device(&buf, 0, n);
                        image.check_device(&own, &buf)?;
                        image.check(&buf)
                    })
                })
                .collect::<Outcome<_>>()?;
            for _ in 0..4 {
                // Pages that a child faults in at this moment stay this time.
                let _ = target.to_device(&buf, 0, n);
                let _ = target.to_system(&buf, 0, n);
            }
            for child in children {
                child.join()?;
            }
            image.check(&buf)?;
            image.send(target, &buf)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

/// A parent forks again before the last child has ended, with a write and a migration in between:
/// each child has the data of the time of its fork.
fn again_and_again(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1160)?;
            let n = buf.pages();
            let mut image = Image::new(n, 1160);
            let mut children = Vec::new();
            for round in 0..5 {
                image.send(target, &buf)?;
                let seen = image.clone();
                let buf = &buf;
                children.push(Waiting::start(
                    || Ok(()),
                    move || {
                        seen.check(buf)?;
                        buf.fill(0, n, 1169);
                        buf.check(0, n, 1169)
                    },
                )?);
                image.fill(buf, round * 5, 9, 1161 + round as u64);
                image.check(buf)?;
                if round == 3 {
                    // End one from the middle.
                    children.remove(1).join()?;
                }
            }
            // End the others from the last to the first.
            while let Some(child) = children.pop() {
                child.join()?;
                image.check_device(target, &buf)?;
            }
            image.check(&buf)
        })?;
    }
    Ok(())
}
