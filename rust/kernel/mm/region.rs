// SPDX-License-Identifier: GPL-2.0

//! Ranges of physical addresses.
//!
//! C header: [`include/linux/ioport.h`](srctree/include/linux/ioport.h)

use super::PAGE_SHIFT;
use crate::bindings;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sizes::SZ_2M,
    str::CString, //
};

/// Why a range cannot be had.
///
/// # Examples
///
/// ```
/// use kernel::mm::{owner::PgmapOwner, region::RegionError, registration::Registration};
/// # use kernel::{mm::kunit_device::NoPages, module::this_module};
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
    /// Part of the region has another owner.
    Busy,
    /// No addresses or no memory are left.
    NoSpace,
}

impl RegionError {
    /// For the log.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Unaligned => "is not a multiple of 2 MiB",
            Self::OutOfRange => "is beyond the machine's physical addresses",
            Self::SystemRam => "overlaps System RAM",
            Self::Busy => "overlaps memory that is in use",
            Self::NoSpace => "cannot be had: no addresses or no memory are left",
        }
    }
}

impl From<RegionError> for Error {
    fn from(err: RegionError) -> Self {
        match err {
            RegionError::NoSpace => ENOMEM,
            _ => EINVAL,
        }
    }
}

/// A range of page frames.
///
/// # Examples
///
/// ```
/// use kernel::mm::{free_stack::FreeStack, region::Frames};
///
/// /// What a driver keeps of its free pages.
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
pub(super) struct MemRegion {
    start: u64,
    /// As it was asked for.
    bytes: u64,
    /// As it is registered, which may be more.
    registered: u64,
    /// The name there. It is a copy, because a region that cannot be given back outlives the module.
    _name: CString,
}

impl MemRegion {
    fn check(start: u64, bytes: usize) -> Result<u64, RegionError> {
        // CAST: `usize` has 64 bits.
        let len = bytes as u64;
        let align = SZ_2M as u64;
        if len == 0 || len % align != 0 || start % align != 0 {
            return Err(RegionError::Unaligned);
        }
        Ok(len)
    }

    /// Takes `bytes`, a multiple of 2 MiB, that no memory of the machine answers to, and calls the range
    /// `name`. May sleep.
    ///
    /// Wraps `request_free_mem_region()`, which rounds up to whole sections.
    pub(super) fn request_free(bytes: usize, name: &CStr) -> Result<Self, RegionError> {
        let len = Self::check(0, bytes)?;
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

    /// Takes the `bytes` at `start`, both multiples of 2 MiB: memory that the machine has but the
    /// system does not use. May sleep.
    ///
    /// Wraps `request_mem_region()`.
    pub(super) fn request(start: u64, bytes: usize, name: &CStr) -> Result<Self, RegionError> {
        let len = Self::check(start, bytes)?;
        let end = start.checked_add(len).ok_or(RegionError::OutOfRange)?;
        // SAFETY: Always safe.
        if end - 1 > unsafe { bindings::zdm_max_phys() } {
            return Err(RegionError::OutOfRange);
        }
        // SAFETY: Always safe.
        if unsafe { bindings::zdm_is_system_ram(start, bytes) } {
            return Err(RegionError::SystemRam);
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
    pub(super) fn range(&self) -> bindings::range {
        bindings::range {
            start: self.start,
            end: self.start + self.bytes - 1,
        }
    }

    /// The page frames, aligned to 2 MiB.
    pub(super) fn frames(&self) -> Frames {
        // CAST: Page frame numbers fit `usize`.
        Frames {
            first_pfn: (self.start >> PAGE_SHIFT) as usize,
            pages: (self.bytes >> PAGE_SHIFT) as usize,
        }
    }
}

impl Drop for MemRegion {
    fn drop(&mut self) {
        // SAFETY: The region is ours by the type invariants, and nothing lies in it any more.
        unsafe { bindings::zdm_release_mem_region(self.start, self.registered) };
    }
}
