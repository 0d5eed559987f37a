// SPDX-License-Identifier: GPL-2.0

//! userfaultfd(2): the process itself provides missing pages.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use linux_raw_sys::general::{
    _UFFDIO_MOVE, UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT_FLAG_WP, UFFDIO,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, uffdio_api, uffdio_copy, uffdio_move,
    uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT, UFFDIO_ZEROPAGE,
};
use nix::request_code_readwrite;

use crate::memory::{Buffer, PAGE};
use crate::sys::{self, cvt};

/// linux-raw-sys lacks this number, which linux/userfaultfd.h composes.
const UFFDIO_MOVE: u64 = request_code_readwrite!(UFFDIO, _UFFDIO_MOVE, size_of::<uffdio_move>());
/// linux-raw-sys lacks this flag of linux/userfaultfd.h.
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

/// linux-raw-sys lacks these of linux/userfaultfd.h, which came with Linux 7.3.
const UFFDIO_REGISTER_MODE_RWP: u32 = 8;
const UFFDIO_RWPROTECT_MODE_RWP: u64 = 1;
const UFFDIO_RWPROTECT: u64 = request_code_readwrite!(UFFDIO, 9, size_of::<uffdio_writeprotect>());
/// The feature that `hide` needs.
pub const RWP: u64 = 1 << 17;

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
        Self::with_features(0)
    }

    /// With features of the kernel that a program must ask for.
    pub fn with_features(features: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: The call takes only numbers.
        let fd = cvt(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        // CAST: Descriptors fit an int.
        // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let uffd = Self { file };
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features,
            ioctls: 0,
        };
        uffd.ioctl(UFFDIO_API, &mut api)?;
        Ok(uffd)
    }

    /// Executes an ioctl. `arg` has the size that `request` has.
    fn ioctl<T>(&self, request: impl Into<u64>, arg: &mut T) -> io::Result<()> {
        let request = request.into();
        let size = (request >> 16) as usize & 0x3fff;
        if size != size_of::<T>() {
            return Err(io::Error::other("argument is not what its ioctl says"));
        }
        let (fd, arg) = (self.file.as_raw_fd(), std::ptr::from_mut(arg));
        // SAFETY: `arg` outlives the call and has the right size, which is checked above. The
        // addresses in it are those of `Buffer`s, whose accesses are all volatile.
        let ret = unsafe { libc::ioctl(fd, request, arg) };
        cvt(ret.into()).map(drop)
    }

    /// Makes the kernel report faults on missing pages of the buffer.
    pub fn register(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        self.register_for(buf, first, n, UFFDIO_REGISTER_MODE_MISSING)
    }

    /// Makes the kernel report writes to pages that `protect` has protected.
    pub fn register_writes(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        self.register_for(buf, first, n, UFFDIO_REGISTER_MODE_WP)
    }

    /// Makes the kernel report all accesses to pages that `hide` has protected.
    pub fn register_accesses(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        self.register_for(buf, first, n, UFFDIO_REGISTER_MODE_RWP)
    }

    fn register_for(&self, buf: &Buffer, first: usize, n: usize, mode: u32) -> io::Result<()> {
        let mut arg = uffdio_register {
            range: range(buf, first, n),
            mode: mode.into(),
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
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
        if n != message.len() || u32::from(message[0]) != UFFD_EVENT_PAGEFAULT {
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
            protected: number(8) & u64::from(UFFD_PAGEFAULT_FLAG_WP) != 0,
        }))
    }

    /// Write-protects pages, or ends the protection, which wakes the waiting tasks.
    pub fn protect(&self, buf: &Buffer, first: usize, n: usize, how: bool) -> io::Result<()> {
        let mode = if how { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        let range = range(buf, first, n);
        self.ioctl(
            UFFDIO_WRITEPROTECT,
            &mut uffdio_writeprotect { range, mode },
        )
    }

    /// Protects pages against reads and writes, or ends the protection.
    pub fn hide(&self, buf: &Buffer, first: usize, n: usize, how: bool) -> io::Result<()> {
        let mode = if how { UFFDIO_RWPROTECT_MODE_RWP } else { 0 };
        let range = range(buf, first, n);
        // `struct uffdio_rwprotect` has the same fields.
        self.ioctl(UFFDIO_RWPROTECT, &mut uffdio_writeprotect { range, mode })
    }

    /// Provides a page of zeroes for a missing page.
    pub fn zero(&self, buf: &Buffer, page: usize) -> io::Result<()> {
        let mut arg = uffdio_zeropage {
            range: range(buf, page, 1),
            mode: 0,
            zeropage: 0,
        };
        self.ioctl(UFFDIO_ZEROPAGE, &mut arg)
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
        let mut arg = uffdio_move {
            dst: to.at(at),
            src: from.at(first),
            len: (n * PAGE) as u64,
            mode: 0,
            move_: 0,
        };
        let result = self.ioctl(UFFDIO_MOVE, &mut arg);
        // The field has the number of moved bytes, or a negative errno. If an error comes after
        // some bytes, the call itself only fails with EAGAIN.
        match (result, usize::try_from(arg.move_)) {
            (_, Ok(bytes)) if bytes > 0 => Ok(bytes / PAGE),
            (Err(e), _) => Err(e),
            (Ok(()), _) => Ok(0),
        }
    }

    /// Provides the contents of a page of `from` for a missing page.
    pub fn copy(&self, address: u64, from: &Buffer, page: usize) -> io::Result<()> {
        let mut arg = uffdio_copy {
            dst: address & !(PAGE as u64 - 1),
            src: from.at(page),
            len: PAGE as u64,
            mode: 0,
            copy: 0,
        };
        self.ioctl(UFFDIO_COPY, &mut arg)
    }
}

/// The range of pages of a buffer.
fn range(buf: &Buffer, first: usize, n: usize) -> uffdio_range {
    uffdio_range {
        start: buf.at(first),
        len: (n * PAGE) as u64,
    }
}
