// SPDX-License-Identifier: GPL-2.0

//! Notification of changes to a range of an address space.
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

#[cfg(CONFIG_KUNIT = "y")]
use super::range::PageRange;
use super::{
    changes::{
        Changes,
        Span, //
    },
    hold::Hold,
    mmap_lock::MmapWriteLock, //
};
use crate::{
    bindings,
    mm::{
        sync::{
            killable::{
                Blocking,
                KillableWait, //
            },
            task::check_may_fault, //
        },
        PAGE_SHIFT, //
    },
};
use core::{
    marker::PhantomData,
    ops::Deref, //
};
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
pub(in crate::mm) trait IntervalOps: Send + 'static {
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
    /// Areas go, or move away. The CPU's page tables may go with them.
    Unmap,
    /// Anything else.
    Other,
}

/// The range of an invalidation.
pub(in crate::mm) struct NotifierRange<'a>(&'a bindings::mmu_notifier_range);

impl NotifierRange<'_> {
    /// The kind of change.
    fn event(&self) -> Event {
        match self.0.event {
            bindings::mmu_notifier_event_MMU_NOTIFY_MIGRATE => Event::Migrate,
            bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE => Event::Exclusive,
            bindings::mmu_notifier_event_MMU_NOTIFY_UNMAP => Event::Unmap,
            _ => Event::Other,
        }
    }

    /// Whether `owner` causes the event. Events other than [`Event::Migrate`] and
    /// [`Event::Exclusive`] have no owner.
    fn is_owner(&self, owner: *const c_void) -> bool {
        let is_owned = matches!(self.event(), Event::Migrate | Event::Exclusive);
        is_owned && core::ptr::eq(self.0.owner, owner)
    }

    /// Whether pages are collected for a migration.
    pub(in crate::mm) fn is_migration(&self) -> bool {
        self.event() == Event::Migrate
    }

    /// Whether areas go, or move away.
    pub(in crate::mm) fn is_unmap(&self) -> bool {
        self.event() == Event::Unmap
    }

    /// First address, in bytes.
    pub(super) fn start(&self) -> usize {
        self.0.start
    }

    /// End address, in bytes, exclusive.
    pub(super) fn end(&self) -> usize {
        self.0.end
    }

    /// The pages.
    pub(in crate::mm) fn span(&self) -> Span {
        Span {
            first: self.start() >> PAGE_SHIFT,
            last: (self.end() - 1) >> PAGE_SHIFT,
        }
    }

    /// Whether the callback may sleep.
    fn is_blockable(&self) -> bool {
        self.0.flags & bindings::MMU_NOTIFIER_RANGE_BLOCKABLE != 0
    }
}

/// A point in the sequence of invalidations of one notifier, which it borrows, for a reader of some pages.
#[derive(Clone, Copy)]
pub(in crate::mm) struct ReadSeq<'a> {
    sub: *mut bindings::mmu_interval_notifier,
    seq: usize,
    begun: Begun,
    _notifier: PhantomData<&'a ()>,
}

impl ReadSeq<'_> {
    /// The number, as `hmm_range.notifier_seq` has it.
    pub(in crate::mm) fn number(self) -> usize {
        self.seq
    }
}

/// The pages of a reader, and the number of invalidations before it began.
#[derive(Clone, Copy)]
pub(in crate::mm) struct Begun {
    span: Span,
    /// Invalidations so far.
    count: usize,
}

/// The end of the invalidation whose sequence a subscription has.
struct Invalidation(*mut bindings::mmu_interval_notifier);

// SAFETY: A subscription may be used on any thread.
unsafe impl Send for Invalidation {}
// SAFETY: Core mm locks the subscription by itself.
unsafe impl Sync for Invalidation {}

impl Blocking for Invalidation {
    fn block(&self) {
        // SAFETY: The notifier that has the subscription ends the wait before it removes the subscription.
        unsafe { bindings::mmu_interval_read_begin(self.0) };
    }
}

/// The data that the lock of a notifier protects.
#[pin_data]
struct Protected<T> {
    changes: Changes,
    #[pin]
    data: T,
}

/// The derived state, locked.
#[must_use = "the lock is released at once"]
pub(in crate::mm) struct Locked<'a, T>(MutexGuard<'a, Protected<T>>);

impl<T> Deref for Locked<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.data
    }
}

/// A subscription to the changes of an address space, or of a range of it, and the state that was derived
/// from that range.
///
/// A reader waits for invalidations of the pages that it reads only. Core mm has one sequence for the whole
/// subscription, and its documentation says that each invalidation sets it by `mmu_interval_set_seq()`. Readers
/// of all pages would then wait for every invalidation. Here an invalidation is recorded in [`Changes`]
/// instead, and the first reader of the same pages sets the sequence before it begins.
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
pub(in crate::mm) struct MmuIntervalNotifier<T: IntervalOps> {
    // The subscription ends before the data goes: see `drop`.
    #[pin]
    sub: Opaque<bindings::mmu_interval_notifier>,
    mm: ARef<Mm>,
    #[pin]
    data: Mutex<Protected<T>>,
    /// The invalidation that a test holds.
    hold: Hold,
    /// Waits for an invalidation for tasks of other processes, which can be killed meanwhile.
    #[pin]
    end: KillableWait<Invalidation>,
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
    pub(in crate::mm) fn new<'a>(
        mm: &'a MmWithUser,
        data: impl PinInit<T> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::insert(mm, 0, usize::MAX & !(crate::mm::PAGE_SIZE - 1), data)
    }

    /// Subscribes to `range` of `mm`. May sleep.
    #[cfg(CONFIG_KUNIT = "y")]
    fn for_range<'a>(
        mm: &'a MmWithUser,
        range: PageRange,
        data: impl PinInit<T> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::insert(mm, range.start(), range.end() - range.start(), data)
    }

    /// Wraps `mmu_interval_notifier_insert()`, and `mmu_interval_notifier_insert_locked()` for the first subscriber.
    fn insert<'a>(
        mm: &'a MmWithUser,
        start: usize,
        length: usize,
        data: impl PinInit<T> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        let users = mm;
        // The callback may run as soon as the subscription is in, so it comes last.
        try_pin_init!(&this in Self {
            // SAFETY: `drop()` disables it. Nothing waits before the subscription is in, so that the pointer is not
            // dereferenced, nor the wait to be disabled where the insertion fails.
            end <- unsafe {
                let sub = &raw const (*this.as_ptr()).sub;
                KillableWait::new(Invalidation(Opaque::cast_into(sub)))
            },
            data <- new_mutex!(
                pin_init!(Protected {
                    changes: Changes::new(),
                    data <- data,
                }),
                "MmuIntervalNotifier::data"
            ),
            mm: ARef::from(&**mm),
            hold: Hold::new(),
            sub <- Opaque::try_ffi_init(move |sub: *mut bindings::mmu_interval_notifier| {
                let lock = MmapWriteLock::for_first_notifier(users)?;
                let insert = match lock {
                    Some(_) => bindings::mmu_interval_notifier_insert_locked,
                    None => bindings::mmu_interval_notifier_insert,
                };
                // SAFETY: The borrowed `mm` has users, and `lock` is its lock where `insert` wants that. `sub` stays
                // pinned until `drop` removes it.
                to_result(unsafe { insert(sub, users.as_raw(), start, length, &Self::OPS) })
            }),
        })
    }

    /// The address space.
    pub(in crate::mm) fn mm(&self) -> &Mm {
        &self.mm
    }

    /// Locks the derived state, which may be stale. May sleep. An invalidation waits for the lock, so that its
    /// holder must not wait for an invalidation.
    pub(in crate::mm) fn lock(&self) -> Locked<'_, T> {
        Locked(self.data.lock())
    }

    /// Locks the derived state; `None` if any of the pages of `seq` has changed since, so that what was read
    /// of them is out of date. May sleep.
    pub(in crate::mm) fn lock_if_fresh(&self, seq: ReadSeq<'_>) -> Option<Locked<'_, T>> {
        // A number of another notifier says nothing about this one.
        if !core::ptr::eq(seq.sub, self.as_raw()) {
            return None;
        }
        let guard = self.data.lock();
        // SAFETY: The subscription is inserted by the type invariants of `MmuIntervalNotifier`. The
        // sequence is set under the lock that `guard` holds.
        let set = unsafe { bindings::zdm_mmu_interval_read_retry(self.as_raw(), seq.seq) };
        let changed = guard.changes.changed(&seq.begun.span, seq.begun.count);
        (!set && !changed).then_some(Locked(guard))
    }

    /// Sets the sequence to `seq`.
    ///
    /// # Safety
    ///
    /// The caller must hold the lock of `data`, and core mm must have given `seq` to an invalidation of
    /// this subscription.
    unsafe fn set_seq(&self, seq: usize) {
        // SAFETY: The caller holds the lock that `lock_if_fresh()` takes, and `seq` is one of this
        // subscription, by the contract of this function.
        unsafe { bindings::zdm_mmu_interval_set_seq(self.as_raw(), seq) };
    }

    /// Holds the next invalidation of page number `page` for up to a second, as if another subscriber of the
    /// address space were slow. An invalidation that must not sleep is not held.
    ///
    /// # Errors
    ///
    /// `EBUSY` when one is held or asked for, `EINVAL` for a page that no process has.
    pub(in crate::mm) fn hold_next(&self, page: usize) -> Result {
        self.hold.ask(page)
    }

    /// As [`Hold::is_held`].
    pub(in crate::mm) fn is_held(&self) -> bool {
        self.hold.is_held()
    }

    /// Ends what [`MmuIntervalNotifier::hold_next`] asked for. Returns whether an invalidation was held.
    pub(in crate::mm) fn let_go(&self) -> bool {
        self.hold.let_go()
    }

    /// As [`Hold::go_on`].
    pub(in crate::mm) fn go_on(&self, page: usize) -> Result {
        self.hold.go_on(page)
    }

    pub(in crate::mm) fn as_raw(&self) -> *mut bindings::mmu_interval_notifier {
        self.sub.get()
    }

    /// The identity of this subscription as the owner of exclusive access.
    ///
    /// Not the owner of the device's memory: other files of the device are to lose the page.
    pub(in crate::mm) fn exclusive_owner(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }

    /// Begins to read the pages of `span`; waits for invalidations of them that are under way. May sleep.
    ///
    /// `mmu_interval_read_begin()` waits for as long as another task does what it does with its address space:
    /// fork() may wait for memory. A task of the same process is killed together with this one. A task of
    /// another process leaves the wait to deferred work.
    ///
    /// # Errors
    ///
    /// `EINTR` when this task is of another process, and was killed. `EDEADLK` for a task that has locked
    /// pages, which an invalidation may wait for.
    pub(in crate::mm) fn read_begin(&self, span: Span) -> Result<ReadSeq<'_>> {
        check_may_fault()?;
        let begun = self.before_read(span);
        let seq = if self.is_own() {
            // SAFETY: The subscription is inserted by the type invariants.
            unsafe { bindings::mmu_interval_read_begin(self.as_raw()) }
        } else {
            self.end.wait(None)?;
            // An invalidation that has begun since is in `changes`, and the reader begins again.
            // SAFETY: The subscription is inserted by the type invariants.
            unsafe { bindings::zdm_mmu_interval_seq(self.as_raw()) }
        };
        Ok(self.begun(seq, begun))
    }

    /// Whether the current task is of the address space.
    fn is_own(&self) -> bool {
        let task = current!();
        task.mm()
            .is_some_and(|mm| core::ptr::eq(mm.as_raw(), self.mm.as_raw()))
    }

    /// Prepares for core mm itself to begin to read `span`; [`MmuIntervalNotifier::read_by`] takes the result.
    /// May sleep.
    pub(in crate::mm) fn before_read(&self, span: Span) -> Begun {
        let guard = self.data.lock();
        if let Some(seq) = guard.changes.begin(&span) {
            // From here on each reader of this sequence waits for the invalidation in the span.
            // SAFETY: `guard` is the lock of `data`, and `changes` has what core mm gave to `invalidate()`.
            unsafe { self.set_seq(seq) };
        }
        let count = guard.changes.count();
        Begun { span, count }
    }

    /// The sequence that core mm itself has begun to read for `range`, once it has filled `range`. `None` if
    /// that is of another notifier.
    ///
    /// # Safety
    ///
    /// `begun` must be the result of [`MmuIntervalNotifier::before_read`] for the pages of `range`, from before
    /// core mm began.
    pub(in crate::mm) unsafe fn read_by(
        &self,
        range: &bindings::hmm_range,
        begun: Begun,
    ) -> Option<ReadSeq<'_>> {
        core::ptr::eq(range.notifier, self.as_raw()).then(|| self.begun(range.notifier_seq, begun))
    }

    fn begun(&self, seq: usize, begun: Begun) -> ReadSeq<'_> {
        ReadSeq {
            sub: self.as_raw(),
            seq,
            begun,
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
        if let Some(seq) = data.changes.add(range.span(), seq) {
            // SAFETY: Core mm calls with the sequence, and the lock of `data` is held.
            unsafe { this.set_seq(seq) };
        }
        data.data.invalidate(&range);
        drop(data);
        if range.is_blockable() {
            this.hold.wait(&range.span());
        }
        true
    }
}

#[pinned_drop]
impl<T: IntervalOps> PinnedDrop for MmuIntervalNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        self.end.disable();
        // SAFETY: The subscription is inserted by the type invariants. Removal waits for callbacks.
        unsafe { bindings::mmu_interval_notifier_remove(self.sub.get()) };
    }
}

#[kunit_tests(zdmirror_notifier)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::{
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
        let locked = watch.lock();
        let Watch(count) = &*locked;
        (count.load(Relaxed), stale)
    }

    #[test]
    fn range_sees_its_own_unmaps_only() -> Result {
        let start = mmap_anon(4 * PAGE_SIZE)?;
        let end = start + 4 * PAGE_SIZE;
        let watch = watch(start + PAGE_SIZE, 2)?;
        let all = Span::of(PageRange::new(start, 4)?);
        let seq = watch.read_begin(all)?;
        assert_eq!(state(&watch, seq), (0, false));
        munmap(start, PAGE_SIZE)?;
        munmap(end - PAGE_SIZE, PAGE_SIZE)?;
        assert_eq!(state(&watch, seq), (0, false));
        munmap(end - 2 * PAGE_SIZE, PAGE_SIZE)?;
        assert_eq!(state(&watch, seq), (1, true));
        let seq = watch.read_begin(all)?;
        assert_eq!(state(&watch, seq), (1, false));
        Ok(())
    }

    #[test]
    fn other_invalidations_are_not_held() -> Result {
        let start = mmap_anon(4 * PAGE_SIZE)?;
        let watch = watch(start, 4)?;
        let page = |n: usize| (start >> PAGE_SHIFT) + n;
        assert_eq!(watch.hold_next(0), Err(EINVAL));
        assert_eq!(watch.hold_next(page(2)), Ok(()));
        assert_eq!(watch.hold_next(page(1)), Err(EBUSY));
        // Of other pages.
        munmap(start, 2 * PAGE_SIZE)?;
        munmap(start + 3 * PAGE_SIZE, PAGE_SIZE)?;
        assert_eq!(watch.hold_next(page(1)), Err(EBUSY));
        assert!(!watch.is_held() && !watch.let_go());
        assert_eq!(watch.go_on(page(1)), Err(ENOENT));
        assert_eq!(watch.go_on(0), Err(EINVAL));
        assert_eq!(watch.hold_next(page(1)), Ok(()));
        assert!(!watch.let_go());
        Ok(())
    }

    /// Each range of a few pages, against each that is unmapped.
    #[test]
    fn every_overlap_is_seen() -> Result {
        const PAGES: usize = 4;
        let all = || (0..PAGES).flat_map(|first| (first..PAGES).map(move |last| (first, last)));
        for (first, last) in all() {
            for (from, to) in all() {
                let start = mmap_anon(PAGES * PAGE_SIZE)?;
                let own = PageRange::new(start + first * PAGE_SIZE, last - first + 1)?;
                let watch = watch(own.start(), own.pages())?;
                let seq = watch.read_begin(Span::of(own))?;
                munmap(start + from * PAGE_SIZE, (to - from + 1) * PAGE_SIZE)?;
                let meets = from <= last && first <= to;
                assert_eq!(state(&watch, seq), (usize::from(meets), meets));
                drop(watch);
                munmap(start, PAGES * PAGE_SIZE)?;
            }
        }
        Ok(())
    }

    #[test]
    fn reader_of_other_pages_is_not_disturbed() -> Result {
        let start = mmap_anon(4 * PAGE_SIZE)?;
        let watch = watch(start, 4)?;
        let low = Span::of(PageRange::new(start, 2)?);
        let high = Span::of(PageRange::new(start + 2 * PAGE_SIZE, 2)?);
        let (one, other) = (watch.read_begin(low)?, watch.read_begin(high)?);
        munmap(start, PAGE_SIZE)?;
        assert_eq!(
            (state(&watch, one), state(&watch, other)),
            ((1, true), (1, false))
        );
        // A reader of the pages that have changed sets the sequence, which all readers share.
        let one = watch.read_begin(low)?;
        assert_eq!(
            (state(&watch, one), state(&watch, other)),
            ((1, false), (1, true))
        );
        Ok(())
    }

    #[test]
    fn sequence_of_another_notifier_is_stale() -> Result {
        let start = mmap_anon(2 * PAGE_SIZE)?;
        let (one, other) = (watch(start, 1)?, watch(start, 1)?);
        let page = Span::of(PageRange::new(start, 1)?);
        assert_eq!(state(&one, one.read_begin(page)?), (0, false));
        assert_eq!(state(&one, other.read_begin(page)?), (0, true));
        Ok(())
    }
}
