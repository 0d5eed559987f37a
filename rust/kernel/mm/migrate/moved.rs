// SPDX-License-Identifier: GPL-2.0

//! The pages that a migration has moved, before it is finalized.
//!
//! C header: [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

use super::{
    device_memory::DeviceMemory,
    migration::{
        Copied,
        Finalized,
        Migration,
        Setup,
        MAX_PAGES, //
    },
};
use crate::{
    bindings,
    mm::{
        page::{
            device_folio::FolioRef,
            struct_page,
            view::PageView, //
        },
        PMD_ORDER, //
    },
};
use core::ptr::NonNull;

/// A folio that core mm has moved the contents of, before the migration is finalized: both ends are
/// locked, and where they were mapped there are migration entries.
///
/// # Examples
///
/// ```
/// # use kernel::mm::kunit::{
/// #     device::{EmulatedDevice, EmulatedMemory},
/// #     support::{anon_range, touch},
/// # };
/// # use kernel::mm::region::memory_type::MemoryType;
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # touch(range.first(1))?;
/// device.migrate_by(range, &EmulatedMemory, |migration| {
///     for folio in migration.moved_folios() {
///         assert_eq!(folio.destination.memory_type(), MemoryType::PRIVATE);
///         // The second page was never touched: there was nothing to be moved from.
///         if let Some(source) = folio.source {
///             assert_eq!(source.mapcount(), 0);
///         }
///     }
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct MovedFolio<'a> {
    /// Where the contents were; `None` for a place that had no page.
    pub(crate) source: Option<PageView<'a>>,
    /// References on the source that are the migration's, and the fault's that it is made for.
    pub(crate) source_refs: i32,
    /// Where they are now.
    pub(crate) destination: PageView<'a>,
}

/// The pages that a migration has moved.
///
/// # Examples
///
/// ```
/// use kernel::mm::migrate::moved::Moved;
/// # use kernel::mm::kunit::{
/// #     device::{EmulatedDevice, EmulatedMemory},
/// #     support::{anon_range, touch},
/// # };
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # touch(range)?;
///
/// device.migrate_by(range, &EmulatedMemory, |migration| {
///     let Moved { pages, folios, .. } = migration.moved();
///     assert_eq!((pages, folios, migration.moved().large()), (2, 2, 0));
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Base pages that have moved.
    pub(crate) pages: usize,
    /// Folios that have moved, of any order.
    pub(crate) folios: usize,
    /// The same by their order.
    pub(crate) by_order: [u16; ORDERS],
}

// A migration has no more folios of an order.
const _: () = assert!(MAX_PAGES <= u16::MAX as usize);

/// Orders of folios that a migration can move: up to that of a PMD.
pub(crate) const ORDERS: usize = PMD_ORDER as usize + 1;

impl Moved {
    /// Large folios that have moved in one piece.
    pub(crate) fn large(&self) -> usize {
        self.folios.saturating_sub(usize::from(self.by_order[0]))
    }
}

impl<M: DeviceMemory> Migration<'_, Setup, M> {
    /// What core mm says about its entries, if that is not so: what there is, and what it says. It has an entry for
    /// each page of a range, and counts those that can move. Drivers that believe it would leave pages behind, or
    /// take one page for another.
    pub(crate) fn miscounted(&self) -> Option<(usize, usize)> {
        let args = self.args();
        let (entries, movable) = (args.npages, args.cpages);
        if !self.vma {
            return None;
        }
        if entries != self.len() {
            return Some((self.len(), entries));
        }
        let there = self.sources().iter();
        let there = there.filter(|entry| **entry & bindings::MIGRATE_PFN_MIGRATE != 0);
        let there = there.count();
        (movable != there).then_some((there, movable))
    }
}

impl<M: DeviceMemory> Migration<'_, Finalized, M> {
    /// Page frame number of the first page, and order, of each destination that contents of a range have moved to. The
    /// contents may have moved on since. A list of device pages has none: nothing tells the order of a folio any more.
    pub(crate) fn destinations(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.moved_entries()
            .filter(|_| self.vma)
            .map(|(i, order)| (self.dst(i) >> bindings::MIGRATE_PFN_SHIFT, order))
    }
}

impl<M: DeviceMemory> Migration<'_, Copied, M> {
    /// The pages that have moved so far.
    #[inline]
    pub(crate) fn moved(&self) -> Moved {
        if self.len() > 1 {
            return self.all_moved();
        }
        // Most faults move one page. A large folio has more entries.
        let mut moved = Moved::default();
        let one = self.has_moved(0);
        (moved.pages, moved.folios) = (usize::from(one), usize::from(one));
        moved.by_order[0] = one.into();
        moved
    }

    /// As [`Migration::moved`], of any number of entries.
    #[inline(never)]
    fn all_moved(&self) -> Moved {
        let mut moved = Moved::default();
        let mut small = 0;
        for (_, order) in self.moved_entries() {
            if order == 0 {
                small += 1;
                continue;
            }
            moved.pages += 1 << order;
            moved.folios += 1;
            if let Some(folios) = moved.by_order.get_mut(order as usize) {
                *folios += 1;
            }
        }
        moved.pages += small;
        moved.folios += small;
        // CAST: At most `MAX_PAGES`.
        moved.by_order[0] = small as u16;
        moved
    }

    /// Whether the source at entry `i` has moved.
    #[inline]
    pub(crate) fn has_moved(&self, i: usize) -> bool {
        self.is_selected(i) && self.page_of(self.dst(i)).is_some()
    }

    /// The folios that have moved.
    pub(crate) fn moved_folios(&self) -> impl Iterator<Item = MovedFolio<'_>> {
        self.moved_entries()
            .filter_map(|(i, _)| self.moved_folio(i))
    }

    /// Those of [`Migration::moved_folios`] that have, at one look, more or fewer references than the
    /// migration, the fault that it is made for, and mappings explain.
    pub(crate) fn suspects(&self) -> impl Iterator<Item = MovedFolio<'_>> {
        let fault = self.fault_head();
        let entries = self.sources().iter().zip(self.destinations_raw());
        entries
            .enumerate()
            .filter(move |(_, (&src, &dst))| self.is_suspect(src, dst, fault))
            .filter_map(|(i, _)| self.moved_folio(i))
    }

    /// Whether there are any [`Migration::suspects`].
    #[inline]
    pub(crate) fn has_suspects(&self) -> bool {
        if let ([src], [dst]) = (self.sources(), self.destinations_raw()) {
            // Most faults move one page.
            return self.is_suspect(*src, *dst, self.fault_head());
        }
        self.has_any_suspects()
    }

    /// As [`Migration::has_suspects`], of any number of entries.
    #[inline(never)]
    fn has_any_suspects(&self) -> bool {
        let fault = self.fault_head();
        let mut entries = self.sources().iter().zip(self.destinations_raw());
        entries.any(|(&src, &dst)| self.is_suspect(src, dst, fault))
    }

    /// The head of the folio of the fault that the migration is made for, or NULL.
    #[inline]
    fn fault_head(&self) -> *mut bindings::page {
        NonNull::new(self.fault_page()).map_or(core::ptr::null_mut(), |page| {
            // SAFETY: The fault that the migration is made for has a reference on its page.
            unsafe { struct_page::head(page.as_ptr()) }
        })
    }

    /// Whether the folio that has moved from `src` to `dst` has, at one look, unexplained references at either end.
    /// `fault` is the head of the folio of the fault, or NULL.
    #[inline]
    fn is_suspect(&self, src: usize, dst: usize, fault: *mut bindings::page) -> bool {
        if src & bindings::MIGRATE_PFN_MIGRATE == 0 {
            return false;
        }
        let Some(to) = self.page_of(dst) else {
            return false;
        };
        if let Some(from) = self.page_of(src) {
            // SAFETY: The source is locked and referenced by the type invariants of `Migration`.
            let refs = unsafe { struct_page::refs(from.as_ptr()) };
            // SAFETY: The source is locked and referenced by the type invariants of `Migration`.
            let is_fault = || unsafe { struct_page::head(from.as_ptr()) } == fault;
            if refs != 1 + i32::from(!fault.is_null() && is_fault()) {
                return true;
            }
        }
        // SAFETY: The destination is locked and referenced by the type invariants of `Migration`.
        unsafe { struct_page::refs(to.as_ptr()) != struct_page::folio_mapcount(to.as_ptr()) + 1 }
    }

    /// Both ends of entry `i`, of a folio that has moved.
    fn moved_folio(&self, i: usize) -> Option<MovedFolio<'_>> {
        // SAFETY: Both ends are locked and referenced by the type invariants of `Migration`.
        let view = |page| unsafe { PageView::from_raw(page) };
        let source = self.page_of(self.src(i)).map(view);
        Some(MovedFolio {
            source,
            source_refs: 1 + i32::from(source.is_some_and(|page| self.is_fault_folio(page))),
            destination: view(self.page_of(self.dst(i))?),
        })
    }

    /// Whether `page` is the first page of the folio that caused the fault of this migration.
    fn is_fault_folio(&self, page: PageView<'_>) -> bool {
        let fault = NonNull::new(self.fault_page()).map(|fault| {
            // SAFETY: The fault that the migration is made for has a reference on its page.
            unsafe { PageView::from_raw(fault) }.head()
        });
        fault.is_some_and(|head| head.as_ptr() == page.as_ptr())
    }

    /// Takes a reference on the first folio that has moved: where it came from if `source`, else where it is now. `None`
    /// where none has moved. Only for fault injection.
    pub(crate) fn hold_moved(&self, source: bool) -> Option<FolioRef> {
        let held = self
            .moved_folios()
            .filter_map(|folio| {
                if source {
                    folio.source
                } else {
                    Some(folio.destination)
                }
            })
            .find_map(|page| NonNull::new(page.as_ptr()))?;
        // SAFETY: The migration has both ends locked and referenced by the type invariants of `Migration`.
        unsafe { FolioRef::try_get(held) }
    }
}
