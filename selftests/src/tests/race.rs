// SPDX-License-Identifier: GPL-2.0

//! Two threads use the same pages at once. Each test checks that both sides did their work, because
//! a race without a competitor tests nothing.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, Test, test};
use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Data, PAGE};
use crate::threads::{self, SetOnDrop};
use crate::uapi::HMM_MIGRATE_TO_DEV;

pub const TESTS: &[Test] = &[
    test("race.munmap_migrate", munmap_migrate::<PRIVATE>),
    test("race.fault_migrate", fault_migrate::<PRIVATE>),
    test("race_generic.munmap_migrate", munmap_migrate::<GENERIC>),
    test("race_generic.fault_migrate", fault_migrate::<GENERIC>),
];

const ROUNDS: usize = 60;
const N: usize = 16;

/// Runs a migrating thread, which counts its calls and stops when `other` ends.
///
/// The thread must not allocate: memory from mmap could take the place of a buffer that the other
/// thread has just unmapped.
fn against_migration(
    device: &Target,
    buf: &Buffer,
    errnos: &[i32],
    other: impl FnOnce(&AtomicUsize, &AtomicBool) -> Outcome,
) -> Outcome {
    let calls = AtomicUsize::new(0);
    let (over, dead) = (AtomicBool::new(false), AtomicBool::new(false));
    let before = device.stats()?;
    let mut data = vec![0; N * PAGE];
    let outcome = std::thread::scope(|scope| {
        let migrating = scope.spawn(|| {
            let _dead = SetOnDrop(&dead);
            while !over.load(Ordering::SeqCst) {
                let into = Data::Into(&mut data);
                let result = device.command(HMM_MIGRATE_TO_DEV, buf.at(0), N as u64, into);
                calls.fetch_add(1, Ordering::SeqCst);
                match result {
                    Err(e) if !e.raw_os_error().is_some_and(|n| errnos.contains(&n)) => {
                        return Err(Fail::failed(format!(
                            "MIGRATE_TO_DEV in a race: expected success or {errnos:?}, found {e}"
                        )));
                    }
                    _ => {}
                }
            }
            Ok(())
        });
        let outcome = {
            let _over = SetOnDrop(&over);
            // A new thread gets memory from mmap, which must not take the place of a buffer that is
            // unmapped for a moment.
            wait_for_call(&calls, &dead);
            other(&calls, &dead)
        };
        outcome.and(threads::join(migrating))
    });
    outcome?;
    let went = device.stats()?.to_device.wrapping_sub(before.to_device);
    check!(
        went > 0,
        "pages that went in the race: expected some, found none"
    );
    Ok(())
}

/// Waits until a migration that began after this call has ended.
fn wait_for_call(calls: &AtomicUsize, dead: &AtomicBool) {
    let target = calls.load(Ordering::SeqCst) + 2;
    while calls.load(Ordering::SeqCst) < target && !dead.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

fn munmap_migrate<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(N, 90)?;
    // There is no mapping, or the pages moved away again before the data was read.
    let errnos = [libc::EINVAL, libc::ENOENT, libc::EFAULT, libc::EBUSY];
    against_migration(&device, &buf, &errnos, |calls, dead| {
        for round in 0..ROUNDS {
            if round % 4 == 1 {
                wait_for_call(calls, dead);
            }
            buf.check(0, N, 90)?;
            if round % 8 == 5 {
                wait_for_call(calls, dead);
            }
            buf.unmap(0, N)?;
            buf.map_again(0, N)?;
            buf.fill(0, N, 90);
        }
        Ok(())
    })?;
    buf.check(0, N, 90)
}

fn fault_migrate<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(N, 91)?;
    // The pages were faulted back before the data was read.
    let errnos = [libc::ENOENT, libc::EBUSY];
    against_migration(&device, &buf, &errnos, |calls, dead| {
        for round in 0..ROUNDS {
            if round % 4 == 1 {
                wait_for_call(calls, dead);
            }
            buf.check(0, N, 91)?;
            // A write to a page that is being copied must not be lost.
            for page in 0..N {
                buf.set(page, 3, round as u64);
            }
            for page in 0..N {
                let found = buf.get(page, 3);
                check!(
                    found == round as u64,
                    "word written to page {page}: expected {round}, found {found}"
                );
            }
            buf.fill(0, N, 91);
            // Where no CPU fault brings pages back, the other thread does so by request, which
            // races as well.
            if device.cpu_maps() {
                device.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
            }
        }
        Ok(())
    })?;
    buf.check(0, N, 91)
}
