// SPDX-License-Identifier: GPL-2.0

//! A device without hardware, for KUnit cases and for the examples of the documentation.

use super::support::this_module;
use crate::mm::{
    hmm::mirror::HmmMirror,
    migrate::migration::Copied,
    prelude::*,
    region::free_folio::FreeFolio, //
};
use kernel::{
    prelude::*,
    sizes::SZ_2M,
    sync::Arc, //
};

/// How a device handles a CPU fault.
pub(crate) type FaultHandler = fn(&VmFault<'_>) -> Result<(), FaultError>;

/// Memory that the CPU emulates: the contents are in the backing of each page.
///
/// # Examples
///
/// ```
/// use kernel::mm::kunit::device::{EmulatedDevice, EmulatedMemory};
/// # use kernel::mm::kunit::support::anon_range;
///
/// let device = EmulatedDevice::new()?;
/// let range = anon_range(1)?;
/// device.migrate_by(range, &EmulatedMemory, |migration| {
///     assert_eq!(migration.moved().pages, 1);
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct EmulatedMemory;

impl DeviceMemory for EmulatedMemory {
    fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
        to.copy_from_cpu(from)
    }

    fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
        from.copy_to_cpu(to)
    }

    fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
        to.clear()
    }
}

/// The free pages of an [`EmulatedDevice`], and how it handles faults.
///
/// # Examples
///
/// ```
/// use kernel::mm::{
///     kunit::device::{EmulatedDevice, EmulatedPages},
///     pagemap::registration::Registration,
/// };
///
/// let device = EmulatedDevice::new()?;
/// let memory: &Registration<EmulatedPages> = device.memory();
/// assert_eq!(memory.used(), 0);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct EmulatedPages {
    free: FreeStack,
    fault: FaultHandler,
}

impl PagemapOps for EmulatedPages {
    fn folio_free(&self, folio: FreedFolio<'_>) {
        if let Some(free) = folio.into_free() {
            let _ = self.free.push(free);
        }
    }
}

impl PrivateOps for EmulatedPages {
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError> {
        (self.fault)(fault)
    }
}

/// A device with 2 MiB of PRIVATE memory. When it is dropped all pages are brought back first.
///
/// # Examples
///
/// ```
/// use kernel::mm::kunit::device::EmulatedDevice;
/// # use kernel::mm::kunit::support::anon_range;
///
/// let device = EmulatedDevice::new()?;
/// device.migrate(anon_range(3)?)?;
/// assert_eq!(device.memory().used(), 3);
/// device.evict()?;
/// assert_eq!(device.memory().used(), 0);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct EmulatedDevice {
    memory: Registration<EmulatedPages>,
    owner: Arc<PgmapOwner>,
}

impl EmulatedDevice {
    /// A device that brings the page of a CPU fault back. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Self::with_fault(|fault| {
            let mut buffer = PfnBuffer::new(1 << fault.order())?;
            let mut migration = fault.migrate(&mut buffer, &EmulatedMemory)?;
            migration.fill_system(SystemFolio::alloc)?;
            drop(migration.copied()?.finalize());
            Ok(())
        })
    }

    /// A device that handles CPU faults by `fault`. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn with_fault(fault: FaultHandler) -> Result<Self> {
        let owner = PgmapOwner::new(this_module())?;
        let (memory, region) = Registration::private(SZ_2M, owner.clone(), |frames| {
            Ok(EmulatedPages {
                free: FreeStack::new(frames)?,
                fault,
            })
        })?;
        let device = Self { memory, owner };
        for folio in region {
            device.put(folio);
        }
        Ok(device)
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &Registration<EmulatedPages> {
        &self.memory
    }

    /// The owner of the memory.
    pub(crate) fn owner(&self) -> &Arc<PgmapOwner> {
        &self.owner
    }

    /// Takes a free folio, of any order. Does not sleep.
    pub(crate) fn take(&self) -> Option<FreeFolio> {
        self.memory.ops().free.pop()
    }

    /// Gives a free folio back. Does not sleep.
    pub(crate) fn put(&self, folio: FreeFolio) {
        let _ = self.memory.ops().free.push(folio);
    }

    /// Allocates a folio of `order` with a backing. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOSPC` when the device has no such folio left, `EBUSY` when its pages are not clean, `EINVAL` for an order that
    /// is too large, `ENOMEM`.
    pub(crate) fn alloc(&self, order: u32) -> Result<LockedDeviceFolio> {
        let backing = Backing::alloc(order)?;
        let folio = self.take().ok_or(ENOSPC)?;
        let pfn = folio.first_pfn();
        let folio = folio
            .split_to(pfn, order, |rest| self.put(rest))
            .map_err(|folio| self.put(folio));
        let folio = folio.map_err(|()| ENOSPC)?;
        self.memory.folio_init(folio, backing).map_err(|err| {
            self.put(err.folio);
            EBUSY
        })
    }

    /// Migrates `range` of the KUnit thread to the device. May sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` where nothing is mapped, and those of [`Migration::of_range`] and [`EmulatedDevice::alloc`].
    pub(crate) fn migrate(&self, range: PageRange) -> Result {
        self.migrate_by(range, &EmulatedMemory, |_| Ok(()))
    }

    /// As [`EmulatedDevice::migrate`], with the contents copied by `memory`. `f` gets the migration before
    /// it is finalized. May sleep.
    ///
    /// # Errors
    ///
    /// As [`EmulatedDevice::migrate`], and those of `memory` and `f`.
    pub(crate) fn migrate_by<M: DeviceMemory>(
        &self,
        range: PageRange,
        memory: &M,
        f: impl FnOnce(&Migration<'_, Copied, M>) -> Result,
    ) -> Result {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(range.pages())?;
        let mmap = mm.mmap_read_lock();
        let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
        let request = Request::system(area, range, &self.owner);
        let mut migration = Migration::of_range(&mut buffer, &request, memory)?;
        migration.fill_device(|order| self.alloc(order))?;
        let migration = migration.copied()?;
        f(&migration)?;
        drop(migration.finalize());
        Ok(())
    }

    /// The view of the device on the address space of the KUnit thread. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a thread without an address space, and those of [`HmmMirror::new`].
    pub(crate) fn mirror(&self) -> Result<HmmMirror> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        HmmMirror::new(mm, self.owner.clone())
    }

    /// Brings all pages back. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. A page that another task holds stays.
    pub(crate) fn evict(&self) -> Result {
        self.evict_by(&EmulatedMemory)
    }

    /// As [`EmulatedDevice::evict`], with the contents copied by `memory`. May sleep.
    ///
    /// # Errors
    ///
    /// As [`EmulatedDevice::evict`], and those of `memory`.
    pub(crate) fn evict_by<M: DeviceMemory>(&self, memory: &M) -> Result {
        let mut buffer = PfnBuffer::new(MAX_PAGES)?;
        let pfns = self.memory.used_pfns()?;
        for part in pfns.chunks(MAX_PAGES) {
            let list = self.memory.device_pfns(part).ok_or(EINVAL)?;
            let mut migration = Migration::of_device_pages(&mut buffer, &list, memory)?;
            migration.fill_system(SystemFolio::alloc)?;
            drop(migration.copied()?.finalize());
        }
        Ok(())
    }
}

impl Drop for EmulatedDevice {
    fn drop(&mut self) {
        // Pages that do not come back keep the memory registered, which is in the log.
        let _ = self.evict();
        while let Some(folio) = self.take() {
            let _ = self.memory.retire(folio);
        }
    }
}

/// The callbacks of a driver that never allocates a page.
///
/// # Examples
///
/// ```
/// use kernel::{
///     mm::{
///         kunit::device::NoPages, pagemap::registration::Registration, region::owner::PgmapOwner,
///     },
///     module::this_module,
///     sizes::SZ_2M,
/// };
///
/// let owner = PgmapOwner::new(this_module::<LocalModule>())?;
/// let (map, region) = Registration::private(SZ_2M, owner, |_frames| Ok(NoPages))?;
/// for folio in region {
///     map.retire(folio).map_err(|_| EINVAL)?;
/// }
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct NoPages;

impl PagemapOps for NoPages {
    fn folio_free(&self, _folio: FreedFolio<'_>) {}
}

impl PrivateOps for NoPages {
    fn migrate_to_ram(&self, _fault: &VmFault<'_>) -> Result<(), FaultError> {
        Err(FaultError::Sigbus)
    }
}
