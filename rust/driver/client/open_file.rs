// SPDX-License-Identifier: GPL-2.0

//! An open file of a device: a mirror of the address space that opened it.

#![forbid(unsafe_code)]

use super::{
    injection::Injection,
    pins::{
        Pinned,
        Pins, //
    },
};
use crate::{
    driver::{
        device::dmirror_device::Device,
        devmem::ClientId,
        fault_around::streams::Most,
        migrate::request::Migrator, //
    },
    mm::{
        hmm::mirror::HmmMirror,
        user::range::PageRange, //
    },
};
use kernel::{
    mm::MmWithUser,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            AtomicFlag,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

/// The state of an open file, which forked processes may share.
#[pin_data]
pub(crate) struct Client {
    mirror: HmmMirror,
    device: Arc<Device>,
    id: ClientId,
    /// Whether a migration to the device, or a fault injection, was attempted.
    used_memory: AtomicFlag,
    #[pin]
    injection: Injection,
    #[pin]
    pins: Mutex<Pins<Pinned>>,
}

impl Client {
    /// Mirrors `mm` on `device`. May sleep.
    pub(in crate::driver) fn new(device: &Arc<Device>, mm: &MmWithUser) -> Result<Pin<KBox<Self>>> {
        let id = device.add_client()?;
        // No other task knows the number yet.
        let set = device.core.around.allow(id, device.config.fault_around);
        if let Err(err) = set {
            device.memory().allocator.remove_client(id);
            return Err(err);
        }
        let client = KBox::try_pin_init(
            try_pin_init!(Self {
                mirror: HmmMirror::new(mm, device.owner.clone())?,
                device: device.clone(),
                id,
                used_memory: AtomicFlag::new(false),
                injection <- Injection::new(),
                pins <- new_mutex!(Pins::new(), "Client::pins"),
            }),
            GFP_KERNEL_ACCOUNT,
        );
        if client.is_err() {
            device.core.around.forget(id);
            device.memory().allocator.remove_client(id);
        }
        client
    }

    pub(in crate::driver) fn mirror(&self) -> &HmmMirror {
        &self.mirror
    }

    pub(in crate::driver) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The client's number in the allocator.
    pub(in crate::driver) fn id(&self) -> ClientId {
        self.id
    }

    /// Makes the next allocation for a migration of this client, or for a CPU fault in the address
    /// space that it mirrors, fail.
    pub(in crate::driver) fn fail_next_alloc(&self) -> Result {
        self.device.core.fail_alloc.ask(self.id, self.mirror.mm())
    }

    /// Sets the largest number of pages that a CPU fault on the client's pages brings back. Returns
    /// the previous setting.
    pub(in crate::driver) fn set_fault_around(&self, most: Most) -> Result<Most> {
        self.device.core.around.allow(self.id, most)
    }

    pub(super) fn injection(&self) -> &Injection {
        self.used_memory.store(true, Relaxed);
        &self.injection
    }

    pub(in crate::driver) fn pins(&self) -> &Mutex<Pins<Pinned>> {
        &self.pins
    }

    /// Migrates the pages of `range` in system memory to the device, as [`Migrator::to_device`].
    pub(in crate::driver) fn to_device(&self, range: PageRange) -> Result<usize> {
        self.used_memory.store(true, Relaxed);
        // The injection keeps or drops the folio when no lock is held.
        let mut held = self.injection.armed();
        let mapped = self
            .migrator()
            .to_device(range, |migration| held.take_from(migration))?;
        self.injection.keep(held);
        Ok(mapped)
    }

    /// Migrates the device's pages of `range` to system memory, as [`Migrator::to_system`].
    pub(in crate::driver) fn to_system(&self, range: PageRange) -> Result<usize> {
        self.migrator().to_system(range)
    }

    fn migrator(&self) -> Migrator<'_> {
        Migrator::new(&self.device, &self.mirror, self.id)
    }

    /// Ends the client's use of the device, when the file is closed. May sleep.
    pub(in crate::driver) fn close(&self) {
        self.device.core.fail_alloc.take(self.id);
        self.mirror.let_go();
        // Pinned pages do not move, so they are unpinned before the eviction.
        self.unpin_all();
        // The processes that own the data keep it. Only this client's pages are moved.
        self.migrator().evict_mapped();
        self.device.evict(self.id);
        self.device.core.around.forget(self.id);
        self.device.memory().allocator.remove_client(self.id);
        // After the eviction, so that the oracle still sees a page that the injection holds.
        self.injection.mend(&self.device);
        // The search for leaked references waits for migrations of other clients. A client that
        // used no memory of the device has leaked none.
        if self.used_memory.load(Relaxed) {
            // Once the module is being unloaded, pinning it is too late.
            self.device.stay_for_leaks();
        }
    }

    /// Releases all pins when the file is closed. May sleep.
    fn unpin_all(&self) {
        loop {
            let held = self.pins().lock().remove_any();
            // The pins are dropped without the lock.
            if held.is_none() {
                return;
            }
        }
    }
}

#[kunit_tests(zdmirror_client)]
mod tests {
    use super::*;
    use crate::{
        audit::Moment,
        driver::client::rw::Faulting,
        mm::{
            hmm::{
                access::Access,
                mapped::Memory,
                snapshot::{
                    MapSize,
                    Seen, //
                },
            },
            kunit::support::{
                mmap_anon,
                munmap, //
            },
            migrate::migration::bytes,
            user::range::PageRange,
            PAGE_SIZE, //
        },
    };
    use kernel::uaccess::{
        UserPtr,
        UserSlice, //
    };

    const PAGES: usize = 16;

    struct Setting {
        device: Arc<Device>,
        client: Pin<KBox<Client>>,
        address: usize,
        range: PageRange,
    }

    impl Setting {
        fn take_fail_alloc(&self) -> bool {
            self.device.core.fail_alloc.take(self.client.id())
        }
    }

    /// A page in use would keep the device's memory registered for ever.
    impl Drop for Setting {
        fn drop(&mut self) {
            if self.device.release_memory().is_err() {
                pr_err!("a KUnit case leaves pages in use\n");
            }
        }
    }

    /// A device of its own, a client, and some memory of the KUnit thread's address space.
    fn setting() -> Result<Setting> {
        let address = mmap_anon(bytes(PAGES))?;
        let device = Device::for_test()?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let client = Client::new(&device, mm)?;
        Ok(Setting {
            device,
            client,
            address,
            range: PageRange::new(address, PAGES)?,
        })
    }

    fn fill(address: usize) -> Result {
        let mut writer = UserSlice::new(UserPtr::from_addr(address), bytes(PAGES)).writer();
        for page in 0..PAGES {
            writer.write_slice(&[page as u8 + 1; PAGE_SIZE])?;
        }
        Ok(())
    }

    fn holds_pattern(address: usize) -> Result<bool> {
        let mut reader = UserSlice::new(UserPtr::from_addr(address), bytes(PAGES)).reader();
        let mut page = [0u8; PAGE_SIZE];
        for n in 0..PAGES {
            reader.read_slice(&mut page)?;
            if page.iter().any(|&byte| byte != n as u8 + 1) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    #[test]
    fn round_trip_keeps_data_and_counts() -> Result {
        let s = setting()?;
        let range = s.range;
        fill(s.address)?;
        s.client.to_device(range)?;
        let counts = s.device.audit(Moment::Quiet)?;
        assert_eq!((counts.used, counts.found), (PAGES as u64, 0));
        assert_eq!(s.client.to_system(range)?, PAGES);
        let counts = s.device.audit(Moment::Quiet)?;
        assert_eq!((counts.used, counts.found), (0, 0));
        assert!(holds_pattern(s.address)?);
        assert_eq!(s.device.core.auditor.total(), 0);
        Ok(())
    }

    #[test]
    fn mappings_are_entries() -> Result {
        let s = setting()?;
        fill(s.address)?;
        s.client.to_device(s.range)?;
        let mut folios = 0;
        for chunk in s.device.chunks() {
            let used = (0..chunk.pages()).filter(|&i| chunk.order_in_use(i).is_some());
            for index in used {
                let page = chunk.page(index).ok_or(EINVAL)?;
                assert_eq!((page.entries(), page.mapcount()), (Some(1), 1));
                folios += 1;
            }
        }
        assert_eq!(folios, PAGES);
        munmap(s.address, bytes(PAGES))?;
        s.device.check_mappings();
        assert_eq!(s.device.core.auditor.total(), 0);
        Ok(())
    }

    #[test]
    fn cpu_access_brings_pages_back() -> Result {
        let s = setting()?;
        fill(s.address)?;
        s.client.to_device(s.range)?;
        assert!(holds_pattern(s.address)?);
        let counts = s.device.audit(Moment::Quiet)?;
        assert_eq!((counts.used, counts.found), (0, 0));
        Ok(())
    }

    #[test]
    fn release_evicts_own_pages_only() -> Result {
        let s = setting()?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let other = Client::new(&s.device, mm)?;
        fill(s.address)?;
        // Pages of both are between those of the other one.
        for (n, page) in s.range.batches(1).enumerate() {
            let client = if n % 2 == 0 { &s.client } else { &other };
            client.to_device(page)?;
        }
        s.client.close();
        let counts = s.device.audit(Moment::Quiet)?;
        assert_eq!((counts.used, counts.found), (PAGES as u64 / 2, 0));
        other.close();
        let counts = s.device.audit(Moment::Quiet)?;
        assert_eq!((counts.used, counts.found), (0, 0));
        assert!(holds_pattern(s.address)?);
        Ok(())
    }

    #[test]
    fn release_unregisters_and_memory_comes_again() -> Result {
        let s = setting()?;
        let range = s.range;
        fill(s.address)?;
        for _ in 0..2 {
            s.client.to_device(range)?;
            assert_eq!(s.device.audit(Moment::Quiet)?.used, PAGES as u64);
            s.device.release_memory()?;
            assert_eq!(s.device.audit(Moment::Quiet)?.pages, 0);
            assert!(holds_pattern(s.address)?);
        }
        Ok(())
    }

    #[test]
    fn unmapped_range_is_refused() -> Result {
        let s = setting()?;
        let beyond = PageRange::new(s.address + (1 << 39), PAGES)?;
        assert_eq!(s.client.to_device(beyond), Err(EINVAL));
        assert_eq!(s.device.audit(Moment::Quiet)?.used, 0);
        Ok(())
    }

    /// Maps the zero page at `address`, by a read of the CPU.
    fn touch(address: usize) -> Result {
        let mut byte = [0xff];
        UserSlice::new(UserPtr::from_addr(address), 1)
            .reader()
            .read_slice(&mut byte)?;
        assert_eq!(byte, [0]);
        Ok(())
    }

    #[test]
    fn exclusive_until_the_cpu_comes() -> Result {
        let s = setting()?;
        let range = s.range;
        fill(s.address)?;
        assert_eq!(s.client.mirror().make_exclusive(range)?, PAGES);
        assert!(s.client.mirror().has_exclusive(range)?);
        assert_eq!(s.client.check_exclusive(range).err(), Some(EPERM));
        // Pages that are already exclusive are skipped, and the device may read them.
        assert_eq!(s.client.mirror().make_exclusive(range)?, 0);
        let copy = mmap_anon(bytes(PAGES))?;
        let to = UserPtr::from_addr(copy);
        let outcome = s.client.read(range, to, Faulting::Never)?;
        assert_eq!((outcome.pages, outcome.faults), (PAGES, 0));
        assert!(s.client.mirror().has_exclusive(range)?);
        assert!(holds_pattern(copy)?);
        // The CPU takes the first page, then all pages.
        UserSlice::new(UserPtr::from_addr(s.address), 1)
            .writer()
            .write_slice(&[1])?;
        assert!(!s.client.mirror().has_exclusive(range.first(1))?);
        assert!(s.client.check_exclusive(range).is_err());
        assert!(holds_pattern(s.address)?);
        assert!(s.client.check_exclusive(range).is_ok());
        Ok(())
    }

    #[test]
    fn device_writes_what_is_exclusive() -> Result {
        let s = setting()?;
        let range = s.range;
        // Zero pages are replaced first, which invalidates the range: a second try is needed.
        for page in 0..PAGES / 2 {
            touch(s.address + bytes(page))?;
        }
        assert_eq!(s.client.mirror().make_exclusive(range)?, PAGES);
        let from = mmap_anon(bytes(PAGES))?;
        fill(from)?;
        let outcome = s.client.write(range, UserPtr::from_addr(from))?;
        assert_eq!((outcome.pages, outcome.faults), (PAGES, 0));
        assert!(s.client.mirror().has_exclusive(range)?);
        assert!(holds_pattern(s.address)?);
        Ok(())
    }

    #[test]
    fn exclusive_is_for_one_client() -> Result {
        let s = setting()?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let other = Client::new(&s.device, mm)?;
        let range = s.range;
        fill(s.address)?;
        assert_eq!(s.client.mirror().make_exclusive(range)?, PAGES);
        assert_eq!(other.mirror().make_exclusive(range)?, PAGES);
        assert!(s.client.check_exclusive(range).is_ok());
        assert!(other.check_exclusive(range).is_err());
        other.close();
        assert!(holds_pattern(s.address)?);
        Ok(())
    }

    #[test]
    fn exclusive_brings_device_pages_back() -> Result {
        let s = setting()?;
        let range = s.range;
        fill(s.address)?;
        s.client.to_device(range)?;
        assert_eq!(s.client.mirror().make_exclusive(range)?, PAGES);
        let counts = s.device.audit(Moment::Quiet)?;
        assert_eq!((counts.used, counts.found), (0, 0));
        assert!(holds_pattern(s.address)?);
        Ok(())
    }

    #[test]
    fn snapshot_tells_pages_apart() -> Result {
        let s = setting()?;
        let page = |memory, write| Seen::Page {
            memory,
            write,
            size: MapSize::Base,
        };
        touch(s.address)?;
        for n in [1, 2] {
            UserSlice::new(UserPtr::from_addr(s.address + bytes(n)), 1)
                .writer()
                .write_slice(&[1])?;
        }
        s.client
            .to_device(PageRange::new(s.address + bytes(2), 1)?)?;
        let mut seen = [Seen::Error; 4];
        let range = s.range.first(seen.len());
        s.client.mirror().snapshot(range, &mut seen, |s| s)?;
        let expected = [
            page(Memory::Zero, false),
            page(Memory::System, true),
            page(Memory::Private { local: true }, true),
            Seen::Absent,
        ];
        assert_eq!(seen, expected);
        // No page was faulted in or brought back, and no other device can see our memory.
        assert_eq!(s.device.audit(Moment::Quiet)?.used, 1);
        let stranger = setting()?;
        let mirror = stranger.client.mirror();
        mirror.snapshot(range, &mut seen, |s| s)?;
        assert_eq!(seen[1..3], [page(Memory::System, true), Seen::Absent]);
        assert_eq!(s.device.audit(Moment::Quiet)?.used, 1);
        Ok(())
    }

    #[test]
    fn migration_fills_the_table() -> Result {
        let s = setting()?;
        let range = s.range;
        let copy = mmap_anon(bytes(PAGES))?;
        let to = UserPtr::from_addr(copy);
        fill(s.address)?;
        // A place without a page migrates, too, and may be written.
        munmap(s.address + bytes(PAGES - 1), PAGE_SIZE)?;
        let hole = PageRange::new(mmap_anon(PAGE_SIZE)?, 1)?;
        assert_eq!(s.client.to_device(hole)?, 1);
        assert_eq!(
            s.client.write(hole, UserPtr::from_addr(s.address))?.faults,
            0
        );
        let range = range.first(PAGES - 1);
        assert_eq!(s.client.to_device(range)?, PAGES - 1);
        fill(copy)?;
        let outcome = s.client.write(range, UserPtr::from_addr(copy))?;
        assert_eq!((outcome.pages, outcome.faults), (PAGES - 1, 0));
        assert_eq!(s.client.read(range, to, Faulting::Never)?.pages, PAGES - 1);
        assert!(holds_pattern(copy)?);
        // Pages that are already on the device do not move again, so their state is unknown.
        assert_eq!(s.client.to_device(range)?, 0);
        assert_eq!(s.client.mirror().refresh(range)?, PAGES - 1);
        s.client.to_system(range)?;
        let read = s.client.read(range, to, Faulting::Never);
        assert_eq!(read.err(), Some(ENOENT));
        Ok(())
    }

    #[test]
    fn device_fault_maps_and_unmap_forgets() -> Result {
        let s = setting()?;
        let range = s.range;
        let copy = mmap_anon(bytes(PAGES))?;
        let to = UserPtr::from_addr(copy);
        let read = || s.client.read(range, to, Faulting::Never);
        fill(s.address)?;
        assert_eq!(read().err(), Some(ENOENT));
        s.client.fault(range, Access::Read)?;
        assert_eq!(read()?.pages, PAGES);
        assert!(holds_pattern(copy)?);
        // Half of the range is unmapped; the rest of the table is valid.
        munmap(s.address, bytes(PAGES / 2))?;
        assert_eq!(read().err(), Some(ENOENT));
        assert_eq!(s.client.fault(range, Access::Read), Err(EFAULT));
        let half = range.skip(PAGES / 2).ok_or(EINVAL)?;
        assert_eq!(s.client.read(half, to, Faulting::Never)?.pages, PAGES / 2);
        Ok(())
    }

    #[test]
    fn broken_page_stays_on_the_device() -> Result {
        let s = setting()?;
        let one = s.range.skip(3).ok_or(EINVAL)?.first(1);
        let read = || {
            UserSlice::new(UserPtr::from_addr(one.start()), 1)
                .reader()
                .read_slice(&mut [0])
        };
        fill(s.address)?;
        s.client.to_device(s.range)?;
        let folio = s.client.mirror().get_device_folio(one)?;
        folio.set_poisoned(true);
        drop(folio);
        assert_eq!(s.client.to_system(s.range)?, PAGES - 1);
        // A CPU access is refused at once, and not tried again.
        assert_eq!(read(), Err(EFAULT));
        assert_eq!(s.device.audit(Moment::Quiet)?.used, 1);
        let folio = s.client.mirror().get_device_folio(one)?;
        folio.set_poisoned(false);
        drop(folio);
        read()?;
        assert!(holds_pattern(s.address)?);
        assert_eq!(s.device.audit(Moment::Quiet)?.used, 0);
        Ok(())
    }

    #[test]
    fn allocation_fails_once() -> Result {
        let s = setting()?;
        assert!(!s.take_fail_alloc());
        s.client.fail_next_alloc()?;
        assert!(s.take_fail_alloc());
        assert!(!s.take_fail_alloc());
        Ok(())
    }
}
