// SPDX-License-Identifier: GPL-2.0

//! Loads and stores of a device.

/// The access that the device wants.
///
/// # Examples
///
/// ```
/// use kernel::mm::{copy::Stop, access::Access};
/// # use kernel::{mm::{kunit::anon_range, kunit_device::EmulatedDevice}, page::PAGE_SIZE};
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
