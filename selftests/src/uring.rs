// SPDX-License-Identifier: GPL-2.0

//! Registered buffers of io_uring, long-term pins for writing that the kernel itself makes; and requests that
//! threads of the kernel execute for the process.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use io_uring::squeue::Flags;
use io_uring::{IoUring, opcode, types};
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

/// A ring whose requests are executed by a thread of the kernel: by a worker, or by the one that polls the ring.
pub struct Requests(IoUring);

impl Requests {
    /// The ring. With `polled` a thread of the kernel looks for requests.
    pub fn new(polled: bool) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        if polled {
            builder.setup_sqpoll(50);
        }
        builder.build(4).map(Self)
    }

    /// Executes one request. Returns its result.
    ///
    /// # Safety
    ///
    /// The memory that the request names must be valid until this returns.
    unsafe fn execute(&mut self, entry: io_uring::squeue::Entry) -> io::Result<i32> {
        let entry = entry.flags(Flags::ASYNC);
        // SAFETY: By the contract of this function; the request has ended when it returns.
        unsafe { self.0.submission().push(&entry) }.map_err(io::Error::other)?;
        self.0.submit_and_wait(1)?;
        let done = self.0.completion().next();
        let done = done.ok_or_else(|| io::Error::other("no completion"))?;
        match done.result() {
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            result => Ok(result),
        }
    }

    /// Opens a file.
    pub fn open(&mut self, path: &CStr) -> io::Result<File> {
        let here = types::Fd(libc::AT_FDCWD);
        let open = opcode::OpenAt::new(here, path.as_ptr()).flags(libc::O_RDWR);
        // SAFETY: The path outlives the call.
        let fd = unsafe { self.execute(open.build()) }?;
        // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Closes a file.
    pub fn close(&mut self, file: File) -> io::Result<()> {
        let fd = types::Fd(file.into_raw_fd());
        // SAFETY: The request names no memory, and nothing else owns the descriptor.
        unsafe { self.execute(opcode::Close::new(fd).build()) }.map(drop)
    }

    /// Executes what makes no sense for a device: returns the name and the result of each request, which has a
    /// page of `buf` to read or to write.
    pub fn odd(
        &mut self,
        file: impl AsFd,
        buf: &Buffer,
        command: u32,
    ) -> Vec<(&'static str, io::Result<i32>)> {
        let fd = types::Fd(file.as_fd().as_raw_fd());
        let (page, len) = (buf.at(0) as *mut u8, crate::device::PAGE as u32);
        let command = opcode::UringCmd16::new(fd, command);
        let requests = [
            ("read", opcode::Read::new(fd, page, len).build()),
            ("write", opcode::Write::new(fd, page, len).build()),
            ("fsync", opcode::Fsync::new(fd).build()),
            ("fallocate", opcode::Fallocate::new(fd, 4096).build()),
            ("ftruncate", opcode::Ftruncate::new(fd, 4096).build()),
            ("a command", command.build()),
        ];
        requests
            .into_iter()
            // SAFETY: The page is one of `buf`, whose accesses are all volatile.
            .map(|(name, entry)| (name, unsafe { self.execute(entry) }))
            .collect()
    }
}
