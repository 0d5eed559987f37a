// SPDX-License-Identifier: GPL-2.0

//! Sockets of the family AF_VSOCK to the machine itself, which can send pages of the caller without
//! a copy. No program at the other end of a network is needed.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::memory::Buffer;
use crate::sys::cvt;

/// The size of an address.
const SIZE: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(port: u32) -> libc::sockaddr_vm {
    // SAFETY: All zeroes is a valid value of this structure.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    // CAST: A small constant.
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_LOCAL;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<File> {
    // SAFETY: The call takes only numbers.
    let fd = cvt(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) }.into())?;
    // CAST: Descriptors fit an int.
    // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// Two sockets that are connected. What is written to the first can be read from the second.
pub fn pair() -> io::Result<(File, File)> {
    let listener = socket()?;
    let mut name = address(libc::VMADDR_PORT_ANY);
    let fd = listener.as_raw_fd();
    // SAFETY: The address has the given size.
    cvt(unsafe { libc::bind(fd, (&raw const name).cast(), SIZE) }.into())?;
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::listen(fd, 1) }.into())?;
    let mut size = SIZE;
    // SAFETY: The address has the given size, and both outlive the call.
    cvt(unsafe { libc::getsockname(fd, (&raw mut name).cast(), &mut size) }.into())?;
    let one = socket()?;
    let to = address(name.svm_port);
    // SAFETY: The address has the given size.
    cvt(unsafe { libc::connect(one.as_raw_fd(), (&raw const to).cast(), SIZE) }.into())?;
    let null = std::ptr::null_mut();
    // SAFETY: Without an address none is written.
    let other = cvt(unsafe { libc::accept(fd, null, std::ptr::null_mut()) }.into())?;
    // CAST: Descriptors fit an int.
    // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
    let other = File::from(unsafe { OwnedFd::from_raw_fd(other as i32) });
    Ok((one, other))
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
