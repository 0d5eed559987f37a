// SPDX-License-Identifier: GPL-2.0

//! The mappings of an address space at one moment, read without touching them.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use super::{
    mapped::{
        HmmEntry,
        Holder,
        MappedPage,
        Memory,
        MemoryKinds, //
    },
    mirror::{
        range_fault,
        HmmMirror,
        BATCH, //
    },
};
use crate::{
    bindings,
    mm::{
        migrate::pfn_buffer::MAX_PAGES,
        sync::task::{
            check_signals,
            Deadline, //
        },
        user::{
            changes::Span,
            mmap_lock::MmapLock,
            range::PageRange, //
        },
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
};
use core::marker::PhantomData;
use kernel::{
    mm::MmWithUser,
    prelude::*, //
};

/// Most pages that a snapshot shows as they were at one moment: one page of page table entries maps so many.
pub(crate) const SNAPSHOT_PAGES: usize = MAX_PAGES;

/// Size of the page table entry that maps a page.
///
/// # Examples
///
/// ```
/// use kernel::mm::hmm::snapshot::{MapSize, Seen};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
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
    /// A PTE, or any other size than those below.
    Base,
    /// A PMD.
    Pmd,
    /// A PUD.
    Pud,
}

/// The state of an address in a snapshot.
///
/// # Examples
///
/// ```
/// use kernel::mm::hmm::snapshot::Seen;
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
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

    /// A bit that no page has, for an error.
    const ERROR: usize = 0x80;
    /// The bit of a page.
    const PAGE: usize = 0x01;
    /// The bit of a page that may be written.
    const WRITE: usize = 0x02;
    /// The position of the size, which has two bits, and of the kind of memory, which has three.
    const SIZE: u32 = 2;
    const MEMORY: u32 = 4;

    /// All of it, in 8 bits.
    #[inline]
    fn to_bits(self) -> usize {
        let Self::Page {
            memory,
            write,
            size,
        } = self
        else {
            return if self == Self::Error { Self::ERROR } else { 0 };
        };
        let size = match size {
            MapSize::Base => 0,
            MapSize::Pmd => 1,
            MapSize::Pud => 2,
        };
        let memory = match memory {
            Memory::System => 0,
            Memory::Zero => 1,
            Memory::Private { local } => 2 | usize::from(local),
            Memory::Coherent { local } => 4 | usize::from(local),
            Memory::Generic { local } => 6 | usize::from(local),
        };
        let write = if write { Self::WRITE } else { 0 };
        Self::PAGE | write | size << Self::SIZE | memory << Self::MEMORY
    }

    /// The inverse of [`Seen::to_bits`].
    #[inline]
    fn from_bits(bits: usize) -> Self {
        if bits & Self::PAGE == 0 {
            return if bits & Self::ERROR != 0 {
                Self::Error
            } else {
                Self::Absent
            };
        }
        let memory = bits >> Self::MEMORY;
        let local = memory & 1 != 0;
        Self::Page {
            memory: match memory & 7 {
                0 => Memory::System,
                1 => Memory::Zero,
                2 | 3 => Memory::Private { local },
                4 | 5 => Memory::Coherent { local },
                _ => Memory::Generic { local },
            },
            write: bits & Self::WRITE != 0,
            size: match bits >> Self::SIZE & 3 {
                0 => MapSize::Base,
                1 => MapSize::Pmd,
                _ => MapSize::Pud,
            },
        }
    }
}

/// Describes consecutive addresses that look the same: their common look, and their number. It replaces the entry
/// of the first of them, and is valid after the lock of the table is released.
#[derive(Clone, Copy)]
struct Summary(usize);

impl Summary {
    /// The bits below hold the number.
    const SEEN: u32 = 16;

    #[inline]
    fn new(seen: Seen, pages: usize) -> Self {
        Self(seen.to_bits() << Self::SEEN | pages)
    }

    #[inline]
    fn seen(self) -> Seen {
        Seen::from_bits(self.0 >> Self::SEEN)
    }

    #[inline]
    fn pages(self) -> usize {
        self.0 & ((1 << Self::SEEN) - 1)
    }
}

const _: () = assert!(SNAPSHOT_PAGES < 1 << Summary::SEEN);

/// The time for the tries of a snapshot. It begins to run out with the first one that was in vain.
struct Tries(Option<Deadline>);

impl Tries {
    /// Before one more try. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` after a second, `EINTR` for a task that was killed.
    #[cold]
    fn again(&mut self) -> Result {
        check_signals()?;
        let second = || Deadline::after_ms(bindings::HMM_RANGE_DEFAULT_TIMEOUT);
        if self.0.get_or_insert_with(second).passed() {
            return Err(EBUSY);
        }
        Ok(())
    }
}

/// An address that a snapshot looks at, to be asked for the page while it is mapped.
///
/// # Invariants
///
/// For `'a` the lock of the table is held under which the sequence was checked that `entry` was
/// obtained for `address` in. Exclusive access that another task gets by the same mirror is no change of the
/// sequence, and leaves the page mapped.
pub(super) struct Place<'a> {
    entry: HmmEntry,
    address: usize,
    _lock: PhantomData<&'a ()>,
}

impl<'a> Place<'a> {
    /// The address.
    pub(super) fn address(&self) -> usize {
        self.address
    }

    /// The page, `None` when there is none or it cannot be accessed.
    pub(super) fn page(&self) -> Option<MappedPage<'a>> {
        // SAFETY: The entry was obtained for the address, and the lock is held, by the type invariants of
        // `Place`. Snapshots are for the owner of `DevPagemap`s.
        unsafe { MappedPage::new(self.entry, self.address) }
    }

    /// Where the memory of the page belongs, if there is one.
    #[inline]
    fn holder(&self, kinds: &MemoryKinds<'_>) -> Holder {
        if !self.entry.is_valid() {
            return Holder::NONE;
        }
        // SAFETY: The entry is valid. Its page is mapped while the lock is held, which it is by the type
        // invariants of `Place`.
        unsafe { kinds.holder(self.entry) }
    }

    /// The look of the address, whose page belongs to `holder`.
    fn seen(&self, kinds: &MemoryKinds<'_>, holder: Holder) -> Seen {
        if !self.entry.is_valid() {
            return if self.entry.is_error() {
                Seen::Error
            } else {
                Seen::Absent
            };
        }
        Seen::Page {
            // SAFETY: The page is mapped while the lock is held, which it is by the type invariants of
            // `Place`, so that its pagemap stays.
            memory: unsafe { kinds.of(holder) },
            write: self.entry.is_writable(),
            size: match self.entry.order() {
                bindings::PMD_ORDER => MapSize::Pmd,
                bindings::PUD_ORDER => MapSize::Pud,
                _ => MapSize::Base,
            },
        }
    }
}

/// Addresses in a row that look the same.
///
/// # Invariants
///
/// As those of [`Place`], for `pfns` and the addresses from `address` on.
struct Run<'a> {
    pfns: &'a [usize],
    address: usize,
}

impl<'a> Run<'a> {
    /// Each of them.
    fn places(&self) -> impl Iterator<Item = Place<'a>> {
        let addresses = (self.address..).step_by(PAGE_SIZE);
        // INVARIANT: Those of a `Run` are the same.
        self.pfns
            .iter()
            .zip(addresses)
            .map(|(&pfn, address)| Place {
                entry: HmmEntry::new(pfn),
                address,
                _lock: PhantomData,
            })
    }
}

impl HmmMirror {
    /// Looks at the pages of `range`, and stores the result of `f` for each page in `out`, which has an element for
    /// each. May sleep, and faults nothing in. `f` is called without a lock, once for consecutive pages that look
    /// the same.
    ///
    /// Wraps `hmm_range_fault()`.
    ///
    /// # Errors
    ///
    /// As [`HmmMirror::snapshot_parts`], and `EINVAL` when `out` is not of the size of `range`.
    pub(crate) fn snapshot<T: Copy>(
        &self,
        range: PageRange,
        out: &mut [T],
        f: impl Fn(Seen) -> T,
    ) -> Result {
        if out.len() != range.pages() {
            return Err(EINVAL);
        }
        self.snapshot_parts(range, out, f, |_| Ok(()))
    }

    /// Looks at the pages of `range` in parts that are as large as `room`, and calls `part` with the results of `f`
    /// for the pages of each part, in their order. May sleep, and faults nothing in. `f` is called as by
    /// [`HmmMirror::snapshot`], and `part` without a lock, too.
    ///
    /// The pages of a part are as they were at one moment, at most [`SNAPSHOT_PAGES`] of them. Only those that
    /// another task gets exclusive access to meanwhile, by the same mirror, may be as they were at another one.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
    /// # let device = EmulatedDevice::new()?;
    /// # let range = anon_range(5)?;
    /// # let mirror = device.mirror()?;
    /// # touch(range.first(3))?;
    /// // Room for two pages at a time.
    /// let (mut room, mut there, mut parts) = ([false; 2], 0, 0);
    /// mirror.snapshot_parts(range, &mut room, |seen| seen.size().is_some(), |part| {
    ///     there += part.iter().filter(|&&there| there).count();
    ///     parts += 1;
    ///     Ok(())
    /// })?;
    /// assert_eq!((there, parts), (3, 3));
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `EINVAL` when the process is gone or `room` empty, `EBUSY` when invalidations keep coming for a
    /// second, `EDEADLK` for a task that has a migration, `EINTR` for a task that was killed, `ENOMEM`, and those of
    /// `part`.
    pub(crate) fn snapshot_parts<T: Copy>(
        &self,
        range: PageRange,
        room: &mut [T],
        f: impl Fn(Seen) -> T,
        part: impl FnMut(&[T]) -> Result,
    ) -> Result {
        let each = |out: &mut [T], seen| out.fill(f(seen));
        self.each_part(range, room, |_, _| {}, |_, _, _| {}, each, part)
    }

    /// As [`HmmMirror::snapshot_parts`], but that `f` also gets the place, for the page. It is mapped until
    /// `f` returns. `f` is called with the lock of the table held, which invalidations wait for: it must
    /// neither sleep nor be a driver's. `locked` is called before, for the pages of a part, with the mmap lock held,
    /// and again for the same pages when they have changed.
    pub(super) fn look<T>(
        &self,
        range: PageRange,
        room: &mut [T],
        locked: impl FnMut(&MmapLock<'_>, PageRange),
        f: impl Fn(Seen, Place<'_>) -> T,
        part: impl FnMut(&[T]) -> Result,
    ) -> Result {
        let look = |out: &mut [T], seen, run: &Run<'_>| {
            for (slot, place) in out.iter_mut().zip(run.places()) {
                *slot = f(seen, place);
            }
        };
        self.each_part(range, room, locked, look, |_, _| {}, part)
    }

    /// Calls `locked`, with the mmap lock held, `look`, with the lock of the table held, and then `each`, without
    /// either, for the pages of `range`, the last two for those in a row together that look the same, with an
    /// element of `room` for each. Calls `part` with the elements whenever they are used up, and at the end.
    #[inline]
    fn each_part<T>(
        &self,
        range: PageRange,
        room: &mut [T],
        mut locked: impl FnMut(&MmapLock<'_>, PageRange),
        mut look: impl FnMut(&mut [T], Seen, &Run<'_>),
        mut each: impl FnMut(&mut [T], Seen),
        mut part: impl FnMut(&[T]) -> Result,
    ) -> Result {
        let most = room.len().min(range.pages());
        if most == 0 {
            return Err(EINVAL);
        }
        let mut few = [0usize; BATCH];
        let mut many: KVVec<usize>;
        let pfns = if most <= BATCH {
            &mut few[..most]
        } else {
            many = KVVec::from_elem(0usize, most.min(SNAPSHOT_PAGES), GFP_KERNEL)?;
            &mut many[..]
        };
        let mm = self.mm().mmget_not_zero().ok_or(EINVAL)?;
        let kinds = MemoryKinds::new(self.owner());
        let mut filled = 0;
        let mut left = Some(range);
        while let Some(rest) = left {
            let batch = rest.first(pfns.len().min(most - filled));
            let pages = batch.pages();
            let out = &mut room[filled..filled + pages];
            let mut at = 0;
            self.each_run(&mm, batch, pfns, &kinds, &mut locked, |seen, run| {
                let first = at;
                at += run.pfns.len();
                look(&mut out[first..at], seen, run);
            })?;
            let mut left_out = out;
            while !left_out.is_empty() {
                let run = Summary(pfns[pages - left_out.len()]);
                let (now, later) = left_out.split_at_mut(run.pages());
                left_out = later;
                each(now, run.seen());
            }
            filled += pages;
            left = rest.skip(pages);
            if filled == most || left.is_none() {
                part(&room[..filled])?;
                filled = 0;
            }
            if left.is_some() {
                check_signals()?;
            }
        }
        Ok(())
    }

    /// Calls `locked`, with the mmap lock held, for `range`, and then `look`, with the lock of the table held, for each
    /// run of pages of `range` that look the same, in their order, with what they look like. `pfns` has room for the range. In the place of the first page
    /// of each run it holds the [`Summary`] afterwards.
    #[inline]
    fn each_run(
        &self,
        mm: &MmWithUser,
        range: PageRange,
        pfns: &mut [usize],
        kinds: &MemoryKinds<'_>,
        locked: &mut impl FnMut(&MmapLock<'_>, PageRange),
        mut look: impl FnMut(Seen, &Run<'_>),
    ) -> Result {
        let pfns = pfns.get_mut(..range.pages()).ok_or(EINVAL)?;
        let mut tries = Tries(None);
        loop {
            let seq = self.notifier.read_begin(Span::of(range))?;
            let mut hmm_range = bindings::hmm_range {
                notifier: self.notifier.as_raw(),
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
            match unsafe { range_fault(&mut hmm_range, mm, false, |lock| locked(lock, range)) } {
                Err(err) if err == EBUSY => {
                    tries.again()?;
                    continue;
                }
                other => other?,
            };
            let Some(_lock) = self.notifier.lock_if_fresh(seq) else {
                tries.again()?;
                continue;
            };
            let (mut pfns, mut address) = (pfns, range.start());
            while let Some(&first) = pfns.first() {
                // INVARIANT: The lock is held until the end of the loop and the sequence checked.
                let place = |raw| Place {
                    entry: HmmEntry::new(raw),
                    address,
                    _lock: PhantomData,
                };
                let entry = HmmEntry::new(first);
                let holder = place(first).holder(kinds);
                let pages = if entry.order() > 0 {
                    // All that one entry of a page table maps looks the same.
                    entry.pages_from(address).min(pfns.len())
                } else {
                    let is_same = |raw: usize| {
                        HmmEntry::new(raw).is_alike(entry) && place(raw).holder(kinds) == holder
                    };
                    let other = pfns.iter().position(|&raw| !is_same(raw));
                    other.unwrap_or(pfns.len()).max(1)
                };
                let seen = place(first).seen(kinds, holder);
                let (run, rest) = pfns.split_at_mut(pages);
                // INVARIANT: The lock is held, under which the sequence was checked that `pfns` were obtained in.
                look(seen, &Run { pfns: run, address });
                run[0] = Summary::new(seen, pages).0;
                (pfns, address) = (rest, address + (pages << PAGE_SHIFT));
            }
            return Ok(());
        }
    }
}

#[kunit_tests(zdmirror_snapshot_bits)]
mod tests {
    use super::*;

    #[test]
    fn bits_tell_all() {
        let mut seen = KVec::new();
        for one in [Seen::Error, Seen::Absent] {
            let _ = seen.push(one, GFP_KERNEL);
        }
        for memory in [
            Memory::System,
            Memory::Zero,
            Memory::Private { local: false },
            Memory::Private { local: true },
            Memory::Coherent { local: false },
            Memory::Coherent { local: true },
            Memory::Generic { local: false },
            Memory::Generic { local: true },
        ] {
            for size in [MapSize::Base, MapSize::Pmd, MapSize::Pud] {
                for write in [false, true] {
                    let page = Seen::Page {
                        memory,
                        write,
                        size,
                    };
                    let _ = seen.push(page, GFP_KERNEL);
                }
            }
        }
        assert_eq!(seen.len(), 50);
        for one in seen {
            for pages in [1, SNAPSHOT_PAGES] {
                let summary = Summary::new(one, pages);
                assert_eq!((summary.seen(), summary.pages()), (one, pages));
            }
        }
    }
}
