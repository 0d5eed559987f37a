// SPDX-License-Identifier: GPL-2.0

//! The trait of a device's memory, which copies its bytes, and the two ends of a copy.
//!
//! A [`Migration`](super::migration::Migration) decides which pages move. The driver's [`DeviceMemory`]
//! moves their bytes, by the CPU or by an engine of the device.
//!
//! C header: [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

// A driver uses the parts that suit its device. The KUnit cases use all parts.
#![cfg_attr(not(CONFIG_KUNIT = "y"), allow(dead_code))]

use super::cpu_pages::{
    clear,
    copy, //
};
use crate::{
    bindings,
    mm::page::{
        backing::contents,
        struct_page, //
    },
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    prelude::*, //
};

pub(crate) use super::cpu_pages::{
    CopyError,
    CpuPages,
    DmaPages,
    Overwrites, //
};

/// The memory of a device, as migrations copy to and from it.
///
/// A copy may go on after the function that began it has returned. The migration keeps both ends
/// locked and allocated until [`DeviceMemory::fence`] has returned, and mapped for [`DeviceMemory::dma_device`].
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::device_memory::{CopyError, CpuPages, DeviceMemory, DevicePages};
///
/// struct Emulated;
///
/// impl DeviceMemory for Emulated {
///     fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
///         to.copy_from_cpu(from)
///     }
///
///     fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
///         from.copy_to_cpu(to)
///     }
///
///     fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
///         to.clear()
///     }
/// }
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # touch(range.first(1))?;
/// # device.migrate_by(range, &Emulated, |migration| {
/// #     assert_eq!(migration.moved().pages, 2);
/// #     Ok(())
/// # })?;
/// # Ok::<(), Error>(())
/// ```
pub(crate) trait DeviceMemory {
    /// Begins to copy `from` to the device. Both ends have the same order. May sleep.
    ///
    /// A [`Backing`](crate::mm::page::backing::Backing) that nothing was copied to is filled with zeroes afterwards.
    ///
    /// # Errors
    ///
    /// [`CopyError::Device`] when the device cannot copy now, or the error of the function that copies. The source stays
    /// where it is then. The same holds for the other functions.
    fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError>;

    /// Begins to copy `from`, on the device, to memory that the CPU reaches. Both ends have the same
    /// order. May sleep. Pages that nothing was copied to are filled with zeroes afterwards.
    fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError>;

    /// Begins to fill `to` with zeroes. May sleep.
    fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError>;

    /// The device whose engine goes on to copy after the functions above have returned. The migration maps the
    /// other end of each copy for it, [`CpuPages::dma_address`], until [`DeviceMemory::fence`] has returned.
    ///
    /// `None`, as by default, where no copy goes on, or where the functions map the pages themselves.
    #[inline]
    fn dma_device(&self) -> Option<&Device<Bound>> {
        None
    }

    /// The promise that the engine of [`DeviceMemory::dma_device`] overwrites all pages of `to` in each
    /// [`DeviceMemory::copy_out`] that succeeds. `None`, as by default, has the migration fill them with zeroes
    /// before it maps them for the engine.
    #[inline]
    fn overwrites(&self) -> Option<Overwrites> {
        None
    }

    /// Waits until no copy is under way that was begun before, also where it returns an error, which says
    /// that contents did not arrive. After an error the migration puts all pages back. May sleep.
    ///
    /// A migration calls this once before core mm moves the pages, and before the migration frees
    /// an end of a copy.
    #[inline]
    fn fence(&self) -> Result {
        Ok(())
    }
}

/// Pages in a row of a device folio, at one end of a copy.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::device_memory::{CopyError, CpuPages, DeviceMemory, DevicePages};
/// # use kernel::{
/// #     mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}},
/// #     page::PAGE_SIZE,
/// # };
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # touch(range)?;
///
/// /// Page frames of the device are in a row, from this one on.
/// struct Vram {
///     first_pfn: usize,
/// }
///
/// impl DeviceMemory for Vram {
///     fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
///         // Where the bytes go, seen from the device.
///         let offset = (to.pfn() - self.first_pfn) * PAGE_SIZE;
///         assert!(offset + (PAGE_SIZE << to.order()) <= 2 << 20);
///         to.copy_from_cpu(from)
///     }
/// #   fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
/// #         from.copy_to_cpu(to)
/// #     }
/// #     fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
/// #         to.clear()
/// #     }
/// }
///
/// let vram = Vram { first_pfn: device.memory().first_pfn() };
/// device.migrate_by(range, &vram, |migration| {
///     assert_eq!(migration.moved().pages, 1);
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - For `'a` the `1 << order` pages from `page` on are of one folio of a
///   [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap), which is locked and referenced.
/// - If `filled` is set a process may see what the backing of the pages holds, if there is one.
pub(crate) struct DevicePages<'a> {
    page: NonNull<bindings::page>,
    order: u32,
    filled: bool,
    _folio: PhantomData<&'a ()>,
}

impl DevicePages<'_> {
    /// # Safety
    ///
    /// For the lifetime that the caller picks the `1 << order` pages from `page` on must be of a folio of a
    /// [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap) that no task frees or splits.
    #[inline]
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>, order: u32) -> Self {
        // INVARIANT: The contract of this function says the same, and a source is memory of a process already.
        Self {
            page,
            order,
            filled: true,
            _folio: PhantomData,
        }
    }

    /// As [`DevicePages::from_raw`], of a folio that was just allocated, whose backing has any contents.
    ///
    /// # Safety
    ///
    /// As that of [`DevicePages::from_raw`].
    #[inline]
    pub(super) unsafe fn new_folio(page: NonNull<bindings::page>, order: u32) -> Self {
        // INVARIANT: Nothing counts as filled.
        Self {
            filled: false,
            // SAFETY: The contract of this function is the same.
            ..unsafe { Self::from_raw(page, order) }
        }
    }

    /// Fills the backing with zeroes if nothing was copied to it. Memory of the device itself is left to its
    /// driver. May sleep.
    #[inline]
    pub(super) fn fill_backing(&mut self) {
        if !self.filled {
            self.fill_empty_backing();
        }
    }

    #[cold]
    fn fill_empty_backing(&mut self) {
        // SAFETY: The page is in use, and its folio whole, by the type invariants of `DevicePages`.
        if unsafe { struct_page::is_private(self.page.as_ptr()) } {
            // Without a backing there is nothing to be filled.
            let _ = self.clear();
        }
    }

    /// Number of the first page frame. A device with memory of its own computes its address from the
    /// number in the pagemap, [`DevPagemap::index_of_pfn`](crate::mm::pagemap::dev_pagemap::DevPagemap::index_of_pfn).
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The page is valid by the type invariants of `DevicePages`.
        unsafe { bindings::zdm_page_to_pfn(self.page.as_ptr()) }
    }

    /// There are `1 << order` pages.
    #[inline]
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// The first page that the CPU finds the contents in: the page itself, or its backing.
    #[inline]
    fn contents(&self) -> Result<NonNull<bindings::page>, CopyError> {
        // SAFETY: The page is of a `DevPagemap`, and no task frees or splits its folio, by the type
        // invariants of `DevicePages`.
        NonNull::new(unsafe { contents(self.page.as_ptr()) }).ok_or(CopyError::Mismatch)
    }

    /// Copies `from` by the CPU. May sleep.
    ///
    /// # Errors
    ///
    /// [`CopyError::Mismatch`] where the CPU does not reach the contents, as a PRIVATE folio has no
    /// [`Backing`](crate::mm::page::backing::Backing), or where the orders differ.
    #[inline]
    pub(crate) fn copy_from_cpu(&mut self, from: &CpuPages<'_>) -> Result<(), CopyError> {
        let to = self.contents()?;
        if self.order != from.order() {
            return Err(CopyError::Mismatch);
        }
        // SAFETY: There are `1 << order` pages at `from` by the type invariants of `CpuPages`, and as many
        // hold the contents of a `DevicePages` of the order.
        unsafe { copy(to, from.first(), self.order, bindings::zdm_copy_mc_highpage) }?;
        // INVARIANT: Copied above.
        self.filled = true;
        Ok(())
    }

    /// Copies the pages to `to` by the CPU. May sleep.
    ///
    /// # Errors
    ///
    /// As [`DevicePages::copy_from_cpu`]; [`CopyError::Poisoned`] where the hardware has lost the contents.
    #[inline]
    pub(crate) fn copy_to_cpu(&self, to: &mut CpuPages<'_>) -> Result<(), CopyError> {
        let from = self.contents()?;
        if self.order != to.order() {
            return Err(CopyError::Mismatch);
        }
        // SAFETY: As many pages as those of `to` hold the contents of a `DevicePages` of the order.
        unsafe { to.fill_by(from, bindings::zdm_copy_device_page) }
    }

    /// Fills the pages with zeroes by the CPU. May sleep.
    ///
    /// # Errors
    ///
    /// [`CopyError::Mismatch`] where the CPU does not reach the contents.
    #[inline]
    pub(crate) fn clear(&mut self) -> Result<(), CopyError> {
        let to = self.contents()?;
        // SAFETY: As many pages hold the contents of a `DevicePages` of the order.
        unsafe { clear(to, self.order) };
        // INVARIANT: Cleared above.
        self.filled = true;
        Ok(())
    }
}
