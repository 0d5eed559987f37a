// SPDX-License-Identifier: GPL-2.0

//! Long-term pins: the PIN_LONGTERM_TEST commands of the kernel's gup_test.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

/// Long-term pins by CONFIG_GUP_TEST's file, which end when the file is closed.
pub struct LongTermPin {
    file: File,
    /// At least the number of pinned pages.
    pages: usize,
}

impl LongTermPin {
    const START: u64 = 0x4018_6707;
    const STOP: u64 = 0x6708;
    const READ: u64 = 0x4008_6709;
    const WRITE_FLAG: u64 = 1;
    const FAST_FLAG: u64 = 2;

    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file, pages: 0 })
    }

    fn ioctl(&self, request: u64, arg: *const u64) -> io::Result<()> {
        // SAFETY: The callers pass the structure that the command reads; READ gets the address of
        // room for all pinned pages.
        cvt(unsafe { libc::ioctl(self.file.as_raw_fd(), request, arg) }.into()).map(drop)
    }

    /// Pins pages. `fast` pins without the mmap lock, `write` pins for writing.
    pub fn start(
        &mut self,
        buf: &Buffer,
        first: usize,
        n: usize,
        fast: bool,
        write: bool,
    ) -> io::Result<()> {
        let mut flags = 0;
        flags |= if fast { Self::FAST_FLAG } else { 0 };
        flags |= if write { Self::WRITE_FLAG } else { 0 };
        // The flags are a u32 followed by padding, which has the same bytes as a u64.
        let arg = [buf.at(first), (n * PAGE) as u64, flags];
        self.pages = self.pages.max(n);
        self.ioctl(Self::START, arg.as_ptr())
    }

    /// Reads the pinned pages through the pin.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut data = vec![0; self.pages * PAGE];
        let address = data.as_mut_ptr() as u64;
        self.ioctl(Self::READ, &address)?;
        Ok(data)
    }

    pub fn stop(&mut self) -> io::Result<()> {
        self.ioctl(Self::STOP, std::ptr::null())
    }
}
