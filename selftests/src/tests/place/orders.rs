// SPDX-License-Identifier: GPL-2.0

//! Folios of orders between a small and a huge one, in the system and on the device.

use std::fs;

use super::super::Ctx;
use super::super::leak::settled_in;
use super::{SMALL, Scene, WAYS};
use crate::check::{Fail, OrFail, Outcome};
use crate::check_eq;
use crate::device::PAGE;

/// 16 KiB and 64 KiB.
const ORDERS: [u32; 2] = [2, 4];

/// The setting of system folios of one order, as long as this lives.
struct Setting {
    path: String,
    before: String,
}

impl Setting {
    fn on(order: u32) -> Outcome<Self> {
        let kib = (PAGE << order) / 1024;
        let path = format!("/sys/kernel/mm/transparent_hugepage/hugepages-{kib}kB/enabled");
        let text = fs::read_to_string(&path).or_fail(&path)?;
        // The present one is in brackets.
        let before = text.split(['[', ']']).nth(1).unwrap_or("never").to_owned();
        fs::write(&path, "madvise").or_fail(&path)?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // The next test that needs a setting writes it itself.
        let _ = fs::write(&self.path, &self.before);
    }
}

impl Scene<'_> {
    #[track_caller]
    fn expect_order(&self, order: u32, when: &str) -> Outcome {
        let pages = self.target.inspect(&self.buf, self.first, self.n);
        for (i, page) in pages.or_fail("ZDM_INSPECT")?.iter().enumerate() {
            check_eq!(page.order, order, "order of page {i} {when}");
        }
        Ok(())
    }

    /// Splits huge folios of the device where they are. Nothing finds PRIVATE ones for that.
    fn split(&self, order: u32) -> Outcome {
        if !self.target.cpu_maps() || !self.target.moves_large() {
            return Ok(());
        }
        let (start, end) = (self.buf.at(self.first), self.buf.at(self.first + self.n));
        let request = format!("{},{start:#x},{end:#x},{order}", std::process::id());
        fs::write("/sys/kernel/debug/split_huge_pages", request).or_fail("split_huge_pages")?;
        self.expect_order(order, "after the split")
    }
}

/// Folios of the system with these orders go to the device and come back; and huge folios that the
/// device has are split into folios of these orders there, before they come back. Only the place
/// and the size of the folios change.
pub(super) fn orders(ctx: &Ctx, node: usize) -> Outcome {
    for order in ORDERS {
        settled_in(ctx, node, |target, dir| {
            let _setting = Setting::on(order)?;
            let s = Scene::new(target, dir, false, 3130)?;
            let (first, n) = (s.first, SMALL);
            s.buf.advise(first, n, libc::MADV_DONTNEED)?;
            s.buf.advise(first, n, libc::MADV_HUGEPAGE)?;
            s.fill(3130);
            if s.target.inspect_one(&s.buf, first)?.order != order {
                return Err(Fail::Skip(format!("no folios of order {order}")));
            }
            s.warm_up()?;
            s.expect_order(order, "in the system")?;
            s.trips(3130)
        })?;
        for how in WAYS {
            settled_in(ctx, node, |target, dir| {
                let mut s = Scene::new(target, dir, true, 3131)?;
                s.pieces = true;
                s.warm_up()?;
                let (before, counters) = (s.states()?, s.counters()?);
                let range = (s.first, s.n);
                s.send(3131)?;
                s.split(order)?;
                let when = format!("on the device, in folios of order {order}");
                s.expect(&before, true, &when)?;
                s.watch
                    .expect(&s.buf, range, &counters, s.except(), &when)?;
                s.bring_back(how)?;
                let when = format!("back by {how:?}, from folios of order {order}");
                s.expect(&before, false, &when)?;
                s.watch
                    .expect(&s.buf, range, &counters, s.except(), &when)?;
                s.check(3131)
            })?;
        }
    }
    Ok(())
}
