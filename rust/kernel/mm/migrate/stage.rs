// SPDX-License-Identifier: GPL-2.0

//! The stages of a migration, as types.

/// Where a [`Migration`](super::migration::Migration) is.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::{device_memory::DeviceMemory, migration::{Migration, Stage}};
/// # use kernel::mm::migrate::migration::{Area, PfnBuffer, Request};
/// # use kernel::mm::kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
/// # let mut buffer = PfnBuffer::new(1)?;
/// # let mmap = mm.mmap_read_lock();
/// # let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// # let request = Request::system(area, range, device.owner());
///
/// /// Pages of a migration, whatever stage it has reached.
/// fn pages<S: Stage, M: DeviceMemory>(migration: &Migration<'_, S, M>) -> usize {
///     migration.len()
/// }
///
/// let migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
/// assert_eq!(pages(&migration), 1);
/// let migration = migration.copied()?;
/// assert_eq!(pages(&migration), 1);
/// # drop(migration);
/// # drop(mmap);
/// # Ok::<(), Error>(())
/// ```
pub(crate) trait Stage {
    /// Whether core mm has been told to move the pages.
    const MOVED: bool;
}

/// Source folios are locked and unmapped; destinations may be set.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::{device_memory::DeviceMemory, migration::{Migration, Setup}};
/// # use kernel::mm::migrate::migration::{Area, PfnBuffer, Request};
/// # use kernel::mm::kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
/// # let mut buffer = PfnBuffer::new(1)?;
/// # let mmap = mm.mmap_read_lock();
/// # let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// # let request = Request::system(area, range, device.owner());
///
/// /// Sources of a migration that may still get destinations.
/// fn sources<M: DeviceMemory>(migration: &Migration<'_, Setup, M>) -> usize {
///     (0..migration.len()).filter_map(|i| migration.source(i)).count()
/// }
///
/// let migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
/// assert_eq!(sources(&migration), 1);
/// # drop(migration);
/// # drop(mmap);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Setup(());
/// Core mm has moved the pages that it could move. The page tables still hold migration entries.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::{device_memory::DeviceMemory, migration::{Copied, Migration}};
/// # use kernel::mm::migrate::migration::{Area, PfnBuffer, Request};
/// # use kernel::mm::kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
/// # let mut buffer = PfnBuffer::new(1)?;
/// # let mmap = mm.mmap_read_lock();
/// # let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// # let request = Request::system(area, range, device.owner());
///
/// /// Pages that have moved, before the page tables are restored.
/// fn moved<M: DeviceMemory>(migration: &Migration<'_, Copied, M>) -> usize {
///     migration.moved().pages
/// }
///
/// let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
/// migration.fill_device(|order| device.alloc(order))?;
/// let migration = migration.copied()?;
/// assert_eq!(moved(&migration), 1);
/// # drop(migration);
/// # drop(mmap);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Copied(());
/// The migration is over. The entries still tell what has moved.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::{device_memory::DeviceMemory, migration::{Finalized, Migration}};
/// # use kernel::mm::migrate::migration::{Area, PfnBuffer, Request};
/// # use kernel::mm::kunit::{device::{EmulatedDevice, EmulatedMemory}, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
/// # let mut buffer = PfnBuffer::new(1)?;
/// # let mmap = mm.mmap_read_lock();
/// # let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// # let request = Request::system(area, range, device.owner());
///
/// /// Where the first page went.
/// fn first<M: DeviceMemory>(migration: &Migration<'_, Finalized, M>) -> Option<usize> {
///     migration.destinations().next().map(|(pfn, _order)| pfn)
/// }
///
/// let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
/// migration.fill_device(|order| device.alloc(order))?;
/// let migration = migration.copied()?.finalize();
/// let pfn = first(&migration).ok_or(ENOENT)?;
/// assert!(device.memory().index_of_pfn(pfn).is_some());
/// # drop(migration);
/// # drop(mmap);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Finalized(());

impl Stage for Setup {
    const MOVED: bool = false;
}

impl Stage for Copied {
    const MOVED: bool = true;
}

impl Stage for Finalized {
    const MOVED: bool = true;
}
