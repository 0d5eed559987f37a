// SPDX-License-Identifier: GPL-2.0

//! Operations on parts of DAX files: each operation on each kind of range, with blocks of the file's
//! own and with blocks that another file shares, and with each kind of mapping. A model says which
//! byte the file has where. read(2), the mappings from before, and a new one must agree with it, and
//! the other file must not change.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use nix::fcntl::FallocateFlags;

use super::Setup;
use super::share::needs_fixes;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, PAGE, pattern_bytes};
use crate::fsdax::{EXT4, REFLINK, XFS};
use crate::memory::WORDS;
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq, files};

pub const TESTS: &[Test] = &[
    test("fsdax.bytes_ext4", |_| each(EXT4, false)),
    test("fsdax.bytes_xfs", |_| each(XFS, false)),
    test("fsdax.bytes_reflink", |_| each(REFLINK, false)),
    test("fsdax.bytes_shared", |ctx| {
        needs_fixes(ctx)?;
        each(REFLINK, true)
    }),
    test("fsdax.unequal", unequal),
    test("fsdax.unequal_holes", unequal_holes),
    test("fsdax.unequal_unwritten", unequal_unwritten),
    test("fsdax.short_write", short_write),
];

/// The blocks of a file, and its size in bytes.
const N: usize = 6;
const LEN: usize = N * PAGE;
/// The bytes that are written behind the end of a file.
const WRITTEN: usize = 16;
const SEED: u64 = 6000;
/// The pattern of the file that others copy from, and of what is written.
const OTHER: u64 = 6001;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Write,
    /// A write by the mapping.
    Store,
    Zero,
    Punch,
    /// Truncation to the beginning of the range, and back to the old size.
    Cut,
    Copy,
    Unshare,
    /// Sharing of blocks with another file.
    Share,
    /// A write(2) behind the end of a file that ends where the range begins.
    Extend,
}

const OPS: [Op; 9] = [
    Op::Write,
    Op::Store,
    Op::Zero,
    Op::Punch,
    Op::Cut,
    Op::Copy,
    Op::Unshare,
    Op::Share,
    Op::Extend,
];

/// Offsets and lengths.
const RANGES: [(usize, usize); 9] = [
    (0, PAGE),
    (PAGE, 2 * PAGE),
    // Within a block, from its beginning, up to its end, and across blocks.
    (100, 200),
    (2 * PAGE, 104),
    (3 * PAGE - 96, 96),
    (PAGE - 7, 16),
    (PAGE + 904, 2 * PAGE + 33),
    (1, LEN - 2),
    // Up to the end of the file.
    (LEN - 50, 50),
];

/// The mappings that exist before the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Users {
    None,
    Readers,
    Writer,
}

const USERS: [Users; 3] = [Users::None, Users::Readers, Users::Writer];

impl Op {
    /// Whether a file system has this operation for this range.
    fn fits(self, kind: usize, (at, len): (usize, usize)) -> bool {
        match self {
            Op::Unshare => kind == REFLINK,
            Op::Share => kind == REFLINK && at % PAGE == 0 && len % PAGE == 0,
            Op::Extend => at > 0 && at < LEN - WRITTEN,
            _ => true,
        }
    }

    fn run(self, file: &File, map: &Buffer, donor: &File, range: (usize, usize)) -> io::Result<()> {
        let (at, len) = range;
        let allocate = |mode| files::allocate_bytes(file, mode, at, len);
        match self {
            Op::Write => file.write_all_at(&pattern_bytes(OTHER, 0, N)[at..at + len], at as u64),
            Op::Store => {
                store(map, range);
                Ok(())
            }
            Op::Zero => allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE),
            Op::Punch => allocate(files::PUNCH_HOLE),
            Op::Cut => {
                file.set_len(at as u64)?;
                file.set_len(LEN as u64)
            }
            Op::Copy => {
                let mut done = 0;
                while done < len {
                    match files::copy_range(donor, file, at + done, len - done)? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        n => done += n,
                    }
                }
                Ok(())
            }
            Op::Unshare => allocate(FallocateFlags::FALLOC_FL_UNSHARE_RANGE),
            Op::Share => files::clone_range(donor, file, at, len),
            Op::Extend => {
                let end = LEN - WRITTEN;
                file.write_all_at(&pattern_bytes(OTHER, 0, N)[end..], end as u64)
            }
        }
    }

    /// Changes the content that a file should have.
    fn apply(self, content: &mut [u8], (at, len): (usize, usize)) {
        match self {
            Op::Write | Op::Store | Op::Copy | Op::Share => {
                content[at..at + len].copy_from_slice(&pattern_bytes(OTHER, 0, N)[at..at + len]);
            }
            Op::Zero | Op::Punch => content[at..at + len].fill(0),
            Op::Cut => content[at..].fill(0),
            Op::Unshare => {}
            Op::Extend => {
                let end = LEN - WRITTEN;
                content[at..end].fill(0);
                content[end..].copy_from_slice(&pattern_bytes(OTHER, 0, N)[end..]);
            }
        }
    }

    /// The size of the file before.
    fn size(self, (at, _): (usize, usize)) -> usize {
        if self == Op::Extend { at } else { LEN }
    }
}

/// Writes bytes by a mapping, of which a test accesses only whole words.
fn store(map: &Buffer, (at, len): (usize, usize)) {
    let data = pattern_bytes(OTHER, 0, N);
    for word in at / 8..(at + len).div_ceil(8) {
        let (page, inside) = (word / WORDS, word % WORDS);
        let mut bytes = map.get(page, inside).to_ne_bytes();
        for (i, byte) in bytes.iter_mut().enumerate() {
            if (at..at + len).contains(&(word * 8 + i)) {
                *byte = data[word * 8 + i];
            }
        }
        map.set(page, inside, u64::from_ne_bytes(bytes));
    }
}

/// Checks bytes, and names the first that is wrong.
#[track_caller]
fn same(found: &[u8], expected: &[u8], what: &str) -> Outcome {
    let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
    check!(
        found.len() == expected.len() && wrong.is_none(),
        "{what}: byte {wrong:?} of {}: expected {:?}, found {:?} of {}",
        expected.len(),
        wrong.map(|at| expected[at]),
        wrong.map(|at| found[at]),
        found.len()
    );
    Ok(())
}

/// Checks the content of a file by read(2).
#[track_caller]
pub(super) fn reads(file: &File, expected: &[u8], what: &str) -> Outcome {
    let mut data = vec![0; expected.len()];
    file.read_exact_at(&mut data, 0).or_fail(what)?;
    same(&data, expected, what)
}

/// Checks the content of a mapping, up to the end of the file.
#[track_caller]
pub(super) fn maps(map: &Buffer, expected: &[u8], what: &str) -> Outcome {
    let words = (0..expected.len().div_ceil(PAGE)).flat_map(|page| map.words(page));
    let data: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
    same(&data[..expected.len()], expected, what)
}

/// The frames that a mapping has, with no reference but those of mappings. The kernel takes a shared
/// block from the file's other mappings when one is accessed, so each page is accessed here.
#[track_caller]
fn counted(s: &Setup, map: &Buffer, pages: usize, what: &str) -> Outcome<Vec<u64>> {
    let frame = |page: usize| -> Outcome<u64> {
        map.get(page, 0);
        let found = s.device.inspect_one(map, page)?;
        check!(
            found.kind != TYPE_FS_DAX || (found.refs == found.mapcount && found.pins == 0),
            "page {page} of {what}: expected its mappings as references, found {found:x?}"
        );
        Ok(found.pfn)
    };
    (0..pages).map(frame).collect()
}

fn case(s: &Setup, shared: bool, op: Op, range: (usize, usize), users: Users) -> Outcome {
    let whole = pattern_bytes(SEED, 0, N);
    let old = &whole[..op.size(range)];
    let pages = old.len().div_ceil(PAGE);
    let make = |name: &str, data: &[u8]| -> Outcome<File> {
        let file = s.fs.file(name, N)?;
        file.write_all_at(data, 0).or_fail("write")?;
        Ok(file)
    };
    let a = make("a", &whole)?;
    a.set_len(old.len() as u64).or_fail("ftruncate")?;
    let donor = make("donor", &pattern_bytes(OTHER, 0, N))?;
    let b = s.fs.empty("b")?;
    if shared {
        files::clone(&a, &b).or_fail("FICLONE")?;
    }
    let map = Buffer::shared(&a, N)?;
    let private = Buffer::of_file(&a, N, libc::MAP_PRIVATE).or_fail("mmap")?;
    let map_b = shared.then(|| Buffer::shared(&b, N)).transpose()?;
    match users {
        Users::None => {}
        Users::Readers => {
            maps(&map, old, "the mapping before")?;
            maps(&private, old, "the private mapping before")?;
            if let Some(map_b) = &map_b {
                maps(map_b, old, "the other file's mapping before")?;
            }
        }
        Users::Writer => {
            map.fill(0, old.len() / PAGE, SEED);
            // The page with the end of the file, without a change behind it.
            let first = map.get(pages - 1, 0);
            map.set(pages - 1, 0, first);
        }
    }
    let mut content = whole.clone();
    op.apply(&mut content, range);
    op.run(&a, &map, &donor, range).or_fail("the operation")?;
    for when in ["after it", "after fsync"] {
        reads(&a, &content, &format!("read(2) {when}"))?;
        maps(&map, &content, &format!("the mapping {when}"))?;
        maps(&private, &content, &format!("the private mapping {when}"))?;
        let fresh = Buffer::shared(&a, N)?;
        maps(&fresh, &content, &format!("a new mapping {when}"))?;
        let frames = counted(s, &map, N, "the file")?;
        check_eq!(
            &counted(s, &fresh, N, "the file")?,
            &frames,
            "frames of a new mapping and of the one before"
        );
        if let Some(map_b) = &map_b {
            reads(&b, old, &format!("read(2) of the other file {when}"))?;
            maps(map_b, old, &format!("the other file's mapping {when}"))?;
            let theirs = counted(s, map_b, pages, "the other file")?;
            let own = !matches!(op, Op::Zero | Op::Punch | Op::Cut | Op::Copy);
            // The block with the old end of the file is written to with what is behind it.
            let touched = match op {
                Op::Extend => range.0 / PAGE..range.0.div_ceil(PAGE),
                _ => range.0 / PAGE..(range.0 + range.1).div_ceil(PAGE),
            };
            for page in touched {
                check!(
                    !own || frames[page] != theirs[page],
                    "page {page} {when}: expected a block of its own, found that of the other \
                     file"
                );
            }
        }
        a.sync_all().or_fail("fsync")?;
    }
    reads(&donor, &pattern_bytes(OTHER, 0, N), "the third file")?;
    drop((map, private, map_b, a, b, donor));
    ["a", "b", "donor"]
        .into_iter()
        .try_for_each(|name| s.fs.remove(name))
}

fn each(kind: usize, shared: bool) -> Outcome {
    let s = Setup::new(kind)?;
    for op in OPS {
        for range in RANGES.into_iter().filter(|range| op.fits(kind, *range)) {
            for users in USERS {
                case(&s, shared, op, range, users).map_err(|e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{op:?} of {range:?}, mapped by {users:?}: {e}")),
                })?;
            }
        }
    }
    s.unmount()
}

/// Files that differ in one byte do not share blocks, wherever the byte is, and keep their data and
/// their blocks. Those that are the same do.
fn unequal(_: &Ctx) -> Outcome {
    let s = Setup::new(REFLINK)?;
    for n in [1, 2, N] {
        let last = n * PAGE - 1;
        let places = [0, 1, PAGE / 2, PAGE - 1, PAGE, last - PAGE + 1, last];
        let places = places.into_iter().filter(|at| *at <= last).map(Some);
        for place in places.chain([None]) {
            let (a, b) = (s.fs.file("a", n)?, s.fs.file("b", n)?);
            let old = pattern_bytes(SEED, 0, n);
            let mut other = old.clone();
            if let Some(at) = place {
                other[at] ^= 1;
            }
            a.write_all_at(&old, 0).or_fail("write")?;
            b.write_all_at(&other, 0).or_fail("write")?;
            let maps_of = [Buffer::shared(&a, n)?, Buffer::shared(&b, n)?];
            let frames = || -> Outcome<[Vec<u64>; 2]> {
                maps(&maps_of[0], &old, "the first file's mapping")?;
                maps(&maps_of[1], &other, "the second file's mapping")?;
                let of = |map: &Buffer| -> Outcome<Vec<u64>> {
                    let pages = s.device.inspect(map, 0, n).or_fail("ZDM_INSPECT")?;
                    Ok(pages.iter().map(|p| p.pfn).collect())
                };
                Ok([of(&maps_of[0])?, of(&maps_of[1])?])
            };
            let before = frames()?;
            let done = files::dedupe(&a, &b, 0, n);
            check_eq!(
                done.is_ok(),
                place.is_none(),
                "FIDEDUPERANGE of {n} pages that differ in byte {place:?}"
            );
            let after = frames()?;
            match place {
                Some(_) => check_eq!(after, before, "frames of files that differ"),
                None => check_eq!(after[1], before[0], "frames of files that are the same"),
            }
            reads(&a, &old, "the first file")?;
            reads(&b, &other, "the second file")?;
            drop((maps_of, a, b));
            s.fs.remove("a")?;
            s.fs.remove("b")?;
        }
    }
    s.unmount()
}

/// Leaves this page in free blocks, where the next files get theirs: what a block holds that was not written to is
/// known then.
fn leave(s: &Setup, page: &[u8]) -> Outcome {
    const CHUNK: usize = 256;
    let file = s.fs.empty("old")?;
    let chunk = page.repeat(CHUNK);
    for i in 0..64 {
        file.write_all_at(&chunk, (i * chunk.len()) as u64)
            .or_fail("write")?;
    }
    file.sync_all().or_fail("fsync")?;
    drop(file);
    s.fs.remove("old")?;
    // Blocks can be used again when the log says that they are free.
    nix::unistd::sync();
    Ok(())
}

/// Deduplicates two files with the same data, after `empty` has taken some pages from one of them. Those read as
/// zeroes, whatever the memory holds that they had or get, so that the files differ and share nothing.
fn without(empty: &dyn Fn(&File, usize, usize) -> io::Result<()>) -> Outcome {
    let s = Setup::new(REFLINK)?;
    // All pages are the same, so that it does not matter which block a page gets.
    let page = pattern_bytes(SEED, 0, 1);
    leave(&s, &page)?;
    for (first, n) in [(0, 1), (N - 1, 1), (1, N - 2), (0, N)] {
        for whose in [0, 1] {
            let what = format!("pages {first} to {} of file {whose} emptied", first + n - 1);
            let files = [s.fs.file("a", N)?, s.fs.file("b", N)?];
            let mut data = [page.repeat(N), page.repeat(N)];
            for file in &files {
                file.write_all_at(&data[0], 0).or_fail("write")?;
                file.sync_all().or_fail("fsync")?;
            }
            empty(&files[whose], first, n).or_fail(&what)?;
            data[whose][first * PAGE..(first + n) * PAGE].fill(0);
            let done = files::dedupe(&files[0], &files[1], 0, N);
            for (i, file) in files.iter().enumerate() {
                let name = format!("file {i}, {what}, after FIDEDUPERANGE, {done:?},");
                reads(file, &data[i], &name)?;
                maps(&Buffer::shared(file, N)?, &data[i], &name)?;
            }
            check!(done.is_err(), "FIDEDUPERANGE, {what}: expected an error");
            drop(files);
            s.fs.remove("a")?;
            s.fs.remove("b")?;
        }
    }
    s.unmount()
}

/// A hole differs from any data.
fn unequal_holes(_: &Ctx) -> Outcome {
    without(&files::punch)
}

/// So does what was allocated and not yet written, although its memory may hold the same data.
fn unequal_unwritten(_: &Ctx) -> Outcome {
    without(&|file, first, n| {
        files::punch(file, first, n)?;
        files::allocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, first, n)
    })?;
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
    without(&|file, first, n| files::allocate(file, zero, first, n))
}

/// A write(2) to shared blocks ends early, as a part of the caller's memory cannot be read. It changes what it says,
/// and nothing before or behind that.
fn short_write(_: &Ctx) -> Outcome {
    let s = Setup::new(REFLINK)?;
    let old = pattern_bytes(SEED, 0, N);
    leave(&s, &pattern_bytes(OTHER, N, 1))?;
    for at in [0, 1, 100, PAGE - 1, PAGE, PAGE + 100] {
        for readable in [1, 2] {
            let what = format!("{readable} of 3 pages written at {at}");
            let (mut a, b) = (s.fs.file("a", N)?, s.fs.empty("b")?);
            a.write_all_at(&old, 0).or_fail("write")?;
            files::clone(&a, &b).or_fail("FICLONE")?;
            let data = Buffer::filled(3, OTHER)?;
            data.protect(readable, 3 - readable, libc::PROT_NONE)?;
            a.seek(SeekFrom::Start(at as u64)).or_fail("seek")?;
            let n = data.write_to(&a, 0, 3).or_fail(&what)?;
            check!(
                n > 0 && n <= readable * PAGE,
                "{what}: expected what can be read, found {n}"
            );
            let mut content = old.clone();
            content[at..at + n].copy_from_slice(&pattern_bytes(OTHER, 0, 3)[..n]);
            reads(&a, &content, &format!("the file, {what},"))?;
            maps(
                &Buffer::shared(&a, N)?,
                &content,
                &format!("its mapping, {what},"),
            )?;
            reads(&b, &old, &format!("the other file, {what},"))?;
            drop((a, b));
            s.fs.remove("a")?;
            s.fs.remove("b")?;
        }
    }
    s.unmount()
}
