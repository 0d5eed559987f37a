// SPDX-License-Identifier: GPL-2.0

//! Who is told that a page of a pmem is broken: every process that maps it and asked for the signal,
//! by whatever file, with the address at which it maps the page; nobody who maps only its neighbours;
//! the file system if the page is its own; and nobody at all if the page is free.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::failure::renew_pmem;
use super::{LARGE, Setup};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, PAGE, pattern_bytes};
use crate::fsdax::{EXT4, REFLINK, XFS, pmem_frames};
use crate::sys::{self, Exit};
use crate::tests::counts::Waiting;
use crate::tests::{Test, test};
use crate::uapi::ZDM_PAGE_PMD;
use crate::{check, check_eq, files};

pub const TESTS: &[Test] = &[
    test("fsdax.told_ext4", |_| told(EXT4)),
    test("fsdax.told_xfs", |_| told(XFS)),
    test("fsdax.told_reflink", |_| told(REFLINK)),
    test("fsdax.told_huge_ext4", |_| told_huge(EXT4)),
    test("fsdax.told_huge_xfs", |_| told_huge(XFS)),
    test("fsdax.told_huge_reflink", |_| told_huge(REFLINK)),
    test("fsdax.told_metadata", |_| metadata()),
];

const CORRUPT: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
const SEED: u64 = 950;
/// The pages of a file, and those that break one after the other.
const N: usize = 8;
const BROKEN: [usize; 3] = [0, 3, N - 1];

/// Skips a test on a kernel that cannot be told of a broken page frame.
fn can_break() -> Outcome {
    match fs::exists(CORRUPT).or_fail(CORRUPT)? {
        true => Ok(()),
        false => Err(Fail::Skip("no CONFIG_HWPOISON_INJECT".into())),
    }
}

/// A process that maps a single page of a file, and has to be told if it is one of the broken ones.
fn watcher(file: &File, page: usize) -> Outcome<Waiting> {
    let own = Buffer::shared(file, N)?;
    if page > 0 {
        own.unmap(0, page)?;
    }
    if page + 1 < N {
        own.unmap(page + 1, N - page - 1)?;
    }
    Waiting::start(
        || {
            files::catch_address(libc::SIGBUS).or_fail("sigaction")?;
            sys::want_memory_failures().or_fail("prctl")?;
            own.check(page, 1, SEED)
        },
        || {
            let expected = if BROKEN.contains(&page) {
                (own.at(page), PAGE.trailing_zeros().into())
            } else {
                (0, 0)
            };
            check_eq!(
                files::caught_address(),
                expected,
                "address and size of what the process with page {page} is told of"
            );
            Ok(())
        },
    )
}

/// The report comes from nobody who maps the page: an access by one mapping takes a block that files
/// share from the other mappings of its file.
fn told(kind: usize) -> Outcome {
    can_break()?;
    let s = Setup::new(kind)?;
    let (file, buf) = s.mapped("a", N, SEED)?;
    let pages = s.device.inspect(&buf, 0, N).or_fail("ZDM_INSPECT")?;
    drop(buf);
    let mut all = vec![file];
    if kind == REFLINK {
        let twin = s.fs.empty("b")?;
        files::clone(&all[0], &twin).or_fail("FICLONE")?;
        all.push(twin);
    }
    let mut watchers = Vec::new();
    for file in &all {
        for page in 0..N {
            watchers.push(watcher(file, page)?);
        }
    }
    for page in BROKEN {
        // The result is that of the report.
        let _ = fs::write(CORRUPT, pages[page].pfn.to_string());
    }
    for watcher in watchers {
        watcher.join()?;
    }
    drop(all);
    s.fs.remove("a")?;
    if kind == REFLINK {
        s.fs.remove("b")?;
    }
    s.unmount()?;
    renew_pmem()
}

/// A page of a huge one breaks. Who maps the huge page is told of all of it, whichever page was the
/// first to be accessed; who maps the one before is not.
fn told_huge(kind: usize) -> Outcome {
    let s = Setup::new(kind)?;
    let file = s.fs.file("a", LARGE)?;
    file.write_all_at(&pattern_bytes(SEED, 0, LARGE), 0)
        .or_fail("write")?;
    let (touched, broken) = (HUGE_PAGES + 300, HUGE_PAGES + 400);
    let own = Buffer::shared(&file, LARGE)?;
    own.check(touched, 1, SEED)?;
    let page = s.device.inspect_one(&own, touched)?;
    if page.flags & ZDM_PAGE_PMD == 0 {
        return Err(Fail::Skip("no huge page in this file".into()));
    }
    drop(own);
    let watch = |pages: std::ops::Range<usize>| -> Outcome<Waiting> {
        let own = Buffer::shared(&file, LARGE)?;
        if pages.start > 0 {
            own.unmap(0, pages.start)?;
        }
        if pages.end < LARGE {
            own.unmap(pages.end, LARGE - pages.end)?;
        }
        let concerned = pages.contains(&broken);
        Waiting::start(
            || {
                files::catch_address(libc::SIGBUS).or_fail("sigaction")?;
                sys::want_memory_failures().or_fail("prctl")?;
                own.check(if concerned { touched } else { 300 }, 1, SEED)
            },
            || {
                let (address, bits) = files::caught_address();
                if !concerned {
                    check_eq!(address, 0, "address for who maps another huge page");
                    return Ok(());
                }
                // ext4 leaves it to the kernel, which says the first page of the folio; xfs says
                // the page that is broken.
                let place = if kind == EXT4 { HUGE_PAGES } else { broken };
                check_eq!(
                    (address, bits),
                    (own.at(place), 21),
                    "address and size of what is told of page {broken}"
                );
                Ok(())
            },
        )
    };
    let watchers = [
        watch(0..LARGE)?,
        watch(HUGE_PAGES..LARGE)?,
        watch(0..HUGE_PAGES)?,
    ];
    let buf = Buffer::shared(&file, LARGE)?;
    let speaker = Waiting::start(
        || {
            sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
            buf.check(broken, 1, SEED)
        },
        || {
            files::advise(&buf, broken, 1, libc::MADV_HWPOISON).or_fail("MADV_HWPOISON")?;
            Err(Fail::failed("MADV_HWPOISON: expected SIGBUS, found none"))
        },
    )?;
    check_eq!(
        speaker.end()?,
        Exit::Signal(libc::SIGBUS),
        "end of who says that a page is bad"
    );
    watchers.into_iter().try_for_each(Waiting::join)?;
    drop((buf, file));
    s.fs.remove("a")?;
    s.unmount()?;
    renew_pmem()
}

/// A free page breaks, and nothing happens; then a page of XFS's own, and XFS shuts down.
fn metadata() -> Outcome {
    can_break()?;
    let s = Setup::new(XFS)?;
    let (first, n) = pmem_frames()?;
    let (file, buf) = s.mapped("a", N, SEED)?;
    let write = || {
        file.write_all_at(&pattern_bytes(SEED, 0, N), 0)
            .and_then(|()| file.sync_all())
    };
    write().or_fail("write")?;
    // Files begin at the front of an allocation group. The result is that of the report.
    let _ = fs::write(CORRUPT, (first + n as u64 * 2 / 5).to_string());
    write().or_fail("write with a broken page that nobody has")?;
    buf.check(0, N, SEED)?;
    // The superblock.
    let _ = fs::write(CORRUPT, first.to_string());
    expect_errno(write(), &[libc::EIO], "write without metadata")?;
    check!(
        s.fs.empty("b").is_err(),
        "a new file without metadata: expected an error, found success"
    );
    drop((file, buf));
    let mut s = s;
    s.fs.unmount().or_fail("umount")?;
    drop(s);
    renew_pmem()
}
