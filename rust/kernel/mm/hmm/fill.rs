// SPDX-License-Identifier: GPL-2.0

//! A migration fills the device's page table with the pages that it has moved, so that the device
//! need not walk the CPU's table for them afterwards.
//!
//! This is done when core mm has moved the contents and the CPU's table holds migration entries. The
//! sequence of an interval notifier cannot say then whether an entry is good: the migration itself has
//! changed the range, and to wait for the invalidations of others with folios locked would deadlock.
//! A [`Watch`] says it instead, see `Watches::begin()`.

use super::{
    access::Grant,
    mirror::HmmMirror,
    table::BLOCK, //
};
use crate::{
    bindings,
    mm::{
        migrate::{
            device_memory::DeviceMemory,
            migration::{
                is_valid,
                Copied,
                Migration, //
            },
        },
        page::backing::contents,
        user::{
            changes::Span,
            range::PageRange,
            watches::WatchToken, //
        },
        PAGE_SHIFT, //
    },
};
use core::ptr::NonNull;
use kernel::{
    mm::{
        virt::{
            flags,
            VmaRef, //
        },
        Mm, //
    },
    prelude::*,
    types::NotThreadSafe, //
};

/// Records changes of a range, except those by migrations of the current task.
///
/// Dropping it ends the watch, and may sleep. A mirror has room for few watches. One that is forgotten ([`core::mem::forget`]) keeps its room, and pages are
/// faulted in instead.
///
/// # Examples
///
/// ```
/// use kernel::mm::{hmm::copy::Stop, migrate::migration::{Area, Migration, PfnBuffer, Request}};
/// # use kernel::mm::kunit::{
/// #     device::{EmulatedDevice, EmulatedMemory},
/// #     support::{anon_range, touch},
/// # };
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
/// let request = Request {
///     watch: Some(watch.token()),
///     ..Request::system(area, range, device.owner())
/// };
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
    token: WatchToken,
    _task: NotThreadSafe,
}

impl HmmMirror {
    /// Begins to watch `range`; `None` where others change the address space just now, too many
    /// migrations are watched, or the task has a migration already. Waits for invalidations that are under way: may sleep, and no lock may be
    /// held that an invalidation waits for.
    pub(crate) fn watch(&self, range: PageRange) -> Option<Watch<'_>> {
        let span = Span::of(range);
        let seq = self.notifier.read_begin(span).ok()?;
        let table = self.notifier.lock_if_fresh(seq)?;
        let slot = table.watches.begin(span)?;
        drop(table);
        // INVARIANT: The sequence was checked under the lock that the watch began under.
        Some(Watch {
            mirror: self,
            range,
            token: WatchToken(slot),
            _task: NotThreadSafe,
        })
    }
}

impl Watch<'_> {
    /// The token for the request of a migration, which proves that the migration began after the watch.
    pub(crate) fn token(&self) -> &WatchToken {
        &self.token
    }

    /// Makes the table map the pages of the watched range that `migration` has moved, and returns how many
    /// it maps: not those of a folio that begins before the range, and none if another task has changed the
    /// range meanwhile, or if the migration is one of another address space, or was not requested with the
    /// token of this watch. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; the table then maps some of the pages.
    pub(crate) fn fill<M: DeviceMemory>(
        &self,
        migration: &Migration<'_, Copied, M>,
    ) -> Result<usize> {
        let is_ours = migration
            .watch
            .is_some_and(|watch| core::ptr::eq(watch, &self.token));
        if !is_ours || !migration.is_in(self.mirror.mm()) {
            return Ok(0);
        }
        let table = self.mirror.notifier.lock();
        if !table.watches.is_undisturbed(self.token.0) {
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
            // no task frees or splits it. It is of a `DevPagemap` or no PRIVATE page.
            let page = page.map(|page| unsafe { contents(page.as_ptr()) });
            let Some(page) = page.and_then(NonNull::new) else {
                continue;
            };
            let index = address >> PAGE_SHIFT;
            let write = migration.maps_writable(i);
            // Of a large folio that goes on behind the watched range nothing is known there.
            let watched = (1 << order).min((self.range.end() - address) >> PAGE_SHIFT);
            // Each entry below is true until it is invalidated, which waits for the lock of the table:
            //
            // - when the watch began no task was changing the range;
            // - since then only the current task's migration has, which began after the watch, as it has the
            //   token, and has ended its invalidations;
            // - the migration has the folios locked, and puts them where the sources were mapped, with
            //   their permission, unless a task changes the range again.
            if watched == BLOCK && index % BLOCK == 0 {
                // SAFETY: The entries are true until they are invalidated, for the reasons above: all of the
                // block is watched. The folio and its contents are of that many pages in a row.
                unsafe { table.store_block(index, page, write) }?;
            } else {
                for n in 0..watched {
                    let Some(page) = NonNull::new(page.as_ptr().wrapping_add(n)) else {
                        continue;
                    };
                    // SAFETY: The entry is true until it is invalidated, for the reasons above: the page is
                    // watched. The folio and its contents are of `1 << order` pages in a row.
                    unsafe { table.store(index + n, page, Grant::shared(write)) }?;
                }
            }
            pages += watched;
        }
        Ok(pages)
    }
}

impl<M: DeviceMemory> Migration<'_, Copied, M> {
    /// Whether this is a migration of a range of an area of `mm`.
    fn is_in(&self, mm: &Mm) -> bool {
        NonNull::new(self.args().vma).is_some_and(|vma| {
            // SAFETY: The area is valid, and the mmap lock is held, by the type invariants of `Migration`.
            let vm_mm = unsafe { (*vma.as_ptr()).vm_mm };
            core::ptr::eq(vm_mm, mm.as_raw())
        })
    }

    /// Address of entry `i` of a range of an area.
    fn address(&self, i: usize) -> Option<usize> {
        (self.vma && i < self.len()).then(|| self.args().start + (i << PAGE_SHIFT))
    }

    /// Whether the page table entry will be writable that maps the folio which has moved to entry `i` of a range
    /// of an area. Core mm makes it as writable as that of the source was, or, for a hole, as the area is.
    /// `false` where userfaultfd may have protected the page of zeroes of a hole: core mm keeps the protection,
    /// and its entries do not tell.
    fn maps_writable(&self, i: usize) -> bool {
        if is_valid(self.src(i)) {
            return self.src(i) & bindings::MIGRATE_PFN_WRITE != 0;
        }
        NonNull::new(self.args().vma).is_some_and(|vma| {
            // SAFETY: The area is valid, and the mmap lock is held, by the type invariants of `Migration`.
            let is_writable = unsafe { VmaRef::from_raw(vma.as_ptr()) }.flags() & flags::WRITE != 0;
            // SAFETY: The area is valid, and the mmap lock is held, by the type invariants of `Migration`.
            is_writable && !unsafe { bindings::zdm_may_protect(vma.as_ptr()) }
        })
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.mirror.notifier.lock().watches.end(self.token.0);
    }
}

#[kunit_tests(zdmirror_fill)]
mod tests {
    use super::*;
    use crate::mm::{
        hmm::copy::Stop,
        kunit::{
            device::{
                EmulatedDevice,
                EmulatedMemory, //
            },
            support::{
                anon_range,
                touch, //
            },
        },
        migrate::migration::{
            Area,
            PfnBuffer,
            Request, //
        },
        PAGE_SIZE, //
    };

    /// Pages that the table maps when `range` is migrated with `token` and `watch` fills the table. A large
    /// hole is moved in one piece.
    fn filled(
        device: &EmulatedDevice,
        range: PageRange,
        watch: &Watch<'_>,
        token: Option<&WatchToken>,
    ) -> Result<usize> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(range.pages())?;
        let mmap = mm.mmap_read_lock();
        let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
        let request = Request {
            watch: token,
            large: true,
            ..Request::system(area, range, device.owner())
        };
        let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
        migration.fill_device(|order| device.alloc(order))?;
        let migration = migration.copied()?;
        let pages = watch.fill(&migration)?;
        drop(migration.finalize());
        Ok(pages)
    }

    #[test]
    fn only_a_migration_after_the_watch_fills_the_table() -> Result {
        let range = anon_range(3)?;
        touch(range)?;
        let device = EmulatedDevice::new()?;
        let mirror = device.mirror()?;
        let page = |n: usize| PageRange::new(range.addresses().nth(n).ok_or(EINVAL)?, 1);
        let watch = mirror.watch(range).ok_or(EAGAIN)?;
        let other = mirror.watch(range).ok_or(EAGAIN)?;
        // A migration that may have begun before the watch.
        assert_eq!(filled(&device, page(0)?, &watch, None)?, 0);
        assert_eq!(filled(&device, page(1)?, &watch, Some(other.token()))?, 0);
        assert_eq!(filled(&device, page(2)?, &watch, Some(watch.token()))?, 1);
        Ok(())
    }

    #[test]
    fn large_folio_fills_the_watched_pages_only() -> Result {
        let memory = anon_range(2 * BLOCK)?;
        let start = memory.start().next_multiple_of(BLOCK * PAGE_SIZE);
        let block = PageRange::new(start, BLOCK)?;
        let device = EmulatedDevice::new()?;
        let mirror = device.mirror()?;
        let watch = mirror.watch(block.first(3)).ok_or(EAGAIN)?;
        let filled = filled(&device, block, &watch, Some(watch.token()))?;
        drop(watch);
        assert_eq!((device.memory().used(), filled), (BLOCK, 3));
        let mut bytes = KVec::from_elem(0u8, 4 * PAGE_SIZE, GFP_KERNEL)?;
        assert_eq!(mirror.read(block, &mut bytes), (3, Stop::Unmapped));
        Ok(())
    }
}
