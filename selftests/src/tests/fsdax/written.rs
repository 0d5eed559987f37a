// SPDX-License-Identifier: GPL-2.0

//! What fsync(2) and its relatives do to mappings of DAX files: every entry loses the right to write,
//! so that the next write is a fault that marks the page dirty again. It must be so for every page
//! that was written, however it was mapped and by however many mappings, or the next fsync(2) would
//! not find it.

use std::fs::File;
use std::io;

use super::{LARGE, SMALL, Setup};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES};
use crate::fsdax::{EXT4, REFLINK, XFS};
use crate::tests::{Test, test};
use crate::uapi::*;
use crate::{check, check_eq, files};

pub const TESTS: &[Test] = &[
    test("fsdax.written_ext4", |_| written(EXT4)),
    test("fsdax.written_xfs", |_| written(XFS)),
    test("fsdax.written_reflink", |_| written(REFLINK)),
    test("fsdax.written_part_ext4", |_| written_part(EXT4)),
    test("fsdax.written_part_xfs", |_| written_part(XFS)),
    test("fsdax.written_part_reflink", |_| written_part(REFLINK)),
];

type Call = fn(&File, &Buffer) -> io::Result<()>;

/// The calls that write all of a file back.
const CALLS: [(&str, Call); 3] = [
    ("fsync", |file, _| file.sync_all()),
    ("fdatasync", |file, _| file.sync_data()),
    ("msync", |_, buf| files::sync(buf, 0, buf.pages())),
];

/// How the pages are mapped: flags, and whether the first access is a read.
const WAYS: [(&str, i32, bool); 3] = [
    ("written first", libc::MAP_SHARED, false),
    ("read first", libc::MAP_SHARED, true),
    (
        "MAP_SYNC",
        libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
        false,
    ),
];

/// The pages whose entries allow a write.
fn writable(s: &Setup, buf: &Buffer) -> Outcome<Vec<usize>> {
    let pages = s
        .device
        .inspect(buf, 0, buf.pages())
        .or_fail("ZDM_INSPECT")?;
    let right = |i: &usize| pages[*i].flags & ZDM_PAGE_WRITE != 0;
    Ok((0..pages.len()).filter(right).collect())
}

fn case(s: &Setup, pages: usize, (flags, read): (i32, bool), call: Call) -> Outcome {
    let file = s.fs.empty("a")?;
    // Blocks that a write fault allocates, so that MAP_SYNC has something to sync.
    files::truncate(&file, pages).or_fail("ftruncate")?;
    if read {
        Buffer::shared(&file, pages)?.fill(0, pages, 940);
    }
    let map = || Buffer::of_file(&file, pages, flags).or_fail("mmap");
    let (one, other) = (map()?, map()?);
    if read {
        one.check(0, pages, 940)?;
        other.check(0, pages, 940)?;
    }
    for round in 0..3 {
        let seed = 941 + round;
        one.fill(0, pages, seed);
        // The other mapping writes to some of the pages, too.
        other.check(0, pages, seed)?;
        other.fill(1, 2, seed);
        call(&file, &one).or_fail("the call")?;
        for (whose, buf) in [("the first mapping", &one), ("the second mapping", &other)] {
            check_eq!(
                writable(s, buf)?,
                Vec::new(),
                "pages that {whose} may write after the call in round {round}"
            );
        }
        // What is written now may be written again, and nothing else.
        let page = pages / 2 + 1;
        other.fill(page, 1, seed);
        let pmd = s.device.inspect_one(&other, page)?.flags & ZDM_PAGE_PMD != 0;
        let unit = if pmd { HUGE_PAGES } else { 1 };
        let around = page / unit * unit;
        let expected: Vec<usize> = (around..around + unit).collect();
        check_eq!(
            writable(s, &other)?,
            expected,
            "pages that may be written again"
        );
        check!(
            writable(s, &one)?.is_empty(),
            "pages that the first mapping may write after a write of the second: expected none"
        );
        one.check(0, pages, seed)?;
    }
    call(&file, &other).or_fail("the call")?;
    check_eq!(
        writable(s, &other)?,
        Vec::new(),
        "pages that may be written in the end"
    );
    drop((one, other, file));
    s.fs.remove("a")
}

fn written(kind: usize) -> Outcome {
    let s = Setup::new(kind)?;
    for pages in [SMALL, LARGE] {
        for (way, flags, read) in WAYS {
            for (name, call) in CALLS {
                case(&s, pages, (flags, read), call).map_err(|e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{name} of {pages} pages, {way}: {e}")),
                })?;
            }
        }
    }
    s.unmount()
}

/// The file keeps one mark for all of a huge folio: whichever page of it is written back, all of its pages
/// lose the right to write, those that another mapping maps one by one included, and the other folio none.
fn written_part(kind: usize) -> Outcome {
    let s = Setup::new(kind)?;
    let (file, huge) = s.mapped("a", LARGE, 960)?;
    // Without its last page no PMD fits.
    let flags = libc::MAP_SHARED;
    let small = Buffer::of_file(&file, HUGE_PAGES - 1, flags).or_fail("mmap")?;
    for (round, page) in [HUGE_PAGES / 2, HUGE_PAGES - 2, 1, 0]
        .into_iter()
        .enumerate()
    {
        let seed = 961 + round as u64;
        huge.fill(0, LARGE, seed);
        small.fill(0, small.pages(), seed);
        let found = s.device.inspect_one(&small, page)?;
        check_eq!(
            (found.flags & ZDM_PAGE_PMD, found.order),
            (0, 9),
            "how it is mapped"
        );
        files::sync(&small, page, 1).or_fail("msync")?;
        check_eq!(
            writable(&s, &small)?,
            Vec::new(),
            "pages that the small mapping may write after page {page} was written back"
        );
        check_eq!(
            writable(&s, &huge)?,
            (HUGE_PAGES..LARGE).collect::<Vec<_>>(),
            "pages that the huge mapping may write after page {page} was written back"
        );
    }
    drop((small, huge, file));
    s.fs.remove("a")?;
    s.unmount()
}
