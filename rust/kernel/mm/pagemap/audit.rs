// SPDX-License-Identifier: GPL-2.0

//! The interface of a pagemap to an oracle, and faults that test the oracle.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    dev_pagemap::{
        DevPagemap,
        FREE, //
    },
    ops::PagemapOps,
    refs, //
};
use crate::{
    bindings,
    mm::{
        page::struct_page,
        region::free_folio::FreeFolio, //
    },
};
use kernel::{
    sync::atomic::{
        Atomic,
        Full,
        Relaxed,
        Release, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Number of reads of the references of a `dev_pagemap`, a millisecond apart, after which the count is taken to
/// be changing all the time.
const SETTLE_TRIES: usize = 1000;

/// Number of reads in sequence that must find the same count. Core mm drops the reference of a page after the
/// page is no longer in use, and on a busy machine the task may lose its processor in between for many reads.
const SETTLED: usize = 300;

/// In the place of a mapping, where no object can be: poison as of `include/linux/poison.h`, with
/// the low bits of a mapping that is not anonymous.
const STALE_MAPPING: usize = 0xdead_0000_5a5a_5000;

/// A fault to be injected into a free page, or to be taken out again.
///
/// # Examples
///
/// ```
/// use kernel::mm::pagemap::audit::Corruption;
/// # use kernel::mm::kunit::device::EmulatedDevice;
/// # let device = EmulatedDevice::new()?;
/// # let map = device.memory();
///
/// let folio = device.take().ok_or(ENOSPC)?;
/// let index = map.index_of_pfn(folio.first_pfn()).ok_or(EINVAL)?;
/// assert!(map.corrupt(&folio, Corruption::AnonExclusive(true)));
/// // A check of the free pages stops at the one that was spoilt.
/// assert_eq!(map.clean_pages(index, 1), 0);
/// assert!(map.corrupt(&folio, Corruption::AnonExclusive(false)));
/// assert_eq!(map.clean_pages(index, 1), 1);
/// device.put(folio);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Corruption {
    /// Whether it has a reference, which stays until it is taken out again. The page cannot be
    /// allocated unless it has none.
    Referenced(bool),
    /// Whether it has a mapping: a poison, which is no address.
    Mapping(bool),
    /// Whether it has `PG_anon_exclusive`.
    AnonExclusive(bool),
}

/// Fault injection has not taken a reference.
const NONE: u32 = 0;
/// Fault injection is about to take a reference.
const TAKING: u32 = 1;
/// Fault injection has taken a reference.
const LEAKED: u32 = 2;

impl<T: PagemapOps> DevPagemap<T> {
    /// References that this kernel keeps on a free page of such memory: as many as each page has
    /// while none is allocated, which is when to ask. 0, but for GENERIC memory in a kernel with
    /// the old rule.
    pub(crate) fn free_refs(&self) -> i32 {
        (0..self.pages())
            .filter_map(|i| self.page(i))
            .map(|page| page.refs())
            .min()
            .map_or(0, |refs| refs.max(0))
    }

    /// References of the `dev_pagemap` that registration left, before a page was in use: 1, and
    /// one for each page where the kernel does not count those in use.
    pub(crate) fn first_refs(&self) -> i64 {
        self.first_refs
    }

    /// References that the `dev_pagemap` has, beyond (or short of) those that registration left, that
    /// pages in use have, and that this module holds. They are counted by processor, and read one after
    /// the other: exact at a quiescent point only. Does not sleep.
    pub(crate) fn excess_refs(&self) -> i64 {
        // SAFETY: The pagemap is registered by the type invariants of `DevPagemap`.
        let refs = unsafe { refs::refs(self.raw()) };
        let own = self.used() + self.guards.load(Relaxed);
        // CAST: Both are less than the pages of a machine.
        refs - self.first_refs - own as i64
    }

    /// [`DevPagemap::excess_refs`], once it no longer changes; `None` where it continues to change,
    /// because a task is at work. May sleep, where it is not 0 at once.
    pub(crate) fn stable_excess(&self) -> Option<i64> {
        let mut excess = self.excess_refs();
        let mut same = 0;
        for _ in 0..SETTLE_TRIES {
            if excess == 0 || same == SETTLED {
                return Some(excess);
            }
            fsleep(Delta::from_millis(1));
            let before = core::mem::replace(&mut excess, self.excess_refs());
            same = if before == excess { same + 1 } else { 0 };
        }
        None
    }

    /// Takes a reference of the `dev_pagemap` that has no owner, or drops it again, and returns
    /// whether it did. Only for fault injection.
    pub(crate) fn leak_ref(&self, leak: bool) -> bool {
        if self.closed.load(Relaxed) {
            return false;
        }
        if !leak {
            let some = self.leaked.cmpxchg(LEAKED, NONE, Full).is_ok();
            if some {
                // SAFETY: `LEAKED` tells that a reference was taken below, and no other task sees
                // it now.
                unsafe { bindings::zdm_pgmap_put(self.raw()) };
            }
            return some;
        }
        if self.leaked.cmpxchg(NONE, TAKING, Full).is_err() {
            return false;
        }
        // SAFETY: The pagemap is registered by the type invariants of `DevPagemap`.
        let taken = unsafe { bindings::zdm_pgmap_tryget_live(self.raw()) };
        self.leaked
            .store(if taken { LEAKED } else { NONE }, Release);
        taken
    }

    /// Counts the pages from page `index` on, at most `most`, that are not allocated and have nothing that a
    /// free page must not have, up to the first page for which that is not so. Does not sleep.
    ///
    /// The result is the same as that of a look at each page. The cost is about that of reading the pages.
    pub(crate) fn clean_pages(&self, index: usize, most: usize) -> usize {
        let n = most.min(self.pages().saturating_sub(index));
        let Some(state) = self.state.get(index..index + n) else {
            return 0;
        };
        // An atomic load would be a call of a function in C.
        // SAFETY: The state is valid, and may be read while it is written, as by `READ_ONCE()`.
        let is_free = |state: &Atomic<i8>| unsafe { state.as_ptr().read_volatile() } == FREE;
        let Some(first) = self.page(index) else {
            return 0;
        };
        let first = first.as_ptr();
        let unclean = state.iter().enumerate().position(|(i, state)| {
            // SAFETY: The pagemap has struct pages for the `n` pages from `index` on.
            !is_free(state) || unsafe { struct_page::is_stale(first.add(i)) }
        });
        unclean.unwrap_or(n)
    }

    /// Reads up to `most` struct pages from that of page `index` on, and does nothing with them.
    pub(crate) fn read_pages(&self, index: usize, most: usize) -> usize {
        let n = most.min(self.pages().saturating_sub(index));
        if let Some(page) = self.page(index) {
            // SAFETY: There are `n` struct pages.
            core::hint::black_box(unsafe { struct_page::read_all(page.as_ptr(), n) });
        }
        n
    }

    /// Injects `fault` into the first page of `folio`, or takes it out again, and returns whether it did. Only
    /// for fault injection. A reference stays while some task holds another one. A page that looks like a tail
    /// is left alone, because most of its fields belong to the head.
    pub(crate) fn corrupt(&self, folio: &FreeFolio, fault: Corruption) -> bool {
        let page = self
            .index_of_pfn(folio.first_pfn())
            .and_then(|index| self.page(index));
        let Some(page) = page.filter(|page| !page.bits().is_tail()) else {
            return false;
        };
        let page = page.as_ptr();
        match fault {
            Corruption::Referenced(set) => {
                // SAFETY: The page is valid, and every access to its count is atomic.
                let refs = unsafe { Atomic::from_ptr(&raw mut (*page)._refcount.counter) };
                let (before, after) = if set { (0, 1) } else { (1, 0) };
                // The reference is as any other: while it is there no task can drop the count to 0, which
                // would free the page once more. It goes only if no task has taken another one.
                return match refs.cmpxchg(before, after, Full) {
                    Ok(_) => true,
                    Err(now) => now == after,
                };
            }
            Corruption::Mapping(set) => {
                let mapping = if set { STALE_MAPPING } else { 0 };
                // SAFETY: `folio` is borrowed, so that its pages are free, and core mm does not follow the
                // mapping of a page without references.
                unsafe { bindings::zdm_set_page_mapping(page, mapping) }
            }
            Corruption::AnonExclusive(set) => {
                // SAFETY: `folio` is borrowed, so that its pages are free, and no code relies on
                // the flag.
                unsafe { bindings::zdm_set_anon_exclusive(page, set) }
            }
        }
        true
    }

    /// Calls `folio_free` for `folio`, which is free already, and returns whether it did. Only for fault
    /// injection: the only effect is a report. Does not sleep.
    pub(crate) fn free_again(&self, folio: &FreeFolio) -> bool {
        let page = self
            .index_of_pfn(folio.first_pfn())
            .and_then(|index| self.page(index));
        let Some(page) = page.filter(|page| !page.bits().is_tail()) else {
            return false;
        };
        // SAFETY: The page is the head of a folio of this pagemap, which is free, and stays so as `folio` is
        // borrowed.
        unsafe { Self::folio_free(page.as_ptr().cast()) };
        true
    }
}
