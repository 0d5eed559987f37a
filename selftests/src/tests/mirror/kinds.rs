// SPDX-License-Identifier: GPL-2.0

//! Memory of every kind that a device can map in place, and each operation that takes a page or a right away from
//! it: by the process, by another mapping of the file, or by the file system. Core mm has code of its own for most
//! of these pairs. The device must never read or write what the CPU does not, and strict mode compares the page
//! tables after each ioctl.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use super::super::Ctx;
use super::super::counts::Waiting;
use super::super::entries::Strict;
use super::super::leak::settled;
use super::super::strict::has_all_fixes;
use super::super::target::Target;
use super::RW;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE, pattern_bytes};
use crate::fsdax::{EXT4, Mounted, XFS};
use crate::pagestate::clear_soft_dirty;
use crate::uapi::ZDM_FAULT_WRITE;
use crate::{check, check_eq, files, proc, sys};

/// Small pages of a memory.
const SMALL: usize = 8;
const SEED: u64 = 3500;
/// The pattern of an operation that writes.
const NEW: u64 = 3501;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Small,
    Huge,
    /// The page of zeroes.
    Zeroes,
    ZeroesHuge,
    Hugetlb,
    /// A file in memory.
    Shared,
    SharedLarge,
    /// One of which the process has no copy yet.
    Private,
    /// DAX.
    Ext4,
    Xfs,
    XfsHuge,
}

const KINDS: [Kind; 11] = [
    Kind::Small,
    Kind::Huge,
    Kind::Zeroes,
    Kind::ZeroesHuge,
    Kind::Hugetlb,
    Kind::Shared,
    Kind::SharedLarge,
    Kind::Private,
    Kind::Ext4,
    Kind::Xfs,
    Kind::XfsHuge,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    ReadOnly,
    ReadOnlyLast,
    NoAccessLast,
    UnmapLast,
    Move,
    ForkAndWrite,
    CpuWrite,
    CpuWriteLast,
    DontneedLast,
    Free,
    ClearMarks,
    Collapse,
    /// By the file.
    Sync,
    WriteLast,
    PunchLast,
    TruncateLast,
}

const OPERATIONS: [Operation; 16] = [
    Operation::ReadOnly,
    Operation::ReadOnlyLast,
    Operation::NoAccessLast,
    Operation::UnmapLast,
    Operation::Move,
    Operation::ForkAndWrite,
    Operation::CpuWrite,
    Operation::CpuWriteLast,
    Operation::DontneedLast,
    Operation::Free,
    Operation::ClearMarks,
    Operation::Collapse,
    Operation::Sync,
    Operation::WriteLast,
    Operation::PunchLast,
    Operation::TruncateLast,
];

impl Kind {
    fn pages(self) -> usize {
        match self {
            Self::Huge | Self::ZeroesHuge | Self::SharedLarge | Self::XfsHuge => HUGE_PAGES,
            Self::Hugetlb => 2 * HUGE_PAGES,
            _ => SMALL,
        }
    }

    /// The pages that the last unit of an operation has.
    fn unit(self) -> usize {
        if self == Self::Hugetlb { HUGE_PAGES } else { 1 }
    }

    fn has_file(self) -> bool {
        matches!(
            self,
            Self::Shared
                | Self::SharedLarge
                | Self::Private
                | Self::Ext4
                | Self::Xfs
                | Self::XfsHuge
        )
    }

    fn is_zero(self) -> bool {
        matches!(self, Self::Zeroes | Self::ZeroesHuge)
    }

    /// The device may write what it maps at first.
    fn is_writable(self) -> bool {
        !self.is_zero() && self != Self::Private
    }

    /// Whether the kernel knows the operation for this kind.
    fn has(self, operation: Operation) -> bool {
        match operation {
            Operation::Sync
            | Operation::WriteLast
            | Operation::PunchLast
            | Operation::TruncateLast => self.has_file(),
            Operation::Collapse => {
                matches!(self, Self::Huge | Self::ZeroesHuge | Self::SharedLarge)
            }
            Operation::Free => matches!(self, Self::Small | Self::Huge),
            // What is shared is not copied.
            Operation::ForkAndWrite => matches!(self, Self::Small | Self::Huge | Self::Hugetlb),
            _ => true,
        }
    }
}

/// The reserve of hugetlbfs, which drop restores.
struct Reserve(String);

const RESERVE: &str = "/proc/sys/vm/nr_hugepages";

impl Reserve {
    /// `None` where this kernel has no hugetlbfs, or no memory for it.
    fn pages(n: usize) -> Option<Self> {
        let old = Self(fs::read_to_string(RESERVE).ok()?);
        fs::write(RESERVE, n.to_string()).ok()?;
        let now = fs::read_to_string(RESERVE).ok()?;
        (now.trim() == n.to_string()).then_some(old)
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // A surplus of reserved pages does no harm.
        let _ = fs::write(RESERVE, &self.0);
    }
}

/// Memory that the device maps in place. Fields are dropped in this order.
struct Memory<'a> {
    target: &'a Target,
    kind: Kind,
    buf: Buffer,
    file: Option<File>,
}

impl<'a> Memory<'a> {
    /// `None` where the machine lacks this kind.
    fn new(target: &'a Target, kind: Kind, dax: Option<&Mounted>) -> Outcome<Option<Self>> {
        let n = kind.pages();
        let of = |file: File, flags| -> Outcome<(Buffer, Option<File>)> {
            let buf = Buffer::of_file(&file, n, flags).or_fail("mmap")?;
            Ok((buf, Some(file)))
        };
        let (buf, file) = match kind {
            Kind::Small | Kind::Zeroes => (Buffer::anon(n)?, None),
            Kind::Huge | Kind::ZeroesHuge => {
                let buf = Buffer::anon_huge_aligned(n)?;
                buf.advise(0, n, libc::MADV_HUGEPAGE)?;
                (buf, None)
            }
            Kind::Hugetlb => match Buffer::hugetlb(n) {
                Ok(buf) => (buf, None),
                Err(_) => return Ok(None),
            },
            Kind::Shared | Kind::SharedLarge | Kind::Private => {
                let file = sys::memfd("zdm-kinds").or_fail("memfd_create")?;
                file.set_len((n * PAGE) as u64).or_fail("ftruncate")?;
                match kind {
                    Kind::Shared | Kind::SharedLarge => of(file, libc::MAP_SHARED)?,
                    _ => {
                        file.write_all_at(&pattern_bytes(SEED, 0, n), 0)
                            .or_fail("write")?;
                        of(file, libc::MAP_PRIVATE)?
                    }
                }
            }
            Kind::Ext4 | Kind::Xfs | Kind::XfsHuge => {
                let Some(dax) = dax else { return Ok(None) };
                of(dax.file("a", n)?, libc::MAP_SHARED)?
            }
        };
        let memory = Self {
            target,
            kind,
            buf,
            file,
        };
        memory.arrange()?;
        Ok(Some(memory))
    }

    /// Has the CPU write the pattern, where it may without a copy, and the device map all of it.
    fn arrange(&self) -> Outcome {
        let n = self.kind.pages();
        if self.kind.is_writable() {
            self.buf.fill(0, n, SEED);
        } else if self.kind.is_zero() {
            self.buf.check_zero(0, n)?;
        }
        let flags = if self.kind.is_writable() {
            ZDM_FAULT_WRITE
        } else {
            0
        };
        let mapped = self
            .target
            .fault(self.buf.at(0), n as u64, flags)
            .or_fail("ZDM_FAULT")?;
        check_eq!(mapped, n as u64, "pages that the device maps");
        self.same(&self.buf, 0, n, "at first")
    }

    /// The device reads what the CPU does.
    #[track_caller]
    fn same(&self, buf: &Buffer, first: usize, n: usize, when: &str) -> Outcome {
        let read = self.target.read(buf, first, n).or_fail("READ")?;
        for (i, bytes) in read.data.chunks_exact(PAGE).enumerate() {
            let words = buf.words(first + i);
            let own = words.iter().flat_map(|w| w.to_ne_bytes());
            check!(
                bytes.iter().copied().eq(own),
                "page {} by the device {when}: expected what the CPU reads, {:x?}, found {:x?}",
                first + i,
                &words[..1],
                &bytes[..8]
            );
        }
        Ok(())
    }

    /// The device has no right to write to page number `page`, or none at all.
    #[track_caller]
    fn denied(&self, page: usize, reads: bool) -> Outcome {
        let written = self
            .target
            .write(&self.buf, page, &pattern_bytes(NEW, page, 1));
        check!(written.is_err(), "WRITE to page {page}: expected an error");
        if !reads {
            let read = self.target.read(&self.buf, page, 1);
            check!(read.is_err(), "READ of page {page}: expected an error");
        }
        Ok(())
    }

    /// The page tables agree.
    #[track_caller]
    fn look(&self) -> Outcome {
        self.target.stats()?;
        let (audit, records) = self.target.audit()?;
        check_eq!(audit.total, 0, "violations, of which {records:x?}");
        Ok(())
    }

    /// The file of a kind that has one.
    fn file(&self) -> Outcome<&File> {
        self.file.as_ref().ok_or_else(|| Fail::failed("no file"))
    }

    fn run(self, operation: Operation) -> Outcome {
        let (n, unit) = (self.kind.pages(), self.kind.unit());
        let last = n - unit;
        // What is still mapped.
        let mut left = n;
        match operation {
            Operation::ReadOnly | Operation::ReadOnlyLast => {
                let first = if operation == Operation::ReadOnly {
                    0
                } else {
                    last
                };
                self.buf.protect(first, n - first, libc::PROT_READ)?;
                self.look()?;
                self.denied(first, true)?;
                self.denied(n - 1, true)?;
                self.same(&self.buf, 0, n, "without the right to write")?;
                self.buf.protect(first, n - first, RW)?;
            }
            Operation::NoAccessLast => {
                self.buf.protect(last, unit, libc::PROT_NONE)?;
                self.look()?;
                self.denied(last, false)?;
                self.denied(n - 1, false)?;
                self.buf.protect(last, unit, RW)?;
            }
            Operation::UnmapLast => {
                self.buf.unmap(last, unit)?;
                self.look()?;
                self.denied(last, false)?;
                self.denied(n - 1, false)?;
                left = last;
            }
            Operation::Move => {
                let place = Buffer::anon_huge_aligned(n)?;
                self.buf.move_pages(0, n, &place, 0)?;
                self.look()?;
                self.denied(0, false)?;
                self.denied(n - 1, false)?;
                self.same(&place, 0, n, "at another place")?;
                place.set(n - 1, 3, NEW);
                self.same(&place, n - 1, 1, "at another place")?;
                return self.look();
            }
            Operation::ForkAndWrite => {
                let child = Waiting::start(|| Ok(()), || self.buf.check(0, n, SEED))?;
                self.look()?;
                self.target
                    .write(&self.buf, 0, &pattern_bytes(NEW, 0, n))
                    .or_fail("WRITE")?;
                self.buf.check(0, n, NEW)?;
                child.join()?;
            }
            Operation::CpuWrite => self.buf.fill(0, n, NEW),
            Operation::CpuWriteLast => self.buf.set(n - 1, 3, NEW),
            Operation::DontneedLast => self.buf.advise(last, unit, libc::MADV_DONTNEED)?,
            Operation::Free => self.buf.advise(0, n, libc::MADV_FREE)?,
            Operation::ClearMarks => clear_soft_dirty()?,
            Operation::Collapse => {
                if self.kind == Kind::Huge {
                    // One page with other rights splits the entry.
                    self.buf.protect(3, 1, libc::PROT_READ)?;
                    self.buf.protect(3, 1, RW)?;
                    self.same(&self.buf, 0, n, "in pieces")?;
                }
                // There may be no memory for it.
                let _ = self.buf.try_advise(0, n, libc::MADV_COLLAPSE);
            }
            Operation::Sync => {
                // The second time something is dirty again.
                for seed in [SEED, NEW] {
                    files::sync(&self.buf, 0, n).or_fail("msync")?;
                    self.look()?;
                    if self.kind.is_writable() {
                        let data = pattern_bytes(seed, n - 1, 1);
                        self.target
                            .write(&self.buf, n - 1, &data)
                            .or_fail("WRITE")?;
                    }
                }
            }
            Operation::WriteLast => {
                let data = pattern_bytes(NEW, n - 1, 1);
                let file = self.file()?;
                file.write_all_at(&data, ((n - 1) * PAGE) as u64)
                    .or_fail("write(2)")?;
            }
            Operation::PunchLast => files::punch(self.file()?, n - 1, 1).or_fail("hole punch")?,
            Operation::TruncateLast => {
                files::truncate(self.file()?, n - 1).or_fail("ftruncate")?;
                self.look()?;
                self.denied(n - 1, false)?;
                left = n - 1;
            }
        }
        self.look()?;
        self.same(&self.buf, 0, left, "afterwards")?;
        // Both write, and see each other's.
        for page in [0, left - 1] {
            self.buf.set(page, 5, NEW + 1);
            self.same(&self.buf, page, 1, "after a write of the CPU")?;
            let data = pattern_bytes(NEW + 2, page, 1);
            self.target.write(&self.buf, page, &data).or_fail("WRITE")?;
            self.buf.check(page, 1, NEW + 2)?;
        }
        self.look()
    }
}

/// All pairs.
pub(super) fn kinds(ctx: &Ctx) -> Outcome {
    let has_all_fixes = has_all_fixes(ctx)?;
    // Two of them are copied.
    let reserve = Reserve::pages(4);
    let mut met = 0;
    for kind in KINDS {
        if kind == Kind::Hugetlb && reserve.is_none() {
            continue;
        }
        let mount = match kind {
            Kind::Ext4 => Some(EXT4),
            Kind::Xfs | Kind::XfsHuge => Some(XFS),
            _ => None,
        };
        let mut dax = match mount.map(Mounted::dax).transpose() {
            Ok(dax) => dax,
            // The machine has no pmem.
            Err(Fail::Skip(_)) => continue,
            Err(e) => return Err(e),
        };
        settled(ctx, super::super::target::PRIVATE, |target| {
            let _strict = has_all_fixes.then(Strict::on).transpose()?;
            for operation in OPERATIONS.into_iter().filter(|o| kind.has(*o)) {
                proc::drain_batches()?;
                let told = |e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{operation:?}, {kind:?}: {e}")),
                };
                let memory = Memory::new(target, kind, dax.as_ref()).map_err(told)?;
                let memory = memory.ok_or_else(|| Fail::failed(format!("{kind:?}: no memory")))?;
                memory.run(operation).map_err(told)?;
                if let Some(dax) = &dax {
                    dax.remove("a")?;
                }
            }
            Ok(())
        })?;
        met += 1;
        if let Some(dax) = &mut dax {
            dax.unmount().or_fail("umount")?;
        }
    }
    crate::harness::note(&format!("{met} of {} kinds", KINDS.len()));
    Ok(())
}
