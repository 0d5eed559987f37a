// SPDX-License-Identifier: GPL-2.0

//! Files that outlive what their opener was: it becomes another program, dies, or leaves the file to
//! the kernel.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use libc::{EFAULT, EINVAL};

use super::works;
use crate::check::{OrFail, Outcome, expect_errno};
use crate::device::{Buffer, Data, Device, PAGE, check_bytes};
use crate::harness::{Child, note};
use crate::peers::{self, PidFd};
use crate::sys::{self, Exit};
use crate::tests::target::{Target, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::uring::Uring;
use crate::{check, check_eq, threads};

pub const TESTS: &[Test] = &[
    test("hostile.another_program", another_program),
    test("hostile.program_in_use", program_in_use),
    test("hostile.last_user_of_another", last_user_of_another),
    test("hostile.freed_in_use", freed_in_use),
    test("hostile.closed_by_the_kernel", closed_by_the_kernel),
];

const BUSYBOX: &str = "/bin/busybox";

/// A process that has opened a device, with the file and a socket to it.
pub(super) struct Opener {
    pub(super) child: Child,
    pub(super) device: Device,
    socket: UnixStream,
}

impl Opener {
    /// Starts a process that opens `node`, gives the file away and runs `body`, which may wait for the
    /// word of [`Opener::tell`], and must send one itself.
    pub(super) fn start(
        node: usize,
        body: impl FnOnce(&Device, &UnixStream) -> Outcome,
    ) -> Outcome<Self> {
        let (here, there) = UnixStream::pair().or_fail("socketpair")?;
        let child = Child::spawn(|| {
            let device = Device::open(node)?;
            peers::send_file(&there, &device).or_fail("sendmsg")?;
            body(&device, &there)
        })?;
        drop(there);
        let device = peers::receive_file(&here).or_fail("recvmsg")?;
        let opener = Self {
            child,
            device: Device::of_file(device),
            socket: here,
        };
        wait_word(&opener.socket)?;
        Ok(opener)
    }

    /// Whether a word of `body` comes within `limit`.
    pub(super) fn hears(&self, limit: Duration) -> Outcome<bool> {
        self.socket
            .set_read_timeout(Some(limit))
            .or_fail("setsockopt")?;
        Ok((&self.socket).read_exact(&mut [0]).is_ok())
    }

    /// Lets `body` go on.
    pub(super) fn tell(&self) -> Outcome {
        say_word(&self.socket)
    }
}

pub(super) fn say_word(mut socket: &UnixStream) -> Outcome {
    socket.write_all(b"n").or_fail("write to a socket")
}

pub(super) fn wait_word(mut socket: &UnixStream) -> Outcome {
    let limit = Some(Duration::from_secs(20));
    socket.set_read_timeout(limit).or_fail("setsockopt")?;
    socket.read_exact(&mut [0]).or_fail("read from a socket")
}

/// The first address and the number of pages of each mapping of a process.
pub(super) fn mappings(pid: &str) -> Outcome<Vec<(u64, u64)>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).or_fail("maps")?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let (start, end) = (hex(start)?, hex(end)?);
        Some((start, (end - start) / PAGE as u64))
    };
    Ok(maps.lines().filter_map(range).collect())
}

/// A file stays one of the address space that its opener had. When the opener becomes a program with
/// more rights, and the file stays open in it, nobody gets at the memory of the program.
fn another_program(ctx: &Ctx) -> Outcome {
    const PROGRAM: &str = "/tmp/zdm-set-user-id";
    fs::create_dir_all("/tmp").or_fail("mkdir /tmp")?;
    fs::copy(BUSYBOX, PROGRAM).or_fail("copy of busybox")?;
    let mode = fs::Permissions::from_mode(0o4755);
    fs::set_permissions(PROGRAM, mode).or_fail("chmod")?;
    let buf = Buffer::anon(8)?;
    for target in open_each_kind(ctx)? {
        let opener = Opener::start(target.node(), |device, socket| {
            buf.fill(0, 8, 1680);
            device.to_device(&buf, 0, 4).or_fail("MIGRATE_TO_DEV")?;
            peers::keep_across_exec(device).or_fail("fcntl")?;
            sys::become_nobody().or_fail("setresuid")?;
            say_word(socket)?;
            wait_word(socket)?;
            let e = Command::new(PROGRAM).arg0("sleep").arg("60").exec();
            Err(e).or_fail("exec")
        })?;
        let device = &opener.device;
        let read = device.read(&buf, 0, 8).or_fail("READ before exec")?;
        check_bytes(&read.data, 1680, 0, "READ before exec")?;
        opener.tell()?;
        let pid = opener.child.pid().to_string();
        let is_another = || {
            let exe = fs::read_link(format!("/proc/{pid}/exe"));
            let is_program = exe.is_ok_and(|exe| exe.as_os_str() == PROGRAM);
            // It is loaded, and has begun to sleep.
            is_program && fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|s| s != "0")
        };
        let began = sys::wait_until(Duration::from_secs(20), is_another);
        check!(began, "the program: expected it to begin in 20 s");
        let mut maps = mappings(&pid)?;
        check!(
            maps.len() > 3,
            "mappings of the program: expected some, found {maps:x?}"
        );
        maps.push((buf.at(0), 8));
        let mut room = vec![0; PAGE];
        for (addr, _) in maps {
            let tried = |request, data: Data<'_>, what: &str| {
                let result = device.command(request, addr, 1, data);
                expect_errno(result, &[EFAULT, EINVAL], what)
            };
            if addr >> 47 != 0 {
                continue;
            }
            tried(HMM_READ, Data::Into(&mut room), "READ")?;
            tried(HMM_READ_UNLOCKED, Data::Into(&mut room), "READ_UNLOCKED")?;
            tried(HMM_WRITE, Data::From(&room), "WRITE")?;
            tried(HMM_MIGRATE_TO_DEV, Data::Into(&mut room), "MIGRATE_TO_DEV")?;
            tried(HMM_MIGRATE_TO_SYS, Data::Nowhere, "MIGRATE_TO_SYS")?;
            tried(HMM_EXCLUSIVE, Data::Into(&mut room), "EXCLUSIVE")?;
            tried(HMM_SNAPSHOT, Data::Into(&mut room), "SNAPSHOT")?;
            let inspected = device.inspect_at(addr, 1, 0);
            expect_errno(inspected, &[EFAULT, EINVAL], "ZDM_INSPECT")?;
            for flags in [0, ZDM_FAULT_WRITE] {
                expect_errno(device.fault(addr, 1, flags), &[EFAULT], "ZDM_FAULT")?;
            }
        }
        check!(
            opener.child.is_running()?,
            "the program: expected it to run, found its end"
        );
        opener.child.kill()?;
    }
    // It is of no use to other tests.
    let _ = fs::remove_file(PROGRAM);
    works(ctx)
}

/// Every command that acts on the memory of the opener, on a part of `buf` that depends on `round`.
/// Returns how many succeeded.
fn commands(device: &Device, buf: &Buffer, round: usize) -> usize {
    let n = 16;
    let first = round * 5 % (buf.pages() - n);
    let results = [
        device.to_device(buf, first, n).is_ok(),
        device.read(buf, first, n).is_ok(),
        device.exclusive(buf, first, 2).is_ok(),
        device.write(buf, first, &[7; PAGE]).is_ok(),
        device.read_unlocked(buf, first, n).is_ok(),
        device.snapshot(buf, first, n).is_ok(),
        device.inspect(buf, first, n).is_ok(),
        device
            .fault(buf.at(first), n as u64, ZDM_FAULT_WRITE)
            .is_ok(),
        device.to_system(buf, first, n / 2).is_ok(),
    ];
    results.into_iter().filter(|is_ok| *is_ok).count()
}

/// A process becomes another program while its threads, and another process, use the file.
fn program_in_use(ctx: &Ctx) -> Outcome {
    const ROUNDS: usize = 12;
    const N: usize = 64;
    let buf = Buffer::anon(N)?;
    let targets = open_each_kind(ctx)?;
    let mut longest = Duration::ZERO;
    let mut done = 0;
    for round in 0..ROUNDS {
        let target = &targets[round % targets.len()];
        let opener = Opener::start(target.node(), |device, socket| {
            buf.fill(0, N, 1690);
            if round % 2 == 1 {
                peers::keep_across_exec(device).or_fail("fcntl")?;
            }
            std::thread::scope(|scope| {
                let buf = &buf;
                for thread in 0..2 {
                    scope.spawn(move || {
                        for round in thread.. {
                            commands(device, buf, round);
                        }
                    });
                }
                let told = say_word(socket).and_then(|()| wait_word(socket));
                let _ = Command::new(BUSYBOX).arg0("true").exec();
                // The other threads do not end.
                sys::exit_now(if told.is_ok() { 3 } else { 4 })
            })
        })?;
        let end = Instant::now() + Duration::from_millis(5 + 7 * round as u64 % 30);
        for round in 0.. {
            done += commands(&opener.device, &buf, round);
            if Instant::now() >= end {
                break;
            }
        }
        opener.tell()?;
        let start = Instant::now();
        for round in 0..20 {
            commands(&opener.device, &buf, round);
        }
        check_eq!(opener.child.exit()?, Exit::Code(0), "end of the program");
        longest = longest.max(start.elapsed());
        drop(opener.device);
        target.expect_empty()?;
    }
    note(&format!(
        "{done} commands; exec and end took {longest:?} at most"
    ));
    check!(done > ROUNDS, "commands that succeeded: found {done}");
    check!(
        longest < Duration::from_secs(8),
        "time of exec and end: expected less than 8 s, found {longest:?}"
    );
    works(ctx)
}

/// Commands on memory whose processes end meanwhile, so that the last user of the address space is
/// one of the commands.
fn last_user_of_another(ctx: &Ctx) -> Outcome {
    const ROUNDS: usize = 24;
    const N: usize = 256;
    let buf = Buffer::anon(N)?;
    let targets = open_each_kind(ctx)?;
    let mut done = 0;
    for round in 0..ROUNDS {
        let target = &targets[round % targets.len()];
        let opener = Opener::start(target.node(), |_, socket| {
            buf.fill(0, N, 1691);
            say_word(socket)?;
            wait_word(socket)?;
            std::thread::sleep(Duration::from_micros(round as u64 * 500));
            sys::exit_now(0)
        })?;
        let device = &opener.device;
        opener.tell()?;
        let end = Instant::now() + Duration::from_secs(10);
        let mut gone = false;
        for round in 0.. {
            done += commands(device, &buf, round);
            gone = !opener.child.is_running()?;
            if gone || Instant::now() >= end {
                break;
            }
        }
        check!(gone, "the opener: expected its end in 10 s");
        // Nobody else has the address space.
        let result = device.fault(buf.at(0), 1, 0);
        expect_errno(result, &[EFAULT], "ZDM_FAULT after the end")?;
        target.expect_empty()?;
        opener.child.join()?;
    }
    note(&format!("{done} commands"));
    check!(done > ROUNDS, "commands that succeeded: found {done}");
    works(ctx)
}

/// Commands on the memory of a process that is killed, and whose memory is freed under them.
fn freed_in_use(ctx: &Ctx) -> Outcome {
    const ROUNDS: usize = 18;
    const N: usize = 256;
    let buf = Buffer::anon(N)?;
    let targets = open_each_kind(ctx)?;
    let (done, freed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for round in 0..ROUNDS {
        let target = &targets[round % targets.len()];
        let opener = Opener::start(target.node(), |_, socket| {
            buf.fill(0, N, 1692);
            say_word(socket)?;
            wait_word(socket)
        })?;
        let process = PidFd::open(opener.child.pid()).or_fail("pidfd_open")?;
        let stop = AtomicBool::new(false);
        let device = &opener.device;
        std::thread::scope(|scope| -> Outcome {
            let _stop = threads::SetOnDrop(&stop);
            for thread in 0..2 {
                let (stop, done, buf) = (&stop, &done, &buf);
                scope.spawn(move || {
                    for round in thread.. {
                        done.fetch_add(commands(device, buf, round), Ordering::Relaxed);
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(4 + round as u64));
            sys::kill(opener.child.pid(), libc::SIGKILL).or_fail("kill")?;
            for _ in 0..50 {
                if process.free_memory().is_ok() {
                    freed.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        })?;
        let end = opener.child.exit()?;
        check_eq!(end, Exit::Signal(libc::SIGKILL), "end of the opener");
        target.expect_empty()?;
    }
    let (done, freed) = (done.into_inner(), freed.into_inner());
    note(&format!("{done} commands, memory freed {freed} times"));
    check!(done > ROUNDS, "commands that succeeded: found {done}");
    check!(
        freed > 0,
        "process_mrelease: expected successes, found none"
    );
    works(ctx)
}

/// The last to have a file is no process: a socket in a message of its own, which the garbage
/// collector finds, or a ring.
fn closed_by_the_kernel(ctx: &Ctx) -> Outcome {
    const N: usize = 64;
    for target in open_each_kind(ctx)? {
        for ring in [false, true] {
            let device = Target::open(ctx, target.node())?;
            let buf = Buffer::filled(N, 1693)?;
            let pinned = Buffer::filled(4, 1694)?;
            device
                .pin(&pinned, 0, 4, ZDM_PIN_WRITE)
                .or_fail("ZDM_PIN")?;
            device.move_all(&buf, 1693)?;
            if ring {
                let Ok(uring) = Uring::new() else { continue };
                uring
                    .register_file(&*device)
                    .or_fail("IORING_REGISTER_FILES")?;
                drop(device);
                target.expect(&buf, 0, N, N)?;
                drop(uring);
            } else {
                let (one, other) = UnixStream::pair().or_fail("socketpair")?;
                peers::send_file(&one, &*device).or_fail("sendmsg")?;
                drop(device);
                target.expect(&buf, 0, N, N)?;
                peers::send_file(&one, &other).or_fail("sendmsg")?;
                // The end of the last socket that is no message starts the collector.
                drop(other);
                drop(one);
            }
            let returned = sys::wait_until(Duration::from_secs(10), || {
                target.on_device(&buf, 0, N).is_ok_and(|pages| pages == 0)
            });
            check!(returned, "pages of the file: expected them back in 10 s");
            buf.check(0, N, 1693)?;
            let pins = target.inspect(&pinned, 0, 4).or_fail("ZDM_INSPECT")?;
            check!(
                pins.iter().all(|page| page.pins == 0),
                "pins of the file: expected none, found {pins:x?}"
            );
        }
    }
    works(ctx)
}
