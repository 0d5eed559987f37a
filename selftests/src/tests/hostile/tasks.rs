// SPDX-License-Identifier: GPL-2.0

//! Tasks that are not what the driver may expect: they share memory without being threads, advise the
//! memory of another process, wait in the midst of a change of their memory, or open many files.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use linux_raw_sys::general::{
    UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE,
    UFFD_FEATURE_EVENT_UNMAP,
};
use nix::sys::resource::Resource;

use super::lives::{Opener, say_word, wait_word};
use super::upkeep::KILLED;
use super::{every_ioctl, works};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device, HUGE_PAGES, check_bytes};
use crate::harness::{Child, note};
use crate::peers::{self, PidFd};
use crate::sys::{self, Exit};
use crate::tests::target::{PRIVATE, Target, huge_filled, open_each_kind};
use crate::tests::{Ctx, Test, test};
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("hostile.shared_memory", shared_memory),
    test("hostile.advised_by_another", advised_by_another),
    test("hostile.events_that_nobody_reads", events_that_nobody_reads),
    test("hostile.many_files", many_files),
];

/// A process that shares its memory with another one, and has descriptors of its own, opens a device: the
/// file is one of the memory that both have, also when the process has ended.
fn shared_memory(ctx: &Ctx) -> Outcome {
    const N: usize = 16;
    for target in open_each_kind(ctx)? {
        let node = target.node();
        for keep in [false, true] {
            let buf = Buffer::filled(N, 1760)?;
            let pinned = Buffer::filled(4, 1761)?;
            let (here, there) = UnixStream::pair().or_fail("socketpair")?;
            let mut result = Ok(());
            let end = sys::in_shared_memory(|| {
                result = (|| -> Outcome {
                    let device = Target::open(ctx, node)?;
                    device.move_all(&buf, 1760)?;
                    device
                        .pin(&pinned, 0, 4, ZDM_PIN_WRITE)
                        .or_fail("ZDM_PIN")?;
                    if keep {
                        peers::send_file(&there, &*device).or_fail("sendmsg")?;
                    }
                    // The file stays open until the process ends.
                    sys::exit_now(0)
                })();
                1
            })
            .or_fail("clone")?;
            result?;
            check_eq!(end, Exit::Code(0), "end of the process");
            if !keep {
                target.expect(&buf, 0, N, 0)?;
                buf.check(0, N, 1760)?;
                continue;
            }
            let device = Device::of_file(peers::receive_file(&here).or_fail("recvmsg")?);
            target.expect(&buf, 0, N, N)?;
            let read = device.read(&buf, 0, N).or_fail("READ")?;
            check_bytes(&read.data, 1760, 0, "READ")?;
            buf.check(0, N / 2, 1760)?;
            device.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
            every_ioctl(&device, buf.at(0), N)?;
            let pins = target.inspect(&pinned, 0, 4).or_fail("ZDM_INSPECT")?;
            check!(
                pins.iter().all(|page| page.pins == 1),
                "pins of a process that has ended: expected 1 each, found {pins:x?}"
            );
            drop(device);
            target.expect(&buf, 0, N, 0)?;
            let pins = target.inspect(&pinned, 0, 4).or_fail("ZDM_INSPECT")?;
            check!(
                pins.iter().all(|page| page.pins == 0),
                "pins after the close: expected none, found {pins:x?}"
            );
            buf.check(0, N, 1760)?;
        }
    }
    works(ctx)
}

/// Another process advises pages of a process whose pages go to the device and back.
fn advised_by_another(ctx: &Ctx) -> Outcome {
    // MADV_COLLAPSE is 25, MADV_GUARD_INSTALL 102.
    const ADVICES: [i32; 8] = [
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_WILLNEED,
        25,
        libc::MADV_PAGEOUT,
        libc::MADV_DONTNEED,
        libc::MADV_FREE,
        102,
    ];
    let me = sys::pid();
    for target in open_each_kind(ctx)? {
        for huge in [false, true] {
            let buf = match huge {
                true => huge_filled(1, 1762)?,
                false => Buffer::filled(HUGE_PAGES, 1762)?,
            };
            let n = buf.pages();
            target.move_all(&buf, 1762)?;
            let (here, there) = UnixStream::pair().or_fail("socketpair")?;
            let child = Child::spawn(|| {
                let process = PidFd::open(me).or_fail("pidfd_open")?;
                let mut taken = 0;
                let end = Instant::now() + Duration::from_millis(1500);
                for round in 0.. {
                    let advice = ADVICES[round % ADVICES.len()];
                    let first = round * 37 % n;
                    let len = (n - first).min(if round % 5 == 0 { n } else { 64 });
                    let result = process.advise(&buf, first, len, advice);
                    let is_harmless =
                        !matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE | 102);
                    check!(
                        result.is_err() || is_harmless,
                        "advice {advice} on another process: expected an error"
                    );
                    taken += usize::from(result.is_ok());
                    if round == 0 {
                        say_word(&there)?;
                    }
                    if Instant::now() >= end {
                        break;
                    }
                }
                note(&format!("{taken} advices"));
                check!(taken > 8, "advices that were taken: found {taken}");
                Ok(())
            })?;
            wait_word(&here)?;
            for round in 0.. {
                let first = round * 61 % (n - 32);
                every_ioctl(&target, buf.at(first), 32)?;
                let _ = target.to_device(&buf, 0, n);
                if round % 4 == 0 {
                    buf.check(0, n, 1762)?;
                }
                if !child.is_running()? {
                    break;
                }
            }
            child.join()?;
            buf.check(0, n, 1762)?;
        }
    }
    works(ctx)
}

/// A process waits in the midst of a change of its memory, because nobody reads the event of its
/// userfaultfd. Commands on its memory go on, and it can be killed.
fn events_that_nobody_reads(ctx: &Ctx) -> Outcome {
    const N: usize = 32;
    const EVENTS: u32 = UFFD_FEATURE_EVENT_FORK
        | UFFD_FEATURE_EVENT_REMAP
        | UFFD_FEATURE_EVENT_REMOVE
        | UFFD_FEATURE_EVENT_UNMAP;
    type Change = fn(&Buffer, &Buffer) -> Outcome;
    const CHANGES: [(&str, Change); 5] = [
        ("madvise", |buf, _| buf.advise(4, 8, libc::MADV_DONTNEED)),
        ("MADV_FREE", |buf, _| buf.advise(4, 8, libc::MADV_FREE)),
        ("munmap", |buf, _| buf.unmap(4, 8)),
        ("mremap", |buf, place| buf.move_pages(4, 8, place, 0)),
        ("fork", |_, _| sys::fork(|| 0).or_fail("fork").map(drop)),
    ];
    let buf = Buffer::anon(N)?;
    let place = Buffer::anon(N)?;
    if Uffd::with_features(EVENTS.into()).is_err() {
        return Err(Fail::Skip("no userfaultfd with events".into()));
    }
    let mut waited = 0;
    for target in open_each_kind(ctx)? {
        for (name, change) in CHANGES {
            let opener = Opener::start(target.node(), |device, socket| {
                buf.fill(0, N, 1763);
                let uffd = Uffd::with_features(EVENTS.into()).or_fail("userfaultfd")?;
                uffd.register(&buf, 0, N).or_fail("UFFDIO_REGISTER")?;
                device.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
                say_word(socket)?;
                wait_word(socket)?;
                change(&buf, &place)?;
                say_word(socket)?;
                wait_word(socket)
            })?;
            let device = &opener.device;
            opener.tell()?;
            std::thread::sleep(Duration::from_millis(200));
            let start = Instant::now();
            for _ in 0..2 {
                let read = device.read(&buf, 16, 8).or_fail("READ")?;
                check_bytes(&read.data, 1763, 16, "READ")?;
                every_ioctl(device, buf.at(16), 16)?;
                let _ = device.to_device(&buf, 16, 16);
                let _ = device.snapshot(&buf, 0, N);
                let _ = device.inspect(&buf, 0, N);
                let _ = device.to_system(&buf, 0, N);
            }
            let took = start.elapsed();
            check!(
                took < Duration::from_secs(4),
                "{name}: time of commands meanwhile: found {took:?}"
            );
            waited += usize::from(!opener.hears(Duration::from_millis(10))?);
            let start = Instant::now();
            opener.child.kill()?;
            let took = start.elapsed();
            check!(
                took < KILLED,
                "{name}: time that the killed process stays: found {took:?}"
            );
            drop(opener.device);
            target.expect_empty()?;
        }
    }
    note(&format!("{waited} waited"));
    check!(waited > 0, "processes that waited: expected some");
    works(ctx)
}

/// A process with many open files of all devices ends in time, and so do the changes of its memory, of which
/// each file is told.
fn many_files(ctx: &Ctx) -> Outcome {
    const FILES: usize = 900;
    const N: usize = 64;
    let (news, say) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        sys::limit(Resource::RLIMIT_NOFILE, FILES as u64).or_fail("setrlimit")?;
        let mut files = Vec::new();
        while let Ok(file) = Device::try_open(files.len() % ctx.module.nodes().len()) {
            files.push(file);
        }
        check!(
            files.len() > FILES - 64,
            "open files: found {}",
            files.len()
        );
        let buf = Buffer::filled(N, 1764)?;
        let start = Instant::now();
        for (i, file) in files.iter().enumerate() {
            let _ = file.read(&buf, 0, N);
            if i % 64 == 0 {
                let _ = file.to_device(&buf, i % N, 1);
            }
        }
        let used = start.elapsed();
        let start = Instant::now();
        for page in 0..N {
            buf.advise(page, 1, libc::MADV_DONTNEED)?;
        }
        let told = start.elapsed();
        note(&format!(
            "{} files, used in {used:?}, told of {N} changes in {told:?}",
            files.len()
        ));
        check!(
            told < Duration::from_secs(10),
            "time of {N} changes: expected less than 10 s, found {told:?}"
        );
        buf.fill(0, N, 1765);
        let _ = files[0].to_device(&buf, 0, N);
        std::io::Write::write_all(&mut &say, b"n").or_fail("pipe")?;
        std::thread::sleep(Duration::from_secs(60));
        Ok(())
    })?;
    drop(say);
    let begun = sys::readable(&news, Duration::from_secs(60)).or_fail("poll")?;
    let start = Instant::now();
    let end = child.kill()?;
    let took = start.elapsed();
    note(&format!("ended in {took:?}"));
    check!(begun, "the process: expected it to open its files in 60 s");
    check_eq!(end, Exit::Signal(libc::SIGKILL), "end of the process");
    check!(
        took < 2 * KILLED,
        "time that the killed process stays: found {took:?}"
    );
    Target::open(ctx, PRIVATE)?.expect_empty()?;
    works(ctx)
}
