// SPDX-License-Identifier: GPL-2.0

//! Swap next to device memory: swapped-out pages do not migrate, pages on the device are not
//! swapped out, and no old data comes back from swap. Small and huge pages.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::account::current;
use super::chain::{Image, SIZES, filled};
use super::counts::{Waiting, frames};
use super::leak::{settled, settled_in};
use super::target::Target;
use super::{Ctx, PAGES, Test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::note;
use crate::swap::Swap;
use crate::{check, check_eq, proc, sys};

pub const TESTS: &[Test] = of_each_kind!("swap":
    "then_device" => then_device,
    "beside" => beside,
    "swapoff" => swapoff,
    "shared" => shared,
    "dirty" => dirty,
    "lazy" => lazy,
    "old_data" => old_data,
    "pressure" => pressure,
    "race" => race,
);

/// Swaps pages out, and retries while others hold references for a moment.
#[track_caller]
pub fn swap_out(buf: &Buffer, first: usize, n: usize, expected: usize) -> Outcome {
    let mut found = 0;
    sys::wait_until(Duration::from_secs(5), || {
        // Pages that are not swapped out show below.
        let _ = buf.try_advise(first, n, libc::MADV_PAGEOUT);
        found = proc::swapped(buf, first, n).unwrap_or(0);
        if found == expected {
            return true;
        }
        // Pages in the batch of another CPU would wait there for ever.
        let _ = proc::drain_batches();
        false
    });
    match found == expected {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "pages {first}..{} in swap: expected {expected}, found {found}",
            first + n
        ))),
    }
}

/// Swapped-out pages stay in swap until an access brings them back; then they migrate.
fn then_device(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let _swap = Swap::on()?;
            let buf = filled(huge, 1400)?;
            let n = buf.pages();
            swap_out(&buf, 0, n, n)?;
            let before = target.stats()?;
            let result = target.to_device(&buf, 0, n);
            expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of what is in swap")?;
            check_eq!(proc::swapped(&buf, 0, n)?, n, "pages in swap");
            let after = target.stats()?;
            check_eq!(after.to_device, before.to_device, "pages that went");
            // The device reads one half, the CPU the other.
            let read = target.read(&buf, 0, n / 2).or_fail("READ")?;
            check_bytes(&read.data, 1400, 0, "READ from swap")?;
            check_eq!(proc::swapped(&buf, 0, n / 2)?, 0, "pages in swap");
            let moved = target.to_device(&buf, 0, n / 2).or_fail("MIGRATE_TO_DEV")?;
            check_bytes(&moved.data, 1400, 0, "data that MIGRATE_TO_DEV returned")?;
            buf.check(n / 2, n / 2, 1400)?;
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            target.expect(&buf, 0, n, n)?;
            buf.check(0, n, 1400)
        })?;
    }
    Ok(())
}

/// A part of the range is on the device; the rest is swapped out, more than once.
fn beside(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let _swap = Swap::on()?;
            let buf = filled(huge, 1410)?;
            let n = buf.pages();
            let image = Image::new(n, 1410);
            target
                .to_device(&buf, n / 4, n / 2)
                .or_fail("MIGRATE_TO_DEV")?;
            let pfns = frames(target, &buf, n / 4, n / 2)?;
            for _ in 0..2 {
                swap_out(&buf, 0, n, n / 2)?;
                target.expect(&buf, n / 4, n / 2, n / 2)?;
                check_eq!(&frames(target, &buf, n / 4, n / 2)?, &pfns, "frames");
                buf.check(0, n / 4, 1410)?;
                buf.check(n / 2 + n / 4, n / 4, 1410)?;
            }
            swap_out(&buf, 0, n, n / 2)?;
            // The pages on the device come back between pages in swap.
            target.bring_back(&buf, n / 4, n / 2)?;
            check_eq!(proc::swapped(&buf, 0, n)?, n / 2, "pages in swap");
            image.check(&buf)?;
            swap_out(&buf, 0, n, n)?;
            image.check_device(target, &buf)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

/// swapoff passes over entries of the device, and brings back the swapped-out pages.
fn swapoff(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let swap = Swap::on()?;
            let buf = filled(huge, 1420)?;
            let n = buf.pages();
            target
                .to_device(&buf, n / 4, n / 2)
                .or_fail("MIGRATE_TO_DEV")?;
            swap_out(&buf, 0, n, n / 2)?;
            let child = Waiting::start(|| Ok(()), || buf.check(0, n, 1420))?;
            swap.off()?;
            check_eq!(proc::swapped(&buf, 0, n)?, 0, "pages in swap");
            target.expect(&buf, 0, n, n / 2)?;
            buf.check(0, n, 1420)?;
            buf.fill(0, n, 1421);
            child.join()?;
            buf.check(0, n, 1421)?;
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            target.expect(&buf, 0, n, n)?;
            buf.check(0, n, 1421)
        })?;
    }
    Ok(())
}

/// The pages of one process are in swap for another process: they may stay in place, but both
/// processes have their data.
fn shared(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let _swap = Swap::on()?;
            let buf = filled(huge, 1430)?;
            let n = buf.pages();
            swap_out(&buf, 0, n, n)?;
            let child = Waiting::start(
                || Ok(()),
                || {
                    buf.check(0, n, 1430)?;
                    buf.fill(0, n, 1431);
                    let own = Target::open(ctx, node)?;
                    own.move_all(&buf, 1431)
                },
            )?;
            buf.check(0, n, 1430)?;
            // The page is in the swap cache, whose space the child still needs.
            if let Err(e) = target.to_device(&buf, 0, n) {
                check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
            }
            note(&format!(
                "{} of {n} shared pages went",
                target.on_device(&buf, 0, n)?
            ));
            let data = pattern_bytes(1432, 1, 3);
            target.write(&buf, 1, &data).or_fail("WRITE")?;
            child.join()?;
            buf.check(0, 1, 1430)?;
            buf.check(1, 3, 1432)?;
            buf.check(4, n - 4, 1430)?;
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            target.expect(&buf, 0, n, n)?;
            buf.check(4, n - 4, 1430)
        })?;
    }
    Ok(())
}

/// The kernel drops a page without writing it if its copy in swap is up to date. A write since
/// then, on the device or just before the migration, must prevent that. (Fixed in 6.1 by
/// fd35ca3d12cc: the dirty bit was lost during the migration.)
fn dirty(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for by_device in [false, true] {
            settled(ctx, node, |target| {
                let _swap = Swap::on()?;
                let buf = filled(huge, 1440)?;
                let n = buf.pages();
                swap_out(&buf, 0, n, n)?;
                // The pages are clean, and in the swap cache.
                buf.check(0, n, 1440)?;
                let mut image = Image::new(n, 1440);
                if !by_device {
                    image.fill(&buf, 2, 5, 1441);
                }
                image.send(target, &buf)?;
                if by_device {
                    target
                        .write(&buf, 2, &pattern_bytes(1441, 2, 5))
                        .or_fail("WRITE")?;
                    image.set(2, 5, 1441);
                }
                target.bring_back(&buf, 0, n)?;
                swap_out(&buf, 0, n, n)?;
                image.check(&buf)?;
                image.send(target, &buf)?;
                image.check(&buf)
            })?;
        }
    }
    Ok(())
}

/// The same for pages with MADV_FREE, which the kernel may drop while they are clean.
fn lazy(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        // Who writes last: the CPU, the device, or the device to what nobody has written since.
        for (by_cpu, by_device) in [(true, false), (true, true), (false, true)] {
            let buf = Buffer::filled(PAGES, 1450)?;
            let mut image = Image::new(PAGES, 1450);
            buf.advise(0, PAGES, libc::MADV_FREE)?;
            // Fill whole pages, because the old content may be gone.
            if by_cpu {
                image.fill(&buf, 0, PAGES, 1451);
            } else {
                proc::drain_batches()?;
                buf.check(0, PAGES, 1450)?;
            }
            image.send(target, &buf)?;
            if by_device {
                let data = pattern_bytes(1452, 0, PAGES);
                target.write(&buf, 0, &data).or_fail("WRITE")?;
                image.set(0, PAGES, 1452);
            }
            target.bring_back(&buf, 0, PAGES)?;
            // There is no swap: the kernel drops pages with MADV_FREE that are clean, and no
            // others.
            for _ in 0..3 {
                buf.advise(0, PAGES, libc::MADV_PAGEOUT)?;
            }
            image.check(&buf)?;
        }
        Ok(())
    })
}

/// A page migrates and is swapped out in turn, with other data each time.
fn old_data(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let _swap = Swap::on()?;
            let buf = filled(huge, 1460)?;
            let n = buf.pages();
            let mut image = Image::new(n, 1460);
            for round in 0..4 {
                let (first, len) = (round as usize * 3, n / 2);
                swap_out(&buf, 0, n, n)?;
                image.check_device(target, &buf)?;
                image.fill(&buf, first, len, 1461 + 2 * round);
                image.send(target, &buf)?;
                target
                    .write(
                        &buf,
                        first + 2,
                        &pattern_bytes(1462 + 2 * round, first + 2, 4),
                    )
                    .or_fail("WRITE")?;
                image.set(first + 2, 4, 1462 + 2 * round);
                target.bring_back(&buf, 0, n)?;
            }
            image.check(&buf)
        })?;
    }
    Ok(())
}

/// Asks a cgroup to give up memory.
fn reclaim(dir: &Path, pages: usize) {
    // The write fails if less memory is found than was requested.
    let _ = fs::write(dir.join("memory.reclaim"), (pages * PAGE).to_string());
}

/// A cgroup is short of memory while half of its memory is on the device: the other half is swapped
/// out, also while the first half comes back.
fn pressure(ctx: &Ctx, node: usize) -> Outcome {
    const N: usize = 4 * HUGE_PAGES;
    settled_in(ctx, node, |target, dir| {
        let _swap = Swap::on()?;
        let away = Buffer::anon_huge_aligned(N)?;
        away.advise(0, N / 2, libc::MADV_HUGEPAGE)?;
        let near = Buffer::anon(N)?;
        away.fill(0, N, 1470);
        near.fill(0, N, 1471);
        for first in (0..N).step_by(HUGE_PAGES) {
            target
                .to_device(&away, first, HUGE_PAGES)
                .or_fail("MIGRATE_TO_DEV")?;
        }
        let pfns = frames(target, &away, 0, N)?;
        reclaim(dir, 2 * N);
        let out = proc::swapped(&near, 0, N)?;
        check!(
            out > N / 2,
            "system pages in swap: expected most of {N}, found {out}"
        );
        target.expect(&away, 0, N, N)?;
        check_eq!(&frames(target, &away, 0, N)?, &pfns, "frames");
        // The limit is the present charge, although the pages come back to where reclaim sees them.
        let limit = current(dir)? as usize;
        fs::write(dir.join("memory.high"), (limit * PAGE).to_string()).or_fail("memory.high")?;
        for first in (0..N).step_by(HUGE_PAGES) {
            near.check(first, HUGE_PAGES, 1471)?;
            target.bring_back(&away, first, HUGE_PAGES)?;
            away.check(first, HUGE_PAGES, 1470)?;
        }
        reclaim(dir, 2 * N);
        away.check(0, N, 1470)?;
        near.check(0, N, 1471)?;
        fs::write(dir.join("memory.high"), "max").or_fail("memory.high")
    })
}

/// One thread swaps out, in, and switches swap off, while another one migrates back and forth;
/// every write is kept.
fn race(ctx: &Ctx, node: usize) -> Outcome {
    const ROUNDS: u64 = 30;
    /// The last of these rounds switches swap off.
    const FEWEST: u64 = 8;
    const TIME: Duration = Duration::from_secs(15);
    settled(ctx, node, |target| {
        let swap = Swap::on()?;
        let buf = Buffer::filled(PAGES, 1480)?;
        let over = AtomicBool::new(false);
        let before = target.stats()?;
        let (moving, writing) = std::thread::scope(|scope| {
            let moving = scope.spawn(|| -> Outcome<u64> {
                let mut trips = 0;
                while !over.load(Ordering::SeqCst) {
                    trips += 1;
                    // Pages in swap stay there.
                    let _ = target.to_device(&buf, 0, PAGES);
                    target.to_system(&buf, 0, PAGES).or_fail("MIGRATE_TO_SYS")?;
                    // Give the other thread time to work.
                    std::thread::sleep(Duration::from_micros(500));
                }
                Ok(trips)
            });
            let begun = Instant::now();
            let mut rounds = 0;
            let writing = (0..ROUNDS).try_for_each(|round| {
                // A busy machine runs fewer rounds, but at least one that switches swap off.
                if round >= FEWEST && begun.elapsed() > TIME {
                    return Ok(());
                }
                rounds += 1;
                for page in 0..PAGES {
                    buf.set(page, 7, round);
                }
                let _ = buf.try_advise(0, PAGES, libc::MADV_PAGEOUT);
                if round % 8 == 7 {
                    swap.off_and_on().or_fail("swapoff and swapon")?;
                }
                for page in 0..PAGES {
                    let found = buf.get(page, 7);
                    check!(
                        found == round,
                        "word written to page {page}: expected {round}, found {found}"
                    );
                }
                Ok(())
            });
            over.store(true, Ordering::SeqCst);
            let panicked = |_| Err(Fail::failed("the migrating thread panicked"));
            let trips = moving.join().unwrap_or_else(panicked);
            (trips, writing.map(|()| rounds))
        });
        let rounds = writing?;
        let trips = moving?;
        note(&format!(
            "{rounds} rounds of swapping, {trips} trips to the device"
        ));
        check!(
            rounds >= FEWEST && trips > 0,
            "rounds of swapping and trips: expected {FEWEST} and one at least, found {rounds} and \
             {trips}"
        );
        let went = target.stats()?.to_device.wrapping_sub(before.to_device);
        check!(went > 0, "pages that went: expected some, found none");
        buf.fill(0, PAGES, 1481);
        target.to_device(&buf, 0, PAGES).or_fail("MIGRATE_TO_DEV")?;
        buf.check(0, PAGES, 1481)
    })
}
