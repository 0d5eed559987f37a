// SPDX-License-Identifier: GPL-2.0

//! Types of ZONE_DEVICE memory, and what this kernel can do with each.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use crate::{
    bindings,
    mm::PMD_ORDER, //
};

/// `enum memory_type`, as far as this module registers it.
///
/// # Examples
///
/// ```
/// use kernel::mm::{region::memory_type::MemoryType, PMD_ORDER};
///
/// assert!(MemoryType::Private.is_migratable());
/// // With transparent huge pages this kernel may migrate large folios, too.
/// assert!(MemoryType::Private.max_order() <= PMD_ORDER);
/// assert_eq!(MemoryType::name(MemoryType::PRIVATE), "PRIVATE");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryType {
    /// Memory that the CPU cannot reach.
    Private,
    /// Memory that the CPU reaches as its own.
    Coherent,
    /// Memory that the CPU reaches as its own, and that may be pinned for long. Device-dax registers it, too.
    Generic,
}

impl MemoryType {
    /// The result of [`PageView::memory_type`](crate::mm::page::view::PageView::memory_type) for PRIVATE
    /// memory.
    pub(crate) const PRIVATE: u32 = bindings::MEMORY_DEVICE_PRIVATE;

    /// The name of `enum memory_type` value `raw`, without its prefix.
    pub(crate) fn name(raw: u32) -> &'static str {
        match raw {
            bindings::MEMORY_DEVICE_PRIVATE => "PRIVATE",
            bindings::MEMORY_DEVICE_COHERENT => "COHERENT",
            bindings::MEMORY_DEVICE_FS_DAX => "FS_DAX",
            bindings::MEMORY_DEVICE_GENERIC => "GENERIC",
            bindings::MEMORY_DEVICE_PCI_P2PDMA => "PCI_P2PDMA",
            _ => "unknown",
        }
    }

    /// References that a free page of `enum memory_type` value `raw` has in this kernel. Only
    /// GENERIC memory of a kernel that keeps the rule from before Linux 5.18 has one.
    pub(crate) fn free_refs(raw: u32) -> i32 {
        i32::from(raw == bindings::MEMORY_DEVICE_GENERIC && !Self::Generic.is_migratable())
    }

    /// Whether a pagemap of `enum memory_type` value `raw` has a reference for each page in use,
    /// and not one for each page that it has.
    pub(crate) fn counts_used_pages(raw: u32) -> bool {
        raw == bindings::MEMORY_DEVICE_PRIVATE || raw == bindings::MEMORY_DEVICE_COHERENT
    }

    pub(in crate::mm) fn raw(self) -> bindings::memory_type {
        match self {
            Self::Private => bindings::MEMORY_DEVICE_PRIVATE,
            Self::Coherent => bindings::MEMORY_DEVICE_COHERENT,
            Self::Generic => bindings::MEMORY_DEVICE_GENERIC,
        }
    }

    /// Flags by which `migrate_vma_setup()` selects pages of such memory; 0 where this kernel cannot.
    pub(in crate::mm) fn select_flags(self) -> usize {
        match self {
            Self::Private => bindings::MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
            Self::Coherent => bindings::MIGRATE_VMA_SELECT_DEVICE_COHERENT,
            // SAFETY: The function reads a constant of the running kernel.
            Self::Generic => unsafe { bindings::zdm_migrate_select_generic() },
        }
    }

    /// `PGMAP_*` flags without which this kernel migrates no pages to and from such memory.
    pub(in crate::mm) fn pagemap_flags(self) -> u32 {
        // SAFETY: The function reads a constant of the kernel that the module was built for.
        unsafe { bindings::zdm_pgmap_migratable_flags(self.raw()) }
    }

    /// Whether this kernel migrates pages to and from such memory at all.
    pub(crate) fn is_migratable(self) -> bool {
        self.select_flags() != 0
    }

    /// The largest order of a folio that this kernel can migrate to and from such memory. May sleep.
    ///
    /// Wraps `migrate_device_max_order()`.
    ///
    /// A kernel with `migrate_device_max_order()` says so itself. One without it knows large
    /// folios in PRIVATE memory only: it would not take a large COHERENT one back out. Where nothing
    /// is migrated to such memory the order is 0.
    pub(crate) fn max_order(self) -> u32 {
        if !self.is_migratable() {
            return 0;
        }
        // SAFETY: The function takes any type of memory, and the caller may sleep.
        let said = unsafe { bindings::zdm_migrate_device_max_order(self.raw()) };
        if let Ok(order) = u32::try_from(said) {
            return order.min(PMD_ORDER);
        }
        // SAFETY: The function reads a constant of the running kernel.
        let thp = unsafe { bindings::zdm_thp_migration_supported() };
        if self == Self::Private && thp {
            PMD_ORDER
        } else {
            0
        }
    }
}
