// SPDX-License-Identifier: GPL-2.0

//! A CPU fault on device memory.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h), `struct vm_fault`

use super::{
    memory_type::MemoryType,
    migrate::{
        Area,
        Migration,
        PfnBuffer,
        Request,
        Select,
        Setup, //
    },
    owner::PgmapOwner,
    page::PageView,
    range::PageRange,
    PAGE_SIZE, //
};
use crate::bindings;
use core::ptr::NonNull;
use kernel::{
    mm::{
        virt::VmaRef,
        Mm, //
    },
    prelude::*, //
};

/// How a fault ends that could not be resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultError {
    /// No memory: the fault is tried again after the OOM killer ran.
    Oom,
    /// The task gets `SIGBUS`.
    Sigbus,
    /// The hardware has lost the page: the task gets `SIGBUS` that says so.
    Poisoned,
}

impl FaultError {
    pub(super) fn to_vm_fault(self) -> bindings::vm_fault_t {
        match self {
            Self::Oom => bindings::VM_FAULT_OOM,
            Self::Sigbus => bindings::VM_FAULT_SIGBUS,
            Self::Poisoned => bindings::VM_FAULT_HWPOISON,
        }
    }
}

impl From<Error> for FaultError {
    fn from(err: Error) -> Self {
        if err == ENOMEM {
            Self::Oom
        } else {
            Self::Sigbus
        }
    }
}

/// A fault on a locked PRIVATE page that is being handled.
///
/// # Invariants
///
/// `vmf` is a valid fault for `'a`. The current task holds the mmap lock of its area for reading, and
/// the lock and a reference of its page.
pub(crate) struct VmFault<'a> {
    vmf: &'a bindings::vm_fault,
    owner: &'a PgmapOwner,
    first_pfn: usize,
}

impl<'a> VmFault<'a> {
    /// # Safety
    ///
    /// `vmf` must be the fault that core mm is handling by calling `migrate_to_ram`, on a page of
    /// a pagemap of `owner` that begins with page frame `first_pfn`.
    pub(super) unsafe fn from_raw(
        vmf: *mut bindings::vm_fault,
        owner: &'a PgmapOwner,
        first_pfn: usize,
    ) -> Self {
        // INVARIANT: Core mm calls `migrate_to_ram` with the page locked and referenced, and only
        // with the mmap lock: it retries a fault that came with the lock of the area alone.
        Self {
            // SAFETY: The caller gives the fault that core mm is handling, which lives for `'a`.
            vmf: unsafe { &*vmf },
            owner,
            first_pfn,
        }
    }

    /// Index in the pagemap of the first page of the folio that the fault is about.
    pub(crate) fn index(&self) -> usize {
        self.index_of(self.page().head().pfn())
    }

    /// Index in the pagemap of page frame `pfn`.
    pub(crate) fn index_of(&self, pfn: usize) -> usize {
        pfn.wrapping_sub(self.first_pfn)
    }

    /// Order of what the fault is about: that of the folio where one entry maps all of it, else 0.
    pub(crate) fn order(&self) -> u32 {
        // A folio mapped by more than one entry may be mapped in part only.
        if self.vmf.pte.is_null() {
            self.page().order()
        } else {
            0
        }
    }

    /// Address of the first page of what the fault is about, in bytes.
    pub(crate) fn address(&self) -> usize {
        self.vmf.__bindgen_anon_1.address & !((PAGE_SIZE << self.order()) - 1)
    }

    /// The area that the address lies in.
    pub(crate) fn vma(&self) -> Area<'_> {
        // SAFETY: The area of a valid fault is valid, and the mmap lock is held by the type
        // invariants.
        unsafe { Area::from_locked(VmaRef::from_raw(self.vmf.__bindgen_anon_1.vma)) }
    }

    /// The faulting page, which the fault holds a reference on.
    pub(crate) fn page(&self) -> PageView<'_> {
        // SAFETY: The page is locked and referenced by the type invariants, so it is not NULL and
        // its pagemap stays.
        unsafe { PageView::from_raw(NonNull::new_unchecked(self.vmf.page)) }
    }

    /// The first page of the folio of [`VmFault::page`], which has the folio's counts.
    pub(crate) fn folio(&self) -> PageView<'_> {
        self.page().head()
    }

    /// Whether the fault is one in `mm`.
    pub(crate) fn is_in(&self, mm: &Mm) -> bool {
        // SAFETY: The area is valid and locked by the type invariants, so its address space stays.
        let vm_mm = unsafe { (*self.vmf.__bindgen_anon_1.vma).vm_mm };
        core::ptr::eq(vm_mm, mm.as_raw())
    }

    /// Starts to migrate what the fault is about back. May sleep.
    pub(crate) fn migrate<'b>(&'b self, buffer: &'b mut PfnBuffer) -> Result<Migration<'b, Setup>> {
        let order = self.order();
        let request = Request {
            area: self.vma(),
            range: PageRange::new(self.address(), 1 << order)?,
            select: Select::Device(MemoryType::Private),
            large: order > 0,
            owner: self.owner,
        };
        // SAFETY: The page is the locked one of the fault by the type invariants.
        unsafe { Migration::of_fault(buffer, &request, self.vmf.page) }
    }
}
