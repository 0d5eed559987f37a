// SPDX-License-Identifier: GPL-2.0

//! The device reads and writes the address space that it mirrors.

#![forbid(unsafe_code)]

use super::file::Opener;
use crate::mm::{
    hmm::Access,
    migrate::bytes,
    task::check_signals,
    PAGE_SHIFT, //
};
use core::ops::Range;
use kernel::{
    prelude::*,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// Pages that are copied under the table's lock at a time.
const BOUNCE_PAGES: usize = 64;

/// What an access came to.
#[derive(Default)]
pub(super) struct Outcome {
    /// Pages copied.
    pub(super) pages: usize,
    /// Times that the device had to fault.
    pub(super) faults: usize,
}

fn bounce(range: &Range<usize>) -> Result<KVVec<u8>> {
    let pages = ((range.end - range.start) >> PAGE_SHIFT).min(BOUNCE_PAGES);
    Ok(KVVec::from_elem(0, bytes(pages), GFP_KERNEL)?)
}

impl Opener {
    /// Copies `range` to user memory at `to`, faulting in what the device does not map. May sleep.
    pub(super) fn read(&self, range: Range<usize>, to: UserPtr) -> Result<Outcome> {
        let mut out = Outcome::default();
        self.copy_out(range, to, &mut out, |range, out| {
            self.device_fault(range, Access::Read, out)
        })?;
        Ok(out)
    }

    /// Copies `range` to user memory at `to`; `ENOENT` at a page that the device does not map.
    pub(super) fn read_mapped(&self, range: Range<usize>, to: UserPtr) -> Result<Outcome> {
        let mut out = Outcome::default();
        self.copy_out(range, to, &mut out, |_, _| Err(ENOENT))?;
        Ok(out)
    }

    fn copy_out(
        &self,
        range: Range<usize>,
        to: UserPtr,
        out: &mut Outcome,
        mut fault: impl FnMut(Range<usize>, &mut Outcome) -> Result,
    ) -> Result {
        let mut bounce = bounce(&range)?;
        let mut user = UserSlice::new(to, range.end - range.start).writer();
        let mut start = range.start;
        while start < range.end {
            check_signals()?;
            let room = bounce.len().min(range.end - start);
            let pages = self.mirror().read(start, &mut bounce[..room])?;
            if pages == 0 {
                fault(start..range.end, out)?;
                continue;
            }
            user.write_slice(&bounce[..bytes(pages)])?;
            out.pages += pages;
            start += bytes(pages);
        }
        Ok(())
    }

    /// Copies user memory at `from` to `range`, faulting in what the device may not write. May
    /// sleep.
    pub(super) fn write(&self, range: Range<usize>, from: UserPtr) -> Result<Outcome> {
        let mut out = Outcome::default();
        let mut bounce = bounce(&range)?;
        let mut user = UserSlice::new(from, range.end - range.start).reader();
        let mut start = range.start;
        while start < range.end {
            let len = bounce.len().min(range.end - start);
            user.read_slice(&mut bounce[..len])?;
            let mut done = 0;
            while done < len {
                check_signals()?;
                let pages = self.mirror().write(start + done, &bounce[done..len])?;
                if pages == 0 {
                    self.device_fault(start + done..range.end, Access::Write, &mut out)?;
                }
                done += bytes(pages);
                out.pages += pages;
            }
            start += len;
        }
        Ok(out)
    }

    fn device_fault(&self, range: Range<usize>, access: Access, out: &mut Outcome) -> Result {
        self.mirror().fault(range, access)?;
        out.faults += 1;
        self.device().core.stats.device_faults.add(1);
        Ok(())
    }
}
