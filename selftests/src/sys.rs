// SPDX-License-Identifier: GPL-2.0

//! System calls for processes and modules, by nix where it has a safe function. `device.rs` has the
//! ioctls, `memory.rs` memory, `uffd.rs` userfaultfd, `files.rs` files and file systems; `unsafe`
//! is used only in such wrapper files.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::kmod::{self, DeleteModuleFlags, ModuleInitFlags};
use nix::mount::MsFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl::{self, PrctlMCEKillPolicy};
use nix::sys::resource::{self, RLIM_INFINITY, Resource};
use nix::sys::signal::{self, SigHandler, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{self, Pid, Uid};

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
pub fn in_shared_memory(body: impl FnOnce() -> i32) -> io::Result<Exit> {
    let mut body = Some(body);
    let run = Box::new(|| -> isize {
        let run = std::panic::AssertUnwindSafe(|| body.take().map_or(102, |body| body()));
        // A panic must not unwind beyond the beginning of the stack.
        exit_now(std::panic::catch_unwind(run).unwrap_or(101))
    });
    let mut stack = vec![0; 256 << 10];
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
    // SAFETY: The stack and `run` outlive the process, which the call waits for. There is no other thread,
    // so that only one of the two runs at a time.
    let pid = unsafe { nix::sched::clone(run, &mut stack, flags, Some(libc::SIGCHLD)) }?;
    match wait(pid.as_raw(), true)? {
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
    let flags = (!block).then_some(WaitPidFlag::WNOHANG);
    loop {
        return match waitpid(Pid::from_raw(pid), flags) {
            Err(Errno::EINTR) => continue,
            Err(e) => Err(e.into()),
            Ok(WaitStatus::StillAlive) => Ok(None),
            Ok(WaitStatus::Exited(pid, code)) => Ok(Some((pid.as_raw(), Exit::Code(code)))),
            Ok(WaitStatus::Signaled(pid, by, _)) => {
                Ok(Some((pid.as_raw(), Exit::Signal(by as i32))))
            }
            Ok(other) => Err(io::Error::other(format!(
                "a child that has not ended: {other:?}"
            ))),
        };
    }
}

/// Whether child `pid` still runs. A child that has ended can still be waited for.
pub fn is_running(pid: i32) -> io::Result<bool> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let status = waitid(Id::Pid(Pid::from_raw(pid)), flags)?;
    Ok(status == WaitStatus::StillAlive)
}

/// Sends a signal to a process, or to a group when `pid` is negative.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    Ok(signal::kill(Pid::from_raw(pid), Signal::try_from(signal)?)?)
}

/// Ignores a signal from now on, or restores its default action: Rust's runtime would handle the first
/// SIGBUS itself and wait for a second one.
pub fn on_signal(signal: i32, ends: bool) -> io::Result<()> {
    let how = if ends {
        SigHandler::SigDfl
    } else {
        SigHandler::SigIgn
    };
    // SAFETY: Neither action runs a function of this program.
    unsafe { signal::signal(Signal::try_from(signal)?, how) }?;
    Ok(())
}

/// Asks for SIGBUS as soon as memory that the caller has mapped fails.
pub fn want_memory_failures() -> io::Result<()> {
    Ok(prctl::set_mce_kill(PrctlMCEKillPolicy::PR_MCE_KILL_EARLY)?)
}

/// Makes the caller the leader of a process group of its own.
pub fn new_process_group() -> io::Result<()> {
    let own = Pid::from_raw(0);
    Ok(unistd::setpgid(own, own)?)
}

/// Makes orphaned descendants children of the caller, which can then reap them.
pub fn become_subreaper() -> io::Result<()> {
    Ok(prctl::set_child_subreaper(true)?)
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

/// Limits a resource of this process.
pub fn limit(resource: Resource, most: u64) -> io::Result<()> {
    Ok(resource::setrlimit(resource, most, most)?)
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
    let nobody = Uid::from_raw(65534);
    Ok(unistd::setresuid(nobody, nobody, nobody)?)
}

/// The id of the calling process.
pub fn pid() -> i32 {
    Pid::this().as_raw()
}

/// The id of the parent process.
pub fn parent() -> i32 {
    Pid::parent().as_raw()
}

/// Makes a user namespace in which the process, which has a single thread, has every capability.
pub fn new_user_namespace() -> io::Result<()> {
    Ok(unshare(CloneFlags::CLONE_NEWUSER)?)
}

/// The children of this process are in a process namespace of their own, of which the next one is the first.
pub fn new_process_namespace() -> io::Result<()> {
    Ok(unshare(CloneFlags::CLONE_NEWPID)?)
}

/// Lets the calling thread run on processor `cpu` only.
pub fn run_on(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
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
    limit(Resource::RLIMIT_CORE, RLIM_INFINITY)
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
    let (kind, data) = (Some("cgroup2"), None::<&str>);
    Ok(nix::mount::mount(kind, at, kind, MsFlags::empty(), data)?)
}

/// Makes a pipe. Returns the read end and the write end.
pub fn pipe() -> io::Result<(File, File)> {
    let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC)?;
    Ok((File::from(read), File::from(write)))
}

/// Whether `file` gets readable, by data or its end, within `timeout`.
pub fn readable(file: &File, timeout: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout) {
        Err(Errno::EINTR) => Ok(false),
        ready => Ok(ready? > 0),
    }
}

/// Makes a file in memory without a path.
pub fn memfd(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?.into())
}

/// Makes a file in memory that can be sealed.
pub fn sealable_memfd(name: &str) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    Ok(memfd_create(name, flags)?.into())
}

/// Seals a file: forbids what `seals` say.
pub fn add_seals(file: &File, seals: SealFlag) -> io::Result<()> {
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

/// Lends a descriptor, given by its number, to `f`. The descriptor must be open.
pub fn borrow<T>(fd: i32, f: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
    // SAFETY: The caller guarantees that the descriptor is open while `f` runs.
    f(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Loads a module from a file.
pub fn finit_module(file: &File, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    Ok(kmod::finit_module(
        file,
        &parameters,
        ModuleInitFlags::empty(),
    )?)
}

/// Unloads a module unless it is in use.
pub fn delete_module(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    Ok(kmod::delete_module(&name, DeleteModuleFlags::O_NONBLOCK)?)
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
}
