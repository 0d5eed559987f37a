// SPDX-License-Identifier: GPL-2.0

//! The source of a migration: a range of an area, or a list of device pages.
//!
//! C header: [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

use crate::{
    bindings,
    mm::{
        region::{
            memory_type::MemoryType,
            owner::PgmapOwner, //
        },
        user::{
            mmap_lock::MmapLock,
            range::PageRange,
            watches::WatchToken, //
        },
    },
};
use core::ops::Deref;
use kernel::mm::{
    virt::VmaRef,
    MmapReadGuard, //
};

/// Which pages of a range a migration takes.
///
/// # Examples
///
/// ```
/// use kernel::mm::region::memory_type::MemoryType;
/// use kernel::mm::migrate::migration::{Area, Migration, PfnBuffer, Request, Select};
/// # use kernel::mm::kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range};
/// # use kernel::mm::page::system_folio::SystemFolio;
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # device.migrate(range)?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
/// # let mut buffer = PfnBuffer::new(1)?;
/// # let mmap = mm.mmap_read_lock();
/// # let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
///
/// // The pages of the range that are on the device are brought back.
/// let request = Request {
///     select: Select::Device(MemoryType::Private),
///     ..Request::system(area, range, device.owner())
/// };
/// let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
/// migration.fill_system(SystemFolio::alloc)?;
/// drop(migration.copied()?.finalize());
/// assert_eq!(device.memory().used(), 0);
/// # drop(mmap);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Select {
    /// Pages in system memory, and holes: addresses that no page was ever mapped at.
    System,
    /// Pages of the given owner in device memory of this type.
    Device(MemoryType),
}

impl Select {
    /// Flags that `migrate_vma_setup()` takes for it, 0 where the kernel cannot select such pages.
    pub(super) fn flags(self) -> usize {
        match self {
            Self::System => bindings::MIGRATE_VMA_SELECT_SYSTEM,
            Self::Device(memory) => memory.select_flags(),
        }
    }
}

/// An area that stays as it is, since the mmap lock is held.
///
/// A [`VmaRef`] is not enough for a migration, because it may name an area that only the lock of the area itself
/// protects.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::migration::Area;
/// # use kernel::mm::kunit::support::anon_range;
/// # let range = anon_range(1)?;
///
/// let task = current!();
/// let mm = task.mm().ok_or(EINVAL)?;
/// let mmap = mm.mmap_read_lock();
/// let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// assert!(area.start() <= range.start() && range.end() <= area.end());
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// The current task holds the mmap lock of the area's address space for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Area<'a>(&'a VmaRef);

impl<'a> Area<'a> {
    /// The area that address `address`, in bytes, lies in; `None` where nothing is mapped.
    pub(crate) fn lookup(mmap: &'a MmapReadGuard<'_>, address: usize) -> Option<Self> {
        // INVARIANT: The guard holds the mmap lock, and is borrowed for `'a`.
        mmap.vma_lookup(address).map(Self)
    }

    /// As [`Area::lookup`], under a lock that a killed task does not wait for.
    ///
    /// # Examples
    ///
    /// ```
    /// use kernel::mm::{migrate::migration::Area, user::mmap_lock::MmapLock};
    /// # use kernel::mm::kunit::support::anon_range;
    /// # let range = anon_range(1)?;
    ///
    /// let task = current!();
    /// let mm = task.mm().ok_or(EINVAL)?;
    /// let lock = MmapLock::read(mm)?;
    /// let area = Area::locked(&lock, range.start()).ok_or(EFAULT)?;
    /// assert!(area.end() >= range.end());
    /// # Ok::<(), Error>(())
    /// ```
    pub(crate) fn locked(mmap: &'a MmapLock<'_>, address: usize) -> Option<Self> {
        // INVARIANT: `mmap` is the mmap lock, and is borrowed for `'a`.
        mmap.vma_lookup(address).map(Self)
    }

    /// Whether userfaultfd may keep the process from reading pages of the area (`UFFDIO_REGISTER_MODE_RWP`).
    ///
    /// A migration takes such pages along, and says nothing of it. A device that maps what it has migrated would
    /// read past the protection: let it fault the pages in instead, with `hmm_range_fault()`.
    ///
    /// # Examples
    ///
    /// ```
    /// use kernel::mm::{migrate::migration::Area, user::mmap_lock::MmapLock};
    /// # use kernel::mm::kunit::support::anon_range;
    /// # let range = anon_range(1)?;
    ///
    /// let task = current!();
    /// let mm = task.mm().ok_or(EINVAL)?;
    /// let lock = MmapLock::read(mm)?;
    /// let area = Area::locked(&lock, range.start()).ok_or(EFAULT)?;
    /// assert!(!area.may_hide());
    /// # Ok::<(), Error>(())
    /// ```
    pub(crate) fn may_hide(self) -> bool {
        // SAFETY: The area stays as it is while its lock is held, by the type invariants.
        unsafe { bindings::zdm_may_hide(self.0.as_ptr()) }
    }

    /// # Safety
    ///
    /// The current task must hold the mmap lock of the area's address space for `'a`.
    pub(in crate::mm) unsafe fn from_locked(vma: &'a VmaRef) -> Self {
        // INVARIANT: The caller holds the lock by the contract of this function.
        Self(vma)
    }
}

impl Deref for Area<'_> {
    type Target = VmaRef;

    fn deref(&self) -> &VmaRef {
        self.0
    }
}

/// A range of an area, and the kinds of its pages that are migrated.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::migration::{Area, Migration, PfnBuffer, Request};
/// # use kernel::mm::kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
/// # let mut buffer = PfnBuffer::new(2)?;
/// # let mmap = mm.mmap_read_lock();
///
/// let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// let request = Request::system(area, range, device.owner());
/// let migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
/// assert_eq!(migration.selected(), 2);
/// // Nothing moves: a migration that is dropped puts the pages back.
/// drop(migration);
/// assert_eq!(device.memory().used(), 0);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Request<'a> {
    /// The area.
    pub(crate) area: Area<'a>,
    /// The pages, all of which must be within the area.
    pub(crate) range: PageRange,
    /// The selected kinds of memory.
    pub(crate) select: Select,
    /// Whether large folios are taken in one piece; otherwise core mm splits them first.
    pub(crate) large: bool,
    /// The owner of the device pages that are taken. Core mm tells it to notifiers.
    pub(crate) owner: &'a PgmapOwner,
    /// The watch that has begun before, if a device's page table is to be filled.
    pub(crate) watch: Option<&'a WatchToken>,
}

impl<'a> Request<'a> {
    /// The pages of `range` in system memory, page by page, for a device whose memory `owner` owns.
    pub(crate) fn system(area: Area<'a>, range: PageRange, owner: &'a PgmapOwner) -> Self {
        Self {
            area,
            range,
            select: Select::System,
            large: false,
            owner,
            watch: None,
        }
    }
}

/// Page frame numbers of pages of one registered pagemap.
///
/// # Examples
///
/// ```
/// use kernel::mm::{
///     migrate::migration::{Migration, PfnBuffer, MAX_PAGES},
///     page::system_folio::SystemFolio,
/// };
/// # use kernel::mm::kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # device.migrate(range)?;
/// # let mut buffer = PfnBuffer::new(MAX_PAGES)?;
///
/// // All pages are brought back, wherever they are mapped.
/// let pfns = device.memory().used_pfns()?;
/// let list = device.memory().device_pfns(&pfns).ok_or(EINVAL)?;
/// let mut migration = Migration::of_device_pages(&mut buffer, &list, &EmulatedMemory)?;
/// migration.fill_system(SystemFolio::alloc)?;
/// drop(migration.copied()?.finalize());
/// assert_eq!(device.memory().used(), 0);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// Every entry is the number of a page of a pagemap that stays registered for `'a`.
pub(crate) struct DevicePfns<'a>(&'a [usize]);

impl<'a> DevicePfns<'a> {
    /// # Safety
    ///
    /// All of `pfns` must be numbers of pages of one pagemap, which stays registered for `'a`.
    pub(in crate::mm) unsafe fn from_raw(pfns: &'a [usize]) -> Self {
        // INVARIANT: The caller says so by the contract of this function.
        Self(pfns)
    }

    /// The numbers.
    pub(super) fn as_slice(&self) -> &'a [usize] {
        self.0
    }
}
