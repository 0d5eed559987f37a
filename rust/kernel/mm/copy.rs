// SPDX-License-Identifier: GPL-2.0

//! What the device reads and writes of the address space that it mirrors.
//!
//! Bytes that the CPU may write at the same time are the user's, as they are with any device.

use super::{
    hmm::HmmMirror,
    table::Access,
    PAGE_SHIFT,
    PAGE_SIZE, //
};
use crate::bindings;
use kernel::{
    error::to_result,
    page::BorrowedPage,
    prelude::*,
    uaccess::UserPtr, //
};

/// Why copying ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All pages were copied.
    Done,
    /// The device does not map the next page, or not for this access.
    Unmapped,
    /// The user memory at the other end is not there, or not now.
    UserFault,
}

impl HmmMirror {
    /// Copies pages from `start` on to `buf`, up to its end or the first page that the table does
    /// not map, and returns how many. May sleep.
    pub(crate) fn read(&self, start: usize, buf: &mut [u8]) -> usize {
        let mut chunks = buf.chunks_exact_mut(PAGE_SIZE);
        let pages = chunks.len();
        let (copied, _) = self.each_page(start, pages, Access::Read, |page, _| {
            let chunk = chunks.next().ok_or(EINVAL)?;
            // SAFETY: The chunk is valid for a page of writes.
            unsafe { page.read_raw(chunk.as_mut_ptr(), 0, PAGE_SIZE) }
        });
        copied
    }

    /// Copies pages from `buf` to `start` on, up to its end or the first page that the table does
    /// not map for writing, and returns how many. May sleep.
    pub(crate) fn write(&self, start: usize, buf: &[u8]) -> usize {
        let mut chunks = buf.chunks_exact(PAGE_SIZE);
        let pages = chunks.len();
        let (copied, _) = self.each_page(start, pages, Access::Write, |page, _| {
            let chunk = chunks.next().ok_or(EINVAL)?;
            // SAFETY: The chunk is valid for a page of reads.
            unsafe { page.write_raw(chunk.as_ptr(), 0, PAGE_SIZE) }?;
            mark_dirty(page);
            Ok(())
        });
        copied
    }

    /// Copies `pages` pages from `start` on to user memory of the current task at `to`, and says
    /// how many and why it ended. May sleep, but faults on neither side.
    pub(crate) fn copy_to_user(&self, start: usize, pages: usize, to: UserPtr) -> (usize, Stop) {
        self.each_page(start, pages, Access::Read, |page, offset| {
            let to = to.wrapping_byte_add(offset).as_mut_ptr();
            // SAFETY: The page is valid; the callee checks that `to` is user memory. It does not
            // fault, which could wait for the table's lock.
            let ret = unsafe { bindings::zdm_page_to_user_nofault(to, page.as_ptr()) };
            to_result(ret)
        })
    }

    /// Copies `pages` pages from user memory of the current task at `from` to `start` on, and says
    /// how many and why it ended. May sleep, but faults on neither side. Part of the next page may
    /// have been copied too.
    pub(crate) fn copy_from_user(
        &self,
        start: usize,
        pages: usize,
        from: UserPtr,
    ) -> (usize, Stop) {
        self.each_page(start, pages, Access::Write, |page, offset| {
            let from = from.wrapping_byte_add(offset).as_const_ptr();
            mark_dirty(page);
            // SAFETY: As in `copy_to_user()`.
            let ret = unsafe { bindings::zdm_page_from_user_nofault(page.as_ptr(), from) };
            to_result(ret)
        })
    }

    /// Calls `copy` for `pages` pages from `start` on, with the table locked and the offset in
    /// bytes, until one is not mapped or `copy` fails. Returns how many were copied.
    fn each_page(
        &self,
        start: usize,
        pages: usize,
        access: Access,
        mut copy: impl FnMut(&BorrowedPage<'_>, usize) -> Result,
    ) -> (usize, Stop) {
        let table = self.notifier.data().lock();
        for i in 0..pages {
            let Some(page) = table.load((start >> PAGE_SHIFT) + i, access) else {
                return (i, Stop::Unmapped);
            };
            if copy(&page, i << PAGE_SHIFT).is_err() {
                return (i, Stop::UserFault);
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
