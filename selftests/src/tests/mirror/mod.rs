// SPDX-License-Identifier: GPL-2.0

//! The mirror is right (I12): after any change of the CPU's page table the device sees the same
//! memory as the CPU, with no more rights. If a notifier is missing, late or too short, the device
//! reads old data, a write of the device is lost, or a forbidden write succeeds.
//!
//! Each operation meets pages in system memory that the device has mapped for writing, pages on the
//! device, and pages of the other device of the kind, small and huge.

mod kinds;
mod mappings;
mod pages;
mod race;
mod window;

use self::mappings::{
    fork, mprotect, mremap, mremap_dontunmap, mremap_over, munmap, munmap_part, prot_none,
    uffd_move, uffd_wp,
};
use self::pages::{
    collapse, dontneed, exclusive, exclusive_other, guard, ksm, moved, swapped_out,
    to_other_device, truncate, zeroes,
};
use self::race::{race_dontneed, race_migrate, race_protect};
use self::window::{windows, windows_huge, windows_merge, windows_reclaim};
use super::chain::{SIZES, filled};
use super::leak::settled;
use super::target::{Place, Target};
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, check_bytes, pattern_bytes};
use crate::uapi::ZDM_FAULT_WRITE;

pub const TESTS: &[Test] = of_each_kind!("mirror":
    "fork" => fork,
    "mprotect" => mprotect,
    "prot_none" => prot_none,
    "munmap" => munmap,
    "munmap_part" => munmap_part,
    "mremap" => mremap,
    "mremap_dontunmap" => mremap_dontunmap,
    "mremap_over" => mremap_over,
    "uffd_move" => uffd_move,
    "uffd_wp" => uffd_wp,
    "dontneed" => dontneed,
    "zeroes" => zeroes,
    "guard" => guard,
    "swap_out" => swapped_out,
    "ksm" => ksm,
    "collapse" => collapse,
    "moved" => moved,
    "exclusive" => exclusive,
    "exclusive_other" => exclusive_other,
    "to_other_device" => to_other_device,
    "truncate" => truncate,
    "race_dontneed" => race_dontneed,
    "race_protect" => race_protect,
    "race_migrate" => race_migrate,
);

pub const INJECTING: &[Test] = of_each_kind!("mirror", "inject=1":
    "windows" => windows,
    "windows_huge" => windows_huge,
    "windows_reclaim" => windows_reclaim,
    "windows_merge" => windows_merge,
);

/// Nothing of these is on a device.
pub const IN_PLACE: &[Test] = &[test("mirror.kinds", kinds::kinds)];

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const DENIED: &[i32] = &[libc::EPERM, libc::EFAULT];

/// The setting of a test: a device that has mapped memory.
struct Scene<'a> {
    target: &'a Target,
    other: Target,
    place: Place,
    huge: bool,
    seed: u64,
}

impl Scene<'_> {
    /// Makes the device map pages that hold the pattern of the scene's seed, for writing.
    #[track_caller]
    fn arrange(&self, buf: &Buffer) -> Outcome {
        let n = buf.pages();
        match self.place {
            Place::System => {}
            Place::Local => self.target.move_all(buf, self.seed)?,
            Place::Remote => self.other.move_all(buf, self.seed)?,
        }
        let mapped = self
            .target
            .fault(buf.at(0), n as u64, ZDM_FAULT_WRITE)
            .or_fail("ZDM_FAULT")?;
        check_eq!(mapped, n as u64, "pages that the device maps");
        Ok(())
    }

    #[track_caller]
    fn filled(&self) -> Outcome<Buffer> {
        let buf = filled(self.huge, self.seed)?;
        self.arrange(&buf)?;
        Ok(buf)
    }

    /// Checks that the device reads the pattern of `seed`.
    #[track_caller]
    fn reads(&self, buf: &Buffer, first: usize, n: usize, seed: u64) -> Outcome {
        if n == 0 {
            return Ok(());
        }
        let read = self.target.read(buf, first, n).or_fail("READ")?;
        check_bytes(&read.data, seed, first, "READ by the device")
    }

    /// Checks that the device reads zeroes.
    #[track_caller]
    fn reads_zero(&self, buf: &Buffer, first: usize, n: usize) -> Outcome {
        let read = self.target.read(buf, first, n).or_fail("READ")?;
        let at = read.data.iter().position(|b| *b != 0);
        check_eq!(at, None, "first byte that is not 0 in a READ by the device");
        Ok(())
    }

    /// Checks that the device can neither read nor write the pages.
    #[track_caller]
    fn finds_nothing(&self, buf: &Buffer, first: usize, n: usize) -> Outcome {
        expect_errno(
            self.target.read(buf, first, n),
            DENIED,
            "READ of what is not there",
        )?;
        self.may_not_write(buf, first, n)
    }

    #[track_caller]
    fn may_not_write(&self, buf: &Buffer, first: usize, n: usize) -> Outcome {
        let data = pattern_bytes(self.seed + 9, first, n);
        let result = self.target.write(buf, first, &data);
        expect_errno(result, DENIED, "WRITE without the right")
    }

    /// Checks that CPU and device see each other's writes: first the CPU writes, then the device.
    #[track_caller]
    fn agree(&self, buf: &Buffer, first: usize, n: usize) -> Outcome {
        let seed = self.seed + 1;
        buf.fill(first, n, seed);
        self.reads(buf, first, n, seed)?;
        self.target
            .write(buf, first, &pattern_bytes(seed + 1, first, n))
            .or_fail("WRITE")?;
        buf.check(first, n, seed + 1)?;
        buf.fill(first, n, seed + 2);
        self.reads(buf, first, n, seed + 2)
    }
}

/// Runs `body` for each place and size.
fn each(ctx: &Ctx, node: usize, seed: u64, body: impl Fn(&Scene) -> Outcome) -> Outcome {
    for huge in SIZES {
        for place in Place::ALL {
            settled(ctx, node, |target| {
                let other = Target::open(ctx, node + 1)?;
                body(&Scene {
                    target,
                    other,
                    place,
                    huge,
                    seed,
                })
                .map_err(|e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{place:?}, huge {huge}: {e}")),
                })
            })?;
        }
    }
    Ok(())
}
