// SPDX-License-Identifier: GPL-2.0

//! Parameters of the module. A bad one makes loading fail, with one line in the log that names it,
//! and nothing stays registered.

use std::fs;

use super::{Ctx, Test, absent, test};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Device, PAGE};
use crate::module::{NAME, parameter};
use crate::sys::{self, KernelLog};
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    absent(test("params.chunk", chunk)),
    absent(test("params.words", words)),
    absent(test("params.address", address)),
    absent(test("params.system_ram", system_ram)),
    absent(test("params.not_reserved", not_reserved)),
    absent(test("params.good_chunks", good_chunks)),
    absent(test("params_coherent.overlap", overlap)),
    absent(test("params_coherent.second", second)),
    absent(test("params_coherent.swapped", swapped)),
    absent(test("params.generic_address", generic_address)),
    absent(test("params.generic_system_ram", generic_system_ram)),
    absent(test("params.generic_overlap", generic_overlap)),
    absent(test("params.generic_second", generic_second)),
    absent(test("params.generic_alone", generic_alone)),
];

/// The parameters with the addresses of the COHERENT devices.
const COHERENT_ADDRESSES: [&str; 2] = ["spm_addr_dev0", "spm_addr_dev1"];
/// The parameters with the addresses of the GENERIC devices.
const GENERIC_ADDRESSES: [&str; 2] = ["generic_addr_dev0", "generic_addr_dev1"];

/// Checks that the module does not load with these parameters, and that the log names `name` as the
/// bad one.
#[track_caller]
fn refused(ctx: &Ctx, parameters: &str, name: &str) -> Outcome {
    let mut log = KernelLog::open().or_fail("/dev/kmsg")?;
    let loaded = ctx.module.try_load(parameters);
    if loaded.is_ok() {
        // The next load must not start with a loaded module.
        ctx.module.unload()?;
    }
    let what = format!("loading with '{parameters}'");
    expect_errno(loaded, &[libc::EINVAL], &what)?;
    let lines = log.rest().or_fail("/dev/kmsg")?;
    let ours = |l: &&String| l.starts_with(NAME) && l.contains(name);
    let found: Vec<&String> = lines.iter().filter(ours).collect();
    if found.len() != 1 {
        return Err(Fail::failed(format!(
            "lines of the log that name {name} after {what}: expected 1, found {found:?}"
        )));
    }
    ctx.module.check_gone()
}

/// The value is not a multiple of 2 from 2 to 16384, or no number.
fn chunk(ctx: &Ctx) -> Outcome {
    for value in ["0", "1", "3", "16386", "99999999999", "-2", "2m", ""] {
        refused(ctx, &format!("devmem_chunk_mb={value}"), "devmem_chunk_mb")?;
    }
    Ok(())
}

fn words(ctx: &Ctx) -> Outcome {
    for value in ["bogus", "Report", "off,"] {
        refused(ctx, &format!("audit={value}"), "audit")?;
    }
    refused(ctx, "inject=maybe", "inject")
}

/// Addresses that no memory can have, and one address without the other.
fn bad_addresses(ctx: &Ctx, names: [&str; 2], good: &str, unaligned: [&str; 2]) -> Outcome {
    let [first, second] = names;
    let nowhere = ["1", "0xfff0000000000000", "0xffffffffffe00000"];
    for bad in unaligned.into_iter().chain(nowhere) {
        refused(ctx, &format!("{first}={bad} {second}={good}"), first)?;
    }
    refused(ctx, &format!("{first}={good}"), first)?;
    refused(ctx, &format!("{second}={good}"), second)
}

fn address(ctx: &Ctx) -> Outcome {
    let unaligned = ["0x100001000", "0x100100000"];
    bad_addresses(ctx, COHERENT_ADDRESSES, "0x110000000", unaligned)
}

/// The start addresses and lengths of System RAM.
fn ram() -> Outcome<Vec<(u64, u64)>> {
    resources("System RAM")
}

/// The start addresses and lengths of the ranges of physical addresses with this name.
fn resources(wanted: &str) -> Outcome<Vec<(u64, u64)>> {
    let text = fs::read_to_string("/proc/iomem").or_fail("/proc/iomem")?;
    let number = |s: &str| u64::from_str_radix(s, 16).ok();
    let range = |line: &str| {
        let (range, name) = line.split_once(" : ")?;
        let (start, end) = range.split_once('-')?;
        (name == wanted).then_some((number(start)?, number(end)?))
    };
    Ok(text
        .lines()
        .filter_map(range)
        .map(|(a, b)| (a, b + 1 - a))
        .collect())
}

/// Memory of the system: from its beginning, within it, and over its end.
fn ram_refused(ctx: &Ctx, first_name: &str, second: &str) -> Outcome {
    const ALIGN: u64 = 2 << 20;
    let largest = ram()?.into_iter().max_by_key(|(_, len)| *len);
    let (start, len) = largest.ok_or_else(|| Fail::failed("no System RAM in /proc/iomem"))?;
    check!(
        len > 1 << 30,
        "largest System RAM: expected more than 1 GiB, found {len:#x} bytes"
    );
    let first = start.next_multiple_of(ALIGN);
    let last = (start + len - ALIGN) / ALIGN * ALIGN;
    for bad in [first, first + (512 << 20), last] {
        refused(ctx, &format!("{first_name}={bad:#x} {second}"), first_name)?;
    }
    Ok(())
}

fn system_ram(ctx: &Ctx) -> Outcome {
    ram_refused(ctx, "spm_addr_dev0", "spm_addr_dev1=0x110000000")
}

/// Addresses that are not System RAM, but were not set aside either: where devices have their registers, and
/// emulated persistent memory, which is another driver's.
fn not_reserved(ctx: &Ctx) -> Outcome {
    const REGISTERS: u64 = 0xd000_0000;
    let [a, _] = addresses(ctx)?;
    let pmem = resources("Persistent Memory (legacy)")?;
    let pmem = pmem.into_iter().map(|(start, _)| start);
    for bad in pmem.chain([REGISTERS]) {
        let parameters = format!("spm_addr_dev0={bad:#x} spm_addr_dev1={a:#x}");
        refused(ctx, &parameters, "spm_addr_dev0")?;
    }
    Ok(())
}

/// The addresses of this machine's memory for a kind of device.
fn addresses_of(ctx: &Ctx, names: [&str; 2], kind: &str) -> Outcome<[u64; 2]> {
    let base = ctx.module.base();
    match names.map(|name| parameter(base, name)) {
        [Some(a), Some(b)] => Ok([a, b]),
        _ => Err(Fail::Skip(format!("no memory for {kind} devices"))),
    }
}

fn addresses(ctx: &Ctx) -> Outcome<[u64; 2]> {
    addresses_of(ctx, COHERENT_ADDRESSES, "COHERENT")
}

fn generic_addresses(ctx: &Ctx) -> Outcome<[u64; 2]> {
    addresses_of(ctx, GENERIC_ADDRESSES, "GENERIC")
}

/// Memory that two devices would share.
fn overlap(ctx: &Ctx) -> Outcome {
    let [a, b] = addresses(ctx)?;
    for (first, second) in [(a, a), (b, b), (a, a + (128 << 20)), (a + (254 << 20), b)] {
        let parameters = format!("spm_addr_dev0={first:#x} spm_addr_dev1={second:#x}");
        refused(ctx, &parameters, "spm_addr_dev1")?;
    }
    // A larger chunk makes the two ranges overlap.
    let parameters = format!("spm_addr_dev0={a:#x} spm_addr_dev1={b:#x} devmem_chunk_mb=258");
    refused(ctx, &parameters, "spm_addr_dev1")
}

/// The second address is bad, when the first device has been made.
fn second(ctx: &Ctx) -> Outcome {
    let [a, _] = addresses(ctx)?;
    let largest = ram()?.into_iter().max_by_key(|(_, len)| *len);
    let (start, _) = largest.ok_or_else(|| Fail::failed("no System RAM in /proc/iomem"))?;
    let ram = start.next_multiple_of(2 << 20);
    for bad in ["1".to_string(), "0x110001000".into(), format!("{ram:#x}")] {
        let parameters = format!("spm_addr_dev0={a:#x} spm_addr_dev1={bad}");
        refused(ctx, &parameters, "spm_addr_dev1")?;
    }
    Ok(())
}

/// Loads the module, uses each device, and unloads it.
fn works(ctx: &Ctx, nodes: &[usize], pages: usize) -> Outcome {
    for node in nodes {
        let device = Device::open(*node)?;
        let (audit, _) = device.audit()?;
        let old_rule = device.stats()?.free_refs != 0;
        check_eq!(
            audit.pages,
            pages as u64,
            "pages of {}",
            Device::path(*node)
        );
        // Where free pages keep a reference, each of them is a violation, and no page can be given
        // out.
        let violations = if old_rule { audit.free } else { 0 };
        let expected = (0, violations);
        check_eq!(
            (audit.used, audit.found),
            expected,
            "used pages, violations"
        );
        let buf = Buffer::filled(8, 500)?;
        let result = device.to_device(&buf, 0, 8);
        if old_rule {
            expect_errno(result, &[libc::EOPNOTSUPP], "MIGRATE_TO_DEV")?;
            continue;
        }
        let moved = result.or_fail("MIGRATE_TO_DEV")?;
        check_eq!(moved.cpages, 8, "copied pages");
        check_eq!(device.audit()?.0.used, 8, "used pages");
        buf.check(0, 8, 500)?;
    }
    ctx.module.unload()
}

fn good_chunks(ctx: &Ctx) -> Outcome {
    for mb in [2, 4, 130] {
        ctx.module.load(&format!("devmem_chunk_mb={mb}"))?;
        works(ctx, &ctx.module.nodes(), (mb << 20) / PAGE)?;
    }
    for audit in ["off", "report"] {
        ctx.module
            .load(&format!("devmem_chunk_mb=256 audit={audit}"))?;
        works(ctx, &ctx.module.nodes(), (256 << 20) / PAGE)?;
    }
    Ok(())
}

/// The two addresses may be given in either order.
fn swapped(ctx: &Ctx) -> Outcome {
    let [a, b] = addresses(ctx)?;
    ctx.module
        .load(&format!("spm_addr_dev0={b:#x} spm_addr_dev1={a:#x}"))?;
    works(ctx, &ctx.module.nodes(), (256 << 20) / PAGE)?;
    // A chunk that ends where the other one begins is valid.
    ctx.module.load(&format!(
        "spm_addr_dev1={:#x} devmem_chunk_mb=2",
        a + (2 << 20)
    ))?;
    works(ctx, &ctx.module.nodes(), (2 << 20) / PAGE)
}

fn generic_address(ctx: &Ctx) -> Outcome {
    let unaligned = ["0x120001000", "0x120100000"];
    bad_addresses(ctx, GENERIC_ADDRESSES, "0x130000000", unaligned)
}

fn generic_system_ram(ctx: &Ctx) -> Outcome {
    ram_refused(ctx, "generic_addr_dev0", "generic_addr_dev1=0x130000000")
}

/// Memory that two GENERIC devices would share, or a GENERIC and a COHERENT one.
fn generic_overlap(ctx: &Ctx) -> Outcome {
    let [a, b] = generic_addresses(ctx)?;
    for (first, second) in [(a, a), (b, b), (a, a + (128 << 20)), (a + (254 << 20), b)] {
        let parameters = format!("generic_addr_dev0={first:#x} generic_addr_dev1={second:#x}");
        refused(ctx, &parameters, "generic_addr_dev1")?;
    }
    let [c, d] = addresses(ctx)?;
    let coherent = format!("spm_addr_dev0={c:#x} spm_addr_dev1={d:#x}");
    for shared in [c, d, d + (2 << 20)] {
        let parameters =
            format!("{coherent} generic_addr_dev0={shared:#x} generic_addr_dev1={b:#x}");
        refused(ctx, &parameters, "generic_addr_dev0")?;
        let parameters =
            format!("{coherent} generic_addr_dev0={a:#x} generic_addr_dev1={shared:#x}");
        refused(ctx, &parameters, "generic_addr_dev1")?;
    }
    Ok(())
}

/// The second address is bad, when the first device and the COHERENT ones have been made.
fn generic_second(ctx: &Ctx) -> Outcome {
    let [a, _] = generic_addresses(ctx)?;
    let [c, d] = addresses(ctx)?;
    for bad in ["1".to_string(), format!("{:#x}", a + 4096)] {
        let parameters = format!(
            "spm_addr_dev0={c:#x} spm_addr_dev1={d:#x} generic_addr_dev0={a:#x} \
             generic_addr_dev1={bad}"
        );
        refused(ctx, &parameters, "generic_addr_dev1")?;
    }
    Ok(())
}

/// GENERIC devices without COHERENT ones: their nodes keep their numbers.
fn generic_alone(ctx: &Ctx) -> Outcome {
    let [a, b] = generic_addresses(ctx)?;
    let parameters = format!("generic_addr_dev0={b:#x} generic_addr_dev1={a:#x} devmem_chunk_mb=4");
    ctx.module.try_load(&parameters).or_fail("loading")?;
    for n in [2, 3] {
        let path = Device::path(n);
        check!(
            !fs::exists(&path).or_fail(&path)?,
            "{path} without memory for it: expected none, found it"
        );
    }
    for n in [0, 4, 5] {
        let mut opened = Ok(());
        sys::wait_until(std::time::Duration::from_secs(2), || {
            opened = Device::try_open(n).map(drop);
            opened.is_ok()
        });
        opened.or_fail(&Device::path(n))?;
    }
    works(ctx, &[0, 4, 5], (4 << 20) / PAGE)
}
