// SPDX-License-Identifier: GPL-2.0

//! A huge page that several processes map migrates in small pages, as there is no huge one. Each
//! process must have the small pages afterwards: one whose entry was not split would map, or wait
//! for, what is not there any more.

use super::super::chain::SIZES;
use super::super::counts::Waiting;
use super::super::leak::settled;
use super::super::target::{Target, huge_filled};
use super::super::{Ctx, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("thp": "shared_pieces" => shared_pieces);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToDevice,
    ToSystem,
    /// The CPU accesses a page in the middle.
    Fault,
}

fn shared_pieces(ctx: &Ctx, node: usize) -> Outcome {
    for way in [Way::ToDevice, Way::ToSystem, Way::Fault] {
        for children in 1..3 {
            // Whether one of the processes has split its own entry before.
            for split in SIZES {
                settled(ctx, node, |target| pieces(target, way, children, split)).map_err(|e| {
                    match e {
                        Fail::Skip(_) => e,
                        e => Fail::failed(format!(
                            "{way:?}, {children} children, split before {split}: {e}"
                        )),
                    }
                })?;
            }
        }
    }
    Ok(())
}

fn pieces(target: &Target, way: Way, children: usize, split: bool) -> Outcome {
    if !target.moves_large() {
        return Err(Fail::Skip("this kernel moves small pages only".into()));
    }
    if way == Way::Fault && target.cpu_maps() {
        return Ok(());
    }
    let buf = huge_filled(1, 226)?;
    let n = buf.pages();
    if way != Way::ToDevice {
        target.move_huge(&buf, 226)?;
    }
    let mut all = Vec::new();
    for own in 0..children as u64 {
        all.push(Waiting::start(
            || match split {
                // The entry of this process alone.
                true => buf.protect(5, 1, libc::PROT_READ),
                false => Ok(()),
            },
            || {
                buf.check(0, n, 226)?;
                buf.protect(0, n, libc::PROT_READ | libc::PROT_WRITE)?;
                buf.fill(0, n, 227 + own);
                buf.check(0, n, 227 + own)
            },
        )?);
    }
    proc::drain_batches()?;
    target.fail_alloc()?;
    match way {
        Way::ToDevice => drop(target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?),
        Way::ToSystem => drop(target.to_system(&buf, 0, n).or_fail("MIGRATE_TO_SYS")?),
        Way::Fault => drop(buf.get(n / 3, 0)),
    }
    let away = if way == Way::ToDevice { n } else { 0 };
    target.expect(&buf, 0, n, away)?;
    check_eq!(proc::huge(&buf, 0, n)?, 0, "pages that huge entries map");
    if way == Way::ToDevice {
        let entries = 1 + children as i32;
        let pages = target.inspect(&buf, 0, n).or_fail("ZDM_INSPECT")?;
        let wrong = pages
            .iter()
            .position(|p| p.order != 0 || p.mapcount != entries || p.refs != entries);
        check!(
            wrong.is_none(),
            "page {wrong:?}: expected a small one with {entries} mappings and references, found {:x?}",
            wrong.map(|i| pages[i])
        );
    }
    for child in all {
        child.join()?;
        if way == Way::ToDevice {
            let read = target.read(&buf, 0, n).or_fail("READ")?;
            crate::device::check_bytes(&read.data, 226, 0, "READ")?;
        }
    }
    buf.check(0, n, 226)
}
