// SPDX-License-Identifier: GPL-2.0

//! A task that takes blocks from a DAX file waits while one of its pages is held; dropping the last
//! reference wakes it. /proc shows where and how the task waits, so no test relies on a pause.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::fcntl::FallocateFlags;
use nix::mount::MntFlags;

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, check_bytes};
use crate::fsdax::{EXT4, Mounted, REFLINK, XFS};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::tests::counts::{IDLE, MAPPED, Waiting};
use crate::tests::fsdax::{LARGE, SMALL, Setup, with_pins};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq, files};

pub const TESTS: &[Test] = &[
    test("fsdax.wait_ext4", wait::<EXT4>),
    test("fsdax.wait_xfs", wait::<XFS>),
    test("fsdax.wait_reflink", wait::<REFLINK>),
    test("fsdax.wait_signals_ext4", signals::<EXT4>),
    test("fsdax.wait_signals_xfs", signals::<XFS>),
    test("fsdax.wait_signals_reflink", signals::<REFLINK>),
    test("fsdax.wait_unlink_ext4", unlink::<EXT4>),
    test("fsdax.wait_unlink_xfs", unlink::<XFS>),
    test("fsdax.wait_unlink_reflink", unlink::<REFLINK>),
    test("fsdax.wait_umount_ext4", umount::<EXT4>),
    test("fsdax.wait_umount_xfs", umount::<XFS>),
    test("fsdax.wait_umount_reflink", umount::<REFLINK>),
    test("fsdax.wait_mapped_again_ext4", mapped_again::<EXT4>),
    test("fsdax.wait_mapped_again_xfs", mapped_again::<XFS>),
    test("fsdax.wait_mapped_again_reflink", mapped_again::<REFLINK>),
];

/// A limit that is far longer than any of these steps on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// The functions in which 7.3 waits for a page, with the task state: an interruptible wait, and the
/// uninterruptible wait at the end of an inode.
pub(in crate::tests) const IN_BREAK: (char, &[&str]) =
    ('S', &["ext4_wait_dax_page", "xfs_wait_dax_page"]);
pub(in crate::tests) const IN_FINAL: (char, &[&str]) = ('D', &["dax_break_layout_final"]);

/// The state of a process or thread, and the function in which it sleeps.
fn place(pid: i32) -> (char, String) {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let stat = read("stat");
    // The name before the state may contain blanks and brackets.
    let state = stat.rsplit_once(") ").and_then(|(_, s)| s.chars().next());
    (state.unwrap_or('?'), read("wchan"))
}

/// Checks that a child sleeps in one of these functions, and stays there.
#[track_caller]
pub(in crate::tests) fn expect_waits(
    child: &Child,
    (state, functions): (char, &[&str]),
    what: &str,
) -> Outcome {
    let there = || {
        let (s, function) = place(child.pid());
        s == state && functions.contains(&function.as_str())
    };
    let came = sys::wait_until(LIMIT, || there() || !child.is_running().unwrap_or(false));
    check!(
        came && there(),
        "{what}: expected it to sleep ({state}) in one of {functions:?}, found {:?}",
        place(child.pid())
    );
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(20));
        // The task may wake up for a moment, and must sleep again.
        let back = sys::wait_until(LIMIT, || there() || !child.is_running().unwrap_or(false));
        check!(
            back && child.is_running()?,
            "{what}, a little later: expected it to sleep ({state}) in one of {functions:?}, \
             found {:?}",
            place(child.pid())
        );
    }
    Ok(())
}

/// Checks that a child is woken and ends.
#[track_caller]
pub(in crate::tests) fn expect_woken(child: Child, what: &str) -> Outcome {
    let end = expect_ends(child, what)?;
    check_eq!(end, Exit::Code(0), "{what}");
    Ok(())
}

/// Waits for the end of a child and returns how it ended.
#[track_caller]
fn expect_ends(child: Child, what: &str) -> Outcome<Exit> {
    let ended = sys::wait_until(LIMIT, || !child.is_running().unwrap_or(true));
    if !ended {
        let stack = fs::read_to_string(format!("/proc/{}/stack", child.pid()));
        return Err(Fail::failed(format!(
            "{what}: expected it to be woken, found it asleep: {:?} {}",
            place(child.pid()),
            stack.unwrap_or_default().replace('\n', "; ")
        )));
    }
    child.exit()
}

/// An operation that takes blocks from the beginning of a file, and the size of the file after it.
type Taking = (
    &'static str,
    fn(&File) -> io::Result<()>,
    fn(usize) -> usize,
);
const TAKING: &[Taking] = &[
    ("ftruncate", |f| files::truncate(f, 0), |_| 0),
    ("a hole punch", |f| files::punch(f, 0, 4), |n| n),
    (
        "FALLOC_FL_ZERO_RANGE",
        |f| files::allocate(f, FallocateFlags::FALLOC_FL_ZERO_RANGE, 0, 4),
        |n| n,
    ),
    (
        "FALLOC_FL_COLLAPSE_RANGE",
        |f| files::allocate(f, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 4),
        |n| n - 4,
    ),
];

/// Every operation that takes blocks waits for every kind of holder. Until the release the holder
/// keeps the page with its data.
fn wait<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    let flavours = [
        ZDM_PIN_GET,
        ZDM_PIN_GET | ZDM_PIN_FAST | ZDM_PIN_WRITE,
        ZDM_PIN_WRITE,
        ZDM_PIN_FAST,
    ];
    for pages in [SMALL, LARGE] {
        for (i, (what, take, size)) in TAKING.iter().enumerate() {
            for flags in [flavours[i % 4], flavours[(i + 2) % 4]] {
                let what = &format!("{what} of {pages} pages, one held with {flags:#x}");
                let (file, buf) = s.mapped("a", pages, 840)?;
                let frames = s.expect(&buf, MAPPED, what)?;
                // The child has no copy of the file that pins the page, which is opened later: if
                // this process ends, the wait ends, too.
                let taker = Waiting::start(|| Ok(()), || take(&file).or_fail(what))?;
                let holder = Device::open(0)?;
                let id = holder.pin(&buf, 1, 1, flags).or_fail("ZDM_PIN")?;
                let blocks = file.metadata().or_fail("stat")?.blocks();
                let taker = taker.release()?;
                expect_waits(&taker, IN_BREAK, what)?;
                // All pages are unmapped; held pages stay held, and no block is freed.
                let held = match flags & ZDM_PIN_GET {
                    0 => with_pins(pages, IDLE, 1),
                    _ => [1, 0, 0],
                };
                s.expect_frames(&frames[1..2], held, what)?;
                let left = file.metadata().or_fail("stat")?.blocks();
                check_eq!(left, blocks, "blocks of the file while {what} waits");
                holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
                expect_woken(taker, what)?;
                let len = file.metadata().or_fail("stat")?.len();
                check_eq!(len, (size(pages) * 4096) as u64, "size after {what}");
                s.expect_frames(&frames, IDLE, &format!("after {what}"))?;
                drop((file, buf));
                s.fs.remove("a")?;
                s.expect_free(&frames, "unlinked")?;
            }
        }
    }
    s.unmount()
}

/// A signal ends the wait, SIGKILL together with the process, and nothing has been changed then.
/// After a signal with SA_RESTART or a stop, the task waits on.
fn signals<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for (what, take, _) in &TAKING[..2] {
        let (file, buf) = s.mapped("a", SMALL, 841)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let intact = |file: &File| -> Outcome {
            let len = file.metadata().or_fail("stat")?.len();
            check_eq!(
                len,
                (SMALL * 4096) as u64,
                "size after {what} was interrupted"
            );
            let buf = Buffer::shared(file, SMALL)?;
            buf.check(0, SMALL, 841)
        };
        // The task is killed.
        let taker = Waiting::start(|| Ok(()), || take(&file).or_fail(what))?;
        let holder = Device::open(0)?;
        let id = holder.pin(&buf, 1, 1, 0).or_fail("ZDM_PIN")?;
        let taker = taker.release()?;
        expect_waits(&taker, IN_BREAK, what)?;
        sys::kill(taker.pid(), libc::SIGKILL).or_fail("kill")?;
        let end = expect_ends(taker, &format!("{what} killed"))?;
        check_eq!(end, Exit::Signal(libc::SIGKILL), "{what} killed");
        s.expect_frames(&frames[1..2], with_pins(SMALL, IDLE, 1), "still held")?;
        intact(&file)?;
        // The task is interrupted.
        let taker = Waiting::start(
            || files::catch(libc::SIGUSR1, false).or_fail("sigaction"),
            || expect_errno(take(&file), &[libc::EINTR], what),
        )?
        .release()?;
        expect_waits(&taker, IN_BREAK, what)?;
        sys::kill(taker.pid(), libc::SIGUSR1).or_fail("kill")?;
        expect_woken(taker, &format!("{what} interrupted"))?;
        intact(&file)?;
        // The call is restarted, and the task stopped for a while.
        let taker = Waiting::start(
            || files::catch(libc::SIGUSR1, true).or_fail("sigaction"),
            || take(&file).or_fail(what),
        )?
        .release()?;
        expect_waits(&taker, IN_BREAK, what)?;
        sys::kill(taker.pid(), libc::SIGUSR1).or_fail("kill")?;
        expect_waits(&taker, IN_BREAK, &format!("{what} begun anew"))?;
        sys::kill(taker.pid(), libc::SIGSTOP).or_fail("kill")?;
        let stopped = sys::wait_until(LIMIT, || place(taker.pid()).0 == 'T');
        check!(
            stopped,
            "stopped: expected T, found {:?}",
            place(taker.pid())
        );
        sys::kill(taker.pid(), libc::SIGCONT).or_fail("kill")?;
        expect_waits(&taker, IN_BREAK, &format!("{what} continued"))?;
        holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        expect_woken(taker, what)?;
        drop((file, buf));
        s.fs.remove("a")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// The last user of an unlinked file waits until its pages are released, whatever signal comes.
fn unlink<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 842)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let mine = Buffer::shared(&file, pages)?;
        // The child has the file, but no copy of this mapping.
        let last = Waiting::start(
            || mine.unmap(0, pages),
            move || {
                drop((file, buf));
                Ok(())
            },
        )?;
        let holder = Device::open(0)?;
        let id = holder.pin(&mine, 1, 1, ZDM_PIN_WRITE).or_fail("ZDM_PIN")?;
        drop(mine);
        s.fs.remove("a")?;
        let last = last.release()?;
        let what = "close of an unlinked file";
        expect_waits(&last, IN_FINAL, what)?;
        s.expect_frames(&frames[1..2], with_pins(pages, IDLE, 1), "held")?;
        sys::kill(last.pid(), libc::SIGKILL).or_fail("kill")?;
        expect_waits(&last, IN_FINAL, &format!("{what}, with SIGKILL pending"))?;
        holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        let end = expect_ends(last, what)?;
        check_eq!(end, Exit::Signal(libc::SIGKILL), "{what}");
        s.expect_free(&frames, "closed")?;
    }
    s.unmount()
}

/// umount also waits until no page of a file is held.
fn umount<const KIND: usize>(_: &Ctx) -> Outcome {
    for pages in [SMALL, LARGE] {
        let mut s = Setup::new(KIND)?;
        let dir = s.fs.dir().to_path_buf();
        // The child has no copy of the file, nor of the file that pins its page.
        let unmounting = Waiting::start(
            || Ok(()),
            || files::unmount(&dir, MntFlags::empty()).or_fail("umount"),
        )?;
        let (file, buf) = s.mapped("a", pages, 843)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let busy = files::unmount(&dir, MntFlags::empty());
        expect_errno(busy, &[libc::EBUSY], "umount of what is mapped")?;
        let holder = Device::open(0)?;
        let id = holder.pin(&buf, 1, 1, 0).or_fail("ZDM_PIN")?;
        drop((file, buf));
        let unmounting = unmounting.release()?;
        expect_waits(&unmounting, IN_FINAL, "umount")?;
        s.expect_frames(&frames[1..2], with_pins(pages, IDLE, 1), "held")?;
        holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        expect_woken(unmounting, "umount")?;
        s.fs.forget();
        crate::tests::fsdax::expect_pmem_free(&s.device)?;
        s.fs = Mounted::again(KIND)?;
        let data = fs::read(s.fs.path("a")).or_fail("read")?;
        check_bytes(&data, 843, 0, "read(2) after the next mount")?;
        s.unmount()?;
    }
    Ok(())
}

/// While the task waits, another task may map the page again. The release of the page must still
/// wake the waiter.
fn mapped_again<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        for (what, take, _) in &TAKING[..2] {
            let (file, buf) = s.mapped("a", pages, 844)?;
            let frames = s.expect(&buf, MAPPED, "mapped")?;
            let taker = Waiting::start(|| Ok(()), || take(&file).or_fail(what))?;
            let holder = Device::open(0)?;
            let id = holder.pin(&buf, 1, 1, 0).or_fail("ZDM_PIN")?;
            let taker = taker.release()?;
            expect_waits(&taker, IN_BREAK, what)?;
            buf.check(1, 1, 844)?;
            s.expect_frames(&frames[1..2], with_pins(pages, MAPPED, 1), "mapped again")?;
            holder.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            expect_woken(
                taker,
                &format!("{what} of {pages} pages, mapped again meanwhile"),
            )?;
            drop((file, buf));
            s.fs.remove("a")?;
            s.expect_free(&frames, "unlinked")?;
        }
    }
    s.unmount()
}
