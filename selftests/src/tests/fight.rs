// SPDX-License-Identifier: GPL-2.0

//! Devices and the CPU use the same pages at the same time. Every write stays visible, and every user
//! makes progress.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::chain::filled;
use super::leak::settled;
use super::target::{PRIVATE, Target, open_all};
use super::{Ctx, PAGES, Test, test};
use crate::check;
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, pattern_bytes};
use crate::harness::note;
use crate::threads::{self, SetOnDrop};

pub const TESTS: &[Test] = &[
    test("fight.all_devices", all_devices),
    test("fight.all_devices_huge", all_devices_huge),
];

/// The duration of each fight.
pub const TIME: Duration = Duration::from_millis(1500);

/// Repeats an access that a device gives up after a second, because other users change the same
/// pages all the time.
pub fn in_turn<T>(mut access: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let begun = Instant::now();
    loop {
        match access() {
            Err(e)
                if e.raw_os_error() == Some(libc::EBUSY)
                    && begun.elapsed() < Duration::from_secs(15) => {}
            result => return result,
        }
    }
}

/// One thread per device moves all pages to its device and writes to its part of them; the CPU
/// writes to other parts. No write is lost or appears elsewhere.
fn fight(targets: &[Target], buf: &Buffer, seed: u64) -> Outcome {
    let n = buf.pages();
    let parts = targets.len() + 1;
    let part = n / parts;
    let over = AtomicBool::new(false);
    let went: Vec<AtomicU64> = targets.iter().map(|_| AtomicU64::new(0)).collect();
    let start: Vec<u64> = targets
        .iter()
        .map(|t| Ok(t.stats()?.to_device))
        .collect::<Outcome<_>>()?;
    let outcome = std::thread::scope(|scope| {
        let handles: Vec<_> = targets
            .iter()
            .enumerate()
            .map(|(i, target)| {
                let (over, went) = (&over, &went[i]);
                scope.spawn(move || -> Outcome {
                    let _over = SetOnDrop(over);
                    let first = (i + 1) * part;
                    for round in 0.. {
                        if over.load(Ordering::SeqCst) {
                            break;
                        }
                        // Pages that other threads hold at this moment stay.
                        let _ = target.to_device(buf, 0, n);
                        let own = seed + 1 + round % 50;
                        let data = pattern_bytes(own, first, 2);
                        in_turn(|| target.write(buf, first, &data)).or_fail("WRITE in a fight")?;
                        buf.check(first, 2, own)?;
                        let read =
                            in_turn(|| target.read(buf, first, 2)).or_fail("READ in a fight")?;
                        crate::device::check_bytes(&read.data, own, first, "READ in a fight")?;
                        target
                            .to_system(buf, first, part)
                            .or_fail("MIGRATE_TO_SYS in a fight")?;
                        went.fetch_add(1, Ordering::SeqCst);
                    }
                    Ok(())
                })
            })
            .collect();
        let cpu = || -> Outcome {
            let _over = SetOnDrop(&over);
            let begun = Instant::now();
            for round in 0.. {
                if over.load(Ordering::SeqCst) || begun.elapsed() > TIME {
                    break;
                }
                let own = seed + 100 + round % 50;
                buf.fill(0, 4, own);
                buf.check(0, 4, own)?;
                buf.check(part - 1, 1, seed)?;
            }
            Ok(())
        };
        let cpu = cpu();
        let ends: Vec<Outcome> = handles.into_iter().map(threads::join).collect();
        ends.into_iter().fold(cpu, Outcome::and)
    });
    outcome?;
    // Pages that no thread wrote to are unchanged.
    for i in 0..parts {
        let (first, end) = (i * part + 4, (i + 1) * part);
        buf.check(first, end - first, seed)?;
    }
    buf.check(parts * part, n - parts * part, seed)?;
    let mut pages = 0;
    for (i, target) in targets.iter().enumerate() {
        let moved = target.stats()?.to_device.wrapping_sub(start[i]);
        let rounds = went[i].load(Ordering::SeqCst);
        note(&format!(
            "device {i} of the fight: {rounds} rounds, {moved} pages"
        ));
        check!(
            rounds > 0,
            "rounds of device {i}: expected some, found none"
        );
        pages += moved;
    }
    // Chance decides which device gets a page: the others cannot take it.
    check!(pages > 0, "pages that went: expected some, found none");
    Ok(())
}

fn all_devices(ctx: &Ctx) -> Outcome {
    settled(ctx, PRIVATE, |_| {
        let targets = open_all(ctx)?;
        fight(&targets, &Buffer::filled(PAGES, 1900)?, 1900)
    })
}

/// The first device that takes a part splits a huge page.
fn all_devices_huge(ctx: &Ctx) -> Outcome {
    settled(ctx, PRIVATE, |_| {
        let targets = open_all(ctx)?;
        fight(&targets, &filled(true, 2100)?, 2100)
    })
}
