// SPDX-License-Identifier: GPL-2.0

//! Pages that `hmm_range_fault()` found mapped.
//!
//! C headers: [`include/linux/hmm.h`](srctree/include/linux/hmm.h),
//! [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use crate::{
    bindings,
    mm::{
        page::{
            backing::contents,
            device_folio::FolioRef,
            struct_page::{
                self,
                MemMap, //
            },
            view::PageView, //
        },
        region::owner::PgmapOwner,
        PAGE_SHIFT, //
    },
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::prelude::*;

/// An output entry of `hmm_range_fault()`.
#[derive(Clone, Copy)]
pub(super) struct HmmEntry(usize);

impl HmmEntry {
    const VALID: usize = 1 << bindings::HMM_PFN_VALID_BIT;
    const WRITE: usize = 1 << bindings::HMM_PFN_WRITE_BIT;
    const ERROR: usize = 1 << bindings::HMM_PFN_ERROR_BIT;
    const PFN: usize = (1 << bindings::HMM_PFN_FLAGS_BIT) - 1;
    /// The order, in the lowest bits of the flags: as in `hmm_pfn_to_map_order()`.
    const ORDER: u32 = 0x1f;

    /// Input flags that ask for a page to be faulted in.
    pub(super) fn request(write: bool) -> usize {
        // `HMM_PFN_REQ_*` are the bits of the output.
        Self::VALID | if write { Self::WRITE } else { 0 }
    }

    pub(super) fn new(raw: usize) -> Self {
        Self(raw)
    }

    /// Whether there is nothing that could be accessed, now or after a fault.
    pub(super) fn is_error(self) -> bool {
        self.0 & Self::ERROR != 0
    }

    /// Whether there is a page that may be read.
    pub(super) fn is_valid(self) -> bool {
        self.0 & (Self::VALID | Self::ERROR) == Self::VALID
    }

    /// Whether the page may be written.
    pub(super) fn is_writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    /// Whether the entry says the same as `other`, but for the number of the page.
    pub(super) fn is_alike(self, other: Self) -> bool {
        (self.0 ^ other.0) & !Self::PFN == 0
    }

    /// Order of the page table entry that maps the page.
    pub(super) fn order(self) -> u32 {
        // CAST: Only the lowest bits are wanted.
        (self.0 >> bindings::HMM_PFN_FLAGS_BIT) as u32 & Self::ORDER
    }

    /// Pages from `address` on that the entry maps, which maps `address`.
    pub(super) fn pages_from(self, address: usize) -> usize {
        let pages = 1 << self.order();
        pages - ((address >> PAGE_SHIFT) & (pages - 1))
    }
}

/// The kind of memory of a page, as a device sees it. `local` is memory of the device.
///
/// # Examples
///
/// ```
/// use kernel::mm::hmm::{mapped::Memory, snapshot::Seen};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let mirror = device.mirror()?;
///
/// device.migrate(range)?;
/// let mut on_device = [false];
/// mirror.snapshot(range, &mut on_device, |seen| match seen {
///     Seen::Page { memory, .. } => memory == Memory::Private { local: true },
///     Seen::Error | Seen::Absent => false,
/// })?;
/// assert_eq!(on_device, [true]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Any page that the CPU has and no device.
    System,
    /// The zero page, which reads of untouched memory see.
    Zero,
    /// MEMORY_DEVICE_PRIVATE.
    Private {
        /// Of the device that asks.
        local: bool,
    },
    /// MEMORY_DEVICE_COHERENT.
    Coherent {
        /// Of the device that asks.
        local: bool,
    },
    /// MEMORY_DEVICE_GENERIC, also of device-dax.
    Generic {
        /// Of the device that asks.
        local: bool,
    },
}

/// Tells the kinds of memory of many pages, to a device whose memory `owner` owns.
pub(super) struct MemoryKinds<'a> {
    owner: &'a PgmapOwner,
    memmap: MemMap,
    zero: *mut bindings::page,
}

impl<'a> MemoryKinds<'a> {
    pub(super) fn new(owner: &'a PgmapOwner) -> Self {
        Self {
            owner,
            memmap: MemMap::get(),
            // SAFETY: The function returns the address of a page that is always there.
            zero: unsafe { bindings::zdm_zero_page() },
        }
    }

    /// Where the memory of the page of `entry` belongs.
    ///
    /// # Safety
    ///
    /// The entry must be valid, and its page mapped until the call returns.
    #[inline]
    pub(super) unsafe fn holder(&self, entry: HmmEntry) -> Holder {
        let page = self.memmap.page_of(entry.0 & HmmEntry::PFN);
        // SAFETY: The page is mapped by the contract of this function, so that it is in use.
        unsafe { self.holder_of(page) }
    }

    /// Where the memory of `page` belongs.
    ///
    /// # Safety
    ///
    /// The page must be in use until the call returns.
    #[inline]
    unsafe fn holder_of(&self, page: *mut bindings::page) -> Holder {
        // SAFETY: The page is in use by the contract of this function.
        let pgmap = unsafe { struct_page::any_pgmap(page) };
        if pgmap.is_null() && page == self.zero {
            Holder::ZERO
        } else {
            Holder(pgmap as usize)
        }
    }

    /// The kind of memory of a page that `holder` was found for.
    ///
    /// # Safety
    ///
    /// The page must be mapped until the call returns.
    pub(super) unsafe fn of(&self, holder: Holder) -> Memory {
        match holder {
            Holder::NONE => Memory::System,
            Holder::ZERO => Memory::Zero,
            // SAFETY: The pagemap stays, as its page is in use by the contract of this function.
            Holder(pgmap) => unsafe {
                Memory::of_pgmap(pgmap as *const bindings::dev_pagemap, self.owner)
            },
        }
    }
}

/// Where the memory of a page belongs. Pages of the same holder are of the same kind of memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Holder(usize);

impl Holder {
    /// No pagemap: system memory, or no page.
    pub(super) const NONE: Self = Self(0);
    /// The page of zeroes. No pagemap has this address.
    const ZERO: Self = Self(1);
}

impl Memory {
    /// # Safety
    ///
    /// `pfn` must be the number of a page in use.
    pub(in crate::mm) unsafe fn of_pfn(pfn: usize, owner: &PgmapOwner) -> Self {
        let kinds = MemoryKinds::new(owner);
        // SAFETY: The page is in use by the contract of this function.
        unsafe { kinds.of(kinds.holder_of(kinds.memmap.page_of(pfn))) }
    }

    /// # Safety
    ///
    /// `pgmap` must be a pagemap that stays registered until the call returns.
    unsafe fn of_pgmap(pgmap: *const bindings::dev_pagemap, owner: &PgmapOwner) -> Self {
        // SAFETY: The pagemap is registered by the contract of this function.
        let (memory, raw_owner) = unsafe { ((*pgmap).type_, (*pgmap).owner) };
        let local = raw_owner == owner.as_ptr();
        match memory {
            bindings::MEMORY_DEVICE_PRIVATE => Self::Private { local },
            bindings::MEMORY_DEVICE_COHERENT => Self::Coherent { local },
            bindings::MEMORY_DEVICE_GENERIC => Self::Generic { local },
            _ => Self::System,
        }
    }

    /// Whether this is memory of the device that asks.
    pub(crate) fn is_local(self) -> bool {
        matches!(
            self,
            Self::Private { local: true }
                | Self::Coherent { local: true }
                | Self::Generic { local: true }
        )
    }
}

/// A page that an address of the mirrored process maps.
///
/// # Invariants
///
/// For `'a` the page is mapped, so in use and its folio whole: the lock of the interval notifier
/// is held under which the sequence was checked, which unmapping waits for. A PRIVATE page is one
/// of a [`DevPagemap`](crate::mm::pagemap::dev_pagemap::DevPagemap).
#[derive(Clone, Copy)]
pub(super) struct MappedPage<'a> {
    page: NonNull<bindings::page>,
    _lock: PhantomData<&'a ()>,
}

impl MappedPage<'_> {
    /// The page of an entry for `address`, `None` when there is none or it cannot be accessed.
    ///
    /// # Safety
    ///
    /// `entry` must have been obtained for `address` by `hmm_range_fault()`, for the owner of
    /// `DevPagemap`s or none. For the lifetime that the caller picks the lock of the notifier
    /// must be held under which the sequence was checked afterwards.
    pub(super) unsafe fn new(entry: HmmEntry, address: usize) -> Option<Self> {
        if !entry.is_valid() {
            return None;
        }
        // SAFETY: Valid entries hold the number of a page with a struct page.
        let page = unsafe { bindings::zdm_pfn_to_page(entry.0 & HmmEntry::PFN) };
        // INVARIANT: The caller holds the lock, under which the sequence was checked, for the lifetime
        // that it has picked. The pagemaps of the owner that it asked for are `DevPagemap`s.
        let mapped = Self {
            page: NonNull::new(page)?,
            _lock: PhantomData,
        };
        let order = entry.order();
        if order == bindings::PMD_ORDER && mapped.is_private() {
            return mapped.of_folio((address >> PAGE_SHIFT) & ((1 << order) - 1));
        }
        Some(mapped)
    }

    /// Page `n` of the folio, all of which one entry of a page table maps.
    ///
    /// Of a PRIVATE folio that a PMD maps some kernels report the first pages, wherever the range
    /// begins; the pages follow the address, whose alignment the folio has.
    fn of_folio(self, n: usize) -> Option<Self> {
        // SAFETY: The page is in use by the type invariants of `MappedPage`, its folio as large as its
        // mapping.
        let page = unsafe { bindings::zdm_folio_page(self.page.as_ptr(), n) };
        // INVARIANT: Mapped by the same entry of the page table.
        Some(Self {
            page: NonNull::new(page)?,
            _lock: PhantomData,
        })
    }

    fn is_private(&self) -> bool {
        // SAFETY: The page is in use, and its folio whole, by the type invariants of `MappedPage`.
        unsafe { struct_page::is_private(self.page.as_ptr()) }
    }

    /// Whether it is the small page of zeroes.
    pub(super) fn is_zero(&self) -> bool {
        // SAFETY: The page is in use by the type invariants of `MappedPage`.
        unsafe { bindings::zdm_is_zero_page(self.page.as_ptr()) }
    }

    /// Whether it is of the huge page of zeroes, to be asked where a PMD maps it.
    pub(super) fn is_huge_zero(&self) -> bool {
        // SAFETY: The page is in use by the type invariants of `MappedPage`.
        unsafe { struct_page::is_huge_zero(self.page.as_ptr()) }
    }

    /// A view of the page.
    pub(in crate::mm) fn view(&self) -> PageView<'_> {
        // SAFETY: The page is in use by the type invariants of `MappedPage`.
        unsafe { PageView::from_raw(self.page) }
    }

    /// The kind of memory, to a device whose memory `owner` owns.
    pub(super) fn memory(&self, owner: &PgmapOwner) -> Memory {
        // SAFETY: The page is in use by the type invariants of `MappedPage`.
        unsafe { Memory::of_pfn(self.view().pfn(), owner) }
    }

    /// The page that the CPU finds the contents in, `None` for a PRIVATE page without any. It is
    /// good for as long as the page is mapped.
    pub(super) fn contents(&self) -> Option<NonNull<bindings::page>> {
        // SAFETY: The page is in use, its folio whole and, if PRIVATE, of a `DevPagemap` by the type
        // invariants of `MappedPage`.
        NonNull::new(unsafe { contents(self.page.as_ptr()) })
    }

    /// Takes a reference on a page of a device, `None` if it is none, or as [`FolioRef::try_get`] says.
    pub(super) fn get_device_folio(&self) -> Option<FolioRef> {
        if self.view().memory_type() == 0 {
            return None;
        }
        // SAFETY: The page is in use, and its folio whole, by the type invariants of `MappedPage`.
        unsafe { FolioRef::try_get(self.page) }
    }
}

#[kunit_tests(zdmirror_mapped)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_entries() {
        let read = HmmEntry::new(HmmEntry::VALID | 1);
        let write = HmmEntry::new(HmmEntry::VALID | HmmEntry::WRITE | 1);
        let error = HmmEntry::new(HmmEntry::VALID | HmmEntry::ERROR);
        let absent = HmmEntry::new(0);
        let entries = [
            (read, true, false, false),
            (write, true, true, false),
            (error, false, false, true),
            (absent, false, false, false),
        ];
        for (entry, valid, writable, is_error) in entries {
            assert_eq!(entry.is_valid(), valid);
            assert_eq!(entry.is_writable(), writable);
            assert_eq!(entry.is_error(), is_error);
            assert_eq!(entry.order(), 0);
        }
        assert_eq!(HmmEntry::request(false), HmmEntry::VALID);
        assert_eq!(HmmEntry::PFN & (HmmEntry::VALID | HmmEntry::ERROR), 0);
    }
    #[test]
    fn order_of_entries() {
        let of_order =
            |order| HmmEntry::new(HmmEntry::VALID | order << bindings::HMM_PFN_FLAGS_BIT);
        let small = of_order(0);
        let large = of_order(bindings::PMD_ORDER as usize);
        assert_eq!((small.order(), large.order()), (0, bindings::PMD_ORDER));
        assert!(large.is_valid() && !large.is_writable());
        let bytes = 1 << bindings::PMD_ORDER << PAGE_SHIFT;
        for (n, pages) in [
            (0, bytes >> PAGE_SHIFT),
            (1, (bytes >> PAGE_SHIFT) - 1),
            ((bytes >> PAGE_SHIFT) - 1, 1),
            (bytes >> PAGE_SHIFT, bytes >> PAGE_SHIFT),
        ] {
            assert_eq!(large.pages_from(bytes + (n << PAGE_SHIFT)), pages);
            assert_eq!(small.pages_from(bytes + (n << PAGE_SHIFT)), 1);
        }
        assert_eq!(large.pages_from(2 * bytes - 1), 1);
    }
}
