// SPDX-License-Identifier: GPL-2.0

//! Device-dax, whose pages are GENERIC memory that is never migrated. An idle page has count 0, and
//! each PTE, PMD or PUD that maps it adds one. Kernels with the old rule have one more of each,
//! which `old_rule` shows; the other tests on counts fail there. `dax/unbind.rs` takes the driver
//! away meanwhile.

pub mod mapped;
pub mod pins;
pub mod poison;
pub mod unbind;
pub mod upkeep;
pub mod uring;

use super::counts::{Counts, IDLE, MAPPED, Waiting};
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::dax::{Dax, PMD, PTE, PUD};
use crate::device::{Buffer, Device, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::threads;
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("dax.data", data),
    test("dax.bad_mappings", bad_mappings),
    test("dax.no_split", no_split),
    test("dax.ends", ends),
    test("dax.no_migration", no_migration),
    test("dax.old_rule", old_rule),
    test("dax.idle", idle),
    test("dax.pte", mapping::<PTE>),
    test("dax.pmd", mapping::<PMD>),
    test("dax.pud", mapping::<PUD>),
    test("dax.fork", fork::<PTE>),
    test("dax.fork_pmd", fork::<PMD>),
    test("dax.processes", processes::<PTE>),
    test("dax.processes_pmd", processes::<PMD>),
    test("dax.exit", exit),
    test("dax.mremap", mremap::<PTE>),
    test("dax.mremap_pmd", mremap::<PMD>),
    test("dax.mprotect", mprotect),
    test("dax.partial_munmap", partial_munmap),
    test("dax.race", race::<PTE>),
    test("dax.race_pmd", race::<PMD>),
];

/// The number of folios in most mappings.
const FOLIOS: usize = 4;

/// A device-dax, and a device that inspects and pins its pages.
///
/// The device is dropped first, because the end of a device-dax waits until no page is held.
pub(super) struct Setup {
    pub device: Device,
    pub dax: Dax,
}

impl Setup {
    #[track_caller]
    pub fn new(align: usize) -> Outcome<Self> {
        let device = Device::open(0)?;
        let dax = Dax::set_up(align)?;
        Ok(Self { device, dax })
    }

    /// The references of an idle page, by the first one: 0, or 1 under the old rule.
    #[track_caller]
    pub fn idle_refs(&self) -> Outcome<i32> {
        let page = self.device.inspect_frames(self.dax.frame(), 1)?[0];
        match page.kind {
            TYPE_GENERIC => Ok(page.refs),
            _ => Err(Fail::failed(format!(
                "type of the first page of a device-dax: expected GENERIC, found {page:x?}"
            ))),
        }
    }

    /// Checks the counts of every page of some folios.
    #[track_caller]
    pub fn expect(&self, first: usize, folios: usize, counts: Counts, when: &str) -> Outcome {
        let step = self.dax.step();
        for folio in first..first + folios {
            let frame = self.dax.frame() + (folio * step) as u64;
            // Check only the ends of a folio as large as a PUD maps.
            let pages = match step {
                0..=512 => self.device.inspect_frames(frame, step)?,
                _ => {
                    let mut pages = self.device.inspect_frames(frame, 512)?;
                    let last = frame + step as u64 - 1;
                    pages.extend(self.device.inspect_frames(last, 1)?);
                    pages
                }
            };
            for page in pages {
                let found = [page.refs, page.mapcount, page.pins];
                if found != counts || page.order != step.ilog2() || page.kind != TYPE_GENERIC {
                    return Err(Fail::failed(format!(
                        "folio {folio} {when}: expected [references, mappings, pins] \
                         {counts:?}, order {}, GENERIC, found {page:x?}",
                        step.ilog2()
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Data that one mapping writes is read by another mapping, another process, the device, and the
/// next mapping.
fn data(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let n = 16.max(2 * s.dax.step());
        let (a, b) = (s.dax.map(n)?, s.dax.map(n)?);
        a.fill(0, n, 700);
        b.check(0, n, 700)?;
        Child::spawn(|| {
            b.check(0, n, 700)?;
            b.fill(0, 3, 701);
            a.check(0, 3, 701)
        })?
        .join()?;
        a.check(0, 3, 701)?;
        a.check(3, n - 3, 700)?;
        let read = s.device.read(&a, 3, n - 3).or_fail("READ")?;
        check_bytes(&read.data, 700, 3, "READ by the device")?;
        s.device
            .write(&b, 0, &pattern_bytes(702, 0, 3))
            .or_fail("WRITE")?;
        a.check(0, 3, 702)?;
        let seen = s.device.snapshot(&a, 0, n).or_fail("SNAPSHOT")?;
        let whole = if align == PMD { PROT_PMD } else { 0 };
        let expected = PROT_GENERIC_REMOTE | PROT_WRITE | whole;
        check_eq!(seen, vec![expected; n], "SNAPSHOT");
        drop((a, b));
        let c = s.dax.map(n)?;
        c.check(0, 3, 702)?;
        c.check(3, n - 3, 700)?;
    }
    Ok(())
}

/// Mappings that device-dax has always refused.
fn bad_mappings(_: &Ctx) -> Outcome {
    let s = Setup::new(PMD)?;
    let file = s.dax.open()?;
    let private = Buffer::of_file(&file, s.dax.step(), libc::MAP_PRIVATE);
    expect_errno(private, &[libc::EINVAL], "a private mapping")?;
    let part = Buffer::of_file(&file, 100, libc::MAP_SHARED);
    expect_errno(part, &[libc::EINVAL], "a mapping that is no multiple")?;
    // A mapping beyond the end of the device fails.
    let n = s.dax.pages() + s.dax.step();
    let long = Buffer::of_file(&file, n, libc::MAP_SHARED).or_fail("mmap")?;
    let child = Child::spawn(|| {
        long.get(s.dax.pages(), 0);
        Ok(())
    })?;
    let end = Exit::Signal(libc::SIGBUS);
    check_eq!(child.exit()?, end, "access beyond the end");
    Ok(())
}

/// An area is divided only between folios, whatever divides it: the kernel refuses other places, and
/// the area stays as it is.
fn no_split(_: &Ctx) -> Outcome {
    let s = Setup::new(PMD)?;
    let (step, idle) = (s.dax.step(), s.idle_refs()?);
    let n = 3 * step;
    let buf = s.dax.map(n)?;
    buf.fill(0, n, 705);
    for (first, count) in [
        (0, 1),
        (1, 1),
        (step - 1, 2),
        (step / 2, step),
        (step, step + 1),
        (n - 1, 1),
    ] {
        let refused = [
            buf.protect(first, count, libc::PROT_READ).is_err(),
            buf.unmap(first, count).is_err(),
            buf.try_advise(first, count, libc::MADV_DONTFORK).is_err(),
        ];
        check_eq!(
            refused,
            [true; 3],
            "refusals of mprotect, munmap and MADV_DONTFORK of {count} pages from {first} on"
        );
    }
    buf.check(0, n, 705)?;
    s.expect(0, 3, [idle + 1, 1, 0], "mapped as before")?;
    // Whole folios can be divided.
    buf.protect(step, step, libc::PROT_READ)?;
    buf.unmap(0, step)?;
    buf.check(step, 2 * step, 705)?;
    buf.fill(2 * step, step, 706);
    buf.check(2 * step, step, 706)
}

/// The first and the last page of the device can be used, by the CPU and by a pin, and no page
/// beyond: there a fault is SIGBUS, and a pin fails.
fn ends(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let (n, step) = (s.dax.pages(), s.dax.step());
        let buf = s.dax.map(n + step)?;
        for page in [0, n - step, n - 1] {
            // The first access to the last folio is one to its last page in the second round.
            let fresh = s.dax.map(n + step)?;
            fresh.fill(page, 1, 704);
            buf.check(page, 1, 704)?;
            let found = s.device.inspect_one(&fresh, page)?;
            check_eq!(
                found.pfn,
                s.dax.frame() + page as u64,
                "frame of page {page}"
            );
            let id = s
                .device
                .pin(&fresh, page, 1, ZDM_PIN_WRITE)
                .or_fail("ZDM_PIN")?;
            s.device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            let read = s.device.read(&fresh, page, 1).or_fail("READ")?;
            check_bytes(&read.data, 704, page, "READ by the device")?;
        }
        for page in [n, n + step - 1] {
            let pinned = s.device.pin(&buf, page, 1, ZDM_PIN_WRITE);
            expect_errno(pinned, &[libc::EFAULT], "a pin beyond the end")?;
            let child = Child::spawn(|| {
                buf.get(page, 0);
                Ok(())
            })?;
            let end = Exit::Signal(libc::SIGBUS);
            check_eq!(child.exit()?, end, "access to page {page}, beyond the end");
        }
    }
    Ok(())
}

/// Core mm does not migrate such mappings, and a device cannot get exclusive access to them.
fn no_migration(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let n = s.dax.step();
        let buf = s.dax.map(n)?;
        buf.fill(0, n, 703);
        let result = s.device.to_device(&buf, 0, n);
        expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_DEV")?;
        let result = s.device.to_system(&buf, 0, n);
        expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_SYS")?;
        // A PMD would be split first, and an access to the rest would be SIGBUS.
        if align == PTE {
            let result = s.device.exclusive(&buf, 0, 1);
            expect_errno(result, &[libc::EOPNOTSUPP], "EXCLUSIVE")?;
        }
        check_eq!(s.device.audit()?.0.used, 0, "used pages in the audit");
        buf.check(0, n, 703)?;
    }
    Ok(())
}

/// The old rule, seen from outside: one reference without a holder.
fn old_rule(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        if s.idle_refs()? == 0 {
            return Err(Fail::Skip("free pages have no reference here".into()));
        }
        let buf = s.dax.map(s.dax.step())?;
        s.expect(0, 1, [1, 0, 0], "idle")?;
        buf.set(0, 0, 1);
        s.expect(0, 1, [2, 1, 0], "mapped")?;
        let child = Waiting::start(|| touch(&buf, &s.dax, 1), || Ok(()))?;
        s.expect(0, 1, [3, 2, 0], "forked")?;
        child.join()?;
        s.expect(0, 1, [2, 1, 0], "after the child's end")?;
        drop(buf);
        s.expect(0, 1, [1, 0, 0], "unmapped")?;
    }
    Ok(())
}

/// Maps folios by read accesses.
fn touch(buf: &Buffer, dax: &Dax, folios: usize) -> Outcome {
    for folio in 0..folios {
        buf.get(folio * dax.step(), 0);
    }
    Ok(())
}

/// Every page of the device is idle.
fn idle(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let n = s.dax.pages();
        check!(
            n >= 16 * s.dax.step(),
            "pages of the device-dax: expected many, found {n}"
        );
        let pages = s.device.inspect_frames(s.dax.frame(), n)?;
        for (i, page) in pages.iter().enumerate() {
            let expected = PageInfo {
                pfn: s.dax.frame() + i as u64,
                order: s.dax.step().ilog2(),
                kind: TYPE_GENERIC,
                flags: ZDM_PAGE_THERE,
                owner: ZDM_OWNER_NONE,
                index: (i % s.dax.step()) as u32,
                ..PageInfo::default()
            };
            check_eq!(*page, expected, "page {i} of the device-dax");
        }
    }
    Ok(())
}

/// Each entry adds one: by a read, by a write, by a second mapping. Each unmapping removes one.
fn mapping<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let step = s.dax.step();
    let folios = FOLIOS.min(s.dax.pages() / step);
    let a = s.dax.map(folios * step)?;
    s.expect(0, folios, IDLE, "before the first access")?;
    // Access the middle of the range that one fault maps, by a read and by a write.
    for folio in 0..folios {
        let page = folio * step + step / 2;
        match folio % 2 {
            0 => a.set(page, 7, 1),
            _ => drop(a.get(page, 7)),
        }
        s.expect(folio, 1, MAPPED, "mapped")?;
        s.expect(folio + 1, folios - folio - 1, IDLE, "not yet mapped")?;
    }
    let page = s.device.inspect_one(&a, step / 2)?;
    let size = match ALIGN {
        PTE => 0,
        PMD => ZDM_PAGE_PMD,
        _ => ZDM_PAGE_PUD,
    };
    let mask = ZDM_PAGE_THERE | ZDM_PAGE_WRITE | ZDM_PAGE_PMD | ZDM_PAGE_PUD | ZDM_PAGE_ANON;
    check_eq!(
        page.flags & mask,
        ZDM_PAGE_THERE | ZDM_PAGE_WRITE | size,
        "flags of a page by its address"
    );
    check_eq!(
        page.pfn,
        s.dax.frame() + (step / 2) as u64,
        "frame of a page by its address"
    );
    // A page that was mapped by a read is written in place.
    a.fill(0, 1, 704);
    touch(&a, &s.dax, folios)?;
    s.expect(0, folios, MAPPED, "written and read again")?;

    let b = s.dax.map(folios * step)?;
    s.expect(0, folios, MAPPED, "with a second mapping, not used")?;
    b.check(0, 1, 704)?;
    s.expect(0, 1, [2, 2, 0], "mapped twice")?;
    s.expect(1, folios - 1, MAPPED, "mapped once")?;
    drop(a);
    s.expect(0, 1, MAPPED, "by the second mapping")?;
    s.expect(1, folios - 1, IDLE, "unmapped")?;
    drop(b);
    s.expect(0, folios, IDLE, "unmapped")?;
    // Repeated mapping keeps the counts right.
    for _ in 0..20 {
        let buf = s.dax.map(folios * step)?;
        touch(&buf, &s.dax, folios)?;
    }
    s.expect(0, folios, IDLE, "in the end")
}

/// The entries of a child count like others.
fn fork<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let n = FOLIOS * s.dax.step();
    let buf = s.dax.map(n)?;
    buf.fill(0, 1, 705);
    touch(&buf, &s.dax, FOLIOS)?;
    s.expect(0, FOLIOS, MAPPED, "mapped")?;
    // The child makes its own entries of a shared mapping when it accesses it.
    let child = Waiting::start(
        || {
            touch(&buf, &s.dax, 2)?;
            let grandchild = Waiting::start(|| touch(&buf, &s.dax, 1), || Ok(()))?;
            s.expect(0, 1, [3, 3, 0], "with a grandchild")?;
            grandchild.join()?;
            s.expect(0, 1, [2, 2, 0], "without the grandchild")?;
            buf.check(0, 1, 705)
        },
        || {
            buf.check(0, 1, 705)?;
            buf.unmap(0, n)
        },
    )?;
    s.expect(0, 2, [2, 2, 0], "forked")?;
    drop(buf);
    s.expect(0, 2, MAPPED, "by the child")?;
    child.join()?;
    s.expect(0, FOLIOS, IDLE, "after all")
}

/// Another process opens the node itself.
fn processes<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let n = FOLIOS * s.dax.step();
    let mine = s.dax.map(n)?;
    mine.fill(0, 1, 706);
    let mut others = Vec::new();
    for i in 0..3 {
        others.push(Waiting::start(
            || {
                let theirs = std::mem::ManuallyDrop::new(s.dax.map(n)?);
                theirs.check(0, 1, 706)?;
                theirs.get(n - 1, 0);
                Ok(())
            },
            || Ok(()),
        )?);
        s.expect(0, 1, [i + 2, i + 2, 0], "mapped by several processes")?;
        s.expect(FOLIOS - 1, 1, [i + 1, i + 1, 0], "mapped by others")?;
    }
    // One process ends by itself, one is killed.
    for (i, other) in (0..3).rev().zip(others) {
        match i % 2 {
            0 => other.join()?,
            _ => other.kill()?,
        }
        s.expect(0, 1, [i + 1, i + 1, 0], "mapped by those who are left")?;
    }
    s.expect(FOLIOS - 1, 1, IDLE, "after the others")?;
    drop(mine);
    s.expect(0, FOLIOS, IDLE, "after all")
}

/// Processes end with their mappings.
fn exit(_: &Ctx) -> Outcome {
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        for how in 0..3 {
            let child = Child::spawn(|| {
                let buf = s.dax.map(FOLIOS * s.dax.step())?;
                touch(&buf, &s.dax, FOLIOS)?;
                s.expect(0, FOLIOS, MAPPED, "by a child")?;
                let own = Device::open(0)?;
                own.pin(&buf, 0, 1, ZDM_PIN_LONGTERM | ZDM_PIN_WRITE)
                    .or_fail("ZDM_PIN")?;
                match how {
                    0 => sys::exit_now(0),
                    1 => sys::kill(sys::pid(), libc::SIGKILL).or_fail("kill"),
                    _ => sys::kill(sys::pid(), libc::SIGABRT).or_fail("kill"),
                }
            })?;
            let expected = [
                Exit::Code(0),
                Exit::Signal(libc::SIGKILL),
                Exit::Signal(libc::SIGABRT),
            ];
            check_eq!(child.exit()?, expected[how], "end of a child");
            s.expect(0, FOLIOS, IDLE, "after its end")?;
        }
    }
    Ok(())
}

/// Entries move, the counts stay the same.
fn mremap<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let n = FOLIOS * s.dax.step();
    let buf = s.dax.map(n)?;
    buf.fill(0, 1, 709);
    touch(&buf, &s.dax, FOLIOS)?;
    let place = Buffer::anon_huge_aligned(n)?;
    buf.move_pages(0, n, &place, 0)?;
    s.expect(0, FOLIOS, MAPPED, "after mremap")?;
    place.check(0, 1, 709)?;
    s.expect(0, FOLIOS, MAPPED, "after mremap and access")?;
    check_eq!(
        s.device.inspect_one(&place, 0)?.pfn,
        s.dax.frame(),
        "frame after mremap"
    );
    drop(place);
    s.expect(0, FOLIOS, IDLE, "after munmap")
}

fn mprotect(_: &Ctx) -> Outcome {
    const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
    for align in [PTE, PMD] {
        let s = Setup::new(align)?;
        let (step, n) = (s.dax.step(), FOLIOS * s.dax.step());
        let buf = s.dax.map(n)?;
        buf.fill(0, 1, 710);
        touch(&buf, &s.dax, FOLIOS)?;
        buf.protect(0, step, libc::PROT_READ)?;
        s.expect(0, FOLIOS, MAPPED, "after mprotect")?;
        let child = Child::spawn(|| {
            buf.set(0, 0, 1);
            Ok(())
        })?;
        let end = Exit::Signal(libc::SIGSEGV);
        check_eq!(child.exit()?, end, "write to read-only memory");
        s.expect(0, FOLIOS, MAPPED, "after a child's attempt")?;
        buf.protect(0, step, libc::PROT_NONE)?;
        buf.protect(0, step, RW)?;
        buf.check(0, 1, 710)?;
        buf.fill(0, 1, 711);
        s.expect(0, FOLIOS, MAPPED, "writable again")?;
        buf.check(0, 1, 711)?;
        drop(buf);
        s.expect(0, FOLIOS, IDLE, "after munmap")?;
    }
    Ok(())
}

/// Unmaps the middle, and single pieces.
fn partial_munmap(_: &Ctx) -> Outcome {
    const N: usize = 64;
    let s = Setup::new(PTE)?;
    let buf = s.dax.map(N)?;
    buf.fill(0, N, 712);
    buf.unmap(10, 20)?;
    s.expect(0, 10, MAPPED, "before what is unmapped")?;
    s.expect(10, 20, IDLE, "unmapped")?;
    s.expect(30, N - 30, MAPPED, "behind what is unmapped")?;
    // Zap the pages and map them again.
    buf.advise(40, 8, libc::MADV_DONTNEED)?;
    s.expect(40, 8, IDLE, "after MADV_DONTNEED")?;
    buf.check(30, N - 30, 712)?;
    s.expect(30, N - 30, MAPPED, "mapped again")?;
    for page in 30..N {
        buf.unmap(page, 1)?;
        s.expect(page, 1, IDLE, "unmapped alone")?;
    }
    buf.check(0, 10, 712)?;
    drop(buf);
    s.expect(0, N, IDLE, "after all")?;
    // A huge page can only be unmapped as a whole.
    drop(s);
    let s = Setup::new(PMD)?;
    let buf = s.dax.map(2 * s.dax.step())?;
    touch(&buf, &s.dax, 2)?;
    check!(
        buf.unmap(0, 100).is_err(),
        "munmap of a part of what a PMD maps: expected an error, found success"
    );
    s.expect(0, 2, MAPPED, "after a munmap that was refused")?;
    buf.unmap(0, s.dax.step())?;
    s.expect(0, 1, IDLE, "unmapped")?;
    s.expect(1, 1, MAPPED, "left")
}

/// Two processes of two threads each fault the same pages in and unmap them.
fn race<const ALIGN: usize>(_: &Ctx) -> Outcome {
    const ROUNDS: usize = 200;
    let s = Setup::new(ALIGN)?;
    let n = FOLIOS * s.dax.step();
    let work = || -> Outcome {
        let buf = s.dax.map(n)?;
        threads::run(2, |thread| {
            for round in 0..ROUNDS {
                let folio = (round + thread) % FOLIOS;
                let page = folio * s.dax.step();
                match round % 3 {
                    0 => buf.set(page, 8 + thread, 1),
                    1 => drop(buf.get(page, 0)),
                    _ => buf.advise(page, s.dax.step(), libc::MADV_DONTNEED)?,
                }
            }
            Ok(())
        })?;
        touch(&buf, &s.dax, FOLIOS)
    };
    let before = s.idle_refs()?;
    let children = [Child::spawn(work)?, Child::spawn(work)?];
    for child in children {
        child.join()?;
    }
    check_eq!(before, 0, "references of an idle page");
    s.expect(0, FOLIOS, IDLE, "after the race")
}
