// SPDX-License-Identifier: GPL-2.0

//! A device of any kind for tests that all kinds share, with the places of pages as the kernel, not
//! the driver, reports them.

use std::ops::{Deref, Range};

use super::Ctx;
use crate::check::{Fail, OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, Device, HUGE_PAGES, check_bytes};
use crate::proc;
use crate::uapi::*;

/// The first node of each kind; the second node has the next number.
pub const PRIVATE: usize = 0;
pub const COHERENT: usize = 2;
pub const GENERIC: usize = 4;

/// The reason for skipping tests that move pages to GENERIC memory under the old rule.
const OLD_RULE: &str = "this kernel keeps a reference on free GENERIC pages";

/// Opens node `n` under either rule. Skips the test if this machine has no memory for the node.
#[track_caller]
pub fn open(ctx: &Ctx, n: usize) -> Outcome<Device> {
    if n >= COHERENT && !ctx.module.nodes().contains(&n) {
        let kind = if n >= GENERIC { "GENERIC" } else { "COHERENT" };
        return Err(Fail::Skip(format!("no memory for {kind} devices")));
    }
    Device::open(n)
}

/// Whether free pages of a GENERIC device have a reference, by the page frames of both devices.
/// Checks that the driver says the same.
///
/// Under the old rule no page ever has count zero. Under the new one free pages do: the last ones
/// are free unless the devices are full.
#[track_caller]
pub fn old_rule(ctx: &Ctx, device: &Device, n: usize) -> Outcome<bool> {
    let said = device.stats()?.free_refs;
    let mut zeroes = false;
    // The last page suffices in most cases, because the allocator gives out low pages first. With
    // small chunks there is no page that far up.
    for tail in [1, usize::MAX] {
        for range in ctx.module.frames(n) {
            let all = (range.end - range.start) as usize;
            let few = all.min(tail);
            let pages = device.inspect_frames(range.end - few as u64, few)?;
            let mut there = pages.iter().filter(|p| p.flags & ZDM_PAGE_THERE != 0);
            zeroes |= there.any(|p| p.refs == 0);
        }
        if zeroes {
            break;
        }
    }
    // Without a free page there is nothing to compare.
    let agree = if zeroes { said == 0 } else { said == 1 };
    match agree || device.audit()?.0.free == 0 {
        true => Ok(said == 1),
        false => Err(Fail::failed(format!(
            "stats.free_refs of {}: expected {} as by the page frames, found {said}",
            Device::path(n),
            u64::from(!zeroes)
        ))),
    }
}

/// Opens a file of every device of this kernel and machine.
pub fn open_all(ctx: &Ctx) -> Outcome<Vec<Target>> {
    open_those(ctx, &[PRIVATE, 1, COHERENT, 3, GENERIC, 5])
}

/// Opens a file of one device of each kind that this kernel and machine have.
pub fn open_each_kind(ctx: &Ctx) -> Outcome<Vec<Target>> {
    open_those(ctx, &[PRIVATE, COHERENT, GENERIC])
}

fn open_those(ctx: &Ctx, nodes: &[usize]) -> Outcome<Vec<Target>> {
    let mut targets = Vec::new();
    for &node in nodes {
        match Target::open(ctx, node) {
            Ok(target) => targets.push(target),
            Err(Fail::Skip(_)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(targets)
}

/// An open device.
pub struct Target {
    device: Device,
    /// The node of the first device of its kind.
    kind: usize,
    /// The page frames of both devices of the kind; `None` for PRIVATE ones, which are never
    /// mapped.
    frames: Option<Vec<Range<u64>>>,
    /// The largest order that this kernel migrates to the device.
    max_order: u64,
}

impl Deref for Target {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

impl Target {
    /// Opens node `n`. Also skips the test if the kernel cannot migrate to a GENERIC node.
    #[track_caller]
    pub fn open(ctx: &Ctx, n: usize) -> Outcome<Self> {
        let device = open(ctx, n)?;
        if n >= GENERIC && old_rule(ctx, &device, n)? {
            return Err(Fail::Skip(OLD_RULE.into()));
        }
        let frames = (n >= COHERENT).then(|| ctx.module.frames(n));
        let max_order = device.stats()?.max_order;
        let huge = u64::from(HUGE_PAGES.ilog2());
        let known = max_order == huge || (frames.is_some() && max_order == 0);
        match known {
            true => Ok(Self {
                device,
                kind: n / 2 * 2,
                frames,
                max_order,
            }),
            false => Err(Fail::failed(format!(
                "stats.max_order of {}: expected {huge}, or 0 unless PRIVATE, found {max_order}",
                Device::path(n)
            ))),
        }
    }

    /// The node of the first device of its kind.
    pub fn node(&self) -> usize {
        self.kind
    }

    /// Whether the CPU can map pages on the device, as with COHERENT and GENERIC memory. Then no
    /// access brings them back, and the device has only the memory that the machine gives it.
    pub fn cpu_maps(&self) -> bool {
        self.frames.is_some()
    }

    /// Whether the device's pages can be pinned for a long time.
    pub fn keeps_pinned(&self) -> bool {
        self.kind == GENERIC
    }

    /// The result of SNAPSHOT for pages of this device, without rights.
    pub fn local(&self) -> u8 {
        match self.kind {
            PRIVATE => PROT_PRIVATE_LOCAL,
            COHERENT => PROT_COHERENT_LOCAL,
            _ => PROT_GENERIC_LOCAL,
        }
    }

    /// The result of SNAPSHOT for pages of the other device of this kind, with `rights`.
    pub fn remote(&self, rights: u8) -> u8 {
        match self.kind {
            // This device cannot use the other device's private memory.
            PRIVATE => PROT_NONE,
            COHERENT => PROT_COHERENT_REMOTE | rights,
            _ => PROT_GENERIC_REMOTE | rights,
        }
    }

    /// The memory type that ZDM_INSPECT returns for pages of this device.
    pub fn memory_type(&self) -> u32 {
        match self.kind {
            PRIVATE => TYPE_PRIVATE,
            COHERENT => TYPE_COHERENT,
            _ => TYPE_GENERIC,
        }
    }

    /// Whether huge pages migrate in one piece.
    pub fn moves_large(&self) -> bool {
        self.max_order > 0
    }

    /// The number of pages that are on a device of this kind.
    #[track_caller]
    pub fn on_device(&self, buf: &Buffer, first: usize, n: usize) -> Outcome<usize> {
        let Some(frames) = &self.frames else {
            return Ok(proc::on_device(buf, first, n)?.len());
        };
        let here = proc::frames(buf, first, n)?;
        let inside = |pfn: &&u64| frames.iter().any(|r| r.contains(pfn));
        Ok(here.iter().filter(inside).count())
    }

    /// Checks how many of the pages are on the device.
    #[track_caller]
    pub fn expect(&self, buf: &Buffer, first: usize, n: usize, expected: usize) -> Outcome {
        let found = self.on_device(buf, first, n)?;
        match found == expected {
            true => Ok(()),
            false => Err(Fail::failed(format!(
                "device pages among pages {first}..{}: expected {expected}, found {found}",
                first + n
            ))),
        }
    }

    /// Moves a whole buffer with the pattern of `seed`, none of it on the device yet. Checks that
    /// every page moved and has the right data.
    #[track_caller]
    pub fn move_all(&self, buf: &Buffer, seed: u64) -> Outcome {
        let n = buf.pages();
        self.drain_held(buf)?;
        let before = self.stats()?;
        let moved = self
            .to_device(buf, 0, n)
            .or_fail("MIGRATE_TO_DEV of the whole buffer")?;
        check_bytes(&moved.data, seed, 0, "data that MIGRATE_TO_DEV returned")?;
        self.expect(buf, 0, n, n)?;
        let went = self.stats()?.to_device.wrapping_sub(before.to_device);
        match (moved.cpages == n as u64, went == n as u64) {
            (true, true) => Ok(()),
            _ => Err(Fail::failed(format!(
                "pages that went: expected {n}, found {} by the ioctl, {went} by stats",
                moved.cpages
            ))),
        }
    }

    /// As `move_all`, for a buffer of huge pages. Checks that each moved in one piece, if the
    /// kernel can do that, and is mapped as one.
    #[track_caller]
    pub fn move_huge(&self, buf: &Buffer, seed: u64) -> Outcome {
        let before = self.stats()?;
        self.move_all(buf, seed)?;
        self.expect_large(&before, buf.pages() / HUGE_PAGES, 0, 0)?;
        if self.moves_large() {
            expect_huge(buf, 0, buf.pages(), buf.pages())?;
        }
        Ok(())
    }

    /// Checks how many huge pages have moved since `before`: to the device, to the system, and in
    /// small pieces. If the kernel moves only small pages, checks only that.
    #[track_caller]
    pub fn expect_large(
        &self,
        before: &Stats,
        to_device: usize,
        to_system: usize,
        fallback: usize,
    ) -> Outcome {
        let now = self.stats()?;
        // The counters by order agree with the counters in pages.
        check_eq!(
            [
                Stats::pages(&now.to_device_by_order),
                Stats::pages(&now.to_system_by_order)
            ],
            [now.to_device, now.to_system + now.evicted],
            "pages that have moved to the device and back, by order"
        );
        let found = [
            now.large_to_device.wrapping_sub(before.large_to_device),
            now.large_to_system.wrapping_sub(before.large_to_system),
            now.large_fallback.wrapping_sub(before.large_fallback),
        ];
        let expected = match self.moves_large() {
            true => [to_device as u64, to_system as u64, fallback as u64],
            // The driver may count those as fallbacks or not.
            false => [0, 0, found[2]],
        };
        match found == expected {
            true => Ok(()),
            false => Err(Fail::failed(format!(
                "growth of stats.large_{{to_device, to_system, fallback}}: expected \
                 {expected:?}, found {found:?}"
            ))),
        }
    }

    /// Brings pages back to system memory: by a CPU access to each, or by request where accesses
    /// bring nothing back.
    #[track_caller]
    pub fn bring_back(&self, buf: &Buffer, first: usize, n: usize) -> Outcome {
        if self.cpu_maps() {
            self.to_system(buf, first, n).or_fail("MIGRATE_TO_SYS")?;
        } else {
            for page in first..first + n {
                buf.get(page, 0);
            }
        }
        self.expect(buf, first, n, 0)
    }

    /// Checks that no page is in use on the device and that a scan finds no violation.
    #[track_caller]
    pub fn expect_empty(&self) -> Outcome {
        // RCU and other CPUs free pages a little later.
        let mut audit = self.audit()?.0;
        crate::sys::wait_until(std::time::Duration::from_secs(2), || {
            // A failed call shows in the final check.
            if let Ok((again, _)) = self.try_audit(0) {
                audit = again;
            }
            audit.used == 0 && audit.found == 0
        });
        check_eq!((audit.used, audit.found), (0, 0), "used pages and faults");
        Ok(())
    }
}

/// Checks how many of the pages are mapped as parts of huge pages, on a device or not.
#[track_caller]
pub fn expect_huge(buf: &Buffer, first: usize, n: usize, expected: usize) -> Outcome {
    let found = proc::huge(buf, first, n)?;
    match found == expected {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "pages {first}..{} that huge entries map: expected {expected}, found {found}",
            first + n
        ))),
    }
}

/// Makes `count` huge pages with the pattern of `seed`. The kernel may decline to make them huge,
/// so it gets a second chance.
#[track_caller]
pub fn huge_filled(count: usize, seed: u64) -> Outcome<Buffer> {
    let n = count * HUGE_PAGES;
    let buf = Buffer::anon_huge_aligned(n)?;
    buf.advise(0, n, libc::MADV_HUGEPAGE)?;
    buf.fill(0, n, seed);
    make_huge(&buf)?;
    Ok(buf)
}

/// Where the pages of a scene are: in system memory, on its device, or on another device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    System,
    Local,
    Remote,
}

impl Place {
    pub const ALL: [Self; 3] = [Self::System, Self::Local, Self::Remote];
}

/// Makes a touched buffer in system memory huge, if it is not.
#[track_caller]
pub fn make_huge(buf: &Buffer) -> Outcome {
    let n = buf.pages();
    if proc::huge(buf, 0, n)? != n {
        buf.advise(0, n, libc::MADV_COLLAPSE)?;
    }
    expect_huge(buf, 0, n, n)
}
