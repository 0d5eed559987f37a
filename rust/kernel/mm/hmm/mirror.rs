// SPDX-License-Identifier: GPL-2.0

//! A device's view of an address space, by way of its page table.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)
//!
//! Finding pages, and storing them in the table while they are sure to be the right ones, is one
//! operation here, so that a driver cannot get it wrong; pages leave as copied bytes only, see
//! `copy.rs`.

use super::{
    access::{
        Access,
        Grant, //
    },
    mapped::{
        HmmEntry,
        MappedPage, //
    },
    table::{
        Table,
        BLOCK, //
    },
};
use crate::{
    bindings,
    mm::{
        module::pin::ModulePin,
        not_supported,
        page::device_folio::FolioRef,
        region::owner::PgmapOwner,
        sync::task::{
            check_may_fault,
            check_signals,
            Deadline, //
        },
        user::{
            changes::Span,
            mmap_lock::MmapLock,
            notifier::MmuIntervalNotifier,
            range::PageRange, //
        },
        PAGE_SHIFT,
        PAGE_SIZE,
        PMD_ORDER, //
    },
};
use core::{
    mem::ManuallyDrop,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    mm::{
        Mm,
        MmWithUser, //
    },
    prelude::*,
    sync::Arc,
    time::msecs_to_jiffies, //
};

/// Pages that one call of `hmm_range_fault()` asks for; the array lives on the stack.
pub(super) const BATCH: usize = 64;

/// The treatment of pages that are not present.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Absent {
    /// They are skipped.
    Skip,
    /// They are faulted in, with the mmap lock held all the time.
    Fault(Access),
    /// They are faulted in, and the handler of the fault may drop the mmap lock meanwhile.
    FaultUnlocked(Access),
}

impl Absent {
    fn is_write(self) -> bool {
        matches!(
            self,
            Self::Fault(Access::Write) | Self::FaultUnlocked(Access::Write)
        )
    }

    /// How a walk begins.
    fn way(self) -> Way {
        match self {
            Self::Skip => Way::Locked,
            Self::Fault(_) => Way::LockedUnlessFiles,
            Self::FaultUnlocked(_) => Way::Unlocked,
        }
    }

    /// Flags that `hmm_range_fault()` takes for it.
    fn request(self) -> usize {
        match self {
            Self::Skip => 0,
            _ => HmmEntry::request(self.is_write()),
        }
    }
}

/// The way in which core mm faults pages in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// With the mmap lock held all the time. A fault that waits cannot be killed then.
    Locked,
    /// So, unless there is an area of a file, whose server may never answer.
    LockedUnlessFiles,
    /// Without the mmap lock while a fault waits. A fatal signal ends the wait.
    Unlocked,
}

/// An address space as one open file of the device sees it.
///
/// All functions but [`HmmMirror::mm`], [`HmmMirror::owner`], and those that copy bytes take the mmap lock. The
/// caller must not hold it: a task that wants it for writing may wait in between, and both would wait for ever.
/// A task that has a migration, or handles a fault on device memory, gets `EDEADLK` from them.
///
/// Dropping the mirror waits for invalidations that are under way: may sleep, and no lock may be held that an
/// invalidation waits for. A mirror that is forgotten keeps its module loaded. So does one that is dropped in a
/// migration, or in the handler of a fault on device memory, as an invalidation may wait for the pages that the
/// task has locked.
///
/// # Examples
///
/// ```
/// use kernel::mm::{
///     hmm::{access::Access, copy::Stop, mirror::HmmMirror},
///     region::owner::PgmapOwner,
/// };
/// # use kernel::{mm::kunit::support::{anon_range, touch}, module::this_module, page::PAGE_SIZE};
/// # let range = anon_range(1)?;
///
/// let task = current!();
/// let mm = task.mm().ok_or(EINVAL)?;
/// let owner = PgmapOwner::new(this_module::<LocalModule>())?;
/// let mirror = HmmMirror::new(mm, owner)?;
/// mirror.fault(range, Access::Write)?;
/// let mut bytes = KVec::from_elem(7u8, PAGE_SIZE, GFP_KERNEL)?;
/// assert_eq!(mirror.write(range, &bytes), (1, Stop::Done));
/// // The CPU writes the first byte of the same page.
/// touch(range)?;
/// assert_eq!(mirror.read(range, &mut bytes), (1, Stop::Done));
/// assert_eq!((bytes[0], bytes[1]), (1, 7));
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `notifier` and `loaded` are valid, and dropped by `drop()` only.
pub(crate) struct HmmMirror {
    pub(in crate::mm) notifier: ManuallyDrop<Pin<KBox<MmuIntervalNotifier<Table>>>>,
    owner: Arc<PgmapOwner>,
    /// The notifier calls into the module.
    loaded: ManuallyDrop<ModulePin>,
}

impl Drop for HmmMirror {
    fn drop(&mut self) {
        if check_may_fault().is_err() {
            pr_err!("a mirror stays: it was dropped by a task that has locked pages\n");
            return;
        }
        // SAFETY: The field is valid by the type invariants of `HmmMirror`, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.notifier) };
        // The kernel calls nothing for the mirror any more.
        // SAFETY: The field is valid by the type invariants of `HmmMirror`, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.loaded) };
    }
}

impl HmmMirror {
    /// Mirrors `mm` for the device whose memory `owner` owns. The module stays loaded for as long as the
    /// mirror lives. May sleep. The caller must not hold the mmap lock, which the first mirror of an address space takes
    /// for writing: the task would wait until it is killed. If another driver has subscribed to the address space by a
    /// `mmu_notifier`, and none by an interval notifier, not even that ends the wait.
    ///
    /// Wraps `mmu_interval_notifier_insert()`.
    ///
    /// The notifier is in a box of its own. A mirror that `Opaque::pin_init()` puts where it is never dropped is one
    /// that was forgotten.
    ///
    /// # Errors
    ///
    /// `ENODEV` when the module is on its way out, or its init function has not succeeded yet; `EDEADLK` for a task
    /// that has a migration, or handles a fault on device memory; `EINTR` on a fatal signal; `ENOMEM`.
    pub(crate) fn new(mm: &MmWithUser, owner: Arc<PgmapOwner>) -> Result<Self> {
        check_may_fault()?;
        let loaded = ModulePin::try_take(owner.module()).ok_or(ENODEV)?;
        let notifier = MmuIntervalNotifier::new(mm, Table::new());
        let notifier = KBox::try_pin_init(notifier, GFP_KERNEL_ACCOUNT)?;
        // INVARIANT: Made above.
        Ok(Self {
            notifier: ManuallyDrop::new(notifier),
            owner,
            loaded: ManuallyDrop::new(loaded),
        })
    }

    /// The address space, which may have lost its users.
    pub(crate) fn mm(&self) -> &Mm {
        self.notifier.mm()
    }

    /// The owner of the device's own memory.
    pub(crate) fn owner(&self) -> &PgmapOwner {
        &self.owner
    }

    /// Holds the next invalidation of the page at `address` for up to a second, so that a test can act while
    /// it is under way.
    ///
    /// # Errors
    ///
    /// `EBUSY` when one is held or asked for, `EINVAL` for an address that no process has.
    pub(crate) fn hold_next(&self, address: usize) -> Result {
        self.notifier.hold_next(address >> PAGE_SHIFT)
    }

    /// Whether an invalidation is held now.
    pub(crate) fn is_held(&self) -> bool {
        self.notifier.is_held()
    }

    /// Ends what [`HmmMirror::hold_next`] asked for. Returns whether an invalidation was held.
    pub(crate) fn let_go(&self) -> bool {
        self.notifier.let_go()
    }

    /// Ends the invalidation that is held, and holds the next one of the page at `address`.
    ///
    /// # Errors
    ///
    /// `ENOENT` when none is held, `EINVAL` for an address that no process has.
    pub(crate) fn go_on(&self, address: usize) -> Result {
        self.notifier.go_on(address >> PAGE_SHIFT)
    }

    /// Faults `range` in for `access`: afterwards the table maps it, until the next invalidation.
    ///
    /// Wraps `hmm_range_fault()`; where a file is mapped, `hmm_range_fault_unlocked_timeout()`, if the kernel
    /// has it, because the file's contents may come from a server that never answers. In a kernel without it a task
    /// that waits for one cannot be killed. May sleep; the mmap lock must not be held.
    ///
    /// # Errors
    ///
    /// `EFAULT` when there is nothing to map, for memory that the kernel itself cannot reach (that of
    /// `memfd_secret(2)`, or broken), and when the process is gone; `EPERM` for a write to what is
    /// read-only, `EBUSY` when invalidations keep coming for a second, `EDEADLK` for a task that has a
    /// migration, `EINTR` for one that was killed, `ENOMEM`.
    pub(crate) fn fault(&self, range: PageRange, access: Access) -> Result {
        self.walk(range, Absent::Fault(access), |_, _| {})
    }

    /// As [`HmmMirror::fault`], for areas whose faults drop the mmap lock, such as those that
    /// user space handles.
    ///
    /// Wraps `hmm_range_fault_unlocked_timeout()`. May sleep, for as long as a fault takes, unless the
    /// task is killed.
    ///
    /// # Examples
    ///
    /// ```
    /// use kernel::mm::hmm::access::Access;
    /// # use kernel::mm::kunit::{device::EmulatedDevice, support::anon_range};
    /// # let device = EmulatedDevice::new()?;
    /// # let range = anon_range(1)?;
    /// # let mirror = device.mirror()?;
    ///
    /// // Not every kernel has it.
    /// if mirror.fault_unlocked(range, Access::Write).is_err() {
    ///     mirror.fault(range, Access::Write)?;
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`HmmMirror::fault`], and `EOPNOTSUPP` in a kernel that does not have that function.
    pub(crate) fn fault_unlocked(&self, range: PageRange, access: Access) -> Result {
        self.walk(range, Absent::FaultUnlocked(access), |_, _| {})
    }

    /// Maps the present pages of `range`, without faulting anything in, and returns how many of
    /// them are on the device. May sleep.
    ///
    /// Wraps `hmm_range_fault()`.
    ///
    /// # Examples
    ///
    /// ```
    /// use kernel::mm::hmm::copy::Stop;
    /// # use kernel::{mm::kunit::{device::EmulatedDevice, support::anon_range}, page::PAGE_SIZE};
    /// # let device = EmulatedDevice::new()?;
    /// # let range = anon_range(3)?;
    /// # let mirror = device.mirror()?;
    ///
    /// device.migrate(range.first(2))?;
    /// assert_eq!(mirror.refresh(range)?, 2);
    /// // Nothing is mapped for the third page.
    /// # let mut bytes = KVec::from_elem(0u8, 3 * PAGE_SIZE, GFP_KERNEL)?;
    /// assert_eq!(mirror.read(range, &mut bytes), (2, Stop::Unmapped));
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `EFAULT` when the process is gone, `EBUSY` when invalidations keep coming for a second, `EDEADLK` for a task
    /// that has a migration, `EINTR` for a task that was killed, `ENOMEM`.
    pub(crate) fn refresh(&self, range: PageRange) -> Result<usize> {
        let mut found = 0;
        self.walk(range, Absent::Skip, |page, pages| {
            if page.memory(&self.owner).is_local() {
                found += pages;
            }
        })?;
        Ok(found)
    }

    /// Takes a reference on the first page of `range`, if it is one of the device. May sleep, and faults nothing in.
    ///
    /// Wraps `hmm_range_fault()` and `folio_try_get()`.
    ///
    /// # Errors
    ///
    /// `ENOENT` when there is none, or its folio has 2^30 references; else as [`HmmMirror::fault`].
    pub(crate) fn get_device_folio(&self, range: PageRange) -> Result<FolioRef> {
        let mut found = None;
        self.walk(range.first(1), Absent::Skip, |page, _| {
            if page.memory(&self.owner).is_local() {
                found = page.get_device_folio();
            }
        })?;
        found.ok_or(ENOENT)
    }

    /// Walks `range`, in batches, and stores what is found, calling `f` under the lock for each page, or for
    /// the first of several pages that one entry maps, with their number.
    fn walk(
        &self,
        range: PageRange,
        absent: Absent,
        mut f: impl FnMut(MappedPage<'_>, usize),
    ) -> Result {
        check_may_fault()?;
        let mm = self.mm().mmget_not_zero().ok_or(EFAULT)?;
        let mut left = Some(range);
        while let Some(rest) = left {
            let pages = self.walk_batch(&mm, rest, absent, &mut f)?;
            left = rest.skip(pages);
        }
        Ok(())
    }

    /// Walks the first pages of `range`, and returns how many: up to [`BATCH`], or more where one entry
    /// maps them.
    fn walk_batch(
        &self,
        mm: &MmWithUser,
        all: PageRange,
        absent: Absent,
        f: &mut impl FnMut(MappedPage<'_>, usize),
    ) -> Result<usize> {
        let mut pfns = [0usize; BATCH];
        let range = all.first(BATCH);
        let pages = range.pages();
        // A page that a PMD maps is stored with all pages of its block.
        let span = Span::of(range).aligned(PMD_ORDER);
        let mut owner = self.owner.as_ptr();
        let deadline = Deadline::after_ms(bindings::HMM_RANGE_DEFAULT_TIMEOUT);
        let mut way = absent.way();
        loop {
            check_signals()?;
            // A fault that user space handles may take longer than the deadline. The C function then
            // sets a deadline for the rest after the fault.
            let unlocked = way == Way::Unlocked;
            if !unlocked && deadline.passed() {
                return Err(EBUSY);
            }
            let mut hmm_range = bindings::hmm_range {
                notifier: self.notifier.as_raw(),
                notifier_seq: 0,
                start: range.start(),
                end: range.end(),
                hmm_pfns: pfns.as_mut_ptr(),
                default_flags: absent.request(),
                pfn_flags_mask: 0,
                dev_private_owner: owner,
            };
            let seq = if unlocked {
                // The C function begins a sequence itself, and then waits only for what has come since.
                self.notifier.read_begin(span)?;
                let begun = self.notifier.before_read(span);
                // SAFETY: `pfns` has an entry for each page of the range. The notifier is of `mm`,
                // which has users while it is borrowed.
                let read = unsafe { range_fault_unlocked(&mut hmm_range) };
                read.and_then(|()| {
                    // SAFETY: `begun` is from before the call, and its span has all pages of the range.
                    unsafe { self.notifier.read_by(&hmm_range, begun) }.ok_or(EFAULT)
                })
            } else {
                let seq = self.notifier.read_begin(span)?;
                hmm_range.notifier_seq = seq.number();
                let no_files = way == Way::LockedUnlessFiles;
                // SAFETY: `pfns` has an entry for each page of the range. The notifier is of `mm`,
                // and the number in `hmm_range` is of a sequence that was begun with it.
                match unsafe { range_fault(&mut hmm_range, mm, no_files, |_| {}) } {
                    Err(err) if err == EAGAIN => {
                        way = Way::Unlocked;
                        continue;
                    }
                    other => other.map(|()| seq),
                }
            };
            let seq = match seq {
                Err(err) if err == EBUSY && !unlocked => continue,
                Err(err) if err == not_supported() && absent.way() != Way::Unlocked => {
                    way = Way::Locked;
                    continue;
                }
                other => other?,
            };
            let Some(table) = self.notifier.lock_if_fresh(seq) else {
                continue;
            };
            let entries = || pfns[..pages].iter().map(|&raw| HmmEntry::new(raw));
            if absent.is_write() && !entries().all(HmmEntry::is_writable) {
                // A PRIVATE page of the owner is reported unchanged, without the requested write
                // fault. Without an owner it is brought back and its sharing broken (or the write
                // refused), like any other page.
                owner = core::ptr::null_mut();
                continue;
            }
            let mut done = 0;
            while done < pages {
                let (address, entry) =
                    (range.start() + done * PAGE_SIZE, HmmEntry::new(pfns[done]));
                // Pages that the same entry of the CPU's table maps, up to the end of the walked
                // range.
                let mut mapped = 1;
                // SAFETY: The lock of the notifier is held until the end of the loop, under which the
                // sequence was checked. `owner` owns the memory of `DevPagemap`s, or is none.
                if let Some(page) = unsafe { MappedPage::new(entry, address) } {
                    let write = entry.is_writable();
                    let (index, contents) = (address >> PAGE_SHIFT, page.contents());
                    let in_block = index % BLOCK;
                    let first = contents.map(|page| page.as_ptr().wrapping_sub(in_block));
                    let block = first
                        .and_then(NonNull::new)
                        .filter(|_| entry.order() >= PMD_ORDER)
                        // SAFETY: One entry maps all of the block, to pages in a row of one folio, and so are
                        // those that hold the contents; they are in use.
                        .filter(|first| unsafe { are_reachable(*first, BLOCK) });
                    if let Some(first) = block {
                        mapped = (BLOCK - in_block).min(all.pages() - done);
                        f(page, mapped);
                        // SAFETY: The entry maps all of the block with this permission, as the sequence was
                        // checked under the lock that the table is behind.
                        unsafe { table.store_block(index - in_block, first, write) }?;
                    } else {
                        f(page, 1);
                        // SAFETY: The page is mapped, so in use.
                        let reachable = contents.filter(|page| unsafe { are_reachable(*page, 1) });
                        if let Some(page) = reachable {
                            // SAFETY: The CPU maps the page with this permission, as the sequence was checked
                            // under the lock that the table is behind.
                            unsafe { table.store(index, page, Grant::shared(write)) }?;
                        } else if contents.is_some() && absent != Absent::Skip {
                            return Err(EFAULT);
                        }
                    }
                }
                done += mapped;
            }
            return Ok(done);
        }
    }
}

/// Whether the kernel can reach the contents of all of the `n` pages from `first` on.
///
/// # Safety
///
/// They must be pages in use.
unsafe fn are_reachable(first: NonNull<bindings::page>, n: usize) -> bool {
    (0..n).all(|i| {
        // SAFETY: There are `n` pages in use from `first` on, by the contract of this function.
        unsafe { bindings::zdm_page_is_reachable(first.as_ptr().add(i)) }
    })
}

/// Wraps `hmm_range_fault()`. Calls `then` afterwards, with the mmap lock still held, if it succeeds. May sleep.
///
/// # Errors
///
/// `EAGAIN` for `no_files` where a file is mapped.
///
/// # Safety
///
/// `range` must have room for an entry for each of its pages. Its notifier must be one of `mm`,
/// and `notifier_seq` the number of a sequence that was begun with the notifier.
pub(super) unsafe fn range_fault(
    range: &mut bindings::hmm_range,
    mm: &MmWithUser,
    no_files: bool,
    then: impl FnOnce(&MmapLock<'_>),
) -> Result {
    let lock = MmapLock::read(mm)?;
    if no_files && lock.has_files(range.start..range.end) {
        return Err(EAGAIN);
    }
    // SAFETY: The guard holds the mmap lock. Room, notifier and sequence are as the contract of this
    // function says.
    to_result(unsafe { bindings::hmm_range_fault(range) })?;
    then(&lock);
    Ok(())
}

/// Wraps `hmm_range_fault_unlocked_timeout()`, which begins the sequence itself, and takes the mmap lock. May
/// sleep.
///
/// # Errors
///
/// `EOPNOTSUPP` in a kernel that does not have it.
///
/// # Safety
///
/// `range` must have room for an entry for each of its pages. Its notifier must be one of an address
/// space that has users.
unsafe fn range_fault_unlocked(range: &mut bindings::hmm_range) -> Result {
    let timeout = msecs_to_jiffies(bindings::HMM_RANGE_DEFAULT_TIMEOUT);
    // SAFETY: Room, notifier and address space are as the contract of this function says.
    to_result(unsafe { bindings::zdm_range_fault_unlocked(range, timeout) })
}

#[kunit_tests(zdmirror_mirror)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::{
            anon_range,
            module_refs,
            this_module,
            touch, //
        },
        sync::task::NoFaults,
        would_deadlock, //
    };

    #[test]
    fn mirror_stays_while_its_task_has_locked_pages() -> Result {
        let range = anon_range(1)?;
        touch(range)?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let owner = PgmapOwner::new(this_module())?;
        let refs = module_refs();
        let mirror = HmmMirror::new(mm, owner.clone())?;
        // The owner is dropped with the mirror, though the rest of that stays.
        core::mem::forget(owner.clone());
        // SAFETY: It is used only after `mirror` was dropped without effect.
        let same = ManuallyDrop::new(unsafe { core::ptr::read(&mirror) });
        let no_faults = NoFaults::new();
        let another = HmmMirror::new(mm, owner);
        assert_eq!(another.err(), Some(would_deadlock()));
        drop(mirror);
        drop(no_faults);
        assert_eq!(module_refs(), refs.map(|refs| refs + 1));
        assert_eq!(same.refresh(range)?, 0);
        drop(ManuallyDrop::into_inner(same));
        assert_eq!(module_refs(), refs);
        Ok(())
    }
}
