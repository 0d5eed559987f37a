// SPDX-License-Identifier: GPL-2.0

//! Migration on request: to the device, to the system, and out of a device that is closed.

#![forbid(unsafe_code)]

use super::{
    device::Device,
    file::Opener,
    pool::OpenerId, //
};
use crate::{
    audit::{
        Check,
        Invariant,
        Violation, //
    },
    mm::{
        migrate::{
            bytes,
            DevicePfns,
            Migration,
            PfnBuffer,
            Select,
            Setup,
            MAX_PAGES, //
        },
        system_folio::SystemFolio,
        task::check_signals,
        PAGE_SHIFT, //
    },
};
use core::ops::Range;
use kernel::{
    mm::virt::{
        flags,
        VmaRef, //
    },
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Times that pages which would not move are tried again when a file is closed.
const EVICTION_TRIES: usize = 20;

/// Pages that would not move which a closed file puts on record one by one.
const STUCK_RECORDS: usize = 8;

impl Opener {
    /// Migrates what is in system memory of `range` to the device. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone, when part of the range is not mapped, not readable or
    /// of a kind that cannot be migrated; what comes before that part has moved.
    pub(super) fn to_device(&self, range: Range<usize>) -> Result {
        self.each_batch(range, Select::System, |migration, _, _| {
            for i in 0..migration.len() {
                if migration.is_selected(i) {
                    self.fill_device_page(migration, i)?;
                }
            }
            Ok(())
        })
        .map(|moved| self.device().core.stats.to_device.add(moved))
    }

    /// Migrates the device's pages of `range` to system memory and returns how many. May sleep.
    ///
    /// # Errors
    ///
    /// As [`Opener::to_device`], and `ENOMEM`.
    pub(super) fn to_system(&self, range: Range<usize>) -> Result<usize> {
        let moved = self.each_batch(range, Select::DevicePrivate, |migration, vma, start| {
            for i in 0..migration.len() {
                if migration.is_selected(i) {
                    let mut folio = SystemFolio::alloc_vma(vma, start + bytes(i))?;
                    migration.copy_source(i, &mut folio);
                    migration.set_system_destination(i, folio);
                }
            }
            Ok(())
        })?;
        self.device().core.stats.to_system.add(moved);
        Ok(moved)
    }

    /// Copies page `i` to a page of the device. A page that there is no room for stays where it is.
    fn fill_device_page(&self, migration: &mut Migration<'_, Setup>, i: usize) -> Result {
        let stats = &self.device().core.stats;
        let Ok(mut backing) = SystemFolio::alloc() else {
            stats.failed_alloc.add(1);
            return Ok(());
        };
        migration.copy_source(i, &mut backing);
        match self.device().hand_out(self.id(), backing) {
            Some(folio) => migration.set_device_destination(i, folio),
            None => stats.failed_alloc.add(1),
        }
        Ok(())
    }

    /// Migrates `range` in batches, each prepared by `fill`, and returns how many pages moved.
    fn each_batch(
        &self,
        range: Range<usize>,
        select: Select,
        mut fill: impl FnMut(&mut Migration<'_, Setup>, &VmaRef, usize) -> Result,
    ) -> Result<usize> {
        let mm = self.mirror().mm().mmget_not_zero().ok_or(EINVAL)?;
        let pages = ((range.end - range.start) >> PAGE_SHIFT).min(MAX_PAGES);
        let mut buffer = PfnBuffer::new(pages)?;
        let mut moved = 0;
        let mut start = range.start;
        while start < range.end {
            check_signals()?;
            if select == Select::System {
                self.device().reserve(pages);
            }
            let guard = mm.mmap_read_lock();
            let vma = guard.vma_lookup(start).ok_or(EINVAL)?;
            if vma.flags() & flags::READ == 0 {
                return Err(EINVAL);
            }
            let end = range.end.min(vma.end()).min(start + bytes(pages));
            let owner = self.mirror().owner();
            let mut migration = Migration::of_range(&mut buffer, vma, start, end, select, owner)?;
            let wanted = (0..migration.len())
                .filter(|&i| migration.is_selected(i))
                .count();
            // On failure the migration is dropped, which puts the pages back.
            fill(&mut migration, vma, start)?;
            let migration = migration.copied();
            let n = migration.moved();
            moved += n;
            self.device().core.stats.failed_migrate.add(wanted - n);
            migration.finalize();
            start = end;
        }
        Ok(moved)
    }
}

impl Device {
    /// Returns the pages of `opener` to system memory, at a cost that follows how many there are.
    /// May sleep, and takes a bounded time: what would not move is put on record and stays.
    pub(super) fn evict(&self, opener: OpenerId) {
        let mut tries = 0;
        loop {
            let before = self.core.pool.lock().owned(opener);
            if before == 0 {
                return;
            }
            if self.evict_once(opener, before).is_err() {
                pr_warn!("no memory to evict with, trying again\n");
            }
            let after = self.core.pool.lock().owned(opener);
            if after >= before {
                // Somebody holds the pages for a moment, or for good.
                tries += 1;
                if tries > EVICTION_TRIES {
                    break;
                }
                fsleep(Delta::from_millis(5));
            }
        }
        self.report_stuck(opener);
    }

    /// Tries each of the `count` pages of `opener` once.
    fn evict_once(&self, opener: OpenerId, count: usize) -> Result {
        let batch = count.min(MAX_PAGES);
        let mut buffer = PfnBuffer::new(batch)?;
        let mut pages = KVVec::from_elem((0, 0), batch, GFP_KERNEL)?;
        let mut pfns: KVVec<usize> = KVVec::with_capacity(batch, GFP_KERNEL)?;
        let mut left = count;
        while left > 0 {
            let room = left.min(batch);
            let n = self.core.pool.lock().next_owned(opener, &mut pages[..room]);
            if n == 0 {
                break;
            }
            left -= n;
            // A migration takes pages of one chunk; an opener rarely has more than one.
            let mut rest = &pages[..n];
            while let Some(&(first, _)) = rest.first() {
                let Some((chunk, _)) = self.locate(first) else {
                    break;
                };
                pfns.clear();
                for &(page, _) in rest {
                    match self.locate(page) {
                        Some((c, index)) if core::ptr::eq(c, chunk) => {
                            pfns.push(chunk.first_pfn() + index, GFP_KERNEL)?;
                        }
                        _ => break,
                    }
                }
                rest = &rest[pfns.len()..];
                if let Some(list) = DevicePfns::new(chunk, &pfns) {
                    self.evict_batch(Migration::of_device_pages(&mut buffer, &list));
                }
            }
        }
        Ok(())
    }

    fn evict_batch(&self, mut migration: Migration<'_, Setup>) {
        for i in 0..migration.len() {
            if !migration.is_selected(i) {
                continue;
            }
            // Without memory the page stays; the caller tries again.
            if let Ok(mut folio) = SystemFolio::alloc_movable() {
                migration.copy_source(i, &mut folio);
                migration.set_system_destination(i, folio);
            }
        }
        let migration = migration.copied();
        self.core.stats.evicted.add(migration.moved());
        migration.finalize();
    }

    /// Puts pages on record that `opener` leaves behind.
    fn report_stuck(&self, opener: OpenerId) {
        let mut pages = [(0, 0); STUCK_RECORDS];
        let (n, left) = {
            let mut pool = self.core.pool.lock();
            (pool.next_owned(opener, &mut pages), pool.owned(opener))
        };
        for &(page, _) in &pages[..n] {
            let view = self
                .locate(page)
                .and_then(|(chunk, index)| chunk.page(index));
            if let Some(view) = view {
                let refs = u64::try_from(view.refs()).unwrap_or(0);
                self.core.auditor.report(Violation::on(
                    view,
                    Invariant::Teardown,
                    Check::Stuck,
                    0,
                    refs,
                ));
            }
        }
        if left > 0 {
            pr_err!(
                "{} device pages would not move; the module stays loaded\n",
                left
            );
        }
    }
}
