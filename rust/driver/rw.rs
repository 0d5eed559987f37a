// SPDX-License-Identifier: GPL-2.0

//! The device reads and writes the address space that it mirrors.

#![forbid(unsafe_code)]

use super::client::Client;
use crate::mm::{
    copy::Stop,
    migrate::bytes,
    table::Access,
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
const COPY_PAGES: usize = 64;

/// What an access came to.
#[derive(Default)]
pub(super) struct Outcome {
    /// Pages copied.
    pub(super) pages: usize,
    /// Times that the device had to fault.
    pub(super) faults: usize,
}

impl Outcome {
    /// Of an access that counts pages only.
    pub(super) fn pages(pages: usize) -> Self {
        Self { pages, faults: 0 }
    }
}

/// How the device faults in what it does not map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Faulting {
    /// Not at all.
    Never,
    /// With the mmap lock held.
    Locked,
    /// The handler of the fault may drop the mmap lock.
    Unlocked,
}

/// Pages of `range`, up to what is copied at a time.
fn batch(range: &Range<usize>) -> usize {
    ((range.end - range.start) >> PAGE_SHIFT).min(COPY_PAGES)
}

/// Where to put the bytes when user memory has to be faulted in, which must not happen while the
/// table is locked. Allocated when it is needed first.
struct Bounce(KVVec<u8>);

impl Bounce {
    fn new() -> Self {
        Self(KVVec::new())
    }

    fn get(&mut self, pages: usize) -> Result<&mut [u8]> {
        if self.0.len() < bytes(pages) {
            self.0 = KVVec::from_elem(0, bytes(pages), GFP_KERNEL)?;
        }
        Ok(&mut self.0[..bytes(pages)])
    }
}

impl Client {
    /// Copies `range` to user memory at `to`, faulting in what the device does not map as told,
    /// or `ENOENT` at a page that it does not map. May sleep.
    pub(super) fn read(
        &self,
        range: Range<usize>,
        to: UserPtr,
        faulting: Faulting,
    ) -> Result<Outcome> {
        let mut out = Outcome::default();
        let mut bounce = Bounce::new();
        let mut left = range.clone();
        while !left.is_empty() {
            check_signals()?;
            let user = to.wrapping_byte_add(left.start - range.start);
            let (pages, stop) = self.mirror().copy_to_user(left.start, batch(&left), user);
            out.pages += pages;
            left.start += bytes(pages);
            match stop {
                Stop::Done => {}
                Stop::Unmapped => {
                    self.device_fault(left.clone(), Access::Read, faulting, &mut out)?;
                }
                Stop::UserFault => {
                    let user = to.wrapping_byte_add(left.start - range.start);
                    let buf = bounce.get(batch(&left))?;
                    let pages = self.mirror().read(left.start, buf);
                    let mut writer = UserSlice::new(user, bytes(pages)).writer();
                    writer.write_slice(&buf[..bytes(pages)])?;
                    out.pages += pages;
                    left.start += bytes(pages);
                }
            }
        }
        Ok(out)
    }

    /// Copies user memory at `from` to `range`, faulting in what the device may not write. May
    /// sleep.
    pub(super) fn write(&self, range: Range<usize>, from: UserPtr) -> Result<Outcome> {
        let mut out = Outcome::default();
        let mut bounce = Bounce::new();
        let mut left = range.clone();
        while !left.is_empty() {
            check_signals()?;
            let user = from.wrapping_byte_add(left.start - range.start);
            let (pages, stop) = self.mirror().copy_from_user(left.start, batch(&left), user);
            out.pages += pages;
            left.start += bytes(pages);
            match stop {
                Stop::Done => {}
                Stop::Unmapped => {
                    self.device_fault(left.clone(), Access::Write, Faulting::Locked, &mut out)?;
                }
                Stop::UserFault => {
                    let user = from.wrapping_byte_add(left.start - range.start);
                    let buf = bounce.get(batch(&left))?;
                    UserSlice::new(user, buf.len()).reader().read_slice(buf)?;
                    let end = left.start + buf.len();
                    self.write_bounced(left.start..end, buf, &mut out)?;
                    left.start = end;
                }
            }
        }
        Ok(out)
    }

    /// Copies `buf` to `range`, which is as long.
    fn write_bounced(&self, range: Range<usize>, buf: &[u8], out: &mut Outcome) -> Result {
        let mut done = 0;
        while done < buf.len() {
            check_signals()?;
            let start = range.start + done;
            let pages = self.mirror().write(start, &buf[done..]);
            if pages == 0 {
                self.device_fault(start..range.end, Access::Write, Faulting::Locked, out)?;
            }
            out.pages += pages;
            done += bytes(pages);
        }
        Ok(())
    }

    fn device_fault(
        &self,
        range: Range<usize>,
        access: Access,
        faulting: Faulting,
        out: &mut Outcome,
    ) -> Result {
        match faulting {
            Faulting::Never => return Err(ENOENT),
            Faulting::Locked => self.mirror().fault(range, access)?,
            Faulting::Unlocked => self.mirror().fault_unlocked(range, access)?,
        }
        out.faults += 1;
        self.device().core.stats.device_faults.add(1);
        Ok(())
    }

    /// Faults `range` in for `access` and copies nothing. May sleep.
    pub(super) fn fault(&self, range: Range<usize>, access: Access) -> Result {
        self.device_fault(range, access, Faulting::Locked, &mut Outcome::default())
    }
}
