// SPDX-License-Identifier: GPL-2.0

//! The device reads and writes the address space that it mirrors.

#![forbid(unsafe_code)]

use super::open_file::Client;
use crate::mm::{
    hmm::{
        access::Access,
        copy::Stop, //
    },
    migrate::migration::bytes,
    sync::task::check_signals,
    user::range::PageRange, //
};
use kernel::{
    prelude::*,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// The number of pages that are copied under the table's lock at a time.
const COPY_PAGES: usize = 64;

/// The result of an access.
#[derive(Default)]
pub(in crate::driver) struct Outcome {
    /// The number of pages copied.
    pub(in crate::driver) pages: usize,
    /// How often the device had to fault.
    pub(in crate::driver) faults: usize,
}

impl Outcome {
    /// The result of an access that only counts pages.
    pub(in crate::driver) fn pages(pages: usize) -> Self {
        Self { pages, faults: 0 }
    }
}

/// The way in which the device faults in pages that it does not map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::driver) enum Faulting {
    /// It does not fault.
    Never,
    /// With the mmap lock held.
    Locked,
    /// The handler of the fault may drop the mmap lock.
    Unlocked,
}

/// A buffer for the bytes when user memory has to be faulted in, which must not happen while the
/// table is locked. It is allocated on first use.
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
    /// Copies `range` to user memory at `to`. Faults in pages that the device does not map, as
    /// `Faulting` says; `ENOENT` for a page that it does not map then. May sleep.
    pub(in crate::driver) fn read(
        &self,
        range: PageRange,
        to: UserPtr,
        faulting: Faulting,
    ) -> Result<Outcome> {
        self.copy(
            range,
            to,
            (Access::Read, faulting),
            |range, to| self.mirror().copy_to_user(range, to),
            |range, buf, to, _| {
                let (pages, stop) = self.mirror().read(range, buf);
                if pages == 0 && stop == Stop::Unreachable {
                    return Err(EFAULT);
                }
                let mut writer = UserSlice::new(to, bytes(pages)).writer();
                writer.write_slice(&buf[..bytes(pages)])?;
                Ok(pages)
            },
        )
    }

    /// Copies user memory at `from` to `range`. Faults in pages that the device may not write. May
    /// sleep.
    pub(in crate::driver) fn write(&self, range: PageRange, from: UserPtr) -> Result<Outcome> {
        self.copy(
            range,
            from,
            (Access::Write, Faulting::Locked),
            |range, from| self.mirror().copy_from_user(range, from),
            |range, buf, from, out| {
                UserSlice::new(from, buf.len()).reader().read_slice(buf)?;
                self.write_buffer(range, buf, out)?;
                Ok(range.pages())
            },
        )
    }

    /// Copies the pages of `range`, from or to user memory at `user`, in batches, and faults in what the
    /// device does not map for the access. `direct` copies as many pages as it can without a fault. Where
    /// user memory has to be faulted in, `bounced` copies, by way of a buffer as long as its range; both
    /// return how many pages. May sleep.
    fn copy(
        &self,
        range: PageRange,
        user: UserPtr,
        (access, faulting): (Access, Faulting),
        direct: impl Fn(PageRange, UserPtr) -> (usize, Stop),
        bounced: impl Fn(PageRange, &mut [u8], UserPtr, &mut Outcome) -> Result<usize>,
    ) -> Result<Outcome> {
        let mut out = Outcome::default();
        let mut bounce = Bounce::new();
        let mut left = Some(range);
        while let Some(rest) = left {
            check_signals()?;
            let user = |at: PageRange| user.wrapping_byte_add(at.start() - range.start());
            let (pages, stop) = direct(rest.first(COPY_PAGES), user(rest));
            out.pages += pages;
            left = rest.skip(pages);
            let Some(rest) = left else { break };
            match stop {
                Stop::Done => {}
                Stop::Unmapped => self.device_fault(rest, access, faulting, &mut out)?,
                Stop::Unreachable => return Err(EFAULT),
                Stop::UserFault => {
                    let batch = rest.first(COPY_PAGES);
                    let buf = bounce.get(batch.pages())?;
                    let pages = bounced(batch, buf, user(rest), &mut out)?;
                    out.pages += pages;
                    left = rest.skip(pages);
                }
            }
        }
        Ok(out)
    }

    /// Copies `buf` to `range`, which has the same length.
    fn write_buffer(&self, range: PageRange, buf: &[u8], out: &mut Outcome) -> Result {
        let mut left = Some(range);
        while let Some(rest) = left {
            check_signals()?;
            let done = rest.start() - range.start();
            let (pages, stop) = self.mirror().write(rest, &buf[done..]);
            match stop {
                Stop::Unreachable => return Err(EFAULT),
                _ if pages == 0 => {
                    self.device_fault(rest, Access::Write, Faulting::Locked, out)?;
                }
                _ => {}
            }
            left = rest.skip(pages);
        }
        Ok(())
    }

    fn device_fault(
        &self,
        range: PageRange,
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
    pub(in crate::driver) fn fault(&self, range: PageRange, access: Access) -> Result {
        self.device_fault(range, access, Faulting::Locked, &mut Outcome::default())
    }
}
