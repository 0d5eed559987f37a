// SPDX-License-Identifier: GPL-2.0

//! The end of a copy that the CPU reaches.
//!
//! A folio that the system has just allocated holds what its last user left there. A page of it that a copy does
//! not write is filled with zeroes before a process can see it.
//!
//! C headers: [`include/linux/highmem.h`](srctree/include/linux/highmem.h),
//! [`include/linux/dma-mapping.h`](srctree/include/linux/dma-mapping.h)

// A driver uses the parts that suit its device. The KUnit cases use all parts.
#![cfg_attr(not(CONFIG_KUNIT = "y"), allow(dead_code))]

use super::mappings::{
    Mapping,
    Mappings, //
};
use crate::{
    bindings,
    mm::PAGE_SIZE, //
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

/// The promise that an engine overwrites the pages that it copies to. Without it the migration fills a new folio
/// with zeroes before the engine can reach it.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::device_memory::{
///     CopyError, CpuPages, DeviceMemory, DevicePages, Overwrites, //
/// };
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
///
/// struct Engine;
///
/// impl DeviceMemory for Engine {
///     fn overwrites(&self) -> Option<Overwrites> {
///         // No promise is made by safe code: pages are cleared first.
///         None
///     }
/// #   fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
/// #         to.copy_from_cpu(from)
/// #     }
/// #   fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
/// #         from.copy_to_cpu(to)
/// #     }
/// #     fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
/// #         to.clear()
/// #     }
/// }
/// # device.migrate_by(range, &Engine, |migration| {
/// #     assert_eq!(migration.moved().pages, 1);
/// #     Ok(())
/// # })?;
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Overwrites(());

impl Overwrites {
    /// Makes the promise.
    ///
    /// # Safety
    ///
    /// An engine must write every byte of the pages that the promise is given for, before
    /// [`DeviceMemory::fence`](super::device_memory::DeviceMemory::fence) returns `Ok`. A process sees what the
    /// pages held before otherwise.
    pub(crate) const unsafe fn promise() -> Self {
        Self(())
    }
}

/// Pages in a row that the CPU reaches, at one end of a copy.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::device_memory::{CopyError, CpuPages, DeviceMemory, DevicePages};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # use kernel::{new_mutex, page::PAGE_SIZE, sync::Mutex, uaccess::{UserPtr, UserSlice}};
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
///
///     fn copy_out(&self, to: &mut CpuPages<'_>, _: &DevicePages<'_>) -> Result<(), CopyError> {
///         let window = self.page.lock();
///         (0..1 << to.order()).try_for_each(|n| to.write_page(n, &window))
///     }
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
/// window.page.lock()[0] = 7;
/// device.evict_by(&*window)?;
/// # let mut byte = [0];
/// # UserSlice::new(UserPtr::from_addr(range.start()), 1).reader().read_slice(&mut byte)?;
/// assert_eq!(byte, [7]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - For `'a` the `1 << order` pages from `page` on are of one folio, which is locked or known to the
///   migration only, and referenced.
/// - A process may see the contents of the first `filled` pages.
pub(crate) struct CpuPages<'a> {
    page: NonNull<bindings::page>,
    order: u32,
    filled: usize,
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
        // INVARIANT: The contract of this function says the same, and a source is memory of a process already.
        Self {
            page,
            order,
            filled: 1 << order,
            dma: None,
            _folio: PhantomData,
        }
    }

    /// As [`CpuPages::from_raw`], of a folio that was just allocated, with any contents.
    ///
    /// # Safety
    ///
    /// As that of [`CpuPages::from_raw`].
    #[inline]
    pub(super) unsafe fn new_folio(page: NonNull<bindings::page>, order: u32) -> Self {
        // INVARIANT: No page counts as filled.
        Self {
            filled: 0,
            // SAFETY: The contract of this function is the same.
            ..unsafe { Self::from_raw(page, order) }
        }
    }

    /// Fills the pages with zeroes that were not written to. May sleep.
    #[inline]
    pub(super) fn fill_rest(&mut self) {
        if self.filled < 1 << self.order {
            self.fill_to(1 << self.order);
        }
    }

    /// As [`CpuPages::fill_rest`], of the pages before page `end`, which is not beyond the last one.
    #[cold]
    fn fill_to(&mut self, end: usize) {
        for n in self.filled..end {
            if let Some(page) = self.nth(n) {
                // SAFETY: The page is one of the folio by the type invariants of `CpuPages`.
                unsafe { bindings::zdm_clear_highpage(page.as_ptr()) };
            }
        }
        // INVARIANT: Cleared above.
        self.filled = self.filled.max(end);
    }

    /// Leaves the contents of the pages to an engine, which overwrites them: they are not cleared when they are mapped
    /// from here on, nor after the copy.
    pub(crate) fn skip_clearing(&mut self, _promise: Overwrites) {
        // INVARIANT: The engine overwrites the pages, as `Overwrites` promises.
        self.filled = 1 << self.order;
    }

    /// Maps the pages for `dev` until `mappings` are unmapped. May sleep.
    pub(super) fn map_until_fence(
        &mut self,
        dev: &Device<Bound>,
        direction: DataDirection,
        mappings: &mut Mappings,
    ) -> Result<(), CopyError> {
        // The engine may write less than it should.
        self.fill_rest();
        // SAFETY: There are so many pages by the type invariants of `CpuPages`.
        let mapped = unsafe { mappings.map(dev, self.page, self.order, direction) };
        self.dma = Some(mapped.map_err(|_| CopyError::Device)?);
        Ok(())
    }

    /// The address at which the device of
    /// [`DeviceMemory::dma_device`](super::device_memory::DeviceMemory::dma_device) reaches the pages until the fence.
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

    /// Copies `buf` to page `n`. May sleep. Pages of a new folio that are left out are filled with zeroes.
    ///
    /// # Errors
    ///
    /// As [`CpuPages::read_page`].
    pub(crate) fn write_page(&mut self, n: usize, buf: &[u8; PAGE_SIZE]) -> Result<(), CopyError> {
        let page = self.nth(n).ok_or(CopyError::Mismatch)?;
        if n > self.filled {
            self.fill_to(n);
        }
        // SAFETY: The page is one of the folio by the type invariants of `CpuPages`, and `buf` is as long.
        let ret = unsafe { bindings::zdm_write_page(page.as_ptr(), buf.as_ptr().cast()) };
        to_result(ret).map_err(|_| CopyError::Poisoned)?;
        // INVARIANT: The pages before page `n` were filled above, and page `n` now has the contents of `buf`.
        self.filled = self.filled.max(n + 1);
        Ok(())
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

    /// As [`CpuPages::dma_map_to_device`], for a device that writes to the pages: `DMA_FROM_DEVICE`. Pages of a new
    /// folio are filled with zeroes first, unless [`CpuPages::skip_clearing`] was called. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when the device cannot reach the pages.
    pub(crate) fn dma_map_from_device<'d>(
        &'d mut self,
        dev: &'d Device<Bound>,
    ) -> Result<DmaPages<'d>> {
        self.fill_rest();
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
        unsafe { self.fill_by(from.page, bindings::zdm_copy_mc_highpage) }
    }

    /// Copies as many pages as there are, from `from` on, by `copy_page`. May sleep.
    ///
    /// # Safety
    ///
    /// As that of [`copy`] for `from`.
    #[inline]
    pub(super) unsafe fn fill_by(
        &mut self,
        from: NonNull<bindings::page>,
        copy_page: unsafe extern "C" fn(*mut bindings::page, *mut bindings::page) -> c_int,
    ) -> Result<(), CopyError> {
        // SAFETY: There are `1 << order` pages here by the type invariants of `CpuPages`, and as many at `from` by
        // the contract of this function.
        unsafe { copy(self.page, from, self.order, copy_page) }?;
        // INVARIANT: Copied above.
        self.filled = 1 << self.order;
        Ok(())
    }

    /// The first page.
    #[inline]
    pub(super) fn first(&self) -> NonNull<bindings::page> {
        self.page
    }

    /// Fills the pages with zeroes. May sleep.
    #[inline]
    pub(super) fn clear(&mut self) {
        // SAFETY: There are `1 << order` pages by the type invariants of `CpuPages`.
        unsafe { clear(self.page, self.order) };
        // INVARIANT: Cleared above.
        self.filled = 1 << self.order;
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

/// Copies `1 << order` pages, each by `copy_page`, which is not 0 where the kernel cannot read it. May
/// sleep.
///
/// # Safety
///
/// There must be that many valid pages in a row at both ends. `copy_page` must be a function that copies
/// from such a page as `from` is one of.
#[inline]
pub(super) unsafe fn copy(
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
pub(super) unsafe fn clear(page: NonNull<bindings::page>, order: u32) {
    for n in 0..1 << order {
        // SAFETY: There are so many pages by the contract of this function.
        let page = unsafe { page.as_ptr().add(n) };
        // SAFETY: The page is valid by the contract of this function.
        unsafe { bindings::zdm_clear_highpage(page) };
    }
}

#[kunit_tests(zdmirror_cpu_pages)]
mod tests {
    use super::*;
    use crate::mm::page::system_folio::SystemFolio;

    /// The first byte of each page.
    fn bytes(pages: &CpuPages<'_>) -> Result<[u8; 4]> {
        let mut bytes = [0xff; 4];
        let mut buf = KBox::new([0; PAGE_SIZE], GFP_KERNEL)?;
        for (n, byte) in bytes.iter_mut().enumerate() {
            pages.read_page(n, &mut buf).map_err(|_| EIO)?;
            *byte = buf[0];
        }
        Ok(bytes)
    }

    #[test]
    fn pages_that_are_left_out_are_cleared() -> Result {
        let folio = SystemFolio::alloc(2)?;
        let page = KBox::new([7; PAGE_SIZE], GFP_KERNEL)?;
        // The pages that are written, and what all four hold then.
        let cases: [(&[usize], [u8; 4]); 5] = [
            (&[], [0, 0, 0, 0]),
            (&[2], [0, 0, 7, 0]),
            (&[3, 0], [7, 0, 0, 7]),
            (&[0, 1, 2, 3], [7, 7, 7, 7]),
            (&[1, 4], [0, 7, 0, 0]),
        ];
        for (written, expected) in cases {
            // SAFETY: The folio is of this order, and no other value refers to it.
            let mut old = unsafe { CpuPages::from_raw(folio.as_non_null(), 2) };
            for n in 0..4 {
                old.write_page(n, &[9; PAGE_SIZE]).map_err(|_| EIO)?;
            }
            // SAFETY: The folio is of this order, and no other value refers to it.
            let mut new = unsafe { CpuPages::new_folio(folio.as_non_null(), 2) };
            for &n in written {
                assert_eq!(new.write_page(n, &page).is_ok(), n < 4);
            }
            new.fill_rest();
            assert_eq!(bytes(&new)?, expected);
        }
        // An engine that promises to overwrite the pages finds them as they were.
        // SAFETY: The folio is of this order, and no other value refers to it.
        let mut new = unsafe { CpuPages::new_folio(folio.as_non_null(), 2) };
        // SAFETY: No process gets the folio.
        new.skip_clearing(unsafe { Overwrites::promise() });
        new.fill_rest();
        assert_eq!(bytes(&new)?, [0, 7, 0, 0]);
        Ok(())
    }
}
