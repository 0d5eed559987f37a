// SPDX-License-Identifier: GPL-2.0

//! Scans all of a device's memory for broken invariants.

#![forbid(unsafe_code)]

use super::{
    chunk::Chunk,
    dmirror_device::{
        lock_killable,
        Device, //
    },
    verify::{
        looks,
        sleep_before, //
    },
};
use crate::{
    audit::{
        check_born,
        check_idle,
        check_mapped,
        check_pagemap,
        check_tail,
        check_used,
        check_used_whole,
        whole_pages,
        Moment,
        Transition,
        Violation, //
    },
    driver::devmem::MAX_CHUNKS,
    mm::{
        module::pin::ModulePin,
        page::view::PageView,
        pagemap::{
            dev_pagemap::DevPagemap,
            registration::PagemapRef, //
        },
        sync::task::check_signals, //
    },
    params::param_strict, //
};
use kernel::prelude::*;

/// The number of pages between two checks for a fatal signal.
const BATCH: usize = 4096;

/// The numbers of pages that a scan has seen.
#[derive(Default)]
pub(in crate::driver) struct AuditCounts {
    pub(in crate::driver) pages: u64,
    pub(in crate::driver) free: u64,
    pub(in crate::driver) used: u64,
    pub(in crate::driver) found: u64,
}

impl Device {
    /// I1 and I6: checks a chunk that was just registered.
    pub(super) fn scan_born(&self, chunk: &DevPagemap<Chunk>) {
        if !self.core.auditor.is_on() {
            return;
        }
        let mut scan = self.core.auditor.scan();
        let mut index = 0;
        while index < chunk.pages() {
            index += whole_pages(chunk, index, chunk.pages());
            let outcome = chunk.page(index).and_then(check_born);
            scan.judge(outcome.map(|v| v.after(chunk.ops().ledger().last(index))));
            index += 1;
        }
        // If a free page has a reference, so has the pagemap for it. CAST: Neither exceeds the
        // number of a machine's pages.
        let expected = 1 + i64::from(self.free_refs()) * chunk.pages() as i64;
        let excess = chunk.first_refs() - expected;
        scan.judge(chunk.page(0).and_then(|page| check_pagemap(page, excess)));
    }

    /// The moment of a check about which user space gave no guarantee.
    pub(in crate::driver) fn moment(&self) -> Moment {
        self.core.moment
    }

    /// Checks every page, and every pagemap. Exact at a quiet moment only. May sleep.
    ///
    /// # Errors
    ///
    /// `EINTR` on a fatal signal. `ETIMEDOUT` when it cannot be told whether what was found lasts, because
    /// tasks are kept waiting for a processor. `ENOMEM`.
    pub(in crate::driver) fn audit(&self, moment: Moment) -> Result<AuditCounts> {
        let mut counts = AuditCounts::default();
        for chunk in self.chunks() {
            let found = self.lasting_scan(&chunk, moment)?;
            counts.pages += found.pages;
            counts.free += found.free;
            counts.used += found.used;
            counts.found += found.found;
        }
        if self.core.auditor.is_on() {
            for (chunk, leak) in self.leaks(moment, |_| true)? {
                counts.found += u64::from(chunk.ops().judge(0, Some(leak)));
            }
        }
        Ok(counts)
    }

    /// Scans a chunk until it has no fault, and reports the pages that had the same fault in every
    /// scan. khugepaged, for example, brings pages back on its own and holds them meanwhile. May
    /// sleep if there is a fault.
    fn lasting_scan(&self, chunk: &PagemapRef<Chunk>, moment: Moment) -> Result<AuditCounts> {
        let counts = scan_chunk(chunk, moment, |_, outcome| outcome.is_some())?;
        if counts.found == 0 {
            return Ok(counts);
        }
        let ledger = chunk.ops().ledger();
        // If every free page has a permanent reference, waiting would not help.
        if self.free_refs() != 0 {
            let mut scan = self.core.auditor.scan();
            return scan_chunk(chunk, moment, |index, outcome| {
                scan.judge(outcome.map(|v| v.after(ledger.last(index))))
            });
        }
        let mut signs = KVVec::with_capacity(chunk.pages(), GFP_KERNEL_ACCOUNT)?;
        let mut counts = scan_chunk(chunk, moment, |index, outcome| {
            let sign = Sign::of(outcome, || ledger.last(index));
            // There is room for each page. The scan skips clean ones.
            while signs.len() <= index {
                if signs.push_within_capacity(Sign::NONE).is_err() {
                    return false;
                }
            }
            signs[index] = sign;
            sign != Sign::NONE
        })?;
        let suspects = counts.found;
        for look in looks(moment) {
            if counts.found == 0 {
                chunk.ops().heal(suspects);
                return Ok(counts);
            }
            sleep_before(look, &self.core.preempted)?;
            let mut seen = 0;
            counts = scan_chunk(chunk, moment, |index, outcome| {
                if index >= signs.len() {
                    return false;
                }
                // Pages that the scan skipped since the last one are clean.
                for clean in seen..index {
                    signs[clean] = Sign::NONE;
                }
                seen = index + 1;
                let sign = &mut signs[index];
                if *sign != Sign::of(outcome, || ledger.last(index)) {
                    *sign = Sign::NONE;
                }
                *sign != Sign::NONE
            })?;
            for clean in signs.iter_mut().skip(seen) {
                *clean = Sign::NONE;
            }
        }
        let mut scan = self.core.auditor.scan();
        let counts = scan_chunk(chunk, moment, |index, outcome| {
            let last = ledger.last(index);
            let sign = Sign::of(outcome, || last);
            let lasts = signs.get(index).is_some_and(|&before| before == sign);
            scan.judge(outcome.filter(|_| lasts).map(|v| v.after(last)))
        })?;
        chunk.ops().heal(suspects.saturating_sub(counts.found));
        Ok(counts)
    }

    /// Reads every struct page, which is what a scan costs at least, and says how many that are. May
    /// sleep.
    ///
    /// # Errors
    ///
    /// As [`Device::audit`].
    pub(in crate::driver) fn read_all(&self) -> Result<AuditCounts> {
        let mut counts = AuditCounts::default();
        for chunk in self.chunks() {
            let mut index = 0;
            while index < chunk.pages() {
                check_signals()?;
                index += chunk.read_pages(index, BATCH);
            }
            counts.pages += chunk.pages() as u64;
        }
        Ok(counts)
    }

    /// I6: checks chunk `number`, which is to be removed. Returns whether it cannot be, as far as can be told.
    /// May sleep.
    pub(in crate::driver) fn report_leak(&self, number: usize) -> bool {
        let Ok(leaks) = self.leaks(self.moment(), |other| other == number) else {
            return true;
        };
        let mut found = false;
        for (chunk, leak) in leaks {
            found |= chunk.ops().judge(0, Some(leak));
        }
        found
    }

    /// I6: the chunks, of those whose numbers `is_wanted` accepts, whose pagemaps have unexplained
    /// references. May sleep if one seems to have some.
    ///
    /// # Errors
    ///
    /// `EINTR` on a fatal signal. `ETIMEDOUT` when that cannot be told in time.
    fn leaks(
        &self,
        moment: Moment,
        is_wanted: impl Fn(usize) -> bool,
    ) -> Result<impl Iterator<Item = (PagemapRef<Chunk>, Violation)> + '_> {
        let read = || -> Result<_> {
            let mut excess = [0; MAX_CHUNKS];
            for chunk in self.chunks() {
                check_signals()?;
                let number = chunk.ops().number();
                if is_wanted(number) {
                    excess[number] = chunk.stable_excess().unwrap_or(0);
                }
            }
            Ok(excess)
        };
        let mut excess = read()?;
        if moment == Moment::Busy && excess.iter().any(|&excess| excess != 0) {
            // A task that frees or takes a page may have been preempted.
            self.core.preempted.wait()?;
            for (first, second) in excess.iter_mut().zip(read()?) {
                if *first != second {
                    *first = 0;
                }
            }
        }
        Ok(self.chunks().filter_map(move |chunk| {
            let leak = check_pagemap(chunk.page(0)?, excess[chunk.ops().number()])?;
            Some((chunk, leak))
        }))
    }

    /// I6: checks when a file is closed. A pagemap with an unexplained reference cannot be
    /// unregistered, so the module stays loaded while there is one. May sleep.
    pub(in crate::driver) fn stay_for_leaks(&self) {
        if !self.core.auditor.is_on() {
            return;
        }
        // A killed task leaves this to the next file that is closed.
        let Ok(mut pin) = lock_killable(&self.leaks) else {
            return;
        };
        let mut leaks = false;
        match self.leaks(self.moment(), |_| true) {
            Ok(found) => {
                for (chunk, leak) in found {
                    leaks = true;
                    if pin.is_none() {
                        chunk.ops().judge(0, Some(leak));
                    }
                }
            }
            // It stays as it is until the next file is closed.
            Err(_) => return,
        }
        match (leaks, pin.is_some()) {
            (true, false) => {
                pr_err!(
                    "{}: its memory could not be unregistered; the module stays loaded\n",
                    self.name()
                );
                *pin = ModulePin::try_take(self.owner.module());
            }
            (false, true) => *pin = None,
            _ => {}
        }
    }
}

/// The fault of a page in a short form that can be compared with an earlier one.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sign {
    check: u32,
    found: u64,
    /// The time of the page's last transition.
    since: u64,
}

impl Sign {
    /// There is no fault. Checks have numbers above 0.
    const NONE: Self = Self {
        check: 0,
        found: 0,
        since: 0,
    };

    fn of(outcome: Option<Violation>, last: impl FnOnce() -> Transition) -> Self {
        outcome.map_or(Self::NONE, |v| Self {
            check: v.check as u32,
            found: v.found,
            since: last().time,
        })
    }
}

/// Checks every page of a chunk. `judge` gets the index of a page and its fault, if any, and
/// returns whether the fault counts.
fn scan_chunk(
    chunk: &PagemapRef<Chunk>,
    moment: Moment,
    mut judge: impl FnMut(usize, Option<Violation>) -> bool,
) -> Result<AuditCounts> {
    let mut counts = AuditCounts::default();
    // The remaining pages of the large folio in use that was met last.
    let mut tails = 0;
    let mut index = 0;
    while index < chunk.pages() {
        check_signals()?;
        // The scan reads pages up to here before the next check for a signal.
        let end = chunk.pages().min(index + BATCH);
        while index < end {
            if tails == 0 {
                let clean = whole_pages(chunk, index, end - index);
                counts.free += clean as u64;
                index += clean;
                if index == end {
                    break;
                }
            }
            let Some(page) = chunk.page(index) else { break };
            let outcome = if tails > 0 {
                tails -= 1;
                counts.used += 1;
                check_tail(page, moment)
            } else if let Some(order) = chunk.order_in_use(index) {
                tails = (1usize << order) - 1;
                counts.used += 1;
                check_used(page, order, moment).or_else(|| check_entries(page))
            } else {
                counts.free += 1;
                check_idle(page)
            };
            counts.found += u64::from(judge(index, outcome));
            index += 1;
        }
    }
    counts.pages = chunk.pages() as u64;
    Ok(counts)
}

/// I11 and I14: checks `page`, if strict mode is on.
fn check_entries(page: PageView<'_>) -> Option<Violation> {
    param_strict().then(|| check_mapped(page).or_else(|| check_used_whole(page)))?
}
