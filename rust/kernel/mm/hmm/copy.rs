// SPDX-License-Identifier: GPL-2.0

//! The device's reads and writes of the address space that it mirrors.
//!
//! The CPU may write the same bytes at the same time. As with any device, user space has to order
//! these accesses.

use super::{
    access::Access,
    mirror::HmmMirror, //
};
use crate::{
    bindings,
    mm::{
        sync::task::cond_resched,
        user::range::PageRange,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
};
use kernel::{
    error::to_result,
    page::BorrowedPage,
    prelude::*,
    uaccess::UserPtr, //
};

/// Why copying ended.
///
/// # Examples
///
/// ```
/// use kernel::mm::hmm::{access::Access, copy::Stop};
/// # use kernel::{mm::kunit::{device::EmulatedDevice, support::anon_range}, page::PAGE_SIZE};
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(2)?;
/// # let mirror = device.mirror()?;
///
/// let mut bytes = KVec::from_elem(1u8, 2 * PAGE_SIZE, GFP_KERNEL)?;
/// // Nothing is mapped yet for the device.
/// assert_eq!(mirror.read(range, &mut bytes), (0, Stop::Unmapped));
/// mirror.fault(range, Access::Read)?;
/// assert_eq!(mirror.read(range, &mut bytes), (2, Stop::Done));
/// assert!(bytes.iter().all(|&byte| byte == 0));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All pages were copied.
    Done,
    /// The device does not map the next page, or not for this access.
    Unmapped,
    /// The user memory at the other end is not accessible now.
    UserFault,
    /// The next page is mapped, but the kernel cannot reach its contents: the hardware has lost them.
    Unreachable,
}

/// Pages that are copied before invalidations and other tasks get their turn.
const BATCH: usize = 64;

// Invalidations wait while these functions copy a batch.
impl HmmMirror {
    /// Copies whole pages of `range` to `buf`, up to the end of either, and says how many and why it ended. Pages that
    /// the device does not map are not faulted in. May sleep.
    pub(crate) fn read(&self, range: PageRange, buf: &mut [u8]) -> (usize, Stop) {
        let range = range.first(buf.len() >> PAGE_SHIFT);
        let mut chunks = buf.chunks_exact_mut(PAGE_SIZE);
        self.each_page(range, Access::Read, |page, _| {
            let chunk = chunks.next().ok_or(Stop::Done)?;
            // SAFETY: The chunk is a page long. The table keeps the page valid while it is borrowed.
            // User space may write the page at the same time, which a copy in C allows for.
            let ret = unsafe { bindings::zdm_read_page(chunk.as_mut_ptr().cast(), page.as_ptr()) };
            to_result(ret).map_err(|_| Stop::Unreachable)
        })
    }

    /// Copies whole pages from `buf` to `range`, up to the end of either, and says how many and why it
    /// ended. Pages that the device may not write are not faulted in. May sleep.
    pub(crate) fn write(&self, range: PageRange, buf: &[u8]) -> (usize, Stop) {
        let range = range.first(buf.len() >> PAGE_SHIFT);
        let mut chunks = buf.chunks_exact(PAGE_SIZE);
        self.each_page(range, Access::Write, |page, _| {
            let chunk = chunks.next().ok_or(Stop::Done)?;
            // SAFETY: The chunk is a page long. The table keeps the page valid while it is borrowed.
            // User space may access the page at the same time, which a copy in C allows for.
            let ret = unsafe { bindings::zdm_write_page(page.as_ptr(), chunk.as_ptr().cast()) };
            mark_dirty(page);
            to_result(ret).map_err(|_| Stop::Unreachable)
        })
    }

    /// Copies the pages of `range` to user memory of the current task at `to`, and says how many and
    /// why it ended. May sleep, but faults on neither side. A page that the kernel cannot reach is
    /// reported as [`Stop::UserFault`] too; [`HmmMirror::read`] tells the two apart.
    ///
    /// # Examples
    ///
    /// ```
    /// use kernel::{
    ///     mm::hmm::{access::Access, copy::Stop},
    ///     uaccess::UserPtr, //
    /// };
    /// # use kernel::mm::kunit::{device::EmulatedDevice, support::{anon_range, touch}};
    /// # let device = EmulatedDevice::new()?;
    /// # let (range, other) = (anon_range(1)?, anon_range(1)?);
    /// # let mirror = device.mirror()?;
    ///
    /// mirror.fault(range, Access::Write)?;
    /// let user = UserPtr::from_addr(other.start());
    /// // A driver faults the user memory in, or copies by way of a buffer, and tries again.
    /// assert_eq!(mirror.copy_to_user(range, user), (0, Stop::UserFault));
    /// touch(other)?;
    /// assert_eq!(mirror.copy_to_user(range, user), (1, Stop::Done));
    /// // And in the other direction.
    /// assert_eq!(mirror.copy_from_user(range, user), (1, Stop::Done));
    /// # Ok::<(), Error>(())
    /// ```
    pub(crate) fn copy_to_user(&self, range: PageRange, to: UserPtr) -> (usize, Stop) {
        self.each_page(range, Access::Read, |page, offset| {
            let to = to.wrapping_byte_add(offset).as_mut_ptr();
            // SAFETY: The table keeps the page valid while it is borrowed. The callee checks that `to`
            // is user memory, and does not fault, which could wait for the table's lock.
            let ret = unsafe { bindings::zdm_page_to_user_nofault(to, page.as_ptr()) };
            to_result(ret).map_err(|_| Stop::UserFault)
        })
    }

    /// Copies user memory of the current task at `from` to the pages of `range`, and says how many
    /// and why it ended. May sleep, but faults on neither side. Part of the next page may have been
    /// copied too. A page that the kernel cannot reach is reported as [`Stop::UserFault`] too;
    /// [`HmmMirror::write`] tells the two apart.
    pub(crate) fn copy_from_user(&self, range: PageRange, from: UserPtr) -> (usize, Stop) {
        self.each_page(range, Access::Write, |page, offset| {
            let from = from.wrapping_byte_add(offset).as_const_ptr();
            mark_dirty(page);
            // SAFETY: The table keeps the page valid while it is borrowed. The callee checks that
            // `from` is user memory, and does not fault, which could wait for the table's lock.
            let ret = unsafe { bindings::zdm_page_from_user_nofault(page.as_ptr(), from) };
            to_result(ret).map_err(|_| Stop::UserFault)
        })
    }

    /// Calls `copy` for the pages of `range`, with the table locked and the offset in bytes, until a
    /// page is not mapped or `copy` says why to stop. Returns how many were copied.
    fn each_page(
        &self,
        range: PageRange,
        access: Access,
        mut copy: impl FnMut(&BorrowedPage<'_>, usize) -> Result<(), Stop>,
    ) -> (usize, Stop) {
        let mut pages = 0;
        for batch in range.batches(BATCH) {
            if pages > 0 {
                cond_resched();
            }
            let table = self.notifier.lock();
            for address in batch.addresses() {
                let Some(page) = table.load(address >> PAGE_SHIFT, access) else {
                    return (pages, Stop::Unmapped);
                };
                if let Err(stop) = copy(&page, pages << PAGE_SHIFT) {
                    return (pages, stop);
                }
                pages += 1;
            }
        }
        (pages, Stop::Done)
    }
}

/// Tells core mm that the device writes a page, whose CPU page table entry may be clean.
fn mark_dirty(page: &BorrowedPage<'_>) {
    // SAFETY: The page is mapped and stays so while it is borrowed from the locked table, so it
    // cannot be truncated meanwhile.
    unsafe { bindings::zdm_mark_dirty(page.as_ptr()) };
}
