// SPDX-License-Identifier: GPL-2.0

//! A migration fills the device's page table with the pages that it has moved, so that the device
//! need not walk the CPU's table for them afterwards.
//!
//! This is done when core mm has moved the contents and the CPU's table holds migration entries. The
//! sequence of an interval notifier cannot say then whether an entry is good: the migration itself has
//! changed the range, and to wait for the invalidations of others with folios locked would deadlock.
//! A [`Watch`] says it instead, see `Watches::begin()`.

use super::{
    backing::contents,
    changes::Span,
    device_memory::DeviceMemory,
    hmm::HmmMirror,
    migrate::{
        Copied,
        Migration, //
    },
    range::PageRange,
    table::Grant,
    PAGE_SHIFT,
    PMD_ORDER, //
};
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    types::NotThreadSafe, //
};

/// Records changes of a range, except those by migrations of the current task.
///
/// # Examples
///
/// ```
/// use kernel::mm::{copy::Stop, migrate::{Area, Migration, PfnBuffer, Request}};
/// # use kernel::mm::{kunit::{anon_range, touch}, kunit_device::{EmulatedDevice, EmulatedMemory}};
/// # use kernel::page::PAGE_SIZE;
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # touch(range)?;
/// # let mirror = device.mirror()?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
/// # let mut buffer = PfnBuffer::new(1)?;
///
/// let watch = mirror.watch(range).ok_or(EAGAIN)?;
/// let mmap = mm.mmap_read_lock();
/// let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// let request = Request::system(area, range, device.owner());
/// let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
/// migration.fill_device(|order| device.alloc(order))?;
/// let migration = migration.copied()?;
/// // The device need not fault the page in afterwards.
/// assert_eq!(watch.fill(&migration)?, 1);
/// drop(migration.finalize());
/// # drop(mmap);
/// # drop(watch);
/// # let mut bytes = KVec::from_elem(0u8, PAGE_SIZE, GFP_KERNEL)?;
/// assert_eq!(mirror.read(range, &mut bytes), (1, Stop::Done));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// When the watch began no invalidation of the range was under way.
#[must_use = "dropping it ends the watch"]
pub(crate) struct Watch<'a> {
    mirror: &'a HmmMirror,
    range: PageRange,
    slot: usize,
    _task: NotThreadSafe,
}

impl HmmMirror {
    /// Begins to watch `range`; `None` where others change the address space just now, or too many
    /// migrations are watched. Waits for invalidations that are under way: may sleep, and no lock may be
    /// held that an invalidation waits for.
    pub(crate) fn watch(&self, range: PageRange) -> Option<Watch<'_>> {
        let span = Span::of(range);
        let seq = self.notifier.read_begin(span);
        let table = self.notifier.lock_if_fresh(seq)?;
        let slot = table.watches.begin(span)?;
        drop(table);
        // INVARIANT: The sequence was checked under the lock that the watch began under.
        Some(Watch {
            mirror: self,
            range,
            slot,
            _task: NotThreadSafe,
        })
    }
}

impl Watch<'_> {
    /// Makes the table map the pages of the watched range that `migration` has moved, and returns how many
    /// it maps: none if another task has changed the range meanwhile. May sleep.
    ///
    /// The migration must be one of the current task that began after the watch.
    pub(crate) fn fill<M: DeviceMemory>(
        &self,
        migration: &Migration<'_, Copied, M>,
    ) -> Result<usize> {
        let table = self.mirror.notifier.lock();
        if !table.watches.is_undisturbed(self.slot) {
            return Ok(0);
        }
        let mut pages = 0;
        for (i, order) in migration.moved_entries() {
            let Some(address) = migration.address(i) else {
                break;
            };
            if address < self.range.start() || address >= self.range.end() {
                continue;
            }
            let page = migration.page_of(migration.dst(i));
            // SAFETY: The destination is locked and referenced until the migration is finalized, so that
            // nobody frees or splits it. It is of a `DevPagemap` or no PRIVATE page.
            let page = page.map(|page| unsafe { contents(page.as_ptr()) });
            let Some(page) = page.and_then(NonNull::new) else {
                continue;
            };
            let index = address >> PAGE_SHIFT;
            let grant = Grant::shared(migration.maps_writable(i));
            // Each entry below is true until it is invalidated, which waits for the lock of the table:
            //
            // - when the watch began no task was changing the range;
            // - since then only the current task's migration has, and it has ended its invalidations;
            // - the migration has the folios locked, and puts them where the sources were mapped, with
            //   their permission, unless a task changes the range again.
            if order == PMD_ORDER && index % (1 << PMD_ORDER) == 0 {
                // SAFETY: See above. The folio and its contents are of that many pages in a row.
                unsafe { table.store_block(index, page, grant) }?;
            } else {
                for n in 0..1 << order {
                    let Some(page) = NonNull::new(page.as_ptr().wrapping_add(n)) else {
                        continue;
                    };
                    // SAFETY: See above. The folio and its contents are of `1 << order` pages in a row.
                    unsafe { table.store(index + n, page, grant) }?;
                }
            }
            pages += 1 << order;
        }
        Ok(pages)
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.mirror.notifier.lock().watches.end(self.slot);
    }
}
