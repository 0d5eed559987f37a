// SPDX-License-Identifier: GPL-2.0

//! System calls on files and file systems that std has no safe wrapper for, or one that
//! begins anew when a signal comes.

#![allow(unsafe_code)]

use std::ffi::{CString, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

/// A mount namespace of the caller's own: what it mounts goes with it and its children.
pub fn own_mounts() -> io::Result<()> {
    // SAFETY: takes a number only.
    cvt(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).map(drop)
}

/// mount(2).
pub fn mount(device: &str, at: &Path, kind: &str, data: &str) -> io::Result<()> {
    let (device, kind, data) = (
        CString::new(device)?,
        CString::new(kind)?,
        CString::new(data)?,
    );
    let at = CString::new(at.as_os_str().as_encoded_bytes())?;
    let data = data.as_ptr().cast::<c_void>();
    // SAFETY: C strings which outlive the call; the file systems here take text as data.
    let ret = unsafe { libc::mount(device.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, data) };
    cvt(ret.into()).map(drop)
}

/// umount2(2).
pub fn unmount(at: &Path, flags: i32) -> io::Result<()> {
    let at = CString::new(at.as_os_str().as_encoded_bytes())?;
    // SAFETY: a C string which outlives the call.
    cvt(unsafe { libc::umount2(at.as_ptr(), flags) }.into()).map(drop)
}

/// ftruncate(2) to some pages, once: EINTR is the caller's.
pub fn truncate(file: &File, pages: usize) -> io::Result<()> {
    // CAST: no file here comes near the limit.
    let len = (pages * PAGE) as libc::off_t;
    // SAFETY: takes numbers only.
    cvt(unsafe { libc::ftruncate(file.as_raw_fd(), len) }.into()).map(drop)
}

/// fallocate(2) of pages, once.
pub fn allocate(file: &File, mode: i32, first: usize, n: usize) -> io::Result<()> {
    // CAST: as above.
    let (offset, len) = ((first * PAGE) as libc::off_t, (n * PAGE) as libc::off_t);
    // SAFETY: takes numbers only.
    cvt(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }.into()).map(drop)
}

/// Makes a hole of pages, once; the size stays.
pub fn punch(file: &File, first: usize, n: usize) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    allocate(file, mode, first, n)
}

/// Lets `to` have the blocks of `from`, FICLONE.
pub fn clone(from: &File, to: &File) -> io::Result<()> {
    const FICLONE: u64 = 0x4004_9409;
    // SAFETY: takes numbers only.
    cvt(unsafe { libc::ioctl(to.as_raw_fd(), FICLONE, from.as_raw_fd()) }.into()).map(drop)
}

/// madvise(2), with what may be refused.
pub fn advise(buf: &Buffer, first: usize, n: usize, advice: i32) -> io::Result<()> {
    let addr = buf.at(first) as *mut c_void;
    // SAFETY: only the buffer's own pages change, whose accesses are all volatile.
    cvt(unsafe { libc::madvise(addr, n * PAGE, advice) }.into()).map(drop)
}

/// Copies pages of process `pid` at the addresses of `from` to `to`, process_vm_readv(2).
pub fn read_process(
    pid: i32,
    from: &Buffer,
    first: usize,
    to: &Buffer,
    n: usize,
) -> io::Result<usize> {
    let vec = |base: u64| libc::iovec {
        iov_base: base as *mut c_void,
        iov_len: n * PAGE,
    };
    let (local, remote) = (vec(to.at(0)), vec(from.at(first)));
    // SAFETY: one valid iovec each; the kernel checks the addresses in them itself, and
    // what it writes is a buffer's, whose accesses are all volatile.
    let ret = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    cvt(ret as libc::c_long).map(|n| n as usize)
}

/// Asks move_pages(2) to move each of some pages of the caller to node 0; what it says of
/// each, 0 or a negative errno.
pub fn move_to_node(buf: &Buffer, first: usize, n: usize) -> io::Result<Vec<i32>> {
    /// Of linux/mempolicy.h.
    const MPOL_MF_MOVE: i32 = 2;
    let pages: Vec<u64> = (first..first + n).map(|page| buf.at(page)).collect();
    let nodes = vec![0i32; n];
    let mut status = vec![i32::MAX; n];
    // SAFETY: three arrays of `n` which outlive the call; pages stay where they are mapped.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            n,
            pages.as_ptr(),
            nodes.as_ptr(),
            status.as_mut_ptr(),
            MPOL_MF_MOVE,
        )
    };
    cvt(ret).map(|_| status)
}

/// Registers pages as a buffer of a new io_uring, which is a long-term pin; it goes with
/// the file that is returned.
pub fn register_with_uring(buf: &Buffer, first: usize, n: usize) -> io::Result<File> {
    use std::os::fd::{FromRawFd, OwnedFd};
    const REGISTER_BUFFERS: u32 = 0;
    // struct io_uring_params: 120 bytes, all zeroes for no wishes.
    let mut params = [0u64; 15];
    // SAFETY: `params` is as large as the kernel's structure and outlives the call.
    let fd = cvt(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) })?;
    // CAST: descriptors fit an int.
    // SAFETY: the kernel just made this descriptor for us and nobody else.
    let ring = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    let vec = libc::iovec {
        iov_base: buf.at(first) as *mut c_void,
        iov_len: n * PAGE,
    };
    let fd = ring.as_raw_fd();
    // SAFETY: one valid iovec, in which the kernel checks the address itself.
    cvt(unsafe { libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_BUFFERS, &vec, 1) })?;
    Ok(ring)
}

/// Catches a signal with a handler that does nothing; `restart` as SA_RESTART says.
pub fn catch(signal: i32, restart: bool) -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: all zeroes is a good value of this structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    action.sa_flags = if restart { libc::SA_RESTART } else { 0 };
    // SAFETY: the handler does nothing, and the structure outlives the call.
    cvt(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }.into()).map(drop)
}

/// How often the calling thread has gone to sleep of itself.
pub fn sleeps() -> io::Result<i64> {
    // SAFETY: all zeroes is a good value of this structure.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` outlives the call.
    cvt(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) }.into())?;
    Ok(usage.ru_nvcsw)
}

/// Opens or makes a file for direct I/O.
pub fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(true).create(true);
    options.custom_flags(libc::O_DIRECT).open(path)
}

/// Stops the file system of a file as a power cut would: its log stays as it is.
pub fn cut_power(file: &File) -> io::Result<()> {
    /// XFS_IOC_GOINGDOWN, which is EXT4_IOC_SHUTDOWN.
    const GOINGDOWN: u64 = 0x8004_587d;
    const NOLOGFLUSH: u32 = 2;
    // SAFETY: the argument is a u32 which outlives the call.
    cvt(unsafe { libc::ioctl(file.as_raw_fd(), GOINGDOWN, &NOLOGFLUSH) }.into()).map(drop)
}

/// Lets a signal do what it does without a handler: that of Rust's runtime takes the first
/// SIGBUS for itself, and counts on a second one.
pub fn uncatch(signal: i32) -> io::Result<()> {
    // SAFETY: the default action is no function.
    match unsafe { libc::signal(signal, libc::SIG_DFL) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The calling process wants to know of bad memory as soon as the kernel does.
pub fn hear_of_bad_memory_early() -> io::Result<()> {
    let (set, early) = (libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY);
    // SAFETY: this option takes numbers only.
    cvt(unsafe { libc::prctl(libc::PR_MCE_KILL, set, early, 0, 0) }.into()).map(drop)
}

/// Lets a signal wait that is sent to the calling thread. One for what the thread does
/// itself comes nevertheless.
pub fn block(signal: i32) -> io::Result<()> {
    // SAFETY: all zeroes is a good value of this type.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` outlives the call.
    cvt(unsafe { libc::sigaddset(&mut set, signal) }.into())?;
    // SAFETY: as above.
    cvt(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) }.into()).map(drop)
}

/// What the last signal that `catch_address` has caught said.
static CAUGHT: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Catches a signal that says at which address it is about, and remembers that.
pub fn catch_address(signal: i32) -> io::Result<()> {
    extern "C" fn remember(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel passes a valid structure, in which there is an address for the
        // signals that this is used with, and behind it the u16 of its granularity.
        let (address, shift) = unsafe {
            let info: *const u8 = info.cast();
            (
                info.add(16).cast::<u64>().read_unaligned(),
                info.add(24).cast::<u16>().read_unaligned(),
            )
        };
        CAUGHT[0].store(address, Ordering::SeqCst);
        CAUGHT[1].store(shift.into(), Ordering::SeqCst);
    }
    for number in &CAUGHT {
        number.store(0, Ordering::SeqCst);
    }
    // SAFETY: all zeroes is a good value of this structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = remember as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler touches nothing but two atomics.
    cvt(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }.into()).map(drop)
}

/// Address of the last such signal, 0 for none, and how many of its low bits say nothing.
pub fn caught_address() -> (u64, u64) {
    let [address, shift] = &CAUGHT;
    (address.load(Ordering::SeqCst), shift.load(Ordering::SeqCst))
}
