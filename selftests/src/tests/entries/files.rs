// SPDX-License-Identifier: GPL-2.0

//! Private mappings of files, whose copies go to the device, and marks that lie beside pages.

use super::super::Ctx;
use super::super::leak::settled;
use super::super::strict::clears_flags;
use super::super::target::Target;
use super::{SMALL, STRICT, Strict};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, PAGE, check_bytes, pattern_bytes};
use crate::uapi::ZDM_FAULT_WRITE;
use crate::uffd::Uffd;
use crate::{check, check_eq, files, proc, sys};

const N: usize = SMALL;
/// `UFFD_FEATURE_WP_UNPOPULATED`.
const WP_UNPOPULATED: u64 = 1 << 13;

/// All of these in one process, as each is short.
pub(super) fn all(ctx: &Ctx, node: usize) -> Outcome {
    clears_flags(ctx)?;
    settled(ctx, node, |target| {
        let _strict = Strict::on()?;
        check!(
            std::fs::read_to_string(STRICT).is_ok_and(|text| text.trim() != "N"),
            "strict mode: expected on"
        );
        copies_and_holes(target)?;
        copies_and_truncation(target)?;
        markers_of_files(target)?;
        markers_of_holes(target)?;
        let (audit, records) = target.audit()?;
        check_eq!(audit.total, 0, "violations, of which {records:x?}");
        Ok(())
    })
}

/// A file of pages with the pattern of `seed`, and a private mapping with copies of the even ones
/// on the device.
fn copies(target: &Target, seed: u64) -> Outcome<(std::fs::File, Buffer)> {
    let file = sys::memfd("zdm-entries").or_fail("memfd_create")?;
    file.set_len((N * PAGE) as u64).or_fail("ftruncate")?;
    Buffer::shared(&file, N)?.fill(0, N, seed);
    let buf = Buffer::of_file(&file, N, libc::MAP_PRIVATE).or_fail("mmap")?;
    buf.check(0, N, seed)?;
    for page in (0..N).step_by(2) {
        buf.fill(page, 1, seed + 1);
    }
    proc::drain_batches()?;
    // Those of the file stay, and need not be mapped by the device then.
    if let Err(e) = target.to_device(&buf, 0, N) {
        check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
    }
    target.expect(&buf, 0, N, N / 2)?;
    Ok((file, buf))
}

/// A hole in the file takes the file's pages out of a private mapping, and leaves the copies.
fn copies_and_holes(target: &Target) -> Outcome {
    let (file, buf) = copies(target, 5300)?;
    files::punch(&file, 2, 5).or_fail("a hole punch")?;
    target.stats()?;
    target.expect(&buf, 0, N, N / 2)?;
    for page in 0..N {
        let read = target.read(&buf, page, 1).or_fail("READ")?;
        match (page % 2, (2..7).contains(&page)) {
            (0, _) => {
                check_bytes(&read.data, 5301, page, "READ of a copy")?;
                buf.check(page, 1, 5301)?;
            }
            (_, true) => buf.check_zero(page, 1)?,
            (_, false) => buf.check(page, 1, 5300)?,
        }
    }
    target.stats().map(drop)
}

/// What lies beyond the end of the file is gone, copies and all.
fn copies_and_truncation(target: &Target) -> Outcome {
    let (file, buf) = copies(target, 5310)?;
    let before = target.stats()?;
    files::truncate(&file, N / 2).or_fail("ftruncate")?;
    super::super::freed_since(target, &before, N / 4)?;
    let read = target.read(&buf, N - 2, 1);
    check!(
        read.is_err(),
        "READ beyond the end of the file: expected an error, found success"
    );
    files::truncate(&file, N).or_fail("ftruncate")?;
    buf.check_zero(N / 2, N / 2)?;
    for page in (0..N / 2).step_by(2) {
        buf.check(page, 1, 5311)?;
    }
    Ok(())
}

/// A protected page of a file that is not mapped has a marker, which reading keeps and which no
/// write of the device passes.
fn markers_of_files(target: &Target) -> Outcome {
    let file = sys::memfd("zdm-entries").or_fail("memfd_create")?;
    file.set_len((N * PAGE) as u64).or_fail("ftruncate")?;
    let whole = Buffer::shared(&file, N)?;
    whole.fill(0, N, 5320);
    let buf = Buffer::shared(&file, N)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    if uffd.register_writes(&buf, 0, N).is_err() {
        // This kernel protects no files.
        return Ok(());
    }
    uffd.protect(&buf, 0, N, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    // By the marker, and by the page that has taken its place.
    for round in 0..2 {
        for page in [0, N - 1] {
            let write = target.write(&buf, page, &pattern_bytes(5321, page, 1));
            check!(
                write.is_err(),
                "WRITE past a marker in round {round}: expected an error, found success"
            );
        }
        let read = target.read(&buf, 0, N).or_fail("READ")?;
        check_bytes(&read.data, 5320, 0, "READ of protected pages of a file")?;
        target.stats()?;
    }
    whole.check(0, N, 5320)?;
    uffd.protect(&buf, 0, N, false)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    let n = target
        .fault(buf.at(0), N as u64, ZDM_FAULT_WRITE)
        .or_fail("ZDM_FAULT")?;
    check_eq!(n, N as u64, "pages that the device maps");
    target
        .write(&buf, 0, &pattern_bytes(5322, 0, N))
        .or_fail("WRITE")?;
    whole.check(0, N, 5322)
}

/// Nothing fills a hole that the process has protected.
fn markers_of_holes(target: &Target) -> Outcome {
    let Ok(uffd) = Uffd::with_features(WP_UNPOPULATED) else {
        return Ok(());
    };
    let buf = Buffer::anon(N)?;
    uffd.register_writes(&buf, 0, N)
        .or_fail("UFFDIO_REGISTER")?;
    uffd.protect(&buf, 2, 4, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    // Some of the range cannot go.
    let _ = target.to_device(&buf, 0, N);
    target.stats()?;
    target.expect(&buf, 2, 4, 0)?;
    let write = target.write(&buf, 3, &pattern_bytes(5331, 3, 1));
    check!(
        write.is_err(),
        "WRITE past a marker: expected an error, found success"
    );
    buf.check_zero(0, N)?;
    target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
    target.stats().map(drop)
}
