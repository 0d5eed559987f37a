// SPDX-License-Identifier: GPL-2.0

//! Every way in which exclusive access ends, with the counts of the pages before and after: no
//! reference is left over or lost. Where the CPU maps device pages, the exclusive pages are on the
//! device and their counts are read by page frame; leaked system pages show in the cgroup
//! (`leak.rs`). `exclusive.rs` tests the device's accesses.

use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, check_bytes};
use crate::harness::Child;
use crate::swap::Swap;
use crate::sys::{self, Exit};
use crate::tests::counts::{Counts, MAPPED, Waiting, expect_frames, expect_free, frames};
use crate::tests::leak::settled;
use crate::tests::target::{Target, huge_filled};
use crate::tests::{Ctx, PAGES, Test};
use crate::uapi::{ZDM_PIN_FAST, ZDM_PIN_GET, ZDM_PIN_LONGTERM, ZDM_PIN_WRITE};
use crate::{check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("exclusive":
    "end_cpu" => end_cpu,
    "end_munmap" => end_munmap,
    "end_mprotect" => end_mprotect,
    "end_mremap" => end_mremap,
    "end_fork" => end_fork,
    "end_exit" => end_exit,
    "end_kill" => end_kill,
    "end_close" => end_close,
    "end_pin" => end_pin,
    "end_advice" => end_advice,
    "end_migration" => end_migration,
    "end_other_file" => end_other_file,
    "end_huge" => end_huge,
    "end_swap" => end_swap,
);

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Exclusive pages, and their frames if they are on a device.
struct Held {
    buf: Buffer,
    pfns: Vec<u64>,
}

/// Makes a buffer with the pattern of `seed`, on the device if the CPU maps device pages, and takes
/// exclusive access to every page.
#[track_caller]
fn held(target: &Target, seed: u64) -> Outcome<Held> {
    let buf = Buffer::filled(PAGES, seed)?;
    let mut pfns = Vec::new();
    if target.cpu_maps() {
        target.move_all(&buf, seed)?;
        pfns = frames(target, &buf, 0, PAGES)?;
    }
    take(target, &buf, seed)?;
    let held = Held { buf, pfns };
    // The removed entry had one reference, the entry in its place has one.
    held.expect(target, 0, PAGES, "held")?;
    Ok(held)
}

#[track_caller]
fn take(target: &Target, buf: &Buffer, seed: u64) -> Outcome {
    super::keep();
    let taken = target.exclusive(buf, 0, PAGES).or_fail("EXCLUSIVE")?;
    check_bytes(&taken.data, seed, 0, "data that EXCLUSIVE returned")?;
    for page in [0, PAGES / 2, PAGES - 1] {
        let result = target.check_exclusive(buf, page, 1);
        expect_errno(result, &[libc::EPERM], "CHECK_EXCLUSIVE of what is held")?;
    }
    check_eq!(proc::present(buf, 0, PAGES)?, 0, "present pages");
    Ok(())
}

impl Held {
    /// Checks that pages on the device have one mapping and one reference.
    #[track_caller]
    fn expect(&self, target: &Target, first: usize, n: usize, when: &str) -> Outcome {
        self.expect_counts(target, first, n, MAPPED, when)
    }

    #[track_caller]
    fn expect_counts(
        &self,
        target: &Target,
        first: usize,
        n: usize,
        counts: Counts,
        when: &str,
    ) -> Outcome {
        match self.pfns.is_empty() {
            true => Ok(()),
            false => expect_frames(target, &self.pfns[first..first + n], counts, when),
        }
    }

    /// Checks that pages on the device are free.
    #[track_caller]
    fn expect_free(&self, target: &Target, first: usize, n: usize, when: &str) -> Outcome {
        match self.pfns.is_empty() {
            true => Ok(()),
            false => expect_free(target, &self.pfns[first..first + n], when),
        }
    }

    /// Checks that no page is exclusive and that all have the pattern of `seed`. Then checks that
    /// they can become exclusive and can migrate again.
    #[track_caller]
    fn finish(self, target: &Target, seed: u64) -> Outcome {
        target
            .check_exclusive(&self.buf, 0, PAGES)
            .or_fail("CHECK_EXCLUSIVE of what is not held any more")?;
        self.buf.check(0, PAGES, seed)?;
        self.expect(target, 0, PAGES, "after exclusive access")?;
        take(target, &self.buf, seed)?;
        self.buf.check(0, PAGES, seed)?;
        target.bring_back(&self.buf, 0, PAGES)?;
        self.expect_free(target, 0, PAGES, "in the end")?;
        target.move_all(&self.buf, seed)?;
        self.buf.check(0, PAGES, seed)
    }
}

fn end_cpu(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let held = held(target, 2600)?;
        // The CPU reads and writes, and the kernel accesses the pages for the process.
        held.buf.check(0, 8, 2600)?;
        held.expect(target, 0, 8, "after a read")?;
        held.buf.fill(8, 8, 2600);
        held.expect(target, 8, 8, "after a write")?;
        let file = sys::memfd("zdm-exclusive").or_fail("memfd_create")?;
        held.buf.write_to(&file, 16, 8).or_fail("write")?;
        held.expect(target, 16, 8, "after write(2)")?;
        held.buf.check(24, PAGES - 24, 2600)?;
        held.finish(target, 2600)
    })
}

fn end_munmap(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let held = held(target, 2610)?;
        for (first, n) in [(0, 1), (PAGES - 1, 1), (8, 16)] {
            held.buf.unmap(first, n)?;
            held.expect_free(target, first, n, "unmapped while held")?;
        }
        held.buf.advise(32, 8, libc::MADV_DONTNEED)?;
        held.expect_free(target, 32, 8, "thrown away while held")?;
        held.buf.check_zero(32, 8)?;
        held.expect(target, 40, 8, "held beside a hole")?;
        held.buf.check(40, PAGES - 41, 2610)?;
        held.buf.check(1, 7, 2610)
    })
}

fn end_mprotect(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let held = held(target, 2620)?;
        for rights in [libc::PROT_READ, libc::PROT_NONE] {
            held.buf.protect(0, PAGES, rights)?;
            held.expect(target, 0, PAGES, "without rights")?;
            held.buf.protect(0, PAGES, RW)?;
            held.expect(target, 0, PAGES, "with rights again")?;
        }
        held.buf.check(0, PAGES, 2620)?;
        held.finish(target, 2620)
    })
}

fn end_mremap(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let Held { buf, pfns } = held(target, 2630)?;
        let place = Buffer::anon(PAGES)?;
        buf.move_pages(0, PAGES / 2, &place, 0)?;
        buf.move_contents(PAGES / 2, PAGES / 2, &place, PAGES / 2)?;
        let moved = Held { buf: place, pfns };
        moved.expect(target, 0, PAGES, "after mremap")?;
        moved.buf.check(0, PAGES, 2630)?;
        buf.check_zero(PAGES / 2, PAGES / 2)?;
        moved.finish(target, 2630)
    })
}

fn end_fork(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let held = held(target, 2640)?;
        let child = Waiting::start(
            || held.buf.check(0, PAGES / 2, 2640),
            || held.buf.check(0, PAGES, 2640),
        )?;
        held.expect_counts(target, 0, PAGES, [2, 2, 0], "shared by two")?;
        target
            .check_exclusive(&held.buf, 0, PAGES)
            .or_fail("CHECK_EXCLUSIVE after fork")?;
        child.join()?;
        held.expect(target, 0, PAGES, "after the child's end")?;
        held.finish(target, 2640)
    })
}

/// The process whose pages the device has ends.
fn ending(ctx: &Ctx, node: usize, signal: Option<i32>) -> Outcome {
    settled(ctx, node, |target| {
        for _ in 0..3 {
            let (news, say) = sys::pipe().or_fail("pipe")?;
            let child = Child::spawn(|| {
                let own = Target::open(ctx, node)?;
                let _held = held(&own, 2650)?;
                std::io::Write::write_all(&mut &say, b"n").or_fail("pipe")?;
                match signal {
                    None => sys::exit_now(0),
                    Some(_) => loop {
                        std::thread::sleep(Duration::from_secs(1));
                    },
                }
            })?;
            drop(say);
            let begun = sys::readable(&news, Duration::from_secs(20)).or_fail("poll")?;
            let exit = match signal {
                None => child.exit()?,
                Some(signal) => child.end(signal)?,
            };
            let expected = signal.map_or(Exit::Code(0), Exit::Signal);
            check_eq!(
                (begun, exit),
                (true, expected),
                "begin and end of the child"
            );
            target.expect_empty()?;
        }
        Ok(())
    })
}

fn end_exit(ctx: &Ctx, node: usize) -> Outcome {
    ending(ctx, node, None)
}

fn end_kill(ctx: &Ctx, node: usize) -> Outcome {
    ending(ctx, node, Some(libc::SIGKILL))
}

/// The file with exclusive access is closed; another file owns the device pages.
fn end_close(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let buf = Buffer::filled(PAGES, 2660)?;
        let mut pfns = Vec::new();
        if target.cpu_maps() {
            target.move_all(&buf, 2660)?;
            pfns = frames(target, &buf, 0, PAGES)?;
        }
        let other = Target::open(ctx, node)?;
        take(&other, &buf, 2660)?;
        drop(other);
        let left = Held { buf, pfns };
        left.expect(target, 0, PAGES, "after close of the file that held them")?;
        left.buf.check(0, PAGES, 2660)?;
        left.finish(target, 2660)
    })
}

/// Pins of every flavour end the access and get the same page.
fn end_pin(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        for flags in [
            ZDM_PIN_GET,
            ZDM_PIN_GET | ZDM_PIN_WRITE | ZDM_PIN_FAST,
            ZDM_PIN_WRITE,
            ZDM_PIN_FAST,
            ZDM_PIN_LONGTERM | ZDM_PIN_WRITE,
        ] {
            let held = held(target, 2670)?;
            let id = target
                .pin(&held.buf, 5, 9, flags)
                .or_fail(&format!("ZDM_PIN with {flags:#x}"))?;
            target
                .check_exclusive(&held.buf, 5, 9)
                .or_fail("CHECK_EXCLUSIVE of what is pinned")?;
            held.buf.check(5, 9, 2670)?;
            target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            held.buf.check(0, PAGES, 2670)?;
            // A long-term pin has moved COHERENT pages off the device.
            if flags & ZDM_PIN_LONGTERM == 0 || target.keeps_pinned() {
                held.finish(target, 2670)?;
            }
        }
        Ok(())
    })
}

/// Advice, mlock and prefaulting.
fn end_advice(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let held = held(target, 2680)?;
        for advice in [libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_FREE] {
            held.buf.advise(0, PAGES, advice)?;
            held.expect(target, 0, PAGES, "after advice")?;
        }
        held.buf.advise(0, 8, libc::MADV_POPULATE_READ)?;
        held.buf.advise(8, 8, libc::MADV_POPULATE_WRITE)?;
        held.expect(target, 0, PAGES, "after prefaulting")?;
        held.buf.lock(16, 8, true)?;
        held.buf.lock(16, 8, false)?;
        held.expect(target, 0, PAGES, "after mlock and munlock")?;
        held.buf.check(0, PAGES, 2680)?;
        held.finish(target, 2680)
    })
}

/// A migration does not take exclusive pages; it takes them after the access has ended.
fn end_migration(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let held = held(target, 2690)?;
        if target.cpu_maps() {
            target
                .to_system(&held.buf, 0, PAGES)
                .or_fail("MIGRATE_TO_SYS of what is held")?;
            held.expect(target, 0, PAGES, "after MIGRATE_TO_SYS")?;
        } else {
            let result = target.to_device(&held.buf, 0, PAGES);
            // The driver may return the data of pages that did not move.
            if let Err(e) = result {
                check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
            }
            target.expect(&held.buf, 0, PAGES, 0)?;
        }
        held.buf.check(0, PAGES, 2690)?;
        held.finish(target, 2690)
    })
}

/// Another file takes exclusive access, or only reads the pages.
fn end_other_file(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let mine = held(target, 2700)?;
        let other = Target::open(ctx, node)?;
        let read = other.read(&mine.buf, 0, PAGES / 2).or_fail("READ")?;
        check_bytes(&read.data, 2700, 0, "READ by another file")?;
        mine.expect(target, 0, PAGES, "after READ by another file")?;
        take(&other, &mine.buf, 2700)?;
        mine.expect(target, 0, PAGES, "held by another file")?;
        target
            .check_exclusive(&mine.buf, 0, PAGES)
            .or_fail("CHECK_EXCLUSIVE of what another has taken")?;
        take(target, &mine.buf, 2700)?;
        mine.buf.check(0, PAGES, 2700)?;
        mine.finish(target, 2700)
    })
}

/// Pages of a huge one are exclusive, and the access ends in several ways.
fn end_huge(ctx: &Ctx, node: usize) -> Outcome {
    const N: usize = HUGE_PAGES;
    settled(ctx, node, |target| {
        for how in 0..4 {
            let buf = huge_filled(1, 2710)?;
            if target.cpu_maps() {
                target.move_huge(&buf, 2710)?;
            }
            for page in [0, N / 2, N - 1] {
                let taken = target.exclusive(&buf, page, 1).or_fail("EXCLUSIVE")?;
                check_bytes(&taken.data, 2710, page, "data that EXCLUSIVE returned")?;
            }
            match how {
                0 => {}
                1 => Child::spawn(|| buf.check(0, N, 2710))?.join()?,
                2 => {
                    buf.protect(0, N, libc::PROT_READ)?;
                    buf.protect(0, N, RW)?;
                }
                _ => {
                    buf.unmap(N / 2, N / 2)?;
                    buf.check(0, N / 2, 2710)?;
                    continue;
                }
            }
            buf.check(0, N, 2710)?;
            for page in target.inspect(&buf, 0, N).or_fail("ZDM_INSPECT")? {
                check_eq!(page.refs, page.mapcount, "references of what was held");
            }
            target.bring_back(&buf, 0, N)?;
            buf.check(0, N, 2710)?;
        }
        target.expect_empty()
    })
}

/// The access ends with swap on, and during swapoff.
fn end_swap(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let swap = Swap::on()?;
        let held = held(target, 2720)?;
        held.buf.advise(0, PAGES, libc::MADV_PAGEOUT)?;
        held.expect(target, 0, PAGES, "after MADV_PAGEOUT")?;
        swap.off()?;
        held.expect(target, 0, PAGES, "after swapoff")?;
        match proc::swapped(&held.buf, 0, PAGES)? {
            0 => {}
            n => {
                return Err(Fail::failed(format!(
                    "pages in swap after swapoff: expected none, found {n}"
                )));
            }
        }
        held.buf.check(0, PAGES, 2720)?;
        held.finish(target, 2720)
    })
}
