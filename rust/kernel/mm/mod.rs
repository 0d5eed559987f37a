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
//! A driver begins with [`Registration`](pagemap::registration::Registration), and moves pages by
//! [`Migration`](migrate::migration::Migration). `samples/dmem.rs` is a whole driver.
//!
//! # Contexts and units
//!
//! A function that may sleep says so. Any other function may be called in any context, in an interrupt and under a
//! spinlock, too. The end of a value may sleep if the function that makes the value may, unless the documentation of the
//! type says that it does not. Where a function may sleep it says which locks the caller must not hold.
//!
//! Addresses and lengths are in bytes, and ends are exclusive. Numbers of pages and of page frames are of pages of
//! [`PAGE_SIZE`] bytes. An order `n` stands for `1 << n` pages.
//!
//! A task with a [`Migration`](migrate::migration::Migration), or in the handler of a CPU fault on device memory,
//! has locked pages of user memory. What could wait for such a page, for the mmap lock, or for the end of a
//! registration fails with `EDEADLK` then.
//!
//! A folder imports only folders that stand before it in this list:
//!
//! | folder | what belongs there |
//! |---|---|
//! | [`module`] | what keeps a module loaded, or ends its registrations, while the kernel may call into it |
//! | [`sync`] | words that several tasks write; waits, deadlines and fatal signals |
//! | [`user`] | the address space of a process: ranges, mmap lock, pins, notifiers of changes |
//! | [`region`] | device memory before it is in use: physical ranges, types, owners, free folios |
//! | [`page`] | `struct page`, folios in use of the device and of the system, memory behind a page |
//! | [`migrate`] | a migration from its selection to its end, and the trait of what copies the contents |
//! | [`pagemap`] | registration, the driver's callbacks and CPU faults, references, free pages that become folios |
//! | [`hmm`] | the mirror of an address space: page table, faults, copies, exclusive access, snapshots |
//! | `kunit`, `prelude` | the device of KUnit cases and examples; the names that a driver starts with |
//! | [`oracle`] | what compares pages and page tables, and breaks them, to test; no driver needs it |

pub(crate) mod hmm;
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod kunit;
pub(crate) mod migrate;
pub(crate) mod module;
pub(crate) mod oracle;
pub(crate) mod page;
pub(crate) mod pagemap;
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod prelude;
pub(crate) mod region;
pub(crate) mod sync;
pub(crate) mod user;

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
