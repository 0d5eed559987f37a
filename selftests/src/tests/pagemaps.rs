// SPDX-License-Identifier: GPL-2.0

//! The survey of every pagemap of the system: debugfs `pagemaps`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Ctx, PAGES, Test, absent, test, with};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::dax::{self, Dax, PTE};
use crate::device::{Buffer, Device, PAGE};
use crate::module::{Module, NAME};
use crate::sys;
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("pagemaps.own", own),
    test("pagemaps.fs_dax", fs_dax),
    test("pagemaps.device_dax", device_dax),
    test("pagemaps.p2pdma", p2pdma),
];

/// Tests that load the module themselves.
pub const ABSENT: &[Test] = &[
    absent(test("pagemaps.no_devices", no_devices)),
    absent(test("pagemaps.bad_devices", bad_devices)),
    absent(test("pagemaps.c_driver", c_driver)),
];

/// Tests that need injection.
pub const INJECTING: &[Test] = &[
    with("inject=1", test("pagemaps.broken", broken)),
    with(
        "inject=1",
        test("pagemaps.spoilt_c_driver", spoilt_c_driver),
    ),
    with(
        "inject=1",
        test("pagemaps.spoilt_device_dax", spoilt_device_dax),
    ),
    with("inject=1", test("pagemaps.spoilt_fs_dax", spoilt_fs_dax)),
    with("inject=1", test("pagemaps.spoilt_p2pdma", spoilt_p2pdma)),
];

/// How long a module may stay in use after the last close of its nodes.
const SETTLE: Duration = Duration::from_secs(5);

/// The survey's text about one pagemap.
struct Survey {
    first: u64,
    end: u64,
    kind: String,
    function: String,
    lines: Vec<String>,
}

impl Survey {
    /// The number after `name` in any of the lines.
    #[track_caller]
    fn number(&self, name: &str) -> Outcome<u64> {
        let words = self.lines.iter().flat_map(|line| line.split_whitespace());
        let words: Vec<&str> = words.collect();
        let found = words.windows(2).find(|pair| pair[0] == name);
        match found.and_then(|pair| pair[1].parse().ok()) {
            Some(n) => Ok(n),
            None => Err(Fail::failed(format!(
                "'{name}' and a number: expected them, found {:?}",
                self.lines
            ))),
        }
    }
}

#[track_caller]
fn survey() -> Outcome<Vec<Survey>> {
    let path: PathBuf = ["/sys/kernel/debug", NAME, "pagemaps"].iter().collect();
    let text = fs::read_to_string(&path).or_fail(&path.display().to_string())?;
    let mut found: Vec<Survey> = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("pagemap ") else {
            let last = found.last_mut();
            let last = last.ok_or_else(|| Fail::failed(format!("no pagemap before {line:?}")))?;
            last.lines.push(line.to_string());
            continue;
        };
        let mut words = rest.splitn(3, ' ');
        let range = words.next().and_then(|range| {
            let (first, end) = range.split_once('-')?;
            let hex = |s: &str| u64::from_str_radix(s.strip_prefix("0x")?, 16).ok();
            Some((hex(first)?, hex(end)?))
        });
        let (Some((first, end)), Some(kind), Some(function)) = (range, words.next(), words.next())
        else {
            return Err(Fail::failed(format!("a pagemap: found {line:?}")));
        };
        found.push(Survey {
            first,
            end,
            kind: kind.to_string(),
            function: function.to_string(),
            lines: Vec::new(),
        });
    }
    Ok(found)
}

/// The survey of the pagemap that has page frame `pfn`.
#[track_caller]
fn pagemap_of(pfn: u64) -> Outcome<Survey> {
    let found = survey()?;
    let of = |map: &Survey| (map.first..map.end).contains(&pfn);
    let seen: Vec<String> = found
        .iter()
        .map(|m| format!("{:#x}-{:#x} {}", m.first, m.end, m.kind))
        .collect();
    let map = found.into_iter().find(of);
    map.ok_or_else(|| Fail::failed(format!("a pagemap with pfn {pfn:#x}: found {seen:?}")))
}

/// The survey counts pages in use, their mappings, and the pagemap's references.
fn own(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 600)?;
    device.move_all(&buf, 600)?;
    let pfn = device.inspect_one(&buf, 0)?.pfn;
    let map = pagemap_of(pfn)?;
    check_eq!(map.kind, "PRIVATE", "type");
    check!(
        map.function.contains(&format!("[{NAME}]")),
        "owner's function: expected one of [{NAME}], found {}",
        map.function
    );
    for (name, expected) in [
        ("used", PAGES as u64),
        ("mapped", PAGES as u64),
        ("pinned", 0),
        ("references", PAGES as u64 + 1),
        ("explained", PAGES as u64 + 1),
        ("broken", 0),
    ] {
        check_eq!(map.number(name)?, expected, "{name}");
    }
    check_eq!(
        map.number("free")? + map.number("used")?,
        map.end - map.first,
        "pages"
    );
    buf.check(0, PAGES, 600)?;
    check_eq!(
        pagemap_of(pfn)?.number("used")?,
        0,
        "used pages after the fault"
    );
    Ok(())
}

/// Memory of another driver, while the module has no devices.
fn fs_dax(_: &Ctx) -> Outcome {
    dax::restore_pmem_with_pages()?;
    let (address, size) = dax::pmem_range().or_fail("the range of the pmem")?;
    let map = pagemap_of(address / PAGE as u64)?;
    check_eq!(map.kind, "FS_DAX", "type");
    check_eq!(map.end - map.first, size / PAGE as u64, "page frames");
    check_eq!(map.number("used")?, 0, "used pages");
    check_eq!(map.number("broken")?, 0, "broken pages");
    Ok(())
}

/// The survey counts pages of a device-dax while a process maps them. The kernel's rule decides
/// whether idle ones count as free.
fn device_dax(_: &Ctx) -> Outcome {
    const MAPPED: usize = 4;
    let dax = Dax::set_up(PTE)?;
    let frame = dax.frame();
    let map = pagemap_of(frame)?;
    check_eq!(map.kind, "GENERIC", "type");
    check_eq!(
        map.number("mapped")?,
        0,
        "mapped pages before the first access"
    );
    let buf = dax.map(MAPPED)?;
    (0..MAPPED).for_each(|page| buf.set(page, 0, 1));
    let map = pagemap_of(frame)?;
    check_eq!(map.number("mapped")?, MAPPED as u64, "mapped pages");
    check_eq!(map.number("broken")?, 0, "broken pages");
    drop(buf);
    let map = pagemap_of(frame)?;
    check_eq!(map.number("mapped")?, 0, "mapped pages after munmap");
    check_eq!(map.number("broken")?, 0, "broken pages after munmap");
    Ok(())
}

/// A PCI device with memory for P2PDMA, such as an NVMe disk with controller memory.
#[track_caller]
fn p2pmem() -> Outcome<PathBuf> {
    let devices = fs::read_dir("/sys/bus/pci/devices").or_fail("PCI devices")?;
    let memory = devices.filter_map(|device| Some(device.ok()?.path().join("p2pmem")));
    memory
        .filter(|dir| dir.is_dir())
        .min()
        .ok_or_else(|| Fail::Skip("no PCI device with memory for P2PDMA".into()))
}

/// The survey's texts about the memory of PCI devices.
#[track_caller]
fn p2p_pagemaps() -> Outcome<Vec<Survey>> {
    let maps = survey()?.into_iter();
    let maps: Vec<Survey> = maps.filter(|map| map.kind == "PCI_P2PDMA").collect();
    check!(
        !maps.is_empty(),
        "a pagemap of type PCI_P2PDMA: expected one, found none"
    );
    Ok(maps)
}

/// The survey counts pages of a PCI device's memory while a process maps them.
fn p2pdma(_: &Ctx) -> Outcome {
    const MAPPED: usize = 4;
    let allocate = p2pmem()?.join("allocate");
    let sums = |when: &str, expected: usize| {
        let maps = p2p_pagemaps()?;
        for (name, expected) in [("used", expected), ("mapped", expected), ("broken", 0)] {
            check_eq!(sum(&maps, name)?, expected as u64, "{name} pages {when}");
        }
        Ok(())
    };
    sums("before", 0)?;
    let file = File::options().read(true).write(true).open(&allocate);
    let file = file.or_fail("p2pmem/allocate")?;
    let buf = Buffer::of_file(&file, MAPPED, libc::MAP_SHARED).or_fail("mmap of p2pmem")?;
    sums("mapped", MAPPED)?;
    buf.set(0, 0, 1);
    // Nobody who pins pages for the CPU gets one, on either path.
    let device = Device::open(0)?;
    for flags in 0..2 * ZDM_PIN_FAST {
        if flags & ZDM_PIN_GET != 0 && flags & ZDM_PIN_LONGTERM != 0 {
            continue;
        }
        let pinned = device.pin(&buf, 0, MAPPED, flags);
        // A shared mapping of a file is not written to for long, whatever it is of.
        expect_errno(
            pinned,
            &[libc::EREMOTEIO, libc::EFAULT],
            &format!("ZDM_PIN {flags:#x} of memory of a PCI device"),
        )?;
    }
    sums("after ZDM_PIN", MAPPED)?;
    drop((device, buf));
    sums("after munmap", 0)
}

/// The sum of a number over pagemaps.
fn sum(maps: &[Survey], name: &str) -> Outcome<u64> {
    maps.iter().map(|map| map.number(name)).sum()
}

/// Checks that `map`, a survey of before, names one broken page, which is free and small, and that a
/// survey of now names none.
#[track_caller]
fn expect_broken(map: &Survey, pfn: u64, what: &str) -> Outcome {
    check_eq!(map.number("broken")?, 1, "broken pages");
    let line = format!("pfn {pfn:#x} order 0 count 0 {what}");
    check!(
        map.lines.iter().any(|found| found.trim() == line),
        "expected the line '{line}', found {:?}",
        map.lines
    );
    let now = pagemap_of(pfn)?;
    check_eq!(now.number("broken")?, 0, "broken pages afterwards");
    Ok(())
}

/// Counts a mapping more on the last page of a pagemap, which is free: the survey must name that page
/// and fault, and nothing once it is taken back.
#[track_caller]
fn spoil(map: &Survey) -> Outcome {
    let device = Device::open(0)?;
    let pfn = map.end - 1;
    check_eq!(map.number("broken")?, 0, "broken pages before");
    let found = device
        .inject(ZDM_INJECT_EXTRA_MAPPING, pfn * PAGE as u64)
        .or_fail("ZDM_INJECT_EXTRA_MAPPING")?;
    check_eq!(found, pfn, "page frame");
    let broken = pagemap_of(pfn)?;
    let again = device.inject(ZDM_INJECT_EXTRA_MAPPING, pfn * PAGE as u64);
    device
        .inject(ZDM_INJECT_UNDO_MAPPING, 0)
        .or_fail("ZDM_INJECT_UNDO_MAPPING")?;
    expect_errno(again, &[libc::EBUSY], "a second fault on one file")?;
    check_eq!(broken.function, map.function, "owner's function");
    expect_broken(&broken, pfn, "mapcount 1 pins 0: mapped at count 0")
}

/// The module of the kernel tree's own driver.
fn c_driver_module(ctx: &Ctx) -> Outcome<Module> {
    let driver = ctx.module.c_driver();
    driver.ok_or_else(|| Fail::Skip("no test_hmm.ko beside the module".into()))
}

/// Runs `body`, and unloads `driver` whatever comes of it.
fn then_unload(driver: &Module, body: impl FnOnce() -> Outcome) -> Outcome {
    let result = body();
    let gone = sys::wait_until(SETTLE, || driver.try_unload().is_ok());
    check!(
        gone,
        "test_hmm after the last close: expected to go, found it in use"
    );
    result
}

/// The pagemaps of the kernel tree's own driver.
#[track_caller]
fn c_driver_pagemaps() -> Outcome<Vec<Survey>> {
    let maps = survey()?.into_iter();
    Ok(maps
        .filter(|map| map.function.contains("[test_hmm]"))
        .collect())
}

fn spoilt_c_driver(ctx: &Ctx) -> Outcome {
    let driver = c_driver_module(ctx)?;
    // Its COHERENT memory would be ours.
    driver.try_load("").or_fail("loading test_hmm")?;
    then_unload(&driver, || {
        let maps = c_driver_pagemaps()?;
        let map = maps
            .first()
            .ok_or_else(|| Fail::failed("a pagemap of test_hmm: found none".to_string()))?;
        check_eq!(map.kind, "PRIVATE", "type");
        spoil(map)
    })
}

fn spoilt_device_dax(_: &Ctx) -> Outcome {
    let dax = Dax::set_up(PTE)?;
    let map = pagemap_of(dax.frame())?;
    let last = Device::open(0)?.inspect_frames(map.end - 1, 1)?;
    if last[0].refs == 1 {
        // A free page with a reference may have a mapping, as far as the survey can tell.
        return Err(Fail::Skip(
            "free pages of device-dax have a reference".into(),
        ));
    }
    spoil(&map)
}

fn spoilt_fs_dax(_: &Ctx) -> Outcome {
    dax::restore_pmem_with_pages()?;
    let (address, _) = dax::pmem_range().or_fail("the range of the pmem")?;
    spoil(&pagemap_of(address / PAGE as u64)?)
}

fn spoilt_p2pdma(_: &Ctx) -> Outcome {
    p2pmem()?;
    p2p_pagemaps()?.iter().try_for_each(spoil)
}

/// Memory of the kernel tree's own driver, while the module has no devices.
fn c_driver(ctx: &Ctx) -> Outcome {
    let driver = c_driver_module(ctx)?;
    ctx.module.try_load("devices=0").or_fail("loading")?;
    driver.load("")?;
    let looked = then_unload(&driver, c_driver_with_pages);
    let left = survey()?;
    ctx.module.unload()?;
    looked?;
    for map in left {
        check!(
            !map.function.contains("test_hmm"),
            "pagemap of test_hmm after rmmod: expected none, found {:#x}",
            map.first
        );
    }
    Ok(())
}

fn c_driver_with_pages() -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 610)?;
    device.to_device(&buf, 0, PAGES).or_fail("MIGRATE_TO_DEV")?;
    let maps = c_driver_pagemaps()?;
    for (name, expected) in [
        ("used", PAGES as u64),
        ("mapped", PAGES as u64),
        ("pinned", 0),
        ("broken", 0),
    ] {
        check_eq!(sum(&maps, name)?, expected, "{name} pages of test_hmm");
    }
    check_eq!(
        sum(&maps, "references")?,
        sum(&maps, "explained")?,
        "references"
    );
    buf.check(0, PAGES, 610)
}

/// The survey shows a stale mapping of a free page.
fn broken(_: &Ctx) -> Outcome {
    let device = Device::open(1)?;
    let pfn = device
        .inject(ZDM_INJECT_STALE_MAPPING, 0)
        .or_fail("ZDM_INJECT_STALE_MAPPING")?;
    let map = pagemap_of(pfn)?;
    device
        .inject(ZDM_INJECT_UNDO_STALE, 0)
        .or_fail("ZDM_INJECT_UNDO_STALE")?;
    expect_broken(&map, pfn, "mapcount 0 pins 0: mapping set at count 0")
}

fn no_devices(ctx: &Ctx) -> Outcome {
    ctx.module.try_load("devices=0").or_fail("loading")?;
    let text = survey();
    let node = Device::try_open(0).map(drop);
    let observed = text.as_deref().map_or(Ok(()), observer);
    ctx.module.unload()?;
    observed?;
    check!(node.is_err(), "hmm_dmirror0: expected none, found it");
    for map in text? {
        check!(
            !map.function.contains(NAME),
            "pagemap of ours: expected none, found {:#x}",
            map.first
        );
        check_eq!(map.number("broken")?, 0, "broken pages");
    }
    Ok(())
}

/// `/dev/zdmirror` describes page frames of any pagemap, and does nothing else.
fn observer(maps: &[Survey]) -> Outcome {
    let node = Device::open_at(Path::new("/dev/zdmirror"))?;
    for map in maps {
        // The first pages of a pagemap may be taken by the page structures of the others.
        let page = node.inspect_frames(map.end - 1, 1)?[0];
        check_eq!(page.pfn, map.end - 1, "the page frame");
        check!(
            page.flags & ZDM_PAGE_THERE != 0,
            "page {:#x} is not there",
            page.pfn
        );
    }
    let buf = Buffer::filled(1, 611)?;
    expect_errno(
        node.inspect(&buf, 0, 1).map(drop),
        &[libc::EINVAL],
        "by address",
    )?;
    expect_errno(
        node.read(&buf, 0, 1).map(drop),
        &[libc::ENOTTY],
        "HMM_DMIRROR_READ",
    )
}

fn bad_devices(ctx: &Ctx) -> Outcome {
    let loaded = ctx.module.try_load("devices=2");
    if loaded.is_ok() {
        ctx.module.unload()?;
    }
    expect_errno(loaded, &[libc::EINVAL], "loading with devices=2")
}
