// SPDX-License-Identifier: GPL-2.0

//! A device's view of an address space: page table, kept up to date by an interval notifier.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)
//!
//! Entries hold no reference on their pages. What keeps them valid is the protocol of
//! `Documentation/mm/hmm.rst`: they are stored under the table's lock after the sequence was
//! checked, and removed under it before the CPU's page tables change. Both halves live here, so
//! that a driver cannot get one of them wrong; pages leave this file as copied bytes only.

use super::{
    backing::contents,
    device_folio::DeviceFolioRef,
    notifier::{
        IntervalOps,
        MmuIntervalNotifier,
        NotifierRange,
        PendingSeq,
        SeqSet, //
    },
    pagemap::PgmapOwner,
    task::{
        check_signals,
        Deadline, //
    },
    PAGE_SHIFT,
    PAGE_SIZE, //
};
use crate::bindings;
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    mm::{
        Mm,
        MmWithUser, //
    },
    new_mutex,
    page::BorrowedPage,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    types::Opaque, //
};

/// What the device wants to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
}

/// Pages that one call of `hmm_range_fault()` asks for; the array lives on the stack.
const BATCH: usize = 64;

/// The device's page table: page number to struct page and write permission.
///
/// # Invariants
///
/// Entries point at the pages that hold the contents of mapped pages, tagged with [`WRITE`].
#[pin_data(PinnedDrop)]
struct Table {
    #[pin]
    xa: Opaque<bindings::xarray>,
}

// SAFETY: The entries belong to no thread.
unsafe impl Send for Table {}

/// Tag of an entry that may be written through. Struct pages are aligned to more than that.
const WRITE: usize = 4;

impl Table {
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `xa` is valid for writes; an empty array needs no flags.
            xa <- Opaque::ffi_init(|xa| unsafe { bindings::xa_init_flags(xa, 0) }),
        })
    }

    /// The page at page number `index`, if it may be accessed so.
    fn load(&self, index: usize, access: Access) -> Option<BorrowedPage<'_>> {
        // SAFETY: The array is initialised.
        let entry = unsafe { bindings::xa_load(self.xa.get(), index) } as usize;
        if access == Access::Write && entry & WRITE == 0 {
            return None;
        }
        let page = NonNull::new((entry & !WRITE) as *mut bindings::page)?;
        // SAFETY: Entries are valid while the table is locked, which the borrow lies within.
        Some(unsafe { BorrowedPage::from_raw(page) })
    }

    /// Stores `page`, without waiting for memory.
    fn store(&self, index: usize, page: NonNull<bindings::page>, write: bool) -> Result {
        let entry = page.as_ptr() as usize | if write { WRITE } else { 0 };
        // Reclaim would call `invalidate()`, whose lock is held: GFP_ATOMIC does not enter it.
        // SAFETY: The array is initialised, the entry is a tagged, aligned pointer.
        let old = unsafe {
            bindings::xa_store(self.xa.get(), index, entry as *mut _, bindings::GFP_ATOMIC)
        };
        // SAFETY: What `xa_store()` returns is what `xa_err()` takes.
        to_result(unsafe { bindings::xa_err(old) })
    }

    /// Forgets all pages from `first` to `last`, at a cost that follows how many there are.
    fn erase(&self, first: usize, last: usize) {
        let mut index = first;
        loop {
            // SAFETY: The array is initialised.
            let entry =
                unsafe { bindings::xa_find(self.xa.get(), &mut index, last, bindings::XA_PRESENT) };
            if entry.is_null() {
                return;
            }
            // SAFETY: As above.
            unsafe { bindings::xa_erase(self.xa.get(), index) };
            if index == last {
                return;
            }
            index += 1;
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Table {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The array is initialised; entries own nothing.
        unsafe { bindings::xa_destroy(self.xa.get()) };
    }
}

#[pin_data]
struct LockedTable {
    #[pin]
    table: Mutex<Table>,
}

impl IntervalOps for LockedTable {
    fn invalidate(
        &self,
        range: &NotifierRange<'_>,
        seq: PendingSeq<'_>,
    ) -> core::result::Result<SeqSet, ()> {
        let table = if range.is_blockable() {
            self.table.lock()
        } else {
            self.table.try_lock().ok_or(())?
        };
        let set = seq.set();
        table.erase(range.start() >> PAGE_SHIFT, (range.end() - 1) >> PAGE_SHIFT);
        Ok(set)
    }
}

/// An address space as one opener of the device sees it.
#[pin_data]
pub(crate) struct HmmMirror {
    #[pin]
    notifier: MmuIntervalNotifier<LockedTable>,
    owner: Arc<PgmapOwner>,
}

impl HmmMirror {
    /// Mirrors `mm` for the device whose PRIVATE memory `owner` owns. May sleep.
    pub(crate) fn new<'a>(
        mm: &'a MmWithUser,
        owner: Arc<PgmapOwner>,
    ) -> impl PinInit<Self, Error> + 'a {
        let table = try_pin_init!(LockedTable {
            table <- new_mutex!(Table::new(), "HmmMirror::table"),
        }? Error);
        try_pin_init!(Self {
            notifier <- MmuIntervalNotifier::new(mm, table),
            owner,
        })
    }

    /// The address space, which may have lost its users.
    pub(crate) fn mm(&self) -> &Mm {
        self.notifier.mm()
    }

    /// Whose PRIVATE memory the mirror can see.
    pub(crate) fn owner(&self) -> &PgmapOwner {
        &self.owner
    }

    /// Faults `range` in for `access`: afterwards the table maps it, until the next invalidation.
    ///
    /// Wraps `hmm_range_fault()`. May sleep; the mmap lock must not be held.
    ///
    /// # Errors
    ///
    /// `EFAULT` when there is nothing to map or the process is gone, `EPERM` for a write to what
    /// is read-only, `EBUSY` when invalidations keep coming for a second, `EINTR` for a task that
    /// was killed, `ENOMEM`.
    pub(crate) fn fault(&self, range: Range<usize>, access: Access) -> Result {
        self.walk(range, Some(access), |_| {})
    }

    /// Maps what is present of `range`, without faulting anything in, and returns how many pages
    /// of it are on the device. May sleep.
    pub(crate) fn refresh(&self, range: Range<usize>) -> Result<usize> {
        let mut pages = 0;
        self.walk(range, None, |page| {
            // SAFETY: The table is locked and the sequence checked: the page is mapped.
            if unsafe { bindings::zdm_is_device_private_page(page.as_ptr()) } {
                pages += 1;
            }
        })?;
        Ok(pages)
    }

    /// Takes a reference on the PRIVATE page of ours that is mapped at `address`. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT` when there is none, else as [`HmmMirror::fault`].
    pub(crate) fn get_device_folio(&self, address: usize) -> Result<DeviceFolioRef> {
        let mut found = None;
        self.walk(address..address + PAGE_SIZE, None, |page| {
            // SAFETY: The table is locked and the sequence checked: the page is mapped.
            if unsafe { bindings::zdm_is_device_private_page(page.as_ptr()) } {
                // SAFETY: As above.
                if unsafe { bindings::zdm_folio_try_get(page.as_ptr()) } {
                    // SAFETY: We just took the reference.
                    found = Some(unsafe { DeviceFolioRef::from_raw(page) });
                }
            }
        })?;
        found.ok_or(ENOENT)
    }

    /// Walks `range`, faults in what is not there for `fault`, and stores what is found, calling
    /// `f` for each page under the lock.
    fn walk(
        &self,
        range: Range<usize>,
        fault: Option<Access>,
        mut f: impl FnMut(NonNull<bindings::page>),
    ) -> Result {
        let mm = self.mm().mmget_not_zero().ok_or(EFAULT)?;
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start.saturating_add(BATCH * PAGE_SIZE));
            self.walk_batch(&mm, start..end, fault, &mut f)?;
            start = end;
        }
        Ok(())
    }

    fn walk_batch(
        &self,
        mm: &MmWithUser,
        range: Range<usize>,
        fault: Option<Access>,
        f: &mut impl FnMut(NonNull<bindings::page>),
    ) -> Result {
        let mut pfns = [0usize; BATCH];
        let pages = (range.end - range.start) >> PAGE_SHIFT;
        let write = fault == Some(Access::Write);
        // SAFETY: Always safe.
        let flags = fault.map_or(0, |_| unsafe { bindings::zdm_hmm_pfn_req(write) });
        let mut owner = self.owner.as_ptr();
        let deadline = Deadline::after_ms(bindings::HMM_RANGE_DEFAULT_TIMEOUT);
        loop {
            check_signals()?;
            if deadline.passed() {
                return Err(EBUSY);
            }
            let seq = self.notifier.read_begin();
            let mut hmm_range = bindings::hmm_range {
                notifier: self.notifier.as_raw(),
                notifier_seq: seq.0,
                start: range.start,
                end: range.end,
                hmm_pfns: pfns.as_mut_ptr(),
                default_flags: flags,
                pfn_flags_mask: 0,
                dev_private_owner: owner,
            };
            let guard = mm.mmap_read_lock();
            // SAFETY: The mmap lock is held, the array has an entry for each page of the range.
            let result = to_result(unsafe { bindings::hmm_range_fault(&mut hmm_range) });
            drop(guard);
            match result {
                Err(err) if err == EBUSY => continue,
                other => other?,
            }
            let table = self.notifier.data().table.lock();
            if self.notifier.read_retry(seq) {
                continue;
            }
            if write && !pfns[..pages].iter().all(|&entry| is_writable(entry)) {
                // A PRIVATE page of the owner's is reported as it is, without the write fault that
                // was asked for. As nobody's it is brought back and its sharing broken (or the
                // write refused), like any other page.
                owner = core::ptr::null_mut();
                continue;
            }
            for (i, index) in (range.start >> PAGE_SHIFT..range.end >> PAGE_SHIFT).enumerate() {
                // `i` stays below BATCH by the size of the range.
                let Some(page) = hmm_page(pfns[i]) else {
                    continue;
                };
                f(page);
                // SAFETY: Under the lock and after the sequence was checked the page is mapped, so
                // in use; a PRIVATE page is one of `owner`, whose pagemaps are `DevPagemap`s.
                if let Some(page) = NonNull::new(unsafe { contents(page.as_ptr()) }) {
                    table.store(index, page, is_writable(pfns[i]))?;
                }
            }
            return Ok(());
        }
    }

    /// Copies pages from `start` on to `buf`, up to its end or the first page that the table does
    /// not map, and returns how many. May sleep.
    pub(crate) fn read(&self, start: usize, buf: &mut [u8]) -> Result<usize> {
        let table = self.notifier.data().table.lock();
        let mut pages = 0;
        for (i, chunk) in buf.chunks_exact_mut(PAGE_SIZE).enumerate() {
            let Some(page) = table.load((start >> PAGE_SHIFT) + i, Access::Read) else {
                break;
            };
            // SAFETY: The chunk is valid for a page of writes. The CPU may write the page at the
            // same time, as it may for any device: the bytes are the user's, not ours.
            unsafe { page.read_raw(chunk.as_mut_ptr(), 0, PAGE_SIZE) }?;
            pages += 1;
        }
        Ok(pages)
    }

    /// Copies pages from `buf` to `start` on, up to its end or the first page that the table does
    /// not map for writing, and returns how many. May sleep.
    pub(crate) fn write(&self, start: usize, buf: &[u8]) -> Result<usize> {
        let table = self.notifier.data().table.lock();
        let mut pages = 0;
        for (i, chunk) in buf.chunks_exact(PAGE_SIZE).enumerate() {
            let Some(page) = table.load((start >> PAGE_SHIFT) + i, Access::Write) else {
                break;
            };
            // SAFETY: The chunk is valid for a page of reads; as to races see `read()`.
            unsafe { page.write_raw(chunk.as_ptr(), 0, PAGE_SIZE) }?;
            pages += 1;
        }
        Ok(pages)
    }
}

/// Whether an output entry may be written through.
fn is_writable(entry: usize) -> bool {
    // SAFETY: Always safe.
    unsafe { bindings::zdm_hmm_pfn_writable(entry) }
}

/// The page of an output entry, `None` when there is none or it cannot be accessed.
fn hmm_page(entry: usize) -> Option<NonNull<bindings::page>> {
    // SAFETY: Valid entries hold the number of a page with a struct page.
    NonNull::new(unsafe { bindings::zdm_hmm_pfn_page(entry) })
}
