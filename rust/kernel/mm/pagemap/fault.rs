// SPDX-License-Identifier: GPL-2.0

//! A CPU fault on device memory.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h), `struct vm_fault`

use crate::{
    bindings,
    mm::{
        migrate::{
            device_memory::DeviceMemory,
            migration::{
                Area,
                Migration,
                PfnBuffer,
                Request,
                Select,
                Setup, //
            },
        },
        page::{
            struct_page::MemMap,
            view::PageView, //
        },
        region::{
            memory_type::MemoryType,
            owner::PgmapOwner, //
        },
        user::range::{
            task_size,
            PageRange, //
        },
        PAGE_SHIFT,
        PAGE_SIZE,
        PMD_ORDER, //
    },
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    mm::{
        virt::VmaRef,
        Mm, //
    },
    prelude::*, //
};

/// How a fault ends that could not be resolved.
///
/// # Examples
///
/// ```
/// use kernel::mm::pagemap::fault::FaultError;
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let range = anon_range(1)?;
///
/// assert_eq!(FaultError::from(ENOMEM), FaultError::Oom);
/// // A device that has lost its memory.
/// let device = EmulatedDevice::with_fault(|_| Err(FaultError::Sigbus))?;
/// device.migrate(range)?;
/// assert_eq!(touch(range), Err(EFAULT));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultError {
    /// No memory: the fault is tried again after the OOM killer ran.
    Oom,
    /// The task gets `SIGBUS`.
    Sigbus,
    /// The hardware has lost the page: the task gets `SIGBUS` that says so.
    Poisoned,
}

impl FaultError {
    pub(super) fn to_vm_fault(self) -> bindings::vm_fault_t {
        match self {
            Self::Oom => bindings::VM_FAULT_OOM,
            Self::Sigbus => bindings::VM_FAULT_SIGBUS,
            Self::Poisoned => bindings::VM_FAULT_HWPOISON,
        }
    }
}

impl From<Error> for FaultError {
    fn from(err: Error) -> Self {
        if err == ENOMEM {
            Self::Oom
        } else {
            Self::Sigbus
        }
    }
}

/// The order in which a process accesses an area, as set by `madvise()`.
///
/// # Examples
///
/// ```
/// use kernel::mm::pagemap::fault::{AccessOrder, FaultError};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let range = anon_range(1)?;
///
/// let device = EmulatedDevice::with_fault(|fault| match fault.access_order() {
///     // Here the driver would bring more pages back than the one that was touched.
///     AccessOrder::Sequential => Err(FaultError::Oom),
///     AccessOrder::Random | AccessOrder::Unknown => Err(FaultError::Sigbus),
/// })?;
/// # device.migrate(range)?;
/// # assert_eq!(touch(range), Err(EFAULT));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AccessOrder {
    /// The process has not set it.
    Unknown,
    /// `MADV_SEQUENTIAL`.
    Sequential,
    /// `MADV_RANDOM`.
    Random,
}

/// A fault on a locked PRIVATE page that is being handled.
///
/// # Examples
///
/// ```
/// use kernel::mm::{migrate::migration::PfnBuffer, page::system_folio::SystemFolio};
/// # use kernel::mm::kunit::{
/// #     device::{EmulatedDevice, EmulatedMemory},
/// #     support::{anon_range, touch},
/// # };
/// # let range = anon_range(1)?;
///
/// let device = EmulatedDevice::with_fault(|fault| {
///     let mut buffer = PfnBuffer::new(1 << fault.order())?;
///     let mut migration = fault.migrate(&mut buffer, &EmulatedMemory)?;
///     let (vma, address) = (fault.vma(), fault.address());
///     migration.fill_system(|order| SystemFolio::alloc_vma(vma, address, order))?;
///     drop(migration.copied()?.finalize());
///     Ok(())
/// })?;
/// device.migrate(range)?;
/// assert_eq!(device.memory().used(), 1);
/// // The CPU touches the page, and gets it back.
/// touch(range)?;
/// assert_eq!(device.memory().used(), 0);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - `vmf` is a valid fault for `'a`. The current task holds the mmap lock of its area for reading, and
///   the lock and a reference of its page.
/// - The page is one of `pgmap`, which stays registered for `'a`.
pub(crate) struct VmFault<'a> {
    vmf: &'a bindings::vm_fault,
    owner: &'a PgmapOwner,
    pgmap: NonNull<bindings::dev_pagemap>,
    memmap: MemMap,
    first_pfn: usize,
}

impl<'a> VmFault<'a> {
    /// # Safety
    ///
    /// `vmf` must be the fault that core mm is handling by calling `migrate_to_ram`, on a page of
    /// `pgmap`, whose owner is `owner` and which begins with page frame `first_pfn`.
    pub(super) unsafe fn from_raw(
        vmf: *mut bindings::vm_fault,
        owner: &'a PgmapOwner,
        pgmap: NonNull<bindings::dev_pagemap>,
        memmap: MemMap,
        first_pfn: usize,
    ) -> Self {
        // INVARIANT: Core mm calls `migrate_to_ram` with the page locked and referenced, and only
        // with the mmap lock: it retries a fault that came with the lock of the area alone. The reference
        // keeps the pagemap registered.
        Self {
            // SAFETY: The caller gives the fault that core mm is handling, which lives for `'a`.
            vmf: unsafe { &*vmf },
            owner,
            pgmap,
            memmap,
            first_pfn,
        }
    }

    /// Index in the pagemap of the first page of the faulting folio.
    pub(crate) fn index(&self) -> usize {
        self.index_of(self.memmap.pfn_of(self.folio().as_ptr()))
    }

    /// Index in the pagemap of page frame `pfn`, which must be one of the pagemap's: else the number means nothing.
    pub(crate) fn index_of(&self, pfn: usize) -> usize {
        pfn.wrapping_sub(self.first_pfn)
    }

    /// Order of the faulting range: that of the folio if one entry maps all of it, else 0.
    pub(crate) fn order(&self) -> u32 {
        // A folio mapped by more than one entry may be mapped in part only.
        if self.vmf.pte.is_null() {
            self.page().order()
        } else {
            0
        }
    }

    /// Address of the first page of the faulting range, in bytes.
    pub(crate) fn address(&self) -> usize {
        self.vmf.__bindgen_anon_1.address & !((PAGE_SIZE << self.order()) - 1)
    }

    /// The area that the address lies in. It is no [`Area`]: a migration that knows nothing of the fault would
    /// wait for the lock of the fault's folio, in some kernels, which the current task holds.
    pub(crate) fn vma(&self) -> &VmaRef {
        // SAFETY: The area of a valid fault is valid, and the mmap lock is held by the type invariants of
        // `VmFault`.
        unsafe { VmaRef::from_raw(self.vmf.__bindgen_anon_1.vma) }
    }

    /// Identifies the address space: no two that live at the same time have the same number.
    pub(crate) fn mm_id(&self) -> usize {
        // SAFETY: The area is valid by the type invariants of `VmFault`.
        unsafe { (*self.vma().as_ptr()).vm_mm as usize }
    }

    /// The access order that `madvise()` has set for the area.
    pub(crate) fn access_order(&self) -> AccessOrder {
        let flags = self.vma().flags();
        if flags & bindings::VM_RAND_READ != 0 {
            AccessOrder::Random
        } else if flags & bindings::VM_SEQ_READ != 0 {
            AccessOrder::Sequential
        } else {
            AccessOrder::Unknown
        }
    }

    /// Addresses of the area that one page of page table entries maps, the fault's among them.
    pub(crate) fn table_range(&self) -> Range<usize> {
        let size = PAGE_SIZE << PMD_ORDER;
        let start = self.address() & !(size - 1);
        start.max(self.vma().start())..(start + size).min(self.vma().end())
    }

    /// Pages of `range` that the CPU has accessed since they were mapped, as of now. `range` has user
    /// addresses that one page of page table entries maps, else the result is 0. Does not sleep.
    pub(crate) fn accessed_pages(&self, range: Range<usize>) -> usize {
        if range.end > task_size() {
            return 0;
        }
        // SAFETY: The mmap lock of the area's address space is held by the type invariants of `VmFault`, so
        // that there is a table of the highest level. Below it the callee walks tables of user addresses, as
        // checked above, none of which is freed while interrupts are disabled.
        unsafe { bindings::zdm_accessed_pages(self.vma().as_ptr(), range.start, range.end) }
    }

    /// Whether the faulting folio is small, so that others around it may be migrated, too.
    ///
    /// Not around a large folio: core mm would split it with its lock held, and then wait for the
    /// locks of other large folios in order to split them.
    pub(crate) fn is_small(&self) -> bool {
        self.order() == 0 && self.page().order() == 0
    }

    /// The faulting page, which the fault holds a reference on. [`VmFault::migrate`] may split its folio.
    pub(crate) fn page(&self) -> PageView<'_> {
        // SAFETY: The fault has a page by the type invariants of `VmFault`.
        let page = unsafe { NonNull::new_unchecked(self.vmf.page) };
        // SAFETY: The page is one of `pgmap`, which stays registered, by the type invariants of `VmFault`.
        unsafe { PageView::of_pagemap(page, self.pgmap) }
    }

    /// The first page of the folio of [`VmFault::page`], which has the folio's counts.
    pub(crate) fn folio(&self) -> PageView<'_> {
        self.page().head()
    }

    /// Whether the fault is one in `mm`.
    pub(crate) fn is_in(&self, mm: &Mm) -> bool {
        // SAFETY: The area is valid and locked by the type invariants of `VmFault`, so its address space
        // stays.
        let vm_mm = unsafe { (*self.vmf.__bindgen_anon_1.vma).vm_mm };
        core::ptr::eq(vm_mm, mm.as_raw())
    }

    /// Starts to migrate the faulting range back, `1 << order()` pages from [`VmFault::address`] on. May sleep.
    ///
    /// Wraps `migrate_vma_setup()` with `fault_page`.
    ///
    /// # Errors
    ///
    /// `EINVAL` where `buffer` has no room for the pages of the range, `1 << order()` of them, or the area cannot be
    /// migrated.
    pub(crate) fn migrate<'b, M: DeviceMemory>(
        &'b self,
        buffer: &'b mut PfnBuffer,
        memory: &'b M,
    ) -> Result<Migration<'b, Setup, M>> {
        let order = self.order();
        let range = PageRange::new(self.address(), 1 << order)?;
        self.migrate_range(buffer, range, order > 0, memory)
    }

    /// Starts to migrate the device's small folios of `range`, in bytes, back, together with the faulting
    /// folio. May sleep.
    ///
    /// Wraps `migrate_vma_setup()` with `fault_page`.
    ///
    /// Pages that another task has locked are skipped. A large folio in the range that is mapped
    /// page by page is split.
    ///
    /// # Examples
    ///
    /// ```
    /// use kernel::mm::{
    ///     migrate::migration::{PfnBuffer, MAX_PAGES},
    ///     page::system_folio::SystemFolios,
    /// };
    /// # use kernel::mm::kunit::{
    /// #     device::{EmulatedDevice, EmulatedMemory},
    /// #     support::{anon_range, touch},
    /// # };
    /// # let range = anon_range(3)?;
    ///
    /// let device = EmulatedDevice::with_fault(|fault| {
    ///     let mut buffer = PfnBuffer::new(MAX_PAGES)?;
    ///     // All that one page of page table entries maps.
    ///     let range = fault.table_range();
    ///     let start = range.start;
    ///     let mut migration = fault.migrate_around(&mut buffer, range, &EmulatedMemory)?;
    ///     let mut folios = SystemFolios::for_vma(fault.vma(), migration.selected());
    ///     migration.fill_system(|_order| folios.alloc(start))?;
    ///     drop(migration.copied()?.finalize());
    ///     Ok(())
    /// })?;
    /// device.migrate(range)?;
    /// touch(range.first(1))?;
    /// // Those of another page of entries wait for a fault of their own.
    /// assert!(device.memory().used() < 3);
    /// # touch(range)?;
    /// # assert_eq!(device.memory().used(), 0);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `EINVAL` unless `range` is part of [`VmFault::table_range`], made of whole pages, and has the page of
    /// the fault, and where the fault is not about a small folio.
    pub(crate) fn migrate_around<'b, M: DeviceMemory>(
        &'b self,
        buffer: &'b mut PfnBuffer,
        range: Range<usize>,
        memory: &'b M,
    ) -> Result<Migration<'b, Setup, M>> {
        let table = self.table_range();
        let within = table.start <= range.start && range.end <= table.end;
        let has_page = range.contains(&self.address()) && range.len() % PAGE_SIZE == 0;
        if !self.is_small() || !within || !has_page {
            return Err(EINVAL);
        }
        let range = PageRange::new(range.start, range.len() >> PAGE_SHIFT)?;
        self.migrate_range(buffer, range, false, memory)
    }

    fn migrate_range<'b, M: DeviceMemory>(
        &'b self,
        buffer: &'b mut PfnBuffer,
        range: PageRange,
        large: bool,
        memory: &'b M,
    ) -> Result<Migration<'b, Setup, M>> {
        let request = Request {
            // SAFETY: The current task holds the mmap lock by the type invariants of `VmFault`.
            area: unsafe { Area::from_locked(self.vma()) },
            range,
            select: Select::Device(MemoryType::Private),
            large,
            owner: self.owner,
            watch: None,
        };
        // SAFETY: The page is the locked one of the fault by the type invariants of `VmFault`.
        unsafe { Migration::of_fault(buffer, &request, memory, self.vmf.page, self.memmap) }
    }
}

#[kunit_tests(zdmirror_fault)]
mod tests {
    use super::*;
    use crate::mm::kunit::{
        device::{
            EmulatedDevice,
            EmulatedMemory, //
        },
        support::{
            anon_range,
            touch, //
        },
    };
    use kernel::sync::atomic::{
        Atomic,
        Relaxed, //
    };

    /// Ranges around the page of a fault that were refused.
    static REFUSED: Atomic<u32> = Atomic::new(0);

    #[test]
    fn range_must_be_of_whole_pages() -> Result {
        let device = EmulatedDevice::with_fault(|fault| {
            let mut buffer = PfnBuffer::new(2)?;
            let (page, end) = (fault.address(), fault.address() + PAGE_SIZE);
            // The page before that of the fault, and part of the latter.
            for range in [page - PAGE_SIZE..page + 1, page - PAGE_SIZE..end - 1] {
                let refused = fault
                    .migrate_around(&mut buffer, range, &EmulatedMemory)
                    .err();
                REFUSED.fetch_add(u32::from(refused == Some(EINVAL)), Relaxed);
            }
            let whole = fault.migrate_around(&mut buffer, page - PAGE_SIZE..end, &EmulatedMemory);
            REFUSED.fetch_add(u32::from(whole.is_err()), Relaxed);
            Err(FaultError::Sigbus)
        })?;
        let range = anon_range(2)?;
        device.migrate(range)?;
        let last = range.skip(1).ok_or(EINVAL)?;
        assert_eq!(touch(last), Err(EFAULT));
        assert_eq!(REFUSED.load(Relaxed), 2);
        Ok(())
    }

    /// Pages that were found accessed at addresses of the kernel, and at the page before the fault's.
    static ACCESSED: [Atomic<usize>; 2] = [Atomic::new(0), Atomic::new(0)];

    #[test]
    fn tables_of_the_kernel_are_not_walked() -> Result {
        let device = EmulatedDevice::with_fault(|fault| {
            // Each page has an entry of its own in a table of the kernel, which calls it accessed.
            let memory = VVec::from_elem(1u8, 2 * PAGE_SIZE, GFP_KERNEL).map_err(Error::from)?;
            for start in [
                memory.as_ptr() as usize,
                memory.as_ptr() as usize + PAGE_SIZE,
            ] {
                let found = fault.accessed_pages(start..start + PAGE_SIZE);
                ACCESSED[0].fetch_add(found, Relaxed);
            }
            let before = fault.address() - PAGE_SIZE..fault.address();
            ACCESSED[1].fetch_add(fault.accessed_pages(before), Relaxed);
            Err(FaultError::Sigbus)
        })?;
        let range = anon_range(2)?;
        let last = range.skip(1).ok_or(EINVAL)?;
        device.migrate(last)?;
        touch(range.first(1))?;
        assert_eq!(touch(last), Err(EFAULT));
        let found = ACCESSED.each_ref().map(|pages| pages.load(Relaxed));
        assert_eq!(found, [0, 1]);
        Ok(())
    }
}
