// SPDX-License-Identifier: GPL-2.0

//! KSM next to device memory: some pages are merged, others are on the device. KSM handles private
//! anonymous pages, as the device does. `generic.rs` tests GENERIC memory next to pages that are
//! being merged.

use std::fs;
use std::time::Duration;

use super::chain::Image;
use super::leak::settled;
use super::strict::needs_all_fixes;
use super::target::{COHERENT, GENERIC, Target};
use super::{Ctx, PAGES, Test, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::{check, check_eq, proc, sys};

pub const TESTS: &[Test] = of_each_kind!("ksm":
    "merged_goes" => merged_goes,
    "merged_is_shared" => merged_is_shared,
    "unmerge_away" => unmerge_away,
    "merge_beside" => merge_beside,
    "fork" => fork,
    "stays" => stays,
    "zeroes" => zeroes,
);

/// Tests for pages of a device that the CPU maps.
pub const IN_TREE: &[Test] = &[
    test("ksm_coherent.in_tree", |ctx| in_tree(ctx, COHERENT)),
    test("ksm_generic.in_tree", |ctx| in_tree(ctx, GENERIC)),
];

pub const KSM: &str = "/sys/kernel/mm/ksm";

/// A number in KSM's directory of sysfs.
pub fn number(name: &str) -> Outcome<u64> {
    let path = format!("{KSM}/{name}");
    let text = fs::read_to_string(&path).or_fail(&path)?;
    text.trim()
        .parse()
        .map_err(|e| Fail::failed(format!("{path}: '{text}': {e}")))
}

/// Waits for some full scans of a running KSM.
pub fn wait_for_scans() -> Outcome {
    let start = number("full_scans")?;
    let done = sys::wait_until(Duration::from_secs(20), || {
        number("full_scans").is_ok_and(|n| n >= start + 3)
    });
    check!(done, "scans of KSM: expected 3 more than {start} in 20 s");
    Ok(())
}

/// A running KSM. Dropping it stops KSM and unmerges all pages.
pub struct Ksm;

impl Ksm {
    pub fn start() -> Outcome<Self> {
        if !fs::exists(KSM).or_fail(KSM)? {
            return Err(Fail::Skip("no CONFIG_KSM".into()));
        }
        let ksm = Self;
        for (name, value) in [
            ("sleep_millisecs", "1"),
            ("pages_to_scan", "1000"),
            ("run", "1"),
        ] {
            fs::write(format!("{KSM}/{name}"), value).or_fail(name)?;
        }
        Ok(ksm)
    }

    /// Waits for some full scans.
    pub fn scan(&self) -> Outcome {
        wait_for_scans()
    }

    /// Continues after `pause()`.
    pub fn resume(&self) -> Outcome {
        fs::write(format!("{KSM}/run"), "1").or_fail("run")
    }

    /// Stops KSM and keeps the merged pages.
    pub fn pause(&self) -> Outcome {
        fs::write(format!("{KSM}/run"), "0").or_fail("run")
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        let _ = fs::write(format!("{KSM}/run"), "2");
        let _ = fs::write(format!("{KSM}/run"), "0");
    }
}

/// Two buffers; KSM has merged every page of one with the equal page of the other.
pub fn merged(ksm: &Ksm, seed: u64) -> Outcome<[Buffer; 2]> {
    let bufs = [Buffer::filled(PAGES, seed)?, Buffer::filled(PAGES, seed)?];
    for buf in &bufs {
        buf.advise(0, PAGES, libc::MADV_MERGEABLE)?;
    }
    let mut same = false;
    for _ in 0..5 {
        ksm.scan()?;
        let frames = [
            proc::frames(&bufs[0], 0, PAGES)?,
            proc::frames(&bufs[1], 0, PAGES)?,
        ];
        same = frames[0].len() == PAGES && frames[0] == frames[1];
        if same {
            break;
        }
    }
    check!(
        same,
        "frames of two equal buffers: expected the same, found others"
    );
    // A scan would meet pages that are migrating.
    ksm.pause()?;
    Ok(bufs)
}

/// Merged pages may migrate or not; a write gives the process a page of its own, on the device and
/// in system memory.
fn merged_goes(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        let [a, b] = merged(&ksm, 1600)?;
        match target.to_device(&a, 0, PAGES) {
            Ok(moved) => check_bytes(&moved.data, 1600, 0, "data that MIGRATE_TO_DEV returned")?,
            Err(e) => check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV"),
        }
        note(&format!(
            "{} and {} of {PAGES} merged pages went",
            target.on_device(&a, 0, PAGES)?,
            target.on_device(&b, 0, PAGES)?
        ));
        let read = target.read(&b, 0, PAGES).or_fail("READ")?;
        check_bytes(&read.data, 1600, 0, "READ of the other")?;
        // The device writes to one buffer, the CPU to the other.
        target
            .write(&a, 3, &pattern_bytes(1601, 3, 9))
            .or_fail("WRITE")?;
        b.fill(7, 9, 1602);
        let mut images = [Image::new(PAGES, 1600), Image::new(PAGES, 1600)];
        images[0].set(3, 9, 1601);
        images[1].set(7, 9, 1602);
        for (buf, image) in [&a, &b].into_iter().zip(&images) {
            image.check_device(target, buf)?;
            image.check(buf)?;
        }
        target.bring_back(&a, 0, PAGES)?;
        target.bring_back(&b, 0, PAGES)?;
        images[0].check(&a)?;
        images[1].check(&b)
    })
}

/// A device writes to a merged page: no other process sees the write.
fn merged_is_shared(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        let [a, b] = merged(&ksm, 1610)?;
        target
            .write(&a, 0, &pattern_bytes(1611, 0, PAGES))
            .or_fail("WRITE")?;
        b.check(0, PAGES, 1610)?;
        target.move_all(&a, 1611)?;
        // Where merged pages stay in system memory, so do those that are merged with no other.
        b.advise(0, PAGES, libc::MADV_UNMERGEABLE)?;
        target.move_all(&b, 1610)?;
        a.check(0, PAGES, 1611)?;
        b.check(0, PAGES, 1610)
    })
}

/// Checks that the first `n` of the merged pages are on the device, or none: only kernels without the
/// fix in series A move them.
#[track_caller]
fn expect_moved_or_not(target: &Target, buf: &Buffer, n: usize) -> Outcome {
    let moved = target.on_device(buf, 0, PAGES)?;
    check!(
        moved == 0 || moved == n,
        "merged pages on the device: expected 0 or {n}, found {moved}"
    );
    target.expect(buf, n, PAGES - n, 0)
}

/// Unmerges a range of which a part is on the device.
fn unmerge_away(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        let [a, b] = merged(&ksm, 1620)?;
        // Pages that do not migrate stay merged.
        let _ = target.to_device(&a, 0, PAGES / 2);
        expect_moved_or_not(target, &a, PAGES / 2)?;
        a.advise(0, PAGES, libc::MADV_UNMERGEABLE)?;
        let read = target.read(&a, 0, PAGES).or_fail("READ")?;
        check_bytes(&read.data, 1620, 0, "READ after MADV_UNMERGEABLE")?;
        a.fill(0, PAGES, 1621);
        b.check(0, PAGES, 1620)?;
        target.move_all(&a, 1621)?;
        a.check(0, PAGES, 1621)?;
        // KSM's own switch unmerges everything.
        let _ = target.to_device(&b, 0, PAGES / 2);
        expect_moved_or_not(target, &b, PAGES / 2)?;
        if !target.cpu_maps() {
            // break_ksm() does not see device private entries. Pages that come back afterwards have
            // migration entries that rmap does not find, and the process would wait for ever.
            target.bring_back(&b, 0, PAGES)?;
        }
        drop(ksm);
        b.check(0, PAGES, 1620)?;
        target.bring_back(&b, 0, PAGES)?;
        b.check(0, PAGES, 1620)
    })
}

/// Pages that come back are merged with pages that never migrated.
fn merge_beside(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        let bufs = [Buffer::filled(PAGES, 1630)?, Buffer::filled(PAGES, 1630)?];
        target.move_all(&bufs[0], 1630)?;
        for buf in &bufs {
            buf.advise(0, PAGES, libc::MADV_MERGEABLE)?;
        }
        ksm.scan()?;
        // Pages on the device are not merged.
        target.expect(&bufs[0], 0, PAGES, PAGES)?;
        target.bring_back(&bufs[0], 0, PAGES)?;
        let same = sys::wait_until(Duration::from_secs(20), || {
            let frames = [
                proc::frames(&bufs[0], 0, PAGES).unwrap_or_default(),
                proc::frames(&bufs[1], 0, PAGES).unwrap_or_default(),
            ];
            frames[0] == frames[1] && frames[0].len() == PAGES
        });
        check!(
            same,
            "frames of two equal buffers: expected the same, found others"
        );
        bufs[0].fill(0, PAGES, 1631);
        bufs[1].check(0, PAGES, 1630)?;
        // A scan holds a page for a moment, and the page would not migrate.
        ksm.pause()?;
        target.move_all(&bufs[0], 1631)?;
        bufs[0].check(0, PAGES, 1631)
    })
}

/// Merged pages have migrated, and a child shares them.
fn fork(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        let [a, b] = merged(&ksm, 1640)?;
        let _ = target.to_device(&a, 0, PAGES);
        expect_moved_or_not(target, &a, PAGES)?;
        Child::spawn(|| {
            let own = Target::open(ctx, node)?;
            if target.cpu_maps() {
                expect_moved_or_not(target, &a, PAGES)?;
            }
            own.write(&b, 2, &pattern_bytes(1641, 2, 5))
                .or_fail("WRITE")?;
            a.fill(4, 5, 1642);
            b.check(2, 5, 1641)?;
            b.check(7, PAGES - 7, 1640)?;
            a.check(4, 5, 1642)?;
            a.check(9, PAGES - 9, 1640)
        })?
        .join()?;
        a.check(0, PAGES, 1640)?;
        b.check(0, PAGES, 1640)
    })
}

/// Merged pages stay in system memory: ksmd compares pages of other buffers with them, and
/// cannot read device memory. The test ends before ksmd would oops.
fn stays(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        let [a, b] = merged(&ksm, 1650)?;
        let moved = target.to_device(&a, 0, PAGES);
        target.expect(&a, 0, PAGES, 0)?;
        expect_errno(moved, &[libc::ENOENT], "MIGRATE_TO_DEV of merged pages")?;
        let others = [Buffer::filled(PAGES, 1651)?, Buffer::filled(PAGES, 1651)?];
        for buf in &others {
            buf.advise(0, PAGES, libc::MADV_MERGEABLE)?;
        }
        ksm.resume()?;
        ksm.scan()?;
        for buf in &others {
            buf.check(0, PAGES, 1651)?;
        }
        // The device gets a page of its own by writing, and that one can go.
        ksm.pause()?;
        target
            .write(&a, 0, &pattern_bytes(1652, 0, PAGES))
            .or_fail("WRITE")?;
        target.move_all(&a, 1652)?;
        a.check(0, PAGES, 1652)?;
        b.check(0, PAGES, 1650)
    })
}

/// The zero pages with which KSM replaces pages of zeroes are counted, until something takes their
/// place: a page of the device, one of the system, or nothing.
fn zeroes(ctx: &Ctx, node: usize) -> Outcome {
    struct Zeroes;
    impl Drop for Zeroes {
        fn drop(&mut self) {
            let _ = fs::write(format!("{KSM}/use_zero_pages"), "0");
        }
    }
    needs_all_fixes(ctx)?;
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        fs::write(format!("{KSM}/use_zero_pages"), "1").or_fail("use_zero_pages")?;
        let _zeroes = Zeroes;
        let before = number("ksm_zero_pages")?;
        let expect = |more: usize, when: &str| -> Outcome {
            let found = number("ksm_zero_pages")?;
            check_eq!(found, before + more as u64, "zero pages of KSM {when}");
            Ok(())
        };
        let buf = Buffer::anon(PAGES)?;
        for page in 0..PAGES {
            buf.set(page, 0, 0);
        }
        buf.advise(0, PAGES, libc::MADV_MERGEABLE)?;
        for _ in 0..5 {
            ksm.scan()?;
            if number("ksm_zero_pages")? == before + PAGES as u64 {
                break;
            }
        }
        ksm.pause()?;
        expect(PAGES, "after scans")?;
        let part = PAGES / 3;
        target.to_device(&buf, 0, part).or_fail("MIGRATE_TO_DEV")?;
        target.expect(&buf, 0, part, part)?;
        expect(PAGES - part, "with a third on the device")?;
        let read = target.read(&buf, 0, PAGES).or_fail("READ")?;
        check!(
            read.data.iter().all(|b| *b == 0),
            "READ of pages of zeroes: expected zeroes"
        );
        buf.fill(part, part, 1670);
        expect(PAGES - 2 * part, "with a third written")?;
        buf.advise(2 * part, PAGES - 2 * part, libc::MADV_DONTNEED)?;
        expect(0, "with nothing of KSM any more")?;
        target.bring_back(&buf, 0, part)?;
        buf.check_zero(0, part)?;
        buf.check(part, part, 1670)?;
        expect(0, "in the end")
    })
}

/// KSM remembers a page for the rest of a scan, to merge it with an equal one that it meets later. If
/// the page goes to a device in between, it must not become a page of KSM there.
///
/// The scan is so slow that the page is met a fifth of a second before the equal one. A page is
/// remembered when it is met for the second time, so that it stays in the system for one scan and a
/// half.
fn in_tree(ctx: &Ctx, node: usize) -> Outcome {
    const BETWEEN: usize = 40;
    const PAUSE: u64 = 5;
    const ROUNDS: usize = 10;
    const SHARED_BY_KSM: u64 = 1 << 21;
    settled(ctx, node, |target| {
        let ksm = Ksm::start()?;
        ksm.pause()?;
        let all = Buffer::anon(BETWEEN + 2)?;
        for page in 0..BETWEEN + 2 {
            all.fill(page, 1, 1660 + page as u64);
        }
        // The first page and the last one are equal.
        let (first, last) = (0, BETWEEN + 1);
        for word in 0..crate::memory::WORDS {
            all.set(last, word, all.get(first, word));
        }
        let words = all.words(first);
        all.advise(0, BETWEEN + 2, libc::MADV_MERGEABLE)?;
        // A kernel without this file does not skip pages.
        let _ = fs::write(format!("{KSM}/smart_scan"), "0");
        fs::write(format!("{KSM}/sleep_millisecs"), PAUSE.to_string())
            .or_fail("sleep_millisecs")?;
        fs::write(format!("{KSM}/pages_to_scan"), "1").or_fail("pages_to_scan")?;
        ksm.resume()?;
        let scan = Duration::from_millis(PAUSE * (BETWEEN as u64 + 2));
        let mut went = 0;
        for round in 0..ROUNDS {
            std::thread::sleep(scan * 3 / 2);
            // The page may be merged already, and then stays.
            let _ = target.to_device(&all, first, 1);
            if target.on_device(&all, first, 1)? == 0 {
                // A write takes it from KSM.
                all.set(first, 0, words[0]);
                continue;
            }
            went += 1;
            std::thread::sleep(scan * 3 / 2);
            let frames = proc::frames(&all, first, 1)?;
            for flags in proc::frame_flags(&frames)? {
                check!(
                    flags & SHARED_BY_KSM == 0,
                    "page on the device in round {round}: expected none of KSM's, found {flags:#x}"
                );
            }
            target.to_system(&all, first, 1).or_fail("MIGRATE_TO_SYS")?;
            check_eq!(all.words(first), words, "contents of the page");
        }
        check_eq!(all.words(last), words, "contents of the equal page");
        note(&format!("the page went in {went} of {ROUNDS} rounds"));
        check!(
            went > 0,
            "rounds with the page on the device: expected some"
        );
        Ok(())
    })
}
