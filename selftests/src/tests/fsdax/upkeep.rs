// SPDX-License-Identifier: GPL-2.0

//! What the kernel does to memory of its own (advice, locks, moves, write-back, looks) changes nothing
//! about DAX pages: the same frames, the same entries, no reference more or less, on no list, and the
//! same data. Also the ends of files, which every kind of access respects.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{LARGE, SMALL, Setup};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::fsdax::{EXT4, REFLINK, XFS};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::tests::counts::MAPPED;
use crate::tests::{Test, test};
use crate::uapi::*;
use crate::{check, check_eq, files, numa, proc};

pub const TESTS: &[Test] = &[
    test("fsdax.upkeep_ext4", |_| upkeep(EXT4)),
    test("fsdax.upkeep_xfs", |_| upkeep(XFS)),
    test("fsdax.upkeep_reflink", |_| upkeep(REFLINK)),
    test("fsdax.ends_ext4", |_| ends(EXT4)),
    test("fsdax.ends_xfs", |_| ends(XFS)),
    test("fsdax.ends_reflink", |_| ends(REFLINK)),
];

type Operation = fn(&Buffer, usize, usize) -> io::Result<()>;

fn advise<const ADVICE: i32>(buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
    buf.try_advise(first, n, ADVICE)
}

/// Operations on pages `first..first + n`, which may fail.
pub const OPERATIONS: &[(&str, Operation)] = &[
    ("MADV_COLD", advise::<{ libc::MADV_COLD }>),
    ("MADV_PAGEOUT", advise::<{ libc::MADV_PAGEOUT }>),
    ("MADV_WILLNEED", advise::<{ libc::MADV_WILLNEED }>),
    ("MADV_FREE", advise::<{ libc::MADV_FREE }>),
    ("MADV_POPULATE_READ", advise::<{ libc::MADV_POPULATE_READ }>),
    (
        "MADV_POPULATE_WRITE",
        advise::<{ libc::MADV_POPULATE_WRITE }>,
    ),
    ("MADV_COLLAPSE", advise::<{ libc::MADV_COLLAPSE }>),
    ("MADV_MERGEABLE", advise::<{ libc::MADV_MERGEABLE }>),
    ("mlock", |b, first, n| b.try_lock(first, n, true)),
    ("munlock", |b, first, n| b.try_lock(first, n, false)),
    ("move_pages", |b, first, n| {
        files::move_to_node(b, first, n).map(drop)
    }),
    ("mbind", |b, first, n| numa::bind(b, first, n, 0, true)),
    ("msync", |b, first, n| files::sync(b, first, n)),
    ("mincore", |b, first, n| {
        files::mincore(b, first, n).map(drop)
    }),
    ("compaction", |_, _, _| {
        std::fs::write("/proc/sys/vm/compact_memory", "1")
    }),
    ("drop_caches", |_, _, _| {
        std::fs::write("/proc/sys/vm/drop_caches", "3")
    }),
];

fn unchanged(s: &Setup, buf: &Buffer, frames: &[u64], seed: u64) -> Outcome {
    let n = buf.pages();
    check_eq!(
        &s.expect(buf, MAPPED, "afterwards")?,
        &frames,
        "frames afterwards"
    );
    for (i, page) in s
        .device
        .inspect(buf, 0, n)
        .or_fail("ZDM_INSPECT")?
        .iter()
        .enumerate()
    {
        check!(
            page.flags & (ZDM_PAGE_LRU | ZDM_PAGE_ANON | ZDM_PAGE_CHARGED) == 0,
            "page {i} afterwards: expected a page on no list, charged to nobody, found {page:x?}"
        );
    }
    check_eq!(proc::smaps(buf, 0, n, "Rss")?, n as u64, "Rss afterwards");
    check_eq!(proc::smaps(buf, 0, n, "Pss")?, n as u64, "Pss afterwards");
    buf.check(0, n, seed)
}

fn upkeep(kind: usize) -> Outcome {
    let s = Setup::new(kind)?;
    for pages in [SMALL, LARGE] {
        for (name, run) in OPERATIONS {
            let named = |e: Fail| match e {
                Fail::Skip(_) => e,
                e => Fail::failed(format!("{name} of {pages} pages: {e}")),
            };
            let case = || -> Outcome {
                let (file, buf) = s.mapped("a", pages, 960)?;
                let frames = s.expect(&buf, MAPPED, "mapped")?;
                // Not all that the kernel is asked for is possible.
                let _ = run(&buf, 0, pages);
                unchanged(&s, &buf, &frames, 960)?;
                // A part of a huge page may be mapped by pages afterwards, but is there.
                let _ = run(&buf, pages / 4 + 1, 3);
                buf.check(0, pages, 960)?;
                let parts = s.device.inspect(&buf, 0, pages).or_fail("ZDM_INSPECT")?;
                for (i, page) in parts.iter().enumerate() {
                    check!(
                        page.pfn == frames[i] && page.refs == page.mapcount && page.pins == 0,
                        "page {i} after the same for a part: expected its mappings as references, \
                         found {page:x?}"
                    );
                }
                drop((file, buf));
                s.fs.remove("a")?;
                s.expect_free(&frames, "unlinked")
            };
            case().map_err(named)?;
        }
    }
    s.unmount()
}

/// An access beyond the end of a file fails, by a task and by a device.
#[track_caller]
fn refused(s: &Setup, buf: &Buffer, page: usize) -> Outcome {
    for write in [false, true] {
        let child = Child::spawn(|| {
            sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
            match write {
                true => buf.set(page, 0, 1),
                false => drop(std::hint::black_box(buf.get(page, 0))),
            }
            Ok(())
        })?;
        check_eq!(
            child.exit()?,
            Exit::Signal(libc::SIGBUS),
            "end of the process that accesses page {page}, beyond the end, for writing {write}"
        );
    }
    for flags in [0, ZDM_PIN_WRITE] {
        let pinned = s.device.pin(buf, page, 1, flags);
        expect_errno(pinned, &[libc::EFAULT], "ZDM_PIN beyond the end")?;
    }
    let read = s.device.read(buf, page, 1);
    check!(
        read.is_err(),
        "READ by the device of page {page}, beyond the end: expected an error, found success"
    );
    Ok(())
}

/// An access up to the end succeeds.
#[track_caller]
fn granted(s: &Setup, buf: &Buffer, page: usize, seed: u64) -> Outcome {
    buf.check(page, 1, seed)?;
    let id = s
        .device
        .pin(buf, page, 1, ZDM_PIN_WRITE)
        .or_fail("ZDM_PIN")?;
    s.device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
    let read = s.device.read(buf, page, 1).or_fail("READ")?;
    check_bytes(&read.data, seed, page, "READ by the device")?;
    buf.fill(page, 1, seed);
    Ok(())
}

fn case(s: &Setup, file: &File, n: usize, beyond_first: bool) -> Outcome {
    let room = (n + 2).next_multiple_of(HUGE_PAGES) + 2;
    let buf = Buffer::shared(file, room)?;
    let outside = [n, n + 1, room - 1];
    if beyond_first {
        refused(s, &buf, n)?;
    }
    for page in [0, n / 2, n - 1] {
        granted(s, &buf, page, 970)?;
    }
    for page in outside {
        refused(s, &buf, page)?;
    }
    // With one page more.
    file.set_len(((n + 1) * PAGE) as u64).or_fail("ftruncate")?;
    buf.check_zero(n, 1)?;
    refused(s, &buf, n + 1)?;
    granted(s, &buf, n - 1, 970)?;
    buf.fill(n, 1, 970);
    // And without it.
    file.set_len((n * PAGE) as u64).or_fail("ftruncate")?;
    refused(s, &buf, n)?;
    granted(s, &buf, n - 1, 970)
}

/// The last page of a file can be used and the next one cannot, for files of various sizes, by each
/// kind of access, whether the first access is inside or outside.
fn ends(kind: usize) -> Outcome {
    let s = Setup::new(kind)?;
    for n in [1, 3, HUGE_PAGES - 1, HUGE_PAGES, HUGE_PAGES + 1] {
        for beyond_first in [false, true] {
            let one = || -> Outcome {
                let file = s.fs.file("a", n)?;
                file.write_all_at(&pattern_bytes(970, 0, n), 0)
                    .or_fail("write")?;
                case(&s, &file, n, beyond_first)?;
                drop(file);
                s.fs.remove("a")
            };
            one().map_err(|e| match e {
                Fail::Skip(_) => e,
                e => Fail::failed(format!("{n} pages, beyond first {beyond_first}: {e}")),
            })?;
        }
    }
    s.unmount()
}
