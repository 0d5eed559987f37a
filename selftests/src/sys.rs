// SPDX-License-Identifier: GPL-2.0

//! System calls that std has no safe wrapper for: processes and modules.
//! Ioctls are in `device.rs`, memory in `memory.rs`, userfaultfd in `uffd.rs`, files and
//! file systems in `files.rs`; there is `unsafe` in these only.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// Turns the -1 of a system call into the errno.
pub fn cvt(ret: libc::c_long) -> io::Result<libc::c_long> {
    match ret {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

/// Forks; the child runs `body`, whose value is its exit status, and never
/// returns from this call.
///
/// The caller has no threads but its own: what another thread holds locked
/// would stay so in the child.
pub fn fork(body: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: with one thread there is no lock that the child could miss.
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

/// Ends the process without destructors, buffers or exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Waits for process `pid`, or any child with -1; `None` when `block` is false
/// and it still runs.
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

/// Whether child `pid` has not ended yet; it can still be waited for.
pub fn is_running(pid: i32) -> io::Result<bool> {
    // SAFETY: all zeroes is a good value of this structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // CAST: process numbers are positive.
    // SAFETY: `info` outlives the call.
    let ret = unsafe { libc::waitid(libc::P_PID, pid as libc::id_t, &mut info, flags) };
    cvt(ret.into())?;
    // SAFETY: the kernel has filled it in, or left the zeroes where there was nothing.
    Ok(unsafe { info.si_pid() } == 0)
}

/// Sends a signal to a process, or to a group when `pid` is negative.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    cvt(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Ignores a signal from now on, or lets it end the process again.
pub fn on_signal(signal: i32, ends: bool) -> io::Result<()> {
    let how = if ends { libc::SIG_DFL } else { libc::SIG_IGN };
    // SAFETY: neither is a function of this program.
    match unsafe { libc::signal(signal, how) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Asks for SIGBUS as soon as memory that the caller has mapped fails.
pub fn want_memory_failures() -> io::Result<()> {
    let (set, early) = (libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY);
    // SAFETY: this option takes numbers.
    cvt(unsafe { libc::prctl(libc::PR_MCE_KILL, set, early, 0, 0) }.into()).map(drop)
}

/// Makes the caller the leader of a process group of its own.
pub fn new_process_group() -> io::Result<()> {
    // SAFETY: takes numbers only.
    cvt(unsafe { libc::setpgid(0, 0) }.into()).map(drop)
}

/// Orphaned descendants become the caller's children, so that it can reap them.
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: this option takes one number.
    cvt(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into()).map(drop)
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

/// A file whose pages the kernel itself cannot reach.
pub fn memfd_secret(bytes: u64) -> io::Result<File> {
    // SAFETY: takes a number only.
    let fd = cvt(unsafe { libc::syscall(libc::SYS_memfd_secret, 0) })?;
    // CAST: descriptors fit an int.
    // SAFETY: the kernel just made this descriptor for us and nobody else.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    file.set_len(bytes)?;
    Ok(file)
}

/// Gives up root for good, and with it every capability.
pub fn become_nobody() -> io::Result<()> {
    const NOBODY: libc::uid_t = 65534;
    // SAFETY: takes numbers only.
    cvt(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) }.into()).map(drop)
}

/// The number of the calling process.
pub fn pid() -> i32 {
    // SAFETY: has no preconditions.
    unsafe { libc::getpid() }
}

/// The number of the process's parent.
pub fn parent() -> i32 {
    // SAFETY: has no preconditions.
    unsafe { libc::getppid() }
}

/// A user namespace of the process's own, in which it has every capability.
pub fn new_user_namespace() -> io::Result<()> {
    // SAFETY: takes a number only; the process has one thread, which is all that the call wants.
    cvt(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into()).map(drop)
}

/// Makes the number of `file` that of a file that is not there, in all threads at once.
pub fn close_under(file: &File) -> io::Result<()> {
    let nothing = File::open("/dev/null")?;
    // SAFETY: both descriptors are open, and `file` owns its number as before.
    cvt(unsafe { libc::dup3(nothing.as_raw_fd(), file.as_raw_fd(), libc::O_CLOEXEC) }.into())
        .map(drop)
}

/// Lets core dumps of the calling process be of any size.
pub fn allow_core_dumps() -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` outlives the call.
    cvt(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) }.into()).map(drop)
}

/// Mounts the cgroup v2 hierarchy.
pub fn mount_cgroup2(at: &str) -> io::Result<()> {
    let at = CString::new(at)?;
    let (kind, none) = (c"cgroup2".as_ptr(), std::ptr::null());
    // SAFETY: C strings which outlive the call, and no data.
    cvt(unsafe { libc::mount(kind, at.as_ptr(), kind, 0, none) }.into()).map(drop)
}

/// A pipe: (read end, write end).
pub fn pipe() -> io::Result<(File, File)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for the two descriptors.
    cvt(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: the kernel just made this descriptor for us and nobody else.
    let read = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: as above.
    let write = unsafe { OwnedFd::from_raw_fd(fds[1]) };
    Ok((File::from(read), File::from(write)))
}

/// Whether `file` has data or its end to read within `timeout`.
pub fn readable(file: &File, timeout: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd is passed.
    match cvt(unsafe { libc::poll(&mut poll, 1, ms) }.into()) {
        Ok(n) => Ok(n > 0),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
        Err(e) => Err(e),
    }
}

/// A file in memory without a name.
pub fn memfd(name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string which outlives the call.
    let fd = cvt(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) }.into())?;
    // CAST: descriptors fit an int.
    // SAFETY: the kernel just made this descriptor for us and nobody else.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// Lends a descriptor that is known by its number to `f`. It must be open.
pub fn borrow<T>(fd: i32, f: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
    // SAFETY: open for as long as `f` runs, as the caller says.
    f(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Loads a module from a file.
pub fn finit_module(file: &File, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    let fd = file.as_raw_fd();
    // SAFETY: `parameters` is a C string which outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_finit_module, fd, parameters.as_ptr(), 0) };
    cvt(ret).map(drop)
}

/// Unloads a module unless it is in use.
pub fn delete_module(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string which outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    cvt(ret).map(drop)
}

/// The kernel's log from now on.
pub struct KernelLog(File);

impl KernelLog {
    pub fn open() -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// The lines that have come since, without their head.
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
                // Lines were overwritten before they were read: go on behind them.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Polls `done` for up to `timeout`; whether it came true.
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
