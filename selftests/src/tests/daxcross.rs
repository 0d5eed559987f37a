// SPDX-License-Identifier: GPL-2.0

//! Every operation that takes blocks from a DAX file against every kind of user of its pages, on
//! ext4 and xfs: the full cross product. Each case checks the counts of every page frame, before
//! and after, and the data of every page.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::fcntl::FallocateFlags;
use nix::mount::MntFlags;

use super::counts::{Counts, IDLE, MAPPED, Waiting, pinned};
use super::fsdax::Setup;
use super::fsdax::share::needs_fixes;
use super::fsdax::waits::{IN_BREAK, IN_FINAL, expect_waits, expect_woken};
use super::{Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, PAGE, check_bytes, pattern_bytes};
use crate::fsdax::{EXT4, Mounted, REFLINK, XFS};
use crate::fuse::{Request, SlowFile};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::uapi::*;
use crate::{check, check_eq, files};

macro_rules! cross {
    ($($op:ident)+) => {
        &[$(
            test(concat!("daxcross.", stringify!($op), "_ext4"), |_| each(EXT4, Op::$op)),
            test(concat!("daxcross.", stringify!($op), "_xfs"), |_| each(XFS, Op::$op)),
            test(concat!("daxcross.", stringify!($op), "_reflink"), |_| each(REFLINK, Op::$op)),
        )+]
    };
}

pub const TESTS: &[Test] = cross!(
    truncate punch zero collapse insert unlink last_close unmount
);

/// Operations of file systems that share blocks.
pub const SHARING: &[Test] = &[
    test("daxcross.dedupe_reflink", |_| each(REFLINK, Op::dedupe)),
    test("daxcross.dedupe_older_reflink", |ctx| {
        needs_fixes(ctx)?;
        each(REFLINK, Op::dedupe_older)
    }),
    test("daxcross.clone_reflink", |_| each(REFLINK, Op::clone)),
    test("daxcross.clone_older_reflink", |ctx| {
        needs_fixes(ctx)?;
        each(REFLINK, Op::clone_older)
    }),
    test("daxcross.source_reflink", |_| each(REFLINK, Op::source)),
    test("daxcross.source_older_reflink", |ctx| {
        needs_fixes(ctx)?;
        each(REFLINK, Op::source_older)
    }),
];

/// The operations that take blocks away.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    truncate,
    punch,
    zero,
    collapse,
    insert,
    unlink,
    last_close,
    unmount,
    /// The file gets blocks of another file with the same data, which is newer or older: the kernel
    /// takes both files in the order of their numbers.
    dedupe,
    dedupe_older,
    clone,
    clone_older,
    /// The other file gets blocks of this one.
    source,
    source_older,
}

/// The users of the pages.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    read,
    write,
    sync,
    private,
    gup,
    gup_fast,
    /// Direct I/O that is done.
    direct,
    /// Direct I/O that is under way.
    in_flight,
}

const USERS: [User; 8] = [
    User::read,
    User::write,
    User::sync,
    User::private,
    User::gup,
    User::gup_fast,
    User::direct,
    User::in_flight,
];

/// The number of pages in a file.
const N: usize = 8;
/// The first page that an operation takes, or where it inserts pages.
const FIRST: usize = 2;
const COUNT: usize = 2;
const SEED: u64 = 4000;
/// The pattern that a private mapping writes.
const OWN: u64 = 4001;

impl Op {
    fn run(self, file: &File, twin: Option<&File>) -> io::Result<()> {
        let allocate = |mode| files::allocate(file, mode, FIRST, COUNT);
        match self {
            Op::truncate => files::truncate(file, FIRST),
            Op::punch => files::punch(file, FIRST, COUNT),
            Op::zero => allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE),
            Op::collapse => allocate(FallocateFlags::FALLOC_FL_COLLAPSE_RANGE),
            Op::insert => allocate(FallocateFlags::FALLOC_FL_INSERT_RANGE),
            Op::unlink | Op::last_close | Op::unmount => Ok(()),
            _ => {
                let twin = twin.ok_or(io::ErrorKind::NotFound)?;
                match self {
                    Op::dedupe | Op::dedupe_older => files::dedupe(twin, file, FIRST, COUNT),
                    Op::clone | Op::clone_older => files::clone_part(twin, file, FIRST, COUNT),
                    _ => files::clone_part(file, twin, 0, COUNT),
                }
            }
        }
    }

    /// Whether there is another file, and whether it is older.
    fn twin(self) -> Option<bool> {
        match self {
            Op::dedupe | Op::clone | Op::source => Some(false),
            Op::dedupe_older | Op::clone_older | Op::source_older => Some(true),
            _ => None,
        }
    }

    /// The content of the file after the operation: for each page the old page, or `None` for
    /// zeroes.
    fn content(self) -> Vec<Option<usize>> {
        let old = |range: std::ops::Range<usize>| range.map(Some);
        let zeroes = std::iter::repeat_n(None, COUNT);
        let end = FIRST + COUNT;
        match self {
            Op::truncate => old(0..FIRST).collect(),
            Op::punch | Op::zero => old(0..FIRST).chain(zeroes).chain(old(end..N)).collect(),
            Op::collapse => old(0..FIRST).chain(old(end..N)).collect(),
            Op::insert => old(0..FIRST).chain(zeroes).chain(old(FIRST..N)).collect(),
            _ => old(0..N).collect(),
        }
    }

    /// The old pages whose blocks the file no longer has. Zeroing may keep or replace them.
    fn taken(self) -> Vec<usize> {
        let content = self.content();
        match self {
            Op::zero => Vec::new(),
            Op::dedupe | Op::dedupe_older | Op::clone | Op::clone_older => {
                (FIRST..FIRST + COUNT).collect()
            }
            _ => (0..N)
                .filter(|page| !content.contains(&Some(*page)))
                .collect(),
        }
    }
}

impl User {
    /// Whether the user holds pages, so that the operation has to wait.
    fn holds(self) -> bool {
        matches!(self, User::gup | User::gup_fast | User::in_flight)
    }

    fn flags(self) -> i32 {
        match self {
            User::sync => libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
            User::private => libc::MAP_PRIVATE,
            _ => libc::MAP_SHARED,
        }
    }
}

/// A mapping of a file with its user, and the frames of the file's pages.
struct Used {
    buf: Arc<Buffer>,
    frames: Vec<u64>,
    /// The id of the pin, if the user is a pin.
    pin: Option<u32>,
    flight: Option<Flight>,
}

/// A direct write of the pages of a mapping to a file that does not answer before `land`.
struct Flight {
    slow: SlowFile,
    request: Request,
    writer: JoinHandle<io::Result<usize>>,
}

impl Flight {
    #[track_caller]
    fn start(buf: &Arc<Buffer>, n: usize) -> Outcome<Self> {
        let slow = SlowFile::mount("/tmp/zdm-slow".as_ref()).or_fail("mount of FUSE")?;
        let (from, path) = (buf.clone(), slow.path().to_path_buf());
        // A thread, not a process: its pins are the only references beside those of the mapping.
        let writer = std::thread::spawn(move || {
            // The first close asks whether there is FLUSH.
            drop(files::open_direct(&path)?);
            let to = files::open_direct(&path)?;
            from.write_to(&to, 0, n)
        });
        let request = slow.next(Duration::from_secs(10)).or_fail("FUSE")?;
        let request = request.ok_or_else(|| Fail::failed("direct write: expected a request"))?;
        check_eq!(request.size as usize, n * PAGE, "bytes of the request");
        check_bytes(&request.data, SEED, 0, "what is to be written")?;
        Ok(Self {
            slow,
            request,
            writer,
        })
    }

    #[track_caller]
    fn land(self) -> Outcome {
        self.slow.complete(&self.request, &[]).or_fail("FUSE")?;
        while !self.writer.is_finished() {
            // The close of the file needs an answer, too.
            let late = self.slow.next(Duration::from_millis(20)).or_fail("FUSE")?;
            check!(late.is_none(), "requests: expected one, found another");
        }
        let n = self.writer.join();
        let n =
            n.map_err(|_| Fail::failed("the writing thread: expected its end, found a panic"))?;
        check_eq!(
            n.or_fail("direct write")?,
            self.request.size as usize,
            "bytes that were written"
        );
        Ok(())
    }
}

/// The counts of page `page`.
fn counts(user: User, page: usize) -> Counts {
    match user {
        _ if user.holds() && page < FIRST + COUNT => pinned(MAPPED, 1),
        // The private mapping has its own copy of a page that it has written.
        User::private if page % 2 == 1 => IDLE,
        _ => MAPPED,
    }
}

impl Used {
    #[track_caller]
    fn start(s: &Setup, file: &File, user: User) -> Outcome<Self> {
        // The file has the data without a mapping.
        file.write_all_at(&pattern_bytes(SEED, 0, N), 0)
            .or_fail("write")?;
        let buf = Arc::new(Buffer::of_file(file, N, user.flags()).or_fail("mmap")?);
        buf.check(0, N, SEED)?;
        let pages = s.device.inspect(&buf, 0, N).or_fail("ZDM_INSPECT")?;
        let frames: Vec<u64> = pages.iter().map(|p| p.pfn).collect();
        check!(
            pages.iter().all(|p| p.kind == TYPE_FS_DAX),
            "pages of a DAX file: expected FS_DAX, found {pages:x?}"
        );
        let (mut pin, mut flight) = (None, None);
        match user {
            User::read => {}
            User::write | User::sync => buf.fill(0, N, SEED),
            User::private => {
                for page in (1..N).step_by(2) {
                    buf.fill(page, 1, OWN);
                }
            }
            User::gup | User::gup_fast => {
                buf.fill(0, N, SEED);
                let fast = if user == User::gup_fast {
                    ZDM_PIN_FAST
                } else {
                    0
                };
                let id = s.device.pin(&buf, 0, FIRST + COUNT, ZDM_PIN_WRITE | fast);
                pin = Some(id.or_fail("ZDM_PIN")?);
            }
            User::direct => direct(&buf)?,
            User::in_flight => {
                buf.fill(0, N, SEED);
                flight = Some(Flight::start(&buf, FIRST + COUNT)?);
            }
        }
        let used = Self {
            buf,
            frames,
            pin,
            flight,
        };
        for page in 0..N {
            let when = format!("{user:?}, page {page}");
            s.expect_frames(&used.frames[page..=page], counts(user, page), &when)?;
        }
        Ok(used)
    }

    #[track_caller]
    fn unpin(&mut self, s: &Setup) -> Outcome {
        if let Some(id) = self.pin.take() {
            s.device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        }
        match self.flight.take() {
            Some(flight) => flight.land(),
            None => Ok(()),
        }
    }
}

/// Direct I/O between a file without DAX and the pages, in both directions.
fn direct(buf: &Buffer) -> Outcome {
    let plain = Mounted::plain()?;
    let path = plain.path("direct");
    let file = files::open_direct(&path).or_fail("open for direct I/O")?;
    let n = buf.write_to(&file, 0, N).or_fail("direct write")?;
    check_eq!(n, N * PAGE, "bytes that were written");
    buf.fill(0, N, OWN);
    drop(file);
    let file = files::open_direct(&path).or_fail("open for direct I/O")?;
    let n = buf.read_from(&file, 0, N).or_fail("direct read")?;
    check_eq!(n, N * PAGE, "bytes that were read");
    buf.check(0, N, SEED)
}

/// Checks the data of a file after an operation, by read and by a mapping.
#[track_caller]
fn expect_content(file: &File, op: Op) -> Outcome {
    let content = op.content();
    let size = file.metadata().or_fail("stat")?.len();
    check_eq!(size, (content.len() * PAGE) as u64, "size of the file");
    let buf = Buffer::shared(file, content.len())?;
    let mut data = vec![0; content.len() * PAGE];
    file.read_exact_at(&mut data, 0).or_fail("read")?;
    for (page, old) in content.iter().enumerate() {
        let bytes = &data[page * PAGE..(page + 1) * PAGE];
        match old {
            Some(old) => {
                buf.check_from(page, 1, SEED, *old)?;
                check_bytes(bytes, SEED, *old, "read(2)")?;
            }
            None => {
                buf.check_zero(page, 1)?;
                check!(bytes.iter().all(|b| *b == 0), "read(2): expected zeroes");
            }
        }
    }
    Ok(())
}

/// Checks the data in the old mapping, and that pages beyond the end of the file are gone.
#[track_caller]
fn expect_mapping(used: &Used, op: Op, user: User) -> Outcome {
    let content = op.content();
    for page in 0..N {
        if user == User::private && page % 2 == 1 {
            // The operation and the file system decide whether copies survive; truncation removes
            // them.
            continue;
        }
        match content.get(page) {
            Some(Some(old)) => used.buf.check_from(page, 1, SEED, *old)?,
            Some(None) => used.buf.check_zero(page, 1)?,
            None => {
                let child = Child::spawn(|| {
                    sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
                    used.buf.get(page, 0);
                    Ok(())
                })?;
                let end = child.exit()?;
                check_eq!(
                    end,
                    Exit::Signal(libc::SIGBUS),
                    "end of who reads page {page}"
                );
            }
        }
    }
    Ok(())
}

/// Runs an operation against each user.
fn each(kind: usize, op: Op) -> Outcome {
    for user in USERS {
        // The child has its own mount namespace.
        Child::spawn(|| {
            case(kind, op, user).map_err(|e| match e {
                Fail::Skip(_) => e,
                e => Fail::failed(format!("{op:?} against {user:?}: {e}")),
            })
        })?
        .join()?;
    }
    Ok(())
}

/// Runs one operation against one user.
fn case(kind: usize, op: Op, user: User) -> Outcome {
    let s = Setup::new(kind)?;
    let twin = || -> Outcome<File> {
        let file = s.fs.file("twin", COUNT)?;
        file.write_all_at(&pattern_bytes(SEED, FIRST, COUNT), 0)
            .or_fail("write")?;
        Ok(file)
    };
    let (older, newer) = (op.twin() == Some(true), op.twin() == Some(false));
    let older = older.then(twin).transpose()?;
    let file = s.fs.file("a", N)?;
    let twin = older.or(newer.then(twin).transpose()?);
    let mut used = Used::start(&s, &file, user)?;
    match op {
        Op::unlink => return unlink(s, file, used, user),
        Op::last_close => return last_close(s, file, used, user),
        Op::unmount => return unmount(s, kind, file, used, user),
        _ => {}
    }
    if user.holds() {
        let taker = Waiting::start(
            || Ok(()),
            || op.run(&file, twin.as_ref()).or_fail("the operation"),
        )?;
        let taker = taker.release()?;
        expect_waits(
            &taker,
            IN_BREAK,
            &format!("{op:?} of pages that are pinned"),
        )?;
        // Until the release the holder keeps the page with its data.
        s.expect_frames(
            &used.frames[FIRST..FIRST + 1],
            pinned(IDLE, 1),
            "pinned, and waited for",
        )?;
        used.unpin(&s)?;
        expect_woken(
            taker,
            &format!("{op:?} of pages that are not pinned any more"),
        )?;
    } else {
        op.run(&file, twin.as_ref()).or_fail("the operation")?;
    }
    for page in op.taken() {
        s.expect_free(
            &used.frames[page..=page],
            &format!("page {page} after {op:?}"),
        )?;
    }
    expect_mapping(&used, op, user)?;
    // ext4 unmaps all pages of the file. The checks above have accessed them again, so pages before
    // the place of the operation must be mapped as before.
    if user != User::private && !user.holds() {
        s.expect_frames(
            &used.frames[..FIRST],
            MAPPED,
            "before the place of the operation",
        )?;
    }
    expect_content(&file, op)?;
    // Blocks that stay with the file have moved within it; they were not copied.
    let again = Buffer::shared(&file, op.content().len())?;
    for (page, old) in op.content().iter().enumerate() {
        if let Some(old) = old {
            again.get(page, 0);
            let now = s.device.inspect_one(&again, page)?.pfn;
            if op.taken().contains(old) {
                check!(
                    !used.frames.contains(&now),
                    "frame of page {page}: expected that of the other file, found {now:#x}"
                );
                continue;
            }
            check_eq!(
                now,
                used.frames[*old],
                "frame of page {page}, which was {old}"
            );
        }
    }
    drop((again, used.buf, file, twin));
    let frames = used.frames;
    s.fs.remove("a")?;
    if op.twin().is_some() {
        let twin = s.fs.open("twin")?;
        let from = match op {
            Op::source | Op::source_older => 0,
            _ => FIRST,
        };
        Buffer::shared(&twin, COUNT)?.check_from(0, COUNT, SEED, from)?;
        s.fs.remove("twin")?;
    }
    s.expect_free(&frames, "unlinked")?;
    s.unmount()
}

/// An unlinked file exists while it is mapped. A held page delays the end of the file.
fn unlink(s: Setup, file: File, mut used: Used, user: User) -> Outcome {
    s.fs.remove("a")?;
    drop(file);
    for page in 0..N {
        s.expect_frames(&used.frames[page..=page], counts(user, page), "unlinked")?;
    }
    expect_mapping(&used, Op::unlink, user)?;
    end(&s, &mut used, user)?;
    s.expect_free(&used.frames, "unlinked and unmapped")?;
    s.unmount()
}

/// Ends the last mapping of a file that is unlinked and closed.
fn end(s: &Setup, used: &mut Used, user: User) -> Outcome {
    if !user.holds() {
        return used.buf.unmap(0, N);
    }
    // A child also has the mapping, and unmaps it last.
    let child = Waiting::start(|| Ok(()), || used.buf.unmap(0, N))?;
    used.buf.unmap(0, N)?;
    let child = child.release()?;
    expect_waits(&child, IN_FINAL, "the end of a file with a pinned page")?;
    used.unpin(s)?;
    expect_woken(child, "the end of a file with no pinned page any more")
}

/// Closing a mapped file changes nothing.
fn last_close(s: Setup, file: File, mut used: Used, user: User) -> Outcome {
    drop(file);
    for page in 0..N {
        s.expect_frames(&used.frames[page..=page], counts(user, page), "closed")?;
    }
    expect_mapping(&used, Op::last_close, user)?;
    used.buf.unmap(0, N)?;
    let left = if user.holds() { pinned(IDLE, 1) } else { IDLE };
    s.expect_frames(&used.frames[..FIRST + COUNT], left, "closed and unmapped")?;
    used.unpin(&s)?;
    s.expect_frames(&used.frames, IDLE, "held by nobody")?;
    expect_content(&s.fs.open("a")?, Op::last_close)?;
    s.fs.remove("a")?;
    s.expect_free(&used.frames, "unlinked")?;
    s.unmount()
}

/// A file system is busy while a file is mapped, and can be unmounted when no page is in use.
fn unmount(mut s: Setup, kind: usize, file: File, mut used: Used, user: User) -> Outcome {
    drop(file);
    let busy = s.fs.unmount().err().and_then(|e| e.raw_os_error());
    check_eq!(busy, Some(libc::EBUSY), "umount with a mapped file");
    expect_mapping(&used, Op::unmount, user)?;
    used.buf.unmap(0, N)?;
    if user.holds() {
        let dir = s.fs.dir().to_path_buf();
        let taker = Waiting::start(
            || Ok(()),
            || files::unmount(&dir, MntFlags::empty()).or_fail("umount"),
        )?;
        let taker = taker.release()?;
        // The counts show whether the unmount waits or leaves the pages to their holders.
        let ended = sys::wait_until(Duration::from_millis(500), || {
            !taker.is_running().unwrap_or(false)
        });
        s.expect_frames(
            &used.frames[..1],
            pinned(IDLE, 1),
            "pinned, umount under way",
        )?;
        used.unpin(&s)?;
        expect_woken(taker, "umount with nothing pinned any more")?;
        crate::harness::note(&format!("umount waited: {}", !ended));
        s.fs.forget();
    } else {
        s.fs.unmount().or_fail("umount")?;
    }
    super::fsdax::expect_pmem_free(&s.device)?;
    let mut again = Mounted::again(kind)?;
    expect_content(&again.open("a")?, Op::unmount)?;
    again.remove("a")?;
    again.unmount().or_fail("umount")?;
    super::fsdax::expect_pmem_free(&s.device)
}
