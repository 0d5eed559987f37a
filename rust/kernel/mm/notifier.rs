// SPDX-License-Identifier: GPL-2.0

//! Being told when a range of an address space changes.
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

use crate::bindings;
use core::{
    marker::PhantomData,
    ops::Range, //
};
use kernel::{
    error::to_result,
    mm::{
        Mm,
        MmWithUser, //
    },
    prelude::*,
    sync::aref::ARef,
    types::Opaque, //
};

/// What an interval notifier protects.
pub(super) trait IntervalOps: Send + Sync + 'static {
    /// The range is about to change: stop using what was learnt of it.
    ///
    /// The lock that guards what was learnt must be held while the sequence is set, which only
    /// [`PendingSeq::set`] can do; [`PendingSeq::keep`] says that nothing is to be forgotten.
    /// Where `range` is not blockable nothing here may sleep, and `Err` says that the lock could
    /// not be had. May be called in reclaim: must not allocate in a way that waits for it.
    fn invalidate(
        &self,
        range: &NotifierRange<'_>,
        seq: PendingSeq<'_>,
    ) -> core::result::Result<SeqHandled, ()>;
}

/// Why a range changes, as far as it makes a difference: `enum mmu_notifier_event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Pages are collected for a migration by the owner.
    Migrate,
    /// The owner gets exclusive access to a page.
    Exclusive,
    /// Anything else.
    Other,
}

/// The range of an invalidation.
pub(super) struct NotifierRange<'a>(&'a bindings::mmu_notifier_range);

impl NotifierRange<'_> {
    /// What happens.
    pub(super) fn event(&self) -> Event {
        match self.0.event {
            bindings::mmu_notifier_event_MMU_NOTIFY_MIGRATE => Event::Migrate,
            bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE => Event::Exclusive,
            _ => Event::Other,
        }
    }

    /// Whether `owner` is who does it. Other events than those that have an owner have none.
    pub(super) fn is_owner(&self, owner: *const c_void) -> bool {
        self.event() != Event::Other && core::ptr::eq(self.0.owner, owner)
    }

    /// First address, in bytes.
    pub(super) fn start(&self) -> usize {
        self.0.start
    }

    /// End address, in bytes, exclusive.
    pub(super) fn end(&self) -> usize {
        self.0.end
    }

    /// Whether the callback may sleep.
    pub(super) fn is_blockable(&self) -> bool {
        // SAFETY: The range is valid.
        unsafe { bindings::zdm_mmu_notifier_range_blockable(self.0) }
    }
}

/// A new sequence number that is to be set under the user's lock.
pub(super) struct PendingSeq<'a> {
    sub: *mut bindings::mmu_interval_notifier,
    seq: usize,
    _p: PhantomData<&'a ()>,
}

/// Proof that the sequence was set, or deliberately not.
pub(super) struct SeqHandled(());

impl PendingSeq<'_> {
    /// Sets the sequence: `mmu_interval_set_seq()`. The user's lock must be held.
    pub(super) fn set(self) -> SeqHandled {
        // SAFETY: The subscription is valid during the callback.
        unsafe { bindings::zdm_mmu_interval_set_seq(self.sub, self.seq) };
        SeqHandled(())
    }

    /// Leaves the sequence as it is: who reads the range now is not told to try again.
    ///
    /// Right only where all that may have been learnt of the range stays true.
    pub(super) fn keep(self) -> SeqHandled {
        SeqHandled(())
    }
}

/// A point in the sequence of invalidations, from [`MmuIntervalNotifier::read_begin`].
#[derive(Clone, Copy)]
pub(super) struct ReadSeq(pub(super) usize);

/// A subscription to the changes of an address space, or of a range of it.
///
/// # Invariants
///
/// `sub` is inserted for `mm`.
#[pin_data(PinnedDrop)]
pub(super) struct MmuIntervalNotifier<T: IntervalOps> {
    // The subscription ends before the data goes: see `drop`.
    #[pin]
    sub: Opaque<bindings::mmu_interval_notifier>,
    mm: ARef<Mm>,
    #[pin]
    data: T,
}

// SAFETY: The subscription may be used and removed on any thread.
unsafe impl<T: IntervalOps> Send for MmuIntervalNotifier<T> {}
// SAFETY: As above.
unsafe impl<T: IntervalOps> Sync for MmuIntervalNotifier<T> {}

impl<T: IntervalOps> MmuIntervalNotifier<T> {
    const OPS: bindings::mmu_interval_notifier_ops = bindings::mmu_interval_notifier_ops {
        invalidate: Some(Self::invalidate),
        invalidate_start: None,
        invalidate_finish: None,
    };

    /// Subscribes to all addresses of `mm`. May sleep.
    pub(super) fn new<'a>(
        mm: &'a MmWithUser,
        data: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::insert(mm, 0..usize::MAX & !(super::PAGE_SIZE - 1), data)
    }

    /// Subscribes to `range`, in bytes, of `mm`; `EOVERFLOW` if that is empty. May sleep.
    pub(super) fn for_range<'a>(
        mm: &'a MmWithUser,
        range: Range<usize>,
        data: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::insert(mm, range, data)
    }

    /// Wraps `mmu_interval_notifier_insert()`.
    fn insert<'a>(
        mm: &'a MmWithUser,
        range: Range<usize>,
        data: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        let raw_mm = mm.as_raw();
        let start = range.start;
        let length = range.end.saturating_sub(start);
        // The callback may run as soon as the subscription is in, so it comes last.
        try_pin_init!(Self {
            data <- data,
            mm: ARef::from(&**mm),
            sub <- Opaque::try_ffi_init(move |sub: *mut bindings::mmu_interval_notifier| {
                // SAFETY: `mm` has users, `sub` is pinned until it is removed.
                to_result(unsafe {
                    bindings::mmu_interval_notifier_insert(sub, raw_mm, start, length, &Self::OPS)
                })
            }),
        })
    }

    /// The address space.
    pub(super) fn mm(&self) -> &Mm {
        &self.mm
    }

    /// What the notifier protects.
    pub(super) fn data(&self) -> &T {
        &self.data
    }

    pub(super) fn as_raw(&self) -> *mut bindings::mmu_interval_notifier {
        self.sub.get()
    }

    /// Begins to read the range; waits for invalidations that are under way. May sleep.
    pub(super) fn read_begin(&self) -> ReadSeq {
        // SAFETY: The subscription is inserted.
        ReadSeq(unsafe { bindings::mmu_interval_read_begin(self.as_raw()) })
    }

    /// Whether what was read since `seq` is stale. The lock that [`IntervalOps::invalidate`] takes
    /// must be held.
    pub(super) fn read_retry(&self, seq: ReadSeq) -> bool {
        // SAFETY: The subscription is inserted.
        unsafe { bindings::zdm_mmu_interval_read_retry(self.as_raw(), seq.0) }
    }

    /// # Safety
    ///
    /// Only to be called by core mm, for a subscription of this type.
    unsafe extern "C" fn invalidate(
        sub: *mut bindings::mmu_interval_notifier,
        range: *const bindings::mmu_notifier_range,
        seq: usize,
    ) -> bool {
        // SAFETY: The subscription is embedded in a `Self` that waits for us before it goes.
        let this = unsafe { &*kernel::container_of!(Opaque::cast_from(sub), Self, sub) };
        let pending = PendingSeq {
            sub,
            seq,
            _p: PhantomData,
        };
        // SAFETY: Core mm gives a valid range.
        let range = NotifierRange(unsafe { &*range });
        this.data.invalidate(&range, pending).is_ok()
    }
}

#[pinned_drop]
impl<T: IntervalOps> PinnedDrop for MmuIntervalNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Inserted by the type invariants. Waits for callbacks that run.
        unsafe { bindings::mmu_interval_notifier_remove(self.sub.get()) };
    }
}

#[kunit_tests(zdmirror_notifier)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::{
            mmap_anon,
            munmap, //
        },
        PAGE_SIZE, //
    };
    use kernel::{
        new_mutex,
        sync::Mutex, //
    };

    /// Counts what it is told.
    #[pin_data]
    struct Watch {
        #[pin]
        events: Mutex<usize>,
    }

    impl IntervalOps for Watch {
        fn invalidate(
            &self,
            range: &NotifierRange<'_>,
            seq: PendingSeq<'_>,
        ) -> core::result::Result<SeqHandled, ()> {
            let mut events = if range.is_blockable() {
                self.events.lock()
            } else {
                self.events.try_lock().ok_or(())?
            };
            *events += 1;
            Ok(seq.set())
        }
    }

    fn watch(range: Range<usize>) -> Result<Pin<KBox<MmuIntervalNotifier<Watch>>>> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let data = try_pin_init!(Watch {
            events <- new_mutex!(0, "Watch::events"),
        }? Error);
        KBox::try_pin_init(MmuIntervalNotifier::for_range(mm, range, data), GFP_KERNEL)
    }

    /// What was seen, and whether what was read since `seq` is stale.
    fn state(watch: &MmuIntervalNotifier<Watch>, seq: ReadSeq) -> (usize, bool) {
        let events = watch.data().events.lock();
        (*events, watch.read_retry(seq))
    }

    #[test]
    fn range_sees_its_own_unmaps_only() -> Result {
        let start = mmap_anon(4 * PAGE_SIZE)?;
        let end = start + 4 * PAGE_SIZE;
        let watch = watch(start + PAGE_SIZE..end - PAGE_SIZE)?;
        let seq = watch.read_begin();
        assert_eq!(state(&watch, seq), (0, false));
        munmap(start, PAGE_SIZE)?;
        munmap(end - PAGE_SIZE, PAGE_SIZE)?;
        assert_eq!(state(&watch, seq), (0, false));
        munmap(end - 2 * PAGE_SIZE, PAGE_SIZE)?;
        assert_eq!(state(&watch, seq), (1, true));
        let seq = watch.read_begin();
        assert_eq!(state(&watch, seq), (1, false));
        Ok(())
    }

    #[test]
    fn empty_range_is_refused() -> Result {
        let start = mmap_anon(PAGE_SIZE)?;
        assert!(watch(start..start).is_err());
        Ok(())
    }
}
