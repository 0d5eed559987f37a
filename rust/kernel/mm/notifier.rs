// SPDX-License-Identifier: GPL-2.0

//! Being told when a range of an address space changes.
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

use crate::bindings;
use core::marker::PhantomData;
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
    /// [`PendingSeq::set`] can do. Where `range` is not blockable nothing here may sleep, and the
    /// sequence is given back when the lock cannot be had. May be called in reclaim: must not
    /// allocate in a way that waits for it.
    fn invalidate(
        &self,
        range: &NotifierRange<'_>,
        seq: PendingSeq<'_>,
    ) -> core::result::Result<SeqSet, ()>;
}

/// The range of an invalidation.
pub(super) struct NotifierRange<'a>(&'a bindings::mmu_notifier_range);

impl NotifierRange<'_> {
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

/// Proof that the sequence was set.
pub(super) struct SeqSet(());

impl PendingSeq<'_> {
    /// Sets the sequence: `mmu_interval_set_seq()`. The user's lock must be held.
    pub(super) fn set(self) -> SeqSet {
        // SAFETY: The subscription is valid during the callback.
        unsafe { bindings::zdm_mmu_interval_set_seq(self.sub, self.seq) };
        SeqSet(())
    }
}

/// A point in the sequence of invalidations, from [`MmuIntervalNotifier::read_begin`].
#[derive(Clone, Copy)]
pub(super) struct ReadSeq(pub(super) usize);

/// A subscription to the changes of a whole address space.
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
    ///
    /// Wraps `mmu_interval_notifier_insert()`.
    pub(super) fn new<'a>(
        mm: &'a MmWithUser,
        data: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        let raw_mm = mm.as_raw();
        let length = usize::MAX & !(super::PAGE_SIZE - 1);
        // The callback may run as soon as the subscription is in, so it comes last.
        try_pin_init!(Self {
            data <- data,
            mm: ARef::from(&**mm),
            sub <- Opaque::try_ffi_init(move |sub: *mut bindings::mmu_interval_notifier| {
                // SAFETY: `mm` has users, `sub` is pinned until it is removed.
                to_result(unsafe {
                    bindings::mmu_interval_notifier_insert(sub, raw_mm, 0, length, &Self::OPS)
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

    /// Begins to read the address space; waits for invalidations that are under way. May sleep.
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
