// SPDX-License-Identifier: GPL-2.0

//! The eviction of what the address space of an open file maps.

#![forbid(unsafe_code)]

use super::request::Migrator;
use crate::{
    driver::device::page_backed::{
        Migration,
        PageBacked, //
    },
    mm::{
        migrate::migration::{
            Area,
            PfnBuffer,
            Request,
            Select,
            MAX_PAGES, //
        },
        sync::task::check_signals,
        user::range::PageRange,
        PAGE_SHIFT,
        PMD_ORDER, //
    },
};
use kernel::{
    mm::{
        virt::flags,
        MmWithUser, //
    },
    prelude::*, //
};

/// The number of folios that are taken from the client's list at a time.
const LIST: usize = 128;

/// The number of places that are divided into blocks together: the first and the last page of each folio.
const PLACES: usize = 2 * MAX_PAGES;

/// A page number of the address space, and whether the folio there is mapped by several entries. A walk of the
/// page tables takes such a folio apart, while an eviction leaves it as it is.
type Place = (usize, bool);

impl Migrator<'_> {
    /// Returns pages of the client to system memory, those that its address space maps where they were mapped
    /// first. One walk of the page tables finds all pages of a block, while an eviction looks for the mappings
    /// of each folio before and after its move. What does not move stays for the eviction. May sleep, but does
    /// not wait for the mmap lock.
    pub(in crate::driver) fn evict_mapped(&self) {
        // An error only means that less has moved.
        let _ = self.try_evict_mapped();
    }

    fn try_evict_mapped(&self) -> Result {
        let device = self.device;
        let owned = || device.memory().allocator.owned(self.client);
        let mut left = owned();
        if left == 0 {
            return Ok(());
        }
        // The process may have ended. Its pages are on the device for other processes then.
        let mm = self.mirror.mm().mmget_not_zero().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(MAX_PAGES)?;
        let mut places = KVVec::with_capacity(PLACES, GFP_KERNEL)?;
        while left > 0 {
            let before = owned();
            places.clear();
            while left > 0 && places.len() + 2 * LIST <= PLACES {
                left = self.add_places(&mut places, left)?;
            }
            // A batch is what one page of page table entries maps.
            while let Some(&(place, _)) = places.first() {
                check_signals()?;
                let (mut first, mut last, mut any_by_several) = (place, place, false);
                places.retain(|&mut (other, by_several)| {
                    let is_in_block = other >> PMD_ORDER == place >> PMD_ORDER;
                    if is_in_block {
                        (first, last) = (first.min(other), last.max(other));
                        any_by_several |= by_several;
                    }
                    !is_in_block
                });
                if !any_by_several {
                    // Another mapping may be there now, or none.
                    let _ = self.evict_block(&mm, &mut buffer, first, last);
                }
            }
            // The places of these folios say nothing, and neither may those of others.
            if owned() >= before {
                break;
            }
        }
        Ok(())
    }

    /// Adds where the next folios of the client, of `left` pages, were mapped first: the first and the last page
    /// of each. Returns how many pages are left then.
    fn add_places(&self, places: &mut KVVec<Place>, left: usize) -> Result<usize> {
        let device = self.device;
        let pages = device.config.chunk_pages.get();
        let mut list = [(0, 0); LIST];
        let room = left.min(LIST);
        let n = {
            let mut memory = device.memory();
            memory.allocator.next_owned(self.client, &mut list[..room])
        };
        if n == 0 {
            return Ok(0);
        }
        let mut near = None;
        let mut seen = 0;
        for &(page, order) in &list[..n] {
            let page = page as usize;
            let (number, index) = (page / pages, page % pages);
            seen += 1 << order;
            // Most are in the same chunk.
            near = near
                .filter(|(known, _)| *known == number)
                .or_else(|| Some((number, device.chunk(number)?)));
            let found = near.as_ref().and_then(|(_, chunk)| {
                let page = chunk.page(index)?;
                Some((page.first_place()?, page.order()))
            });
            let Some((first, now)) = found else { continue };
            let last = first.saturating_add((1 << order) - 1);
            // Core mm may have split the folio since it was allocated.
            let is_in_block = first >> PMD_ORDER == last >> PMD_ORDER;
            let by_several = now != order || (now > 0 && now < PMD_ORDER) || !is_in_block;
            for place in [first, last] {
                let added = places.push_within_capacity((place, by_several));
                added.map_err(|_| ENOMEM)?;
            }
        }
        Ok(left.saturating_sub(seen))
    }

    /// Evicts the client's pages from page number `first` to `last` of the address space, which are in one
    /// block, up to the end of their area.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when another task has locked the address space for writing, `EINVAL` when there is no area
    /// whose pages could come back, else as [`Migration::of_range`].
    fn evict_block(
        &self,
        mm: &MmWithUser,
        buffer: &mut PfnBuffer,
        first: usize,
        last: usize,
    ) -> Result {
        let start = first.checked_mul(1 << PAGE_SHIFT).ok_or(EINVAL)?;
        let range = PageRange::new(start, last - first + 1)?;
        // A task that keeps the lock may not end soon, and the eviction does not need it.
        let lock = mm.mmap_read_trylock().ok_or(EAGAIN)?;
        let area = Area::lookup(&lock, start).ok_or(EINVAL)?;
        if area.flags() & flags::READ == 0 {
            return Err(EINVAL);
        }
        let device = self.device;
        let request = Request {
            area,
            range: range.first((area.end() - start) >> PAGE_SHIFT),
            select: Select::Device(device.memory_type()),
            large: device.max_order() > 0,
            owner: self.mirror.owner(),
            watch: None,
        };
        let migration = Migration::of_range(buffer, &request, &PageBacked)?;
        device.evict_pages(migration, Some(self.client));
        Ok(())
    }
}
