// SPDX-License-Identifier: GPL-2.0

//! System calls on other processes and their memory, and on sockets that carry files and pages.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::memory::Buffer;
use crate::sys::cvt;

/// The room for one control message with one descriptor, as `CMSG_SPACE(sizeof(int))` says.
const CONTROL: usize = 24;

/// A message of one byte with room for a descriptor, for `f`.
fn with_message<T>(f: impl FnOnce(&mut libc::msghdr) -> T) -> T {
    let mut byte = [0u8; 1];
    let mut vec = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: byte.len(),
    };
    // Words, for the alignment of the header.
    let mut control = [0u64; CONTROL / 8];
    // SAFETY: All zeroes is a valid value of this structure.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL;
    f(&mut message)
}

/// Sends a copy of a descriptor through a socket.
pub fn send_file(socket: &UnixStream, file: impl AsFd) -> io::Result<()> {
    with_message(|message| {
        // SAFETY: The control buffer is long enough for a header and a descriptor, and aligned.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            // CAST: A constant of a few bytes.
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
            let data = libc::CMSG_DATA(header).cast::<i32>();
            data.write_unaligned(file.as_fd().as_raw_fd());
        }
        // SAFETY: The message and its buffers outlive the call.
        cvt(unsafe { libc::sendmsg(socket.as_raw_fd(), message, 0) } as libc::c_long).map(drop)
    })
}

/// Receives a descriptor from a socket.
pub fn receive_file(socket: &UnixStream) -> io::Result<File> {
    with_message(|message| {
        let flags = libc::MSG_CMSG_CLOEXEC;
        // SAFETY: The message and its buffers outlive the call.
        cvt(unsafe { libc::recvmsg(socket.as_raw_fd(), message, flags) } as libc::c_long)?;
        // SAFETY: The kernel has filled in the length of the control buffer.
        let header = unsafe { libc::CMSG_FIRSTHDR(message) };
        if header.is_null() {
            return Err(io::Error::other("a message without a descriptor"));
        }
        // SAFETY: There is a header, which the kernel has written together with a descriptor.
        let fd = unsafe { libc::CMSG_DATA(header).cast::<i32>().read_unaligned() };
        // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    })
}

/// Moves bytes from a pipe to a socket, or the other way round, with splice(2), without waiting.
pub fn splice(from: impl AsFd, to: impl AsFd, bytes: usize) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let none = std::ptr::null_mut();
    // SAFETY: The call takes only numbers and no offsets.
    let ret = unsafe { libc::splice(from, none, to, none, bytes, libc::SPLICE_F_NONBLOCK) };
    cvt(ret as libc::c_long).map(|n| n as usize)
}

/// Gives a second pipe the pages that a pipe holds, with tee(2).
pub fn tee(from: &File, to: &File, bytes: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK;
    // SAFETY: The call takes only numbers.
    let ret = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), bytes, flags) };
    cvt(ret as libc::c_long).map(|n| n as usize)
}

/// Writes pages of the caller to process `pid` at the addresses of `to`, with process_vm_writev(2).
pub fn write_process(
    pid: i32,
    from: &Buffer,
    to: &Buffer,
    first: usize,
    n: usize,
) -> io::Result<usize> {
    let (local, remote) = (from.iovec(0, n), to.iovec(first, n));
    // SAFETY: Both iovecs are valid. The kernel checks the addresses in them, and reads a buffer.
    let ret = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    cvt(ret as libc::c_long).map(|n| n as usize)
}

/// Becomes the tracer of process `pid`, which goes on running.
pub fn trace(pid: i32) -> io::Result<()> {
    // SAFETY: This request takes only numbers.
    cvt(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) }).map(drop)
}

/// Stops a traced process, and waits until it has stopped.
pub fn stop_traced(pid: i32) -> io::Result<()> {
    // SAFETY: This request takes only numbers.
    cvt(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0) })?;
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    cvt(unsafe { libc::waitpid(pid, &mut status, libc::__WALL) }.into())?;
    match libc::WIFSTOPPED(status) {
        true => Ok(()),
        false => Err(io::Error::other("the traced process has ended")),
    }
}

/// Writes a word to a stopped process, as a debugger does.
pub fn poke(pid: i32, address: u64, word: u64) -> io::Result<()> {
    // SAFETY: The kernel checks the address, which is one of the other process.
    cvt(unsafe { libc::ptrace(libc::PTRACE_POKEDATA, pid, address, word) }).map(drop)
}

/// Lets a stopped process go on without a tracer.
pub fn untrace(pid: i32) -> io::Result<()> {
    // SAFETY: This request takes only numbers.
    cvt(unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, 0, 0) }).map(drop)
}

/// A process, which stays the same one when its number is used again.
pub struct PidFd(OwnedFd);

impl PidFd {
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: The call takes only numbers.
        let fd = cvt(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // CAST: Descriptors fit an int.
        // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Gives an advice on memory of the process, at the addresses of `buf`, with process_madvise(2).
    pub fn advise(&self, buf: &Buffer, first: usize, n: usize, advice: i32) -> io::Result<usize> {
        let (fd, vec) = (self.0.as_raw_fd(), buf.iovec(first, n));
        let vec = std::ptr::from_ref(&vec);
        // SAFETY: The iovec is valid. The kernel checks the address in it, and no advice that it takes for
        // another process changes contents.
        cvt(unsafe { libc::syscall(libc::SYS_process_madvise, fd, vec, 1, advice, 0) })
            .map(|n| n as usize)
    }

    /// Frees the memory of the process, which is dying, with process_mrelease(2).
    pub fn free_memory(&self) -> io::Result<()> {
        let fd = self.0.as_raw_fd();
        // SAFETY: The call takes only numbers.
        cvt(unsafe { libc::syscall(libc::SYS_process_mrelease, fd, 0) }).map(drop)
    }
}

/// Lets `file` stay open across execve(2).
pub fn keep_across_exec(file: impl AsFd) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into()).map(drop)
}

/// Sends SIGALRM to the process each time it has existed for so many microseconds more; 0 ends it.
pub fn alarm_every(us: i64) -> io::Result<()> {
    let time = libc::timeval {
        tv_sec: 0,
        tv_usec: us,
    };
    let timer = libc::itimerval {
        it_interval: time,
        it_value: time,
    };
    // SAFETY: The structure outlives the call, and the old value is not wanted.
    cvt(unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) }.into())
        .map(drop)
}

#[cfg(test)]
mod unit {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn room_for_a_descriptor() {
        // SAFETY: The macro computes a number.
        let space = unsafe { libc::CMSG_SPACE(size_of::<i32>() as u32) };
        assert_eq!(space as usize, CONTROL);
    }

    #[test]
    fn files_pass_through_sockets() {
        let (one, other) = UnixStream::pair().unwrap();
        let (mut reader, writer) = crate::sys::pipe().unwrap();
        send_file(&one, &writer).unwrap();
        drop(writer);
        receive_file(&other).unwrap().write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }
}
