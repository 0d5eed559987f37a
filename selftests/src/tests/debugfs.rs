// SPDX-License-Identifier: GPL-2.0

//! debugfs shows as text what the ioctls return.

use std::fs;
use std::io::{Read, Seek};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::hostile::as_nobody;
use super::target::{COHERENT, PRIVATE, Target};
use super::{Ctx, Needs, PAGES, Test, test, unloads, with};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES};
use crate::module::NAME;
use crate::uapi::*;
use crate::{check, check_eq, sys, threads};

pub const TESTS: &[Test] = &[
    test("debugfs.stats", stats),
    test("debugfs.audit", audit),
    test("debugfs.every_node", every_node),
    test("debugfs.healed", healed),
    test("debugfs.in_pieces", in_pieces),
];

/// Tests that need injection.
pub const INJECTING: &[Test] = &[
    with("inject=1", test("debugfs.violation", violation)),
    with("inject=1", test("debugfs.secrets", secrets)),
];

/// Tests that unload the module.
pub const RELOADING: &[Test] = &[unloads(Needs::Any, test("debugfs.gone", gone))];

fn path(node: usize, file: &str) -> PathBuf {
    let device = format!("hmm_dmirror{node}");
    ["/sys/kernel/debug", NAME, &device, file].iter().collect()
}

#[track_caller]
fn read(node: usize, file: &str) -> Outcome<String> {
    let path = path(node, file);
    fs::read_to_string(&path).or_fail(&path.display().to_string())
}

/// The number in the line that begins with `name`.
#[track_caller]
fn number(text: &str, name: &str) -> Outcome<u64> {
    let value = |line: &str| {
        let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
        let first = words.by_ref().find(|w| !w.is_empty())?;
        let mut numbers = words.filter(|w| !w.is_empty());
        (first == name).then(|| numbers.next_back()?.parse().ok())?
    };
    match text.lines().find_map(value) {
        Some(n) => Ok(n),
        None => Err(Fail::failed(format!(
            "a line '{name}' with a number: expected one, found {text:?}"
        ))),
    }
}

fn stats(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 510)?;
    device.move_all(&buf, 510)?;
    buf.check(0, 8, 510)?;
    device.to_system(&buf, 8, 8).or_fail("MIGRATE_TO_SYS")?;
    device.exclusive(&buf, 0, 4).or_fail("EXCLUSIVE")?;
    let now = device.stats()?;
    let text = read(0, "stats")?;
    check_eq!(device.stats()?.allocated, now.allocated, "pages allocated");
    for (name, expected) in [
        ("allocated", now.allocated),
        ("freed", now.freed),
        ("to_device", now.to_device),
        ("to_system", now.to_system),
        ("cpu_faults", now.cpu_faults),
        ("device_faults", now.device_faults),
        ("evicted", now.evicted),
        ("failed_alloc", now.failed_alloc),
        ("failed_migrate", now.failed_migrate),
        ("violations", now.violations),
        ("large_to_device", now.large_to_device),
        ("large_to_system", now.large_to_system),
        ("large_fallback", now.large_fallback),
        ("max_order", now.max_order),
        ("exclusive", now.exclusive),
    ] {
        check_eq!(number(&text, name)?, expected, "{name} in stats");
    }
    for (name, folios) in [
        ("to_device", now.to_device_by_order),
        ("to_system", now.to_system_by_order),
    ] {
        for (order, folios) in folios[..=HUGE_PAGES.ilog2() as usize].iter().enumerate() {
            let name = format!("{name}_order_{order}");
            check_eq!(number(&text, &name)?, *folios, "{name} in stats");
        }
    }
    check!(now.exclusive >= 4, "exclusive: expected some, found none");
    buf.check(0, PAGES, 510)
}

/// Read the file twice, with pages in use and without: each read is a scan.
fn audit(_: &Ctx) -> Outcome {
    let device = Device::open(0)?;
    let buf = Buffer::filled(PAGES, 511)?;
    let path = path(0, "audit");
    let mut file = fs::File::open(&path).or_fail(&path.display().to_string())?;
    for used in [PAGES, 0] {
        if used > 0 {
            device.move_all(&buf, 511)?;
        } else {
            buf.check(0, PAGES, 511)?;
        }
        let (seen, _) = device.audit()?;
        check_eq!(
            (seen.used, seen.found),
            (used as u64, 0),
            "used pages, faults"
        );
        let mut text = String::new();
        file.rewind().or_fail("lseek")?;
        file.read_to_string(&mut text).or_fail("read of audit")?;
        for text in [&text, &read(0, "audit")?] {
            check_eq!(number(text, "pages")?, seen.pages, "pages");
            check_eq!(number(text, "free")?, seen.free, "free pages");
            check_eq!(number(text, "used")?, seen.used, "used pages");
            check_eq!(number(text, "found")?, 0, "violations");
            number(text, "healed")?;
        }
    }
    Ok(())
}

/// A scan that meets a reference and then does not meet it any more counts a suspect that has
/// healed, and no violation.
fn healed(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, COHERENT)?;
    let buf = Buffer::filled(1, 512)?;
    target.to_device(&buf, 0, 1).or_fail("MIGRATE_TO_DEV")?;
    let now = || number(&read(COHERENT, "audit")?, "healed");
    let before = now()?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let holder = scope.spawn(|| -> Outcome {
            while !over.load(Ordering::Relaxed) {
                let id = target.pin(&buf, 0, 1, 0).or_fail("ZDM_PIN")?;
                target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
            }
            Ok(())
        });
        let grew = sys::wait_until(Duration::from_secs(20), || {
            let _ = target.audit();
            now().is_ok_and(|n| n > before) || holder.is_finished()
        });
        over.store(true, Ordering::Relaxed);
        let end = holder.join();
        end.map_err(|_| Fail::failed("the holder: expected its end, found a panic"))??;
        check!(grew, "healed: expected more than {before}");
        check_eq!(target.audit()?.0.total, 0, "violations");
        Ok(())
    })
}

/// Each reader of a file reads a text of its own, in pieces of any size, whatever others read meanwhile.
fn in_pieces(ctx: &Ctx) -> Outcome {
    const READERS: usize = 4;
    const ROUNDS: usize = 12;
    const NAMES: [&str; 6] = ["pages", "free", "used", "found", "total", "healed"];
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(1100, 513)?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The number of used pages has one to four digits.
        scope.spawn(|| {
            for pages in [1, 12, 1100].iter().cycle() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let _ = target.to_device(&buf, 0, *pages);
                let _ = target.to_system(&buf, 0, *pages);
            }
        });
        let read = |reader: usize| -> Outcome {
            let path = path(PRIVATE, "audit");
            for round in 0..ROUNDS {
                let mut file = fs::File::open(&path).or_fail("open of audit")?;
                let mut text = Vec::new();
                let mut piece = vec![0; 1 + (reader + round) % 7];
                loop {
                    let n = file.read(&mut piece).or_fail("read of audit")?;
                    if n == 0 {
                        break;
                    }
                    text.extend_from_slice(&piece[..n]);
                }
                let text = String::from_utf8_lossy(&text);
                let lines = text.lines().take(NAMES.len());
                let names: Vec<_> = lines.filter_map(|l| l.split(' ').next()).collect();
                check_eq!(names, NAMES, "lines that reader {reader} read: {text:?}");
                let [pages, free, used] = ["pages", "free", "used"].map(|name| number(&text, name));
                check_eq!(pages?, free? + used?, "pages in {text:?}");
            }
            Ok(())
        };
        let result = threads::run(READERS, read);
        over.store(true, Ordering::Relaxed);
        result
    })
}

fn every_node(ctx: &Ctx) -> Outcome {
    let nodes = ctx.module.nodes();
    for node in &nodes {
        let text = read(*node, "audit")?;
        let stats = Device::open(*node)?.stats()?;
        if stats.free_refs == 0 {
            check_eq!(number(&text, "found")?, 0, "violations");
            check_eq!(number(&text, "total")?, 0, "violations so far");
        } else {
            // Under the old rule every scan finds one violation per free page.
            let free = number(&text, "free")?;
            check_eq!(number(&text, "found")?, free, "violations");
        }
        check_eq!(
            number(&read(*node, "stats")?, "allocated")?,
            stats.allocated,
            "allocated"
        );
    }
    let dir: PathBuf = ["/sys/kernel/debug", NAME].iter().collect();
    let entries = fs::read_dir(&dir).or_fail(&dir.display().to_string())?;
    let found = entries
        .filter_map(Result::ok)
        .filter(|e| e.file_name().to_string_lossy().starts_with("hmm_dmirror"))
        .count();
    check_eq!(found, nodes.len(), "directories of devices");
    Ok(())
}

/// A broken invariant is shown with its page.
fn violation(_: &Ctx) -> Outcome {
    let device = Device::open(1)?;
    let pfn = device
        .inject(ZDM_INJECT_FREE_PAGE_REF, 0)
        .or_fail("ZDM_INJECT_FREE_PAGE_REF")?;
    let text = read(1, "audit")?;
    device
        .inject(ZDM_INJECT_UNDO_FREE_PAGE_REF, 0)
        .or_fail("ZDM_INJECT_UNDO_FREE_PAGE_REF")?;
    check!(
        !text.to_lowercase().contains("clean"),
        "an audit with a violation: expected no 'clean', found {text:?}"
    );
    for what in ["I5".to_string(), format!("{pfn:#x}")] {
        check!(
            text.contains(&what),
            "an audit with a violation: expected {what}, found {text:?}"
        );
    }
    let stats = device.stats()?;
    check_eq!(stats.violations, 1, "stats.violations");
    check_eq!(
        number(&read(1, "stats")?, "violations")?,
        1,
        "violations in stats"
    );
    device
        .try_audit(ZDM_AUDIT_CLEAR)
        .or_fail("ZDM_AUDIT_CLEAR")?;
    let text = read(1, "audit")?;
    check_eq!(number(&text, "found")?, 0, "violations of a mended page");
    check_eq!(number(&text, "total")?, 0, "violations on record");
    Ok(())
}

/// A reader without capabilities does not see what was written for another reader of the file.
fn secrets(_: &Ctx) -> Outcome {
    let device = Device::open(1)?;
    let path = path(1, "audit");
    let open = || fs::File::open(&path).or_fail("open of audit");
    let [mut here, mut there] = [open()?, open()?];
    let pfn = device
        .inject(ZDM_INJECT_FREE_PAGE_REF, 0)
        .or_fail("ZDM_INJECT_FREE_PAGE_REF")?;
    let result = (|| {
        let mut text = vec![0; 4096];
        let n = here.read(&mut text).or_fail("read of audit")?;
        let seen = String::from_utf8_lossy(&text[..n]);
        check!(
            seen.contains(&format!("{pfn:#x}")),
            "what root reads: expected {pfn:#x}, found {seen:?}"
        );
        as_nobody(|| {
            for file in [&mut here, &mut there] {
                // Not from the start, where a text is made.
                file.seek(std::io::SeekFrom::Start(1)).or_fail("lseek")?;
                let mut text = String::new();
                file.read_to_string(&mut text).or_fail("read of audit")?;
                check!(
                    text.contains("found 1") && !text.contains(&format!("{pfn:#x}")),
                    "what nobody reads: expected no page frame, found {text:?}"
                );
            }
            Ok(())
        })
    })();
    device
        .inject(ZDM_INJECT_UNDO_FREE_PAGE_REF, 0)
        .or_fail("ZDM_INJECT_UNDO_FREE_PAGE_REF")?;
    device
        .try_audit(ZDM_AUDIT_CLEAR)
        .or_fail("ZDM_AUDIT_CLEAR")?;
    result
}

/// An open file does not hold the module, and reads as empty after the module has gone.
fn gone(ctx: &Ctx) -> Outcome {
    let path = path(0, "audit");
    let mut file = fs::File::open(&path).or_fail(&path.display().to_string())?;
    let mut text = String::new();
    file.read_to_string(&mut text).or_fail("read of audit")?;
    ctx.module.unload()?;
    check!(
        !path.exists(),
        "{}: expected none, found it",
        path.display()
    );
    let mut rest = String::new();
    match file.rewind().and_then(|()| file.read_to_string(&mut rest)) {
        Err(_) | Ok(0) => Ok(()),
        Ok(n) => Err(Fail::failed(format!(
            "read of a file whose module is gone: expected an error, found {n} bytes"
        ))),
    }
}
