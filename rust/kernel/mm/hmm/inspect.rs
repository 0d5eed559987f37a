// SPDX-License-Identifier: GPL-2.0

//! Looking at pages of any kind without touching them.
//!
//! C headers: [`include/linux/mm_types.h`](srctree/include/linux/mm_types.h),
//! [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    mirror::HmmMirror,
    snapshot::{
        MapSize,
        Place,
        Seen,
        SNAPSHOT_PAGES, //
    },
};
use crate::{
    bindings,
    mm::{
        page::{
            struct_page,
            view::{
                PageBits,
                PageView, //
            },
        },
        region::owner::PgmapOwner,
        sync::task::check_signals,
        user::{
            mmap_lock::MmapLock,
            range::PageRange, //
        },
        PAGE_SHIFT, //
    },
};
use core::{
    cell::Cell,
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Page frames that there can be: their addresses have 64 bits.
pub(crate) const MAX_PFNS: usize = 1 << (usize::BITS as usize - PAGE_SHIFT);

/// Number of reads of a page that is being allocated or split. While that lasts, the page may not name its pagemap,
/// because the pointer to the pagemap shares its place with the pointer to the head, and the second page of a
/// folio may hold none of the folio's fields any more.
const TRIES: usize = 20;

/// Time between two of them, in microseconds.
const PAUSE: i64 = 50;

/// Page frames that [`inspect_pfns`] looks at with one reference on their pagemap.
const BATCH: usize = 512;

/// The owner of a page's pagemap, relative to the caller.
///
/// # Examples
///
/// ```
/// use kernel::mm::hmm::inspect::Ownership;
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let (device, other) = (EmulatedDevice::new()?, EmulatedDevice::new()?);
/// # let range = anon_range(1)?;
/// # device.migrate(range)?;
///
/// // Two devices look at the same page, which is on the first one.
/// for (asking, ownership) in [(&device, Ownership::Local), (&other, Ownership::Remote)] {
///     let mut found = [None];
///     let mirror = asking.mirror()?;
///     mirror.inspect(range, &mut found, |_, facts| facts.map(|facts| facts.ownership))?;
///     assert!(found == [Some(ownership)] || asking.memory().used() == 0);
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// There is none: system memory, or a pagemap without an owner, such as that of device-dax.
    Nobody,
    /// The calling device.
    Local,
    /// Another owner.
    Remote,
}

/// The result of one look at a page. It is out of date at once unless something keeps the page.
///
/// # Examples
///
/// ```
/// use kernel::mm::{hmm::inspect::PageFacts, region::memory_type::MemoryType};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let mirror = device.mirror()?;
///
/// device.migrate(range)?;
/// let mut found = [None];
/// mirror.inspect(range, &mut found, |_, facts| facts)?;
/// let facts: PageFacts = found[0].ok_or(ENOENT)?;
/// assert_eq!(facts.memory_type, MemoryType::PRIVATE);
/// // One page table entry maps the page, and holds its only reference.
/// assert_eq!((facts.mapcount, facts.refs, facts.pins), (1, 1, 0));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageFacts {
    /// Page frame number.
    pub(crate) pfn: usize,
    /// References on the folio.
    pub(crate) refs: i32,
    /// Page table entries that map the folio.
    pub(crate) mapcount: i32,
    /// `FOLL_PIN` pins of the folio; an estimate where it is small.
    pub(crate) pins: i32,
    /// Order of the folio.
    pub(crate) order: u32,
    /// Number of the page in the folio.
    pub(crate) index: usize,
    /// `enum memory_type` of the pagemap, 0 for system memory.
    pub(crate) memory_type: u32,
    /// The owner of the page's pagemap.
    pub(crate) ownership: Ownership,
    /// Those of the first page of the folio.
    pub(crate) bits: PageBits,
    /// `PG_anon_exclusive` of the page itself.
    pub(crate) anon_exclusive: bool,
    /// The page is the zero page, small or huge, that reads of untouched memory see.
    pub(crate) zero: bool,
}

/// Pins that the references of a small folio may stand for: a pin takes
/// `GUP_PIN_COUNTING_BIAS` references.
fn pins_of(refs: i32) -> i32 {
    refs.max(0) / bindings::GUP_PIN_COUNTING_BIAS as i32
}

/// The pagemap of a page, as far as a [`PageFacts`] needs it.
#[derive(Clone, Copy)]
struct Origin {
    memory_type: u32,
    ownership: Ownership,
}

impl Origin {
    /// Of the pagemap with this type and owner, to `asking`; 0 and NULL where there is none.
    fn new(memory_type: u32, owner: *mut c_void, asking: &PgmapOwner) -> Self {
        let ownership = if owner.is_null() {
            Ownership::Nobody
        } else if owner == asking.as_ptr() {
            Ownership::Local
        } else {
            Ownership::Remote
        };
        Self {
            memory_type,
            ownership,
        }
    }
}

/// Whether a large folio can have this order and these counts at the same time.
fn can_be(order: u32, refs: i32, mapcount: i32, pins: i32) -> bool {
    (1..=bindings::PUD_ORDER).contains(&order) && mapcount >= 0 && (0..=refs.max(0)).contains(&pins)
}

impl PageFacts {
    /// Of `page`, whose folio begins with `head`.
    fn read(page: PageView<'_>, head: PageView<'_>, origin: Origin) -> Self {
        let refs = head.refs();
        // A free page may look like the head of the folio that it was while the next page, which
        // the rest of that is in, is in use again.
        // No folio is larger than a PUD. An order above that is read from a folio that is being split.
        let large = head.large().filter(|large| {
            large.order <= bindings::PUD_ORDER
                && (refs != 0 || can_be(large.order, refs, large.mapcount, large.pins))
        });
        let order = large.map_or(0, |large| large.order);
        let index = page.pfn().wrapping_sub(head.pfn());
        if index.checked_shr(order) != Some(0) {
            // The page was a tail until it was freed, and the folio that begins with `head` now ends before the
            // page, which is a page by itself.
            return Self::read(page, page, origin);
        }
        let (mapcount, pins) = match large {
            Some(large) => (large.mapcount, large.pins),
            None => (head.own_mapcount(), pins_of(refs)),
        };
        let bits = head.bits();
        // On pages of files the flag is another one.
        let has_flag = bits.is_anon() || origin.memory_type != 0;
        Self {
            pfn: page.pfn(),
            refs,
            mapcount,
            pins,
            order,
            index,
            memory_type: origin.memory_type,
            ownership: origin.ownership,
            bits,
            anon_exclusive: has_flag && page.bits().is_anon_exclusive(),
            zero: false,
        }
    }

    /// Whether it is of one moment, as far as it shows.
    fn is_consistent(&self) -> bool {
        self.refs == 0
            || !self.bits.is_head() && self.order == 0
            || can_be(self.order, self.refs, self.mapcount, self.pins)
    }

    /// Of a `page` in use, whose folio and pagemap stay what they are.
    fn of_used(page: PageView<'_>, asking: &PgmapOwner) -> Self {
        let (memory_type, owner) = page.type_and_owner();
        let origin = Origin::new(memory_type, owner, asking);
        Self::read(page, page.head(), origin)
    }
}

/// A mark for each page of a part of a range.
struct Marked([Cell<u64>; SNAPSHOT_PAGES / 64]);

impl Marked {
    fn place(&self, address: usize) -> (&Cell<u64>, u64) {
        let page = (address >> PAGE_SHIFT) % SNAPSHOT_PAGES;
        (&self.0[page / 64], 1 << (page % 64))
    }

    fn set(&self, address: usize, is_marked: bool) {
        let (word, bit) = self.place(address);
        let others = word.get() & !bit;
        word.set(if is_marked { others | bit } else { others });
    }

    fn get(&self, address: usize) -> bool {
        let (word, bit) = self.place(address);
        word.get() & bit != 0
    }
}

impl HmmMirror {
    /// Looks at the pages of `range`, as [`HmmMirror::snapshot`], and stores the result of `f` for each page in `out`,
    /// which has an element for each. `f` gets the facts of the page, too, and is called without a lock, once for
    /// each page. May sleep, and faults nothing in.
    ///
    /// # Errors
    ///
    /// As [`HmmMirror::snapshot`].
    pub(crate) fn inspect<T>(
        &self,
        range: PageRange,
        out: &mut [T],
        f: impl Fn(Seen, Option<PageFacts>) -> T,
    ) -> Result {
        let no_mark = |_: &MmapLock<'_>, _| false;
        self.inspect_marked(range, out, no_mark, |seen, facts, _| f(seen, facts))
    }

    /// As [`HmmMirror::inspect`], but that `f` also gets the result of `mark` for the address of the page. `mark` is
    /// called with the mmap lock held, and may be called again for an address that has changed since.
    pub(in crate::mm) fn inspect_marked<T>(
        &self,
        range: PageRange,
        out: &mut [T],
        mark: impl Fn(&MmapLock<'_>, usize) -> bool,
        f: impl Fn(Seen, Option<PageFacts>, bool) -> T,
    ) -> Result {
        if out.len() != range.pages() {
            return Err(EINVAL);
        }
        let most = range.pages().min(SNAPSHOT_PAGES);
        let mut room = KVVec::from_elem((Seen::Absent, None, false), most, GFP_KERNEL)?;
        let marked = Marked([const { Cell::new(0) }; SNAPSHOT_PAGES / 64]);
        let locked = |lock: &MmapLock<'_>, part: PageRange| {
            for address in part.addresses() {
                marked.set(address, mark(lock, address));
            }
        };
        let look = |seen: Seen, place: Place<'_>| {
            let facts = place.page().map(|page| PageFacts {
                zero: page.is_zero() || seen.size() == Some(MapSize::Pmd) && page.is_huge_zero(),
                // The page is mapped, so in use, until the closure returns.
                ..PageFacts::of_used(page.view(), self.owner())
            });
            (seen, facts, marked.get(place.address()))
        };
        let mut slots = out.iter_mut();
        self.look(range, &mut room, locked, look, |found| {
            // In this order no slot is taken when a part ends.
            for (&(seen, facts, is_marked), slot) in found.iter().zip(slots.by_ref()) {
                *slot = f(seen, facts, is_marked);
            }
            Ok(())
        })
    }
}

/// A registered pagemap of any owner.
///
/// # Invariants
///
/// Owns a reference of the `dev_pagemap`, so that it stays registered.
pub(in crate::mm) struct AnyPagemap(NonNull<bindings::dev_pagemap>);

impl AnyPagemap {
    /// That of page frame `pfn`, which is below [`MAX_PFNS`].
    pub(in crate::mm) fn of_pfn(pfn: usize) -> Option<Self> {
        // SAFETY: The function takes any number, and says NULL where there is no pagemap.
        let pgmap = unsafe { bindings::get_dev_pagemap(pfn) };
        // INVARIANT: The reference is new.
        NonNull::new(pgmap).map(Self)
    }

    pub(in crate::mm) fn as_ptr(&self) -> *mut bindings::dev_pagemap {
        self.0.as_ptr()
    }

    /// The pagemap's part of the facts of its pages.
    fn origin(&self, asking: &PgmapOwner) -> Origin {
        // SAFETY: Registered by the type invariants of `AnyPagemap`.
        let memory_type = unsafe { (*self.as_ptr()).type_ };
        // SAFETY: The pagemap is registered by the type invariants of `AnyPagemap`; its owner does not
        // change.
        let owner = unsafe { (*self.as_ptr()).owner };
        Origin::new(memory_type, owner, asking)
    }

    /// The range that page frame `pfn` is in, and the number of the range.
    pub(in crate::mm) fn range_of(&self, pfn: usize) -> Option<(usize, Range<usize>)> {
        // SAFETY: The pagemap is registered by the type invariants of `AnyPagemap`.
        let count = usize::try_from(unsafe { (*self.as_ptr()).nr_range }).ok()?;
        // The union of one range and of an array of them begins with the first one in both cases.
        // SAFETY: The pagemap is registered by the type invariants of `AnyPagemap`.
        let first: *const bindings::range =
            unsafe { (&raw const (*self.as_ptr()).__bindgen_anon_1).cast() };
        (0..count).find_map(|i| {
            // SAFETY: A registered pagemap has `nr_range` ranges.
            let range = unsafe { &*first.add(i) };
            // CAST: `usize` has 64 bits. The end is inclusive.
            let pfns = range.start as usize >> PAGE_SHIFT..(range.end as usize >> PAGE_SHIFT) + 1;
            pfns.contains(&pfn).then_some((i, pfns))
        })
    }

    /// First page frames of the first range that hold struct pages, and have none: `vmem_altmap_offset()`.
    fn altmap_pages(&self) -> usize {
        // SAFETY: The pagemap is registered by the type invariants of `AnyPagemap`.
        if unsafe { (*self.as_ptr()).flags } & bindings::PGMAP_ALTMAP_VALID == 0 {
            return 0;
        }
        // SAFETY: The pagemap is registered by the type invariants of `AnyPagemap`, and has an `altmap`.
        let altmap = unsafe { &(*self.as_ptr()).altmap };
        altmap.reserve + altmap.free
    }

    /// Whether the pagemap has a struct page for `pfn`. It has none for page frames that hold struct pages, nor before
    /// the memory map is complete. As `pgmap_pfn_valid()`, which is not exported.
    fn has_page(&self, pfn: usize) -> bool {
        let Some((number, range)) = self.range_of(pfn) else {
            return false;
        };
        let first = range.start + if number == 0 { self.altmap_pages() } else { 0 };
        // SAFETY: The function takes a number.
        pfn >= first && unsafe { bindings::zdm_pfn_valid(pfn) }
    }

    /// The facts about the page of `pfn`, `None` where there is no page or not yet. May sleep.
    pub(in crate::mm) fn facts(&self, pfn: usize, asking: &PgmapOwner) -> Option<PageFacts> {
        let mut facts = None;
        for attempt in 0..TRIES {
            if !self.has_page(pfn) {
                return None;
            }
            if attempt > 0 {
                fsleep(Delta::from_micros(PAUSE));
            }
            facts = self
                .page(pfn)
                .map(|page| PageFacts::read(page, page.head(), self.origin(asking)));
            if facts.is_some_and(|facts| facts.is_consistent()) {
                break;
            }
        }
        facts
    }

    /// The struct page of `pfn`, if it says now that it is one of this pagemap.
    pub(in crate::mm) fn page(&self, pfn: usize) -> Option<PageView<'_>> {
        if !self.has_page(pfn) {
            return None;
        }
        // SAFETY: `zdm_pfn_valid()` says that the page frame has a `struct page`.
        let page = NonNull::new(unsafe { bindings::zdm_pfn_to_page(pfn) })?;
        // SAFETY: There is a struct page. It is not initialised yet where the pagemap is being
        // registered, so nothing that it says is relied on before it has been compared.
        let first = unsafe { struct_page::head(page.as_ptr()) };
        // SAFETY: This is arithmetic only.
        let first_pfn = unsafe { bindings::zdm_page_to_pfn(first) };
        if first_pfn > pfn || !self.has_page(first_pfn) {
            return None;
        }
        // SAFETY: Both have struct pages.
        let pgmap = unsafe { struct_page::any_pgmap(page.as_ptr()) };
        // SAFETY: The page says itself that it is one of this pagemap, so it is initialised; the
        // pagemap stays registered while it is borrowed.
        (pgmap == self.as_ptr()).then(|| unsafe { PageView::of_pagemap(page, self.0) })
    }
}

impl Drop for AnyPagemap {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the type invariants of `AnyPagemap`.
        unsafe { bindings::zdm_pgmap_put(self.0.as_ptr()) };
    }
}

/// Looks at the page frames from `first` on, as many as `out` has elements, and stores the result
/// of `f` for each; `f` gets `None` where there is no page of a pagemap. Elements for frames from [`MAX_PFNS`]
/// on stay as they are. `owner` is the caller's. May sleep. While `f` runs, unregistering the pagemap waits.
///
/// # Errors
///
/// `EINTR` when the task was killed.
pub(crate) fn inspect_pfns<T>(
    first: usize,
    out: &mut [T],
    owner: &PgmapOwner,
    f: impl Fn(Option<PageFacts>) -> T,
) -> Result {
    let mut known: Option<AnyPagemap> = None;
    for (n, (pfn, slot)) in (first..MAX_PFNS).zip(out.iter_mut()).enumerate() {
        if n % BATCH == 0 {
            // The reference on the pagemap is dropped first.
            known = None;
            check_signals()?;
        }
        if !known.as_ref().is_some_and(|pgmap| pgmap.has_page(pfn)) {
            known = AnyPagemap::of_pfn(pfn);
        }
        let facts = known.as_ref().and_then(|pgmap| pgmap.facts(pfn, owner));
        *slot = f(facts);
    }
    Ok(())
}

#[kunit_tests(zdmirror_inspect)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::{
            mmap_anon,
            this_module, //
        },
        PAGE_SIZE, //
    };
    use kernel::uaccess::{
        UserPtr,
        UserSlice, //
    };

    fn user(address: usize) -> UserSlice {
        UserSlice::new(UserPtr::from_addr(address), 1)
    }

    #[test]
    fn pins_of_a_small_folio() {
        for (refs, pins) in [
            (i32::MIN, 0),
            (-1, 0),
            (0, 0),
            (1, 0),
            (1023, 0),
            (1024, 1),
            (1025, 1),
            (2047, 1),
            (2048, 2),
            (i32::MAX, (1 << 21) - 1),
        ] {
            assert_eq!(pins_of(refs), pins);
        }
    }

    #[test]
    fn what_can_be_true() {
        let large = PageFacts {
            pfn: 512,
            refs: 3,
            mapcount: 2,
            pins: 1,
            order: 9,
            index: 0,
            memory_type: 0,
            ownership: Ownership::Nobody,
            bits: PageBits::HEAD,
            anon_exclusive: false,
            zero: false,
        };
        assert!(large.is_consistent());
        for torn in [
            PageFacts { order: 0, ..large },
            PageFacts { order: 25, ..large },
            PageFacts { pins: 4, ..large },
            PageFacts { pins: -1, ..large },
            PageFacts {
                mapcount: -1,
                ..large
            },
        ] {
            assert!(!torn.is_consistent());
            // Nothing is there to be torn without a folio in use.
            for whole in [
                PageFacts {
                    bits: PageBits::default(),
                    order: 0,
                    ..torn
                },
                PageFacts { refs: 0, ..torn },
            ] {
                assert!(whole.is_consistent());
            }
        }
    }

    #[test]
    fn anonymous_memory_by_address() -> Result {
        const PAGES: usize = 3;
        let start = mmap_anon(PAGES * PAGE_SIZE)?;
        user(start).reader().read_slice(&mut [0])?;
        user(start + PAGE_SIZE).writer().write_slice(&[1])?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mirror = HmmMirror::new(mm, PgmapOwner::new(this_module())?)?;
        let mut out = [(Seen::Error, None); PAGES];
        let range = PageRange::new(start, PAGES)?;
        mirror.inspect(range, &mut out, |seen, facts| (seen, facts))?;
        let [(_, zero), (_, page), (seen, none)] = out;
        let (zero, page) = (zero.ok_or(EINVAL)?, page.ok_or(EINVAL)?);
        assert!(zero.zero);
        assert_eq!((seen, none), (Seen::Absent, None));
        assert!(!page.zero);
        assert!(page.bits.is_anon());
        assert!(page.bits.has_mapping());
        assert!(page.anon_exclusive);
        // It may be on its way to an LRU list, which takes a reference.
        assert!(page.refs >= page.mapcount);
        assert!(page.mapcount >= 1);
        assert_eq!(page.pins, 0);
        assert_eq!((page.memory_type, page.ownership), (0, Ownership::Nobody));
        assert_eq!(page.index >> page.order, 0);
        // By number only memory of devices is looked at.
        let mut out = [Some(0)];
        inspect_pfns(page.pfn, &mut out, mirror.owner(), |facts| facts.map(|_| 1))?;
        assert_eq!(out, [None]);
        Ok(())
    }

    #[test]
    fn each_page_of_several_parts_is_described() -> Result {
        const PAGES: usize = 2 * SNAPSHOT_PAGES + 2;
        let start = mmap_anon(PAGES * PAGE_SIZE)?;
        let last = PAGES - 1;
        user(start + last * PAGE_SIZE).writer().write_slice(&[1])?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mirror = HmmMirror::new(mm, PgmapOwner::new(this_module())?)?;
        let mut out = KVVec::from_elem(None, PAGES, GFP_KERNEL)?;
        let range = PageRange::new(start, PAGES)?;
        mirror.inspect(range, &mut out, |_, facts| Some(facts.is_some()))?;
        assert!(out[..last].iter().all(|&there| there == Some(false)));
        assert_eq!(out[last], Some(true));
        Ok(())
    }

    #[test]
    fn frames_beyond_the_last_are_none() -> Result {
        let mut out = [0; 3];
        let owner = PgmapOwner::new(this_module())?;
        inspect_pfns(MAX_PFNS - 2, &mut out, &owner, |facts| {
            1 + i32::from(facts.is_some())
        })?;
        assert_eq!(out, [1, 1, 0]);
        Ok(())
    }
}
