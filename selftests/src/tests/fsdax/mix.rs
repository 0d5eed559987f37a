// SPDX-License-Identifier: GPL-2.0

//! All kinds of pages at once: DAX pages and those of PRIVATE, COHERENT and GENERIC devices. A
//! process per kind migrates, maps, unmaps and frees them, while threads pin them by the fast way
//! and ask to move them, and memory is compacted all the time. The data stays right, the kernel
//! reports nothing, and no page is held in the end: this test checks the pmem, the harness the
//! devices.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device};
use crate::fsdax::{EXT4, REFLINK, XFS};
use crate::harness::{Child, note};
use crate::tests::fsdax::{LARGE, SMALL, Setup};
use crate::tests::target::{COHERENT, GENERIC, PRIVATE, Target};
use crate::tests::{Ctx, PAGES, Test, test};
use crate::uapi::*;
use crate::{check, files};

pub const TESTS: &[Test] = &[
    test("fsdax.move_pages", move_pages),
    test("fsdax.mix_ext4", mix::<EXT4, 2>),
    test("fsdax.mix_xfs", mix::<XFS, 2>),
    test("fsdax.mix_reflink", mix::<REFLINK, 2>),
    test("fsdax.mix_long_ext4", mix::<EXT4, 15>),
    test("fsdax.mix_long_xfs", mix::<XFS, 15>),
    test("fsdax.mix_long_reflink", mix::<REFLINK, 15>),
];

/// How much longer than planned a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(25);

/// Core mm does not move pages of DAX mappings, and returns an error for each. The machine has one
/// node, so system memory is already there.
fn move_pages(_: &Ctx) -> Outcome {
    let s = Setup::new(EXT4)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 900)?;
        let status = files::move_to_node(&buf, 0, SMALL).or_fail("move_pages")?;
        check!(
            status.iter().all(|s| *s == -libc::EFAULT),
            "move_pages of DAX pages: expected EFAULT for each, found {status:?}"
        );
        buf.check(0, pages, 900)?;
        drop((file, buf));
        s.fs.remove("a")?;
    }
    let anon = Buffer::filled(SMALL, 901)?;
    let status = files::move_to_node(&anon, 0, SMALL).or_fail("move_pages")?;
    check!(
        status.iter().all(|s| *s == 0),
        "move_pages of memory: expected 0 for each, found {status:?}"
    );
    s.unmount()
}

/// Pins some pages of a buffer by the fast way and asks to move them, until it is told to stop.
/// Counts the successful pins.
fn pin_and_move(buf: &Buffer, stop: &AtomicBool, pins: &AtomicU64) -> Outcome {
    let device = Device::open(1)?;
    let flavours = [ZDM_PIN_FAST, ZDM_PIN_FAST | ZDM_PIN_GET];
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let page = round % (buf.pages() - 1);
        match device.pin(buf, page, 2, flavours[round % 2]) {
            Ok(id) => {
                pins.fetch_add(1, Ordering::Relaxed);
                device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            }
            // The page is not mapped at this moment.
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {}
            Err(e) => return Err(e).or_fail("ZDM_PIN"),
        }
        if round % 16 == 0 {
            files::move_to_node(buf, 0, buf.pages().min(PAGES)).or_fail("move_pages")?;
        }
    }
    Ok(())
}

/// Repeats `work` with a buffer until `end`, against a thread that pins the buffer.
fn against_pins(
    what: &str,
    buf: Buffer,
    end: Instant,
    mut work: impl FnMut(&Buffer, u64) -> Outcome,
) -> Outcome {
    let buf = Arc::new(buf);
    let stop = Arc::new(AtomicBool::new(false));
    let pins = Arc::new(AtomicU64::new(0));
    let (theirs, flag, count) = (buf.clone(), stop.clone(), pins.clone());
    let pinning = std::thread::spawn(move || pin_and_move(&theirs, &flag, &count));
    let pins = || pins.load(Ordering::Relaxed);
    let mut rounds = 0;
    let mut result = Ok(());
    // A busy machine gets more time, within a limit.
    let enough = |rounds: u64| Instant::now() >= end && rounds > 1 && pins() > 0;
    while result.is_ok() && !enough(rounds) && Instant::now() < end + PATIENCE {
        rounds += 1;
        result = work(&buf, rounds);
    }
    stop.store(true, Ordering::Relaxed);
    pinning
        .join()
        .map_err(|_| Fail::failed("the pinning thread: expected its end, found a panic"))??;
    result?;
    let pins = pins();
    note(&format!("{what}: {rounds} rounds, {pins} pins"));
    check!(
        rounds > 1 && pins > 0,
        "{what}: expected rounds and pins, found {rounds} and {pins}"
    );
    Ok(())
}

/// Memory migrates to a device and back; pages that are pinned at that moment stay.
fn migrate(ctx: &Ctx, node: usize, end: Instant) -> Outcome {
    let target = Target::open(ctx, node)?;
    let buf = Buffer::anon_huge_aligned(PAGES)?;
    against_pins(&format!("node {node}"), buf, end, |buf, round| {
        buf.fill(0, PAGES, round);
        // While a page is held, no page may move.
        let _ = target.to_device(buf, 0, PAGES);
        buf.check(0, PAGES / 2, round)?;
        let _ = target.to_system(buf, 0, PAGES);
        buf.check(0, PAGES, round)
    })
}

/// A file is mapped, written and unmapped, and then gives up its blocks.
fn map(s: &Setup, name: &str, pages: usize, end: Instant) -> Outcome {
    let file = s.fs.file(name, pages)?;
    // The other thread pins at the address of this mapping; other processes use the file, too.
    let buf = Buffer::shared(&file, pages)?;
    against_pins(&format!("{pages} DAX pages"), buf, end, |buf, round| {
        // Use all but the last page of a small file.
        let n = SMALL - 1;
        buf.fill(0, n, round);
        let other = Buffer::shared(&file, pages)?;
        other.check(0, n, round)?;
        other.set(pages - 1, 0, round);
        let own = Buffer::of_file(&file, pages, libc::MAP_PRIVATE).or_fail("mmap")?;
        own.fill(1, 1, round + 1);
        drop(other);
        // Zap the pages; the next access, of either thread, faults them in again.
        buf.advise(0, pages, libc::MADV_DONTNEED)?;
        buf.check(0, n, round)?;
        own.check(1, 1, round + 1)?;
        let last = buf.get(pages - 1, 0);
        check!(last == round, "last page: expected {round}, found {last}");
        // Make and remove another file, so that blocks change their owner.
        let more = format!("{name}+");
        let (_, scratch) = s.mapped(&more, n, round)?;
        drop(scratch);
        s.fs.remove(&more)
    })
}

fn mix<const KIND: usize, const SECONDS: u64>(ctx: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    let end = Instant::now() + Duration::from_secs(SECONDS);
    let mut children = Vec::new();
    for node in [PRIVATE, COHERENT, GENERIC] {
        match Target::open(ctx, node) {
            Ok(_) => children.push(Child::spawn(|| migrate(ctx, node, end))?),
            // The machine has no such memory, or the old rule.
            Err(Fail::Skip(why)) => note(&why),
            Err(e) => return Err(e),
        }
    }
    for (name, pages) in [("a", SMALL), ("b", LARGE)] {
        children.push(Child::spawn(|| map(&s, name, pages, end))?);
    }
    while Instant::now() < end {
        fs::write("/proc/sys/vm/compact_memory", "1").or_fail("compact_memory")?;
    }
    for child in children {
        child.join()?;
    }
    for name in ["a", "b"] {
        s.fs.remove(name)?;
    }
    s.unmount()
}
