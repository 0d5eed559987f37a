// SPDX-License-Identifier: GPL-2.0

//! Threads on other processors read and write through every operation that replaces an entry of the
//! page table. A missing TLB flush shows: a write through the old translation is lost, and a read
//! through it returns old data.
//!
//! Each writer has a word of its own in every page and knows its last value; each reader checks
//! that no word ever decreases.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::chain::{SIZES, spread};
use super::leak::settled;
use super::swap::swap_out;
use super::target::{Target, huge_filled};
use super::{Ctx, Test};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES};
use crate::swap::Swap;
use crate::threads::{self, SetOnDrop};
use crate::uffd::Uffd;
use crate::{check, check_eq, proc, sys};

pub const TESTS: &[Test] = of_each_kind!("tlb":
    "migrate" => migrate,
    "other_device" => other_device,
    "exclusive" => exclusive,
    "release" => release,
    "split" => split,
    "collapse" => collapse,
    "protect" => protect,
    "fork" => fork,
    "swap_out" => swapped_out,
    "mremap" => mremap,
    "moved" => moved,
    "beside_pinned" => beside_pinned,
    "zero_page" => zero_page,
);

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// How long each operation is repeated, for each size.
const TIME: Duration = Duration::from_millis(600);
/// The pages of a small buffer: few, so that each is accessed often.
const SMALL: usize = 3;
/// The number of writing threads, each with its own word.
const WRITERS: usize = 2;
/// The word of the first writer.
const WORD: usize = 8;

/// Counts in the words of writer `me` until `over` is set. Returns the last value.
fn write(buf: &Buffer, me: usize, over: &AtomicBool, ready: &AtomicUsize) -> Outcome<u64> {
    let pages = spread(buf.pages());
    let mut steps = 0;
    loop {
        let last = over.load(Ordering::SeqCst);
        for page in pages {
            let found = buf.get(page, WORD + me);
            check_eq!(
                found,
                steps,
                "word of writer {me} in page {page}, before a step"
            );
            buf.set(page, WORD + me, steps + 1);
        }
        steps += 1;
        if steps == 1 {
            ready.fetch_add(1, Ordering::SeqCst);
        }
        if last {
            return Ok(steps);
        }
    }
}

/// Reads all words until `over` is set, and checks that none decreases.
fn read(buf: &Buffer, over: &AtomicBool) -> Outcome {
    let pages = spread(buf.pages());
    let mut seen = [[0; WRITERS]; 3];
    while !over.load(Ordering::SeqCst) {
        for (page, seen) in pages.iter().zip(&mut seen) {
            for (me, seen) in seen.iter_mut().enumerate() {
                let found = buf.get(*page, WORD + me);
                check!(
                    found >= *seen,
                    "word of writer {me} in page {page}: expected {seen} or more, found {found}"
                );
                *seen = found;
            }
        }
    }
    Ok(())
}

/// Repeats an operation on a buffer of zeroes while threads write to it and read it.
#[track_caller]
fn through(buf: &Buffer, mut operation: impl FnMut(usize) -> Outcome) -> Outcome<usize> {
    let (over, ready) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (over, ready) = (&over, &ready);
        let writers: Vec<_> = (0..WRITERS)
            .map(|me| {
                scope.spawn(move || {
                    // The other threads end if this one does.
                    let _over = SetOnDrop(over);
                    write(buf, me, over, ready)
                })
            })
            .collect();
        let reader = scope.spawn(|| read(buf, over));
        let began = sys::wait_until(Duration::from_secs(20), || {
            ready.load(Ordering::SeqCst) == WRITERS
        });
        let guard = SetOnDrop(over);
        let start = Instant::now();
        let mut rounds = 0;
        let mut result = Ok(());
        // Run for the given time, and at least some rounds on a busy machine.
        while result.is_ok()
            && began
            && !over.load(Ordering::SeqCst)
            && (start.elapsed() < TIME || (rounds < 8 && start.elapsed() < 20 * TIME))
        {
            result = operation(rounds);
            rounds += 1;
        }
        drop(guard);
        let mut steps = Vec::new();
        for writer in writers {
            steps.push(threads::join(writer)?);
        }
        threads::join(reader)?;
        result?;
        for page in spread(buf.pages()) {
            for (me, steps) in steps.iter().enumerate() {
                let found = buf.get(page, WORD + me);
                check_eq!(
                    found,
                    *steps,
                    "word of writer {me} in page {page} in the end"
                );
            }
        }
        check!(began && rounds > 1, "rounds: expected some, found {rounds}");
        Ok(rounds)
    })
}

/// Runs `body` with a buffer of each size that is all zeroes.
fn each(ctx: &Ctx, node: usize, body: impl Fn(&Target, &Buffer, bool) -> Outcome) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = match huge {
                false => Buffer::filled(SMALL, 1)?,
                true => huge_filled(1, 1)?,
            };
            for page in spread(buf.pages()) {
                for me in 0..WRITERS {
                    buf.set(page, WORD + me, 0);
                }
            }
            body(target, &buf, huge)
        })?;
    }
    Ok(())
}

/// Checks that something has moved, because otherwise the test proves nothing.
fn expect_moved(target: &Target, before: u64) -> Outcome {
    let went = target.stats()?.to_device.wrapping_sub(before);
    check!(went > 0, "pages that went: expected some, found none");
    Ok(())
}

/// To the device and back. Pages that other threads hold for a moment stay; that is no failure.
fn migrate(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        let before = target.stats()?.to_device;
        through(buf, |_| {
            let _ = target.to_device(buf, 0, buf.pages());
            if target.cpu_maps() {
                let _ = target.to_system(buf, 0, buf.pages());
            }
            Ok(())
        })?;
        expect_moved(target, before)
    })
}

/// Pages migrate from one device to the other.
fn other_device(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        let other = Target::open(ctx, node + 1)?;
        let before = target.stats()?.to_device;
        through(buf, |round| {
            let device = if round % 2 == 0 { target } else { &other };
            let _ = device.to_device(buf, 0, buf.pages());
            Ok(())
        })?;
        expect_moved(target, before)
    })
}

/// Exclusive access removes the entries, and each access of the CPU restores one.
fn exclusive(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        if target.cpu_maps() {
            let _ = target.to_device(buf, 0, buf.pages());
        }
        let mut taken = 0;
        through(buf, |_| {
            let n = buf.pages().min(4);
            taken += usize::from(target.exclusive(buf, 0, n).is_ok());
            taken += usize::from(target.exclusive(buf, buf.pages() - 1, 1).is_ok());
            Ok(())
        })?;
        check!(taken > 0, "times of exclusive access: expected some");
        Ok(())
    })
}

/// The device gives up all of its memory.
fn release(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        let before = target.stats()?.to_device;
        through(buf, |_| {
            let _ = target.to_device(buf, 0, buf.pages());
            // Pages in use at this moment may stay.
            let _ = target.release();
            Ok(())
        })?;
        expect_moved(target, before)
    })
}

/// Other rights of an unused page split a huge entry, in system memory and on the device.
fn split(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, huge| {
        if !huge {
            return Ok(());
        }
        through(buf, |_| {
            let _ = target.to_device(buf, 0, HUGE_PAGES);
            buf.protect(7, 1, libc::PROT_READ)?;
            buf.protect(7, 1, RW)?;
            // Then split the folio itself by migrating a part of it.
            let _ = target.to_system(buf, 100, 30);
            let _ = target.to_system(buf, 0, HUGE_PAGES);
            let _ = buf.try_advise(0, HUGE_PAGES, libc::MADV_COLLAPSE);
            Ok(())
        })
        .map(drop)
    })
}

/// Small pages become a huge one.
fn collapse(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, huge| {
        if !huge {
            return Ok(());
        }
        through(buf, |round| {
            buf.protect(7, 1, libc::PROT_READ)?;
            buf.protect(7, 1, RW)?;
            if round % 2 == 1 {
                let _ = target.to_device(buf, 200, 8);
            }
            // Pages of a device or in use are not collapsed.
            let _ = buf.try_advise(0, HUGE_PAGES, libc::MADV_COLLAPSE);
            let _ = target.to_system(buf, 200, 8);
            Ok(())
        })
        .map(drop)
    })
}

/// After mprotect() a read-only page is so for all threads at once: its value no longer changes.
/// Other threads must not write, so this test has a writer of its own, which dies of the write.
fn protect(ctx: &Ctx, node: usize) -> Outcome {
    for away in [false, true] {
        each(ctx, node, |target, buf, _| {
            let n = buf.pages();
            if away {
                target.to_device(buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            }
            let child = crate::harness::Child::spawn(|| {
                let over = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    let writer = scope.spawn(|| {
                        let mut value = 0;
                        loop {
                            for page in spread(n) {
                                value += 1;
                                buf.set(page, WORD, value);
                            }
                            if over.load(Ordering::SeqCst) {
                                return;
                            }
                        }
                    });
                    std::thread::sleep(Duration::from_millis(30));
                    buf.protect(0, n, libc::PROT_READ)?;
                    // Only a writer with an old translation can change the value now.
                    for _ in 0..200 {
                        for page in spread(n) {
                            let first = buf.get(page, WORD);
                            std::thread::yield_now();
                            if buf.get(page, WORD) != first {
                                sys::exit_now(77);
                            }
                        }
                    }
                    std::thread::sleep(Duration::from_secs(5));
                    over.store(true, Ordering::SeqCst);
                    drop(writer);
                    Ok(())
                })
            })?;
            check_eq!(
                child.exit()?,
                sys::Exit::Signal(libc::SIGSEGV),
                "end of who writes to what has become read-only"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// A child's memory is a snapshot of one moment: it does not see later writes of the parent's
/// threads.
fn fork(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        let pages = spread(buf.pages());
        through(buf, |round| {
            if round % 2 == 0 {
                let _ = target.to_device(buf, 0, buf.pages());
            }
            // The child takes no lock and allocates nothing, because a thread of the parent may
            // have held a lock at that moment.
            let pid = sys::fork(|| {
                let all = || pages.map(|page| [0, 1].map(|me| buf.get(page, WORD + me)));
                let first = all();
                for _ in 0..20 {
                    std::thread::sleep(Duration::from_micros(200));
                    if all() != first {
                        return 77;
                    }
                }
                0
            })
            .or_fail("fork")?;
            let end = sys::wait(pid, true).or_fail("waitpid")?;
            check_eq!(
                end,
                Some((pid, sys::Exit::Code(0))),
                "end of a child whose memory does not change"
            );
            Ok(())
        })
        .map(drop)
    })
}

/// Pages are swapped out and read back.
fn swapped_out(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        let _swap = Swap::on()?;
        through(buf, |round| {
            let _ = buf.try_advise(0, buf.pages(), libc::MADV_PAGEOUT);
            if round % 3 == 0 {
                let _ = target.to_device(buf, 0, buf.pages());
            }
            if round % 3 == 1 {
                let _ = target.to_system(buf, 0, buf.pages());
            }
            Ok(())
        })?;
        let n = buf.pages() - target.on_device(buf, 0, buf.pages())?;
        swap_out(buf, 0, buf.pages(), n)
    })
}

/// Pages move to another address with all earlier writes. Threads read at the old address, where
/// they find nothing or the old data, but nothing else.
fn mremap(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        let n = buf.pages();
        let place = Buffer::anon_huge_aligned(n)?;
        let page = n / 2;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| -> Outcome {
                while !over.load(Ordering::SeqCst) {
                    let (here, there) = (buf.get(page, WORD), place.get(page, WORD));
                    check!(
                        here <= 1 && there <= 1,
                        "word at the old and the new place: expected 0 or 1, found {here}, {there}"
                    );
                }
                Ok(())
            });
            let guard = SetOnDrop(&over);
            let start = Instant::now();
            let mut result = Ok(());
            while start.elapsed() < TIME && result.is_ok() {
                result = (|| {
                    buf.set(page, WORD, 1);
                    let _ = target.to_device(buf, 0, n);
                    buf.move_contents(0, n, &place, 0)?;
                    // The old address now has another page.
                    buf.set(page, WORD, 0);
                    check_eq!(place.get(page, WORD), 1, "word at the new place");
                    check_eq!(buf.get(page, WORD), 0, "word at the old place");
                    place.advise(0, n, libc::MADV_DONTNEED)
                })();
            }
            drop(guard);
            threads::join(reader)?;
            result
        })
    })
}

/// What takes a page away from an address.
type Move = fn(&Uffd, &Buffer, &Buffer) -> bool;

const MOVES: [Move; 2] = [
    |_, from, to| from.move_contents(0, from.pages(), to, 0).is_ok(),
    |uffd, from, to| {
        // Pages of devices, and those that another task looks at, stay.
        let moved = uffd.move_pages(from, 0, from.pages(), to, 0);
        moved.is_ok_and(|n| n == from.pages())
    },
];

/// Once a page is at another address, no access by way of the old one changes it. A thread goes on
/// writing there, and gets pages of zeroes.
fn moved(ctx: &Ctx, node: usize) -> Outcome {
    for take_away in MOVES {
        each(ctx, node, |target, buf, huge| {
            let n = buf.pages();
            let place = Buffer::anon_huge_aligned(n)?;
            if huge {
                place.advise(0, n, libc::MADV_HUGEPAGE)?;
            }
            let uffd = Uffd::new().or_fail("userfaultfd")?;
            uffd.register(&place, 0, n).or_fail("UFFDIO_REGISTER")?;
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for page in spread(n).into_iter().take(WRITERS) {
                    let over = &over;
                    scope.spawn(move || {
                        let mut value = 0;
                        while !over.load(Ordering::SeqCst) {
                            value += 1;
                            buf.set(page, WORD, value);
                        }
                    });
                }
                let _guard = SetOnDrop(&over);
                let (start, mut times) = (Instant::now(), 0);
                while start.elapsed() < TIME || (times < 8 && start.elapsed() < 10 * TIME) {
                    if start.elapsed().as_millis() % 2 == 0 {
                        let _ = target.to_device(buf, 0, n);
                    }
                    // A hole is not moved: the threads fill some pages, and this one the others.
                    for page in 0..n {
                        buf.set(page, WORD - 1, 1);
                    }
                    if !take_away(&uffd, buf, &place) {
                        place.advise(0, n, libc::MADV_DONTNEED)?;
                        continue;
                    }
                    times += 1;
                    for page in spread(n).into_iter().take(WRITERS) {
                        let first = place.get(page, WORD);
                        std::thread::sleep(Duration::from_micros(300));
                        check_eq!(
                            place.get(page, WORD),
                            first,
                            "word of page {page} at the new address, which nobody writes"
                        );
                    }
                    place.advise(0, n, libc::MADV_DONTNEED)?;
                }
                check!(times > 0, "times that all pages moved: expected some");
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// A page migrates although its neighbour in the same range, which is a part of a large folio, is
/// pinned and stays: threads that write to the page find it where it is now.
fn beside_pinned(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let buf = huge_filled(1, 1)?;
        let n = buf.pages();
        // Small entries of the large folio, and a small page in front of them.
        buf.advise(0, n, libc::MADV_NOHUGEPAGE)?;
        buf.advise(0, 1, libc::MADV_DONTNEED)?;
        for page in spread(n) {
            for me in 0..WRITERS {
                buf.set(page, WORD + me, 0);
            }
        }
        let id = target.pin(&buf, 5, 1, 0).or_fail("ZDM_PIN")?;
        proc::drain_batches()?;
        let before = target.stats()?.to_device;
        through(&buf, |_| {
            let _ = target.to_device(&buf, 0, n);
            let _ = target.to_system(&buf, 0, 1);
            Ok(())
        })?;
        target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        expect_moved(target, before)
    })
}

/// The shared zero page, which other threads read, is replaced by a page on the device and by a
/// page of the system; every thread then reads the written data.
fn zero_page(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, |target, buf, _| {
        let n = buf.pages();
        let [page, ..] = spread(n);
        let (over, value) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            // The reader must find the value that was published before it read the page, or a zero
            // if the page was dropped.
            let reader = scope.spawn(|| -> Outcome {
                while !over.load(Ordering::SeqCst) {
                    let said = value.load(Ordering::SeqCst);
                    let found = buf.get(page, WORD) as usize;
                    if said % 2 == 1 && value.load(Ordering::SeqCst) == said {
                        check_eq!(found, said, "word that was written over a page of zeroes");
                    }
                }
                Ok(())
            });
            let guard = SetOnDrop(&over);
            let start = Instant::now();
            let mut round = 0;
            let mut result = Ok(());
            while start.elapsed() < TIME && result.is_ok() {
                result = (|| {
                    // An even number says that a write is in progress; an odd one that the page has
                    // this value until the number is even again.
                    value.store(2 * round, Ordering::SeqCst);
                    buf.advise(0, n, libc::MADV_DONTNEED)?;
                    check_eq!(buf.get(page, WORD), 0, "word of a page that was given up");
                    if round % 2 == 0 {
                        let _ = target.to_device(buf, 0, n);
                    }
                    buf.set(page, WORD, 2 * round as u64 + 1);
                    value.store(2 * round + 1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(300));
                    check_eq!(buf.get(page, WORD), 2 * round as u64 + 1, "word written");
                    Ok(())
                })();
                round += 1;
            }
            drop(guard);
            threads::join(reader)?;
            result
        })
    })
}
