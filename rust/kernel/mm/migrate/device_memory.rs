// SPDX-License-Identifier: GPL-2.0

//! The trait of a device's memory, which copies its bytes, and the two ends of a copy.
//!
//! A [`Migration`](super::migration::Migration) decides which pages move. The driver's [`DeviceMemory`]
//! moves their bytes, by the CPU or by an engine of the device.
//!
//! C headers: [`include/linux/migrate.h`](srctree/include/linux/migrate.h),
//! [`include/linux/dma-mapping.h`](srctree/include/linux/dma-mapping.h)

// A driver uses the parts that suit its device. The KUnit cases of `device_memory_kunit.rs` use all parts.
#![cfg_attr(not(CONFIG_KUNIT = "y"), allow(dead_code))]

use super::mappings::{
    Mapping,
    Mappings, //
};
use crate::{
    bindings,
    mm::{
        page::backing::contents,
        PAGE_SIZE, //
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
    dma::{
        DataDirection,
        DmaAddress, //
    },
    error::to_result,
    prelude::*, //
};

/// Why a folio did not become a destination. The folio was freed.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::device_memory::{CopyError, CpuPages, DeviceMemory, DevicePages};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # touch(range)?;
///
/// struct Broken;
///
/// impl DeviceMemory for Broken {
///     fn copy_in(&self, _: &mut DevicePages<'_>, _: &CpuPages<'_>) -> Result<(), CopyError> {
///         Err(CopyError::Device)
///     }
/// #     fn copy_out(&self, _: &mut CpuPages<'_>, _: &DevicePages<'_>) -> Result<(), CopyError> {
/// #         Err(CopyError::Device)
/// #     }
/// #     fn clear(&self, _: &mut DevicePages<'_>) -> Result<(), CopyError> {
/// #         Err(CopyError::Device)
/// #     }
/// }
///
/// // The page stays where it is.
/// device.migrate_by(range, &Broken, |migration| {
///     assert_eq!(migration.moved().pages, 0);
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyError {
    /// There is no such source, or source and destination do not fit each other.
    Mismatch,
    /// The kernel cannot read the source, which stays where it is: the hardware has lost the
    /// contents, or they are secret.
    Poisoned,
    /// The device cannot copy now. The source stays where it is.
    Device,
}

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
    fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError>;

    /// Begins to copy `from`, on the device, to memory that the CPU reaches. Both ends have the same
    /// order. May sleep.
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

/// Pages in a row that the CPU reaches, at one end of a copy.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::device_memory::{CopyError, CpuPages, DeviceMemory, DevicePages};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # use kernel::{new_mutex, page::PAGE_SIZE, sync::Mutex};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # touch(range)?;
///
/// /// A device that has a window of one page to its memory.
/// #[pin_data]
/// struct Window {
///     #[pin]
///     page: Mutex<KBox<[u8; PAGE_SIZE]>>,
/// }
///
/// impl DeviceMemory for Window {
///     fn copy_in(&self, _: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
///         let mut window = self.page.lock();
///         for n in 0..1 << from.order() {
///             from.read_page(n, &mut window)?;
///         }
///         Ok(())
///     }
/// #   fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
/// #         from.copy_to_cpu(to)
/// #     }
/// #     fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
/// #         to.clear()
/// #     }
/// }
///
/// # let page = KBox::new([0; PAGE_SIZE], GFP_KERNEL)?;
/// # let window = KBox::pin_init(pin_init!(Window { page <- new_mutex!(page) }), GFP_KERNEL)?;
/// device.migrate_by(range, &*window, |migration| {
///     assert_eq!(migration.moved().pages, 1);
///     Ok(())
/// })?;
/// // The CPU wrote the first byte.
/// assert_eq!(window.page.lock()[0], 1);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// For `'a` the `1 << order` pages from `page` on are of one folio, which is locked or known to the
/// migration only, and referenced.
pub(crate) struct CpuPages<'a> {
    page: NonNull<bindings::page>,
    order: u32,
    dma: Option<DmaAddress>,
    _folio: PhantomData<&'a ()>,
}

impl CpuPages<'_> {
    /// # Safety
    ///
    /// For the lifetime that the caller picks the `1 << order` pages from `page` on must be of a folio that
    /// the CPU reaches, that no task frees or splits, and that no task writes to.
    #[inline]
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>, order: u32) -> Self {
        // INVARIANT: The contract of this function says the same.
        Self {
            page,
            order,
            dma: None,
            _folio: PhantomData,
        }
    }

    /// Maps the pages for `dev`, if there is one, until `mappings` are unmapped. May sleep.
    #[inline]
    pub(super) fn map_until_fence(
        &mut self,
        dev: Option<&Device<Bound>>,
        direction: DataDirection,
        mappings: &mut Mappings,
    ) -> Result<(), CopyError> {
        if let Some(dev) = dev {
            // SAFETY: There are so many pages by the type invariants of `CpuPages`.
            let mapped = unsafe { mappings.map(dev, self.page, self.order, direction) };
            self.dma = Some(mapped.map_err(|_| CopyError::Device)?);
        }
        Ok(())
    }

    /// The address at which [`DeviceMemory::dma_device`] reaches the pages until the fence.
    pub(crate) fn dma_address(&self) -> Option<DmaAddress> {
        self.dma
    }

    /// Number of the first page frame.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The page is valid by the type invariants of `CpuPages`.
        unsafe { bindings::zdm_page_to_pfn(self.page.as_ptr()) }
    }

    /// There are `1 << order` pages.
    #[inline]
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// Page `n`; `None` beyond the end.
    fn nth(&self, n: usize) -> Option<NonNull<bindings::page>> {
        // Pages of a folio have struct pages in a row.
        (n < 1 << self.order).then(|| NonNull::new(self.page.as_ptr().wrapping_add(n)))?
    }

    /// Copies page `n` to `buf`, for a device whose memory the CPU writes in pieces. May sleep.
    ///
    /// # Errors
    ///
    /// [`CopyError::Mismatch`] beyond the end; [`CopyError::Poisoned`] where the kernel cannot read the page,
    /// of which part may be in `buf` then.
    pub(crate) fn read_page(&self, n: usize, buf: &mut [u8; PAGE_SIZE]) -> Result<(), CopyError> {
        let page = self.nth(n).ok_or(CopyError::Mismatch)?;
        // SAFETY: The page is one of the folio by the type invariants of `CpuPages`, and `buf` is as long.
        let ret = unsafe { bindings::zdm_read_page(buf.as_mut_ptr().cast(), page.as_ptr()) };
        to_result(ret).map_err(|_| CopyError::Poisoned)
    }

    /// Copies `buf` to page `n`. May sleep.
    ///
    /// # Errors
    ///
    /// As [`CpuPages::read_page`].
    pub(crate) fn write_page(&mut self, n: usize, buf: &[u8; PAGE_SIZE]) -> Result<(), CopyError> {
        let page = self.nth(n).ok_or(CopyError::Mismatch)?;
        // SAFETY: The page is one of the folio by the type invariants of `CpuPages`, and `buf` is as long.
        let ret = unsafe { bindings::zdm_write_page(page.as_ptr(), buf.as_ptr().cast()) };
        to_result(ret).map_err(|_| CopyError::Poisoned)
    }

    /// Maps the pages for DMA of `dev`, which reads them: `DMA_TO_DEVICE`. May sleep.
    ///
    /// Wraps `dma_map_page()`.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when the device cannot reach the pages.
    pub(crate) fn dma_map_to_device<'d>(&'d self, dev: &'d Device<Bound>) -> Result<DmaPages<'d>> {
        self.dma_map(dev, DataDirection::ToDevice)
    }

    /// As [`CpuPages::dma_map_to_device`], for a device that overwrites the pages: `DMA_FROM_DEVICE`. May sleep.
    pub(crate) fn dma_map_from_device<'d>(
        &'d mut self,
        dev: &'d Device<Bound>,
    ) -> Result<DmaPages<'d>> {
        self.dma_map(dev, DataDirection::FromDevice)
    }

    fn dma_map<'d>(
        &'d self,
        dev: &'d Device<Bound>,
        direction: DataDirection,
    ) -> Result<DmaPages<'d>> {
        Ok(DmaPages {
            // SAFETY: There are so many pages by the type invariants of `CpuPages`.
            mapping: unsafe { Mapping::new(dev, self.page, self.order, direction) }?,
            _dev: PhantomData,
        })
    }

    /// Marks the first page as broken, or as whole again. Only for KUnit cases.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(in crate::mm) fn set_poisoned(&self, poisoned: bool) {
        // SAFETY: The page is valid by the type invariants of `CpuPages`.
        unsafe { bindings::zdm_kunit_set_poisoned(self.page.as_ptr(), poisoned) };
    }

    /// Copies `from` by the CPU, page by page. May sleep.
    #[inline]
    pub(super) fn copy_from(&mut self, from: &CpuPages<'_>) -> Result<(), CopyError> {
        if self.order != from.order {
            return Err(CopyError::Mismatch);
        }
        // SAFETY: There are `1 << order` pages at both ends by the type invariants of `CpuPages`.
        unsafe {
            copy(
                self.page,
                from.page,
                self.order,
                bindings::zdm_copy_mc_highpage,
            )
        }
    }

    /// Fills the pages with zeroes. May sleep.
    #[inline]
    pub(super) fn clear(&mut self) {
        // SAFETY: There are `1 << order` pages by the type invariants of `CpuPages`.
        unsafe { clear(self.page, self.order) };
    }
}

/// Pages of a [`CpuPages`] that a device reaches by DMA. Dropping it unmaps the pages, which must be
/// after the device has copied.
///
/// # Examples
///
/// ```
/// use kernel::{
///     device::{Bound, Device},
///     mm::migrate::device_memory::{CopyError, CpuPages, DeviceMemory, DevicePages},
/// };
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch, KunitDevice}};
/// # use kernel::page::PAGE_SIZE;
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # touch(range)?;
///
/// struct Engine<'a>(&'a Device<Bound>);
///
/// impl DeviceMemory for Engine<'_> {
///     fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
///         let dma = from
///             .dma_map_to_device(self.0)
///             .map_err(|_| CopyError::Device)?;
///         // The engine would copy `dma.bytes()` bytes from `dma.address()`, and be waited for.
///         assert_eq!(dma.bytes(), PAGE_SIZE << from.order());
///         assert_eq!(dma.address() % PAGE_SIZE as u64, 0);
///         drop(dma);
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
/// # let platform = KunitDevice::new()?;
/// # device.migrate_by(range, &Engine(platform.device()), |migration| {
/// #     assert_eq!(migration.moved().pages, 1);
/// #     Ok(())
/// # })?;
/// # Ok::<(), Error>(())
/// ```
///
/// A mapping that is forgotten stays, and its device may go on to use the pages.
pub(crate) struct DmaPages<'a> {
    mapping: Mapping,
    _dev: PhantomData<&'a Device<Bound>>,
}

impl DmaPages<'_> {
    /// The address that the device uses.
    pub(crate) fn address(&self) -> DmaAddress {
        self.mapping.address()
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.mapping.bytes()
    }
}

impl Drop for DmaPages<'_> {
    fn drop(&mut self) {
        // SAFETY: `self` borrows the device, which is bound meanwhile, and the mapping is not used afterwards.
        unsafe { self.mapping.unmap() };
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
/// For `'a` the `1 << order` pages from `page` on are of one folio of a
/// [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap), which is locked and referenced.
pub(crate) struct DevicePages<'a> {
    page: NonNull<bindings::page>,
    order: u32,
    _folio: PhantomData<&'a ()>,
}

impl DevicePages<'_> {
    /// # Safety
    ///
    /// For the lifetime that the caller picks the `1 << order` pages from `page` on must be of a folio of a
    /// [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap) that no task frees or splits.
    #[inline]
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>, order: u32) -> Self {
        // INVARIANT: The contract of this function says the same.
        Self {
            page,
            order,
            _folio: PhantomData,
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
        if self.order != from.order {
            return Err(CopyError::Mismatch);
        }
        // SAFETY: There are `1 << order` pages at `from` by the type invariants of `CpuPages`, and as many
        // hold the contents of a `DevicePages` of the order.
        unsafe { copy(to, from.page, self.order, bindings::zdm_copy_mc_highpage) }
    }

    /// Copies the pages to `to` by the CPU. May sleep.
    ///
    /// # Errors
    ///
    /// As [`DevicePages::copy_from_cpu`]; [`CopyError::Poisoned`] where the hardware has lost the contents.
    #[inline]
    pub(crate) fn copy_to_cpu(&self, to: &mut CpuPages<'_>) -> Result<(), CopyError> {
        let from = self.contents()?;
        if self.order != to.order {
            return Err(CopyError::Mismatch);
        }
        // SAFETY: There are `1 << order` pages at `to` by the type invariants of `CpuPages`, and as many
        // hold the contents of a `DevicePages` of the order.
        unsafe { copy(to.page, from, self.order, bindings::zdm_copy_device_page) }
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
        Ok(())
    }
}

/// Copies `1 << order` pages, each by `copy_page`, which is not 0 where the kernel cannot read it. May
/// sleep.
///
/// # Safety
///
/// There must be that many valid pages in a row at both ends. `copy_page` must be a function that copies
/// from such a page as `from` is one of.
#[inline]
unsafe fn copy(
    to: NonNull<bindings::page>,
    from: NonNull<bindings::page>,
    order: u32,
    copy_page: unsafe extern "C" fn(*mut bindings::page, *mut bindings::page) -> c_int,
) -> Result<(), CopyError> {
    for n in 0..1 << order {
        // SAFETY: There are so many pages at `to` by the contract of this function.
        let to = unsafe { to.as_ptr().add(n) };
        // SAFETY: There are so many pages at `from` by the contract of this function.
        let from = unsafe { from.as_ptr().add(n) };
        // SAFETY: Both pages are valid by the contract of this function.
        if unsafe { copy_page(to, from) } != 0 {
            return Err(CopyError::Poisoned);
        }
    }
    Ok(())
}

/// Fills `1 << order` pages with zeroes. May sleep.
///
/// # Safety
///
/// There must be that many valid pages in a row.
#[inline]
unsafe fn clear(page: NonNull<bindings::page>, order: u32) {
    for n in 0..1 << order {
        // SAFETY: There are so many pages by the contract of this function.
        let page = unsafe { page.as_ptr().add(n) };
        // SAFETY: The page is valid by the contract of this function.
        unsafe { bindings::zdm_clear_highpage(page) };
    }
}
