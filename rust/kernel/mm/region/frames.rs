// SPDX-License-Identifier: GPL-2.0

//! Ranges of physical addresses.
//!
//! C header: [`include/linux/ioport.h`](srctree/include/linux/ioport.h)

use crate::{
    bindings,
    mm::{
        would_deadlock,
        PAGE_SHIFT, //
    },
};
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sizes::SZ_2M,
    str::CString, //
};

/// Why a range is refused.
///
/// # Examples
///
/// ```
/// use kernel::mm::{
///     pagemap::registration::Registration,
///     region::{frames::RegionError, owner::PgmapOwner},
/// };
/// # use kernel::{mm::kunit::device::NoPages, module::this_module};
///
/// let owner = PgmapOwner::new(this_module::<LocalModule>())?;
/// let refused = Registration::private(4096, owner, |_frames| Ok(NoPages));
/// let err = refused.err().ok_or(EINVAL)?;
/// assert_eq!(err, RegionError::Unaligned);
/// assert_eq!(Error::from(err), EINVAL);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegionError {
    /// Start or length is no multiple of 2 MiB, or there is nothing in it.
    Unaligned,
    /// The region is beyond the addresses that the machine has.
    OutOfRange,
    /// Some of it is the system's own memory.
    SystemRam,
    /// Some of it was not set aside: it may be the memory of another device.
    NotReserved,
    /// Part of the region has another owner.
    Busy,
    /// No addresses or no memory are left.
    NoSpace,
    /// The task has a migration, or handles a fault on device memory. Registering takes the memory hotplug lock,
    /// whose holder may wait for a page that the task has locked.
    Locked,
}

impl RegionError {
    /// The reason in words, for a line of the log that begins with the region.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Unaligned => "is not a multiple of 2 MiB",
            Self::OutOfRange => "is beyond the machine's physical addresses",
            Self::SystemRam => "overlaps System RAM",
            Self::NotReserved => "is not reserved memory (memmap=SIZE$START)",
            Self::Busy => "overlaps memory that is in use",
            Self::NoSpace => "does not fit: no addresses or no memory are left",
            Self::Locked => "cannot be registered by a task that has locked pages",
        }
    }
}

impl From<RegionError> for Error {
    fn from(err: RegionError) -> Self {
        match err {
            RegionError::NoSpace => ENOMEM,
            RegionError::Locked => would_deadlock(),
            _ => EINVAL,
        }
    }
}

/// A range of page frames.
///
/// # Examples
///
/// ```
/// use kernel::mm::region::{frames::Frames, free_stack::FreeStack};
///
/// /// The free pages of a driver.
/// fn new_pages(frames: Frames) -> Result<FreeStack> {
///     pr_debug!("{} pages from {:#x} on\n", frames.pages(), frames.first_pfn());
///     FreeStack::new(frames)
/// }
/// # assert!(new_pages(Frames::for_test(512))?.is_empty());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frames {
    first_pfn: usize,
    pages: usize,
}

impl Frames {
    /// Number of the first page frame.
    pub(crate) fn first_pfn(&self) -> usize {
        self.first_pfn
    }

    /// Number of page frames.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Frames beyond all physical addresses, for KUnit cases.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn for_test(pages: usize) -> Self {
        Self {
            first_pfn: 1 << 52,
            pages,
        }
    }
}

/// A range of physical addresses, given back when dropped.
///
/// # Invariants
///
/// The range is registered in `iomem_resource`, and ours.
pub(in crate::mm) struct MemRegion {
    start: u64,
    /// As it was asked for.
    bytes: u64,
    /// As it is registered, which may be more.
    registered: u64,
    /// The name there. It is a copy, because a region that cannot be given back outlives the module.
    _name: CString,
}

impl MemRegion {
    /// Checks the `bytes` at `start`, and returns their number and the last address.
    fn check(start: u64, bytes: usize) -> Result<(u64, u64), RegionError> {
        // CAST: `usize` has 64 bits.
        let len = bytes as u64;
        let align = SZ_2M as u64;
        if len == 0 || len % align != 0 || start % align != 0 {
            return Err(RegionError::Unaligned);
        }
        let end = start.checked_add(len).ok_or(RegionError::OutOfRange)?;
        // SAFETY: The function reads constants of the running machine.
        if end - 1 > unsafe { bindings::zdm_max_phys() } {
            return Err(RegionError::OutOfRange);
        }
        Ok((len, end - 1))
    }

    /// Takes `bytes`, a multiple of 2 MiB, that no memory of the machine answers to, and calls the range
    /// `name`. May sleep.
    ///
    /// Wraps `request_free_mem_region()`, which rounds up to whole sections.
    pub(in crate::mm) fn request_free(bytes: usize, name: &CStr) -> Result<Self, RegionError> {
        let (len, _) = Self::check(0, bytes)?;
        let name = CString::try_from(name).map_err(|_| RegionError::NoSpace)?;
        let raw = name.as_char_ptr();
        // SAFETY: `iomem_resource` is a static of the kernel, the name lives as long as the region.
        let res = from_err_ptr(unsafe {
            bindings::request_free_mem_region(&raw mut bindings::iomem_resource, bytes, raw)
        })
        .map_err(|_| RegionError::NoSpace)?;
        // SAFETY: The resource is ours until it is released.
        let (start, end) = unsafe { ((*res).start, (*res).end) };
        // INVARIANT: Registered above.
        Ok(Self {
            start,
            bytes: len,
            registered: end - start + 1,
            _name: name,
        })
    }

    /// Takes the `bytes` at `start`, both multiples of 2 MiB, of memory that was set aside. May sleep.
    ///
    /// Wraps `request_mem_region()`.
    fn request(start: u64, bytes: usize, name: &CStr) -> Result<Self, RegionError> {
        let (len, last) = Self::check(start, bytes)?;
        // SAFETY: The function looks a range of addresses up, which was checked above.
        if unsafe { bindings::zdm_is_system_ram(start, bytes) } {
            return Err(RegionError::SystemRam);
        }
        let descs = [
            bindings::IORES_DESC_RESERVED,
            bindings::IORES_DESC_SOFT_RESERVED,
        ];
        // No two of them overlap.
        if descs
            .map(|desc| covered(start, last, desc))
            .iter()
            .sum::<u64>()
            != len
        {
            return Err(RegionError::NotReserved);
        }
        let name = CString::try_from(name).map_err(|_| RegionError::NoSpace)?;
        // SAFETY: The name lives as long as the region.
        if !unsafe { bindings::zdm_request_mem_region(start, len, name.as_char_ptr()) } {
            return Err(RegionError::Busy);
        }
        // INVARIANT: Registered above.
        Ok(Self {
            start,
            bytes: len,
            registered: len,
            _name: name,
        })
    }

    /// First and last address.
    pub(in crate::mm) fn range(&self) -> bindings::range {
        bindings::range {
            start: self.start,
            end: self.start + self.bytes - 1,
        }
    }

    /// The page frames, aligned to 2 MiB.
    pub(in crate::mm) fn frames(&self) -> Frames {
        // CAST: Page frame numbers fit `usize`.
        Frames {
            first_pfn: (self.start >> PAGE_SHIFT) as usize,
            pages: (self.bytes >> PAGE_SHIFT) as usize,
        }
    }
}

/// Bytes of the addresses from `start` to `last` that resources of type `desc` cover.
fn covered(start: u64, last: u64, desc: u32) -> u64 {
    let mut bytes: u64 = 0;
    // CAST: `usize` has 64 bits.
    let (desc, flags) = (desc as usize, bindings::IORESOURCE_MEM as usize);
    let arg = (&raw mut bytes).cast();
    // Where there is no such resource the function returns an error.
    // SAFETY: `add_bytes` takes the pointer to `bytes`, which outlives the call.
    let _ =
        unsafe { bindings::walk_iomem_res_desc(desc, flags, start, last, arg, Some(add_bytes)) };
    bytes
}

/// # Safety
///
/// `resource` must be valid, and `bytes` must point to a `u64` that nothing else uses.
unsafe extern "C" fn add_bytes(resource: *mut bindings::resource, bytes: *mut c_void) -> c_int {
    // SAFETY: `resource` is valid by the contract of this function.
    let (start, end) = unsafe { ((*resource).start, (*resource).end) };
    // SAFETY: `bytes` points to a `u64` by the contract of this function.
    unsafe { *bytes.cast::<u64>() += end - start + 1 };
    0
}

/// Memory that the machine has, and that the firmware or the command line of the kernel has set aside: the
/// system does not use it, nor does another driver while this lives. It is given back when dropped.
///
/// The firmware may use it. `Soft Reserved` is memory that the firmware leaves to drivers. `Reserved` is memory
/// that `memmap=SIZE$START` sets aside, and also memory that the firmware keeps for itself: SMM, tables, runtime
/// services of EFI. `/proc/iomem` calls both the same, and a module cannot tell them apart: the firmware's own table, from
/// before the command line changed it, is exported to KVM only (`e820__mapped_raw_any()`), and of the table of
/// EFI, which not every machine has, the kernel keeps a part (`efi_mem_desc_lookup()`). So the address must be
/// one that the administrator gave, as a parameter of the module, and not one that a driver has chosen.
///
/// # Examples
///
/// ```
/// use kernel::mm::{
///     pagemap::registration::Registration,
///     region::{
///         frames::{RegionError, ReservedRegion},
///         free_folio::FreeRegion,
///         owner::PgmapOwner,
///     },
/// };
/// # use kernel::{mm::kunit::device::NoPages, module::this_module, sync::Arc};
///
/// /// Registers the memory that the administrator named.
/// fn register(
///     memory: Result<ReservedRegion, RegionError>,
///     owner: Arc<PgmapOwner>,
/// ) -> Result<(Registration<NoPages>, FreeRegion), RegionError> {
///     let memory = memory.inspect_err(|err| pr_debug!("the memory {}\n", err.reason()))?;
///     Registration::coherent(memory, owner, |_frames| Ok(NoPages))
/// }
/// # let owner = PgmapOwner::new(this_module::<LocalModule>())?;
/// # let refused = register(Err(RegionError::SystemRam), owner).map(drop);
/// assert_eq!(refused, Err(RegionError::SystemRam));
/// # Ok::<(), Error>(())
/// ```
#[must_use = "the memory is given back at once"]
pub(crate) struct ReservedRegion(MemRegion);

impl ReservedRegion {
    /// Takes the `bytes` at physical address `start`, both multiples of 2 MiB, and calls them `name` in
    /// `/proc/iomem`. May sleep.
    ///
    /// Wraps `request_mem_region()`.
    ///
    /// # Errors
    ///
    /// [`RegionError::NotReserved`] unless all of it is `Reserved` or `Soft Reserved`: other memory may be a
    /// device's, whose driver has not claimed it yet. `Busy` when a driver has claimed some of it.
    ///
    /// # Safety
    ///
    /// The firmware must not use the memory: the administrator of the machine must have set it aside.
    pub(crate) unsafe fn request(
        start: u64,
        bytes: usize,
        name: &CStr,
    ) -> Result<Self, RegionError> {
        MemRegion::request(start, bytes, name).map(Self)
    }

    pub(in crate::mm) fn into_inner(self) -> MemRegion {
        self.0
    }
}

impl Drop for MemRegion {
    fn drop(&mut self) {
        // SAFETY: The region is ours by the type invariants of `MemRegion`, and nothing lies in it any
        // more.
        unsafe { bindings::zdm_release_mem_region(self.start, self.registered) };
    }
}

#[kunit_tests(zdmirror_region)]
mod tests {
    use super::*;

    const LEN: usize = SZ_2M;

    #[test]
    fn sizes_that_no_machine_has() {
        for bytes in [1 << 57, 1 << 63, usize::MAX - (LEN - 1)] {
            let refused = MemRegion::request_free(bytes, c"kunit");
            assert_eq!(refused.err(), Some(RegionError::OutOfRange));
            let refused = MemRegion::request(0, bytes, c"kunit");
            assert_eq!(refused.err(), Some(RegionError::OutOfRange));
        }
        for bytes in [0, 1, LEN - 1, LEN + 4096] {
            let refused = MemRegion::request_free(bytes, c"kunit");
            assert_eq!(refused.err(), Some(RegionError::Unaligned));
        }
    }

    #[test]
    fn only_reserved_memory_is_given() -> Result {
        let free = MemRegion::request_free(LEN, c"kunit")?;
        // Addresses that another driver has, and those next to them, which nothing is at.
        for start in [free.start, free.start - LEN as u64] {
            let refused = MemRegion::request(start, LEN, c"kunit");
            assert_eq!(refused.err(), Some(RegionError::NotReserved));
        }
        let refused = MemRegion::request(u64::MAX - (LEN as u64 - 1), LEN, c"kunit");
        assert_eq!(refused.err(), Some(RegionError::OutOfRange));
        Ok(())
    }
}
