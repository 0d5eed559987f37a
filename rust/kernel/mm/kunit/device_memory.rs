// SPDX-License-Identifier: GPL-2.0

//! A device with memory of its own, whose bytes neither core mm nor this module accesses.

use super::support::{
    mmap_anon,
    this_module,
    KunitDevice, //
};
use crate::mm::{
    migrate::device_memory::DmaPages,
    pagemap::dev_pagemap::DevPagemap,
    prelude::*,
    PAGE_SIZE, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    new_mutex,
    prelude::*,
    sizes::SZ_2M,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// The memory, and the engine that copies, which maps the other end for DMA.
#[pin_data]
struct Vram {
    device: KunitDevice,
    first_pfn: usize,
    #[pin]
    bytes: Mutex<KVVec<u8>>,
    /// Copies that were begun and not waited for.
    under_way: Atomic<usize>,
    /// Whether the engine goes on to copy, so that the migration maps the other end.
    goes_on: Atomic<bool>,
    /// Whether the engine is broken.
    broken: Atomic<bool>,
    /// Whether the hardware has lost the source of the next copy to the device.
    poisoned: Atomic<bool>,
}

impl Vram {
    fn new(first_pfn: usize) -> Result<Arc<Self>> {
        let bytes = KVVec::from_elem(0xff, SZ_2M, GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Self {
                device: KunitDevice::new()?,
                first_pfn,
                bytes <- new_mutex!(bytes, "Vram::bytes"),
                under_way: Atomic::new(0),
                goes_on: Atomic::new(false),
                broken: Atomic::new(false),
                poisoned: Atomic::new(false),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Copies each page of `pages`, at its place in the memory, by `copy`.
    fn each(
        &self,
        pages: &DevicePages<'_>,
        mut copy: impl FnMut(usize, &mut [u8; PAGE_SIZE]) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let mut bytes = self.bytes.lock();
        let first = (pages.pfn() - self.first_pfn) * PAGE_SIZE;
        let places = bytes[first..].chunks_exact_mut(PAGE_SIZE);
        for (n, place) in places.take(1 << pages.order()).enumerate() {
            let place = place.try_into().map_err(|_| CopyError::Mismatch)?;
            copy(n, place)?;
        }
        self.under_way.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Checks the address and length of `dma`, a mapping of pages of `order`, that the engine would get.
    fn program(&self, dma: Result<DmaPages<'_>>, order: u32) -> Result<(), CopyError> {
        let dma = dma.map_err(|_| CopyError::Device)?;
        assert_eq!(dma.bytes(), PAGE_SIZE << order);
        assert_eq!(dma.address() % PAGE_SIZE as u64, 0);
        Ok(())
    }

    /// Checks the address that an engine which goes on gets for `pages`.
    fn check_mapping(&self, pages: &CpuPages<'_>) {
        // CAST: `usize` has 64 bits.
        let address = (pages.pfn() * PAGE_SIZE) as u64;
        let expected = self.goes_on.load(Relaxed).then_some(address);
        assert_eq!(pages.dma_address(), expected);
    }
}

impl DeviceMemory for Vram {
    fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
        // Nothing that the CPU could copy to is behind the folio.
        assert_eq!(to.copy_from_cpu(from), Err(CopyError::Mismatch));
        self.check_mapping(from);
        let dma = from.dma_map_to_device(self.device.device());
        self.program(dma, from.order())?;
        from.set_poisoned(self.poisoned.load(Relaxed));
        let copied = self.each(to, |n, place| from.read_page(n, place));
        from.set_poisoned(false);
        copied
    }

    fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
        let order = to.order();
        self.check_mapping(to);
        self.program(to.dma_map_from_device(self.device.device()), order)?;
        let beyond = to.read_page(1 << order, &mut [0; PAGE_SIZE]);
        assert_eq!(beyond, Err(CopyError::Mismatch));
        self.each(from, |n, place| to.write_page(n, place))
    }

    fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
        assert_eq!(to.clear(), Err(CopyError::Mismatch));
        self.each(to, |_, place| {
            place.fill(0);
            Ok(())
        })
    }

    fn dma_device(&self) -> Option<&Device<Bound>> {
        self.goes_on.load(Relaxed).then(|| self.device.device())
    }

    fn fence(&self) -> Result {
        self.under_way.store(0, Relaxed);
        if self.broken.load(Relaxed) {
            Err(EIO)
        } else {
            Ok(())
        }
    }
}

struct Driver {
    free: FreeStack,
    vram: Arc<Vram>,
}

impl PagemapOps for Driver {
    fn folio_free(&self, folio: FreedFolio<'_>) {
        if let Some(free) = folio.into_free() {
            let _ = self.free.push(free);
        }
    }
}

impl PrivateOps for Driver {
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> core::result::Result<(), FaultError> {
        let mut buffer = PfnBuffer::new(1 << fault.order())?;
        let mut migration = fault.migrate(&mut buffer, &*self.vram)?;
        migration.fill_system(SystemFolio::alloc)?;
        drop(migration.copied()?.finalize());
        Ok(())
    }
}

impl DevPagemap<Driver> {
    /// Migrates `range` of the KUnit thread, and returns how many pages are on the device.
    fn migrate(&self, range: PageRange, owner: &PgmapOwner) -> Result<usize> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(range.pages())?;
        let mmap = mm.mmap_read_lock();
        let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
        let request = Request::system(area, range, owner);
        let mut migration = Migration::of_range(&mut buffer, &request, &*self.ops().vram)?;
        migration.fill_device(|order| {
            let folio = self.ops().free.pop().ok_or(ENOSPC)?;
            let pfn = folio.first_pfn();
            let rest = |rest| drop(self.ops().free.push(rest));
            let folio = folio.split_to(pfn, order, rest).map_err(|_| ENOSPC)?;
            self.folio_init(folio, Backing::none(order)?)
                .map_err(|_| EBUSY)
        })?;
        drop(migration.copied()?.finalize());
        assert_eq!(self.ops().vram.under_way.load(Relaxed), 0);
        Ok(self.used())
    }
}

#[kunit_tests(zdmirror_device_memory)]
mod tests {
    use super::*;

    const PAGES: usize = 5;

    struct Setting {
        map: Registration<Driver>,
        owner: Arc<PgmapOwner>,
        start: usize,
    }

    impl Setting {
        /// Pages of which each but the last was written to.
        fn new() -> Result<Self> {
            let owner = PgmapOwner::new(this_module())?;
            let driver = |frames: crate::mm::region::frames::Frames| {
                Ok(Driver {
                    free: FreeStack::new(frames)?,
                    vram: Vram::new(frames.first_pfn())?,
                })
            };
            let (map, free) = Registration::private(SZ_2M, owner.clone(), driver)?;
            for folio in free {
                map.ops().free.push(folio).map_err(|_| EINVAL)?;
            }
            let start = mmap_anon(PAGES * PAGE_SIZE)?;
            for page in 0..PAGES - 1 {
                let at = UserPtr::from_addr(start + page * PAGE_SIZE);
                let mut writer = UserSlice::new(at, PAGE_SIZE).writer();
                writer.write_slice(&[1 + page as u8; PAGE_SIZE])?;
            }
            Ok(Self { map, owner, start })
        }

        fn migrate(&self) -> Result<usize> {
            let range = PageRange::new(self.start, PAGES)?;
            self.map.migrate(range, &self.owner)
        }

        /// Whether the CPU reads what it wrote, and zeroes where it wrote nothing.
        fn is_intact(&self) -> Result<bool> {
            let mut bytes = [0; PAGE_SIZE];
            let at = UserPtr::from_addr(self.start);
            let mut reader = UserSlice::new(at, PAGES * PAGE_SIZE).reader();
            for page in 1..=PAGES {
                reader.read_slice(&mut bytes)?;
                let expected = if page == PAGES { 0 } else { page as u8 };
                if bytes.iter().any(|&byte| byte != expected) {
                    return Ok(false);
                }
            }
            Ok(true)
        }
    }

    impl Drop for Setting {
        fn drop(&mut self) {
            while let Some(folio) = self.map.ops().free.pop() {
                let _ = self.map.retire(folio);
            }
        }
    }

    #[test]
    fn bytes_are_in_the_memory_of_the_device_only() -> Result {
        let s = Setting::new()?;
        assert_eq!(s.migrate()?, PAGES);
        let vram = &s.map.ops().vram;
        // The order in which pages were allocated does not matter.
        for page in 0..PAGES {
            let bytes = vram.bytes.lock();
            let found = bytes
                .chunks_exact(PAGE_SIZE)
                .any(|chunk| chunk.iter().all(|&byte| byte == page as u8));
            assert!(found);
        }
        assert!(s.is_intact()?);
        assert_eq!((s.map.used(), s.map.away()), (0, MAX_PAGES));
        Ok(())
    }

    #[test]
    fn copy_that_does_not_end_moves_nothing() -> Result {
        let s = Setting::new()?;
        for goes_on in [false, true] {
            s.map.ops().vram.goes_on.store(goes_on, Relaxed);
            s.map.ops().vram.broken.store(true, Relaxed);
            assert_eq!(s.migrate(), Err(EIO));
            assert_eq!(s.map.used(), 0);
            assert!(s.is_intact()?);
            s.map.ops().vram.broken.store(false, Relaxed);
            assert_eq!(s.migrate()?, PAGES);
            assert!(s.is_intact()?);
        }
        Ok(())
    }

    #[test]
    fn page_that_cannot_be_read_does_not_move() -> Result {
        let s = Setting::new()?;
        s.map.ops().vram.poisoned.store(true, Relaxed);
        // The page that nothing was written to needs no copy.
        assert_eq!(s.migrate()?, 1);
        s.map.ops().vram.poisoned.store(false, Relaxed);
        assert!(s.is_intact()?);
        assert_eq!(s.migrate()?, PAGES);
        assert!(s.is_intact()?);
        Ok(())
    }

    #[test]
    fn list_wants_room_for_a_large_folio() -> Result {
        let s = Setting::new()?;
        assert_eq!(s.migrate()?, PAGES);
        let pfns = s.map.used_pfns()?;
        assert_eq!(pfns.len(), PAGES);
        let list = s.map.device_pfns(&pfns).ok_or(EINVAL)?;
        let vram = &*s.map.ops().vram;
        for room in [1, PAGES, MAX_PAGES - 1] {
            let mut buffer = PfnBuffer::new(room)?;
            let refused = Migration::of_device_pages(&mut buffer, &list, vram);
            assert_eq!(refused.err(), Some(EINVAL));
        }
        let mut buffer = PfnBuffer::new(MAX_PAGES)?;
        let mut migration = Migration::of_device_pages(&mut buffer, &list, vram)?;
        assert_eq!(migration.selected(), PAGES);
        migration.fill_system(SystemFolio::alloc)?;
        drop(migration.copied()?.finalize());
        assert_eq!(s.map.used(), 0);
        assert!(s.is_intact()?);
        Ok(())
    }
}
