// SPDX-License-Identifier: GPL-2.0

//! System calls on other processes and their memory, and on sockets that carry files and pages.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, FdFlag, SpliceFFlags, fcntl};
use nix::sys::ptrace;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, cmsg_space, recvmsg, sendmsg,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::memory::Buffer;
use crate::sys::cvt;

/// Sends a copy of a descriptor through a socket, with one byte.
pub fn send_file(socket: &UnixStream, file: impl AsFd) -> io::Result<()> {
    let (bytes, fds) = ([IoSlice::new(&[0])], [file.as_fd().as_raw_fd()]);
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &bytes,
        &control,
        MsgFlags::empty(),
        None,
    )?;
    Ok(())
}

/// Receives a descriptor from a socket.
pub fn receive_file(socket: &UnixStream) -> io::Result<File> {
    let (mut byte, mut control) = ([0], [0; cmsg_space::<i32>()]);
    let (mut bytes, flags) = ([IoSliceMut::new(&mut byte)], MsgFlags::MSG_CMSG_CLOEXEC);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut bytes, Some(&mut control), flags)?;
    match message.cmsgs()?.next() {
        Some(ControlMessageOwned::ScmRights(fds)) if fds.len() == 1 => {
            // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
            Ok(File::from(unsafe { OwnedFd::from_raw_fd(fds[0]) }))
        }
        _ => Err(io::Error::other("a message without a descriptor")),
    }
}

/// Moves bytes from a pipe to a socket, or the other way round, with splice(2), without waiting.
pub fn splice(from: impl AsFd, to: impl AsFd, bytes: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(nix::fcntl::splice(from, None, to, None, bytes, flags)?)
}

/// Gives a second pipe the pages that a pipe holds, with tee(2).
pub fn tee(from: &File, to: &File, bytes: usize) -> io::Result<usize> {
    Ok(nix::fcntl::tee(
        from,
        to,
        bytes,
        SpliceFFlags::SPLICE_F_NONBLOCK,
    )?)
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
    Ok(ptrace::seize(Pid::from_raw(pid), ptrace::Options::empty())?)
}

/// Stops a traced process, and waits until it has stopped.
pub fn stop_traced(pid: i32) -> io::Result<()> {
    let pid = Pid::from_raw(pid);
    ptrace::interrupt(pid)?;
    match waitpid(pid, Some(WaitPidFlag::__WALL))? {
        WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => Ok(()),
        _ => Err(io::Error::other("the traced process has ended")),
    }
}

/// Writes a word to a stopped process, as a debugger does.
pub fn poke(pid: i32, address: u64, word: u64) -> io::Result<()> {
    // CAST: A word, with the same bits.
    Ok(ptrace::write(
        Pid::from_raw(pid),
        address as *mut _,
        word as libc::c_long,
    )?)
}

/// Lets a stopped process go on without a tracer.
pub fn untrace(pid: i32) -> io::Result<()> {
    Ok(ptrace::detach(Pid::from_raw(pid), None)?)
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
    fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
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
