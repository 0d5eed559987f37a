// SPDX-License-Identifier: GPL-2.0

//! System calls on files and file systems for which std has no safe wrapper, or a wrapper that
//! restarts after a signal; by nix where it has a safe function.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use linux_raw_sys::general::{file_clone_range, file_dedupe_range_info};
use linux_raw_sys::ioctl::{FICLONE, FICLONERANGE, FIDEDUPERANGE};
use linux_raw_sys::mempolicy::MPOL_MF_MOVE;
use nix::fcntl::{FallocateFlags, copy_file_range, fallocate};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

/// Makes a mount namespace for the caller: its mounts end with the caller and its children.
///
/// Does nothing if the caller has a namespace of its own. A second namespace would get copies of all
/// mounts. Files that are open or mapped would hold the mounts of the first namespace, and umount2()
/// of the busy file system would succeed, because it would remove a copy that has no user.
pub fn own_mounts() -> io::Result<()> {
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt"));
    if of("self")? != of("1")? {
        return Ok(());
    }
    Ok(unshare(CloneFlags::CLONE_NEWNS)?)
}

/// mount(2).
pub fn mount(device: &str, at: &Path, kind: &str, data: &str) -> io::Result<()> {
    let (device, kind, data) = (Some(device), Some(kind), Some(data));
    Ok(nix::mount::mount(device, at, kind, MsFlags::empty(), data)?)
}

/// umount2(2).
pub fn unmount(at: &Path, flags: MntFlags) -> io::Result<()> {
    Ok(nix::mount::umount2(at, flags)?)
}

/// Sets the size of a file in pages with one ftruncate(2); the caller handles EINTR.
pub fn truncate(file: &File, pages: usize) -> io::Result<()> {
    // CAST: No file here comes near the limit.
    let len = (pages * PAGE) as libc::off_t;
    Ok(nix::unistd::ftruncate(file, len)?)
}

/// Calls fallocate(2) once, with a range of pages.
pub fn allocate(file: &File, mode: FallocateFlags, first: usize, n: usize) -> io::Result<()> {
    allocate_bytes(file, mode, first * PAGE, n * PAGE)
}

/// Calls fallocate(2) once, with a range of bytes.
pub fn allocate_bytes(file: &File, mode: FallocateFlags, at: usize, len: usize) -> io::Result<()> {
    // CAST: No file here comes near the limit.
    let (offset, len) = (at as libc::off_t, len as libc::off_t);
    Ok(fallocate(file, mode, offset, len)?)
}

/// Punches a hole; the size of the file stays the same.
pub const PUNCH_HOLE: FallocateFlags =
    FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(FallocateFlags::FALLOC_FL_KEEP_SIZE);

/// Punches a hole with one call; the size of the file stays the same.
pub fn punch(file: &File, first: usize, n: usize) -> io::Result<()> {
    allocate(file, PUNCH_HOLE, first, n)
}

/// Makes `to` share the blocks of `from`, with FICLONE.
pub fn clone(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::ioctl(to.as_raw_fd(), FICLONE.into(), from.as_raw_fd()) }.into()).map(drop)
}

/// Makes `to` share a range of blocks of `from`, at the same offset, with FICLONERANGE.
pub fn clone_range(from: &File, to: &File, at: usize, len: usize) -> io::Result<()> {
    clone_bytes(from, at, to, at, len)
}

/// Makes the pages of `to` from `at` on share the blocks of the first `n` pages of `from`, with
/// FICLONERANGE.
pub fn clone_part(from: &File, to: &File, at: usize, n: usize) -> io::Result<()> {
    clone_bytes(from, 0, to, at * PAGE, n * PAGE)
}

fn clone_bytes(from: &File, source: usize, to: &File, at: usize, len: usize) -> io::Result<()> {
    let range = file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: source as u64,
        src_length: len as u64,
        dest_offset: at as u64,
    };
    // SAFETY: The range outlives the call.
    cvt(unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE.into(), &raw const range) }.into())
        .map(drop)
}

/// Calls copy_file_range(2) once, with the same offset in both files.
pub fn copy_range(from: &File, to: &File, at: usize, len: usize) -> io::Result<usize> {
    // CAST: No file here comes near the limit.
    let (mut source, mut target) = (at as i64, at as i64);
    let n = copy_file_range(from, Some(&mut source), to, Some(&mut target), len)?;
    Ok(n)
}

/// Makes the pages of `to` from `at` on share the blocks of the first `n` pages of `from`, which must
/// have the same data, with FIDEDUPERANGE.
pub fn dedupe(from: &File, to: &File, at: usize, n: usize) -> io::Result<()> {
    /// `struct file_dedupe_range` with one destination.
    #[repr(C)]
    struct Request {
        src_offset: u64,
        src_length: u64,
        dest_count: u16,
        reserved1: u16,
        reserved2: u32,
        info: file_dedupe_range_info,
    }
    let mut request = Request {
        src_offset: 0,
        src_length: (n * PAGE) as u64,
        dest_count: 1,
        reserved1: 0,
        reserved2: 0,
        info: file_dedupe_range_info {
            dest_fd: to.as_raw_fd().into(),
            dest_offset: (at * PAGE) as u64,
            bytes_deduped: 0,
            status: 0,
            reserved: 0,
        },
    };
    let (fd, arg) = (from.as_raw_fd(), std::ptr::from_mut(&mut request));
    // SAFETY: The request outlives the call and has as many destinations as it says.
    cvt(unsafe { libc::ioctl(fd, FIDEDUPERANGE.into(), arg) }.into())?;
    match (request.info.status, request.info.bytes_deduped) {
        (0, bytes) if bytes == (n * PAGE) as u64 => Ok(()),
        (status @ ..0, _) => Err(io::Error::from_raw_os_error(-status)),
        (status, bytes) => Err(io::Error::other(format!(
            "status {status}, {bytes} bytes that are shared"
        ))),
    }
}

/// Calls madvise(2), which may fail.
pub fn advise(buf: &Buffer, first: usize, n: usize, advice: i32) -> io::Result<()> {
    let addr = buf.at(first) as *mut c_void;
    // SAFETY: The call changes only the buffer's own pages, whose accesses are all volatile.
    cvt(unsafe { libc::madvise(addr, n * PAGE, advice) }.into()).map(drop)
}

/// Calls msync(2) with MS_SYNC.
pub fn sync(buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
    let addr = buf.at(first) as *mut c_void;
    // SAFETY: The call only writes back the buffer's own pages.
    cvt(unsafe { libc::msync(addr, n * PAGE, libc::MS_SYNC) }.into()).map(drop)
}

/// Whether pages are resident, by mincore(2).
pub fn mincore(buf: &Buffer, first: usize, n: usize) -> io::Result<Vec<bool>> {
    let addr = buf.at(first) as *mut c_void;
    let mut resident = vec![0u8; n];
    // SAFETY: The array has one byte for each page.
    cvt(unsafe { libc::mincore(addr, n * PAGE, resident.as_mut_ptr()) }.into())?;
    Ok(resident.iter().map(|byte| byte & 1 != 0).collect())
}

/// Copies pages of process `pid` at the addresses of `from` to `to`, with process_vm_readv(2).
pub fn read_process(
    pid: i32,
    from: &Buffer,
    first: usize,
    to: &Buffer,
    n: usize,
) -> io::Result<usize> {
    let (local, remote) = (to.iovec(0, n), from.iovec(first, n));
    // SAFETY: Both iovecs are valid. The kernel checks the addresses in them, and writes to a
    // buffer, whose accesses are all volatile.
    let ret = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    cvt(ret as libc::c_long).map(|n| n as usize)
}

/// Asks move_pages(2) to move pages of the caller to node 0. Returns the status of each page, 0 or
/// a negative errno.
pub fn move_to_node(buf: &Buffer, first: usize, n: usize) -> io::Result<Vec<i32>> {
    let pages: Vec<u64> = (first..first + n).map(|page| buf.at(page)).collect();
    let nodes = vec![0i32; n];
    let mut status = vec![i32::MAX; n];
    // SAFETY: The three arrays have `n` elements and outlive the call; pages keep their addresses.
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

/// Catches a signal with a handler that does nothing; `restart` sets SA_RESTART.
pub fn catch(signal: i32, restart: bool) -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    let flags = if restart {
        SaFlags::SA_RESTART
    } else {
        SaFlags::empty()
    };
    let action = SigAction::new(SigHandler::Handler(nothing), flags, SigSet::empty());
    // SAFETY: The handler does nothing.
    unsafe { sigaction(Signal::try_from(signal)?, &action) }?;
    Ok(())
}

/// How often the calling thread has gone to sleep voluntarily.
pub fn sleeps() -> io::Result<i64> {
    Ok(getrusage(UsageWho::RUSAGE_THREAD)?.voluntary_context_switches())
}

/// Opens or makes a file for direct I/O.
pub fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(true).create(true);
    options.custom_flags(libc::O_DIRECT).open(path)
}

/// Shuts down the file system of a file as a power cut would: its log stays as it is.
pub fn cut_power(file: &File) -> io::Result<()> {
    /// XFS_IOC_GOINGDOWN, which has the same number as EXT4_IOC_SHUTDOWN.
    const GOINGDOWN: u64 = 0x8004_587d;
    const NOLOGFLUSH: u32 = 2;
    // SAFETY: The argument is a u32 that outlives the call.
    cvt(unsafe { libc::ioctl(file.as_raw_fd(), GOINGDOWN, &NOLOGFLUSH) }.into()).map(drop)
}

/// Blocks a signal for the calling thread. A signal that the thread's own access causes is
/// delivered nevertheless.
pub fn block(signal: i32) -> io::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::try_from(signal)?);
    Ok(set.thread_block()?)
}

/// Whether a signal that is blocked waits for this thread or for the process.
pub fn is_pending(signal: i32) -> io::Result<bool> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: The function fills the set.
    cvt(unsafe { libc::sigpending(set.as_mut_ptr()) }.into())?;
    // SAFETY: The set was filled above.
    Ok(unsafe { libc::sigismember(set.as_ptr(), signal) } == 1)
}

/// The data of the last signal that `catch_address` has caught.
static CAUGHT: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Catches a signal that has an address, and stores the address.
pub fn catch_address(signal: i32) -> io::Result<()> {
    extern "C" fn remember(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: The kernel passes a valid structure. The signals that this handler serves have an
        // address in it, followed by the u16 of its granularity.
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
    let handler = SigHandler::SigAction(remember);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: The handler only stores to two atomics.
    unsafe { sigaction(Signal::try_from(signal)?, &action) }?;
    Ok(())
}

/// The address of the last such signal, 0 for none, and the number of its low bits that mean
/// nothing.
pub fn caught_address() -> (u64, u64) {
    let [address, shift] = &CAUGHT;
    (address.load(Ordering::SeqCst), shift.load(Ordering::SeqCst))
}
