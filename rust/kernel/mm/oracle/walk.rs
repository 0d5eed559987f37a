// SPDX-License-Identifier: GPL-2.0

//! Reads page tables, so that the oracle can compare them with the results of `hmm_range_fault()`,
//! `folio_mapcount()` and interval notifiers.
//!
//! C header: [`include/linux/leafops.h`](srctree/include/linux/leafops.h)

use crate::bindings;
use crate::mm::{
    hmm::{
        access::Grant,
        mapped::Memory,
        mirror::HmmMirror, //
    },
    page::{
        backing::{
            contents,
            is_cleanable, //
        },
        struct_page, //
    },
    region::owner::PgmapOwner,
    sync::task::check_signals,
    user::{
        changes::Span,
        mmap_lock::MmapLock,
        range::PageRange, //
    },
    PAGE_SHIFT, //
};
use kernel::{
    mm::{
        virt::{
            flags,
            vm_flags_t, //
        },
        MmWithUser, //
    },
    prelude::*, //
};

/// Entries of a device's page table that are compared before other tasks get the locks.
const BATCH: usize = 256;

/// Differences that are remembered until the locks are released.
const DIFFERENCES: usize = 8;

/// Pages of a [`Picture`], at most.
pub(crate) const PICTURE_PAGES: usize = 1 << 14;

/// An entry of the device's page table that the CPU's page table does not bear out.
///
/// # Examples
///
/// ```
/// use kernel::mm::{hmm::access::Access, oracle::walk::Untruth};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let mirror = device.mirror()?;
///
/// mirror.fault(range, Access::Read)?;
/// let compared = mirror.compare(|untruth: Untruth| {
///     pr_err!("page {:#x} is another one for the device\n", untruth.index);
/// })?;
/// assert_eq!(compared, 2);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Untruth {
    /// Number of the page in the address space.
    pub(crate) index: usize,
    /// Page frame that the device accesses.
    pub(crate) device_pfn: usize,
    /// Whether the device may write to it.
    pub(crate) device_write: bool,
    /// Page frame that the CPU accesses, or that holds the contents of the PRIVATE page that is mapped;
    /// `None` where the CPU has no access that the device could share.
    pub(crate) cpu_pfn: Option<usize>,
    /// Whether the CPU may write to it.
    pub(crate) cpu_write: bool,
    /// A change in progress that may explain the difference.
    pub(crate) passing: Passing,
}

/// A change in progress because of which the device's page table differs from the CPU's.
///
/// # Examples
///
/// ```
/// use kernel::mm::{hmm::access::Access, oracle::walk::Passing};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let mirror = device.mirror()?;
///
/// mirror.fault(range, Access::Read)?;
/// let mut missed = 0;
/// mirror.compare(|untruth| missed += usize::from(untruth.passing == Passing::Nothing))?;
/// assert_eq!(missed, 0);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passing {
    /// Nothing: a notifier was missed.
    Nothing,
    /// A task gets or ends exclusive access, in two steps.
    Exclusive,
    /// A migration has made the device map the page that it moved the contents to, and the CPU's entry
    /// still waits for that. If the device maps the page that contents move from, nothing explains that.
    Migration,
}

/// The entry that maps an address.
struct CpuEntry(bindings::zdm_entry);

impl CpuEntry {
    /// The entry for page number `index` of the address space whose mmap lock `lock` is.
    fn look_up(lock: &MmapLock<'_>, index: usize) -> Self {
        let mut entry = bindings::zdm_entry::default();
        // SAFETY: The mmap lock is held by the type invariants of `MmapLock`, so that no page table is freed
        // but by khugepaged, which the callee allows for. `entry` is valid for writes.
        unsafe { bindings::zdm_look_up(lock.mm().as_raw(), index << PAGE_SHIFT, &mut entry) };
        let is_large = entry.kind == bindings::ZDM_ENTRY_PRESENT && entry.order > 0;
        // SAFETY: The function takes a number.
        if is_large && unsafe { bindings::zdm_pfn_valid(entry.pfn) } {
            // SAFETY: `zdm_pfn_valid()` says that the page frame has a `struct page`.
            let page = unsafe { bindings::zdm_pfn_to_page(entry.pfn) };
            // The page may have been unmapped since: the mark is for a comparison, which looks again.
            // SAFETY: There is a `struct page`, and the head of a tail is another page of the same memory.
            entry.zero = unsafe { struct_page::is_huge_zero(page) };
        }
        Self(entry)
    }

    /// The page frame that the entry has for page number `index`.
    fn pfn(&self, index: usize) -> usize {
        self.0.pfn + (index & ((1 << self.0.order) - 1))
    }
}

impl HmmMirror {
    /// Compares each entry of the device's page table with the CPU's page table, and calls `f` for
    /// those that name another page or grant more. Returns how many were compared. May sleep. `f` is called
    /// without a lock.
    ///
    /// No sequence is needed: under the lock of the table an entry is true, as core mm must have it
    /// removed, which takes that lock, before the CPU's page table changes.
    ///
    /// # Errors
    ///
    /// `EINTR` on a fatal signal.
    pub(crate) fn compare(&self, mut f: impl FnMut(Untruth)) -> Result<usize> {
        // Without users there is no page table to compare with.
        let Some(mm) = self.mm().mmget_not_zero() else {
            return Ok(0);
        };
        let (mut compared, mut next) = (0, Some(0));
        while let Some(first) = next {
            check_signals()?;
            let mut found = [const { None }; DIFFERENCES];
            compared += self.compare_batch(&mm, first, &mut next, &mut found)?;
            found.into_iter().flatten().for_each(&mut f);
        }
        Ok(compared)
    }

    /// Compares entries from that for page number `first` on, until `found` is full or [`BATCH`] are
    /// compared. Returns how many were, and says in `next` where to go on. May sleep.
    fn compare_batch(
        &self,
        mm: &MmWithUser,
        first: usize,
        next: &mut Option<usize>,
        found: &mut [Option<Untruth>],
    ) -> Result<usize> {
        let lock = MmapLock::read(mm)?;
        let table = self.notifier.lock();
        let mut room = found.iter_mut();
        *next = Some(first);
        for compared in 0..BATCH {
            let Some((index, page, grant)) = next.and_then(|from| table.next(from)) else {
                *next = None;
                return Ok(compared);
            };
            // SAFETY: `table`, which has the entry, is locked.
            let untruth = unsafe { judge(&lock, self.owner(), index, page, grant) };
            if let Some(untruth) = untruth {
                let Some(slot) = room.next() else {
                    *next = Some(index);
                    return Ok(compared);
                };
                *slot = Some(untruth);
            }
            *next = index.checked_add(1);
        }
        Ok(BATCH)
    }
}

/// The difference between the CPU's table and the entry with `page` and `grant` for page number `index` of the
/// address space whose mmap lock `lock` is.
///
/// # Safety
///
/// The device's table must be locked, and have this entry.
unsafe fn judge(
    lock: &MmapLock<'_>,
    owner: &PgmapOwner,
    index: usize,
    page: *mut bindings::page,
    grant: Grant,
) -> Option<Untruth> {
    let entry = CpuEntry::look_up(lock, index);
    let (kind, pfn) = (entry.0.kind, entry.pfn(index));
    let is_exclusive = kind == bindings::ZDM_ENTRY_EXCLUSIVE;
    let cpu_page = match kind {
        bindings::ZDM_ENTRY_PRESENT | bindings::ZDM_ENTRY_EXCLUSIVE => {
            // SAFETY: The device has only pages with a struct page; of others there is no more than an
            // address, which is compared.
            unsafe { bindings::zdm_pfn_to_page(pfn) }
        }
        // SAFETY: The table has an entry for the address and is locked, so that no invalidation of the address
        // has begun which was not seen.
        bindings::ZDM_ENTRY_PRIVATE => unsafe { private_contents(owner, pfn) },
        _ => core::ptr::null_mut(),
    };
    // SAFETY: The page is mapped: to unmap it begins with an invalidation, which waits for the lock of the table.
    let is_clean = entry.0.clean && cpu_page == page && unsafe { is_cleanable(page) };
    let cpu_write = entry.0.write && !is_clean && area_flags(lock, index) & flags::WRITE != 0;
    let device_write = grant != Grant::Read;
    let is_true = !cpu_page.is_null()
        && cpu_page == page
        && (cpu_write || !device_write)
        && is_exclusive == (grant == Grant::Exclusive);
    if is_true {
        return None;
    }
    // SAFETY: Pages of the table have a struct page. It is not read.
    let number = |page| unsafe { bindings::zdm_page_to_pfn(page) };
    Some(Untruth {
        index,
        device_pfn: number(page),
        device_write,
        // The CPU has no access to an exclusive page.
        cpu_pfn: (!cpu_page.is_null() && !is_exclusive).then(|| number(cpu_page)),
        cpu_write,
        passing: if is_exclusive && cpu_page == page {
            Passing::Exclusive
        } else if kind == bindings::ZDM_ENTRY_MIGRATION && pfn != number(page) {
            Passing::Migration
        } else {
            Passing::Nothing
        },
    })
}

/// The page with the contents of PRIVATE page frame `pfn`, NULL where it is not memory of `owner`.
///
/// # Safety
///
/// The device's table must be locked. An address must map the page of which no invalidation is under way.
unsafe fn private_contents(owner: &PgmapOwner, pfn: usize) -> *mut bindings::page {
    // SAFETY: The page is mapped, so that it is in use: to unmap it begins with an invalidation, which waits
    // for the lock of the table, which is held by the contract of this function.
    if !unsafe { Memory::of_pfn(pfn, owner) }.is_local() {
        return core::ptr::null_mut();
    }
    // SAFETY: There is a struct page, as the page is in use. It is one of a `DevPagemap`, whose owner
    // asks, and its folio is whole while it is mapped.
    unsafe { contents(bindings::zdm_pfn_to_page(pfn)) }
}

/// `vma->vm_flags` of the area that maps page number `index` of the address space whose mmap lock `lock` is; 0
/// without an area.
fn area_flags(lock: &MmapLock<'_>, index: usize) -> vm_flags_t {
    // SAFETY: The mmap lock is held by the type invariants of `MmapLock`.
    unsafe { bindings::zdm_area_flags(lock.mm().as_raw(), index << PAGE_SHIFT) }
}

/// The properties of a page in its entry, without the place of the page.
///
/// # Examples
///
/// ```
/// use kernel::mm::oracle::walk::Marks;
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let mirror = device.mirror()?;
/// # touch(range)?;
///
/// let before = mirror.picture(range).ok_or(EBUSY)?;
/// mirror.compare_picture(&before, |change| {
///     assert_eq!(change.then, change.now);
///     assert!(change.now.bits() & Marks::MAPPED != 0);
/// });
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Marks(u32);

impl Marks {
    /// There is a page, which is not that of zeroes.
    pub(crate) const MAPPED: u32 = 1;
    /// The CPU, or a device on its behalf, may write.
    pub(crate) const WRITE: u32 = 2;
    /// It was written to since the mark was cleared.
    pub(crate) const SOFT_DIRTY: u32 = 4;
    /// userfaultfd protects it.
    pub(crate) const UFFD: u32 = 8;
    /// `PageAnonExclusive()`.
    pub(crate) const EXCLUSIVE: u32 = 16;
    /// One entry maps it with its neighbours.
    pub(crate) const HUGE: u32 = 32;
    /// The area allows to write.
    pub(crate) const AREA_WRITE: u32 = 64;
    /// KSM may look at the area.
    pub(crate) const MERGEABLE: u32 = 128;
    /// The CPU has accessed it lately. Only present entries say so.
    pub(crate) const YOUNG: u32 = 256;
    /// It is anonymous, and its contents are nowhere else, or in swap: reclaim must not drop them.
    pub(crate) const DIRTY: u32 = 512;
    /// The CPU has access.
    pub(crate) const PRESENT: u32 = 1024;
    /// It is a page of a large folio.
    pub(crate) const LARGE: u32 = 2048;
    /// There is nothing, or the page of zeroes, and the kernel marks what a migration puts there.
    pub(crate) const HOLE: u32 = 4096;

    fn of(entry: &bindings::zdm_entry, area: vm_flags_t) -> Self {
        let is_page = match entry.kind {
            bindings::ZDM_ENTRY_PRESENT | bindings::ZDM_ENTRY_PRIVATE => !entry.zero,
            _ => false,
        };
        let mut marks = 0;
        for (bit, is_set) in [
            (Self::MAPPED, is_page),
            (Self::WRITE, entry.write),
            (Self::SOFT_DIRTY, entry.soft_dirty),
            (Self::UFFD, entry.uffd),
            (Self::EXCLUSIVE, entry.exclusive),
            (Self::HUGE, entry.order > 0),
            (Self::AREA_WRITE, area & flags::WRITE != 0),
            (Self::MERGEABLE, area & flags::MERGEABLE != 0),
            (Self::YOUNG, entry.young),
            (Self::DIRTY, entry.dirty),
            (Self::PRESENT, entry.kind == bindings::ZDM_ENTRY_PRESENT),
            (Self::LARGE, entry.large),
            (
                Self::HOLE,
                entry.marks_new && (entry.zero || entry.kind == bindings::ZDM_ENTRY_NONE),
            ),
        ] {
            if is_set {
                marks |= bit;
            }
        }
        Self(marks)
    }

    /// Marks of these bits, for tests.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The marks as bits.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }
}

/// The marks of the pages of a range at one moment.
///
/// # Examples
///
/// ```
/// use kernel::mm::oracle::walk::Picture;
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let mirror = device.mirror()?;
///
/// touch(range.first(1))?;
/// let before: Picture = mirror.picture(range).ok_or(EBUSY)?;
/// // What happens in between must change the second page only.
/// touch(range)?;
/// let mut changed = 0;
/// mirror.compare_picture(&before, |change| changed += usize::from(change.then != change.now));
/// assert_eq!(changed, 1);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Picture {
    range: PageRange,
    marks: KVVec<Marks>,
    /// Faults that the task had taken, and pages that reclaim had looked at.
    faults: usize,
    scanned: usize,
}

/// The marks of a page in two pictures, and what may have changed them in between.
///
/// # Examples
///
/// ```
/// use kernel::mm::oracle::walk::{Change, Marks};
/// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let mirror = device.mirror()?;
///
/// let before = mirror.picture(range).ok_or(EBUSY)?;
/// touch(range)?;
/// mirror.compare_picture(&before, |change: Change| {
///     assert_eq!(change.then.bits() & Marks::MAPPED, 0);
///     assert!(change.now.bits() & Marks::MAPPED != 0);
///     assert!(change.is_faulted);
/// });
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    /// Number of the page in the address space.
    pub(crate) index: usize,
    pub(crate) then: Marks,
    pub(crate) now: Marks,
    /// The task took faults, for itself or for a device.
    pub(crate) is_faulted: bool,
    /// Reclaim looked at anonymous pages.
    pub(crate) is_scanned: bool,
    /// The page holds zeroes. Looked at for pages of large folios only.
    pub(crate) is_empty: bool,
}

impl HmmMirror {
    /// Puts down the marks of the pages of `range`; `None` where other tasks may change them meanwhile, or
    /// where `range` is longer than [`PICTURE_PAGES`]. May sleep.
    pub(crate) fn picture(&self, range: PageRange) -> Option<Picture> {
        let mm = self.mm().mmget_not_zero()?;
        // SAFETY: `mm` has users, of which the reference that was taken just now is one.
        let is_alone = unsafe { bindings::zdm_is_alone(mm.as_raw()) };
        if !is_alone || range.pages() > PICTURE_PAGES {
            return None;
        }
        let mut marks = KVVec::with_capacity(range.pages(), GFP_KERNEL).ok()?;
        // SAFETY: These read counters.
        let (faults, scanned) = unsafe { (bindings::zdm_faults(), bindings::zdm_scanned()) };
        for batch in range.batches(BATCH) {
            let lock = MmapLock::read(&mm).ok()?;
            for address in batch.addresses() {
                let index = address >> PAGE_SHIFT;
                let entry = CpuEntry::look_up(&lock, index);
                let now = Marks::of(&entry.0, area_flags(&lock, index));
                marks.push_within_capacity(now).ok()?;
            }
        }
        Some(Picture {
            range,
            marks,
            faults,
            scanned,
        })
    }

    /// Takes the picture `before` again, and calls `f` with what has become of each page. May sleep.
    pub(crate) fn compare_picture(&self, before: &Picture, mut f: impl FnMut(Change)) {
        let Some(after) = self.picture(before.range) else {
            return;
        };
        let first = before.range.start() >> PAGE_SHIFT;
        for (i, (&then, &now)) in before.marks.iter().zip(after.marks.iter()).enumerate() {
            let index = first + i;
            let is_looked_at = then != now && then.bits() & Marks::LARGE != 0;
            f(Change {
                index,
                then,
                now,
                is_faulted: before.faults != after.faults,
                is_scanned: before.scanned != after.scanned,
                is_empty: is_looked_at && self.is_empty(index),
            });
        }
    }

    /// Whether page number `index` is in reach of the CPU, or of this device, and of the kernel, and holds zeroes. May
    /// sleep.
    pub(super) fn is_empty(&self, index: usize) -> bool {
        let Some(mm) = self.mm().mmget_not_zero() else {
            return false;
        };
        let (first, last) = (index, index);
        let Ok(seq) = self.notifier.read_begin(Span { first, last }) else {
            return false;
        };
        let Ok(lock) = MmapLock::read(&mm) else {
            return false;
        };
        // No task that changes the entry is past its invalidation, which waits for this lock.
        let Some(_table) = self.notifier.lock_if_fresh(seq) else {
            return false;
        };
        let entry = CpuEntry::look_up(&lock, index);
        let pfn = entry.pfn(index);
        // SAFETY: The function takes a number.
        let is_valid = unsafe { bindings::zdm_pfn_valid(pfn) };
        let page = match entry.0.kind {
            // SAFETY: `zdm_pfn_valid()` says that the page frame has a `struct page`.
            bindings::ZDM_ENTRY_PRESENT if is_valid => unsafe { bindings::zdm_pfn_to_page(pfn) },
            // SAFETY: The table is locked, and no invalidation of the address is under way, as the sequence
            // was checked under that lock.
            bindings::ZDM_ENTRY_PRIVATE => unsafe { private_contents(self.owner(), pfn) },
            _ => return false,
        };
        // What is mapped there now may be out of the kernel's reach, as the memory of memfd_secret(2) is.
        // SAFETY: The page is mapped, and so in use, while the lock is held under which the sequence was
        // checked, and has contents.
        let is_reachable = !page.is_null() && unsafe { bindings::zdm_page_is_reachable(page) };
        // SAFETY: The page is in use while the lock is held, and the kernel reaches its contents.
        is_reachable && unsafe { bindings::zdm_page_is_empty(page) }
    }
}

#[kunit_tests(zdmirror_walk)]
mod tests {
    use super::*;
    use crate::mm::{
        hmm::access::Access,
        kunit::support::{
            anon_range,
            this_module, //
        },
    };
    use core::ptr::NonNull;
    use kernel::page::Page;

    const PAGES: usize = 4;

    struct Setting {
        mirror: HmmMirror,
        range: PageRange,
    }

    /// Some memory of the KUnit thread, which the device has mapped for writing.
    fn setting() -> Result<Setting> {
        let range = anon_range(PAGES)?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mirror = HmmMirror::new(mm, PgmapOwner::new(this_module())?)?;
        mirror.fault(range, Access::Write)?;
        Ok(Setting { mirror, range })
    }

    fn untruths(s: &Setting) -> Result<(usize, usize, Option<Untruth>)> {
        let (mut n, mut last) = (0, None);
        let compared = s.mirror.compare(|untruth| {
            n += 1;
            last = Some(untruth);
        })?;
        Ok((compared, n, last))
    }

    #[test]
    fn entries_of_a_fault_are_true() -> Result {
        let s = setting()?;
        assert_eq!(untruths(&s)?, (PAGES, 0, None));
        assert_eq!(s.mirror.make_exclusive(s.range.first(2))?, 2);
        assert_eq!(untruths(&s)?, (PAGES, 0, None));
        Ok(())
    }

    #[test]
    fn entry_of_another_page_is_untrue() -> Result {
        let s = setting()?;
        let page = Page::alloc_page(GFP_KERNEL)?;
        let raw = NonNull::new(page.as_ptr()).ok_or(EINVAL)?;
        let index = s.range.start() >> PAGE_SHIFT;
        // SAFETY: Nothing is read or written through the table before it goes.
        unsafe { s.mirror.notifier.lock().store(index, raw, Grant::Read) }?;
        let (compared, n, last) = untruths(&s)?;
        assert_eq!((compared, n), (PAGES, 1));
        let untruth = last.ok_or(EINVAL)?;
        assert_eq!((untruth.index, untruth.passing), (index, Passing::Nothing));
        assert_ne!(untruth.cpu_pfn, Some(untruth.device_pfn));
        Ok(())
    }

    #[test]
    fn picture_of_pages_that_stay() -> Result {
        let s = setting()?;
        let before = s.mirror.picture(s.range).ok_or(EINVAL)?;
        let mut pages = 0;
        s.mirror.compare_picture(&before, |change| {
            assert_eq!(change.then, change.now);
            let marks = Marks::MAPPED | Marks::WRITE | Marks::DIRTY | Marks::PRESENT;
            assert_eq!(change.then.bits() & marks, marks);
            pages += 1;
        });
        assert_eq!(pages, PAGES);
        Ok(())
    }
}
