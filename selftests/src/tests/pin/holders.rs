// SPDX-License-Identifier: GPL-2.0

//! Held pages do not migrate under their holder (I9), to the device or from it. The tests cover
//! every flavour of the kernel, with small and huge pages: get and pin, short and long, fast and
//! slow, pipes, registered buffers of io_uring, and a holder in a process that has forked. They
//! find mutants whose migration ignores a pin.

use std::io::Read;

use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, PAGE, check_bytes};
use crate::sys;
use crate::tests::chain::{SIZES, filled};
use crate::tests::counts::Waiting;
use crate::tests::leak::settled;
use crate::tests::target::Target;
use crate::tests::{Ctx, Test};
use crate::uapi::*;
use crate::uring::Uring;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("pin":
    "source" => source,
    "on_device" => on_device,
    "pipe_source" => pipe_source,
    "io_uring_source" => io_uring_source,
    "io_uring_on_device" => io_uring_on_device,
    "source_of_parent" => source_of_parent,
    "shared_then_pinned" => shared_then_pinned,
);

/// Every flavour of ZDM_PIN.
fn flavours() -> impl Iterator<Item = u32> {
    let kinds = [0, ZDM_PIN_GET, ZDM_PIN_LONGTERM];
    kinds.into_iter().flat_map(|kind| {
        [0, ZDM_PIN_WRITE, ZDM_PIN_FAST, ZDM_PIN_WRITE | ZDM_PIN_FAST]
            .into_iter()
            .map(move |more| kind | more)
    })
}

/// The held pages of a buffer. The first page is not among them, so that they are no heads.
fn part(buf: &Buffer) -> (usize, usize) {
    (buf.pages() / 3, 3)
}

/// Tries to move a whole buffer to the device while a part in system memory is held: the part
/// stays, and its data is visible. Where the other pages are does not matter.
#[track_caller]
fn stays(target: &Target, buf: &Buffer, seed: u64, when: &str) -> Outcome {
    let (first, n) = part(buf);
    let frames = proc::frames(buf, first, n)?;
    check_eq!(frames.len(), n, "pages that are mapped {when}");
    for _ in 0..2 {
        // The command fails, because some pages do not move.
        let result = target.to_device(buf, 0, buf.pages());
        check!(
            result.is_err(),
            "MIGRATE_TO_DEV {when}: expected an error, found that all pages went"
        );
        target.expect(buf, first, n, 0)?;
        check_eq!(
            &proc::frames(buf, first, n)?,
            &frames,
            "frames of what is held {when}"
        );
    }
    let read = target.read(buf, 0, buf.pages()).or_fail("READ")?;
    check_bytes(&read.data, seed, 0, "READ around what is held")?;
    buf.check(0, buf.pages(), seed)
}

/// Moves a buffer without held pages: all of it migrates.
#[track_caller]
fn goes(target: &Target, buf: &Buffer, seed: u64) -> Outcome {
    let n = buf.pages();
    target.drain_held(buf)?;
    let moved = target.to_device(buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
    check_bytes(&moved.data, seed, 0, "data that MIGRATE_TO_DEV returned")?;
    target.expect(buf, 0, n, n)?;
    buf.check(0, n, seed)?;
    target.bring_back(buf, 0, n)?;
    buf.check(0, n, seed)
}

/// Held pages of system memory do not migrate.
fn source(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            for flags in flavours() {
                let buf = filled(huge, 2800)?;
                let (first, n) = part(&buf);
                let id = target
                    .pin(&buf, first, n, flags)
                    .or_fail(&format!("ZDM_PIN with {flags:#x}"))?;
                stays(target, &buf, 2800, &format!("with {flags:#x}"))?;
                target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
                goes(target, &buf, 2800)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Pages of the device are to be held. PRIVATE pages come back first, COHERENT pages come back for
/// a long-term pin; the held pages then stay where they are.
fn on_device(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            for flags in flavours() {
                let buf = filled(huge, 2810)?;
                let (first, n) = part(&buf);
                target.move_all(&buf, 2810)?;
                let id = target
                    .pin(&buf, first, n, flags)
                    .or_fail(&format!("ZDM_PIN with {flags:#x}"))?;
                let when = format!("with {flags:#x}");
                let long = flags & ZDM_PIN_LONGTERM != 0;
                if !target.cpu_maps() || (long && !target.keeps_pinned()) {
                    stays(target, &buf, 2810, &when)?;
                } else {
                    target.expect(&buf, first, n, n)?;
                    let frames = proc::frames(&buf, first, n)?;
                    for _ in 0..2 {
                        target
                            .to_system(&buf, 0, buf.pages())
                            .or_fail("MIGRATE_TO_SYS of pages of which some are held")?;
                        target.expect(&buf, first, n, n)?;
                        check_eq!(
                            &proc::frames(&buf, first, n)?,
                            &frames,
                            "frames of what is held {when}"
                        );
                    }
                    buf.check(0, buf.pages(), 2810)?;
                }
                target.unpin(id, ZDM_UNPIN_DIRTY).or_fail("ZDM_UNPIN")?;
                goes(target, &buf, 2810)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A pipe holds pages of system memory.
fn pipe_source(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 2820)?;
            let (first, n) = part(&buf);
            let (mut read, write) = sys::pipe().or_fail("pipe")?;
            let lent = buf.vmsplice_to(&write, first, n).or_fail("vmsplice")?;
            check_eq!(lent, n * PAGE, "bytes lent to the pipe");
            stays(target, &buf, 2820, "lent to a pipe")?;
            let mut data = vec![0; n * PAGE];
            read.read_exact(&mut data).or_fail("read from the pipe")?;
            check_bytes(&data, 2820, first, "data in the pipe")?;
            goes(target, &buf, 2820)
        })?;
    }
    Ok(())
}

/// Registered buffers of io_uring hold pages for a long time.
fn io_uring_source(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 2830)?;
            let (first, n) = part(&buf);
            let ring = Uring::new().or_fail("io_uring_setup")?;
            ring.register(&buf, first, n).or_fail("registering")?;
            stays(target, &buf, 2830, "registered with io_uring")?;
            ring.unregister().or_fail("unregistering")?;
            goes(target, &buf, 2830)?;
            // The end of the ring also releases them.
            ring.register(&buf, first, n).or_fail("registering")?;
            drop(ring);
            // The kernel ends the ring a little later.
            sys::wait_until(std::time::Duration::from_secs(5), || {
                target.to_device(&buf, 0, buf.pages()).is_ok()
            });
            target.expect(&buf, 0, buf.pages(), buf.pages())?;
            buf.check(0, buf.pages(), 2830)
        })?;
    }
    Ok(())
}

/// The pages are on the device when they are registered.
fn io_uring_on_device(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 2840)?;
            let (first, n) = part(&buf);
            target.move_all(&buf, 2840)?;
            let ring = Uring::new().or_fail("io_uring_setup")?;
            ring.register(&buf, first, n).or_fail("registering")?;
            match target.keeps_pinned() {
                true => {
                    target
                        .to_system(&buf, 0, buf.pages())
                        .or_fail("MIGRATE_TO_SYS")?;
                    target.expect(&buf, first, n, n)?;
                }
                false => stays(target, &buf, 2840, "registered with io_uring")?,
            }
            buf.check(0, buf.pages(), 2840)?;
            ring.unregister().or_fail("unregistering")?;
            goes(target, &buf, 2840)
        })?;
    }
    Ok(())
}

/// Pages that the parent holds do not migrate for a child either. If the pin is for writing, the
/// child has a copy from the start.
fn source_of_parent(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 2850)?;
            let n = buf.pages();
            let (first, held) = part(&buf);
            let id = target
                .pin(&buf, first, held, ZDM_PIN_WRITE)
                .or_fail("ZDM_PIN")?;
            let frames = proc::frames(&buf, first, held)?;
            let child = Waiting::start(
                || {
                    buf.check(0, n, 2850)?;
                    let own = Target::open(ctx, node)?;
                    // Pages that child and parent share may migrate for both.
                    let _ = own.to_device(&buf, 0, n);
                    buf.check(0, n, 2850)?;
                    buf.fill(0, n, 2851);
                    buf.check(0, n, 2851)
                },
                || buf.check(0, n, 2851),
            )?;
            check_eq!(
                &proc::frames(&buf, first, held)?,
                &frames,
                "frames of what the parent holds"
            );
            buf.check(0, n, 2850)?;
            child.join()?;
            target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            goes(target, &buf, 2850)
        })?;
    }
    Ok(())
}

/// A shared page of the device is pinned for reading, or for writing: the pin for writing gets a
/// copy, so that neither process sees the other's data.
fn shared_then_pinned(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for flags in [0, ZDM_PIN_WRITE, ZDM_PIN_WRITE | ZDM_PIN_LONGTERM] {
            settled(ctx, node, |target| {
                let buf = filled(huge, 2860)?;
                let n = buf.pages();
                let (first, held) = part(&buf);
                target.move_all(&buf, 2860)?;
                let child = Waiting::start(|| Ok(()), || buf.check(0, n, 2860))?;
                let id = target.pin(&buf, first, held, flags).or_fail("ZDM_PIN")?;
                let frames = proc::frames(&buf, first, held)?;
                check_eq!(frames.len(), held, "pages that are mapped");
                buf.fill(first, held, 2861);
                // The pinned page is the process's page, whatever is written.
                check_eq!(
                    &proc::frames(&buf, first, held)?,
                    &frames,
                    "frames of what is pinned with {flags:#x}, after a write"
                );
                child.join()?;
                buf.check(first, held, 2861)?;
                buf.check(0, first, 2860)?;
                target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
                buf.fill(0, n, 2862);
                target.bring_back(&buf, 0, n)?;
                goes(target, &buf, 2862)
            })?;
        }
    }
    Ok(())
}
