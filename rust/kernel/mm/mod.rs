// SPDX-License-Identifier: GPL-2.0

//! Abstractions for ZONE_DEVICE memory, HMM and migration.
//!
//! Only this folder has `unsafe` code. Names follow the C side, as if the files were in
//! `rust/kernel/mm/` of the kernel; nothing here knows the driver.
//!
//! How the types fit together:
//!
//! ```text
//!  Registration::private() ---> Registration<T> : DevPagemap<T>       T: PagemapOps, PrivateOps
//!          |                       |        ^                              |
//!          v                       |        | retire()                     | migrate_to_ram()
//!      FreeRegion ---> FreeFolio --+--------+                              v
//!                      ^  split()  | folio_init(Backing)                  VmFault
//!      FreedFolio -----+  merge()  v                                       | migrate()
//!          ^                LockedDeviceFolio                              |
//!          | folio_free()          |                                       |
//!          |                       v copy_to_device()                      v
//!          +---- core mm     Migration<Setup, M> <--- of_range(Request), of_device_pages(DevicePfns)
//!                                  | ^ copy_to_system()
//!                       M: DeviceMemory, fence()   SystemFolio
//!                                  v copied()
//!                            Migration<Copied, M> ---> Migration<Finalized, M>
//!
//!  PgmapOwner ---> HmmMirror: fault(), read(), write(), make_exclusive(), snapshot(), inspect()
//!                      MmuIntervalNotifier<Table>: the device's page table
//! ```
//!
//! A driver begins with [`registration::Registration`], and moves pages by [`migrate::Migration`].
//! `samples/dmem.rs` is a whole driver.

pub(crate) mod access;
pub(crate) mod backing;
pub(crate) mod cache_line;
mod changes;
pub(crate) mod copy;
pub(crate) mod device_folio;
pub(crate) mod device_memory;
#[cfg(CONFIG_KUNIT = "y")]
mod device_memory_kunit;
pub(crate) mod exclusive;
pub(crate) mod extra_mapping;
pub(crate) mod fault;
pub(crate) mod fill;
mod folio_init;
pub(crate) mod free_folio;
pub(crate) mod free_stack;
pub(crate) mod hmm;
pub(crate) mod inspect;
mod kept;
mod killable;
pub(crate) mod locked_memory;
pub(crate) mod mapped;
pub(crate) mod memory_type;
pub(crate) mod migrate;
mod migrate_copy;
#[cfg(CONFIG_KUNIT = "y")]
mod misuse_kunit;
pub(crate) mod mmap_lock;
pub(crate) mod module;
pub(crate) mod module_scope;
pub(crate) mod moved;
pub(crate) mod notifier;
pub(crate) mod once;
pub(crate) mod owner;
pub(crate) mod page;
mod page_batch;
pub(crate) mod pagemap;
pub(crate) mod pagemap_audit;
pub(crate) mod pagemap_ops;
mod pagemap_pfns;
mod pagemap_refs;
pub(crate) mod pfn_buffer;
pub(crate) mod pin;
pub(crate) mod preempted;
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod prelude;
pub(crate) mod range;
pub(crate) mod region;
pub(crate) mod registration;
pub(crate) mod selection;
pub(crate) mod snapshot;
pub(crate) mod stage;
mod struct_page;
pub(crate) mod survey;
pub(crate) mod system_folio;
pub(crate) mod table;
pub(crate) mod task;
pub(crate) mod walk;
#[cfg(CONFIG_KUNIT = "y")]
mod walk_kunit;
pub(crate) mod watches;
pub(crate) mod whole;

use kernel::error::Error;

pub(crate) use kernel::page::PAGE_SHIFT;
pub(crate) use kernel::page::PAGE_SIZE;

/// Order of a folio that one entry of a page middle directory maps: 9 on x86-64.
pub(crate) const PMD_ORDER: u32 = crate::bindings::PMD_ORDER;

/// Order of a folio that one entry of a page upper directory maps: 18 on x86-64.
pub(crate) const PUD_ORDER: u32 = crate::bindings::PUD_ORDER;

/// `EOPNOTSUPP`, which the kernel crate has from Linux 7.3 on.
pub(crate) fn not_supported() -> Error {
    // CAST: Error numbers are below 4096.
    Error::from_errno(-(crate::bindings::EOPNOTSUPP as i32))
}

/// `EDEADLK`, which the kernel crate has from Linux 7.3 on.
pub(crate) fn would_deadlock() -> Error {
    // CAST: Error numbers are below 4096.
    Error::from_errno(-(crate::bindings::EDEADLK as i32))
}

#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod kunit;
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod kunit_device;
