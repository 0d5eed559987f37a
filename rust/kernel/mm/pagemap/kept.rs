// SPDX-License-Identifier: GPL-2.0

//! The block behind a page of a device may be kept when the page is freed, so that the next folio there
//! need not allocate one.
//!
//! There is an upper limit. Memory pressure frees the blocks of pages that are free.
//!
//! C header: [`include/linux/shrinker.h`](srctree/include/linux/shrinker.h)

use crate::{
    bindings,
    mm::{
        page::backing::RawBacking,
        sync::{
            cache_line::CacheLine,
            once::{
                read_once,
                store_release, //
            },
        },
    },
};
use kernel::{
    alloc::flags::__GFP_NOWARN,
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Relaxed,
        Release, //
    },
};

/// One of so many pages of a pagemap may have a block that is kept.
const SHARE: usize = 4;

/// The result of a shrinker that can free nothing: `SHRINK_STOP`.
const STOP: usize = usize::MAX;

/// A pagemap, as far as its shrinker is concerned.
pub(super) trait Keeper {
    /// Its blocks.
    fn kept(&self) -> &Kept;

    /// Folios in use.
    fn folios(&self) -> usize;
}

/// The blocks of order 0 that a pagemap keeps for its free pages.
///
/// A block is marked before its first use. A marked block is in use, or kept for the page that used it last.
///
/// # Invariants
///
/// - A slot is 0, or owns a marked block. A task takes the block by an exchange with 0, so that one task gets
///   it. Only the owner of page `i`, free or in `folio_free`, stores a block in slot `i`.
/// - `marked` is the number of blocks that are marked, except while a task is changing it.
/// - `shrinker` is 0, or a shrinker that is registered for the pagemap of `self`.
pub(super) struct Kept {
    slots: KVVec<Atomic<usize>>,
    marked: CacheLine<Atomic<usize>>,
    /// Most blocks that are marked.
    most: usize,
    /// Where the shrinker goes on.
    cursor: Atomic<usize>,
    shrinker: Atomic<usize>,
}

impl Kept {
    /// Makes room for the blocks of `pages` pages. Keeps no block before [`Kept::start`]. May sleep.
    pub(super) fn new(pages: usize) -> Result<Self> {
        // The driver chooses the number of pages, and is told when it is too large.
        let mut slots = KVVec::with_capacity(pages, GFP_KERNEL | __GFP_NOWARN)?;
        for _ in 0..pages {
            slots
                .push_within_capacity(Atomic::new(0))
                .map_err(|_| ENOMEM)?;
        }
        Ok(Self {
            most: slots.len() / SHARE,
            slots,
            marked: CacheLine(Atomic::new(0)),
            cursor: Atomic::new(0),
            shrinker: Atomic::new(0),
        })
    }

    /// Registers a shrinker, without which nothing is kept. May sleep.
    ///
    /// # Safety
    ///
    /// `map` must be the pagemap of `self`, and stay until [`Kept::stop`] was called or `self` dropped.
    pub(super) unsafe fn start<T: Keeper>(&self, map: *const T) {
        if self.most == 0 {
            return;
        }
        // SAFETY: The format has no arguments.
        let shrinker = unsafe { bindings::shrinker_alloc(0, c"zone-device-backing".as_char_ptr()) };
        if shrinker.is_null() {
            return;
        }
        // SAFETY: The shrinker was allocated above, and is not registered yet.
        let raw = unsafe { &mut *shrinker };
        raw.count_objects = Some(count::<T>);
        raw.scan_objects = Some(scan::<T>);
        raw.private_data = map.cast_mut().cast();
        // SAFETY: The shrinker was allocated above, and is complete. Its functions find `map`, which stays
        // until the shrinker is freed, by the contract of this function.
        unsafe { bindings::shrinker_register(shrinker) };
        // INVARIANT: Registered above.
        self.shrinker.store(shrinker as usize, Release);
    }

    /// Frees all blocks, and keeps no new ones. A block of a folio in use that is marked is kept until `self` is
    /// dropped. May sleep.
    pub(super) fn stop(&self) {
        let shrinker = self.shrinker.xchg(0, Acquire) as *mut bindings::shrinker;
        if !shrinker.is_null() {
            // SAFETY: The shrinker was registered, and is forgotten. This waits for its functions.
            unsafe { bindings::shrinker_free(shrinker) };
        }
        self.free(usize::MAX);
    }

    /// Whether slot `index` has a block: a hint, as the shrinker may take it.
    #[inline]
    pub(super) fn has(&self, index: usize) -> bool {
        self.slots
            .get(index)
            .is_some_and(|slot| read_once(slot) != 0)
    }

    /// Takes the block out of slot `index`.
    pub(super) fn take(&self, index: usize) -> Option<RawBacking> {
        if !self.has(index) {
            return None;
        }
        let block = self.slots.get(index)?.xchg(0, Acquire);
        // INVARIANT: The caller owns the block from here on.
        (block != 0).then(|| RawBacking::from_kept(block))
    }

    /// Puts a block that is marked in slot `index`, and returns whether it is.
    ///
    /// # Safety
    ///
    /// The caller must own page `index`, free or in `folio_free`, and the block, which is the slot's from
    /// here on if the result says so.
    pub(super) unsafe fn put(&self, index: usize, block: RawBacking) -> bool {
        let Some(kept) = block.to_kept() else {
            return false;
        };
        let Some(slot) = self.slots.get(index) else {
            return false;
        };
        // INVARIANT: The slot is empty: the block was taken out of it, or marked for the page when the slot was
        // empty, and no other value has owned the page since.
        store_release(slot, kept);
        true
    }

    /// Marks `block` as one to be kept, if the limit allows it. The caller owns page `index`, and is about to
    /// allocate a folio there with the block.
    pub(super) fn mark(&self, index: usize, block: RawBacking) -> RawBacking {
        let is_full = || self.marked.load(Relaxed) >= self.most;
        if !block.is_single() || self.has(index) || self.shrinker.load(Relaxed) == 0 || is_full() {
            return block;
        }
        self.marked.add(1, Relaxed);
        block.marked()
    }

    /// Blocks that can be freed, as far as `folios` folios in use do not have them.
    fn idle(&self, folios: usize) -> usize {
        let marked = self.marked.load(Relaxed);
        if marked > folios {
            return marked - folios;
        }
        // Folios in use may have blocks that are not marked, so that this says nothing.
        (0..if marked > 0 { self.slots.len() } else { 0 })
            .filter(|&index| self.has(index))
            .count()
    }

    /// Frees up to `n` blocks, and returns how many.
    fn free(&self, n: usize) -> usize {
        let len = self.slots.len();
        let mut freed = 0;
        let mut index = self.cursor.load(Relaxed).min(len);
        for _ in 0..len {
            if freed == n {
                break;
            }
            index = if index >= len { 0 } else { index };
            if let Some(block) = self.take(index) {
                // SAFETY: `take()` gave us the block, which is of one page and in no use.
                unsafe { block.free(0) };
                freed += 1;
            }
            index += 1;
        }
        self.cursor.store(index, Relaxed);
        self.marked.fetch_sub(freed, Relaxed);
        freed
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.stop();
    }
}

/// # Safety
///
/// Only to be called by core mm, for the shrinker of a `T`.
unsafe extern "C" fn count<T: Keeper>(
    shrinker: *mut bindings::shrinker,
    _control: *mut bindings::shrink_control,
) -> usize {
    // SAFETY: `start()` has put the pagemap there, which stays until the shrinker is freed.
    let map = unsafe { &*(*shrinker).private_data.cast::<T>() };
    map.kept().idle(map.folios())
}

/// # Safety
///
/// As [`count`].
unsafe extern "C" fn scan<T: Keeper>(
    shrinker: *mut bindings::shrinker,
    control: *mut bindings::shrink_control,
) -> usize {
    // SAFETY: `start()` has put the pagemap there, which stays until the shrinker is freed.
    let map = unsafe { &*(*shrinker).private_data.cast::<T>() };
    // SAFETY: Core mm gives a valid structure.
    match map.kept().free(unsafe { (*control).nr_to_scan }) {
        0 => STOP,
        freed => freed,
    }
}

#[kunit_tests(zdmirror_kept)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::this_module,
        page::{
            backing::{
                Backing,
                BackingBatch, //
            },
            device_folio::FreedFolio, //
        },
        pagemap::{
            dev_pagemap::DevPagemap,
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
            free_folio::{
                FreeFolio,
                FreePages,
                BLOCK_PAGES, //
            },
            free_stack::FreeStack,
            owner::PgmapOwner, //
        },
    };
    use kernel::sizes::SZ_2M;

    /// A driver that keeps freed folios.
    struct Driver(FreeStack);

    impl PagemapOps for Driver {
        fn folio_free(&self, folio: FreedFolio<'_>) {
            if let Some(free) = folio.into_free() {
                let _ = self.0.push(free);
            }
        }
    }

    impl PrivateOps for Driver {
        fn migrate_to_ram(&self, _fault: &VmFault<'_>) -> core::result::Result<(), FaultError> {
            Err(FaultError::Sigbus)
        }
    }

    /// A block of PRIVATE memory, page by page.
    fn register() -> Result<(Registration<Driver>, FreePages)> {
        let ops = |frames| Ok(Driver(FreeStack::new(frames)?));
        let (map, mut free) = Registration::private(SZ_2M, PgmapOwner::new(this_module())?, ops)?;
        let block = free.next().ok_or(EINVAL)?;
        Ok((map, FreePages::new(block).map_err(|_| EINVAL)?))
    }

    /// Hands `folio` out with a block of its own, and frees it.
    fn use_once(map: &DevPagemap<Driver>, folio: FreeFolio) -> Result<FreeFolio> {
        let backing = Backing::alloc(folio.order())?;
        drop(map.folio_init(folio, backing).map_err(|_| EINVAL)?);
        map.ops().0.pop().ok_or(EINVAL)
    }

    fn retire_all(map: &DevPagemap<Driver>, mut pages: FreePages) -> Result {
        while let Some(folio) = pages.take(0) {
            map.retire(folio).map_err(|_| EINVAL)?;
        }
        assert_eq!(map.away(), 0);
        Ok(())
    }

    #[test]
    fn block_is_kept_and_used_again() -> Result {
        let (map, mut pages) = register()?;
        let folio = pages.take(0).ok_or(EINVAL)?;
        assert!(!map.has_kept(&folio));
        let (folio, cause) = map.folio_init_kept(folio).err().ok_or(EINVAL)?;
        assert!(cause.is_none());
        let folio = use_once(&map, folio)?;
        assert!(map.has_kept(&folio));
        let locked = map.folio_init_kept(folio).map_err(|_| EINVAL)?;
        assert_eq!((map.used(), map.kept.idle(map.folios())), (1, 0));
        drop(locked);
        let folio = map.ops().0.pop().ok_or(EINVAL)?;
        assert_eq!((map.used(), map.kept.idle(map.folios())), (0, 1));
        // With another block the one that is kept stays, and the other is freed.
        let folio = use_once(&map, folio)?;
        assert_eq!(map.kept.idle(map.folios()), 1);
        // Under pressure it goes.
        assert_eq!((map.kept.free(8), map.kept.free(8)), (1, 0));
        assert!(!map.has_kept(&folio) && map.kept.idle(0) == 0);
        let _ = pages.put(folio);
        retire_all(&map, pages)
    }

    #[test]
    fn no_more_than_a_share_is_kept() -> Result {
        let (map, mut pages) = register()?;
        let mut used = FreePages::none_of(&pages);
        while let Some(folio) = pages.take(0) {
            let _ = used.put(use_once(&map, folio)?);
        }
        assert_eq!(map.kept.idle(0), BLOCK_PAGES / SHARE);
        // All of it, wherever the last look ended.
        let some = map.kept.free(5);
        let rest = map.kept.free(usize::MAX);
        assert_eq!((some, some + rest), (5, BLOCK_PAGES / SHARE));
        // A large folio keeps none.
        let block = used.take(crate::mm::PMD_ORDER).ok_or(EINVAL)?;
        let _ = used.put(use_once(&map, block)?);
        assert_eq!(map.kept.idle(0), 0);
        let folio = use_once(&map, used.take(0).ok_or(EINVAL)?)?;
        assert!(map.has_kept(&folio));
        let _ = used.put(folio);
        // What is still kept goes with the pagemap.
        retire_all(&map, used)
    }

    #[test]
    fn blocks_are_allocated_together() -> Result {
        let mut batch = BackingBatch::new();
        for wanted in (1..=70).rev() {
            assert_eq!(Backing::alloc_from(&mut batch, wanted)?.order(), 0);
        }
        Ok(())
    }
}
