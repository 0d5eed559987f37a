// SPDX-License-Identifier: GPL-2.0

//! Sockets of the family AF_VSOCK to the machine itself, which can send pages of the caller without
//! a copy. No program at the other end of a network is needed.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, connect, getsockname,
    listen,
};

use crate::memory::Buffer;
use crate::sys::cvt;

fn socket() -> nix::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::Vsock, SockType::Stream);
    nix::sys::socket::socket(family, kind, SockFlag::empty(), None)
}

/// Two sockets that are connected. What is written to the first can be read from the second.
pub fn pair() -> io::Result<(File, File)> {
    let listener = socket()?;
    let any = VsockAddr::new(libc::VMADDR_CID_LOCAL, libc::VMADDR_PORT_ANY);
    bind(listener.as_raw_fd(), &any)?;
    listen(&listener, Backlog::new(1)?)?;
    let name: VsockAddr = getsockname(listener.as_raw_fd())?;
    let one = socket()?;
    let to = VsockAddr::new(libc::VMADDR_CID_LOCAL, name.port());
    connect(one.as_raw_fd(), &to)?;
    Ok((one.into(), accept(&listener)?.into()))
}

/// Sends pages without a copy, with MSG_ZEROCOPY: the socket holds the pages until they are read.
pub fn send(socket: &File, buf: &Buffer, first: usize, n: usize) -> io::Result<usize> {
    let one: libc::c_int = 1;
    let (fd, value) = (socket.as_raw_fd(), (&raw const one).cast());
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: The option takes a number of this size.
    cvt(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY, value, size) }.into())?;
    let vec = buf.iovec(first, n);
    let flags = libc::MSG_ZEROCOPY | libc::MSG_DONTWAIT;
    // SAFETY: The kernel checks the addresses, and reads a buffer.
    let ret = unsafe { libc::send(fd, vec.iov_base, vec.iov_len, flags) };
    cvt(ret as libc::c_long).map(|n| n as usize)
}
