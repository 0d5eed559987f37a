// SPDX-License-Identifier: GPL-2.0

//! Where the argument of a command is, and what the caller may have.

use std::fs;

use libc::{EFAULT, ENOMEM};
use nix::sys::resource::Resource;

use super::lives::mappings;
use super::{PINS, READS, every_ioctl, works};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, PAGE};
use crate::harness::Child;
use crate::memory::pattern_words;
use crate::sys;
use crate::tests::target::{Target, open_all};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.argument_read_only", argument_read_only),
    test("hostile.argument_in_part", argument_in_part),
    test("hostile.argument_unaligned", argument_unaligned),
    test("hostile.argument_on_the_device", argument_on_the_device),
    test("hostile.stack_does_not_grow", stack_does_not_grow),
    test("hostile.small_limits", small_limits),
];

/// Puts bytes into a buffer, from byte `at` of it on.
fn put(buf: &Buffer, at: usize, bytes: &[u8]) {
    for (i, &byte) in bytes.iter().enumerate() {
        let (page, word) = ((at + i) / PAGE, (at + i) % PAGE / 8);
        let mut value = buf.get(page, word).to_ne_bytes();
        value[(at + i) % 8] = byte;
        buf.set(page, word, u64::from_ne_bytes(value));
    }
}

/// The word that begins at byte `at` of a buffer.
fn word(buf: &Buffer, at: usize) -> u64 {
    let byte = |i: usize| buf.get((at + i) / PAGE, (at + i) % PAGE / 8).to_ne_bytes()[(at + i) % 8];
    u64::from_ne_bytes(std::array::from_fn(byte))
}

/// Each command that returns something in its argument, with an argument for page 1 of `buf`, whose other
/// end is the first page of `room`.
fn arguments(buf: &Buffer, room: &Buffer) -> Vec<(u64, Vec<u8>)> {
    let upstream = [HMM_WRITE, HMM_SNAPSHOT, HMM_MIGRATE_TO_SYS];
    let upstream = READS.into_iter().chain(upstream);
    let words = |list: &[u64]| -> Vec<u8> { list.iter().flat_map(|w| w.to_ne_bytes()).collect() };
    let hmm = words(&[buf.at(1), room.at(0), 1, 7, 7]);
    let mut list: Vec<_> = upstream.map(|request| (request, hmm.clone())).collect();
    list.push((ZDM_FAULT, words(&[buf.at(1), 1, 0, 7])));
    list.extend(PINS.map(|flags| (ZDM_PIN, words(&[buf.at(1), 1, flags.into()]))));
    list.push((ZDM_AUDIT, words(&[0; 8])));
    list.push((ZDM_FAULT_AROUND, words(&[1])));
    list.push((ZDM_STATS, vec![0; size_of::<Stats>()]));
    list
}

/// Checks that no command has left a pin, and that the file still works.
fn nothing_is_left(target: &Target, buf: &Buffer, seed: u64) -> Outcome {
    let pins = target.inspect(buf, 0, buf.pages()).or_fail("ZDM_INSPECT")?;
    check!(
        pins.iter().all(|page| page.pins == 0),
        "pins that nobody knows of: expected none, found {pins:x?}"
    );
    target
        .to_system(buf, 0, buf.pages())
        .or_fail("MIGRATE_TO_SYS")?;
    buf.check(0, buf.pages(), seed)
}

/// The argument is where the caller may not write: the command fails, and leaves nothing that the caller
/// does not know of.
fn argument_read_only(ctx: &Ctx) -> Outcome {
    for target in open_all(ctx)? {
        let [buf, room] = [Buffer::filled(3, 1800)?, Buffer::filled(1, 1800)?];
        for (request, bytes) in arguments(&buf, &room) {
            let place = Buffer::anon(1)?;
            put(&place, 64, &bytes);
            place.protect(0, 1, libc::PROT_READ)?;
            // What WRITE writes is what is there.
            for i in 0..PAGE / 8 {
                room.set(0, i, pattern_words(1800, 1)[i]);
            }
            let result = target.ioctl_within(request, &place, 64);
            let what = format!("ioctl {request:#x} with an argument that is read-only");
            expect_errno(result, &[EFAULT], &what)?;
        }
        nothing_is_left(&target, &buf, 1800)?;
    }
    works(ctx)
}

/// The argument ends in a page that is not there, or without rights.
fn argument_in_part(ctx: &Ctx) -> Outcome {
    for target in open_all(ctx)? {
        let [buf, room] = [Buffer::filled(3, 1801)?, Buffer::filled(1, 1801)?];
        for (request, bytes) in arguments(&buf, &room) {
            for unmapped in [false, true] {
                for there in [1, bytes.len() / 2, bytes.len() - 1] {
                    let place = Buffer::anon(2)?;
                    put(&place, PAGE - there, &bytes);
                    match unmapped {
                        true => place.unmap(1, 1)?,
                        false => place.protect(1, 1, libc::PROT_NONE)?,
                    }
                    let result = target.ioctl_within(request, &place, PAGE - there);
                    let what = format!("ioctl {request:#x} with {there} bytes of its argument");
                    expect_errno(result, &[EFAULT], &what)?;
                }
            }
        }
        nothing_is_left(&target, &buf, 1801)?;
    }
    works(ctx)
}

/// The argument begins anywhere, also so that it lies in two pages, the second of which is not present yet.
fn argument_unaligned(ctx: &Ctx) -> Outcome {
    for target in open_all(ctx)? {
        let [buf, room] = [Buffer::filled(3, 1802)?, Buffer::anon(1)?];
        for at in [1, 7, PAGE - 1, PAGE - 9, PAGE - 39] {
            for request in READS {
                let place = Buffer::anon(2)?;
                let bytes = [buf.at(0), room.at(0), 1, 7, 7]
                    .map(u64::to_ne_bytes)
                    .concat();
                put(&place, at, &bytes);
                // What EXCLUSIVE took is not there to be migrated.
                buf.check(0, 1, 1802)?;
                target.drain_held(&buf)?;
                target
                    .ioctl_within(request, &place, at)
                    .or_fail("a command with an unaligned argument")?;
                check_eq!(room.words(0), pattern_words(1802, 0), "what was read");
                check_eq!(word(&place, at), buf.at(0), "the address in the argument");
                let counts = [word(&place, at + 24), word(&place, at + 32)];
                check!(
                    counts[0] <= 1 && counts[1] <= 1,
                    "counts of ioctl {request:#x} in an unaligned argument: found {counts:?}"
                );
            }
        }
        nothing_is_left(&target, &buf, 1802)?;
    }
    works(ctx)
}

/// The argument is in a page that the command is about, which is on the device or goes there.
fn argument_on_the_device(ctx: &Ctx) -> Outcome {
    for target in open_all(ctx)? {
        for there in [false, true] {
            for request in READS {
                let [buf, room] = [Buffer::filled(2, 1803)?, Buffer::anon(1)?];
                let bytes = [buf.at(0), room.at(0), 1, 7, 7]
                    .map(u64::to_ne_bytes)
                    .concat();
                put(&buf, 512, &bytes);
                target.drain_held(&buf)?;
                let before = buf.words(0);
                if there {
                    target.to_device(&buf, 0, 2).or_fail("MIGRATE_TO_DEV")?;
                }
                target
                    .ioctl_within(request, &buf, 512)
                    .or_fail("a command on its own argument")?;
                check_eq!(room.words(0), before, "what was read");
                let after = buf.words(0);
                check_eq!(after[..64], before[..64], "words before the argument");
                check_eq!(after[69..], before[69..], "words behind the argument");
                check_eq!(after[64..67], before[64..67], "the range in the argument");
                buf.check(1, 1, 1803)?;
            }
        }
        target.expect_empty()?;
    }
    works(ctx)
}

/// Neither a device that faults nor a pin makes a stack grow.
fn stack_does_not_grow(ctx: &Ctx) -> Outcome {
    const N: usize = 8;
    for target in open_all(ctx)? {
        let stack = Buffer::stack(N).or_fail("mmap of MAP_GROWSDOWN")?;
        stack.fill(0, N, 1804);
        let size = || -> Outcome<Option<u64>> {
            let end = |&(start, pages): &(u64, u64)| start + pages * PAGE as u64;
            let last = stack.at(N - 1) + PAGE as u64;
            Ok(mappings("self")?
                .iter()
                .find(|m| end(m) == last)
                .map(|m| m.1))
        };
        let before = size()?;
        for below in [1, 2, 8, 64, 200] {
            let addr = stack.at(0) - below * PAGE as u64;
            every_ioctl(&target, addr, 1)?;
            every_ioctl(&target, addr, below as usize + 2)?;
            let result = target.fault(addr, 1, ZDM_FAULT_WRITE);
            expect_errno(result, &[EFAULT], "ZDM_FAULT below a stack")?;
        }
        check_eq!(size()?, before, "pages of the stack");
        stack.check(0, N, 1804)?;
    }
    works(ctx)
}

/// A process that may have no more memory, data, stack or files than it has.
fn small_limits(ctx: &Ctx) -> Outcome {
    const N: usize = 64;
    for target in open_all(ctx)? {
        let node = target.node();
        Child::spawn(|| {
            let device = Device::open(node)?;
            let buf = Buffer::filled(N, 1805)?;
            let room = Buffer::anon(N)?;
            let stack = Buffer::stack(N).or_fail("mmap of MAP_GROWSDOWN")?;
            stack.fill(0, N, 1806);
            let text = fs::read_to_string("/proc/self/statm").or_fail("statm")?;
            let pages = text
                .split_whitespace()
                .next()
                .and_then(|n| n.parse::<u64>().ok());
            let size = pages.unwrap_or(0) * PAGE as u64;
            // The test itself needs some.
            sys::limit(Resource::RLIMIT_AS, size + (8 << 20)).or_fail("RLIMIT_AS")?;
            sys::limit(Resource::RLIMIT_STACK, 64 << 10).or_fail("RLIMIT_STACK")?;
            sys::limit(Resource::RLIMIT_DATA, 4 << 20).or_fail("RLIMIT_DATA")?;
            sys::limit(Resource::RLIMIT_FSIZE, 0).or_fail("RLIMIT_FSIZE")?;
            sys::limit(Resource::RLIMIT_MEMLOCK, 0).or_fail("RLIMIT_MEMLOCK")?;
            let big = device.map((16 << 20) / PAGE, libc::MAP_SHARED);
            expect_errno(big.map(drop), &[ENOMEM], "mmap beyond RLIMIT_AS")?;
            for _ in 0..3 {
                for buf in [&buf, &stack] {
                    every_ioctl(&device, buf.at(0), N)?;
                    device
                        .command(HMM_MIGRATE_TO_DEV, buf.at(0), N as u64, Data::At(&room, 0))
                        .or_fail("MIGRATE_TO_DEV")?;
                }
            }
            buf.check(0, N, 1805)?;
            stack.check(0, N, 1806)
        })?
        .join()?;
        target.expect_empty()?;
    }
    works(ctx)
}
