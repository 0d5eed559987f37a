// SPDX-License-Identifier: GPL-2.0

//! A CPU fault on device memory.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h), `struct vm_fault`

use super::{
    memory_type::MemoryType,
    migrate::{
        Migration,
        PfnBuffer,
        Request,
        Select,
        Setup, //
    },
    page::PageView,
    pagemap::PgmapOwner,
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
}

impl FaultError {
    pub(super) fn to_vm_fault(self) -> bindings::vm_fault_t {
        match self {
            Self::Oom => bindings::VM_FAULT_OOM,
            Self::Sigbus => bindings::VM_FAULT_SIGBUS,
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
/// `vmf` is a valid fault for `'a`, its area is locked for reading and its page is locked and
/// referenced, all by the current task.
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
        // INVARIANT: By the caller's contract.
        Self {
            // SAFETY: By the caller's contract.
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
    pub(crate) fn vma(&self) -> &VmaRef {
        // SAFETY: The area is valid and locked by the type invariants.
        unsafe { VmaRef::from_raw(self.vmf.__bindgen_anon_1.vma) }
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
        let (start, order) = (self.address(), self.order());
        let request = Request {
            vma: self.vma(),
            start,
            end: start + (PAGE_SIZE << order),
            select: Select::Device(MemoryType::Private),
            large: order > 0,
            owner: self.owner,
        };
        // SAFETY: The page is the locked one of the fault by the type invariants.
        unsafe { Migration::of_fault(buffer, &request, self.vmf.page) }
    }
}
