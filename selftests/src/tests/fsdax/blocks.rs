// SPDX-License-Identifier: GPL-2.0

//! What a block held before it became a file's is never seen: each state that a block of a file can
//! be in, and each access that may be the first one, on blocks that hold the data of a file that was
//! removed, which are nearly all that is free. What is not written reads as zeroes, by read(2) and by each mapping.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::fcntl::FallocateFlags;

use super::bytes::{maps, reads};
use super::{LARGE, Setup};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, PAGE, pattern_bytes};
use crate::fsdax::{EXT4, REFLINK, XFS};
use crate::harness::note;
use crate::tests::{Test, test};
use crate::uapi::{PageInfo, TYPE_FS_DAX};
use crate::{check, dax, files};

pub const TESTS: &[Test] = &[
    test("fsdax.blocks_ext4", |_| each(EXT4)),
    test("fsdax.blocks_xfs", |_| each(XFS)),
    test("fsdax.blocks_reflink", |_| each(REFLINK)),
];

/// The pages of a small file.
const N: usize = 4;
/// The pages of the file that is removed.
const POOL: usize = 16 * LARGE;
/// The pattern of the file that was removed, and that of what is written.
const OLD: u64 = 6100;
const NEW: u64 = 6101;
/// The page that an access goes to, in bytes from its beginning, and the length of what it writes.
const PLACE: (usize, usize, usize) = (1, 1024, 8);

/// The state of a file's blocks before the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Was {
    Hole,
    /// Allocated, and not written.
    Unwritten,
    /// Allocated behind the end of the file, which then came to lie behind them.
    Behind,
    /// Zeroed, which may leave them unwritten.
    Zeroed,
    /// Allocated, with the first page written.
    Partly,
    /// Shared with a file that never wrote them.
    Shared,
}

const STATES: [Was; 6] = [
    Was::Hole,
    Was::Unwritten,
    Was::Behind,
    Was::Zeroed,
    Was::Partly,
    Was::Shared,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    SharedRead,
    SharedWrite,
    PrivateRead,
    PrivateWrite,
    Read,
    Write,
}

const ACCESSES: [Access; 6] = [
    Access::SharedRead,
    Access::SharedWrite,
    Access::PrivateRead,
    Access::PrivateWrite,
    Access::Read,
    Access::Write,
];

/// Leaves no free blocks but those of a file that was removed, which hold its pattern. Returns their page frames.
/// xfs keeps some blocks for itself, which are free as well, but fewer than these. ext4 is told to keep none.
#[track_caller]
fn spoil(s: &Setup, kind: usize) -> Outcome<BTreeSet<u64>> {
    if kind == EXT4 {
        let name = dax::PMEM.rsplit('/').next().unwrap_or_default();
        let path = format!("/sys/fs/ext4/{name}/reserved_clusters");
        fs::write(&path, "0").or_fail(&path)?;
    }
    let file = s.fs.file("old", POOL)?;
    let map = Buffer::shared(&file, POOL)?;
    map.fill(0, POOL, OLD);
    let pages = s.device.inspect(&map, 0, POOL).or_fail("ZDM_INSPECT")?;
    file.sync_all().or_fail("fsync")?;
    let rest = s.fs.empty("rest")?;
    let (mut have, mut step) = (0, 1 << 14);
    while step > 0 {
        match files::allocate(&rest, FallocateFlags::empty(), have, step) {
            Ok(()) => have += step,
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => step /= 2,
            Err(e) => return Err(e).or_fail("fallocate"),
        }
    }
    rest.sync_all().or_fail("fsync")?;
    drop((map, file));
    remove(s, "old")?;
    Ok(pages.iter().map(|p| p.pfn).collect())
}

/// Removes a file. Its blocks are free once that is on disk.
#[track_caller]
fn remove(s: &Setup, name: &str) -> Outcome {
    s.fs.remove(name)?;
    let dir = File::open(s.fs.dir()).or_fail("the directory")?;
    dir.sync_all().or_fail("fsync of the directory")
}

impl Was {
    fn make(self, s: &Setup, n: usize, content: &mut [u8]) -> Outcome<File> {
        let file = s.fs.empty("a")?;
        let allocate = |mode| files::allocate(&file, mode, 0, n).or_fail("fallocate");
        match self {
            Was::Hole => files::truncate(&file, n).or_fail("ftruncate")?,
            Was::Unwritten => allocate(FallocateFlags::empty())?,
            Was::Behind => {
                allocate(FallocateFlags::FALLOC_FL_KEEP_SIZE)?;
                files::truncate(&file, n).or_fail("ftruncate")?;
            }
            Was::Zeroed => {
                allocate(FallocateFlags::empty())?;
                let all = pattern_bytes(NEW, 0, n);
                file.write_all_at(&all, 0).or_fail("write")?;
                allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE)?;
            }
            Was::Partly => {
                allocate(FallocateFlags::empty())?;
                let first = pattern_bytes(NEW, 0, 1);
                file.write_all_at(&first, 0).or_fail("write")?;
                content[..PAGE].copy_from_slice(&first);
            }
            Was::Shared => {
                allocate(FallocateFlags::empty())?;
                let twin = s.fs.empty("b")?;
                files::clone(&file, &twin).or_fail("FICLONE")?;
                return Ok(twin);
            }
        }
        Ok(file)
    }
}

/// One state and one access. Returns whether a block of the file is one that holds old data; `None` if none was
/// mapped.
fn case(
    s: &Setup,
    old: &BTreeSet<u64>,
    n: usize,
    was: Was,
    access: Access,
) -> Outcome<Option<bool>> {
    let mut content = vec![0; n * PAGE];
    let file = was.make(s, n, &mut content)?;
    let shared = Buffer::shared(&file, n)?;
    let private = Buffer::of_file(&file, n, libc::MAP_PRIVATE).or_fail("mmap")?;
    let (page, at, len) = PLACE;
    let range = page * PAGE + at..page * PAGE + at + len;
    let new = &pattern_bytes(NEW, 0, n)[range.clone()];
    let word = new.iter().rev().fold(0, |n, b| (n << 8) | u64::from(*b));
    let mut own = content.clone();
    own[range.clone()].copy_from_slice(new);
    match access {
        Access::SharedRead => maps(&shared, &content, "the first look at the mapping")?,
        Access::PrivateRead => maps(&private, &content, "the first look at the private mapping")?,
        Access::Read => reads(&file, &content, "the first read(2)")?,
        Access::SharedWrite => shared.set(page, at / 8, word),
        Access::Write => file
            .write_all_at(new, range.start as u64)
            .or_fail("write")?,
        Access::PrivateWrite => {
            private.set(page, at / 8, word);
            maps(&private, &own, "the private mapping with its own page")?;
        }
    }
    if matches!(access, Access::SharedWrite | Access::Write) {
        content = own;
    }
    let pages = s.device.inspect(&shared, 0, n).or_fail("ZDM_INSPECT")?;
    let mut seen: BTreeSet<u64> = blocks(&pages);
    for when in ["", " after fsync"] {
        reads(&file, &content, &format!("read(2){when}"))?;
        maps(&shared, &content, &format!("the mapping{when}"))?;
        let fresh = Buffer::of_file(&file, n, libc::MAP_PRIVATE).or_fail("mmap")?;
        maps(&fresh, &content, &format!("a new private mapping{when}"))?;
        file.sync_all().or_fail("fsync")?;
    }
    let pages = s.device.inspect(&shared, 0, n).or_fail("ZDM_INSPECT")?;
    seen.extend(blocks(&pages));
    // For the next case.
    let all = pattern_bytes(OLD, 0, n);
    file.write_all_at(&all, 0).or_fail("write")?;
    file.sync_all().or_fail("fsync")?;
    drop((shared, private, file));
    if was == Was::Shared {
        remove(s, "b")?;
    }
    remove(s, "a")?;
    let reused = seen.iter().any(|pfn| old.contains(pfn));
    Ok((!seen.is_empty()).then_some(reused))
}

/// The page frames of those of some pages that are blocks of a file. A page of zeroes is none.
fn blocks(pages: &[PageInfo]) -> BTreeSet<u64> {
    let of_file = pages.iter().filter(|p| p.kind == TYPE_FS_DAX);
    of_file.map(|p| p.pfn).collect()
}

fn each(kind: usize) -> Outcome {
    let s = Setup::new(kind)?;
    let old = spoil(&s, kind)?;
    let (mut reused, mut cases) = (0, 0);
    for was in STATES {
        for access in ACCESSES {
            for n in [N, LARGE] {
                let by_mapping = !matches!(access, Access::Read | Access::Write);
                let fits = n == N || by_mapping && matches!(was, Was::Hole | Was::Unwritten);
                if !fits || was == Was::Shared && kind != REFLINK {
                    continue;
                }
                let old = case(&s, &old, n, was, access).map_err(|e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{access:?} of {was:?} blocks, {n} pages: {e}")),
                })?;
                cases += usize::from(old.is_some());
                reused += usize::from(old == Some(true));
            }
        }
    }
    note(&format!(
        "{reused} of {cases} cases had blocks that were another file's"
    ));
    check!(
        reused * 8 > cases,
        "cases with blocks that were another file's: expected more than an eighth of {cases}, found {reused}"
    );
    s.unmount()
}
