// SPDX-License-Identifier: GPL-2.0

//! Misuses by safe code that must return an error. Misuses that the compiler refuses are in
//! `samples/compile-fail`.

use super::{
    device::{
        EmulatedDevice,
        EmulatedMemory,
        NoPages, //
    },
    support::{
        anon_range,
        munmap,
        shared_range,
        this_module,
        touch,
        Killed, //
    },
};
use crate::mm::{
    hmm::{
        access::Access,
        mirror::HmmMirror,
        snapshot::Seen, //
    },
    migrate::{
        device_memory::{
            CopyError,
            CpuPages,
            DeviceMemory,
            DevicePages, //
        },
        migration::{
            bytes,
            Area,
            Migration,
            PfnBuffer,
            Request,
            MAX_PAGES, //
        },
        moved::Moved, //
    },
    page::{
        backing::Backing,
        device_folio::{
            FolioInitCause,
            FreedFolio,
            LockedDeviceFolio, //
        },
        system_folio::SystemFolio, //
    },
    pagemap::{
        audit::Corruption,
        fault::{
            FaultError,
            VmFault, //
        },
        ops::{
            PagemapOps,
            PrivateOps, //
        },
        registration::Registration, //
    },
    region::{
        frames::RegionError,
        free_stack::FreeStack,
        owner::PgmapOwner, //
    },
    user::{
        mmap_lock::MmapLock,
        pin::{
            Hold,
            PinRequest,
            PinnedPages, //
        },
        range::PageRange, //
    },
    would_deadlock,
    PAGE_SIZE,
    PMD_ORDER, //
};
use kernel::{
    mm::MmWithUser,
    prelude::*,
    sizes::SZ_2M,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        }, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    },
    workqueue, //
};

/// Memory of a device whose functions say that they have copied, and copy nothing.
struct Idle;

impl DeviceMemory for Idle {
    fn copy_in(&self, _: &mut DevicePages<'_>, _: &CpuPages<'_>) -> Result<(), CopyError> {
        Ok(())
    }

    fn copy_out(&self, _: &mut CpuPages<'_>, _: &DevicePages<'_>) -> Result<(), CopyError> {
        Ok(())
    }

    fn clear(&self, _: &mut DevicePages<'_>) -> Result<(), CopyError> {
        Ok(())
    }
}

/// A driver whose `folio_free` asks whether its registration could be dropped.
struct Asking(FreeStack);

/// The address of that registration, 0 while there is none.
static ASKED: Atomic<usize> = Atomic::new(0);

/// The answer: 1 for no, 2 for yes.
static ANSWER: Atomic<u32> = Atomic::new(0);

impl PagemapOps for Asking {
    fn folio_free(&self, folio: FreedFolio<'_>) {
        if let Some(free) = folio.into_free() {
            let _ = self.0.push(free);
        }
        let asked = ASKED.load(Relaxed) as *const Registration<Self>;
        // SAFETY: The address is 0, or that of a registration which the case that stores it keeps.
        if let Some(registration) = unsafe { asked.as_ref() } {
            let is_idle = registration.wait_until_idle(3);
            ANSWER.store(1 + u32::from(is_idle), Relaxed);
        }
    }
}

impl PrivateOps for Asking {
    fn migrate_to_ram(&self, _fault: &VmFault<'_>) -> Result<(), FaultError> {
        Err(FaultError::Sigbus)
    }
}

#[kunit_tests(zdmirror_misuse)]
mod tests {
    use super::*;

    #[test]
    fn page_with_a_stale_flag_is_not_allocated() -> Result {
        let device = EmulatedDevice::new()?;
        let map = device.memory();
        let block = device.take().ok_or(ENOSPC)?;
        assert!(map.corrupt(&block, Corruption::AnonExclusive(true)));
        let index = map.index_of_pfn(block.first_pfn()).ok_or(EINVAL)?;
        // As a large folio, and by itself.
        let backing = Backing::alloc(block.order())?;
        let err = map.folio_init(block, backing).err().ok_or(EINVAL)?;
        assert_eq!(err.cause, FolioInitCause::NotFree(index));
        let pfn = err.folio.first_pfn();
        let page = err.folio.split_to(pfn, 0, |rest| device.put(rest));
        let page = page.map_err(|_| EINVAL)?;
        let err = map
            .folio_init(page, Backing::alloc(0)?)
            .err()
            .ok_or(EINVAL)?;
        assert_eq!(err.cause, FolioInitCause::NotFree(index));
        assert!(map.corrupt(&err.folio, Corruption::AnonExclusive(false)));
        let folio = map.folio_init(err.folio, err.backing);
        drop(folio.map_err(|_| EINVAL)?);
        Ok(())
    }

    /// Bytes of `range` that are not 0, as the CPU sees them.
    fn bytes_that_are_set(range: PageRange) -> Result<usize> {
        let mut page = KVec::from_elem(0u8, PAGE_SIZE, GFP_KERNEL)?;
        let mut found = 0;
        for address in range.addresses() {
            let user = UserSlice::new(UserPtr::from_addr(address), PAGE_SIZE);
            user.reader().read_slice(&mut page)?;
            found += page.iter().filter(|&&byte| byte != 0).count();
        }
        Ok(found)
    }

    /// Fills `range` with bytes that are not 0.
    fn fill(range: PageRange) -> Result {
        let page = KVec::from_elem(0xa5u8, PAGE_SIZE, GFP_KERNEL)?;
        for address in range.addresses() {
            let user = UserSlice::new(UserPtr::from_addr(address), PAGE_SIZE);
            user.writer().write_slice(&page)?;
        }
        Ok(())
    }

    /// Has the allocator give out pages next that hold bytes which are not 0.
    fn dirty_free_pages() -> Result {
        let range = anon_range(256)?;
        fill(range)?;
        munmap(range.start(), bytes(range.pages()))
    }

    #[test]
    fn copy_that_copies_nothing_shows_no_memory_of_the_system() -> Result {
        let range = anon_range(16)?;
        // To the device, of pages and of places without one.
        let device = EmulatedDevice::new()?;
        fill(range.first(8))?;
        dirty_free_pages()?;
        device.migrate_by(range, &Idle, |migration| {
            assert_eq!(migration.moved().pages, 16);
            Ok(())
        })?;
        assert_eq!(bytes_that_are_set(range)?, 0);
        // And back.
        let device = EmulatedDevice::with_fault(|fault| {
            let mut buffer = PfnBuffer::new(1)?;
            let mut migration = fault.migrate(&mut buffer, &Idle)?;
            migration.fill_system(SystemFolio::alloc)?;
            drop(migration.copied()?.finalize());
            Ok(())
        })?;
        fill(range)?;
        device.migrate(range)?;
        assert_eq!(device.memory().used(), 16);
        dirty_free_pages()?;
        assert_eq!(bytes_that_are_set(range)?, 0);
        Ok(())
    }

    #[test]
    fn numbers_do_not_overflow() {
        for (pages, length) in [(0, 0), (3, 3 * PAGE_SIZE), (usize::MAX, usize::MAX)] {
            assert_eq!(bytes(pages), length);
        }
        // Values that no migration returns.
        let mut moved = Moved::default();
        moved.by_order[0] = 1;
        assert_eq!(moved.large(), 0);
    }

    #[test]
    fn closures_may_change_the_memory_that_is_looked_at() -> Result {
        let device = EmulatedDevice::new()?;
        let range = anon_range(3)?;
        let mirror = device.mirror()?;
        touch(range)?;
        let unmap = |page: usize| munmap(range.start() + page * PAGE_SIZE, PAGE_SIZE);
        let mut seen = [Seen::Error; 3];
        mirror.snapshot(range, &mut seen, |seen| {
            let _ = unmap(0);
            seen
        })?;
        // As it was before the closure was called.
        assert!(seen.iter().all(|seen| seen.size().is_some()));
        let mut there = [false; 3];
        mirror.inspect(range, &mut there, |_, facts| {
            let _ = unmap(1);
            let _ = mirror.refresh(range);
            facts.is_some()
        })?;
        assert_eq!(there, [false, true, true]);
        Ok(())
    }

    #[test]
    fn registration_does_not_wait_for_the_caller_that_drops_it() -> Result {
        let owner = PgmapOwner::new(this_module())?;
        let pages = |frames| Ok(Asking(FreeStack::new(frames)?));
        let (map, mut region) = Registration::private(SZ_2M, owner, pages)?;
        let block = region.next().ok_or(ENOSPC)?;
        let backing = Backing::none(block.order())?;
        let folio = map.folio_init(block, backing).map_err(|_| EINVAL)?;
        ASKED.store(&raw const map as usize, Relaxed);
        drop(folio);
        ASKED.store(0, Relaxed);
        // `memunmap_pages()` would have waited for that call of `folio_free`.
        assert_eq!(ANSWER.load(Relaxed), 1);
        assert!(map.wait_until_idle(3));
        let block = map.ops().0.pop().ok_or(ENOSPC)?;
        map.retire(block).map_err(|_| EINVAL)
    }

    #[test]
    fn large_hole_takes_a_small_folio_only_if_it_is_split() -> Result {
        let device = EmulatedDevice::new()?;
        let memory = anon_range(2 * MAX_PAGES)?;
        let start = memory.start().next_multiple_of(MAX_PAGES * PAGE_SIZE);
        let block = PageRange::new(start, MAX_PAGES)?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(MAX_PAGES)?;
        let mmap = mm.mmap_read_lock();
        let area = Area::lookup(&mmap, start).ok_or(EFAULT)?;
        let request = Request {
            large: true,
            ..Request::system(area, block, device.owner())
        };
        let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
        assert_eq!(migration.source(0), Some(PMD_ORDER));
        // Core mm would follow the destination of each page of the hole, which has none.
        for part in [0, 1, MAX_PAGES - 1] {
            let refused = migration.copy_to_device(0, part, device.alloc(0)?);
            assert_eq!(refused, Err(CopyError::Mismatch));
        }
        migration.split_hole(0);
        assert_eq!(
            (migration.source(0), migration.source(7)),
            (Some(0), Some(0))
        );
        let copied = migration.copy_to_device(7, 0, device.alloc(0)?);
        assert_eq!(copied, Ok(()));
        let migration = migration.copied()?;
        assert_eq!(migration.moved().pages, 1);
        drop(migration.finalize());
        assert_eq!(device.memory().used(), 1);
        Ok(())
    }

    /// Begins a migration of a page while the task has the mmap lock. A second `mmap_read_lock()` could wait for a
    /// task that waits to write, so this only tries.
    fn begin_nested(range: PageRange, owner: &PgmapOwner) -> Result {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(1)?;
        let mmap = mm.mmap_read_trylock().ok_or(EAGAIN)?;
        let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
        let request = Request::system(area, range, owner);
        Migration::of_range(&mut buffer, &request, &EmulatedMemory).map(drop)
    }

    #[test]
    fn task_with_a_migration_does_not_wait_for_itself() -> Result {
        let device = EmulatedDevice::new()?;
        let (range, others) = (anon_range(1)?, anon_range(1)?);
        let mirror = device.mirror()?;
        let pin = PinRequest {
            hold: Hold::Get,
            write: true,
            fast: true,
        };
        device.migrate_by(range, &EmulatedMemory, |migration| {
            for range in [range, others] {
                assert_eq!(touch(range), Err(EFAULT));
                let pinned = PinnedPages::new(range, pin);
                assert_eq!(pinned.err(), Some(would_deadlock()));
                let faulted = mirror.fault(range, Access::Write);
                assert_eq!(faulted, Err(would_deadlock()));
                let exclusive = mirror.make_exclusive(range);
                assert_eq!(exclusive, Err(would_deadlock()));
                assert_eq!(begin_nested(range, device.owner()), Err(would_deadlock()));
            }
            let held = migration.hold_moved(false).ok_or(ENOENT)?;
            assert_eq!(held.flip_bit(), Err(would_deadlock()));
            // The task has the mmap lock, and an invalidation may wait for the page.
            let task = current!();
            let mm = task.mm().ok_or(EINVAL)?;
            let lock = MmapLock::read(mm);
            assert_eq!(lock.err(), Some(would_deadlock()));
            let another = HmmMirror::new(mm, device.owner().clone());
            assert_eq!(another.err(), Some(would_deadlock()));
            let mut seen = [Seen::Error];
            let snapshot = mirror.snapshot(others, &mut seen, |seen| seen);
            assert_eq!(snapshot, Err(would_deadlock()));
            let inspected = mirror.inspect(others, &mut seen, |seen, _| seen);
            assert_eq!(inspected, Err(would_deadlock()));
            assert_eq!(mirror.refresh(others), Err(would_deadlock()));
            assert!(mirror.watch(others).is_none());
            // And a task with the memory hotplug lock, too.
            let owner = device.owner().clone();
            let refused = Registration::private(SZ_2M, owner, |_| Ok(NoPages));
            assert_eq!(refused.err(), Some(RegionError::Locked));
            Ok(())
        })?;
        for range in [range, others] {
            touch(range)?;
            mirror.fault(range, Access::Write)?;
        }
        Ok(())
    }

    /// Counts the steps of the case below.
    static STEP: Atomic<u32> = Atomic::new(0);

    /// Waits until the other task has come to `step`, for no longer than a second.
    fn wait_for(step: u32) -> Result {
        for _ in 0..1000 {
            if STEP.load(Acquire) >= step {
                return Ok(());
            }
            fsleep(Delta::from_millis(1));
        }
        Err(ETIMEDOUT)
    }

    #[test]
    fn killed_task_does_not_wait_for_the_mmap_lock() -> Result {
        let range = anon_range(1)?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let owner = PgmapOwner::new(this_module())?;
        STEP.store(0, Relaxed);
        let other: ARef<MmWithUser> = mm.into();
        // The lock of this task itself would do, but for lockdep.
        workqueue::system_unbound().try_spawn(GFP_KERNEL, move || {
            let lock = other.mmap_read_lock();
            STEP.store(1, Release);
            let _ = wait_for(2);
            drop(lock);
            STEP.store(3, Release);
        })?;
        wait_for(1)?;
        let killed = Killed::new()?;
        let refused = HmmMirror::new(mm, owner.clone()).err();
        drop(killed);
        // The lock is still held.
        let step = STEP.xchg(2, Release);
        wait_for(3)?;
        assert_eq!((refused, step), (Some(EINTR), 1));
        HmmMirror::new(mm, owner)?.refresh(range)?;
        Ok(())
    }

    /// The errors of a fault handler that touched another page, and that began a migration of its own.
    static IN_FAULT: [Atomic<i32>; 2] = [Atomic::new(0), Atomic::new(0)];

    /// The page that the handler touches.
    static TOUCHED: Atomic<usize> = Atomic::new(0);

    #[test]
    fn fault_handler_does_not_wait_for_its_own_page() -> Result {
        let device = EmulatedDevice::with_fault(|_| {
            let range = PageRange::new(TOUCHED.load(Relaxed), 1)?;
            let errno = |result: Result| result.err().map_or(0, Error::to_errno);
            IN_FAULT[0].store(errno(touch(range)), Relaxed);
            let owner = PgmapOwner::new(this_module())?;
            let nested = begin_nested(range, &owner);
            IN_FAULT[1].store(errno(nested), Relaxed);
            Err(FaultError::Sigbus)
        })?;
        let (range, other) = (anon_range(1)?, anon_range(1)?);
        TOUCHED.store(other.start(), Relaxed);
        device.migrate(range)?;
        assert_eq!(touch(range), Err(EFAULT));
        let found = IN_FAULT.each_ref().map(|errno| errno.load(Relaxed));
        assert_eq!(found, [EFAULT.to_errno(), would_deadlock().to_errno()]);
        touch(other)
    }

    #[test]
    fn folio_of_a_file_is_not_moved_within_system_memory() -> Result {
        let device = EmulatedDevice::new()?;
        for (range, result) in [
            (anon_range(1)?, Ok(())),
            (shared_range(1)?, Err(CopyError::Mismatch)),
        ] {
            touch(range)?;
            let task = current!();
            let mm = task.mm().ok_or(EINVAL)?;
            let mut buffer = PfnBuffer::new(1)?;
            let mmap = mm.mmap_read_lock();
            let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
            let request = Request::system(area, range, device.owner());
            let mut migration = Migration::of_range(&mut buffer, &request, &EmulatedMemory)?;
            assert_eq!(migration.source(0), Some(0));
            let copied = migration.copy_to_system(0, 0, SystemFolio::alloc(0)?);
            assert_eq!(copied, result);
        }
        Ok(())
    }

    #[test]
    fn list_of_device_pages_tells_no_orders_afterwards() -> Result {
        let device = EmulatedDevice::new()?;
        device.migrate(anon_range(2)?)?;
        let mut buffer = PfnBuffer::new(MAX_PAGES)?;
        let pfns = device.memory().used_pfns()?;
        let list = device.memory().device_pfns(&pfns).ok_or(EINVAL)?;
        let mut migration = Migration::of_device_pages(&mut buffer, &list, &EmulatedMemory)?;
        migration.fill_system(SystemFolio::alloc)?;
        let migration = migration.copied()?;
        assert_eq!(migration.moved().pages, 2);
        // A large folio may have any order, and has no lock that would keep it.
        assert_eq!(migration.finalize().destinations().count(), 0);
        Ok(())
    }

    /// Migrates `range` to `device` as far as `copied` says, and forgets the migration.
    fn forget_migration(
        device: &EmulatedDevice,
        buffer: &mut PfnBuffer,
        range: PageRange,
        copied: bool,
    ) -> Result {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mmap = mm.mmap_read_lock();
        let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
        let request = Request::system(area, range, device.owner());
        let mut migration = Migration::of_range(buffer, &request, &EmulatedMemory)?;
        migration.fill_device(|order| device.alloc(order))?;
        if copied {
            core::mem::forget(migration.copied()?);
        } else {
            core::mem::forget(migration);
        }
        Ok(())
    }

    #[test]
    fn forgotten_migration_ends_with_its_buffer() -> Result {
        let device = EmulatedDevice::new()?;
        // One page has its entries in the buffer, which may be moved, and more have them elsewhere.
        for pages in [1, 3] {
            let range = anon_range(pages)?;
            touch(range)?;
            let mut buffer = PfnBuffer::new(pages)?;
            forget_migration(&device, &mut buffer, range, true)?;
            assert_eq!(touch(range), Err(EFAULT));
            let moved = KBox::new(buffer, GFP_KERNEL)?;
            assert_eq!(device.memory().used(), pages);
            drop(moved);
            // Core mm had moved the pages, and the CPU gets them back.
            touch(range)?;
            assert_eq!(device.memory().used(), 0);
            // The buffer can be used again, which ends the migration, too.
            let mut buffer = PfnBuffer::new(pages)?;
            for _ in 0..2 {
                forget_migration(&device, &mut buffer, range, true)?;
            }
            drop(buffer);
            touch(range)?;
            assert_eq!(device.memory().used(), 0);
        }
        Ok(())
    }

    #[test]
    fn forgotten_destinations_stay_in_use() -> Result {
        let device = EmulatedDevice::new()?;
        let range = anon_range(2)?;
        touch(range)?;
        let mut buffer = PfnBuffer::new(2)?;
        forget_migration(&device, &mut buffer, range, false)?;
        drop(buffer);
        // The pages are where they were, and those of the device, which a copy may go to, are lost.
        touch(range)?;
        let lost = device.memory().used_pfns()?;
        assert_eq!(lost.len(), 2);
        for &pfn in &lost {
            let index = device.memory().index_of_pfn(pfn).ok_or(EINVAL)?;
            let page = device.memory().page(index).ok_or(EINVAL)?;
            // SAFETY: The migration that was forgotten owned the lock and a reference of the small folio, and no
            // copy is under way.
            drop(unsafe { LockedDeviceFolio::from_raw(page.as_non_null(), 0) });
        }
        Ok(())
    }

    #[test]
    fn migration_that_a_fault_handler_forgets_ends() -> Result {
        let device = EmulatedDevice::with_fault(|fault| {
            let mut buffer = PfnBuffer::new(1)?;
            let migration = fault.migrate(&mut buffer, &EmulatedMemory)?;
            core::mem::forget(migration);
            drop(buffer);
            let mut buffer = PfnBuffer::new(1)?;
            let mut migration = fault.migrate(&mut buffer, &EmulatedMemory)?;
            migration.fill_system(SystemFolio::alloc)?;
            core::mem::forget(migration.copied()?);
            Ok(())
        })?;
        let range = anon_range(1)?;
        device.migrate(range)?;
        touch(range)?;
        assert_eq!(device.memory().used(), 0);
        Ok(())
    }
}
