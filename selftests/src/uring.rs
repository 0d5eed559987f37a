// SPDX-License-Identifier: GPL-2.0

//! Registered buffers of io_uring: long-term pins for writing that the kernel itself makes.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::io_uring::{io_uring_params, io_uring_register_op};

use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

/// An io_uring with registered buffers. Dropping it ends the registration.
pub struct Uring(File);

impl Uring {
    pub fn new() -> io::Result<Self> {
        // SAFETY: All zeroes is a valid value of this structure, which requests nothing special.
        let mut params: io_uring_params = unsafe { std::mem::zeroed() };
        // SAFETY: `params` outlives the call.
        let fd = cvt(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut params) })?;
        // CAST: Descriptors fit an int.
        // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) })))
    }

    /// Makes an io_uring with pages registered as one buffer.
    pub fn with_buffer(buf: &Buffer, first: usize, n: usize) -> io::Result<Self> {
        let ring = Self::new()?;
        ring.register(buf, first, n)?;
        Ok(ring)
    }

    /// Maps the submission ring, which the kernel shares with the process.
    pub fn ring(&self) -> io::Result<Buffer> {
        Buffer::of_file(&self.0, 1, libc::MAP_SHARED | libc::MAP_POPULATE)
    }

    /// Registers pages as one buffer.
    pub fn register(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        let vec = libc::iovec {
            iov_base: buf.at(first) as *mut libc::c_void,
            iov_len: n * PAGE,
        };
        self.call(io_uring_register_op::IORING_REGISTER_BUFFERS, Some(&vec))
    }

    pub fn unregister(&self) -> io::Result<()> {
        self.call(io_uring_register_op::IORING_UNREGISTER_BUFFERS, None)
    }

    fn call(&self, op: io_uring_register_op, vec: Option<&libc::iovec>) -> io::Result<()> {
        let n = u32::from(vec.is_some());
        let vec = vec.map_or(std::ptr::null(), std::ptr::from_ref);
        let (fd, op) = (self.0.as_raw_fd(), op as libc::c_uint);
        // SAFETY: The iovec is valid or null, and the kernel checks the addresses in it.
        cvt(unsafe { libc::syscall(libc::SYS_io_uring_register, fd, op, vec, n) }).map(drop)
    }
}
