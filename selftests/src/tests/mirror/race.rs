// SPDX-License-Identifier: GPL-2.0

//! The device reads while the CPU changes the memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::super::Ctx;
use super::super::chain::{SIZES, filled};
use super::super::leak::settled;
use super::super::target::Target;
use super::RW;
use crate::check;
use crate::check::{Fail, Outcome};
use crate::device::{Buffer, HUGE_PAGES};

/// The duration of a race.
const RACE: Duration = Duration::from_millis(700);

/// The page that the race is about. An invalidation of all pages takes longest before it comes to it.
fn last(buf: &Buffer) -> usize {
    buf.pages() - 1
}

/// A thread changes a word of a page in steps and publishes each step when it is done. The device
/// must read the step that was published before it began, or a later one.
fn race(
    ctx: &Ctx,
    node: usize,
    make: impl FnOnce() -> Outcome<Buffer>,
    step: impl Fn(&Target, &Buffer, u64) -> Outcome + Sync,
) -> Outcome {
    settled(ctx, node, |target| {
        let buf = make()?;
        let page = last(&buf);
        buf.set(page, 0, 0);
        let (said, over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let changer = scope.spawn(|| -> Outcome {
                let start = Instant::now();
                let mut value = 0;
                let mut result = Ok(());
                while start.elapsed() < RACE && result.is_ok() {
                    value += 1;
                    result = step(target, &buf, value);
                    said.store(value, Ordering::SeqCst);
                }
                over.store(true, Ordering::SeqCst);
                result
            });
            let mut reads = 0u64;
            let mut result = Ok(());
            while !over.load(Ordering::SeqCst) {
                let before = said.load(Ordering::SeqCst);
                // A migration in progress may make the read fail.
                let Ok(read) = target.read(&buf, page, 1) else {
                    continue;
                };
                reads += 1;
                let found = read.data[..8].iter().rev();
                let found = found.fold(0, |n, b| (n << 8) | u64::from(*b));
                // In the middle of a step the page may be a page of zeroes.
                let after = said.load(Ordering::SeqCst) + 1;
                if found != 0 && !(before..=after).contains(&found) {
                    result = Err(Fail::failed(format!(
                        "word that the device reads: expected {before}..={after}, found {found}"
                    )));
                    break;
                }
            }
            over.store(true, Ordering::SeqCst);
            let panicked = |_| Err(Fail::failed("a thread panicked"));
            changer.join().unwrap_or_else(panicked)?;
            result?;
            check!(
                reads > 3,
                "reads of the device: expected some, found {reads}"
            );
            Ok(())
        })
    })
}

/// The race for a small page and for a huge one.
fn both_sizes(
    ctx: &Ctx,
    node: usize,
    step: impl Fn(&Target, &Buffer, u64) -> Outcome + Sync,
) -> Outcome {
    for huge in SIZES {
        race(ctx, node, || filled(huge, 1), &step)?;
    }
    Ok(())
}

/// A page is dropped and another one takes its place: a read that does not wait for the end of an
/// invalidation maps the old page again.
pub(super) fn race_dontneed(ctx: &Ctx, node: usize) -> Outcome {
    both_sizes(ctx, node, |_, buf, value| {
        let page = last(buf);
        buf.advise(page, 1, libc::MADV_DONTNEED)?;
        buf.set(page, 0, value);
        Ok(())
    })?;
    // Many pages: the time between the notifier and the change of the last entry is long.
    race(
        ctx,
        node,
        || Buffer::filled(HUGE_PAGES, 1),
        |_, buf, value| {
            buf.advise(0, buf.pages(), libc::MADV_DONTNEED)?;
            for page in 0..buf.pages() {
                buf.set(page, 0, value);
            }
            Ok(())
        },
    )
}

/// The right to write is revoked and given back, which removes the device's entry.
pub(super) fn race_protect(ctx: &Ctx, node: usize) -> Outcome {
    both_sizes(ctx, node, |_, buf, value| {
        let page = last(buf);
        buf.protect(page, 1, libc::PROT_READ)?;
        buf.protect(page, 1, RW)?;
        buf.set(page, 0, value);
        Ok(())
    })
}

/// The page migrates to the device and back.
pub(super) fn race_migrate(ctx: &Ctx, node: usize) -> Outcome {
    both_sizes(ctx, node, |target, buf, value| {
        let n = buf.pages();
        // A concurrent user of the page may keep it in place.
        let _ = target.to_device(buf, 0, n);
        buf.set(last(buf), 0, value);
        if value % 2 == 0 {
            let _ = target.to_system(buf, 0, n);
        }
        Ok(())
    })
}
