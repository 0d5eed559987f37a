// SPDX-License-Identifier: GPL-2.0

//! Loads and stores of a device.

/// The access that the device wants.
///
/// # Examples
///
/// ```
/// use kernel::mm::hmm::{access::Access, copy::Stop};
/// # use kernel::{mm::kunit::{device::EmulatedDevice, support::anon_range}, page::PAGE_SIZE};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let mirror = device.mirror()?;
/// # let bytes = KVec::from_elem(0u8, PAGE_SIZE, GFP_KERNEL)?;
///
/// mirror.fault(range, Access::Read)?;
/// assert_eq!(mirror.write(range, &bytes), (0, Stop::Unmapped));
/// mirror.fault(range, Access::Write)?;
/// assert_eq!(mirror.write(range, &bytes), (1, Stop::Done));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
}

/// The access that an entry allows, as its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::mm) enum Grant {
    /// Loads.
    Read = 0,
    /// Loads and stores.
    Write = 1,
    /// Loads and stores, while the CPU has no access.
    Exclusive = 3,
}

impl Grant {
    pub(super) const MASK: usize = 3;

    /// Of an entry with this tag.
    pub(super) fn of(entry: usize) -> Self {
        match entry & Self::MASK {
            0 => Self::Read,
            1 => Self::Write,
            _ => Self::Exclusive,
        }
    }

    /// Of a mapping that is as the CPU's, of which `write` says whether it may be written.
    pub(super) fn shared(write: bool) -> Self {
        if write {
            Self::Write
        } else {
            Self::Read
        }
    }
}
