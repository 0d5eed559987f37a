// SPDX-License-Identifier: GPL-2.0

//! References on user pages, held until the owner drops them.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h);
//! `Documentation/core-api/pin_user_pages.rst`

use super::range::PageRange;
use crate::{
    bindings,
    mm::{
        sync::task::{
            check_may_fault,
            check_signals,
            cond_resched, //
        },
        PAGE_SIZE, //
    },
};
use kernel::{
    alloc::flags::__GFP_NOWARN,
    prelude::*, //
};

/// Pages that one call of core mm takes.
const BATCH: usize = 512;

/// The kind of reference that is held on a page.
///
/// # Examples
///
/// ```
/// use kernel::mm::user::pin::{Hold, PinRequest, PinnedPages};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
///
/// // Memory of a device cannot be pinned for long: the page is migrated back first.
/// device.migrate(range)?;
/// let request = PinRequest { hold: Hold::LongTerm, write: true, fast: false };
/// let pinned = PinnedPages::new(range, request)?;
/// assert_eq!(device.memory().used(), 0);
/// # drop(pinned);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// A reference: `FOLL_GET`.
    Get,
    /// A pin: `FOLL_PIN`.
    Pin,
    /// A pin that may last: `FOLL_PIN | FOLL_LONGTERM`. A page that must not stay
    /// where it is for long is migrated first.
    LongTerm,
}

/// The way in which pages are taken.
///
/// # Examples
///
/// ```
/// use kernel::mm::user::pin::{Hold, PinRequest, PinnedPages};
/// # use kernel::mm::kunit::support::anon_range;
/// # let range = anon_range(2)?;
///
/// let request = PinRequest {
///     hold: Hold::Pin,
///     write: false,
///     fast: true,
/// };
/// let pinned = PinnedPages::new(range, request)?;
/// # drop(pinned);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PinRequest {
    /// The kind of reference.
    pub(crate) hold: Hold,
    /// Whether it is for writing, so that no copy-on-write can come between: `FOLL_WRITE`.
    pub(crate) write: bool,
    /// Whether to try without the mmap lock first.
    pub(crate) fast: bool,
}

impl PinRequest {
    /// Flags that core mm takes for it.
    fn flags(self) -> u32 {
        let write = if self.write { bindings::FOLL_WRITE } else { 0 };
        match self.hold {
            Hold::LongTerm => write | bindings::FOLL_LONGTERM,
            // The functions themselves say which of the two it is.
            Hold::Get | Hold::Pin => write,
        }
    }
}

/// User pages that are held. They are let go when this is dropped, which may sleep.
///
/// # Examples
///
/// ```
/// use kernel::mm::user::pin::{Hold, PinRequest, PinnedPages};
/// # use kernel::mm::kunit::support::anon_range;
/// # let range = anon_range(2)?;
///
/// let request = PinRequest { hold: Hold::Pin, write: true, fast: true };
/// let mut pinned = PinnedPages::new(range, request)?;
/// // The device writes. A file system, if there is one, learns of it when the pin is dropped.
/// pinned.mark_dirty();
/// drop(pinned);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// - Owns a reference or a pin of each of `pages`, as `hold` says.
/// - `dirty` is set only if the pages are held for writing, `write`.
pub(crate) struct PinnedPages {
    pages: KVVec<*mut bindings::page>,
    hold: Hold,
    write: bool,
    dirty: bool,
}

// SAFETY: What is held of pages may be let go on any thread.
unsafe impl Send for PinnedPages {}

impl PinnedPages {
    /// Holds the pages that `range` of the current task's address space maps, faulting in what is
    /// not there: all of them, or none. May sleep; the mmap lock must not be held.
    ///
    /// Wraps `pin_user_pages_fast()`, `pin_user_pages_unlocked()` and the same of
    /// `get_user_pages`.
    ///
    /// # Errors
    ///
    /// `EFAULT` where nothing is mapped or may not be accessed so, `EINVAL` for a task without an
    /// address space, `EDEADLK` for one that has a migration, `EINTR` for one that was killed, `ENOMEM`, and
    /// what core mm says about memory that cannot be held for long.
    pub(crate) fn new(range: PageRange, request: PinRequest) -> Result<Self> {
        check_may_fault()?;
        current!().mm().ok_or(EINVAL)?;
        let pages = range.pages();
        // INVARIANT: There are no pages yet.
        let mut held = Self {
            pages: KVVec::with_capacity(pages, GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?,
            hold: request.hold,
            write: request.write,
            dirty: false,
        };
        // On failure the references taken so far are dropped.
        while held.pages.len() < pages {
            check_signals()?;
            let start = range.start() + held.pages.len() * PAGE_SIZE;
            held.take(start, pages - held.pages.len(), request)?;
        }
        Ok(held)
    }

    /// Takes at least one and up to `pages` pages more, from `start` on.
    fn take(&mut self, start: usize, pages: usize, request: PinRequest) -> Result {
        let flags = request.flags();
        let room = self.pages.spare_capacity_mut();
        let n = pages.min(room.len()).min(BATCH);
        let out = room.as_mut_ptr().cast();
        // CAST: `n` is small.
        let (long, int) = (n, n as i32);
        let taken = match (request.fast, request.hold) {
            // SAFETY: `out` has room for `n` pages, and the task has an address space.
            (false, Hold::Get) => unsafe {
                bindings::get_user_pages_unlocked(start, long, out, flags)
            },
            // SAFETY: `out` has room for `n` pages, and the task has an address space.
            (false, Hold::Pin | Hold::LongTerm) => unsafe {
                bindings::pin_user_pages_unlocked(start, long, out, flags)
            },
            // SAFETY: `out` has room for `n` pages, and the task has an address space.
            (true, Hold::Get) => unsafe {
                bindings::get_user_pages_fast(start, int, flags, out) as isize
            },
            // SAFETY: `out` has room for `n` pages, and the task has an address space.
            (true, Hold::Pin | Hold::LongTerm) => unsafe {
                bindings::pin_user_pages_fast(start, int, flags, out) as isize
            },
        };
        // CAST: Error numbers are small.
        let taken = usize::try_from(taken).map_err(|_| Error::from_errno(taken as i32))?;
        if taken == 0 {
            return Err(EFAULT);
        }
        // SAFETY: Core mm has written so many, which are no more than `n`.
        // INVARIANT: What was taken of them is ours.
        unsafe { self.pages.inc_len(taken) };
        Ok(())
    }

    /// Says that the pages were written to: they are marked dirty when they are let go. Without effect
    /// on pages that are held for reading, whose file system does not expect to see them dirty.
    pub(crate) fn mark_dirty(&mut self) {
        self.dirty = self.write;
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        for pages in self.pages.chunks_mut(BATCH) {
            let (first, n) = (pages.as_mut_ptr(), pages.len());
            match self.hold {
                // SAFETY: We own a pin on each by the type invariants of `PinnedPages`.
                Hold::Pin | Hold::LongTerm => unsafe {
                    bindings::unpin_user_pages_dirty_lock(first, n, self.dirty)
                },
                Hold::Get => {
                    for &page in pages.iter() {
                        // SAFETY: We own a reference on each by the type invariants of `PinnedPages`.
                        unsafe { put(page, self.dirty) };
                    }
                }
            }
            cond_resched();
        }
    }
}

/// Drops a reference on `page`, after marking it dirty where it was written to. May sleep.
///
/// # Safety
///
/// The caller must own a reference on `page`, and gives it away.
unsafe fn put(page: *mut bindings::page, dirty: bool) {
    if dirty {
        // SAFETY: The caller's reference keeps the page.
        unsafe { bindings::set_page_dirty_lock(page) };
    }
    // SAFETY: The caller gives its reference away by the contract of this function.
    unsafe { bindings::zdm_folio_put(page) };
}

#[kunit_tests(zdmirror_pin)]
mod tests {
    use super::*;
    use crate::mm::{
        hmm::{
            inspect::PageFacts,
            mirror::HmmMirror, //
        },
        kunit::support::{
            mmap_anon,
            this_module, //
        },
        region::owner::PgmapOwner,
        PAGE_SHIFT, //
    };
    use kernel::uaccess::{
        UserPtr,
        UserSlice, //
    };

    fn facts(mirror: &HmmMirror, address: usize) -> Result<PageFacts> {
        let mut out = [None];
        mirror.inspect(PageRange::new(address, 1)?, &mut out, |_, facts| facts)?;
        out[0].ok_or(EFAULT)
    }

    /// Two pages of the KUnit thread's own, both there, with nothing mapped behind them that is
    /// looked at.
    fn setting() -> Result<(usize, HmmMirror)> {
        let start = mmap_anon(2 * PAGE_SIZE)?;
        for address in [start, start + PAGE_SIZE] {
            UserSlice::new(UserPtr::from_addr(address), 1)
                .writer()
                .write_slice(&[1])?;
        }
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mirror = HmmMirror::new(mm, PgmapOwner::new(this_module())?)?;
        Ok((start, mirror))
    }

    #[test]
    fn flags_of_requests() {
        let flags = |hold, write| {
            PinRequest {
                hold,
                write,
                fast: false,
            }
            .flags()
        };
        assert_eq!(flags(Hold::Get, false), 0);
        assert_eq!(flags(Hold::Pin, true), bindings::FOLL_WRITE);
        let long = bindings::FOLL_LONGTERM;
        assert_eq!(flags(Hold::LongTerm, false), long);
        assert_eq!(flags(Hold::LongTerm, true), long | bindings::FOLL_WRITE);
    }

    #[test]
    fn held_pages_are_let_go() -> Result {
        let (start, mirror) = setting()?;
        let page = PageRange::new(start, 1)?;
        for hold in [Hold::Get, Hold::Pin, Hold::LongTerm] {
            let own = match hold {
                Hold::Get => 1,
                Hold::Pin | Hold::LongTerm => bindings::GUP_PIN_COUNTING_BIAS as i32,
            };
            for (write, fast) in [(false, false), (true, false), (false, true), (true, true)] {
                let request = PinRequest { hold, write, fast };
                let mut held = PinnedPages::new(page, request)?;
                let during = facts(&mirror, start)?;
                assert_eq!(during.pins, i32::from(hold != Hold::Get));
                assert!(during.refs >= during.mapcount + own);
                if write {
                    held.mark_dirty();
                }
                drop(held);
                let after = facts(&mirror, start)?;
                assert_eq!((after.pins, after.pfn), (0, during.pfn));
                // A page that is on the way to an LRU list has one more meanwhile.
                assert!((after.mapcount..=during.refs - own).contains(&after.refs));
            }
        }
        Ok(())
    }

    #[test]
    fn more_than_there_is_memory_for() -> Result {
        let all = PageRange::new(0, crate::mm::user::range::task_size() >> PAGE_SHIFT)?;
        let request = PinRequest {
            hold: Hold::Get,
            write: false,
            fast: true,
        };
        mmap_anon(PAGE_SIZE)?;
        assert_eq!(PinnedPages::new(all, request).err(), Some(ENOMEM));
        Ok(())
    }

    #[test]
    fn all_or_nothing() -> Result {
        let (start, mirror) = setting()?;
        let before = facts(&mirror, start)?;
        // No process maps so many pages.
        let beyond = PageRange::new(start, 2 + (1 << (30 - PAGE_SHIFT)))?;
        for fast in [false, true] {
            let request = PinRequest {
                hold: Hold::Pin,
                write: true,
                fast,
            };
            let held = PinnedPages::new(beyond, request);
            assert_eq!(held.err(), Some(EFAULT));
            assert_eq!(facts(&mirror, start)?.pins, 0);
        }
        assert_eq!(facts(&mirror, start)?.pfn, before.pfn);
        Ok(())
    }
}
