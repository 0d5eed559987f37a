// SPDX-License-Identifier: GPL-2.0

//! Missing pages that the process itself provides: userfaultfd(2).

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::memory::{Buffer, PAGE};
use crate::sys::{self, cvt};

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

/// A userfaultfd.
pub struct Uffd {
    file: File,
}

impl Uffd {
    pub fn new() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes numbers only.
        let fd = cvt(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        // CAST: descriptors fit an int.
        // SAFETY: the kernel just made this descriptor for us and nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let uffd = Self { file };
        uffd.ioctl(UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        Ok(uffd)
    }

    /// `arg` has the length that the size in `request` says.
    fn ioctl<const N: usize>(&self, request: u64, arg: &mut [u64; N]) -> io::Result<()> {
        let size = (request >> 16) as usize & 0x3fff;
        if size != size_of_val(arg) {
            return Err(io::Error::other("argument is not what its ioctl says"));
        }
        // SAFETY: `arg` outlives the call and has the right size, checked above.
        // Addresses in it are those of `Buffer`s, whose accesses are all volatile.
        let ret = unsafe { libc::ioctl(self.file.as_raw_fd(), request, arg.as_mut_ptr()) };
        cvt(ret.into()).map(drop)
    }

    /// From now on a page of the buffer that is missing is an event.
    pub fn register(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        let len = (n * PAGE) as u64;
        self.ioctl(
            UFFDIO_REGISTER,
            &mut [buf.at(first), len, REGISTER_MODE_MISSING, 0],
        )
    }

    /// The address of the next missing page, or `None` after `timeout`.
    pub fn next(&self, timeout: Duration) -> io::Result<Option<u64>> {
        if !sys::readable(&self.file, timeout)? {
            return Ok(None);
        }
        let mut message = [0u8; 32];
        let n = (&self.file).read(&mut message)?;
        if n != message.len() || message[0] != EVENT_PAGEFAULT {
            return Err(io::Error::other(format!(
                "event of {n} bytes: {message:x?}"
            )));
        }
        let address = message[16..24].iter().rev();
        Ok(Some(address.fold(0, |n, b| (n << 8) | u64::from(*b))))
    }

    /// Provides a missing page, with the contents of a page of `from`.
    pub fn copy(&self, address: u64, from: &Buffer, page: usize) -> io::Result<()> {
        let address = address & !(PAGE as u64 - 1);
        self.ioctl(
            UFFDIO_COPY,
            &mut [address, from.at(page), PAGE as u64, 0, 0],
        )
    }
}
