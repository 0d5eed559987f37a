// SPDX-License-Identifier: GPL-2.0

//! Every registered pagemap of the system, whichever driver registered it.
//!
//! [`find()`] names their ranges, [`examine()`] looks at the pages of one. Both only read. A
//! reference on a pagemap is held for [`BATCH`] pages at a time, so that unregistering it does not
//! wait for a survey.
//!
//! C headers: [`include/linux/memremap.h`](srctree/include/linux/memremap.h),
//! [`include/linux/ioport.h`](srctree/include/linux/ioport.h)

use crate::{
    bindings,
    mm::{
        hmm::inspect::{
            AnyPagemap,
            PageFacts,
            MAX_PFNS, //
        },
        pagemap::refs,
        region::owner::PgmapOwner,
        sync::task::check_signals,
        PAGE_SHIFT, //
    },
    stacktrace::Symbol, //
};
use core::ops::Range;
use kernel::prelude::*;

/// Pages that are looked at with one reference on their pagemap.
const BATCH: usize = 512;

/// Most windows of physical addresses that are searched. The list is allocated before the walk.
const MAX_WINDOWS: usize = 1024;

/// Page frames of the smallest unit that memory is registered in: a subsection, 2 MiB on x86-64.
const SUBSECTION: usize = bindings::ZDM_PAGES_PER_SUBSECTION;

/// Subsections that are searched before the task gives others a turn.
const STEPS: usize = 4096;

/// The properties of a pagemap. They are out of date as soon as they are returned.
///
/// # Examples
///
/// ```
/// use kernel::mm::{oracle::survey, region::memory_type::MemoryType};
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
/// # let first = device.memory().first_pfn();
///
/// let range = survey::find()?.into_iter().find(|range| range.contains(&first));
/// let range = range.ok_or(ENOENT)?;
/// let mut pages = 0;
/// let facts = survey::examine(&range, device.owner(), |_page| {
///     pages += 1;
///     Ok(())
/// })?;
/// let facts = facts.ok_or(ENODEV)?;
/// assert_eq!((facts.memory_type, pages), (MemoryType::PRIVATE, range.len()));
/// assert!(facts.has_folio_free);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy)]
pub(crate) struct PagemapFacts {
    /// `enum memory_type`.
    pub(crate) memory_type: u32,
    /// References of the `dev_pagemap`, without the one of this look.
    pub(crate) refs: i64,
    /// A function of the pagemap's owner, which names its module; `None` where `ops` has none.
    pub(crate) function: Option<Symbol>,
    /// Whether the owner is told of freed folios: `ops->folio_free`.
    pub(crate) has_folio_free: bool,
}

/// Windows of physical addresses that are not System RAM, as page frames.
struct Windows(KVec<Range<usize>>);

impl Windows {
    /// Wraps `walk_iomem_res_desc()`. May sleep.
    ///
    /// # Errors
    ///
    /// `E2BIG` when there are more than [`MAX_WINDOWS`].
    fn new() -> Result<Self> {
        let mut windows = Self(KVec::with_capacity(MAX_WINDOWS, GFP_KERNEL)?);
        // SAFETY: `collect` takes the pointer to `windows`, which outlives the call.
        let ret = unsafe {
            bindings::walk_iomem_res_desc(
                bindings::IORES_DESC_NONE as usize,
                bindings::IORESOURCE_MEM as usize,
                0,
                u64::MAX,
                (&raw mut windows).cast(),
                Some(Self::collect),
            )
        };
        // Without a single window the walk says EINVAL.
        if ret == E2BIG.to_errno() {
            return Err(E2BIG);
        }
        Ok(windows)
    }

    /// # Safety
    ///
    /// `resource` must be valid, and `windows` must point to [`Windows`] that nothing else uses.
    unsafe extern "C" fn collect(
        resource: *mut bindings::resource,
        windows: *mut c_void,
    ) -> kernel::ffi::c_int {
        // SAFETY: `resource` is valid by the first argument's contract.
        let resource = unsafe { &*resource };
        if resource.flags & bindings::IORESOURCE_SYSRAM as usize != 0 {
            return 0;
        }
        // SAFETY: `windows` is valid and not aliased by the second argument's contract.
        let windows = unsafe { &mut *windows.cast::<Self>() };
        // CAST: `usize` has 64 bits. The end is inclusive, so it is not shifted as an exclusive one.
        let first = resource.start as usize >> PAGE_SHIFT;
        let end = (resource.end as usize >> PAGE_SHIFT) + 1;
        match windows.0.push_within_capacity(first..end) {
            Ok(()) => 0,
            Err(_) => E2BIG.to_errno(),
        }
    }
}

/// Page frames of each range of each registered pagemap, in ascending order. May sleep; the cost
/// follows the size of the physical address windows that are not System RAM.
///
/// # Errors
///
/// `ENOMEM`; `E2BIG` when there are more than 1024 windows; `EINTR` when the task was killed.
pub(crate) fn find() -> Result<KVec<Range<usize>>> {
    let windows = Windows::new()?;
    let mut found: KVec<Range<usize>> = KVec::new();
    let mut steps = 0;
    for window in &windows.0 {
        let mut pfn = window.start.next_multiple_of(SUBSECTION);
        while pfn < window.end.min(MAX_PFNS) {
            steps += 1;
            if steps % STEPS == 0 {
                check_signals()?;
            }
            // SAFETY: The function takes any number.
            let valid = unsafe { bindings::zdm_pfn_valid(pfn) };
            let range = valid
                .then(|| AnyPagemap::of_pfn(pfn))
                .flatten()
                .and_then(|pgmap| pgmap.range_of(pfn));
            pfn = match range {
                Some((_, range)) => {
                    let end = range.end.max(pfn + 1);
                    found.push(range, GFP_KERNEL)?;
                    end.next_multiple_of(SUBSECTION)
                }
                None => pfn + SUBSECTION,
            };
        }
    }
    Ok(found)
}

/// Looks at all pages of `range`, one of [`find()`], and gives `f` the facts of each. Of a large
/// folio in use only the first page is looked at. Returns the properties of the pagemap,
/// `None` if it was unregistered meanwhile. `asking` is the owner that [`PageFacts`] compares with. May
/// sleep. While `f` runs, unregistering the pagemap waits.
///
/// # Errors
///
/// `EINTR` when the task was killed, and the error of `f`.
pub(crate) fn examine(
    range: &Range<usize>,
    asking: &PgmapOwner,
    mut f: impl FnMut(&PageFacts) -> Result,
) -> Result<Option<PagemapFacts>> {
    let mut pfn = range.start;
    loop {
        check_signals()?;
        let Some(pgmap) = AnyPagemap::of_range(range) else {
            return Ok(None);
        };
        let end = range.end.min(pfn.saturating_add(BATCH));
        while pfn < end {
            let facts = pgmap.facts(pfn, asking);
            let whole = facts.filter(|facts| facts.refs > 0 && facts.index == 0);
            if let Some(facts) = &facts {
                f(facts)?;
            }
            pfn += whole.map_or(1, |facts| 1 << facts.order);
        }
        if pfn >= range.end {
            return Ok(Some(pgmap.says()));
        }
    }
}

impl AnyPagemap {
    /// The pagemap that has `range` as one of its ranges.
    fn of_range(range: &Range<usize>) -> Option<Self> {
        Self::of_pfn(range.start).filter(|pgmap| {
            pgmap
                .range_of(range.start)
                .is_some_and(|(_, found)| found == *range)
        })
    }

    /// The properties of the pagemap.
    fn says(&self) -> PagemapFacts {
        // SAFETY: Registered by the type invariants of `AnyPagemap`, and `ops` outlives the registration.
        let ops = unsafe { (*self.as_ptr()).ops.as_ref() };
        let address = |ops: &bindings::dev_pagemap_ops| {
            ops.folio_free
                .map(|f| f as usize)
                .or(ops.migrate_to_ram.map(|f| f as usize))
                .or(ops.memory_failure.map(|f| f as usize))
        };
        PagemapFacts {
            // SAFETY: Registered by the type invariants of `AnyPagemap`.
            memory_type: unsafe { (*self.as_ptr()).type_ },
            // SAFETY: The pagemap is registered by the type invariants of `AnyPagemap`.
            refs: unsafe { refs::refs(self.as_ptr()) } - 1,
            function: ops.and_then(address).map(Symbol::of),
            has_folio_free: ops.is_some_and(|ops| ops.folio_free.is_some()),
        }
    }
}

#[kunit_tests(zdmirror_survey)]
mod tests {
    use super::*;
    use crate::mm::kunit::support::this_module;

    #[test]
    fn ranges_are_apart() -> Result {
        let found = find()?;
        let mut end = 0;
        for range in &found {
            assert!(range.start >= end && range.start < range.end);
            end = range.end;
        }
        Ok(())
    }

    #[test]
    fn a_range_that_is_none_is_gone() -> Result {
        let owner = PgmapOwner::new(this_module())?;
        // Page frame 0 is System RAM or nothing at all.
        assert!(examine(&(0..1), &owner, |_| Ok(()))?.is_none());
        Ok(())
    }
}
