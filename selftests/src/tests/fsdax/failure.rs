// SPDX-License-Identifier: GPL-2.0

//! DAX pages that fail, and pmem that is removed under a mounted file system.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, check_bytes, pattern_bytes};
use crate::fsdax::{self, EXT4, Mounted, REFLINK, XFS};
use crate::sys::{self, Exit};
use crate::tests::counts::{IDLE, MAPPED, Waiting};
use crate::tests::fsdax::{LARGE, SMALL, Setup, expect_pmem_free};
use crate::tests::strict::has_all_fixes;
use crate::tests::{Ctx, Test, test};
use crate::{check, check_eq, dax, files, threads};

pub const TESTS: &[Test] = &[
    test("fsdax.poison_ext4", poison::<EXT4>),
    test("fsdax.poison_xfs", poison::<XFS>),
    test("fsdax.poison_reflink", poison::<REFLINK>),
    test("fsdax.unbind_mounted_ext4", unbind_mounted::<EXT4>),
    test("fsdax.unbind_mounted_xfs", unbind_mounted::<XFS>),
    test("fsdax.unbind_mounted_reflink", unbind_mounted::<REFLINK>),
    test("fsdax.unbind_mapped_xfs", unbind_mapped::<XFS>),
    test("fsdax.unbind_mapped_reflink", unbind_mapped::<REFLINK>),
];

const LIMIT: Duration = Duration::from_secs(30);

const UNPOISON: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";

/// Gives the pmem a new memory map, in which no page is bad.
#[track_caller]
pub(super) fn renew_pmem() -> Outcome {
    dax::unbind_pmem().or_fail("unbind of the pmem")?;
    dax::bind_pmem().or_fail("bind of the pmem")
}

/// A failed page is unmapped from all processes. The kernel kills the process that reports the
/// failure, and those that asked for an early signal. The file system and the rest of the file stay
/// usable.
fn poison<const KIND: usize>(_: &Ctx) -> Outcome {
    for pages in [SMALL, LARGE] {
        let s = Setup::new(KIND)?;
        let (file, buf) = s.mapped("a", pages, 890)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        drop(buf);
        let buf = Buffer::shared(&file, pages)?;
        let plain = || sys::on_signal(libc::SIGBUS, true).or_fail("signal");
        // Four processes: one that asked for an early signal, one that did not, one that maps the
        // file but not that page, and one that reports the page as bad.
        let early = Waiting::start(
            || {
                plain()?;
                sys::want_memory_failures().or_fail("PR_MCE_KILL")?;
                buf.check(0, pages, 890)
            },
            || {
                std::thread::sleep(LIMIT);
                Err(Fail::failed(
                    "after a bad page: expected SIGBUS, found none",
                ))
            },
        )?;
        let late = Waiting::start(
            || {
                plain()?;
                buf.check(0, pages, 890)
            },
            || Ok(()),
        )?;
        let bystander = Waiting::start(plain, || buf.check(pages / 2, 1, 890))?;
        let speaker = Waiting::start(
            || {
                plain()?;
                buf.check(1, 1, 890)
            },
            || {
                files::advise(&buf, 1, 1, libc::MADV_HWPOISON).or_fail("MADV_HWPOISON")?;
                Err(Fail::failed("MADV_HWPOISON: expected SIGBUS, found none"))
            },
        )?;
        s.expect_frames(&frames[1..2], [3, 3, 0], "mapped by three")?;
        let early = early.release()?;
        let end = speaker.end()?;
        check_eq!(
            end,
            Exit::Signal(libc::SIGBUS),
            "end of who says that a page is bad"
        );
        let end = early.exit()?;
        check_eq!(
            end,
            Exit::Signal(libc::SIGBUS),
            "end of who wants to know at once"
        );
        // The page is mapped nowhere. A process that does not access it gets no signal.
        s.expect_frames(&frames[1..2], IDLE, "unmapped")?;
        late.join()?;
        bystander.join()?;
        // The page does not belong to the page allocator, so unpoison-pfn cannot restore it.
        if fs::exists(UNPOISON).or_fail(UNPOISON)? {
            let result = fs::write(UNPOISON, format!("{:#x}", frames[1]));
            expect_errno(result, &[libc::EIO], "unpoison-pfn of a DAX page")?;
        }
        // The other processes continue; a hole punch removes the page from the file.
        buf.check(pages / 2, 1, 890)?;
        files::punch(&file, 0, pages / 2).or_fail("hole punch")?;
        buf.check_zero(1, 1)?;
        let (other, more) = s.mapped("b", pages, 891)?;
        more.check(0, pages, 891)?;
        drop((file, buf, other, more));
        s.fs.remove("a")?;
        s.fs.remove("b")?;
        s.expect_frames(&frames, IDLE, "unlinked")?;
        s.unmount()?;
        renew_pmem()?;
    }
    Ok(())
}

/// The pmem is removed while a file system is mounted on it. Operations on its files then fail, it
/// can be unmounted, and it exists again when the pmem is back.
///
/// On ext4 the test maps no file: ext4 of 7.3 keeps the entries of mapped files, and reads freed
/// struct pages at unmount. The xfs has a single allocation group: with several groups xfs of 7.3
/// computes a number of blocks as 0 instead of 1 << 32, and loops from there.
fn unbind_mounted<const KIND: usize>(_: &Ctx) -> Outcome {
    let mut s = Setup::one_group(KIND)?;
    let file = match KIND {
        EXT4 => {
            let file = s.fs.file("a", LARGE)?;
            file.write_all_at(&pattern_bytes(892, 0, LARGE), 0)
                .or_fail("write")?;
            file
        }
        _ => {
            let (file, buf) = s.mapped("a", LARGE, 892)?;
            let frames = s.expect(&buf, MAPPED, "mapped")?;
            drop(buf);
            s.expect_frames(&frames, IDLE, "unmapped")?;
            file
        }
    };
    file.sync_all().or_fail("fsync")?;
    let first = fsdax::pmem_frames()?.0;
    dax::unbind_pmem().or_fail("unbind of a mounted pmem")?;
    let page = s.device.inspect_frames(first, 1)?[0];
    check!(
        page.flags == 0,
        "page of a pmem that has gone: expected none, found {page:x?}"
    );
    let result = fs::read(s.fs.path("a"));
    expect_errno(result, &[libc::EIO], "read(2) from a pmem that has gone")?;
    drop(file);
    s.fs.unmount().or_fail("umount")?;
    dax::bind_pmem().or_fail("bind of the pmem")?;
    expect_pmem_free(&s.device)?;
    s.fs = Mounted::again(KIND)?;
    let data = fs::read(s.fs.path("a")).or_fail("read")?;
    check_bytes(&data, 892, 0, "what was on the pmem")?;
    s.unmount()
}

/// The pmem is removed while processes have files mapped: some a page each, as what unmaps one page of an extent
/// may forget another, with and without one that maps all. xfs tells each of them, and unmaps the pages: the next
/// access ends in SIGBUS.
///
/// A kernel without the series unmaps as much at a time as the largest entry of the page's users maps, and tells
/// the users of the page: those who map another page of a huge entry are not told.
///
/// The processes block the early signal: xfs of 7.3 does not wait for the pages of an exiting process.
fn unbind_mapped<const KIND: usize>(ctx: &Ctx) -> Outcome {
    let looks = has_all_fixes(ctx)?;
    for (pages, with_all) in [(SMALL, true), (LARGE, false), (LARGE, true)] {
        let mut s = Setup::one_group(KIND)?;
        let (file, buf) = s.mapped("a", pages, 893)?;
        file.sync_all().or_fail("fsync")?;
        let user = |first: usize, n: usize| {
            let own = Buffer::shared(&file, pages)?;
            for (from, count) in [(0, first), (first + n, pages - first - n)] {
                if count > 0 {
                    own.unmap(from, count)?;
                }
            }
            Waiting::start(
                || {
                    sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
                    files::block(libc::SIGBUS).or_fail("sigprocmask")?;
                    own.check(first, n, 893)
                },
                || {
                    if looks {
                        let is_told = files::is_pending(libc::SIGBUS).or_fail("signals")?;
                        check!(is_told, "page {first}: expected a signal to wait");
                    }
                    own.get(first, 0);
                    Err(Fail::failed(
                        "access to a pmem that has gone: expected SIGBUS, found none",
                    ))
                },
            )
        };
        let mut users = Vec::new();
        if with_all {
            users.push((0, user(0, pages)?));
        }
        for page in [0, 1, pages / 2 - 1, pages / 2, pages - 2, pages - 1] {
            users.push((page, user(page, 1)?));
        }
        drop((file, buf));
        std::thread::scope(|scope| {
            let unbind = scope.spawn(|| dax::unbind_pmem().or_fail("unbind of a mapped pmem"));
            // It waits for a page that stays mapped.
            let ends = sys::wait_until(LIMIT, || unbind.is_finished());
            for (page, user) in users.drain(..) {
                if ends {
                    let end = Exit::Signal(libc::SIGBUS);
                    let what = format!("end of who maps page {page} of {pages}, {with_all}");
                    check_eq!(user.end()?, end, "{what}");
                } else {
                    user.kill()?;
                }
            }
            threads::join(unbind)?;
            check!(
                ends,
                "unbind of a mapped pmem: expected an end within {LIMIT:?}, found that a page stays mapped"
            );
            Ok(())
        })?;
        s.fs.unmount().or_fail("umount")?;
        dax::bind_pmem().or_fail("bind of the pmem")?;
        expect_pmem_free(&s.device)?;
        s.fs = Mounted::again(KIND)?;
        let data = fs::read(s.fs.path("a")).or_fail("read")?;
        check_bytes(&data, 893, 0, "what was on the pmem")?;
        s.unmount()?;
    }
    Ok(())
}
