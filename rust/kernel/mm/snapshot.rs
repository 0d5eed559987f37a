// SPDX-License-Identifier: GPL-2.0

//! What an address space maps at one moment, without touching it.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use super::{
    hmm::{
        range_fault,
        HmmMirror,
        BATCH, //
    },
    mapped::{
        HmmEntry,
        MappedPage,
        Memory, //
    },
    notifier::{
        IntervalOps,
        MmuIntervalNotifier,
        NotifierRange,
        PendingSeq,
        SeqHandled, //
    },
    pagemap::PgmapOwner,
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
use kernel::{
    new_mutex,
    prelude::*,
    sync::Mutex, //
};

/// Pages that one snapshot takes at most: each is a notifier that comes and goes.
pub(crate) const SNAPSHOT_PAGES: usize = 2 * BATCH;

/// Size of the page table entry that maps a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapSize {
    /// That of a page, or any that the others are not.
    Base,
    /// All of what a PMD maps.
    Pmd,
    /// All of what a PUD maps.
    Pud,
}

/// What a snapshot sees of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing that could be accessed.
    Error,
    /// Nothing, but a fault may change that.
    Absent,
    /// A page that may be read.
    Page {
        /// What it is of.
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

/// What a snapshot has learnt is good while this is locked.
#[pin_data]
struct SnapshotLock {
    #[pin]
    lock: Mutex<()>,
}

impl SnapshotLock {
    fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            lock <- new_mutex!((), "SnapshotLock::lock"),
        })
    }
}

impl IntervalOps for SnapshotLock {
    fn invalidate(
        &self,
        range: &NotifierRange<'_>,
        seq: PendingSeq<'_>,
    ) -> core::result::Result<SeqHandled, ()> {
        // Whatever changes, all of the snapshot is taken again.
        let _lock = if range.is_blockable() {
            self.lock.lock()
        } else {
            self.lock.try_lock().ok_or(())?
        };
        Ok(seq.set())
    }
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
        // SAFETY: By the type invariants; snapshots are for the owner of `DevPagemap`s.
        unsafe { MappedPage::new(self.entry, self.address) }
    }

    /// What there is to be seen.
    fn seen(&self, owner: &PgmapOwner) -> Seen {
        if !self.entry.is_valid() {
            return if self.entry.is_error() {
                Seen::Error
            } else {
                Seen::Absent
            };
        }
        Seen::Page {
            // SAFETY: By the type invariants the page is mapped.
            memory: unsafe { self.entry.memory(owner) },
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
    /// Looks at the pages from `start` on, as many as `out` has elements but no more than
    /// [`SNAPSHOT_PAGES`], and puts down what `f` makes of each. May sleep, and faults nothing in.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone or `out` is too large or empty, `EBUSY` when invalidations
    /// keep coming for a second, `EINTR` for a task that was killed, `ENOMEM`.
    pub(crate) fn snapshot<T>(&self, start: usize, out: &mut [T], f: impl Fn(Seen) -> T) -> Result {
        self.look(start, out, |seen, _| f(seen))
    }

    /// As [`HmmMirror::snapshot`], which also shows `f` the place, for the page. It is mapped until
    /// `f` returns, which is called with the lock of the snapshot held and must not sleep.
    pub(super) fn look<T>(
        &self,
        start: usize,
        out: &mut [T],
        f: impl Fn(Seen, Place<'_>) -> T,
    ) -> Result {
        if out.is_empty() || out.len() > SNAPSHOT_PAGES {
            return Err(EINVAL);
        }
        let mm = self.mm().mmget_not_zero().ok_or(EINVAL)?;
        let end = start.checked_add(out.len() * PAGE_SIZE).ok_or(EINVAL)?;
        pin_init::stack_try_pin_init!(
            let notifier: MmuIntervalNotifier<SnapshotLock> =
                MmuIntervalNotifier::for_range(&mm, start..end, SnapshotLock::new())
        );
        let notifier: Pin<&mut MmuIntervalNotifier<SnapshotLock>> = notifier?;
        let mut pfns = [0usize; SNAPSHOT_PAGES];
        let deadline = Deadline::after_ms(bindings::HMM_RANGE_DEFAULT_TIMEOUT);
        loop {
            check_signals()?;
            if deadline.passed() {
                return Err(EBUSY);
            }
            let seq = notifier.read_begin();
            let mut range = bindings::hmm_range {
                notifier: notifier.as_raw(),
                notifier_seq: 0,
                start,
                end,
                hmm_pfns: pfns.as_mut_ptr(),
                default_flags: 0,
                pfn_flags_mask: 0,
                dev_private_owner: self.owner().as_ptr(),
            };
            // SAFETY: `pfns` has room for all pages, and the notifier is one of `mm`.
            match unsafe { range_fault(&mut range, &mm, seq) } {
                Err(err) if err == EBUSY => continue,
                other => other?,
            };
            let _lock = notifier.data().lock.lock();
            if notifier.read_retry(seq) {
                continue;
            }
            let mut address = start;
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
                    _ => place.seen(self.owner()),
                };
                *slot = f(now, place);
                seen = Some(now);
                address += PAGE_SIZE;
            }
            return Ok(());
        }
    }
}
