// SPDX-License-Identifier: GPL-2.0

//! Giving the sources of a migration destinations with their contents.
//!
//! C header: [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

use super::{
    device_memory::{
        CopyError,
        CpuPages,
        DeviceMemory,
        DevicePages, //
    },
    migration::Migration,
    stage::Setup, //
};
use crate::{
    bindings,
    mm::page::{
        device_folio::LockedDeviceFolio,
        struct_page,
        system_folio::SystemFolio, //
    },
};
use core::ptr::NonNull;
use kernel::{
    device::{
        Bound,
        Device, //
    },
    dma::DataDirection,
    prelude::*, //
};

impl<M: DeviceMemory> Migration<'_, Setup, M> {
    /// Makes `folio` the destination of page `part` of the source at entry `i`, with the contents
    /// and the write permission of the source. A folio of the source's order takes all of it
    /// (`part` is 0 then). The contents are copied by [`DeviceMemory::copy_in`], or [`DeviceMemory::clear`] for a hole.
    /// May sleep.
    ///
    /// A small folio can take a page of a large anonymous folio, which core mm then splits. A large
    /// hole must be split first: see [`Migration::split_hole`]. Pages that were selected on a device are
    /// no source for this.
    ///
    /// # Errors
    ///
    /// [`CopyError::Mismatch`] where `folio` does not suit the source, and the errors of [`DeviceMemory`]. `folio` is
    /// freed, and the source stays where it is.
    pub(crate) fn copy_to_device(
        &mut self,
        i: usize,
        part: usize,
        folio: LockedDeviceFolio,
    ) -> Result<(), CopyError> {
        let order = folio.order();
        self.check_fit(i, part, order)?;
        // SAFETY: The folio is of a `DevPagemap`, and we own its lock, by the invariants of
        // `LockedDeviceFolio`. The result does not outlive `folio`.
        let mut to = unsafe { DevicePages::new_folio(folio.page().as_non_null(), order) };
        let copied = match self.part(i, part) {
            None => self.memory.clear(&mut to),
            Some(page) if self.holes => {
                // SAFETY: With `holes` core mm selects system memory only, which the CPU reaches. The source
                // is locked, unmapped and referenced by the type invariants of `Migration`, and
                // `check_fit()` says that it has so many pages.
                let mut from = unsafe { CpuPages::from_raw(page, order) };
                self.map(&mut from, DataDirection::ToDevice)
                    .and_then(|()| self.memory.copy_in(&mut to, &from))
            }
            // The copy would be one between two devices.
            Some(_) => Err(CopyError::Mismatch),
        };
        self.check_copied(copied)?;
        to.fill_backing();
        // SAFETY: `check_fit()` says that the folio suits the source, which was copied above. The lock and a
        // reference are those of `folio`.
        unsafe { self.set_destination(i, part, folio.into_raw(), order) };
        Ok(())
    }

    /// As [`Migration::copy_to_device`], in the other direction, by [`DeviceMemory::copy_out`]. May sleep. Pages that
    /// were selected in system memory
    /// are a source for this, too, if they are anonymous. Some kernels do not split a folio of a list of device
    /// pages: it stays where it is then.
    ///
    /// # Errors
    ///
    /// As [`Migration::copy_to_device`].
    pub(crate) fn copy_to_system(
        &mut self,
        i: usize,
        part: usize,
        folio: SystemFolio,
    ) -> Result<(), CopyError> {
        let order = folio.order();
        self.check_fit(i, part, order)?;
        // SAFETY: The folio is of this order, and no other value refers to it, by the invariants of
        // `SystemFolio`. The result does not outlive `folio`.
        let mut to = unsafe { CpuPages::new_folio(folio.as_non_null(), order) };
        let copied = match self.part(i, part) {
            None => {
                to.clear();
                Ok(())
            }
            // Core mm would move a folio of a file without the private data of the file system.
            Some(_) if self.holes && !self.is_anon(i) => Err(CopyError::Mismatch),
            Some(page) if self.holes => {
                // SAFETY: With `holes` core mm selects system memory only, which the CPU reaches. The source
                // is locked, unmapped and referenced by the type invariants of `Migration`, and
                // `check_fit()` says that it has so many pages.
                to.copy_from(&unsafe { CpuPages::from_raw(page, order) })
            }
            Some(page) => {
                // SAFETY: Without `holes` core mm selects pages of a `PgmapOwner`, or those that a
                // `DevicePfns` lists: both are of a `DevPagemap`. The source is locked, unmapped and
                // referenced by the type invariants of `Migration`, and `check_fit()` says that it has so
                // many pages.
                let from = unsafe { DevicePages::from_raw(page, order) };
                self.map(&mut to, DataDirection::FromDevice)
                    .and_then(|()| self.memory.copy_out(&mut to, &from))
            }
        };
        self.check_copied(copied)?;
        to.fill_rest();
        let page = folio.into_raw();
        // SAFETY: No other value refers to the folio, by the type invariants of `SystemFolio`, so the lock is free.
        unsafe { struct_page::set_locked(page) };
        // SAFETY: `check_fit()` says that the folio suits the source, which was copied above. It was locked
        // above, and the reference is that of `folio`.
        unsafe { self.set_destination(i, part, page, order) };
        Ok(())
    }

    /// Makes a large hole, at entry `i`, one of small holes, so that each of them gets a destination
    /// of its own or none. Does nothing where there is no large hole. May sleep, to free destinations.
    ///
    /// # Examples
    ///
    /// ```
    /// use kernel::mm::migrate::migration::{Area, Migration, PfnBuffer, Request, MAX_PAGES};
    /// # use kernel::mm::{
    /// #     kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range},
    /// #     user::range::PageRange,
    /// # };
    /// # use kernel::page::PAGE_SIZE;
    /// # let device = EmulatedDevice::new()?;
    /// # let start = anon_range(2 * MAX_PAGES)?.start().next_multiple_of(MAX_PAGES * PAGE_SIZE);
    /// # let block = PageRange::new(start, MAX_PAGES)?;
    /// # let task = current!();
    /// # let mm = task.mm().ok_or(EINVAL)?;
    /// # let mut buffer = PfnBuffer::new(MAX_PAGES)?;
    /// # let mmap = mm.mmap_read_lock();
    /// # let area = Area::lookup(&mmap, start).ok_or(EFAULT)?;
    ///
    /// let request = Request { large: true, ..Request::system(area, block, device.owner()) };
    /// let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
    /// // The device has no large folio: the hole takes small ones, and need not be filled.
    /// migration.split_hole(0);
    /// for i in 0..2 {
    ///     migration.copy_to_device(i, 0, device.alloc(0)?).map_err(|_| EINVAL)?;
    /// }
    /// assert_eq!(migration.copied()?.moved().pages, 2);
    /// # drop(mmap);
    /// # Ok::<(), Error>(())
    /// ```
    pub(crate) fn split_hole(&mut self, i: usize) {
        let Some(order) = self.source(i) else { return };
        if order > 0 && self.is_hole(i) {
            for entry in i..self.len().min(i + (1 << order)) {
                self.drop_destination(entry);
                self.set_src(entry, bindings::MIGRATE_PFN_MIGRATE);
            }
        }
    }

    /// Calls `alloc` with the order of each source, and makes the result its destination on the device. A source
    /// that cannot be copied stays where it is. May sleep.
    ///
    /// # Errors
    ///
    /// Those of `alloc`.
    pub(crate) fn fill_device(
        &mut self,
        mut alloc: impl FnMut(u32) -> Result<LockedDeviceFolio>,
    ) -> Result {
        for i in 0..self.len() {
            if let Some(order) = self.source(i) {
                let _ = self.copy_to_device(i, 0, alloc(order)?);
            }
        }
        Ok(())
    }

    /// As [`Migration::fill_device`], with folios of system memory. May sleep.
    ///
    /// # Errors
    ///
    /// Those of `alloc`.
    pub(crate) fn fill_system(
        &mut self,
        mut alloc: impl FnMut(u32) -> Result<SystemFolio>,
    ) -> Result {
        for i in 0..self.len() {
            if let Some(order) = self.source(i) {
                let _ = self.copy_to_system(i, 0, alloc(order)?);
            }
        }
        Ok(())
    }

    /// Whether the source at `i` has a page `part` that a folio of `order` can take.
    ///
    /// Core mm follows the destination of every page of a large hole as soon as the first one is
    /// small, whether there is one or not. Some kernels split a folio of the page cache as if it were anonymous.
    #[inline]
    fn check_fit(&self, i: usize, part: usize, order: u32) -> Result<(), CopyError> {
        // Most sources are small pages of an area.
        if order == 0 && part == 0 && self.is_small_page(i) {
            return Ok(());
        }
        self.check_other_fit(i, part, order)
    }

    fn check_other_fit(&self, i: usize, part: usize, order: u32) -> Result<(), CopyError> {
        let source = self.source(i).ok_or(CopyError::Mismatch)?;
        let whole = order == source && part == 0;
        let piece = order == 0 && part < 1 << source && self.is_anon(i);
        if (whole || piece) && i + part + (1 << order) <= self.len() {
            Ok(())
        } else {
            Err(CopyError::Mismatch)
        }
    }

    /// Whether the source at `i` is an anonymous folio.
    fn is_anon(&self, i: usize) -> bool {
        self.page_of(self.src(i)).is_some_and(|page| {
            // SAFETY: The source is locked and referenced by the type invariants of `Migration`.
            let mapping = unsafe { struct_page::mapping(page.as_ptr()) };
            mapping & bindings::FOLIO_MAPPING_ANON as usize != 0
        })
    }

    /// Page `part` of the source at `i`; `None` for a hole.
    #[inline]
    fn part(&self, i: usize, part: usize) -> Option<NonNull<bindings::page>> {
        let page = self.page_of(self.src(i))?;
        // Pages of a folio have struct pages in a row.
        NonNull::new(page.as_ptr().wrapping_add(part))
    }

    /// Maps `pages` until the fence, for an engine that wants that.
    #[inline]
    fn map(&mut self, pages: &mut CpuPages<'_>, direction: DataDirection) -> Result<(), CopyError> {
        let memory = self.memory;
        match memory.dma_device() {
            Some(dev) => self.map_for(dev, pages, direction),
            None => Ok(()),
        }
    }

    fn map_for(
        &mut self,
        dev: &Device<Bound>,
        pages: &mut CpuPages<'_>,
        direction: DataDirection,
    ) -> Result<(), CopyError> {
        if let Some(promise) = self.memory.overwrites() {
            pages.skip_clearing(promise);
        }
        pages.map_until_fence(dev, direction, &mut self.head_mut().mappings)
    }

    /// Returns the result of a copy. Part of a copy that failed may still be under way, and the destination is
    /// freed next, so that this waits for it.
    #[inline]
    fn check_copied(&mut self, copied: Result<(), CopyError>) -> Result<(), CopyError> {
        if copied.is_err() {
            let _ = self.fence();
        }
        copied
    }
}
