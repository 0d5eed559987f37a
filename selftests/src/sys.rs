// SPDX-License-Identifier: GPL-2.0

//! System calls for processes and modules for which std has no safe wrapper. `device.rs` has the
//! ioctls, `memory.rs` memory, `uffd.rs` userfaultfd, `files.rs` files and file systems; `unsafe`
//! is used only in such wrapper files.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// Composes an ioctl number that reads and writes `T`, like the C macro `_IOWR`.
pub const fn iowr<T>(kind: u32, number: u32) -> u32 {
    // CAST: The structures of ioctls are far smaller than 14 bits allow.
    (3 << 30) | ((size_of::<T>() as u32) << 16) | (kind << 8) | number
}

/// Turns the -1 of a system call into the errno.
pub fn cvt(ret: libc::c_long) -> io::Result<libc::c_long> {
    match ret {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

/// The way in which a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

/// Forks. The child runs `body`, whose value is its exit status, and never returns from this call.
///
/// The caller must have a single thread: a lock that another thread holds would stay locked in the
/// child.
pub fn fork(body: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: There is a single thread, so no lock stays locked in the child.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let run = std::panic::AssertUnwindSafe(body);
            // A panic must not unwind into the copy of the parent's frames.
            let code = std::panic::catch_unwind(run).unwrap_or(101);
            exit_now(code)
        }
        pid => Ok(pid),
    }
}

/// Runs `body`, whose value is the exit status, in a process that has its descriptors to itself and shares
/// all memory with the caller, which waits for its end, as with vfork(2).
///
/// The caller must have a single thread.
pub fn in_shared_memory<F: FnOnce() -> i32>(body: F) -> io::Result<Exit> {
    const STACK: usize = 256 << 10;
    extern "C" fn run<F: FnOnce() -> i32>(body: *mut libc::c_void) -> libc::c_int {
        // SAFETY: The caller passes a pointer to such an option, and waits until the process has ended.
        let body = unsafe { &mut *body.cast::<Option<F>>() }.take();
        let run = std::panic::AssertUnwindSafe(|| body.map_or(102, |body| body()));
        // A panic must not unwind beyond the beginning of the stack.
        exit_now(std::panic::catch_unwind(run).unwrap_or(101))
    }
    let mut body = Some(body);
    // Words of 16 bytes, which is the alignment of a stack.
    let mut stack = vec![0u128; STACK / 16];
    let top = stack.as_mut_ptr_range().end.cast();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: The stack and `body` outlive the process, which the call waits for. There is no other thread,
    // so that only one of the two runs at a time.
    let pid = cvt(unsafe { libc::clone(run::<F>, top, flags, (&raw mut body).cast()) }.into())?;
    // CAST: Process numbers fit an int.
    match wait(pid as i32, true)? {
        Some((_, exit)) => Ok(exit),
        None => Err(io::Error::other("the process has not ended")),
    }
}

/// Ends the process without running destructors or exit handlers, or flushing buffers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: The call has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Waits for process `pid`, or for any child with -1. Returns `None` if `block` is false and the
/// process still runs.
pub fn wait(pid: i32, block: bool) -> io::Result<Option<(i32, Exit)>> {
    let mut status = 0;
    let flags = if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: `status` outlives the call.
        let ret = unsafe { libc::waitpid(pid, &mut status, flags) };
        match ret {
            0 => return Ok(None),
            -1 => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
            pid if libc::WIFSIGNALED(status) => {
                return Ok(Some((pid, Exit::Signal(libc::WTERMSIG(status)))));
            }
            pid => return Ok(Some((pid, Exit::Code(libc::WEXITSTATUS(status))))),
        }
    }
}

/// Whether child `pid` still runs. A child that has ended can still be waited for.
pub fn is_running(pid: i32) -> io::Result<bool> {
    // SAFETY: All zeroes is a valid value of this structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // CAST: Process numbers are positive.
    // SAFETY: `info` outlives the call.
    let ret = unsafe { libc::waitid(libc::P_PID, pid as libc::id_t, &mut info, flags) };
    cvt(ret.into())?;
    // SAFETY: The kernel has filled in the structure, or left the zeroes if no child has ended.
    Ok(unsafe { info.si_pid() } == 0)
}

/// Sends a signal to a process, or to a group when `pid` is negative.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Ignores a signal from now on, or restores its default action.
pub fn on_signal(signal: i32, ends: bool) -> io::Result<()> {
    let how = if ends { libc::SIG_DFL } else { libc::SIG_IGN };
    // SAFETY: Neither action runs a function of this program.
    match unsafe { libc::signal(signal, how) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Asks for SIGBUS as soon as memory that the caller has mapped fails.
pub fn want_memory_failures() -> io::Result<()> {
    let (set, early) = (libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY);
    // SAFETY: This option takes only numbers.
    cvt(unsafe { libc::prctl(libc::PR_MCE_KILL, set, early, 0, 0) }.into()).map(drop)
}

/// Makes the caller the leader of a process group of its own.
pub fn new_process_group() -> io::Result<()> {
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::setpgid(0, 0) }.into()).map(drop)
}

/// Makes orphaned descendants children of the caller, which can then reap them.
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: This option takes one number.
    cvt(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into()).map(drop)
}

/// Refuses the process executable memory that was or is writable, with PR_SET_MDWE.
pub fn deny_write_execute() -> io::Result<()> {
    const NONE: libc::c_ulong = 0;
    /// PR_MDWE_REFUSE_EXEC_GAIN of linux/prctl.h.
    const REFUSE_EXEC_GAIN: libc::c_ulong = 1;
    // SAFETY: This option takes only numbers.
    cvt(unsafe { libc::prctl(libc::PR_SET_MDWE, REFUSE_EXEC_GAIN, NONE, NONE, NONE) }.into())
        .map(drop)
}

/// Limits a resource, `RLIMIT_*`, of this process.
pub fn limit(resource: libc::__rlimit_resource_t, most: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: `limit` is a valid structure that outlives the call.
    cvt(unsafe { libc::setrlimit(resource, &limit) }.into()).map(drop)
}

/// Makes a file whose pages are not in the kernel's direct map.
pub fn memfd_secret(bytes: u64) -> io::Result<File> {
    // SAFETY: The call takes only a number.
    let fd = cvt(unsafe { libc::syscall(libc::SYS_memfd_secret, 0) })?;
    // CAST: Descriptors fit an int.
    // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    file.set_len(bytes)?;
    Ok(file)
}

/// Gives up root for good, and with it every capability.
pub fn become_nobody() -> io::Result<()> {
    const NOBODY: libc::uid_t = 65534;
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) }.into()).map(drop)
}

/// The id of the calling process.
pub fn pid() -> i32 {
    // SAFETY: The call has no preconditions.
    unsafe { libc::getpid() }
}

/// The id of the parent process.
pub fn parent() -> i32 {
    // SAFETY: The call has no preconditions.
    unsafe { libc::getppid() }
}

/// Makes a user namespace in which the process has every capability.
pub fn new_user_namespace() -> io::Result<()> {
    // SAFETY: The call takes only a number. The process has a single thread, as the call requires.
    cvt(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into()).map(drop)
}

/// The children of this process are in a process namespace of their own, of which the next one is the first.
pub fn new_process_namespace() -> io::Result<()> {
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::unshare(libc::CLONE_NEWPID) }.into()).map(drop)
}

/// Lets the calling thread run on processor `cpu` only.
pub fn run_on(cpu: usize) -> io::Result<()> {
    // SAFETY: All zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: The macro checks the number, and writes to the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: The set outlives the call.
    let ret = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    cvt(ret.into()).map(drop)
}

/// Replaces the descriptor of `file` by one of an unrelated file, for all threads at once.
pub fn close_under(file: &File) -> io::Result<()> {
    let nothing = File::open("/dev/null")?;
    // SAFETY: Both descriptors are open, and `file` owns its number as before.
    cvt(unsafe { libc::dup3(nothing.as_raw_fd(), file.as_raw_fd(), libc::O_CLOEXEC) }.into())
        .map(drop)
}

/// Removes the limit on the size of core dumps for the calling process.
pub fn allow_core_dumps() -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` outlives the call.
    cvt(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) }.into()).map(drop)
}

/// Lets the process have huge pages only where it asks for them by `MADV_HUGEPAGE`: not in its heap.
pub fn huge_pages_where_advised() -> io::Result<()> {
    /// `PR_THP_DISABLE_EXCEPT_ADVISED` of linux/prctl.h, since Linux 6.18.
    const EXCEPT_ADVISED: libc::c_ulong = 1 << 1;
    const NONE: libc::c_ulong = 0;
    const SET: libc::c_ulong = 1;
    // SAFETY: The call takes only numbers.
    let ret = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, SET, EXCEPT_ADVISED, NONE, NONE) };
    cvt(ret.into()).map(drop)
}

/// Mounts the cgroup v2 hierarchy.
pub fn mount_cgroup2(at: &str) -> io::Result<()> {
    let at = CString::new(at)?;
    let (kind, none) = (c"cgroup2".as_ptr(), std::ptr::null());
    // SAFETY: The C strings outlive the call, and there is no data.
    cvt(unsafe { libc::mount(kind, at.as_ptr(), kind, 0, none) }.into()).map(drop)
}

/// Makes a pipe. Returns the read end and the write end.
pub fn pipe() -> io::Result<(File, File)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for the two descriptors.
    cvt(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
    let read = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
    let write = unsafe { OwnedFd::from_raw_fd(fds[1]) };
    Ok((File::from(read), File::from(write)))
}

/// Whether `file` gets readable, by data or its end, within `timeout`.
pub fn readable(file: &File, timeout: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: The pollfd is valid.
    match cvt(unsafe { libc::poll(&mut poll, 1, ms) }.into()) {
        Ok(n) => Ok(n > 0),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes a file in memory without a path.
pub fn memfd(name: &str) -> io::Result<File> {
    memfd_with(name, libc::MFD_CLOEXEC)
}

/// Makes a file in memory that can be sealed.
pub fn sealable_memfd(name: &str) -> io::Result<File> {
    memfd_with(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
}

/// Seals a file: forbids what `seals`, `F_SEAL_*`, say.
pub fn add_seals(file: &File, seals: i32) -> io::Result<()> {
    // SAFETY: The call takes only numbers.
    cvt(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }.into()).map(drop)
}

fn memfd_with(name: &str, flags: libc::c_uint) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string that outlives the call.
    let fd = cvt(unsafe { libc::memfd_create(name.as_ptr(), flags) }.into())?;
    // CAST: Descriptors fit an int.
    // SAFETY: The kernel has just made this descriptor, and nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// Lends a descriptor, given by its number, to `f`. The descriptor must be open.
pub fn borrow<T>(fd: i32, f: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
    // SAFETY: The caller guarantees that the descriptor is open while `f` runs.
    f(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Loads a module from a file.
pub fn finit_module(file: &File, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    let fd = file.as_raw_fd();
    // SAFETY: `parameters` is a C string that outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_finit_module, fd, parameters.as_ptr(), 0) };
    cvt(ret).map(drop)
}

/// Unloads a module unless it is in use.
pub fn delete_module(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string that outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    cvt(ret).map(drop)
}

/// Reads the kernel's log from now on.
pub struct KernelLog(File);

impl KernelLog {
    pub fn open() -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// The lines that have come since the last call, without their prefix.
    pub fn rest(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = vec![0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(n) => {
                    let text = String::from_utf8_lossy(&record[..n]);
                    let text = text.split_once(';').map_or("", |(_, text)| text);
                    lines.push(text.lines().next().unwrap_or("").to_string());
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(lines),
                // Lines were overwritten before they were read: continue with the next ones.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Polls `done` for up to `timeout`. Returns whether it became true.
pub fn wait_until(timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if done() {
            return true;
        }
        if start.elapsed() >= timeout {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod unit {
    use linux_raw_sys::general::{_UFFDIO_COPY, UFFDIO, uffdio_copy};
    use linux_raw_sys::ioctl::UFFDIO_COPY;

    #[test]
    fn memory_is_shared() {
        // The test harness has other threads, which do not use what the process uses.
        let mut word = 1;
        let end = super::in_shared_memory(|| {
            word += 1;
            7
        });
        assert_eq!((end.unwrap(), word), (super::Exit::Code(7), 2));
    }

    #[test]
    fn numbers_of_ioctls() {
        assert_eq!(
            super::iowr::<uffdio_copy>(UFFDIO, _UFFDIO_COPY),
            UFFDIO_COPY
        );
    }
}
