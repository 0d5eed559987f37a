// SPDX-License-Identifier: GPL-2.0

//! Wrong arguments give the errors of abi.rst, do no harm, and leave the device working.

use libc::{E2BIG, EFAULT, EINVAL, ENOTTY};

use super::{Ctx, PAGES, Test, absent, test};
use crate::check;
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, Data, Device, PAGE, pattern_bytes};
use crate::uapi::*;

pub const TESTS: &[Test] = &[
    test("bad.unknown_ioctl", unknown_ioctl),
    test("bad.unaligned", unaligned),
    test("bad.zero_pages", zero_pages),
    test("bad.wrap", wrap),
    test("bad.beyond_task_size", beyond_task_size),
    test("bad.huge_npages", huge_npages),
    test("bad.pointer", pointer),
    test("bad.no_vma", no_vma),
    test("bad.prot_none", prot_none),
    test("bad.audit_size", audit_size),
];

/// Tests that load the module themselves.
pub const RELOADING: &[Test] = &[absent(test("bad.module_param", module_param))];

/// Upstream's commands that have a range and a result.
const COMMANDS: [(u64, &str); 4] = [
    (HMM_READ, "READ"),
    (HMM_WRITE, "WRITE"),
    (HMM_MIGRATE_TO_DEV, "MIGRATE_TO_DEV"),
    (HMM_MIGRATE_TO_SYS, "MIGRATE_TO_SYS"),
];

/// Further commands, which check their range but return no data.
const MORE: [(u64, &str); 5] = [
    (HMM_SNAPSHOT, "SNAPSHOT"),
    (HMM_EXCLUSIVE, "EXCLUSIVE"),
    (HMM_CHECK_EXCLUSIVE, "CHECK_EXCLUSIVE"),
    (HMM_READ_UNLOCKED, "READ_UNLOCKED"),
    (HMM_RELEASE, "RELEASE"),
];

/// Checks that all commands refuse a range.
fn refused(device: &Device, addr: u64, npages: u64, errnos: &[i32]) -> Outcome {
    let more = if errnos == [EINVAL] { &MORE[..] } else { &[] };
    for (request, name) in COMMANDS.iter().chain(more).copied() {
        // There is no buffer for the data of large ranges.
        let mut room = vec![0; 4 * PAGE];
        let data = match npages <= 4 {
            true => Data::Into(&mut room),
            false => Data::Nowhere,
        };
        let what = format!("{name} of {npages:#x} pages at {addr:#x}");
        expect_errno(device.command(request, addr, npages, data), errnos, &what)?;
    }
    Ok(())
}

/// Checks that a device works after errors.
fn works(device: &Device) -> Outcome {
    let buf = Buffer::filled(4, 120)?;
    device.move_all(&buf, 120)?;
    buf.check(0, 4, 120)
}

/// abi.rst specifies ENOTTY; the C driver returns EINVAL.
fn unknown_ioctl(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 121)?;
    let tcgets = 0x5401;
    for request in [
        ioc(IOC_READ_WRITE, 0x3f, 40),
        ioc(IOC_READ_WRITE, 0xff, 40),
        ioc(IOC_READ_WRITE, 0x4f, 24),
        ioc(IOC_READ, 0xfe, 80),
        tcgets,
    ] {
        // The range is valid; only the command is unknown.
        let mut arg = [buf.at(0), buf.at(0), 1, 0, 0, 0, 0, 0, 0, 0]
            .map(u64::to_ne_bytes)
            .concat();
        let result = device.ioctl_bytes(request, &mut arg);
        let what = format!("ioctl {request:#x}");
        expect_errno(result, &[ENOTTY, EINVAL], &what)?;
    }
    buf.check(0, 1, 121)?;
    works(&device)
}

fn unaligned(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(4, 122)?;
    for offset in [1, 8, 2048, 4095] {
        refused(&device, buf.at(0) + offset, 1, &[EINVAL])?;
    }
    super::expect_present(&buf, 0, 4)?;
    buf.check(0, 4, 122)?;
    works(&device)
}

fn zero_pages(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 123)?;
    refused(&device, buf.at(0), 0, &[EINVAL])?;
    refused(&device, 0, 0, &[EINVAL])?;
    buf.check(0, 1, 123)?;
    works(&device)
}

fn wrap(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 124)?;
    let last = u64::MAX - (PAGE as u64 - 1);
    for (addr, npages) in [
        (last, 1),
        (last, 2),
        // The length in bytes wraps to 0, to a page, and to minus a page.
        (buf.at(0), 1 << 52),
        (buf.at(0), (1 << 52) + 1),
        (buf.at(0), u64::MAX),
        (buf.at(0), (1 << 52) - 1),
    ] {
        refused(&device, addr, npages, &[EINVAL])?;
    }
    buf.check(0, 1, 124)?;
    works(&device)
}

fn beyond_task_size(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(1, 125)?;
    // Addresses beyond five-level page tables, and in the kernel's half.
    for addr in [
        1 << 56,
        1 << 60,
        0xffff_8000_0000_0000,
        0xffff_ffff_8000_0000,
    ] {
        refused(&device, addr, 1, &[EINVAL])?;
    }
    // The range begins at a valid address and ends beyond user addresses.
    refused(&device, buf.at(0), 1 << 44, &[EINVAL])?;
    buf.check(0, 1, 125)?;
    works(&device)
}

/// A huge number of pages gives an error at once: no allocation has the requested size.
fn huge_npages(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(4, 126)?;
    // The pages behind the buffer are not mapped, or the range ends beyond user addresses.
    for shift in [20, 24, 28, 32, 35, 40] {
        refused(&device, buf.at(0), 1 << shift, &[EFAULT, EINVAL])?;
    }
    refused(&device, buf.at(0), 1 << 51, &[EINVAL])?;
    buf.check(0, 4, 126)?;
    works(&device)
}

fn pointer(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    for request in [
        HMM_READ,
        HMM_WRITE,
        HMM_MIGRATE_TO_DEV,
        HMM_MIGRATE_TO_SYS,
        ZDM_AUDIT,
        ZDM_STATS,
    ] {
        let what = format!("ioctl {request:#x} with a bad argument pointer");
        expect_errno(device.ioctl_nowhere(request), &[EFAULT], &what)?;
    }

    // The range is valid, but the place for the result is not.
    let buf = Buffer::filled(PAGES, 127)?;
    for (request, name) in &COMMANDS[..3] {
        let result = device.command(*request, buf.at(0), PAGES as u64, Data::Nowhere);
        let what = format!("{name} with a bad data pointer");
        expect_errno(result, &[EFAULT], &what)?;
    }
    buf.check(0, PAGES, 127)?;
    // The last page of the result's place is a read-only mapping of the CPU.
    let place = Buffer::anon(PAGES)?;
    place.unmap(PAGES - 1, 1)?;
    let mut arg = [buf.at(0), place.at(0), PAGES as u64, 0, 0]
        .map(u64::to_ne_bytes)
        .concat();
    let result = device.ioctl_bytes(HMM_MIGRATE_TO_DEV, &mut arg);
    let what = "MIGRATE_TO_DEV with a data pointer that is good in part";
    expect_errno(result, &[EFAULT], what)?;
    buf.check(0, PAGES, 127)?;

    // The place for records is invalid. There are no records to write, so the call may also
    // succeed.
    let mut audit = Audit {
        records: 8,
        nr_records: 4,
        ..Audit::default()
    };
    if let Err(e) = device.audit_with(&mut audit) {
        expect_errno(Err::<(), _>(e), &[EFAULT], "ZDM_AUDIT with bad records")?;
    }
    works(&device)
}

fn no_vma(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::anon(4)?;
    buf.unmap(0, 4)?;
    for (request, name) in &COMMANDS[2..] {
        let mut room = vec![0; 4 * PAGE];
        let into = Data::Into(&mut room);
        let result = device.command(*request, buf.at(0), 4, into);
        expect_errno(result, &[EINVAL], &format!("{name} of nothing"))?;
    }
    works(&device)
}

/// The C driver, too, requires VM_READ.
fn prot_none(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(8, 128)?;
    buf.protect(0, 8, libc::PROT_NONE)?;
    expect_errno(device.to_device(&buf, 0, 8), &[EINVAL], "MIGRATE_TO_DEV")?;
    expect_errno(device.to_system(&buf, 0, 8), &[EINVAL], "MIGRATE_TO_SYS")?;
    expect_errno(device.read(&buf, 0, 8), &[EFAULT], "READ without access")?;
    let data = pattern_bytes(129, 0, 8);
    expect_errno(
        device.write(&buf, 0, &data),
        &[EFAULT],
        "WRITE without access",
    )?;
    buf.protect(0, 8, libc::PROT_READ)?;
    buf.check(0, 8, 128)?;
    works(&device)
}

/// The size of a structure is its version.
fn audit_size(_: &Ctx) -> Outcome {
    const FULL: usize = size_of::<Audit>();
    let device = Device::open(0)?;
    let request = |size| ioc(IOC_READ_WRITE, ZDM_AUDIT_NUMBER, size);

    // For an older program the driver writes only the fields that the program knows.
    let old = 40;
    let mut arg = [0; FULL + 16];
    arg[old..].fill(0xa5);
    device
        .ioctl_bytes(request(old), &mut arg)
        .or_fail("ZDM_AUDIT with a shorter structure")?;
    check!(
        arg[..8] != [0; 8],
        "pages in a shorter structure: expected some, found none"
    );
    check!(
        arg[old..].iter().all(|b| *b == 0xa5),
        "bytes behind a shorter structure: expected unchanged, found {:x?}",
        &arg[old..]
    );

    // A newer program that does not use the new fields.
    let mut arg = [0; FULL + 16];
    device
        .ioctl_bytes(request(FULL + 16), &mut arg)
        .or_fail("ZDM_AUDIT with a longer structure")?;
    check!(
        arg[..8] != [0; 8],
        "pages in a longer structure: expected some, found none"
    );

    // A newer program that uses the new fields, in the first or in the last byte.
    for at in [FULL, FULL + 15] {
        let mut arg = [0; FULL + 16];
        arg[at] = 1;
        let result = device.ioctl_bytes(request(FULL + 16), &mut arg);
        expect_errno(result, &[E2BIG], "ZDM_AUDIT with unknown bytes")?;
    }

    // Unknown flags.
    let mut audit = Audit {
        flags: 1 << 31,
        ..Audit::default()
    };
    let result = device.audit_with(&mut audit);
    expect_errno(result, &[EINVAL], "ZDM_AUDIT with an unknown flag")?;
    works(&device)
}

/// A bad parameter makes loading fail, and nothing stays registered.
fn module_param(ctx: &Ctx) -> Outcome {
    for parameters in ["audit=bogus", "devmem_chunk_mb=3", "fault_around=513"] {
        match ctx.module.try_load(parameters) {
            Ok(()) => {
                // The next load must not start with a loaded module.
                ctx.module.unload()?;
                return Err(Fail::failed(format!(
                    "loading with {parameters}: expected EINVAL, found success"
                )));
            }
            Err(e) => check_eq!(e.raw_os_error(), Some(EINVAL), "loading with {parameters}"),
        }
        ctx.module.check_gone()?;
    }
    Ok(())
}
