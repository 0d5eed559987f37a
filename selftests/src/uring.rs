// SPDX-License-Identifier: GPL-2.0

//! Registered buffers of io_uring: long-term pins for writing that the kernel itself makes.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

const REGISTER_BUFFERS: libc::c_uint = 0;
const UNREGISTER_BUFFERS: libc::c_uint = 1;
/// The size of `struct io_uring_params` in bytes; zeroes request nothing special.
const PARAMS: usize = 120;

/// An io_uring with registered buffers. Dropping it ends the registration.
pub struct Uring(File);

impl Uring {
    pub fn new() -> io::Result<Self> {
        let mut params = [0u64; PARAMS / 8];
        // SAFETY: `params` has the size of the structure and outlives the call.
        let fd = cvt(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) })?;
        // CAST: Descriptors fit an int.
        // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) })))
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
        let fd = self.0.as_raw_fd();
        // SAFETY: The iovec is valid, and the kernel checks the addresses in it.
        let ret =
            unsafe { libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_BUFFERS, &vec, 1) };
        cvt(ret).map(drop)
    }

    pub fn unregister(&self) -> io::Result<()> {
        let (fd, none) = (self.0.as_raw_fd(), std::ptr::null::<libc::iovec>());
        // SAFETY: The call takes only numbers.
        let ret =
            unsafe { libc::syscall(libc::SYS_io_uring_register, fd, UNREGISTER_BUFFERS, none, 0) };
        cvt(ret).map(drop)
    }
}
