// SPDX-License-Identifier: GPL-2.0

//! The mappings of an address space at one moment, read without touching them.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use super::{
    changes::Span,
    hmm::{
        range_fault,
        HmmMirror,
        BATCH, //
    },
    mapped::{
        HmmEntry,
        MappedPage,
        Memory,
        MemoryKinds, //
    },
    notifier::{
        IntervalOps,
        MmuIntervalNotifier,
        NotifierRange, //
    },
    range::PageRange,
    task::{
        check_signals,
        Deadline, //
    },
    PAGE_SIZE, //
};
use crate::bindings;
use core::{
    marker::PhantomData,
    pin::Pin, //
};
use kernel::prelude::*;

/// Pages that one snapshot takes at most: each is a notifier that comes and goes.
pub(crate) const SNAPSHOT_PAGES: usize = 2 * BATCH;

/// Size of the page table entry that maps a page.
///
/// # Examples
///
/// ```
/// use kernel::mm::snapshot::{MapSize, Seen};
/// # use kernel::mm::{kunit::{anon_range, touch}, kunit_device::EmulatedDevice};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let mirror = device.mirror()?;
///
/// touch(range)?;
/// let mut sizes = [None];
/// mirror.snapshot(range, &mut sizes, Seen::size)?;
/// assert_eq!(sizes, [Some(MapSize::Base)]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapSize {
    /// That of a page, or any that the others are not.
    Base,
    /// All of what a PMD maps.
    Pmd,
    /// All of what a PUD maps.
    Pud,
}

/// The state of an address in a snapshot.
///
/// # Examples
///
/// ```
/// use kernel::mm::snapshot::Seen;
/// # use kernel::mm::{kunit::{anon_range, touch}, kunit_device::EmulatedDevice};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let mirror = device.mirror()?;
///
/// touch(range.first(1))?;
/// let mut seen = [Seen::Error; 2];
/// mirror.snapshot(range, &mut seen, |seen| seen)?;
/// assert!(matches!(seen[0], Seen::Page { write: true, .. }));
/// assert_eq!(seen[1], Seen::Absent);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing that could be accessed.
    Error,
    /// Nothing, but a fault may change that.
    Absent,
    /// A page that may be read.
    Page {
        /// The kind of memory of the page.
        memory: Memory,
        /// Whether it may be written.
        write: bool,
        /// How it is mapped.
        size: MapSize,
    },
}

impl Seen {
    /// How the page is mapped, if there is one.
    pub(crate) fn size(self) -> Option<MapSize> {
        match self {
            Self::Page { size, .. } => Some(size),
            Self::Error | Self::Absent => None,
        }
    }
}

/// A snapshot has nothing to forget: whatever changes, all of it is taken again.
struct Nothing;

impl IntervalOps for Nothing {
    fn invalidate(&self, _range: &NotifierRange<'_>) {}
}

/// An address that a snapshot looks at, to be asked for the page while it is mapped.
///
/// # Invariants
///
/// For `'a` the lock of the snapshot is held under which the sequence was checked that `entry` was
/// obtained for `address` in.
pub(super) struct Place<'a> {
    entry: HmmEntry,
    address: usize,
    _lock: PhantomData<&'a ()>,
}

impl<'a> Place<'a> {
    /// The page, `None` when there is none or it cannot be accessed.
    pub(super) fn page(&self) -> Option<MappedPage<'a>> {
        // SAFETY: The entry was obtained for the address, and the lock is held, by the type
        // invariants. Snapshots are for the owner of `DevPagemap`s.
        unsafe { MappedPage::new(self.entry, self.address) }
    }

    /// What there is to be seen.
    fn seen(&self, kinds: &MemoryKinds<'_>) -> Seen {
        if !self.entry.is_valid() {
            return if self.entry.is_error() {
                Seen::Error
            } else {
                Seen::Absent
            };
        }
        Seen::Page {
            // SAFETY: The entry is valid, as checked above. Its page is mapped while the lock is held,
            // which it is by the type invariants.
            memory: unsafe { kinds.of(self.entry) },
            write: self.entry.is_writable(),
            size: match self.entry.order() {
                bindings::PMD_ORDER => MapSize::Pmd,
                bindings::PUD_ORDER => MapSize::Pud,
                _ => MapSize::Base,
            },
        }
    }
}

impl HmmMirror {
    /// Looks at the pages of `range`, no more than [`SNAPSHOT_PAGES`], and puts down in `out`, which
    /// has an element for each, what `f` makes of each. May sleep, and faults nothing in.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone, or `out` too large or not of the size of `range`, `EBUSY` when invalidations
    /// keep coming for a second, `EINTR` for a task that was killed, `ENOMEM`.
    pub(crate) fn snapshot<T: Copy>(
        &self,
        range: PageRange,
        out: &mut [T],
        f: impl Fn(Seen) -> T,
    ) -> Result {
        // Most pages look the same as the one before.
        let mut last: Option<(Seen, T)> = None;
        self.each_place(range, out, |slot, seen, _| {
            *slot = match last {
                Some((before, same)) if before == seen => same,
                _ => f(seen),
            };
            last = Some((seen, *slot));
        })
    }

    /// As [`HmmMirror::snapshot`], which also shows `f` the place, for the page. It is mapped until
    /// `f` returns, which is called with the lock of the snapshot held and must not sleep.
    pub(super) fn look<T>(
        &self,
        range: PageRange,
        out: &mut [T],
        f: impl Fn(Seen, Place<'_>) -> T,
    ) -> Result {
        self.each_place(range, out, |slot, seen, place| *slot = f(seen, place))
    }

    /// Calls `f` for each page of `range` with what there is to be seen, the place, and the element of
    /// `out`.
    #[inline]
    fn each_place<T>(
        &self,
        range: PageRange,
        out: &mut [T],
        mut f: impl FnMut(&mut T, Seen, Place<'_>),
    ) -> Result {
        if range.pages() > SNAPSHOT_PAGES || out.len() != range.pages() {
            return Err(EINVAL);
        }
        let mm = self.mm().mmget_not_zero().ok_or(EINVAL)?;
        pin_init::stack_try_pin_init!(
            let notifier: MmuIntervalNotifier<Nothing> =
                MmuIntervalNotifier::for_range(&mm, range, Nothing)
        );
        let notifier: Pin<&mut MmuIntervalNotifier<Nothing>> = notifier?;
        let mut pfns = [0usize; SNAPSHOT_PAGES];
        let deadline = Deadline::after_ms(bindings::HMM_RANGE_DEFAULT_TIMEOUT);
        loop {
            check_signals()?;
            if deadline.passed() {
                return Err(EBUSY);
            }
            let seq = notifier.read_begin(Span::of(range));
            let mut hmm_range = bindings::hmm_range {
                notifier: notifier.as_raw(),
                notifier_seq: seq.number(),
                start: range.start(),
                end: range.end(),
                hmm_pfns: pfns.as_mut_ptr(),
                default_flags: 0,
                pfn_flags_mask: 0,
                dev_private_owner: self.owner().as_ptr(),
            };
            // SAFETY: `pfns` has an entry for each page, as checked above. The notifier is one of `mm`,
            // and the sequence was begun with it.
            match unsafe { range_fault(&mut hmm_range, &mm) } {
                Err(err) if err == EBUSY => continue,
                other => other?,
            };
            let Some(_lock) = notifier.lock_if_fresh(seq) else {
                continue;
            };
            let kinds = MemoryKinds::new(self.owner());
            let mut address = range.start();
            let mut seen = None;
            for (slot, &pfn) in out.iter_mut().zip(&pfns) {
                // INVARIANT: The lock is held until the end of the loop and the sequence checked.
                let place = Place {
                    entry: HmmEntry::new(pfn),
                    address,
                    _lock: PhantomData,
                };
                // All that one entry of a page table maps looks the same.
                let now = match seen {
                    Some(before) if place.entry.maps_before(address) => before,
                    _ => place.seen(&kinds),
                };
                f(slot, now, place);
                seen = Some(now);
                address += PAGE_SIZE;
            }
            return Ok(());
        }
    }
}
