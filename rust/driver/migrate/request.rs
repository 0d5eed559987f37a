// SPDX-License-Identifier: GPL-2.0

//! Migration on request: to the device, and to the system.

#![forbid(unsafe_code)]

use super::alloc::DevmemAlloc;
use crate::{
    audit::{
        check_collected,
        check_settled,
        Event,
        Violation, //
    },
    driver::{
        device::{
            chunk::Chunk,
            copy::copy_back,
            dmirror_device::Device,
            page_backed::{
                Migration,
                PageBacked, //
            },
            verify::{
                looks,
                sleep_before,
                SUSPECTS, //
            },
        },
        devmem::ClientId, //
    },
    mm::{
        hmm::{
            fill::Watch,
            mirror::HmmMirror, //
        },
        migrate::{
            migration::{
                Area,
                Copied,
                PfnBuffer,
                Request,
                Select,
                Setup,
                MAX_PAGES, //
            },
            moved::Moved, //
        },
        page::system_folio::{
            SystemFolio,
            SystemFolios, //
        },
        pagemap::registration::PagemapRef,
        region::memory_type::MemoryType,
        sync::task::check_signals,
        user::{
            mmap_lock::MmapLock,
            range::PageRange, //
        },
        PAGE_SHIFT, //
    },
    params::param_strict,
    stamp::log_clock, //
};
use kernel::{
    mm::virt::flags,
    prelude::*, //
};

/// A folio of the device that a migration has just moved to.
struct Settled {
    chunk: PagemapRef<Chunk>,
    index: usize,
    order: u32,
}

impl Settled {
    /// I3: checks the folio now; returns nothing if it is no longer the same folio.
    fn check(&self) -> Option<Violation> {
        // This check is cheaper. The checks below only find the reason of a difference.
        if self.chunk.has_expected_refs(self.index) {
            return None;
        }
        if self.chunk.order_in_use(self.index) != Some(self.order) {
            return None;
        }
        let page = self.chunk.page(self.index)?;
        // The next migration of the folio holds the lock, and may wait for memory.
        if page.bits().is_locked() {
            return None;
        }
        let violation = check_settled(page, 0)?;
        // A task that can access a page by its mappings may also hold it for a long time. In strict
        // mode only a pin explains that: a task could otherwise have taken its reference only in the
        // moment since the page was mapped.
        let only_mapped = page.memory_type() == MemoryType::PRIVATE;
        let is_explained = page.may_be_pinned() || !param_strict();
        (only_mapped || page.refs() < page.mapcount() || !is_explained).then_some(violation)
    }
}

impl Device {
    /// Finalizes a migration to the device and checks it. Returns the number of moved pages. May
    /// sleep.
    fn finish_to_device(&self, migration: Migration<'_, Copied>) -> Moved {
        // A violation that was already reported is not reported again.
        let check = self
            .core
            .check_moved(&migration, |pfn| self.last_of_pfn(pfn));
        let moved = migration.moved();
        let done = migration.finalize();
        let mut suspects = [const { None }; SUSPECTS];
        let mut found = 0;
        let mut near = None;
        let now = log_clock();
        for (pfn, order) in done.destinations() {
            let Some((chunk, index)) = self.locate_near(&mut near, pfn) else {
                continue;
            };
            let ledger = chunk.ops().ledger();
            ledger.note_at(now, index, Event::Settled, order);
            // This look is cheaper. Those of `Settled` only say what a difference means.
            if !check || found >= SUSPECTS || chunk.has_expected_refs(index) {
                continue;
            }
            let Some(chunk) = self.chunk(chunk.ops().number()) else {
                continue;
            };
            let settled = Settled {
                chunk,
                index,
                order,
            };
            if let Some(violation) = settled.check() {
                suspects[found] = Some((settled, violation));
                found += 1;
            }
        }
        drop(done);
        self.judge_lasting(&mut suspects);
        moved
    }

    /// Reports the suspects that every read finds in the same state: a task that works on a folio changes its
    /// count. Sleeps as [`sleep_before`] does before each of [`looks`]. A killed task reports nothing, nor does
    /// one that has waited in vain.
    fn judge_lasting(&self, suspects: &mut [Option<(Settled, Violation)>]) {
        for look in looks(self.moment()) {
            if suspects.iter().all(Option::is_none)
                || check_signals().is_err()
                || sleep_before(look, &self.core.preempted).is_err()
            {
                return;
            }
            for suspect in suspects.iter_mut() {
                let healed = suspect.take_if(|(settled, first)| settled.check() != Some(*first));
                if let Some((settled, _)) = healed {
                    settled.chunk.ops().heal(1);
                }
            }
        }
        for (settled, violation) in suspects.iter().flatten() {
            settled.chunk.ops().judge(settled.index, Some(*violation));
        }
    }
}

/// Migrations for one client.
pub(in crate::driver) struct Migrator<'a> {
    pub(super) device: &'a Device,
    pub(super) mirror: &'a HmmMirror,
    pub(super) client: ClientId,
}

impl<'a> Migrator<'a> {
    /// Migrates pages that `mirror` maps, for `client` of `device`.
    pub(in crate::driver) fn new(
        device: &'a Device,
        mirror: &'a HmmMirror,
        client: ClientId,
    ) -> Self {
        Self {
            device,
            mirror,
            client,
        }
    }

    /// Migrates what is in system memory of `range` to the device, and returns how many pages the device's
    /// table maps then, as far as this is known without a walk. Calls `on_copied` with each
    /// batch, after core mm has moved the contents and before the pages are mapped. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone, when part of the range is not mapped, not readable or
    /// of a kind that cannot be migrated; what comes before that part has moved. `EOPNOTSUPP` when
    /// this kernel migrates nothing to the device.
    pub(in crate::driver) fn to_device(
        &self,
        range: PageRange,
        mut on_copied: impl FnMut(&Migration<'_, Copied>),
    ) -> Result<usize> {
        let mut mapped = 0;
        self.each_batch(
            range,
            Select::System,
            |migration, _, _, _| {
                self.copy_out_to_device(migration);
                Ok(())
            },
            |migration, watch| {
                on_copied(&migration);
                // If there is no memory for the table, the walk reports that, if the caller needs
                // the table.
                mapped += watch.map_or(0, |watch| watch.fill(&migration).unwrap_or(0));
                self.device.finish_to_device(migration)
            },
        )?;
        Ok(mapped)
    }

    /// Migrates the device's pages of `range` to system memory and returns how many folios moved,
    /// as `lib/test_hmm.c` does. May sleep.
    ///
    /// # Errors
    ///
    /// As [`Migrator::to_device`], and `ENOMEM`.
    pub(in crate::driver) fn to_system(&self, range: PageRange) -> Result<usize> {
        let stats = &self.device.core.stats;
        let select = Select::Device(self.device.memory_type());
        self.each_batch(
            range,
            select,
            |migration, area, start, wanted| {
                let may_fail = self.device.core.fail_alloc.is_asked();
                let mut pages = SystemFolios::for_vma(&area, wanted);
                let alloc = |i: usize, order| {
                    if may_fail && self.device.core.fail_alloc.take(self.client) {
                        return Err(ENOMEM);
                    }
                    let address = start + (i << PAGE_SHIFT);
                    match order {
                        0 => pages.alloc(address),
                        _ => SystemFolio::alloc_vma(&area, address, order),
                    }
                };
                copy_back(migration, stats, self.moves_pieces(), alloc).map(|_| ())
            },
            |migration, _| {
                let core = &self.device.core;
                core.finish(migration, |pfn| self.device.last_of_pfn(pfn))
            },
        )
    }

    /// Gives each source a destination on the device. A page without room stays where it is.
    fn copy_out_to_device(&self, migration: &mut Migration<'_, Setup>) {
        let stats = &self.device.core.stats;
        let mut alloc = DevmemAlloc::new(self.device, self.client, migration.len());
        let may_fail = self.device.core.fail_alloc.is_asked();
        let mut i = 0;
        while i < migration.len() {
            let Some(order) = migration.source(i) else {
                i += 1;
                continue;
            };
            let folio = if may_fail && self.device.core.fail_alloc.take(self.client) {
                None
            } else {
                alloc.folio(order)
            };
            match folio {
                // A page with lost contents stays, and counts as one that does not move.
                Some(folio) => drop(migration.copy_to_device(i, 0, folio)),
                None if order == 0 && !self.moves_pieces() => stats.failed_alloc.add(1),
                None => {
                    stats.fell_back(order);
                    self.copy_out_in_pages(migration, &mut alloc, i, 1 << order);
                }
            }
            i += 1 << order;
        }
    }

    /// Whether pages may be parts of large folios, which the kernel splits for a device without
    /// large folios. It is then unknown whether an allocation that must fail would be for a large
    /// folio; the page gets another one, as a large folio would.
    fn moves_pieces(&self) -> bool {
        self.device.max_order() == 0
    }

    /// Gives each of the `pages` pages of the source at `i` its own destination.
    fn copy_out_in_pages(
        &self,
        migration: &mut Migration<'_, Setup>,
        alloc: &mut DevmemAlloc<'_>,
        i: usize,
        pages: usize,
    ) {
        migration.split_hole(i);
        let hole = migration.source(i) == Some(0);
        for part in 0..pages {
            match alloc.folio(0) {
                // Each page of a hole is a source of its own.
                Some(folio) if hole => drop(migration.copy_to_device(i + part, 0, folio)),
                Some(folio) => drop(migration.copy_to_device(i, part, folio)),
                None => self.device.core.stats.failed_alloc.add(1),
            }
        }
    }

    /// Migrates `range` in batches. Returns the number of moved folios. `fill` gives the sources of
    /// a batch their destinations, and gets the number of their pages; `finish` finalizes the
    /// batch. A migration to the device is watched.
    fn each_batch(
        &self,
        range: PageRange,
        select: Select,
        mut fill: impl FnMut(&mut Migration<'_, Setup>, Area<'_>, usize, usize) -> Result,
        mut finish: impl FnMut(Migration<'_, Copied>, Option<&Watch<'_>>) -> Moved,
    ) -> Result<usize> {
        let device = self.device;
        let stats = &device.core.stats;
        let mm = self.mirror.mm().mmget_not_zero().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(range.pages())?;
        let mut total = 0;
        let mut left = Some(range);
        while let Some(rest) = left {
            check_signals()?;
            // A batch ends where a large folio may begin, so that it does not split one.
            let batch = rest.first(MAX_PAGES - (rest.start() >> PAGE_SHIFT) % MAX_PAGES);
            let large = device.max_order() > 0 && batch.pages() == MAX_PAGES;
            if select == Select::System {
                let order = if large { device.max_order() } else { 0 };
                device.reserve(batch.pages(), order);
                device.check_migratable()?;
            }
            // This begins before the mmap lock is taken, because it waits for invalidations.
            let watch = (select == Select::System)
                .then(|| self.mirror.watch(batch))
                .flatten();
            let lock = MmapLock::read(&mm)?;
            let area = Area::locked(&lock, batch.start()).ok_or(EINVAL)?;
            if area.flags() & flags::READ == 0 {
                return Err(EINVAL);
            }
            // What the process hides from itself stays hidden: the device faults such pages in when it needs them.
            let watch = watch.as_ref().filter(|_| !area.may_hide());
            let batch = batch.first((area.end() - batch.start()) >> PAGE_SHIFT);
            let request = Request {
                area,
                range: batch,
                select,
                large: device.max_order() > 0,
                owner: self.mirror.owner(),
                watch: watch.map(Watch::token),
            };
            let mut migration = Migration::of_range(&mut buffer, &request, &PageBacked)?;
            if let Some(difference) = param_strict().then(|| migration.miscounted()).flatten() {
                let violation = check_collected(batch.start() >> PAGE_SHIFT, difference);
                device.core.auditor.judge(Some(violation));
            }
            let wanted = migration.selected();
            // On failure the migration is dropped, which restores the pages.
            fill(&mut migration, area, batch.start(), wanted)?;
            let migration = migration.copied()?;
            let moved = finish(migration, watch);
            match select {
                Select::System => stats.moved_to_device(moved),
                Select::Device(_) => stats.moved_to_system(moved),
            }
            stats.failed_migrate.add(wanted.saturating_sub(moved.pages));
            total += moved.folios;
            left = rest.skip(batch.pages());
        }
        Ok(total)
    }
}
