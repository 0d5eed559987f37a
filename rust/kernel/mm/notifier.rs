// SPDX-License-Identifier: GPL-2.0

//! Notification of changes to a range of an address space.
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

use super::range::PageRange;
use crate::bindings;
use core::marker::PhantomData;
use kernel::{
    error::to_result,
    mm::{
        Mm,
        MmWithUser, //
    },
    new_mutex,
    prelude::*,
    sync::{
        aref::ARef,
        Mutex,
        MutexGuard, //
    },
    types::Opaque, //
};

/// State that a driver has derived from a range of an address space, and that a notifier protects
/// with its lock.
pub(super) trait IntervalOps: Send + 'static {
    /// The range is about to change: forget the state derived from it.
    ///
    /// The notifier calls this with its lock held, after it has set the sequence. Must not sleep,
    /// and must not allocate: core mm may call in reclaim.
    fn invalidate(&self, range: &NotifierRange<'_>);
}

/// Why a range changes, as far as it makes a difference: `enum mmu_notifier_event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
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
    fn event(&self) -> Event {
        match self.0.event {
            bindings::mmu_notifier_event_MMU_NOTIFY_MIGRATE => Event::Migrate,
            bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE => Event::Exclusive,
            _ => Event::Other,
        }
    }

    /// Whether `owner` causes the event. Events other than [`Event::Migrate`] and
    /// [`Event::Exclusive`] have no owner.
    fn is_owner(&self, owner: *const c_void) -> bool {
        self.event() != Event::Other && core::ptr::eq(self.0.owner, owner)
    }

    /// Whether pages are collected for a migration.
    pub(super) fn is_migration(&self) -> bool {
        self.event() == Event::Migrate
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
    fn is_blockable(&self) -> bool {
        // SAFETY: The reference is valid.
        unsafe { bindings::zdm_mmu_notifier_range_blockable(self.0) }
    }
}

/// A point in the sequence of invalidations of one notifier, which it borrows.
#[derive(Clone, Copy)]
pub(super) struct ReadSeq<'a> {
    sub: *mut bindings::mmu_interval_notifier,
    seq: usize,
    _notifier: PhantomData<&'a ()>,
}

impl ReadSeq<'_> {
    /// The number, as `hmm_range.notifier_seq` has it.
    pub(super) fn number(self) -> usize {
        self.seq
    }
}

/// A subscription to the changes of an address space, or of a range of it, and what was learnt of
/// that range.
///
/// The derived state is behind the lock that an invalidation takes before it sets the sequence.
/// [`MmuIntervalNotifier::lock_if_fresh`] is the only way to learn that nothing has changed, and
/// gives the locked data at the same time, so that neither half of the protocol of
/// `Documentation/mm/hmm.rst` can be left out.
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
    data: Mutex<T>,
}

// SAFETY: The subscription may be used and removed on any thread, and `T` is `Send`.
unsafe impl<T: IntervalOps> Send for MmuIntervalNotifier<T> {}
// SAFETY: Core mm locks the subscription by itself; the mutex gives `T` to one thread at a time.
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
        data: impl PinInit<T> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::insert(mm, 0, usize::MAX & !(super::PAGE_SIZE - 1), data)
    }

    /// Subscribes to `range` of `mm`. May sleep.
    pub(super) fn for_range<'a>(
        mm: &'a MmWithUser,
        range: PageRange,
        data: impl PinInit<T> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::insert(mm, range.start(), range.end() - range.start(), data)
    }

    /// Wraps `mmu_interval_notifier_insert()`.
    fn insert<'a>(
        mm: &'a MmWithUser,
        start: usize,
        length: usize,
        data: impl PinInit<T> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        let raw_mm = mm.as_raw();
        // The callback may run as soon as the subscription is in, so it comes last.
        try_pin_init!(Self {
            data <- new_mutex!(data, "MmuIntervalNotifier::data"),
            mm: ARef::from(&**mm),
            sub <- Opaque::try_ffi_init(move |sub: *mut bindings::mmu_interval_notifier| {
                // SAFETY: The borrowed `mm` has users. `sub` stays pinned until `drop` removes it.
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

    /// Locks the derived state, which may be stale. May sleep. Under this lock nothing may be
    /// waited for that waits for an invalidation.
    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        self.data.lock()
    }

    /// Locks the derived state, `None` if anything has changed since `seq`: then the caller must
    /// not use what it has read since. May sleep.
    pub(super) fn lock_if_fresh(&self, seq: ReadSeq<'_>) -> Option<MutexGuard<'_, T>> {
        let guard = self.data.lock();
        // SAFETY: The subscription is inserted by the type invariants. An invalidation sets the
        // sequence under the lock that `guard` holds.
        let stale = unsafe { bindings::zdm_mmu_interval_read_retry(self.as_raw(), seq.seq) };
        // A number of another notifier says nothing about this one.
        (core::ptr::eq(seq.sub, self.as_raw()) && !stale).then_some(guard)
    }

    pub(super) fn as_raw(&self) -> *mut bindings::mmu_interval_notifier {
        self.sub.get()
    }

    /// The identity of this subscription as the owner of exclusive access.
    ///
    /// Not the owner of the device's memory: other openers of the device are to lose the page.
    pub(super) fn exclusive_owner(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }

    /// Begins to read the range; waits for invalidations that are under way. May sleep.
    pub(super) fn read_begin(&self) -> ReadSeq<'_> {
        // SAFETY: The subscription is inserted by the type invariants.
        let seq = unsafe { bindings::mmu_interval_read_begin(self.as_raw()) };
        self.begun(seq)
    }

    /// The sequence that core mm itself has begun to read for `range`, once it has filled `range`.
    /// `None` if that is of another notifier.
    pub(super) fn read_by(&self, range: &bindings::hmm_range) -> Option<ReadSeq<'_>> {
        core::ptr::eq(range.notifier, self.as_raw()).then(|| self.begun(range.notifier_seq))
    }

    fn begun(&self, seq: usize) -> ReadSeq<'_> {
        ReadSeq {
            sub: self.as_raw(),
            seq,
            _notifier: PhantomData,
        }
    }

    /// # Safety
    ///
    /// Only to be called by core mm, for a subscription of this type.
    unsafe extern "C" fn invalidate(
        sub: *mut bindings::mmu_interval_notifier,
        range: *const bindings::mmu_notifier_range,
        seq: usize,
    ) -> bool {
        // SAFETY: The subscription is embedded in a `Self`, whose `drop` waits for this callback.
        let this = unsafe { &*kernel::container_of!(Opaque::cast_from(sub), Self, sub) };
        // SAFETY: Core mm gives a range that is valid during the callback.
        let range = NotifierRange(unsafe { &*range });
        if range.event() == Event::Exclusive && range.is_owner(this.exclusive_owner()) {
            // The page stays where it is, and only the CPU loses access: the derived state stays
            // true, and the task that gets the access need not try again.
            return true;
        }
        let data = if range.is_blockable() {
            this.data.lock()
        } else if let Some(data) = this.data.try_lock() {
            data
        } else {
            return false;
        };
        // SAFETY: The subscription is the one that core mm calls, with the sequence that it gave.
        // The lock is held that `lock_if_fresh()` takes.
        unsafe { bindings::zdm_mmu_interval_set_seq(sub, seq) };
        data.invalidate(&range);
        true
    }
}

#[pinned_drop]
impl<T: IntervalOps> PinnedDrop for MmuIntervalNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The subscription is inserted by the type invariants. Removal waits for callbacks.
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
    use kernel::sync::atomic::{
        Atomic,
        Relaxed, //
    };

    /// Counts invalidations.
    struct Watch(Atomic<usize>);

    impl IntervalOps for Watch {
        fn invalidate(&self, _range: &NotifierRange<'_>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn watch(start: usize, pages: usize) -> Result<Pin<KBox<MmuIntervalNotifier<Watch>>>> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let range = PageRange::new(start, pages)?;
        KBox::try_pin_init(
            MmuIntervalNotifier::for_range(mm, range, Watch(Atomic::new(0))),
            GFP_KERNEL,
        )
    }

    /// Invalidations so far, and whether a read that began at `seq` is stale.
    fn state(watch: &MmuIntervalNotifier<Watch>, seq: ReadSeq<'_>) -> (usize, bool) {
        let stale = watch.lock_if_fresh(seq).is_none();
        (watch.lock().0.load(Relaxed), stale)
    }

    #[test]
    fn range_sees_its_own_unmaps_only() -> Result {
        let start = mmap_anon(4 * PAGE_SIZE)?;
        let end = start + 4 * PAGE_SIZE;
        let watch = watch(start + PAGE_SIZE, 2)?;
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
    fn sequence_of_another_notifier_is_stale() -> Result {
        let start = mmap_anon(2 * PAGE_SIZE)?;
        let (one, other) = (watch(start, 1)?, watch(start, 1)?);
        assert_eq!(state(&one, one.read_begin()), (0, false));
        assert_eq!(state(&one, other.read_begin()), (0, true));
        Ok(())
    }
}
