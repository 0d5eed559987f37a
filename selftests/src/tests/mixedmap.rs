// SPDX-License-Identifier: GPL-2.0

//! Pages of the driver itself, mapped by mmap of the node (VM_MIXEDMAP).

use std::io::{Read, Write};

use super::strict::has_all_fixes;
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, check_bytes, pattern_bytes};
use crate::harness::Child;
use crate::module;
use crate::sys;
use crate::uapi::*;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = &[
    test("mixedmap.snapshot", snapshot),
    test("mixedmap.access", access),
    test("mixedmap.private", private),
    test("mixedmap.migrate", migrate),
    test("mixedmap.munmap", munmap),
    test("mixedmap.fork", fork),
    test("mixedmap.close", close),
];

const N: usize = 40;

/// Maps pages of the driver: shared, or with private copies of written pages.
#[track_caller]
fn map(device: &Device, n: usize, flags: i32) -> Outcome<Buffer> {
    device.map(n, flags).or_fail("mmap of the node")
}

/// The result that the kernel's hmm-tests expect, and further properties of the mappings.
fn snapshot(ctx: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = map(&device, 1, libc::MAP_PRIVATE)?;
    let seen = device.snapshot(&buf, 0, 1).or_fail("SNAPSHOT")?;
    check_eq!(seen, [PROT_READ], "SNAPSHOT of a private mapping");
    buf.set(0, 0, 1);
    let seen = device.snapshot(&buf, 0, 1).or_fail("SNAPSHOT")?;
    check_eq!(seen, [PROT_WRITE], "SNAPSHOT of a copy");
    // All pages are mapped from the beginning. Before the first write they are clean, and a kernel with "hmm:
    // do not report a clean page as writable" says that a write needs a fault.
    let shared = map(&device, N, libc::MAP_SHARED)?;
    check_eq!(proc::present(&shared, 0, N)?, N, "present pages");
    let seen = device.snapshot(&shared, 0, N).or_fail("SNAPSHOT")?;
    let clean = match has_all_fixes(ctx)? {
        true => PROT_READ,
        false => PROT_WRITE,
    };
    check_eq!(seen, vec![clean; N], "SNAPSHOT of a clean shared mapping");
    shared.fill(0, N, 369);
    let seen = device.snapshot(&shared, 0, N).or_fail("SNAPSHOT")?;
    check_eq!(seen, vec![PROT_WRITE; N], "SNAPSHOT of a shared mapping");
    Ok(())
}

fn access(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = map(&device, N, libc::MAP_SHARED)?;
    buf.check_zero(0, N)?;
    buf.fill(0, N, 370);
    let read = device.read(&buf, 0, N).or_fail("READ")?;
    check_bytes(&read.data, 370, 0, "READ of what the CPU wrote")?;
    device
        .write(&buf, 4, &pattern_bytes(371, 4, 8))
        .or_fail("WRITE")?;
    buf.check(0, 4, 370)?;
    buf.check(4, 8, 371)?;
    buf.check(12, N - 12, 370)?;
    // Each mapping has pages of its own.
    let other = map(&device, N, libc::MAP_SHARED)?;
    other.check_zero(0, N)?;
    let read = Device::open(1)?.read(&buf, 4, 8).or_fail("READ")?;
    check_bytes(&read.data, 371, 4, "READ by another device")
}

/// The first write to a page of a private mapping makes a copy. The copy does not migrate either,
/// because the kind of mapping decides.
fn private(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = map(&device, N, libc::MAP_PRIVATE)?;
    let read = device.read(&buf, 0, N).or_fail("READ")?;
    check!(
        read.data.iter().all(|b| *b == 0),
        "pages of the driver: expected zeroes, found something else"
    );
    buf.fill(0, 8, 372);
    let read = device.read(&buf, 0, 8).or_fail("READ")?;
    check_bytes(&read.data, 372, 0, "READ of copies")?;
    device
        .write(&buf, 8, &pattern_bytes(373, 8, 8))
        .or_fail("WRITE")?;
    buf.check(0, 8, 372)?;
    buf.check(8, 8, 373)?;
    buf.check_zero(16, N - 16)
}

/// Core mm does not migrate such mappings.
fn migrate(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        let buf = map(&device, N, flags)?;
        buf.fill(0, N, 374);
        let result = device.to_device(&buf, 0, N);
        expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_DEV")?;
        let result = device.to_system(&buf, 0, N);
        expect_errno(result, &[libc::EINVAL], "MIGRATE_TO_SYS")?;
        check_eq!(device.audit()?.0.used, 0, "used pages in the audit");
        buf.check(0, N, 374)?;
    }
    // The device cannot get exclusive access to them either.
    let buf = map(&device, 1, libc::MAP_SHARED)?;
    let result = device.exclusive(&buf, 0, 1);
    expect_errno(result, &[libc::EOPNOTSUPP], "EXCLUSIVE")
}

fn munmap(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = map(&device, N, libc::MAP_SHARED)?;
    buf.fill(0, N, 375);
    device.read(&buf, 0, N).or_fail("READ")?;
    buf.unmap(8, 8)?;
    let result = device.read(&buf, 8, 1);
    expect_errno(result, &[libc::EFAULT], "READ of what is unmapped")?;
    let read = device.read(&buf, 16, N - 16).or_fail("READ")?;
    check_bytes(&read.data, 375, 16, "READ of what is left")?;
    buf.check(0, 8, 375)?;
    drop(buf);

    // Repeat it: if each round lost a page, free memory would shrink.
    let free = proc::mem_free()?;
    for _ in 0..64 {
        let buf = map(&device, 256, libc::MAP_SHARED)?;
        buf.set(255, 0, 1);
    }
    let now = proc::mem_free()?;
    check!(
        now + 64 * 256 / 2 > free,
        "free pages after 64 mappings of 256: expected about {free}, found {now}"
    );
    Ok(())
}

fn fork(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let shared = map(&device, N, libc::MAP_SHARED)?;
    let copied = map(&device, N, libc::MAP_PRIVATE)?;
    shared.fill(0, N, 376);
    copied.fill(0, N / 2, 377);
    let (mut wait, go) = sys::pipe().or_fail("pipe")?;
    let (mut ready, checked) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        shared.check(0, N, 376)?;
        copied.check(0, N / 2, 377)?;
        copied.check_zero(N / 2, N - N / 2)?;
        (&checked).write_all(b"c").or_fail("pipe")?;
        shared.fill(0, 4, 378);
        copied.fill(0, 4, 379);
        // A file that the child opens mirrors the child.
        let device = Device::open(0)?;
        let read = device.read(&copied, 0, 4).or_fail("READ by a child")?;
        check_bytes(&read.data, 379, 0, "READ of the child's copies")?;
        wait.read_exact(&mut [0]).or_fail("pipe")?;
        shared.check(4, 4, 380)?;
        copied.check(4, 4, 377)
    })?;
    // Close the write end, so that the end of the child is seen.
    drop(checked);
    // A child that fails earlier reports its failure itself.
    let told = ready.read(&mut [0]).or_fail("pipe")?;
    if told == 1 {
        shared.fill(4, 4, 380);
        copied.fill(4, 4, 381);
    }
    (&go).write_all(b"g").or_fail("pipe")?;
    child.join()?;
    shared.check(0, 4, 378)?;
    shared.check(4, 4, 380)?;
    let read = device.read(&shared, 0, 4).or_fail("READ")?;
    check_bytes(&read.data, 378, 0, "READ of what the child wrote")?;
    copied.check(0, 4, 377)?;
    copied.check(4, 4, 381)?;
    copied.check_zero(N / 2, N - N / 2)
}

/// The mapping keeps the file open, and the file keeps the module loaded.
fn close(ctx: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = map(&device, N, libc::MAP_SHARED)?;
    buf.fill(0, N, 382);
    let moved = Buffer::filled(8, 383)?;
    device.move_all(&moved, 383)?;
    drop(device);
    match ctx.module.try_unload() {
        Err(e) if module::busy(&e) => {}
        other => {
            return Err(Fail::failed(format!(
                "unloading with a mapping: expected EAGAIN or EBUSY, found {other:?}"
            )));
        }
    }
    buf.check(0, N, 382)?;
    moved.check(0, 8, 383)?;
    let again = Device::open(0)?;
    let read = again.read(&buf, 0, N).or_fail("READ by another file")?;
    check_bytes(&read.data, 382, 0, "READ by another file")
}
