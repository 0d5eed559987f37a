// SPDX-License-Identifier: GPL-2.0

//! Scenarios of the kernel's hmm-tests that no other file covers, for GENERIC memory, which
//! hmm-tests does not know. Each has the name of the original.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::target::{GENERIC, Target};
use super::{Ctx, PAGES, Test, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::uapi::*;
use crate::{check, check_eq, sys};

pub const TESTS: &[Test] = &[
    test("hmm_generic.open_close", open_close),
    test("hmm_generic.anon_write_child_shared", write_child_shared),
    test("hmm_generic.anon_hugetlbfs", hugetlbfs),
    test("hmm_generic.file", file),
    test("hmm_generic.migrate_file_private", file_private),
    test("hmm_generic.migrate_shared", shared),
    test("hmm_generic.migrate_mixed", mixed),
    test("hmm_generic.migrate_fault", fault),
    test("hmm_generic.migrate_multiple", multiple),
    test("hmm_generic.anon_teardown", teardown),
    test("hmm_generic.double_map", double_map),
];

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Both devices are opened, one after the other and at once.
fn open_close(ctx: &Ctx) -> Outcome {
    for _ in 0..50 {
        for n in [GENERIC, GENERIC + 1] {
            drop(Target::open(ctx, n)?);
        }
    }
    let all = [GENERIC, GENERIC + 1, GENERIC].map(|n| Target::open(ctx, n));
    all.into_iter().collect::<Outcome<Vec<_>>>().map(drop)
}

/// A child's device writes to memory that it shares with the parent.
fn write_child_shared(ctx: &Ctx) -> Outcome {
    Target::open(ctx, GENERIC)?;
    let file = sys::memfd("zdm-shared").or_fail("memfd_create")?;
    file.set_len((PAGES * PAGE) as u64).or_fail("ftruncate")?;
    let buf = Buffer::shared(&file, PAGES)?;
    buf.fill(0, PAGES, 750);
    Child::spawn(|| {
        buf.check(0, PAGES, 750)?;
        let target = Target::open(ctx, GENERIC)?;
        let data = pattern_bytes(751, 0, PAGES);
        let cmd = target.write(&buf, 0, &data).or_fail("WRITE")?;
        check_eq!(cmd.cpages, PAGES as u64, "copied pages");
        buf.check(0, PAGES, 751)
    })?
    .join()?;
    buf.check(0, PAGES, 751)
}

/// The number of reserved huge pages. Dropping it restores the old number.
struct Reserve(String);

const RESERVE: &str = "/proc/sys/vm/nr_hugepages";

impl Reserve {
    fn one() -> Outcome<Self> {
        let old = fs::read_to_string(RESERVE)
            .map_err(|e| Fail::Skip(format!("no hugetlbfs: {RESERVE}: {e}")))?;
        fs::write(RESERVE, "1").or_fail(RESERVE)?;
        Ok(Self(old))
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // A surplus of reserved pages does no harm.
        let _ = fs::write(RESERVE, &self.0);
    }
}

/// The device uses a page of hugetlbfs in place; the page does not migrate.
fn hugetlbfs(ctx: &Ctx) -> Outcome {
    const N: usize = HUGE_PAGES;
    let target = Target::open(ctx, GENERIC)?;
    let _reserve = Reserve::one()?;
    let buf = Buffer::hugetlb(N).or_fail("mmap of a reserved huge page")?;
    target
        .write(&buf, 0, &pattern_bytes(752, 0, N))
        .or_fail("WRITE")?;
    buf.check(0, N, 752)?;
    let seen = target.snapshot(&buf, 0, N).or_fail("SNAPSHOT")?;
    check_eq!(seen, vec![PROT_WRITE | PROT_PMD; N], "SNAPSHOT");
    let page = target.inspect_one(&buf, 3)?;
    check_eq!(
        (page.kind, page.order, page.index),
        (TYPE_SYSTEM, 9, 3),
        "type, order and index"
    );
    let result = target.to_device(&buf, 0, N);
    expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_DEV")?;
    buf.protect(0, N, libc::PROT_READ)?;
    let seen = target.snapshot(&buf, 0, N).or_fail("SNAPSHOT")?;
    check_eq!(seen, vec![PROT_READ | PROT_PMD; N], "SNAPSHOT");
    buf.check(0, N, 752)
}

/// An unnamed file in memory, with the pattern of `seed`.
fn with_pattern(seed: u64) -> Outcome<File> {
    const PATH: &str = "/tmp/zdm-scenarios";
    fs::create_dir_all("/tmp").or_fail("mkdir /tmp")?;
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(PATH).or_fail(PATH)?;
    fs::remove_file(PATH).or_fail(PATH)?;
    file.write_all_at(&pattern_bytes(seed, 0, PAGES), 0)
        .or_fail("write")?;
    Ok(file)
}

/// The device reads and writes pages of a file.
fn file(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let file = with_pattern(753)?;
    let buf = Buffer::shared(&file, PAGES)?;
    let read = target.read(&buf, 0, PAGES).or_fail("READ")?;
    check_bytes(&read.data, 753, 0, "READ of a file's pages")?;
    target
        .write(&buf, 0, &pattern_bytes(754, 0, PAGES))
        .or_fail("WRITE")?;
    let mut data = vec![0; PAGES * PAGE];
    file.read_exact_at(&mut data, 0).or_fail("pread")?;
    check_bytes(&data, 754, 0, "data in the file")
}

/// Private copies of a file's pages are anonymous and migrate; the file stays the same.
fn file_private(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let file = with_pattern(755)?;
    let buf = Buffer::of_file(&file, PAGES, libc::MAP_PRIVATE).or_fail("mmap")?;
    buf.check(0, PAGES, 755)?;
    buf.fill(0, PAGES, 756);
    target.move_all(&buf, 756)?;
    buf.check(0, PAGES, 756)?;
    let before = target.stats()?;
    // After the page is dropped on the device, the mapping has the page of the file again.
    buf.advise(0, 8, libc::MADV_DONTNEED)?;
    super::freed_since(&target, &before, 8)?;
    buf.check(0, 8, 755)?;
    target.bring_back(&buf, 8, PAGES - 8)?;
    buf.check(8, PAGES - 8, 756)?;
    let mut data = vec![0; PAGES * PAGE];
    file.read_exact_at(&mut data, 0).or_fail("pread")?;
    check_bytes(&data, 755, 0, "data in the file")
}

/// Memory of a shared mapping does not migrate.
fn shared(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let file = sys::memfd("zdm-shared").or_fail("memfd_create")?;
    file.set_len((PAGES * PAGE) as u64).or_fail("ftruncate")?;
    let buf = Buffer::shared(&file, PAGES)?;
    for touched in [false, true] {
        if touched {
            buf.fill(0, PAGES, 757);
        }
        let result = target.to_device(&buf, 0, PAGES);
        expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of shared memory")?;
        check_eq!(target.audit()?.0.used, 0, "used pages in the audit");
    }
    buf.check(0, PAGES, 757)
}

/// Pages of several kinds in one range, one of them on the other device.
fn mixed(ctx: &Ctx) -> Outcome {
    let (zero, one) = (Target::open(ctx, GENERIC)?, Target::open(ctx, GENERIC + 1)?);
    let buf = Buffer::anon(6)?;
    buf.protect(0, 6, libc::PROT_NONE)?;
    let result = one.to_device(&buf, 0, 6);
    expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_DEV without access")?;
    buf.unmap(1, 1)?;
    let result = one.to_device(&buf, 0, 3);
    expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_DEV across a hole")?;
    // The zero page, a read-only page, and two plain ones.
    buf.protect(2, 1, libc::PROT_READ)?;
    check_eq!(buf.get(2, 0), 0, "first word of fresh memory");
    buf.protect(3, 3, RW)?;
    buf.fill(3, 3, 758);
    buf.protect(3, 1, libc::PROT_READ)?;
    let moved = one.to_device(&buf, 2, 4).or_fail("MIGRATE_TO_DEV")?;
    check_eq!(moved.cpages, 4, "copied pages");
    check_bytes(&moved.data[PAGE..], 758, 3, "returned data")?;
    one.expect(&buf, 2, 4, 4)?;
    // The other device does not take a page that it does not own.
    let before = zero.stats()?;
    let owner = one.inspect_one(&buf, 5)?;
    if let Err(e) = zero.to_device(&buf, 5, 1) {
        check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
    }
    check_eq!(zero.stats()?.to_device, before.to_device, "stats.to_device");
    check_eq!(one.inspect_one(&buf, 5)?, owner, "page of the other device");
    buf.check_zero(2, 1)?;
    buf.check(3, 3, 758)
}

/// The pages migrate, some come back, and all migrate again.
fn fault(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, GENERIC)?;
    let buf = Buffer::filled(PAGES, 759)?;
    target.move_all(&buf, 759)?;
    for first in [0, PAGES / 4] {
        buf.check(0, PAGES / 2, 759)?;
        target.bring_back(&buf, first, PAGES / 2)?;
        let moved = target.to_device(&buf, 0, PAGES).or_fail("MIGRATE_TO_DEV")?;
        check_eq!(moved.cpages, PAGES as u64, "copied pages");
        check_bytes(&moved.data, 759, 0, "returned data")?;
        target.expect(&buf, 0, PAGES, PAGES)?;
    }
    buf.check(0, PAGES, 759)
}

/// Each round uses other memory, and frees it in turn on the device.
fn multiple(ctx: &Ctx) -> Outcome {
    const TIMES: u64 = 64;
    let target = Target::open(ctx, GENERIC)?;
    let before = target.stats()?;
    for seed in 0..TIMES {
        let buf = Buffer::filled(PAGES, 1000 + seed)?;
        target.move_all(&buf, 1000 + seed)?;
        if seed % 2 == 0 {
            target.bring_back(&buf, 0, PAGES)?;
        }
        buf.check(0, PAGES, 1000 + seed)?;
    }
    super::freed_since(&target, &before, TIMES as usize * PAGES)?;
    target.expect_empty()
}

/// One half is unmapped while the device reads or migrates the whole range.
fn teardown(ctx: &Ctx) -> Outcome {
    const TIMES: u64 = 40;
    const N: usize = 256;
    let target = Target::open(ctx, GENERIC)?;
    let (mut done, mut cut) = (0, 0);
    for round in 0..TIMES {
        let buf = Buffer::filled(N, 760)?;
        if round % 2 == 0 {
            target.move_all(&buf, 760)?;
        }
        let result = std::thread::scope(|scope| {
            let unmapping = scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(round * 97 % 2500));
                buf.unmap(N / 2, N / 2)
            });
            let result = match round % 4 {
                0 | 1 => target.read(&buf, 0, N),
                _ => target.to_device(&buf, 0, N),
            };
            let panicked = |_| Err(Fail::failed("a thread panicked"));
            unmapping.join().unwrap_or_else(panicked).map(|()| result)
        })?;
        match result {
            Ok(moved) => {
                done += 1;
                check_bytes(&moved.data, 760, 0, "data that was torn down amid")?;
            }
            Err(e) => {
                cut += 1;
                let errnos = [libc::EFAULT, libc::EINVAL, libc::ENOENT, libc::EBUSY];
                check!(
                    e.raw_os_error().is_some_and(|n| errnos.contains(&n)),
                    "READ or MIGRATE_TO_DEV of what is unmapped: expected {errnos:?}, found {e}"
                );
            }
        }
        buf.check(0, N / 2, 760)?;
        drop(buf);
        target.expect_empty()?;
    }
    crate::harness::note(&format!("{done} times all of it, {cut} times an error"));
    Ok(())
}

/// Both devices read the same memory, wherever it is.
fn double_map(ctx: &Ctx) -> Outcome {
    let (zero, one) = (Target::open(ctx, GENERIC)?, Target::open(ctx, GENERIC + 1)?);
    let buf = Buffer::filled(6, 761)?;
    buf.protect(0, 6, libc::PROT_READ)?;
    let read = |who: &Target, when: &str| -> Outcome {
        let read = who.read(&buf, 0, 6).or_fail("READ")?;
        check_bytes(&read.data, 761, 0, when)
    };
    read(&zero, "READ of system memory")?;
    read(&one, "READ of system memory")?;
    one.move_all(&buf, 761)?;
    read(&zero, "READ of the other's memory")?;
    read(&one, "READ of its own memory")?;
    one.expect(&buf, 0, 6, 6)?;
    let data = pattern_bytes(762, 0, 6);
    for device in [&zero, &one] {
        let result = device.write(&buf, 0, &data);
        expect_errno(result, &[libc::EPERM], "WRITE to read-only memory")?;
    }
    one.bring_back(&buf, 0, 6)?;
    read(&zero, "READ of system memory")?;
    buf.check(0, 6, 761)
}
