// SPDX-License-Identifier: GPL-2.0

//! One device: its memory, and the way to a page of it.

#![forbid(unsafe_code)]

use super::{
    chunk::{
        Chunk,
        Core, //
    },
    pool::{
        ListRoom,
        NewSlots,
        OpenerId,
        MAX_CHUNKS, //
    },
};
use crate::{
    audit::{
        check_born,
        check_handed_out,
        check_idle,
        Check,
        Invariant,
        PageState,
        Policy,
        Violation, //
    },
    mm::{
        device_folio::{
            HandOutError,
            LockedDeviceFolio, //
        },
        migrate::bytes,
        page::PageView,
        pagemap::{
            PgmapOwner,
            Registration, //
        },
        system_folio::SystemFolio,
        PAGE_SIZE, //
    },
};
use core::num::NonZeroUsize;
use kernel::{
    new_mutex,
    prelude::*,
    sizes::SZ_1M,
    str::CStr,
    sync::{
        Arc,
        Mutex,
        SetOnce, //
    }, //
};

const PAGES_PER_MB: NonZeroUsize = NonZeroUsize::new(SZ_1M / PAGE_SIZE).unwrap();

/// Pages that are tried before one that is not fit to be handed out counts as none left.
const HAND_OUT_TRIES: usize = 16;

/// What the module parameters say, checked.
#[derive(Clone, Copy)]
pub(crate) struct Config {
    /// What a broken invariant does.
    pub(crate) policy: Policy,
    /// Pages of a chunk.
    pub(crate) chunk_pages: NonZeroUsize,
    /// Whether `ZDM_INJECT` is allowed.
    pub(crate) inject: bool,
}

impl Config {
    /// Largest chunk, so that a slip of the finger does not take all memory for struct pages.
    const MAX_CHUNK_MB: usize = 16 * 1024;

    /// Checks the parameters; says in the log which one is wrong and why.
    pub(crate) fn parse(audit: &CStr, chunk_mb: usize, inject: bool) -> Result<Self> {
        let Some(policy) = Policy::parse(audit) else {
            pr_err!("parameter audit: must be off, report or panic\n");
            return Err(EINVAL);
        };
        let chunk_pages = match NonZeroUsize::new(chunk_mb) {
            Some(mb) if chunk_mb % 2 == 0 && chunk_mb <= Self::MAX_CHUNK_MB => {
                mb.checked_mul(PAGES_PER_MB)
            }
            _ => None,
        };
        let Some(chunk_pages) = chunk_pages else {
            pr_err!(
                "parameter devmem_chunk_mb: {} is not a multiple of 2 from 2 to {}\n",
                chunk_mb,
                Self::MAX_CHUNK_MB
            );
            return Err(EINVAL);
        };
        Ok(Self {
            policy,
            chunk_pages,
            inject,
        })
    }
}

/// A device with PRIVATE memory.
#[pin_data]
pub(crate) struct Device {
    // Chunks go first: core mm calls into `core` until they are unregistered.
    chunks: [SetOnce<Registration<Chunk>>; MAX_CHUNKS],
    pub(super) core: Arc<Core>,
    pub(super) owner: Arc<PgmapOwner>,
    pub(super) config: Config,
    /// Held while a chunk is added.
    #[pin]
    growth: Mutex<()>,
}

/// Pages that an audit has seen.
#[derive(Default)]
pub(super) struct AuditCounts {
    pub(super) pages: u64,
    pub(super) free: u64,
    pub(super) used: u64,
    pub(super) found: u64,
}

impl Device {
    /// A device with one chunk. May sleep.
    pub(crate) fn new(name: &'static CStr, config: Config) -> Result<Arc<Self>> {
        let core = Core::new(name, config.policy, config.chunk_pages)?;
        let owner = PgmapOwner::new()?;
        let device = Arc::pin_init(
            pin_init!(Self {
                chunks: core::array::from_fn(|_| SetOnce::new()),
                core,
                owner,
                config,
                growth <- new_mutex!((), "Device::growth"),
            }),
            GFP_KERNEL,
        )?;
        device.grow()?;
        Ok(device)
    }

    /// Adds a chunk. May sleep; no page may be locked and no mmap lock held, as this takes the
    /// memory hotplug lock.
    fn grow(&self) -> Result {
        let _growth = self.growth.lock();
        let Some((number, place)) = self
            .chunks
            .iter()
            .enumerate()
            .find(|(_, chunk)| chunk.as_ref().is_none())
        else {
            return Err(ENOSPC);
        };
        let pages = self.config.chunk_pages.get();
        let base = u32::try_from(number * pages).map_err(|_| ENOSPC)?;
        u32::try_from((number + 1) * pages).map_err(|_| ENOSPC)?;
        let slots = NewSlots::new(pages)?;
        let chunk = Registration::private(
            bytes(pages),
            self.owner.clone(),
            Chunk::new(self.core.clone(), base),
        )?;
        if self.core.auditor.is_on() {
            for page in (0..pages).filter_map(|i| chunk.page(i)) {
                self.core.auditor.judge(check_born(page));
            }
        }
        pr_info!(
            "added {} MB of device memory, pfns {:#x} to {:#x}\n",
            bytes(pages) / SZ_1M,
            chunk.first_pfn(),
            chunk.first_pfn() + pages
        );
        if !place.populate(chunk) {
            return Err(EBUSY);
        }
        // The pool may give the pages out from here on, when the chunk can be found.
        self.core.pool.lock().add_chunk(slots).map(|_| ())
    }

    /// Tries to have `pages` free pages. May sleep, as [`Device::grow`].
    pub(super) fn reserve(&self, pages: usize) {
        loop {
            let (free, can_grow) = {
                let pool = self.core.pool.lock();
                (pool.free(), pool.can_grow())
            };
            // Short of memory the migration is to move what it can.
            if free >= pages || !can_grow || self.grow().is_err() {
                return;
            }
        }
    }

    /// Numbers a new opener. May sleep.
    pub(super) fn add_opener(&self) -> Result<OpenerId> {
        loop {
            let wanted = {
                let mut pool = self.core.pool.lock();
                if pool.spare_openers() > 0 {
                    return pool.add_opener();
                }
                pool.wanted_lists()
            };
            let room = ListRoom::new(wanted)?;
            let old = self.core.pool.lock().swap_lists(room);
            drop(old);
        }
    }

    /// The chunk of page `page` and its index there.
    pub(super) fn locate(&self, page: u32) -> Option<(&Registration<Chunk>, usize)> {
        let pages = self.config.chunk_pages;
        let chunk = self.chunks.get(page as usize / pages)?.as_ref()?;
        Some((chunk, page as usize % pages))
    }

    /// The page with number `pfn`, if it is one of the device.
    pub(super) fn page_of_pfn(&self, pfn: usize) -> Option<u32> {
        let pages = self.config.chunk_pages.get();
        self.chunks().enumerate().find_map(|(number, chunk)| {
            let index = pfn.checked_sub(chunk.first_pfn())?;
            (index < chunk.pages()).then_some((number * pages + index) as u32)
        })
    }

    fn chunks(&self) -> impl Iterator<Item = &Registration<Chunk>> {
        self.chunks.iter().map_while(|chunk| chunk.as_ref())
    }

    /// Takes a free page for `opener` and hands it out with `backing` as its memory. Does not
    /// sleep.
    ///
    /// A page that is not what a free page must be is reported, set aside, and the next one taken.
    pub(super) fn hand_out(
        &self,
        opener: OpenerId,
        mut backing: SystemFolio,
    ) -> Option<LockedDeviceFolio> {
        // Bounded, so that an allocator that is broken ends in reports.
        for _ in 0..HAND_OUT_TRIES {
            let page = self.core.pool.lock().take(opener, 0)?;
            let (chunk, index) = self.locate(page)?;
            let view = chunk.page(index)?;
            let broken = self.core.auditor.is_on()
                && !chunk.is_in_use(index)
                && self.core.auditor.judge(check_handed_out(view));
            match chunk.hand_out(index, backing) {
                Ok(folio) => {
                    self.core.stats.allocated.add(1);
                    return Some(folio);
                }
                Err(err) => {
                    backing = self.refused(page, view, err, broken);
                }
            }
        }
        None
    }

    /// Reports a page that could not be handed out, and gives the backing back.
    fn refused(
        &self,
        page: u32,
        view: PageView<'_>,
        err: HandOutError,
        reported: bool,
    ) -> SystemFolio {
        match &err {
            // Somebody has it, and keeps it: the pool gave it out twice.
            HandOutError::InUse(_) => self.core.auditor.report(Violation::on(
                view,
                Invariant::HandedOut,
                Check::State,
                0,
                1,
            )),
            HandOutError::NotFree(_) => {
                if !reported {
                    self.core.auditor.judge(check_handed_out(view));
                }
                self.core.pool.lock().quarantine(page, 0);
            }
            HandOutError::NoSuchPage(_) => self.core.pool.lock().quarantine(page, 0),
        }
        err.into_backing()
    }

    /// Checks every page. Exact at a quiescent point only. May sleep; may be interrupted by a
    /// fatal signal.
    pub(super) fn audit(&self) -> Result<AuditCounts> {
        let mut counts = AuditCounts::default();
        let pages = self.config.chunk_pages.get();
        for (number, chunk) in self.chunks().enumerate() {
            for index in 0..chunk.pages() {
                if index % 4096 == 0 {
                    crate::mm::task::check_signals()?;
                }
                let page = (number * pages + index) as u32;
                let Some(view) = chunk.page(index) else {
                    continue;
                };
                let free = self.core.pool.lock().is_free(page).unwrap_or(true);
                counts.pages += 1;
                let state = if free {
                    counts.free += 1;
                    PageState::Free
                } else {
                    counts.used += 1;
                    PageState::Used
                };
                if self.core.auditor.judge(check_idle(view, state)) {
                    counts.found += 1;
                }
            }
        }
        Ok(counts)
    }
}
