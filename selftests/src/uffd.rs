// SPDX-License-Identifier: GPL-2.0

//! userfaultfd(2): the process itself provides missing pages.

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
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_MOVE: u64 = 0xc028_aa05;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
const WRITEPROTECT_MODE_WP: u64 = 1;
const PAGEFAULT_FLAG_WP: u64 = 2;

/// A fault that the process has to resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub address: u64,
    /// Whether the fault is a write to a write-protected page; otherwise the page is missing.
    pub protected: bool,
}

/// A userfaultfd.
pub struct Uffd {
    file: File,
}

impl Uffd {
    pub fn new() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: The call takes only numbers.
        let fd = cvt(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        // CAST: Descriptors fit an int.
        // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let uffd = Self { file };
        uffd.ioctl(UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        Ok(uffd)
    }

    /// Executes an ioctl. `arg` has the length that the size in `request` says.
    fn ioctl<const N: usize>(&self, request: u64, arg: &mut [u64; N]) -> io::Result<()> {
        let size = (request >> 16) as usize & 0x3fff;
        if size != size_of_val(arg) {
            return Err(io::Error::other("argument is not what its ioctl says"));
        }
        // SAFETY: `arg` outlives the call and has the right size, which is checked above. The
        // addresses in it are those of `Buffer`s, whose accesses are all volatile.
        let ret = unsafe { libc::ioctl(self.file.as_raw_fd(), request, arg.as_mut_ptr()) };
        cvt(ret.into()).map(drop)
    }

    /// Makes the kernel report faults on missing pages of the buffer.
    pub fn register(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        self.register_for(buf, first, n, REGISTER_MODE_MISSING)
    }

    /// Makes the kernel report writes to pages that `protect` has protected.
    pub fn register_writes(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        self.register_for(buf, first, n, REGISTER_MODE_WP)
    }

    fn register_for(&self, buf: &Buffer, first: usize, n: usize, mode: u64) -> io::Result<()> {
        let len = (n * PAGE) as u64;
        self.ioctl(UFFDIO_REGISTER, &mut [buf.at(first), len, mode, 0])
    }

    /// Waits for a fault on a missing page and returns its address, or `None` after `timeout`.
    pub fn next(&self, timeout: Duration) -> io::Result<Option<u64>> {
        Ok(self.next_fault(timeout)?.map(|fault| fault.address))
    }

    /// Waits for a fault, and returns `None` after `timeout`.
    pub fn next_fault(&self, timeout: Duration) -> io::Result<Option<Fault>> {
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
        let number = |at: usize| {
            let bytes = message[at..at + 8].iter().rev();
            bytes.fold(0, |n, b| (n << 8) | u64::from(*b))
        };
        Ok(Some(Fault {
            address: number(16),
            protected: number(8) & PAGEFAULT_FLAG_WP != 0,
        }))
    }

    /// Write-protects pages, or ends the protection, which wakes the waiting tasks.
    pub fn protect(&self, buf: &Buffer, first: usize, n: usize, how: bool) -> io::Result<()> {
        let mode = if how { WRITEPROTECT_MODE_WP } else { 0 };
        let len = (n * PAGE) as u64;
        self.ioctl(UFFDIO_WRITEPROTECT, &mut [buf.at(first), len, mode])
    }

    /// Provides a page of zeroes for a missing page.
    pub fn zero(&self, buf: &Buffer, page: usize) -> io::Result<()> {
        self.ioctl(UFFDIO_ZEROPAGE, &mut [buf.at(page), PAGE as u64, 0, 0])
    }

    /// Moves pages of a process into a hole. Returns the number of moved pages.
    pub fn move_pages(
        &self,
        from: &Buffer,
        first: usize,
        n: usize,
        to: &Buffer,
        at: usize,
    ) -> io::Result<usize> {
        let len = (n * PAGE) as u64;
        let mut arg = [to.at(at), from.at(first), len, 0, 0];
        let result = self.ioctl(UFFDIO_MOVE, &mut arg);
        // The field has the number of moved bytes, or a negative errno. If an error comes after
        // some bytes, the call itself only fails with EAGAIN.
        // CAST: The kernel stores a signed number in the field.
        match (result, usize::try_from(arg[4] as i64)) {
            (_, Ok(bytes)) if bytes > 0 => Ok(bytes / PAGE),
            (Err(e), _) => Err(e),
            (Ok(()), _) => Ok(0),
        }
    }

    /// Provides the contents of a page of `from` for a missing page.
    pub fn copy(&self, address: u64, from: &Buffer, page: usize) -> io::Result<()> {
        let address = address & !(PAGE as u64 - 1);
        self.ioctl(
            UFFDIO_COPY,
            &mut [address, from.at(page), PAGE as u64, 0, 0],
        )
    }
}
