// SPDX-License-Identifier: GPL-2.0

//! The survey of every pagemap of the system: debugfs `pagemaps`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::{Ctx, PAGES, Test, absent, test, with};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::dax::{self, Dax, PTE};
use crate::device::{Buffer, Device, PAGE};
use crate::module::NAME;
use crate::sys;
use crate::uapi::*;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("pagemaps.own", own),
    test("pagemaps.fs_dax", fs_dax),
    test("pagemaps.device_dax", device_dax),
];

/// Tests that load the module themselves.
pub const ABSENT: &[Test] = &[
    absent(test("pagemaps.no_devices", no_devices)),
    absent(test("pagemaps.bad_devices", bad_devices)),
    absent(test("pagemaps.c_driver", c_driver)),
];

/// Tests that need injection.
pub const INJECTING: &[Test] = &[with("inject=1", test("pagemaps.broken", broken))];

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

/// Memory of the kernel tree's own driver, while the module has no devices.
fn c_driver(ctx: &Ctx) -> Outcome {
    let Some(driver) = ctx.module.c_driver() else {
        return Err(Fail::Skip("no test_hmm.ko beside the module".into()));
    };
    ctx.module.try_load("devices=0").or_fail("loading")?;
    driver.load("")?;
    let looked = c_driver_with_pages();
    let gone = sys::wait_until(SETTLE, || driver.try_unload().is_ok());
    check!(
        gone,
        "test_hmm after the last close: expected to go, found it in use"
    );
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
    let maps: Vec<Survey> = survey()?
        .into_iter()
        .filter(|map| map.function.contains("[test_hmm]"))
        .collect();
    let sum = |name: &str| {
        maps.iter()
            .map(|map| map.number(name))
            .sum::<Outcome<u64>>()
    };
    for (name, expected) in [
        ("used", PAGES as u64),
        ("mapped", PAGES as u64),
        ("pinned", 0),
        ("broken", 0),
    ] {
        check_eq!(sum(name)?, expected, "{name} pages of test_hmm");
    }
    check_eq!(sum("references")?, sum("explained")?, "references");
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
    check_eq!(map.number("broken")?, 1, "broken pages");
    let line = format!("pfn {pfn:#x} order 0 count 0 mapcount 0 pins 0: mapping set at count 0");
    check!(
        map.lines.iter().any(|found| found.trim() == line),
        "expected the line '{line}', found {:?}",
        map.lines
    );
    check_eq!(pagemap_of(pfn)?.number("broken")?, 0, "broken pages");
    Ok(())
}

fn no_devices(ctx: &Ctx) -> Outcome {
    ctx.module.try_load("devices=0").or_fail("loading")?;
    let text = survey();
    let node = Device::try_open(0).map(drop);
    ctx.module.unload()?;
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

fn bad_devices(ctx: &Ctx) -> Outcome {
    let loaded = ctx.module.try_load("devices=2");
    if loaded.is_ok() {
        ctx.module.unload()?;
    }
    expect_errno(loaded, &[libc::EINVAL], "loading with devices=2")
}
