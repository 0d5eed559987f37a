// SPDX-License-Identifier: GPL-2.0

//! The duty to unregister ZONE_DEVICE memory, and references that put it off.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    dev_pagemap::DevPagemap,
    kept::Keeper,
    ops::{
        PagemapOps,
        PrivateOps, //
    },
};
use crate::{
    bindings,
    mm::{
        module::scope::{
            Callbacks,
            ScopeEntry, //
        },
        region::{
            frames::{
                Frames,
                MemRegion,
                RegionError,
                ReservedRegion, //
            },
            free_folio::FreeRegion,
            memory_type::MemoryType,
            owner::PgmapOwner, //
        },
        sync::task::check_may_fault, //
    },
};
use core::{
    mem::ManuallyDrop,
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    fmt,
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Milliseconds for which unregistering memory waits for the last [`PagemapRef`], and for a `folio_free` that
/// was not over when the driver got the folio.
pub(crate) const GUARD_MS: usize = 10_000;

/// A [`DevPagemap`] and the duty to unregister it.
///
/// Dropping it calls `memunmap_pages()` if all pages are home, that is if every [`FreeFolio`] that came
/// from the region was given back with [`DevPagemap::retire`]. Otherwise the memory stays registered for
/// good: `memunmap_pages()` would wait forever for a page in use, and the pages of a [`FreeFolio`] could be
/// allocated afterwards. The same happens with references of the `dev_pagemap` that have no known owner,
/// with a [`PagemapRef`] that lives for more than [`GUARD_MS`] milliseconds, with a call of
/// [`PagemapOps::folio_free`] that takes as long, which is so if that call drops the registration, and where a task
/// drops the registration in a migration, or in the handler of a fault on device memory. May sleep; takes the memory
/// hotplug lock, so that no page may be locked and no mmap lock held.
///
/// Memory that stays registered, or whose registration was forgotten, does no harm: folios in use keep
/// the module loaded, and for the others core mm calls nothing but a shrinker, which the
/// [`ModuleScope`](crate::mm::module::scope::ModuleScope) of the owner ends, or keeps the module for.
///
/// [`FreeFolio`]: crate::mm::region::free_folio::FreeFolio
///
/// # Examples
///
/// ```
/// use kernel::{
///     mm::{pagemap::registration::Registration, region::owner::PgmapOwner},
///     module::this_module,
///     sizes::SZ_2M,
/// };
/// # use kernel::mm::kunit::device::NoPages as Pages;
///
/// let owner = PgmapOwner::new(this_module::<LocalModule>())?;
/// let (map, region) = Registration::private(SZ_2M, owner, |_frames| Ok(Pages))?;
/// for folio in region {
///     // An allocator would keep the folio, until `folio_init()` consumes it.
///     map.retire(folio).map_err(|_| EINVAL)?;
/// }
/// // All pages are home, so that dropping the registration unregisters the memory.
/// assert_eq!(map.away(), 0);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - `map` is registered, lies in `region`, and is unregistered by `drop()` only.
/// - `entry` is the scope's entry for `map`, until `drop()` leaves the scope.
pub(crate) struct Registration<T: PagemapOps> {
    // Dropped before the region that it lies in.
    map: ManuallyDrop<Pin<KBox<DevPagemap<T>>>>,
    region: ManuallyDrop<MemRegion>,
    entry: Option<ScopeEntry>,
}

impl<T: PagemapOps> Callbacks for DevPagemap<T> {
    /// Folios in use, for which core mm calls the module, keep it loaded: there are none.
    fn end(&self) {
        self.close();
        self.disable_unpin();
    }
}

impl<T: PagemapOps> Registration<T> {
    /// Registers `bytes` of PRIVATE memory for `owner`, and returns its pages, too. `ops` makes the data
    /// of the owner for the page frames. May sleep.
    ///
    /// Wraps `request_free_mem_region()` and `memremap_pages()`.
    ///
    /// # Errors
    ///
    /// [`RegionError::Unaligned`] when `bytes` is no multiple of 2 MiB, `NoSpace` when addresses
    /// or memory are short, when `ops` fails, or when the scope of `owner` can have no registration, as the module is on its
    /// way out, or its init function has not succeeded and no
    /// [`ModuleExit`](crate::mm::module::scope::ModuleExit) ends the registration; `Locked` in a migration, or in
    /// the handler of a fault on device memory.
    pub(crate) fn private(
        bytes: usize,
        owner: Arc<PgmapOwner>,
        ops: impl FnOnce(Frames) -> Result<T>,
    ) -> Result<(Self, FreeRegion), RegionError>
    where
        T: PrivateOps,
    {
        let region = MemRegion::request_free(bytes, T::NAME)?;
        let raw_ops = DevPagemap::<T>::PRIVATE_OPS;
        // SAFETY: These are the operations of PRIVATE memory, of this `T`.
        unsafe { Self::new(region, MemoryType::Private, raw_ops, owner, ops) }
    }

    /// Registers `region` as COHERENT memory of `owner`. May sleep.
    ///
    /// Wraps `memremap_pages()`.
    ///
    /// # Errors
    ///
    /// `NoSpace` and `Locked` as for [`Registration::private`].
    pub(crate) fn coherent(
        region: ReservedRegion,
        owner: Arc<PgmapOwner>,
        ops: impl FnOnce(Frames) -> Result<T>,
    ) -> Result<(Self, FreeRegion), RegionError> {
        Self::reachable(MemoryType::Coherent, region, owner, ops)
    }

    /// As [`Registration::coherent`], of GENERIC memory. May sleep.
    ///
    /// # Errors
    ///
    /// `NoSpace` and `Locked` as for [`Registration::private`].
    pub(crate) fn generic(
        region: ReservedRegion,
        owner: Arc<PgmapOwner>,
        ops: impl FnOnce(Frames) -> Result<T>,
    ) -> Result<(Self, FreeRegion), RegionError> {
        Self::reachable(MemoryType::Generic, region, owner, ops)
    }

    /// Registers memory that the CPU can reach.
    fn reachable(
        memory: MemoryType,
        region: ReservedRegion,
        owner: Arc<PgmapOwner>,
        ops: impl FnOnce(Frames) -> Result<T>,
    ) -> Result<(Self, FreeRegion), RegionError> {
        let raw_ops = DevPagemap::<T>::OPS;
        // SAFETY: These are the operations of memory that the CPU can reach, of this `T`.
        unsafe { Self::new(region.into_inner(), memory, raw_ops, owner, ops) }
    }

    /// # Safety
    ///
    /// `raw_ops` must be as for [`DevPagemap::register`].
    unsafe fn new(
        region: MemRegion,
        memory: MemoryType,
        raw_ops: bindings::dev_pagemap_ops,
        owner: Arc<PgmapOwner>,
        ops: impl FnOnce(Frames) -> Result<T>,
    ) -> Result<(Self, FreeRegion), RegionError> {
        check_may_fault().map_err(|_| RegionError::Locked)?;
        let entry = owner.scope().enter().map_err(|_| RegionError::NoSpace)?;
        // SAFETY: `raw_ops` is as the contract of this function says, and `drop()` unregisters the pagemap before it
        // drops it.
        let registered = unsafe { DevPagemap::register(&region, memory, raw_ops, owner, ops) };
        let (map, free) = match registered {
            Ok(registered) => registered,
            Err(err) => {
                // SAFETY: Nothing was registered.
                drop(unsafe { entry.leave() });
                return Err(err);
            }
        };
        // SAFETY: `drop()` drops the pagemap after it has left the scope, or never; what is not listed is dropped here.
        if !unsafe { entry.set(&raw const *map) } {
            // The exit of the module has come in between, and does not end it.
            map.disable_unpin();
            // SAFETY: The pagemap was registered above, and no page was given away.
            unsafe { bindings::memunmap_pages(map.raw()) };
            return Err(RegionError::NoSpace);
        }
        // INVARIANT: The pagemap was registered above, in `region`.
        Ok((
            Self {
                map: ManuallyDrop::new(map),
                region: ManuallyDrop::new(region),
                entry: Some(entry),
            },
            free,
        ))
    }

    /// Waits until there is no [`PagemapRef`], and each `folio_free` of the driver has returned, for up to
    /// `ms` milliseconds, and returns whether that is so. May sleep.
    pub(in crate::mm) fn wait_until_idle(&self, ms: usize) -> bool {
        let is_idle = || self.guards.load(Relaxed) == 0 && self.folios() == 0;
        for _ in 0..ms {
            if is_idle() {
                return true;
            }
            fsleep(Delta::from_millis(1));
        }
        is_idle()
    }

    /// Wraps `memunmap_pages()`, which waits for each `folio_free` and [`PagemapRef`]. May sleep.
    ///
    /// # Safety
    ///
    /// - All pages must be home, and the registration out of its scope.
    /// - `self` must not be used afterwards.
    unsafe fn unregister(&mut self) {
        // The work looks at the `dev_pagemap`. A `folio_free` that has not returned cannot queue the work
        // any more.
        self.disable_unpin();
        // SAFETY: The pagemap is registered by the type invariants of `Registration`, and unregistered only
        // here.
        unsafe { bindings::memunmap_pages(self.map.raw()) };
        // SAFETY: The work was disabled above. `memunmap_pages()` has waited for each folio and `folio_free`.
        unsafe { self.drop_pin() };
        // SAFETY: The caller does not use `self` afterwards; core mm has forgotten the pagemap.
        unsafe { ManuallyDrop::drop(&mut self.map) };
        // SAFETY: The caller does not use `self` afterwards; nothing lies in the region any more.
        unsafe { ManuallyDrop::drop(&mut self.region) };
    }

    /// Says in the log why the memory stays registered.
    #[cold]
    fn stays(&self, why: fmt::Arguments<'_>) {
        let first = self.first_pfn();
        pr_err!("pagemap at pfn {:#x} stays registered: {}\n", first, why);
    }

    /// Keeps the memory registered for as long as the result lives; `None` while it is being
    /// unregistered. Does not sleep.
    ///
    /// Wraps `percpu_ref_tryget_live()` of `dev_pagemap.ref`.
    pub(crate) fn get(&self) -> Option<PagemapRef<T>> {
        // SAFETY: The pagemap is registered by the type invariants of `Registration`.
        if !unsafe { bindings::zdm_pgmap_tryget_live(self.map.raw()) } {
            return None;
        }
        self.guards.add(1, Relaxed);
        // INVARIANT: Taken above.
        Some(PagemapRef(NonNull::from(&**self)))
    }
}

impl<T: PagemapOps> Deref for Registration<T> {
    type Target = DevPagemap<T>;

    fn deref(&self) -> &DevPagemap<T> {
        &self.map
    }
}

impl<T: PagemapOps> Drop for Registration<T> {
    fn drop(&mut self) {
        // Unless it leaves its scope the pagemap stays there, as one that is forgotten.
        if self.away() != 0 {
            let lost = self.away() - self.used().min(self.away());
            return self.stays(fmt!(
                "{} pages in use, {} not given back",
                self.used(),
                lost
            ));
        }
        if check_may_fault().is_err() {
            return self.stays(fmt!("the task that dropped it has locked pages"));
        }
        let Some(entry) = self.entry.take() else {
            return;
        };
        // SAFETY: The pagemap is unregistered below, or ended, before `loaded` is dropped; without one it is left
        // alone.
        let Some(loaded) = (unsafe { entry.leave() }) else {
            return;
        };
        if !self.wait_until_idle(GUARD_MS) {
            self.stays(fmt!("it is still used"));
            return self.map.end();
        }
        // No folio is in use, and none can be allocated any more. The last `folio_free` may not have
        // returned yet; the references of the `dev_pagemap` tell.
        let excess = self.stable_excess();
        if excess != Some(0) {
            // `memunmap_pages()` would wait for ever for the last one to go.
            let excess = excess.unwrap_or_default();
            self.stays(fmt!("{} references too many on it", excess));
            return self.map.end();
        }
        // SAFETY: The registration has left its scope, and all pages are home.
        unsafe { self.unregister() };
        // The kernel calls nothing for the pagemap any more.
        drop(loaded);
    }
}

/// A reference on a pagemap that is registered. Unregistering the memory waits for up to [`GUARD_MS`]
/// milliseconds until there is none, and then leaves the memory registered.
///
/// # Examples
///
/// ```
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
/// # let registration = device.memory();
/// let map = registration.get().ok_or(ENODEV)?;
/// // A task that unregisters the memory waits until here.
/// assert_eq!(map.used(), 0);
/// drop(map);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// Owns a reference of the `dev_pagemap`, so that `memunmap_pages()` does not return and the
/// [`DevPagemap`] is not freed.
pub(crate) struct PagemapRef<T: PagemapOps>(NonNull<DevPagemap<T>>);

impl<T: PagemapOps> Deref for PagemapRef<T> {
    type Target = DevPagemap<T>;

    fn deref(&self) -> &DevPagemap<T> {
        // SAFETY: Not freed by the type invariants of `PagemapRef`.
        unsafe { self.0.as_ref() }
    }
}

impl<T: PagemapOps> Drop for PagemapRef<T> {
    fn drop(&mut self) {
        self.guards.fetch_sub(1, Relaxed);
        // SAFETY: We own a reference by the type invariants of `PagemapRef`.
        unsafe { bindings::zdm_pgmap_put(self.raw()) };
    }
}

#[kunit_tests(zdmirror_registration)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::{
            module_refs,
            this_module, //
        },
        module::scope::TestExit,
        page::{
            backing::Backing,
            device_folio::{
                FolioInitCause,
                FreedFolio, //
            },
        },
        pagemap::{
            audit::Corruption,
            fault::{
                FaultError,
                VmFault, //
            },
        },
        region::{
            free_folio::{
                FreeFolio,
                BLOCK_PAGES, //
            },
            free_stack::FreeStack, //
        },
        PMD_ORDER, //
    };
    use kernel::sizes::SZ_2M;

    /// A driver that keeps freed folios.
    struct Driver {
        freed: FreeStack,
    }

    impl PagemapOps for Driver {
        fn folio_free(&self, folio: FreedFolio<'_>) {
            if let Some(free) = folio.into_free() {
                let _ = self.freed.push(free);
            }
        }
    }

    impl PrivateOps for Driver {
        fn migrate_to_ram(&self, _fault: &VmFault<'_>) -> core::result::Result<(), FaultError> {
            Err(FaultError::Sigbus)
        }
    }

    impl DevPagemap<Driver> {
        /// The only folio that was freed.
        fn freed(&self) -> Option<FreeFolio> {
            let mut freed = None;
            self.ops().freed.take(1, |folio| freed = Some(folio));
            freed
        }
    }

    /// A block of PRIVATE memory.
    fn register() -> Result<(Registration<Driver>, FreeFolio)> {
        register_for(PgmapOwner::new(this_module())?)
    }

    fn register_for(owner: Arc<PgmapOwner>) -> Result<(Registration<Driver>, FreeFolio)> {
        let ops = |frames| FreeStack::new(frames).map(|freed| Driver { freed });
        let (map, mut free) = Registration::private(SZ_2M, owner, ops)?;
        assert_eq!((map.away(), free.blocks()), (BLOCK_PAGES, 1));
        Ok((map, free.next().ok_or(EINVAL)?))
    }

    #[test]
    fn folio_of_any_order_is_consumed_and_comes_back() -> Result {
        let (map, mut folio) = register()?;
        for order in (0..=PMD_ORDER).rev() {
            let pfn = folio.first_pfn();
            folio = folio
                .split_to(pfn, order, |rest| {
                    let _ = map.retire(rest);
                })
                .map_err(|_| EINVAL)?;
            let locked = map
                .folio_init(folio, Backing::alloc(order)?)
                .map_err(|_| EINVAL)?;
            assert_eq!((locked.order(), locked.page().order()), (order, order));
            assert_eq!(map.order_in_use(0), Some(order));
            assert_eq!(map.used(), 1 << order);
            // The type of memory of a tail is known, though its page does not hold the pagemap.
            let last = map.page((1 << order) - 1).ok_or(EINVAL)?;
            assert_eq!(last.memory_type(), MemoryType::PRIVATE);
            assert!(map.freed().is_none());
            drop(locked);
            folio = map.freed().ok_or(EINVAL)?;
            assert_eq!((folio.first_pfn(), folio.order()), (pfn, order));
            assert_eq!((map.used(), map.order_in_use(0)), (0, None));
            assert_eq!(map.away(), 1 << order);
        }
        map.retire(folio).map_err(|_| EINVAL)?;
        assert_eq!(map.away(), 0);
        Ok(())
    }

    #[test]
    fn what_does_not_suit_is_given_back() -> Result {
        let (map, folio) = register()?;
        let backing = Backing::alloc(4)?;
        let err = map.folio_init(folio, backing).err().ok_or(EINVAL)?;
        assert_eq!(err.cause, FolioInitCause::Mismatch);
        assert_eq!((err.folio.order(), err.backing.order()), (PMD_ORDER, 4));
        let folio = err.folio;
        // A folio of another pagemap.
        let other = FreeFolio::for_test(0);
        let err = map.folio_init(other, Backing::alloc(PMD_ORDER)?);
        assert_eq!(
            err.err().map(|err| err.cause),
            Some(FolioInitCause::Mismatch)
        );
        assert!(map.retire(FreeFolio::for_test(0)).is_err());
        assert_eq!(map.used(), 0);
        map.retire(folio).map_err(|_| EINVAL)
    }

    #[test]
    fn page_with_a_reference_is_refused() -> Result {
        let (map, folio) = register()?;
        assert!(map.corrupt(&folio, Corruption::Referenced(true)));
        let err = map
            .folio_init(folio, Backing::alloc(PMD_ORDER)?)
            .err()
            .ok_or(EINVAL)?;
        assert_eq!(err.cause, FolioInitCause::NotFree(0));
        assert!(map.corrupt(&err.folio, Corruption::Referenced(false)));
        drop(map.folio_init(err.folio, err.backing).map_err(|_| EINVAL)?);
        let folio = map.freed().ok_or(EINVAL)?;
        // Poisons are set and cleared, and nothing else can be.
        assert!(map.corrupt(&folio, Corruption::Mapping(true)));
        assert!(map.page(0).is_some_and(|page| page.bits().has_mapping()));
        assert!(map.corrupt(&folio, Corruption::Mapping(false)));
        assert_eq!(map.clean_pages(0, BLOCK_PAGES), BLOCK_PAGES);
        map.retire(folio).map_err(|_| EINVAL)
    }

    #[test]
    fn second_free_gives_nothing_back() -> Result {
        let (map, folio) = register()?;
        assert!(map.free_again(&folio));
        assert!(map.freed().is_none());
        assert_eq!((map.used(), map.away()), (0, BLOCK_PAGES));
        map.retire(folio).map_err(|_| EINVAL)
    }

    #[test]
    fn forgotten_registration_keeps_the_module() -> Result {
        let before = module_refs();
        let (map, folio) = register()?;
        map.retire(folio).map_err(|_| EINVAL)?;
        // As with `mem::forget()`, but that the case undoes it.
        let forgotten = ManuallyDrop::new(map);
        assert_eq!(module_refs(), before.map(|refs| refs + 1));
        drop(ManuallyDrop::into_inner(forgotten));
        assert_eq!(module_refs(), before);
        Ok(())
    }

    #[test]
    fn forgotten_registration_ends_with_the_module() -> Result {
        let before = module_refs();
        // SAFETY: The module is running this case, at the end of which there is no registration.
        let exit = unsafe { TestExit::new(this_module()) }?;
        let owner = PgmapOwner::in_scope(exit.scope().clone())?;
        let (map, folio) = register_for(owner)?;
        let allocated = map.folio_init(folio, Backing::alloc(PMD_ORDER)?);
        drop(allocated.map_err(|_| EINVAL)?);
        map.finish_use();
        assert_eq!(module_refs(), before);
        let mut forgotten = ManuallyDrop::new(map);
        drop(exit);
        // Nothing is allocated any more, for which core mm would call the module.
        let folio = forgotten.freed().ok_or(EINVAL)?;
        let backing = Backing::alloc(PMD_ORDER)?;
        let err = forgotten.folio_init(folio, backing).err().ok_or(EINVAL)?;
        assert_eq!(err.cause, FolioInitCause::Mismatch);
        assert!(forgotten.retire(err.folio).is_ok());
        assert_eq!((forgotten.away(), module_refs()), (0, before));
        // SAFETY: All pages are home, the exit has ended the scope, and `forgotten` is not used again.
        unsafe { forgotten.unregister() };
        Ok(())
    }

    #[test]
    fn larger_folio_than_the_kernel_migrates_is_refused() -> Result {
        let (mut map, folio) = register()?;
        let max_order = map.max_order;
        // SAFETY: The field is replaced, and nothing is moved.
        unsafe { map.map.as_mut().get_unchecked_mut() }.max_order = PMD_ORDER - 1;
        let err = map.folio_init(folio, Backing::alloc(PMD_ORDER)?).err();
        let err = err.ok_or(EINVAL)?;
        assert_eq!(err.cause, FolioInitCause::Mismatch);
        // SAFETY: The field is replaced, and nothing is moved.
        unsafe { map.map.as_mut().get_unchecked_mut() }.max_order = max_order;
        map.retire(err.folio).map_err(|_| EINVAL)
    }

    #[test]
    fn guard_that_stays_is_not_waited_for() -> Result {
        let (map, folio) = register()?;
        map.retire(folio).map_err(|_| EINVAL)?;
        let guard = map.get().ok_or(EINVAL)?;
        assert!(!map.wait_until_idle(3));
        drop(guard);
        assert!(map.wait_until_idle(3));
        Ok(())
    }

    #[test]
    fn leaked_reference_is_dropped_once() -> Result {
        let (map, folio) = register()?;
        assert!(!map.leak_ref(false));
        assert!(map.leak_ref(true));
        assert_eq!(map.excess_refs(), 1);
        assert!(!map.leak_ref(true));
        assert!(map.leak_ref(false));
        assert!(!map.leak_ref(false));
        assert_eq!(map.excess_refs(), 0);
        map.retire(folio).map_err(|_| EINVAL)
    }
}
