// SPDX-License-Identifier: GPL-2.0

//! Mappings of pages for DMA.
//!
//! C header: [`include/linux/dma-mapping.h`](srctree/include/linux/dma-mapping.h)

use crate::{
    bindings,
    mm::PAGE_SHIFT, //
};
use core::ptr::NonNull;
use kernel::{
    device::{
        Bound,
        Device, //
    },
    dma::{
        DataDirection,
        DmaAddress, //
    },
    prelude::*, //
};

/// Pages in a row that a device reaches at an address of its own. Dropping the value does not unmap them.
///
/// # Invariants
///
/// `address` is a mapping of `bytes` bytes for `dev` that was not unmapped yet, made while `dev` was bound.
pub(super) struct Mapping {
    // `Device` is a transparent wrapper of `struct device`.
    dev: *mut bindings::device,
    address: DmaAddress,
    bytes: usize,
    direction: DataDirection,
}

impl Mapping {
    /// Wraps `dma_map_page()`. May sleep. `direction` is one in which data goes: core DMA code takes `DMA_NONE`
    /// for a bug of the kernel.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when the device cannot reach the pages.
    ///
    /// # Safety
    ///
    /// There must be `1 << order` pages in a row from `page` on.
    pub(super) unsafe fn new(
        dev: &Device<Bound>,
        page: NonNull<bindings::page>,
        order: u32,
        direction: DataDirection,
    ) -> Result<Self> {
        let dev: *mut bindings::device = core::ptr::from_ref(dev).cast_mut().cast();
        let bytes = 1 << order << PAGE_SHIFT;
        // SAFETY: `dev` is bound to a driver while it is borrowed. The pages are in a row, by the contract of
        // this function.
        let address = unsafe {
            bindings::dma_map_page_attrs(dev, page.as_ptr(), 0, bytes, direction.into(), 0)
        };
        // SAFETY: `address` was returned by the function for `dev`.
        if unsafe { bindings::zdm_dma_mapping_error(dev, address) } {
            return Err(ENOMEM);
        }
        // INVARIANT: The mapping was made above.
        Ok(Self {
            dev,
            address,
            bytes,
            direction,
        })
    }

    /// The address that the device uses.
    pub(super) fn address(&self) -> DmaAddress {
        self.address
    }

    /// Length in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Unmaps the pages.
    ///
    /// # Safety
    ///
    /// The device must have been bound since the mapping was made. The mapping must not be used afterwards.
    pub(super) unsafe fn unmap(&self) {
        let direction = self.direction.into();
        // SAFETY: The mapping is one of `dev`, of this length, by the type invariants of `Mapping`. `dev` is
        // still bound by the contract of this function.
        unsafe { bindings::dma_unmap_page_attrs(self.dev, self.address, self.bytes, direction, 0) };
    }
}

/// The mappings for copies that were begun and not waited for. Dropping the value does not unmap them.
pub(super) struct Mappings(KVec<Mapping>);

impl Mappings {
    /// None.
    pub(super) const fn new() -> Self {
        Self(KVec::new())
    }

    /// Maps the pages, as [`Mapping::new`], until [`Mappings::unmap`] is called. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when the device cannot reach the pages, or memory is short.
    ///
    /// # Safety
    ///
    /// As [`Mapping::new`].
    pub(super) unsafe fn map(
        &mut self,
        dev: &Device<Bound>,
        page: NonNull<bindings::page>,
        order: u32,
        direction: DataDirection,
    ) -> Result<DmaAddress> {
        // What cannot be kept is not mapped.
        self.0.reserve(1, GFP_KERNEL)?;
        // SAFETY: The contract of this function is the same.
        let mapping = unsafe { Mapping::new(dev, page, order, direction) }?;
        let address = mapping.address;
        self.0.push(mapping, GFP_KERNEL)?;
        Ok(address)
    }

    /// Unmaps all.
    ///
    /// # Safety
    ///
    /// As [`Mapping::unmap`], for each.
    #[inline]
    pub(super) unsafe fn unmap(&mut self) {
        if !self.0.is_empty() {
            // SAFETY: As the contract of this function says.
            unsafe { self.unmap_some() };
        }
    }

    /// # Safety
    ///
    /// As [`Mappings::unmap`].
    #[cold]
    unsafe fn unmap_some(&mut self) {
        for mapping in &self.0 {
            // SAFETY: The device is bound by the contract of this function. The list is cleared below.
            unsafe { mapping.unmap() };
        }
        self.0.clear();
    }

    /// Forgets all mappings, which stay for good.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }
}
