// SPDX-License-Identifier: GPL-2.0

//! Registered buffers of io_uring: long-term pins for writing that the kernel itself makes.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::io_uring::{io_uring_params, io_uring_register_op};

use crate::memory::Buffer;
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
        let vec = buf.iovec(first, n);
        let vec = std::ptr::from_ref(&vec).cast();
        self.call(io_uring_register_op::IORING_REGISTER_BUFFERS, vec)
    }

    /// Makes the ring hold a file, also after the process has closed it.
    pub fn register_file(&self, file: impl AsFd) -> io::Result<()> {
        let fd = file.as_fd().as_raw_fd();
        let fds = std::ptr::from_ref(&fd).cast();
        self.call(io_uring_register_op::IORING_REGISTER_FILES, fds)
    }

    pub fn unregister(&self) -> io::Result<()> {
        let op = io_uring_register_op::IORING_UNREGISTER_BUFFERS;
        self.call(op, std::ptr::null())
    }

    /// Registers one element at `arg`, or none at NULL.
    fn call(&self, op: io_uring_register_op, arg: *const libc::c_void) -> io::Result<()> {
        let n = u32::from(!arg.is_null());
        let (fd, op) = (self.0.as_raw_fd(), op as libc::c_uint);
        // SAFETY: The callers pass NULL or an element that outlives the call. The kernel checks the
        // addresses and descriptors in it.
        cvt(unsafe { libc::syscall(libc::SYS_io_uring_register, fd, op, arg, n) }).map(drop)
    }
}
