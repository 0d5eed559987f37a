// SPDX-License-Identifier: GPL-2.0

//! Files are closed, devices released and modules unloaded while processes use the pages.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::chain::{Image, SIZES, filled};
use super::counts::Waiting;
use super::fight::{TIME, in_turn};
use super::leak::settled;
use super::target::Target;
use super::{Ctx, PAGES, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, PAGE, pattern_bytes};
use crate::harness::Child;
use crate::module::busy;
use crate::threads;
use crate::{check, sys};

pub const TESTS: &[Test] = of_each_kind!("evict":
    "close" => close,
    "release" => release,
    "unload" => unload,
    "device_access" => device_access,
);

/// Starts processes that share pages of the device and use them until `body` has ended. Each writes
/// to pages of its own and checks all others.
fn with_users(
    ctx: &Ctx,
    node: usize,
    buf: &Buffer,
    seed: u64,
    body: impl FnOnce() -> Outcome,
) -> Outcome {
    const USERS: usize = 3;
    let n = buf.pages();
    let (stop, go_on) = sys::pipe().or_fail("pipe")?;
    let mut go_on = Some(go_on);
    let (news, say) = sys::pipe().or_fail("pipe")?;
    let users: Vec<_> = (0..USERS)
        .map(|i| {
            Child::spawn(|| {
                drop(go_on.take());
                let own = Target::open(ctx, node)?;
                let mut image = Image::new(n, seed);
                for round in 0.. {
                    // The end of the pipe says that `body` has ended.
                    if sys::readable(&stop, Duration::ZERO).or_fail("poll")? {
                        break;
                    }
                    let page = (i * 5 + round * 11) % n;
                    image.fill(buf, page, 1, seed + 1 + (round % 20) as u64);
                    image.check(buf)?;
                    match i {
                        // The CPU alone; back to the device; the device.
                        0 => {}
                        1 => drop(own.to_device(buf, 0, n)),
                        _ => image.check_device(&own, buf)?,
                    }
                    if round == 0 {
                        (&say).write_all(b"n").or_fail("pipe")?;
                    }
                }
                image.check(buf)
            })
        })
        .collect::<Outcome<_>>()?;
    drop(stop);
    let begun = sys::readable(&news, Duration::from_secs(20)).or_fail("poll");
    let outcome = body();
    drop(go_on.take());
    for user in users {
        user.join()?;
    }
    check!(begun?, "the users: expected news, found none");
    outcome?;
    buf.check(0, n, seed)
}

/// Files are closed while other processes use their pages.
fn close(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 2200)?;
            let image = Image::new(buf.pages(), 2200);
            image.send(target, &buf)?;
            with_users(ctx, node, &buf, 2200, || {
                for _ in 0..8 {
                    let mine = Target::open(ctx, node)?;
                    // Pages that other processes hold at this moment stay.
                    let _ = mine.to_device(&buf, 0, buf.pages());
                    image.check(&buf)?;
                    drop(mine);
                    image.check(&buf)?;
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// The device gives up its memory while it is in use. A page may refuse to move at this moment; the
/// driver then says so.
fn release(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 2300)?;
            let image = Image::new(buf.pages(), 2300);
            image.send(target, &buf)?;
            let child = Waiting::start(|| Ok(()), || image.check(&buf))?;
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| -> Outcome {
                let faulting = scope.spawn(|| -> Outcome {
                    while !over.load(Ordering::SeqCst) {
                        image.check(&buf)?;
                    }
                    Ok(())
                });
                let released = (0..4).try_for_each(|_| {
                    target.release().or_fail("RELEASE")?;
                    let _ = target.to_device(&buf, 0, buf.pages());
                    Ok(())
                });
                over.store(true, Ordering::SeqCst);
                released.and(threads::join(faulting))
            })?;
            child.join()?;
            image.check(&buf)?;
            target.release().or_fail("RELEASE")?;
            target.expect(&buf, 0, buf.pages(), 0)?;
            image.check(&buf)
        })?;
    }
    Ok(())
}

/// The module cannot be unloaded while a process has one of its files, whatever the process does
/// with it.
fn unload(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let buf = Buffer::filled(PAGES, 2400)?;
        let image = Image::new(PAGES, 2400);
        image.send(target, &buf)?;
        with_users(ctx, node, &buf, 2400, || {
            for _ in 0..20 {
                match ctx.module.try_unload() {
                    Err(e) if busy(&e) => {}
                    other => {
                        return Err(Fail::failed(format!(
                            "unloading with users: expected EAGAIN or EBUSY, found {other:?}"
                        )));
                    }
                }
                image.check(&buf)?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        })
    })
}

/// The device reads and writes pages while another file of the same device brings them back.
fn device_access(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let buf = Buffer::filled(PAGES, 2500)?;
        let over = AtomicBool::new(false);
        let (moving, using) = std::thread::scope(|scope| {
            let moving = scope.spawn(|| -> Outcome<usize> {
                let mut rounds = 0;
                while !over.load(Ordering::SeqCst) {
                    let mine = Target::open(ctx, node)?;
                    let _ = mine.to_device(&buf, 0, PAGES);
                    drop(mine);
                    rounds += 1;
                }
                Ok(rounds)
            });
            let begun = Instant::now();
            let using = (0..).try_for_each(|round: u64| {
                let seed = 2501 + round % 40;
                let data = pattern_bytes(seed, 0, PAGES);
                in_turn(|| target.write(&buf, 0, &data)).or_fail("WRITE")?;
                let read = in_turn(|| target.read(&buf, 0, PAGES)).or_fail("READ")?;
                let page = (round as usize * 17) % PAGES;
                let bytes = &read.data[page * PAGE..(page + 1) * PAGE];
                crate::device::check_bytes(bytes, seed, page, "READ of what was written")?;
                buf.check(page, 1, seed)?;
                match begun.elapsed() > TIME {
                    // This is no error, but the way out of the loop.
                    true => Err(Fail::Skip(String::new())),
                    false => Ok(()),
                }
            });
            over.store(true, Ordering::SeqCst);
            (threads::join(moving), using)
        });
        match using {
            Err(Fail::Skip(_)) => {}
            other => other?,
        }
        let rounds = moving?;
        check!(
            rounds > 0,
            "rounds of the other file: expected some, found 0"
        );
        Ok(())
    })
}
