// SPDX-License-Identifier: GPL-2.0

//! Migration on request: to the device, and to the system.

#![forbid(unsafe_code)]

use super::{
    file::Opener,
    stats::Stats,
    supply::Supply, //
};
use crate::mm::{
    migrate::{
        bytes,
        Migration,
        PfnBuffer,
        Request,
        Select,
        Setup,
        MAX_PAGES, //
    },
    system_folio::SystemFolio,
    task::check_signals,
    PAGE_SHIFT, //
};
use core::ops::Range;
use kernel::{
    mm::virt::{
        flags,
        VmaRef, //
    },
    prelude::*, //
};

/// Gives each source of `migration`, all of them in device memory, a destination in system memory.
///
/// `alloc` makes a folio for entry `i` of an order. Where it has none a large folio is moved in
/// pages; so is what core mm made of a large folio, if the sources are `pieces`.
///
/// # Errors
///
/// `ENOMEM` when there is no memory for a single page.
pub(super) fn copy_back(
    migration: &mut Migration<'_, Setup>,
    stats: &Stats,
    pieces: bool,
    mut alloc: impl FnMut(usize, u32) -> Result<SystemFolio>,
) -> Result {
    let mut i = 0;
    while i < migration.len() {
        let Some(order) = migration.source(i) else {
            i += 1;
            continue;
        };
        match alloc(i, order) {
            Ok(folio) => migration.copy_to_system(i, 0, folio),
            Err(err) if order == 0 && !pieces => return Err(err),
            Err(_) => {
                stats.fell_back(order);
                for part in 0..1 << order {
                    migration.copy_to_system(i, part, alloc(i + part, 0)?);
                }
            }
        }
        i += 1 << order;
    }
    Ok(())
}

impl Opener {
    /// Migrates what is in system memory of `range` to the device. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone, when part of the range is not mapped, not readable or
    /// of a kind that cannot be migrated; what comes before that part has moved. `EOPNOTSUPP` when
    /// this kernel migrates nothing to the device.
    pub(super) fn to_device(&self, range: Range<usize>) -> Result {
        self.each_batch(range, Select::System, |migration, _, _| {
            self.copy_out_to_device(migration);
            Ok(())
        })
        .map(|_| ())
    }

    /// Migrates the device's pages of `range` to system memory and returns how many. May sleep.
    ///
    /// # Errors
    ///
    /// As [`Opener::to_device`], and `ENOMEM`.
    pub(super) fn to_system(&self, range: Range<usize>) -> Result<usize> {
        let stats = &self.device().core.stats;
        let select = Select::Device(self.device().memory_type());
        self.each_batch(range, select, |migration, vma, start| {
            copy_back(migration, stats, self.moves_pieces(), |i, order| {
                if self.take_fail_alloc() {
                    return Err(ENOMEM);
                }
                SystemFolio::alloc_vma(vma, start + bytes(i), order)
            })
        })
    }

    /// Gives each source a destination on the device. A page that there is no room for stays where
    /// it is.
    fn copy_out_to_device(&self, migration: &mut Migration<'_, Setup>) {
        let stats = &self.device().core.stats;
        let mut supply = Supply::new(self.device(), self.id(), migration.len());
        let mut i = 0;
        while i < migration.len() {
            let Some(order) = migration.source(i) else {
                i += 1;
                continue;
            };
            let folio = if self.take_fail_alloc() {
                None
            } else {
                supply.folio(order)
            };
            match folio {
                Some(folio) => migration.copy_to_device(i, 0, folio),
                None if order == 0 && !self.moves_pieces() => stats.failed_alloc.add(1),
                None => {
                    stats.fell_back(order);
                    self.copy_out_in_pages(migration, &mut supply, i, 1 << order);
                }
            }
            i += 1 << order;
        }
    }

    /// Whether pages may be what is left of large folios, which the kernel splits for a device that
    /// cannot have them. What an allocation that is to fail would have been for is not known then:
    /// like a large folio the page gets another one.
    fn moves_pieces(&self) -> bool {
        self.device().max_order() == 0
    }

    /// Gives each of the `pages` pages of the source at `i` a destination of its own.
    fn copy_out_in_pages(
        &self,
        migration: &mut Migration<'_, Setup>,
        supply: &mut Supply<'_>,
        i: usize,
        pages: usize,
    ) {
        migration.split_hole(i);
        let hole = migration.source(i) == Some(0);
        for part in 0..pages {
            match supply.folio(0) {
                // A place without a page is a source by itself.
                Some(folio) if hole => migration.copy_to_device(i + part, 0, folio),
                Some(folio) => migration.copy_to_device(i, part, folio),
                None => self.device().core.stats.failed_alloc.add(1),
            }
        }
    }

    /// Migrates `range` in batches, each prepared by `fill`, and returns how many pages moved.
    fn each_batch(
        &self,
        range: Range<usize>,
        select: Select,
        mut fill: impl FnMut(&mut Migration<'_, Setup>, &VmaRef, usize) -> Result,
    ) -> Result<usize> {
        let device = self.device();
        let stats = &device.core.stats;
        let mm = self.mirror().mm().mmget_not_zero().ok_or(EINVAL)?;
        let pages = ((range.end - range.start) >> PAGE_SHIFT).min(MAX_PAGES);
        let mut buffer = PfnBuffer::new(pages)?;
        let mut total = 0;
        let mut start = range.start;
        // Let go of again, or kept, when no lock is held any more.
        let mut held = self.armed();
        while start < range.end {
            check_signals()?;
            // A batch ends where a large folio may begin, so that it is not cut in two.
            let boundary = (start / bytes(MAX_PAGES) + 1) * bytes(MAX_PAGES);
            let end = range.end.min(start + bytes(pages)).min(boundary);
            let large = device.max_order() > 0 && end - start == bytes(MAX_PAGES);
            if select == Select::System {
                let order = if large { device.max_order() } else { 0 };
                device.reserve((end - start) >> PAGE_SHIFT, order);
                device.check_migratable()?;
            }
            let guard = mm.mmap_read_lock();
            let vma = guard.vma_lookup(start).ok_or(EINVAL)?;
            if vma.flags() & flags::READ == 0 {
                return Err(EINVAL);
            }
            let request = Request {
                vma,
                start,
                end: end.min(vma.end()),
                select,
                large: device.max_order() > 0,
                owner: self.mirror().owner(),
            };
            let mut migration = Migration::of_range(&mut buffer, &request)?;
            let wanted = migration.selected();
            // On failure the migration is dropped, which puts the pages back.
            fill(&mut migration, vma, start)?;
            let migration = migration.copied();
            let moved = match select {
                Select::System => device.settle(migration, &mut held),
                Select::Device(_) => device.core.finish(migration, |pfn| device.last_of_pfn(pfn)),
            };
            match select {
                Select::System => stats.moved_to_device(moved),
                Select::Device(_) => stats.moved_to_system(moved),
            }
            stats.failed_migrate.add(wanted.saturating_sub(moved.pages));
            total += moved.pages;
            start = request.end;
        }
        self.keep(held);
        Ok(total)
    }
}
