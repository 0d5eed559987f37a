// SPDX-License-Identifier: GPL-2.0

//! Small and huge pages use the same device memory for any length of time: memory that comes back
//! can be used for either size again.

use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, Test, test, with};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, HUGE_PAGES, check_bytes};
use crate::harness::{Child, note};
use crate::sys;
use crate::threads;
use crate::{check, check_eq};

const N: usize = HUGE_PAGES;
const TWO: &str = "devmem_chunk_mb=2";
const FOUR: &str = "devmem_chunk_mb=4";
/// A chunk that a test can fill page by page: larger than one batch of a migration, and full soon.
const FILLED: &str = "devmem_chunk_mb=64";

pub const TESTS: &[Test] = &[
    test("allocator.threads", threads::<PRIVATE>),
    test("allocator.processes", processes::<PRIVATE>),
    test("allocator_coherent.threads", threads::<COHERENT>),
    test("allocator_coherent.processes", processes::<COHERENT>),
    test("allocator_generic.threads", threads::<GENERIC>),
    test("allocator_generic.processes", processes::<GENERIC>),
    with(TWO, test("allocator.one_huge", one_huge)),
    with(
        TWO,
        test("allocator_coherent.one_huge", one_huge_only::<COHERENT>),
    ),
    with(
        TWO,
        test("allocator_generic.one_huge", one_huge_only::<GENERIC>),
    ),
    with(FILLED, test("allocator.fill", fill::<PRIVATE>)),
    with(FILLED, test("allocator_coherent.fill", fill::<COHERENT>)),
    with(FILLED, test("allocator_generic.fill", fill::<GENERIC>)),
    with(FOUR, test("allocator.growth", growth)),
    with(FOUR, test("allocator.fragments", fragments::<PRIVATE>)),
    with(FOUR, test("allocator.random", random::<PRIVATE>)),
    with(
        FOUR,
        test("allocator_coherent.fragments", fragments::<COHERENT>),
    ),
    with(FOUR, test("allocator_coherent.random", random::<COHERENT>)),
    with(
        FOUR,
        test("allocator_generic.fragments", fragments::<GENERIC>),
    ),
    with(FOUR, test("allocator_generic.random", random::<GENERIC>)),
];

/// The number of pages of device memory.
#[track_caller]
fn capacity(device: &Device) -> Outcome<usize> {
    Ok(device.audit()?.0.pages as usize)
}

/// Makes the device give back the chunks that earlier tests added. Returns the initial number of
/// pages.
#[track_caller]
fn start_over(target: &Target) -> Outcome<usize> {
    target.release().or_fail("RELEASE")?;
    let one = Buffer::filled(1, 399)?;
    target.move_all(&one, 399)?;
    target.bring_back(&one, 0, 1)?;
    target.expect_empty()?;
    capacity(target)
}

/// With chunks of one huge page, each additional huge page in use takes one more chunk, and no
/// chunk is used twice.
fn one_huge(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    check_eq!(start_over(&target)?, N, "pages in the beginning");
    for _ in 0..3 {
        let first = huge_filled(1, 400)?;
        target.move_huge(&first, 400)?;
        let second = huge_filled(1, 401)?;
        target.move_huge(&second, 401)?;
        check_eq!(capacity(&target)?, 2 * N, "pages with two huge ones used");
        drop(first);
        let third = huge_filled(1, 402)?;
        target.move_huge(&third, 402)?;
        check_eq!(capacity(&target)?, 2 * N, "pages after one came back");
        second.check(0, N, 401)?;
        third.check(0, N, 402)?;
    }
    // A small page in a chunk leaves no room for a huge one; its return makes room again.
    let small = Buffer::filled(1, 403)?;
    target.move_all(&small, 403)?;
    let huge = huge_filled(1, 404)?;
    target.move_huge(&huge, 404)?;
    check_eq!(
        capacity(&target)?,
        2 * N,
        "pages with a small and a huge one"
    );
    small.check(0, 1, 403)?;
    let second = huge_filled(1, 405)?;
    target.move_huge(&second, 405)?;
    check_eq!(capacity(&target)?, 2 * N, "pages with two huge ones again");
    huge.check(0, N, 404)?;
    second.check(0, N, 405)
}

/// COHERENT and GENERIC memory does not grow: a page for which there is no room stays in system
/// memory, whole.
fn one_huge_only<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    check_eq!(capacity(&target)?, N, "pages of the device");
    let first = huge_filled(1, 406)?;
    let second = huge_filled(1, 407)?;
    for _ in 0..3 {
        target.move_all(&first, 406)?;
        let before = target.stats()?;
        let result = target.to_device(&second, 0, N);
        expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV without room")?;
        target.expect(&second, 0, N, 0)?;
        let failed = target
            .stats()?
            .failed_alloc
            .wrapping_sub(before.failed_alloc);
        check_eq!(failed, N as u64, "growth of stats.failed_alloc");
        check_eq!(capacity(&target)?, N, "pages of the device");
        second.check(0, N, 407)?;

        target.bring_back(&first, 0, N)?;
        target.move_all(&second, 407)?;
        target.bring_back(&second, 0, N)?;
        first.check(0, N, 406)?;
        second.check(0, N, 407)?;
    }
    target.expect_empty()
}

/// One page more than a chunk has makes the device grow by the necessary chunks only.
fn growth(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let chunk = 2 * N;
    check_eq!(start_over(&target)?, chunk, "pages in the beginning");
    let buf = Buffer::filled(chunk, 410)?;
    target.move_all(&buf, 410)?;
    check_eq!(capacity(&target)?, chunk, "pages with all of them used");
    check_eq!(target.audit()?.0.free, 0, "free pages");
    let more = Buffer::filled(1, 411)?;
    target.move_all(&more, 411)?;
    check_eq!(capacity(&target)?, 2 * chunk, "pages with one more used");
    for _ in 0..3 {
        buf.check(0, chunk, 410)?;
        target.expect(&buf, 0, chunk, 0)?;
        target.move_all(&buf, 410)?;
        check_eq!(capacity(&target)?, 2 * chunk, "pages after a round");
    }
    more.check(0, 1, 411)?;
    buf.check(0, chunk, 410)?;
    target.expect_empty()?;
    // One command reads, and one eviction frees, pages of two chunks.
    let all = Buffer::filled(2 * chunk, 412)?;
    target.move_all(&all, 412)?;
    check_eq!(capacity(&target)?, 2 * chunk, "pages with two chunks used");
    drop(target);
    all.check(0, 2 * chunk, 412)
}

/// Fills all memory with small pages, frees every other one and asks for a huge page; then frees
/// all and fills the memory with huge pages. Each round must go like the previous one.
fn fragments<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const ALL: usize = 2 * N;
    let target = Target::open(ctx, NODE)?;
    check_eq!(start_over(&target)?, ALL, "pages in the beginning");
    let mut largest = 0;
    for round in 0..8 {
        let small = Buffer::filled(ALL, 420)?;
        target.move_all(&small, 420)?;
        for page in (round % 2..ALL).step_by(2) {
            small.unmap(page, 1)?;
        }
        check_eq!(target.audit()?.0.used, (ALL / 2) as u64, "used pages");
        let before = target.stats()?;
        let huge = huge_filled(1, 421)?;
        target.move_all(&huge, 421)?;
        // Only PRIVATE memory grows; the other kinds have no free place for a huge page left.
        match target.cpu_maps() {
            true => target.expect_large(&before, 0, 0, 1)?,
            false => target.expect_large(&before, 1, 0, 0)?,
        }
        for page in (1 - round % 2..ALL).step_by(2) {
            let read = target.read(&small, page, 1).or_fail("READ")?;
            check_bytes(&read.data, 420, page, "READ of a page between holes")?;
            small.check(page, 1, 420)?;
        }
        huge.check(0, N, 421)?;
        drop((small, huge));
        target.expect_empty()?;

        let huge = huge_filled(2, 422)?;
        target.move_huge(&huge, 422)?;
        huge.check(0, ALL, 422)?;
        drop(huge);
        target.expect_empty()?;
        let now = capacity(&target)?;
        check!(
            round < 1 || now == largest,
            "pages of the device after round {round}: expected {largest}, found {now}"
        );
        largest = now;
    }
    let limit = if target.cpu_maps() { ALL } else { 2 * ALL };
    check!(
        largest <= limit,
        "pages of the device: expected {limit} at most, found {largest}"
    );
    Ok(())
}

/// A sequence of numbers, the same in each run.
pub(super) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        // The constants are those of Knuth's MMIX.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// A buffer with its pattern and its mapped part.
struct Item {
    buf: Buffer,
    seed: u64,
    /// Pages from here on were unmapped.
    end: usize,
}

impl Item {
    fn check(&self) -> Outcome {
        self.buf.check(0, self.end, self.seed)
    }
}

/// Makes random use of small and huge pages, on a device that has too little memory for all of it.
fn random<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const STEPS: usize = 100;
    let target = Target::open(ctx, NODE)?;
    let mut random = Random(NODE as u64 + 1);
    let mut items: Vec<Item> = Vec::new();
    let mut kinds = [0; 6];
    for step in 0..STEPS {
        let kind = random.below(6);
        kinds[kind] += 1;
        if items.is_empty() || (kind == 0 && items.len() < 6) {
            let seed = 1000 + step as u64;
            let buf = match random.below(2) {
                0 => huge_filled(1, seed)?,
                _ => Buffer::filled(1 + random.below(N), seed)?,
            };
            let end = buf.pages();
            items.push(Item { buf, seed, end });
            continue;
        }
        let at = random.below(items.len());
        let item = &mut items[at];
        let first = random.below(item.end);
        let n = 1 + random.below(item.end - first);
        match kind {
            // Migrates all of it or a part; there may be no room.
            0..=2 => {
                let (first, n) = if kind == 2 { (first, n) } else { (0, item.end) };
                match target.to_device(&item.buf, first, n) {
                    Ok(m) => check_bytes(&m.data, item.seed, first, "returned data")?,
                    Err(e) => check_eq!(
                        (e.raw_os_error(), target.cpu_maps()),
                        (Some(libc::ENOENT), true),
                        "errno of MIGRATE_TO_DEV in step {step}"
                    ),
                }
            }
            3 => {
                target.bring_back(&item.buf, first, n)?;
                item.buf.check(first, n, item.seed)?;
            }
            4 => {
                let read = target.read(&item.buf, first, n).or_fail("READ")?;
                check_bytes(&read.data, item.seed, first, "READ")?;
            }
            // Unmaps the end of the buffer, or drops all of it.
            _ if first == 0 => drop(items.swap_remove(at)),
            _ => {
                item.buf.unmap(first, item.end - first)?;
                item.end = first;
            }
        }
        let (audit, records) = target.audit()?;
        check_eq!(audit.found, 0, "violations in step {step} ({records:x?})");
    }
    note(&format!("steps of each kind: {kinds:?}"));
    for item in &items {
        item.check()?;
        target.bring_back(&item.buf, 0, item.end)?;
        item.check()?;
    }
    target.expect_empty()
}

/// The work of one of several workers, on its own memory.
fn work(target: &Target, worker: u64) -> Outcome {
    let (a, b) = (430 + 2 * worker, 431 + 2 * worker);
    for round in 0..8 {
        let small = Buffer::filled(96, a)?;
        let huge = huge_filled(1, b)?;
        for buf in [&small, &huge] {
            let seed = if std::ptr::eq(buf, &huge) { b } else { a };
            let n = buf.pages();
            let moved = target.to_device(buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            check_bytes(&moved.data, seed, 0, "returned data")?;
        }
        // The pages are freed on the device in part, freed there as a whole, or brought back.
        match round % 3 {
            0 => {
                small.unmap(32, 32)?;
                huge.unmap(0, 100)?;
                small.check(0, 32, a)?;
                huge.check(100, N - 100, b)?;
            }
            1 => {
                target.bring_back(&small, 0, 96)?;
                target.bring_back(&huge, 0, N)?;
                small.check(0, 96, a)?;
                huge.check(0, N, b)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Threads that share one file.
fn threads<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let before = target.stats()?;
    threads::run(3, |worker| work(&target, worker as u64))?;
    let went = target.stats()?.to_device.wrapping_sub(before.to_device);
    check_eq!(went, 3 * 8 * (96 + N as u64), "growth of stats.to_device");
    target.expect_empty()
}

/// Processes with a file each.
fn processes<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let before = target.stats()?;
    let children: Vec<_> = (0..3)
        .map(|worker| {
            Child::spawn(move || {
                let target = Target::open(ctx, NODE)?;
                work(&target, worker)?;
                // The last worker exits without cleaning up.
                match worker {
                    2 => sys::exit_now(0),
                    _ => Ok(()),
                }
            })
        })
        .collect::<Outcome<_>>()?;
    for child in children {
        child.join()?;
    }
    let went = target.stats()?.to_device.wrapping_sub(before.to_device);
    check_eq!(went, 3 * 8 * (96 + N as u64), "growth of stats.to_device");
    target.expect_empty()
}

/// The number that marks page `page` in a round. Filling a large memory word by word would take too
/// long.
fn mark(page: usize, round: usize) -> u64 {
    ((round as u64 + 1) << 32) + page as u64
}

#[track_caller]
fn check_marks(buf: &Buffer, round: usize, pages: impl Iterator<Item = usize>) -> Outcome {
    for page in pages {
        for word in [0, 511] {
            let (found, expected) = (buf.get(page, word), mark(page, round));
            if found != expected {
                return Err(Fail::failed(format!(
                    "word {word} of page {page} in round {round}: expected {expected:#x}, \
                     found {found:#x}"
                )));
            }
        }
    }
    Ok(())
}

/// Moves a whole buffer with a mark on each page to the device.
fn marked_on_device(target: &Target, buf: &Buffer, round: usize) -> Outcome {
    for page in 0..buf.pages() {
        for word in [0, 511] {
            buf.set(page, word, mark(page, round));
        }
    }
    for first in (0..buf.pages()).step_by(N) {
        let n = N.min(buf.pages() - first);
        target
            .to_device(buf, first, n)
            .or_fail(&format!("MIGRATE_TO_DEV from page {first}"))?;
    }
    target.expect(buf, 0, buf.pages(), buf.pages())
}

/// Fills memory of the usual size to the last page.
fn fill<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let one = Buffer::filled(1, 440)?;
    for round in 0..2 {
        let all = start_over(&target)? - 1;
        target.move_all(&one, 440)?;
        let small = Buffer::anon(all)?;
        marked_on_device(&target, &small, round)?;
        let (audit, _) = target.audit()?;
        check_eq!((audit.free, audit.found), (0, 0), "free pages, violations");
        let before = target.stats()?;
        let more = huge_filled(1, 441)?;
        match target.to_device(&more, 0, N) {
            Ok(moved) => check_bytes(&moved.data, 441, 0, "returned data")?,
            Err(e) => check_eq!(
                (e.raw_os_error(), target.cpu_maps()),
                (Some(libc::ENOENT), true),
                "errno of MIGRATE_TO_DEV without room"
            ),
        }
        if target.cpu_maps() {
            target.expect(&more, 0, N, 0)?;
            let failed = target
                .stats()?
                .failed_alloc
                .wrapping_sub(before.failed_alloc);
            check_eq!(failed, N as u64, "growth of stats.failed_alloc");
        } else {
            target.expect_large(&before, 1, 0, 0)?;
        }
        more.check(0, N, 441)?;
        for page in (0..all).step_by(2) {
            small.advise(page, 1, libc::MADV_DONTNEED)?;
        }
        check_marks(&small, round, (1..all).step_by(2))?;
        drop((small, more));

        let huge = Buffer::anon_huge_aligned(all / N * N)?;
        huge.advise(0, huge.pages(), libc::MADV_HUGEPAGE)?;
        let before = target.stats()?;
        marked_on_device(&target, &huge, round + 100)?;
        target.expect_large(&before, all / N, 0, 0)?;
        check_marks(&huge, round + 100, 0..huge.pages())?;
        target.bring_back(&huge, 0, huge.pages())?;
        check_marks(&huge, round + 100, 0..huge.pages())?;
        target.bring_back(&one, 0, 1)?;
        one.check(0, 1, 440)?;
        let limit = if target.cpu_maps() { 1 } else { 2 } * (all + 1);
        let now = capacity(&target)?;
        check!(
            now <= limit,
            "pages of the device: expected {limit} at most, found {now}"
        );
    }
    target.expect_empty()
}
