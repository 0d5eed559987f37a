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

use crate::memory::Buffer;

/// An io_uring with registered buffers. Dropping it ends the registration.
pub struct Uring(IoUring);

impl Uring {
    pub fn new() -> io::Result<Self> {
        IoUring::new(4).map(Self)
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
        // SAFETY: The kernel checks the addresses. The accesses to a buffer are all volatile.
        unsafe { self.0.submitter().register_buffers(&[buf.iovec(first, n)]) }
    }

    /// Makes the ring hold a file, also after the process has closed it.
    pub fn register_file(&self, file: impl AsFd) -> io::Result<()> {
        self.0
            .submitter()
            .register_files(&[file.as_fd().as_raw_fd()])
    }

    pub fn unregister(&self) -> io::Result<()> {
        self.0.submitter().unregister_buffers()
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
