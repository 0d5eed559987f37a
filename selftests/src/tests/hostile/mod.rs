// SPDX-License-Identifier: GPL-2.0

//! A hostile caller with nothing but an open file. Such a caller must not be able to break an
//! invariant, learn a secret, take memory without being charged, or delay other tasks.

pub mod areas;
pub mod arguments;
pub mod files;
pub mod holders;
pub mod limits;
pub mod lives;
pub mod machine;
pub mod mappings;
pub mod others;
pub mod pressure;
pub mod release;
pub mod servers;
pub mod storm;
pub mod tasks;
pub mod upkeep;
pub mod ways;

use super::Ctx;
use super::target::{PRIVATE, Target};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, Data, Device, PAGE};
use crate::harness::Child;
use crate::sys;
use crate::uapi::*;

/// Upstream's commands that return data to user space.
pub(super) const READS: [u64; 4] = [
    HMM_READ,
    HMM_READ_UNLOCKED,
    HMM_MIGRATE_TO_DEV,
    HMM_EXCLUSIVE,
];

/// Every flavour of pin.
pub(super) const PINS: [u32; 6] = [
    0,
    ZDM_PIN_WRITE,
    ZDM_PIN_GET,
    ZDM_PIN_LONGTERM,
    ZDM_PIN_FAST,
    ZDM_PIN_WRITE | ZDM_PIN_LONGTERM | ZDM_PIN_FAST,
];

/// Runs `body` as a user without capabilities.
pub(super) fn as_nobody(body: impl FnOnce() -> Outcome) -> Outcome {
    Child::spawn(|| {
        sys::become_nobody().or_fail("setresuid")?;
        body()
    })?
    .join()
}

/// Tries every ioctl on a range. Any result is allowed, but the device must write only data that it
/// has read before.
pub(super) fn every_ioctl(device: &Device, addr: u64, npages: usize) -> Outcome {
    let n = npages as u64;
    let mut room = vec![0; npages * PAGE];
    for request in READS {
        let _ = device.command(request, addr, n, Data::Into(&mut room));
    }
    if device
        .command(HMM_READ, addr, n, Data::Into(&mut room))
        .is_ok()
    {
        let _ = device.command(HMM_WRITE, addr, n, Data::From(&room));
    }
    let _ = device.command(HMM_SNAPSHOT, addr, n, Data::Into(&mut room));
    let _ = device.command(HMM_CHECK_EXCLUSIVE, addr, n, Data::Nowhere);
    for flags in [0, ZDM_FAULT_WRITE] {
        let _ = device.fault(addr, n, flags);
    }
    let _ = device.inspect_at(addr, npages, 0);
    for flags in PINS {
        if let Ok(id) = device.pin_at(addr, n, flags) {
            let _ = device.command(HMM_MIGRATE_TO_DEV, addr, n, Data::Into(&mut room));
            device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        }
    }
    let _ = device.command(HMM_MIGRATE_TO_SYS, addr, n, Data::Nowhere);
    Ok(())
}

/// The violations that the device of each target has counted, for [`Device::expect_violations`].
#[track_caller]
pub(super) fn violations(targets: &[Target]) -> Outcome<Vec<u64>> {
    targets.iter().map(|t| Ok(t.audit()?.0.total)).collect()
}

/// Checks that a device works.
pub(super) fn works(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(4, 1600)?;
    target.move_all(&buf, 1600)?;
    buf.check(0, 4, 1600)
}

/// Pseudo-random numbers, the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[(self.next() % list.len() as u64) as usize]
    }
}

/// Unit tests of this file's helpers.
#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn numbers_differ() {
        let mut numbers = Numbers(1);
        assert_ne!(numbers.next(), numbers.next());
        assert!([1, 2].contains(&numbers.pick(&[1, 2])));
    }
}
