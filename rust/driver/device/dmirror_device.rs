// SPDX-License-Identifier: GPL-2.0

//! A device with its memory, and the look-up of its pages.

#![forbid(unsafe_code)]

use super::{
    chunk::Chunk,
    core_data::Core, //
};
use crate::{
    audit::Transition,
    driver::{
        devmem::{
            Allocator,
            ClientId,
            ListRoom,
            NewChunk,
            MAX_CHUNKS, //
        },
        params::{
            Config,
            Location, //
        },
    },
    mm::{
        migrate::migration::bytes,
        module::{
            pin::ModulePin,
            scope::ModuleScope, //
        },
        not_supported,
        pagemap::{
            audit::Corruption,
            ops::PagemapOps,
            registration::{
                PagemapRef,
                Registration, //
            },
        },
        region::{
            frames::RegionError,
            free_folio::FreeFolio,
            memory_type::MemoryType,
            owner::PgmapOwner, //
        },
        sync::task::check_signals, //
    },
    params::reserved_region,
    stamp::{
        may_log,
        Topic, //
    },
    uapi::ZdmStats, //
};
use kernel::{
    new_mutex,
    new_spinlock,
    prelude::*,
    sizes::SZ_1M,
    str::CStr,
    sync::{
        atomic::{
            Atomic,
            AtomicFlag,
            Relaxed, //
        },
        lock::{
            mutex::MutexBackend,
            spinlock::SpinLockBackend,
            Guard, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The number of freed folios of a chunk that the allocator takes back while it holds the lock
/// once.
const FREED_PORTION: usize = 1024;

/// The number of such portions per call: enough for all pages of a full device.
const FREED_PORTIONS: usize = 1 << 16;

/// Takes `lock`, unless the task is killed before it is free. May sleep.
///
/// # Errors
///
/// `EINTR` on a fatal signal.
pub(in crate::driver) fn lock_killable<T>(lock: &Mutex<T>) -> Result<Guard<'_, T, MutexBackend>> {
    loop {
        if let Some(guard) = lock.try_lock() {
            return Ok(guard);
        }
        check_signals()?;
        fsleep(Delta::from_millis(1));
    }
}

/// A device.
#[pin_data]
pub(crate) struct Device {
    name: &'static CStr,
    pub(in crate::driver) core: Arc<Core>,
    pub(in crate::driver) owner: Arc<PgmapOwner>,
    pub(in crate::driver) config: Config,
    location: Location,
    max_order: u32,
    /// The references that the kernel keeps on a free page, as seen in the last chunk.
    free_refs: Atomic<i32>,
    /// Whether the log has said that nothing can migrate to the device.
    refused: AtomicFlag,
    /// Whether the next chunk gets a page with a reference (fault injection).
    spoilt: AtomicFlag,
    /// Milliseconds by which evictions are slowed down (fault injection).
    slow: Atomic<i32>,
    /// Keeps the module loaded while a pagemap has excess references.
    #[pin]
    pub(super) leaks: Mutex<Option<ModulePin>>,
    /// Held while a chunk is added or removed, but not while its pages are evicted.
    #[pin]
    pub(in crate::driver) growth: Mutex<()>,
    /// Held while all memory is released.
    #[pin]
    pub(in crate::driver) releasing: Mutex<()>,
    #[pin]
    memory: SpinLock<Memory>,
}

/// The chunks of a device, and the allocator of their pages.
pub(in crate::driver) struct Memory {
    chunks: [Option<Registration<Chunk>>; MAX_CHUNKS],
    pub(in crate::driver) allocator: Allocator,
    chunk_pages: usize,
    /// Base pages that the allocator has taken back after they were freed.
    freed: u64,
}

impl Memory {
    /// Gives the allocator up to [`FREED_PORTION`] folios of each chunk that were freed since the
    /// last call. Returns whether there are more.
    fn take_back_freed(&mut self) -> bool {
        let Self {
            chunks,
            allocator,
            chunk_pages,
            freed,
        } = self;
        let mut more = false;
        for (number, chunk) in chunks.iter().enumerate() {
            let Some(chunk) = chunk else { continue };
            let first = number * *chunk_pages;
            more |= chunk.ops().freed().take(FREED_PORTION, |folio| {
                *freed += folio.pages() as u64;
                let index = folio.first_pfn() - chunk.first_pfn();
                // CAST: Page numbers of a device fit `u32`; `Device::grow()` ensures that.
                if let Err(folio) = allocator.put((first + index) as u32, folio) {
                    lost(&folio);
                }
            });
        }
        more
    }

    /// The chunk of page `page`, and the page's index in the chunk.
    fn locate(&self, page: u32) -> Option<(PagemapRef<Chunk>, usize)> {
        let page = page as usize;
        // The page number comes from the allocator, whose chunks are not empty.
        let number = page.checked_div(self.chunk_pages)?;
        let chunk = self.chunk(number)?;
        Some((chunk, page - number * self.chunk_pages))
    }

    fn chunk(&self, number: usize) -> Option<PagemapRef<Chunk>> {
        self.chunks.get(number)?.as_ref()?.get()
    }

    /// Removes chunk `number` if all of it is free.
    pub(in crate::driver) fn remove(&mut self, number: usize) -> Option<RemovedChunk> {
        let pages = self.allocator.remove_chunk(number)?;
        let registration = self.chunks.get_mut(number)?.take()?;
        Some(RemovedChunk {
            registration,
            pages,
        })
    }
}

impl Drop for Memory {
    /// Gives back all free pages, so that their memory can be unregistered.
    fn drop(&mut self) {
        while self.take_back_freed() {}
        for (number, chunk) in self.chunks.iter().enumerate() {
            if let Some(chunk) = chunk {
                self.allocator
                    .drain_chunk(number, |folio| retire(chunk, folio));
            }
        }
    }
}

/// A chunk that was removed from its device, and its pages.
#[must_use = "the memory of a chunk that is not unregistered stays registered"]
pub(in crate::driver) struct RemovedChunk {
    registration: Registration<Chunk>,
    pages: NewChunk,
}

impl RemovedChunk {
    /// Unregisters the memory. May sleep.
    pub(in crate::driver) fn unregister(mut self) {
        self.pages.drain(|folio| retire(&self.registration, folio));
    }
}

/// Gives `folio` back to `chunk` for unregistering.
fn retire(chunk: &Registration<Chunk>, folio: FreeFolio) {
    if let Err(folio) = chunk.retire(folio) {
        lost(&folio);
    }
}

/// Reports that `folio` belongs to no chunk. Its memory stays registered.
#[cold]
fn lost(folio: &FreeFolio) {
    pr_err!("no chunk has the folio at pfn {:#x}\n", folio.first_pfn());
}

impl Device {
    /// A device with one chunk, whose memory is registered in `scope`. May sleep.
    ///
    /// # Errors
    ///
    /// Why the memory cannot be had.
    pub(crate) fn new(
        name: &'static CStr,
        config: Config,
        location: Location,
        scope: &Arc<ModuleScope>,
    ) -> Result<Arc<Self>, RegionError> {
        Self::empty(name, config, location, scope)
            .map_err(|_| RegionError::NoSpace)
            .and_then(|device| device.grow().map(|()| device))
    }

    /// A device with one block of PRIVATE memory, for KUnit cases. May sleep.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(in crate::driver) fn for_test() -> Result<Arc<Self>> {
        use crate::{
            audit::Policy,
            driver::fault_around::streams::Most,
            mm::{
                kunit::support::this_module,
                region::free_folio::BLOCK_PAGES, //
            },
        };
        let config = Config {
            policy: Policy::Report,
            chunk_pages: BLOCK_PAGES.try_into().map_err(|_| EINVAL)?,
            inject: false,
            ledger: true,
            fault_around: Most::ONE,
        };
        let scope = ModuleScope::new(this_module())?;
        Self::new(c"kunit", config, Location::Anywhere, &scope).map_err(Error::from)
    }

    fn empty(
        name: &'static CStr,
        config: Config,
        location: Location,
        scope: &Arc<ModuleScope>,
    ) -> Result<Arc<Self>> {
        let core = Core::new(name, &config, scope)?;
        let owner = PgmapOwner::in_scope(scope.clone())?;
        let memory = Memory {
            chunks: [const { None }; MAX_CHUNKS],
            allocator: Allocator::new(config.chunk_pages)?,
            chunk_pages: config.chunk_pages.get(),
            freed: 0,
        };
        Arc::pin_init(
            pin_init!(Self {
                name,
                core,
                owner,
                config,
                location,
                max_order: location.memory_type().max_order(),
                free_refs: Atomic::new(0),
                refused: AtomicFlag::new(false),
                spoilt: AtomicFlag::new(false),
                slow: Atomic::new(0),
                leaks <- new_mutex!(None, "Device::leaks"),
                growth <- new_mutex!((), "Device::growth"),
                releasing <- new_mutex!((), "Device::releasing"),
                memory <- new_spinlock!(memory, "Device::memory"),
            }),
            GFP_KERNEL,
        )
    }

    /// The name of the device.
    pub(in crate::driver) fn name(&self) -> &'static str {
        self.name.to_str().unwrap_or("?")
    }

    /// Makes the next chunk break I1.
    pub(in crate::driver) fn spoil_next_memory(&self) {
        self.spoilt.store(true, Relaxed);
    }

    /// Makes each eviction take this many milliseconds more while its pages are unmapped.
    pub(in crate::driver) fn slow_down(&self, ms: u16) {
        self.slow.store(ms.into(), Relaxed);
    }

    /// Waits as long as [`Device::slow_down()`] says. May sleep.
    pub(in crate::driver) fn be_slow(&self) {
        let ms = self.slow.load(Relaxed);
        if ms > 0 {
            fsleep(Delta::from_millis(ms.into()));
        }
    }

    /// Locks the memory, after freed pages are given back to the allocator.
    pub(in crate::driver) fn memory(&self) -> Guard<'_, Memory, SpinLockBackend> {
        // The loop is bounded, because pages may be freed all the time.
        for _ in 0..FREED_PORTIONS {
            let mut memory = self.memory.lock();
            if !memory.take_back_freed() {
                return memory;
            }
        }
        self.memory.lock()
    }

    /// The type of its memory.
    pub(in crate::driver) fn memory_type(&self) -> MemoryType {
        self.location.memory_type()
    }

    /// The largest order of a folio of its memory.
    pub(in crate::driver) fn max_order(&self) -> u32 {
        self.max_order
    }

    /// References that this kernel keeps on a free page of the device's memory.
    pub(in crate::driver) fn free_refs(&self) -> i32 {
        self.free_refs.load(Relaxed)
    }

    /// Whether pages can be migrated to the device, to be asked when it has memory.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` for GENERIC memory in a kernel that has no notion of a free page of it, or that
    /// does not migrate to it. The log says which, once.
    pub(in crate::driver) fn check_migratable(&self) -> Result {
        let memory = self.memory_type();
        // On other memory such a reference is a violation, which the audit reports, and not the
        // kernel's rule.
        let why = if memory == MemoryType::Generic && self.free_refs() != 0 {
            "keeps a reference on free GENERIC pages"
        } else if !memory.is_migratable() {
            "cannot migrate GENERIC pages"
        } else {
            return Ok(());
        };
        if !self.refused.xchg(true, Relaxed) {
            pr_warn!(
                "{}: this kernel {}: nothing is migrated to them\n",
                self.name(),
                why
            );
        }
        Err(not_supported())
    }

    /// The number of chunks that the device may have.
    fn max_chunks(&self) -> usize {
        match self.location {
            Location::Anywhere => MAX_CHUNKS,
            Location::Coherent(_) | Location::Generic(_) => 1,
        }
    }

    /// Adds a chunk. May sleep. No page may be locked and no mmap lock held, because this takes the
    /// memory hotplug lock.
    fn grow(&self) -> Result<(), RegionError> {
        let _growth = lock_killable(&self.growth).map_err(|_| RegionError::NoSpace)?;
        let number = {
            let memory = self.memory();
            memory.chunks.iter().position(|chunk| chunk.is_none())
        };
        let number = number
            .filter(|&number| number < self.max_chunks())
            .ok_or(RegionError::NoSpace)?;
        let pages = self.config.chunk_pages.get();
        u32::try_from((number + 1) * pages).map_err(|_| RegionError::NoSpace)?;
        let mut new = NewChunk::with_room(pages).map_err(|_| RegionError::NoSpace)?;
        let ops = |frames| Chunk::new(self.core.clone(), number, frames);
        let owner = self.owner.clone();
        let reserved = |start| reserved_region(start, Chunk::NAME);
        let (chunk, free) = match self.location {
            Location::Anywhere => Registration::private(bytes(pages), owner, ops)?,
            Location::Coherent(start) => Registration::coherent(reserved(start)?, owner, ops)?,
            Location::Generic(start) => Registration::generic(reserved(start)?, owner, ops)?,
        };
        self.free_refs.store(chunk.free_refs(), Relaxed);
        let spoilt = self.spoilt.xchg(false, Relaxed);
        new.fill(free);
        if spoilt {
            new.with_first(|page| chunk.corrupt(page, Corruption::Referenced(true)));
        }
        self.scan_born(&chunk);
        if spoilt {
            let referenced = Corruption::Referenced(self.free_refs() != 0);
            new.with_first(|page| chunk.corrupt(page, referenced));
        }
        if may_log(Topic::Added) {
            pr_info!(
                "added {} MB of device memory, pfns {:#x} to {:#x}\n",
                bytes(pages) / SZ_1M,
                chunk.first_pfn(),
                chunk.first_pfn() + pages
            );
        }
        let mut memory = self.memory();
        // The allocator may use the pages from here on.
        match memory.allocator.add_chunk(new) {
            Ok(first) if first as usize == number * pages => {
                memory.chunks[number] = Some(chunk);
                Ok(())
            }
            added => {
                drop(memory);
                if let Err(pages) = added {
                    RemovedChunk {
                        registration: chunk,
                        pages,
                    }
                    .unregister();
                }
                Err(RegionError::NoSpace)
            }
        }
    }

    /// Tries to have `pages` free pages, and a whole block for a folio of `order`. May sleep, as
    /// [`Device::grow`].
    pub(in crate::driver) fn reserve(&self, pages: usize, order: u32) {
        // Each turn adds a chunk. RELEASE may take that away again, so the turns are limited.
        for _ in 0..MAX_CHUNKS {
            let enough = {
                let memory = self.memory();
                let large = order == 0 || memory.allocator.free_large() > 0;
                memory.allocator.free() >= pages && large
            };
            // If memory is short, the migration moves as many pages as it can.
            if enough || self.grow().is_err() {
                return;
            }
        }
    }

    /// Gives a new client a number. May sleep.
    pub(in crate::driver) fn add_client(&self) -> Result<ClientId> {
        loop {
            let wanted = {
                let mut memory = self.memory();
                if memory.allocator.spare_clients() > 0 {
                    return memory.allocator.add_client();
                }
                memory.allocator.wanted_lists()
            };
            let room = ListRoom::new(wanted)?;
            let old = self.memory().allocator.swap_lists(room);
            drop(old);
        }
    }

    /// Calls `f` with page `page` and its chunk, if no client has the page, and returns the page frame
    /// number. `f` must not sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT` when there is no such page, `EBUSY` when a client has it or `f` returns `false`.
    pub(in crate::driver) fn with_free(
        &self,
        page: u32,
        f: impl FnOnce(&Registration<Chunk>, &FreeFolio) -> bool,
    ) -> Result<usize> {
        let memory = self.memory();
        let number = (page as usize).checked_div(memory.chunk_pages);
        let chunk = number.and_then(|number| memory.chunks.get(number)?.as_ref());
        let chunk = chunk.ok_or(ENOENT)?;
        memory
            .allocator
            .with_free(page, |folio| f(chunk, folio).then_some(folio.first_pfn()))
            .flatten()
            .ok_or(EBUSY)
    }

    /// Chunk `number`, which stays registered as long as the result lives. Does not sleep.
    pub(in crate::driver) fn chunk(&self, number: usize) -> Option<PagemapRef<Chunk>> {
        self.memory.lock().chunk(number)
    }

    /// All chunks; each stays registered as long as its item lives. Does not sleep.
    pub(in crate::driver) fn chunks(&self) -> impl Iterator<Item = PagemapRef<Chunk>> + '_ {
        (0..MAX_CHUNKS).filter_map(|number| self.chunk(number))
    }

    /// The chunk of page `page`, and the page's index in the chunk. Does not sleep, and does not
    /// give freed pages back to the allocator.
    pub(in crate::driver) fn locate(&self, page: u32) -> Option<(PagemapRef<Chunk>, usize)> {
        self.memory.lock().locate(page)
    }

    /// The page with page frame number `pfn`, if it belongs to the device.
    pub(in crate::driver) fn page_of_pfn(&self, pfn: usize) -> Option<u32> {
        let (chunk, index) = self.locate_pfn(pfn)?;
        let pages = self.config.chunk_pages.get();
        // CAST: Page numbers of a device fit `u32`.
        Some((chunk.ops().number() * pages + index) as u32)
    }

    /// The chunk with page frame `pfn`, and the page's index in the chunk. Does not sleep.
    pub(in crate::driver) fn locate_pfn(&self, pfn: usize) -> Option<(PagemapRef<Chunk>, usize)> {
        self.chunks().find_map(|chunk| {
            let index = chunk.index_of_pfn(pfn)?;
            Some((chunk, index))
        })
    }

    /// As [`Device::locate_pfn`], for page frames of which most that follow each other are in one chunk. `near` is
    /// the chunk of the one before.
    #[inline]
    pub(in crate::driver) fn locate_near<'a>(
        &self,
        near: &'a mut Option<PagemapRef<Chunk>>,
        pfn: usize,
    ) -> Option<(&'a PagemapRef<Chunk>, usize)> {
        let known = near.as_ref().and_then(|chunk| chunk.index_of_pfn(pfn));
        let index = known.or_else(|| {
            let (chunk, index) = self.locate_pfn(pfn)?;
            *near = Some(chunk);
            Some(index)
        })?;
        near.as_ref().map(|chunk| (chunk, index))
    }

    /// The last transition of page frame `pfn`, if it belongs to the device.
    pub(in crate::driver) fn last_of_pfn(&self, pfn: usize) -> Transition {
        self.locate_pfn(pfn)
            .map_or(Transition::NONE, |(chunk, index)| {
                chunk.ops().ledger().last(index)
            })
    }

    /// The counters of the device.
    pub(in crate::driver) fn stats(&self) -> ZdmStats {
        let violations = self.core.auditor.total();
        // CAST: The number is not negative.
        let free_refs = self.free_refs() as u64;
        let freed = self.memory().freed;
        self.core
            .stats
            .to_uapi(freed, violations, self.max_order, free_refs)
    }
}
