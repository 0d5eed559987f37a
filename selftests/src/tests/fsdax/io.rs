// SPDX-License-Identifier: GPL-2.0

//! Other holders of DAX pages than ZDM_PIN: pipes, direct I/O in progress, and process_vm_readv(2).
//! Also direct I/O between DAX mappings and a file system without DAX, as in xfstests' generic/413.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, PAGE, check_bytes, pattern_bytes};
use crate::fsdax::{EXT4, Mounted, REFLINK, XFS};
use crate::fuse::SlowFile;
use crate::tests::counts::{IDLE, MAPPED, Waiting};
use crate::tests::fsdax::waits::{IN_BREAK, expect_waits, expect_woken};
use crate::tests::fsdax::{LARGE, SMALL, Setup, with_pins};
use crate::tests::{Ctx, Test, test};
use crate::uffd::Uffd;
use crate::{check, check_eq, files, sys};

pub const TESTS: &[Test] = &[
    test("fsdax.pipe_ext4", pipe::<EXT4>),
    test("fsdax.pipe_xfs", pipe::<XFS>),
    test("fsdax.pipe_reflink", pipe::<REFLINK>),
    test("fsdax.direct_write_ext4", in_flight::<EXT4, true>),
    test("fsdax.direct_write_xfs", in_flight::<XFS, true>),
    test("fsdax.direct_write_reflink", in_flight::<REFLINK, true>),
    test("fsdax.direct_read_ext4", in_flight::<EXT4, false>),
    test("fsdax.direct_read_xfs", in_flight::<XFS, false>),
    test("fsdax.direct_read_reflink", in_flight::<REFLINK, false>),
    test("fsdax.process_read_ext4", process_read::<EXT4>),
    test("fsdax.process_read_xfs", process_read::<XFS>),
    test("fsdax.process_read_reflink", process_read::<REFLINK>),
    test("fsdax.generic_413_ext4", generic_413::<EXT4>),
    test("fsdax.generic_413_xfs", generic_413::<XFS>),
    test("fsdax.generic_413_reflink", generic_413::<REFLINK>),
];

/// The pages of one transfer, which fits into a pipe and into one request.
const PART: usize = 4;

/// Truncation waits until the pages in a pipe have been read.
fn pipe<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 860)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let truncate = || files::truncate(&file, 0).or_fail("ftruncate");
        let taker = Waiting::start(|| Ok(()), truncate)?;
        let (mut read, write) = sys::pipe().or_fail("pipe")?;
        let n = buf.vmsplice_to(&write, 0, PART).or_fail("vmsplice")?;
        check_eq!(n, PART * PAGE, "bytes that vmsplice took");
        let taker = taker.release()?;
        expect_waits(&taker, IN_BREAK, "ftruncate with pages in a pipe")?;
        let refs = if pages == SMALL { 1 } else { PART as i32 };
        s.expect_frames(&frames[..PART], [refs, 0, 0], "in a pipe")?;
        // Read all but the last page: the truncation still waits.
        let mut data = vec![0; PAGE * PART];
        let (first, last) = data.split_at_mut(PAGE * (PART - 1));
        read.read_exact(first).or_fail("read")?;
        expect_waits(&taker, IN_BREAK, "ftruncate with a page in a pipe")?;
        read.read_exact(last).or_fail("read")?;
        expect_woken(taker, "ftruncate with an empty pipe")?;
        check_bytes(&data, 860, 0, "what came out of the pipe")?;
        drop((file, buf));
        s.fs.remove("a")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// Truncation waits until direct I/O from or to a mapping has finished.
fn in_flight<const KIND: usize, const WRITE: bool>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 861)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let slow = SlowFile::mount("/tmp/zdm-slow".as_ref()).or_fail("mount of FUSE")?;
        let truncate = || files::truncate(&file, 0).or_fail("ftruncate");
        let taker = Waiting::start(|| Ok(()), truncate)?;
        // The child opens the file, because opening it is a request, too.
        let caller = Waiting::start(
            || Ok(()),
            || {
                let other = files::open_direct(slow.path()).or_fail("open")?;
                let n = match WRITE {
                    true => buf.write_to(&other, 0, PART),
                    false => buf.read_from(&other, 0, PART),
                };
                check_eq!(n.or_fail("direct I/O")?, PART * PAGE, "bytes");
                Ok(())
            },
        )?
        .release()?;
        let request = slow.next(Duration::from_secs(10)).or_fail("FUSE")?;
        let request = request.ok_or_else(|| Fail::failed("direct I/O: expected a request"))?;
        check_eq!(request.is_write, WRITE, "kind of the request");
        check_eq!(request.size as usize, PART * PAGE, "bytes of the request");
        if WRITE {
            check_bytes(&request.data, 861, 0, "what is to be written")?;
        }
        let taker = taker.release()?;
        expect_waits(&taker, IN_BREAK, "ftruncate with direct I/O under way")?;
        let pins = if pages == SMALL { 1 } else { PART as i32 };
        s.expect_frames(&frames[..PART], with_pins(pages, IDLE, pins), "under way")?;
        let answer = pattern_bytes(862, 0, PART);
        slow.complete(&request, &answer).or_fail("FUSE")?;
        expect_woken(taker, "ftruncate with direct I/O done")?;
        // The close of the file needs an answer, too.
        while caller.is_running()? {
            let late = slow.next(Duration::from_millis(20)).or_fail("FUSE")?;
            check!(late.is_none(), "requests: expected one, found another");
        }
        caller.join()?;
        drop((file, buf, slow));
        s.fs.remove("a")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// Truncation waits for process_vm_readv(2), which pins its source pages and may have to wait for
/// its destination.
fn process_read<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let (file, buf) = s.mapped("a", pages, 863)?;
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let truncate = || files::truncate(&file, 0).or_fail("ftruncate");
        let taker = Waiting::start(|| Ok(()), truncate)?;
        let to = Arc::new(Buffer::anon(PART)?);
        let uffd = Uffd::new().or_fail("userfaultfd")?;
        uffd.register(&to, 0, PART).or_fail("UFFDIO_REGISTER")?;
        let buf = Arc::new(buf);
        let (from, target) = (buf.clone(), to.clone());
        let reader =
            std::thread::spawn(move || files::read_process(sys::pid(), &from, 0, &target, PART));
        let mut missing = uffd.next(Duration::from_secs(10)).or_fail("userfaultfd")?;
        check!(
            missing.is_some(),
            "a missing page: expected one, found none"
        );
        let taker = taker.release()?;
        expect_waits(
            &taker,
            IN_BREAK,
            "ftruncate with process_vm_readv under way",
        )?;
        let pins = if pages == SMALL { 1 } else { PART as i32 };
        s.expect_frames(&frames[..PART], with_pins(pages, IDLE, pins), "under way")?;
        let zeroes = Buffer::anon(1)?;
        zeroes.set(0, 0, 0);
        while let Some(address) = missing {
            uffd.copy(address, &zeroes, 0).or_fail("UFFDIO_COPY")?;
            missing = match reader.is_finished() {
                true => None,
                false => uffd
                    .next(Duration::from_millis(100))
                    .or_fail("userfaultfd")?,
            };
        }
        let n = reader
            .join()
            .map_err(|_| Fail::failed("the reading thread: expected its end, found a panic"))?
            .or_fail("process_vm_readv")?;
        check_eq!(n, PART * PAGE, "bytes that were read");
        to.check(0, PART, 863)?;
        expect_woken(taker, "ftruncate with process_vm_readv done")?;
        drop((file, buf));
        s.fs.remove("a")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// Direct and other I/O between a mapping on one file system and a file on the other, in both
/// directions, with both kinds of mapping. The data is right, no page stays held, and the runner
/// checks that the kernel reports nothing.
fn generic_413<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    let mut plain = Mounted::plain()?;
    let open = |fs: &Mounted, name: &str, direct: bool| match direct {
        true => files::open_direct(&fs.path(name)).or_fail(name),
        false => fs.open(name),
    };
    for pages in [SMALL, LARGE] {
        let (dax_file, dax) = s.mapped("a", pages, 864)?;
        let frames = s.expect(&dax, MAPPED, "mapped")?;
        let plain_file = plain.file("b", pages)?;
        let other = Buffer::shared(&plain_file, pages)?;
        for direct in [true, false] {
            for (i, (memory, fs, name)) in [
                (&dax, &plain, "b"),
                (&other, &s.fs, "a"),
                (&dax, &s.fs, "c"),
            ]
            .into_iter()
            .enumerate()
            {
                let what = format!("{i}, direct {direct}, {pages} pages");
                if name == "c" {
                    drop(s.fs.file(name, pages)?);
                }
                // Write from memory to the file, in parts as large as the file system chooses.
                memory.fill(0, pages, 865);
                let file = open(fs, name, direct)?;
                let mut done = 0;
                while done < pages {
                    let n = memory.write_to(&file, done, pages - done);
                    done += n.or_fail(&format!("write {what}"))? / PAGE;
                }
                drop(file);
                // Read back, over other data.
                memory.fill(0, pages, 866);
                let file = open(fs, name, direct)?;
                let mut done = 0;
                while done < pages {
                    let n = memory.read_from(&file, done, pages - done);
                    let n = n.or_fail(&format!("read {what}"))? / PAGE;
                    check!(n > 0, "read {what}: expected {pages} pages, found {done}");
                    done += n;
                }
                memory.check(0, pages, 865)?;
                s.expect(&dax, MAPPED, &what)?;
            }
        }
        drop((dax, dax_file, other, plain_file));
        s.expect_frames(&frames, IDLE, "unmapped")?;
        for (fs, name) in [(&s.fs, "a"), (&s.fs, "c"), (&plain, "b")] {
            fs.remove(name)?;
        }
        s.expect_free(&frames, "unlinked")?;
    }
    plain.unmount().or_fail("umount")?;
    s.unmount()
}
