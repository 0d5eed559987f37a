// SPDX-License-Identifier: GPL-2.0

//! Files whose contents come from a server that never answers, as any user can mount them by FUSE. A
//! task that waits for the contents can be killed, and no other task waits.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use super::lives::{Opener, say_word, wait_word};
use super::upkeep::KILLED;
use super::{PINS, works};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Data, Device, PAGE, check_bytes};
use crate::fuse::SlowFile;
use crate::harness::{Child, note};
use crate::tests::target::{PRIVATE, Target};
use crate::tests::{Ctx, Needs, Test, test, unloads};
use crate::uapi::*;
use crate::{check, sys};

pub const TESTS: &[Test] = &[
    test("hostile.silent_source", silent_source),
    test("hostile.opener_does_not_wait", opener_does_not_wait),
    unloads(Needs::Loaded(""), test("hostile.silent_end", silent_end)),
];

/// The pages of each buffer.
const N: usize = 4;

/// A command on a device. The first buffer has plain memory; the second maps the silent file.
type Work = fn(&Device, &Buffer, &Buffer) -> std::io::Result<()>;

/// Runs `body` with a file whose contents nobody gets.
fn with_silent_file(body: impl FnOnce(&File) -> Outcome) -> Outcome {
    let path = Path::new("/tmp/zdm-silent");
    let silent = match SlowFile::mount(path) {
        Ok(file) => file,
        Err(e) => return Err(Fail::Skip(format!("no FUSE: {e}"))),
    };
    let server = Child::spawn(|| {
        loop {
            // It takes reads, and forgets them.
            silent.next(Duration::from_secs(60)).or_fail("FUSE")?;
        }
    })?;
    let opened = || -> Outcome<File> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.or_fail("open of the silent file")?;
        // The kernel asks for the size now. Beyond the size a fault fails at once.
        let size = file.metadata().or_fail("fstat of the silent file")?.len();
        check!(size >= (N * PAGE) as u64, "size of the file: found {size}");
        Ok(file)
    };
    let result = opened().and_then(|file| body(&file));
    server.kill()?;
    result
}

/// Maps the file. The kernel does not map it, nor can the task be killed, while it waits for a page.
fn private(file: &File) -> Outcome<Buffer> {
    Buffer::of_file(file, N, libc::MAP_PRIVATE).or_fail("mmap of the silent file")
}

/// Starts a process for each of `works`, with a device of its own.
fn start(
    works: &[(&'static str, Work)],
    plain: &Buffer,
    silent: &Buffer,
) -> Outcome<Vec<(&'static str, Child)>> {
    works
        .iter()
        .map(|(name, work)| {
            let child = Child::spawn(|| {
                let device = Device::open(0)?;
                // The result of a command that fails is of no interest here.
                let _ = work(&device, plain, silent);
                Ok(())
            })?;
            Ok((*name, child))
        })
        .collect()
}

/// Checks that each of the processes waits, and that it ends soon when it is killed.
fn killed_while_they_wait(waiting: Vec<(&'static str, Child)>) -> Outcome {
    let mut longest = (Duration::ZERO, "");
    let mut wrong = Vec::new();
    for (name, child) in waiting {
        if !child.is_running()? {
            wrong.push(format!("{name} does not wait"));
        }
        let start = Instant::now();
        sys::kill(child.pid(), libc::SIGKILL).or_fail("kill")?;
        if sys::wait_until(KILLED, || child.is_running().is_ok_and(|runs| !runs)) {
            child.exit()?;
        } else {
            wrong.push(format!("{name} is there {KILLED:?} after its SIGKILL"));
        }
        longest = longest.max((start.elapsed(), name));
    }
    note(&format!("longest after SIGKILL: {longest:?}"));
    check!(
        wrong.is_empty(),
        "commands that wait for a silent server: expected each to wait until it is killed, found \
         {wrong:?}"
    );
    Ok(())
}

/// Checks that others can use the device while processes wait.
fn others_work(ctx: &Ctx) -> Outcome {
    let start = Instant::now();
    works(ctx)?;
    let target = Target::open(ctx, PRIVATE)?;
    target.release().or_fail("RELEASE")?;
    let (audit, records) = target.try_audit(0).or_fail("ZDM_AUDIT")?;
    let took = start.elapsed();
    check!(
        audit.found == 0,
        "violations: expected none, found {records:x?}"
    );
    check!(
        took < Duration::from_secs(5),
        "time of the commands of others: expected less than 5 s, found {took:?}"
    );
    Ok(())
}

/// The range of a command is in the silent file.
fn silent_source(ctx: &Ctx) -> Outcome {
    const WAIT: [(&str, Work); 7] = [
        ("READ", |d, _, silent| d.read(silent, 0, 2).map(drop)),
        ("READ_UNLOCKED", |d, _, silent| {
            d.read_unlocked(silent, 0, 2).map(drop)
        }),
        ("WRITE", |d, _, silent| {
            d.write(silent, 1, &[1; PAGE]).map(drop)
        }),
        ("EXCLUSIVE", |d, _, silent| {
            d.exclusive(silent, 1, 1).map(drop)
        }),
        ("ZDM_FAULT", |d, _, silent| {
            d.fault(silent.at(0), 2, 0).map(drop)
        }),
        ("ZDM_FAULT_WRITE", |d, _, silent| {
            d.fault(silent.at(2), 2, ZDM_FAULT_WRITE).map(drop)
        }),
        ("a range that ends in the file", |d, plain, silent| {
            let near = plain.pages() - 1;
            let Ok(()) = silent.move_pages(0, 1, plain, near) else {
                return Ok(());
            };
            d.read(plain, near - 1, 2).map(drop)
        }),
    ];
    const PIN: [(&str, Work); PINS.len()] = [
        ("ZDM_PIN", |d, _, b| d.pin(b, 0, 1, PINS[0]).map(drop)),
        ("ZDM_PIN 1", |d, _, b| d.pin(b, 0, 1, PINS[1]).map(drop)),
        ("ZDM_PIN 2", |d, _, b| d.pin(b, 0, 1, PINS[2]).map(drop)),
        ("ZDM_PIN 3", |d, _, b| d.pin(b, 0, 1, PINS[3]).map(drop)),
        ("ZDM_PIN 4", |d, _, b| d.pin(b, 0, 1, PINS[4]).map(drop)),
        ("ZDM_PIN 5", |d, _, b| d.pin(b, 0, 1, PINS[5]).map(drop)),
    ];
    let plain = Buffer::filled(N, 1730)?;
    with_silent_file(|file| {
        let silent = private(file)?;
        let waiting = start(&[&WAIT[..], &PIN[..]].concat(), &plain, &silent)?;
        // What needs no contents does not wait for them.
        let device = Device::open(0)?;
        let begun = Instant::now();
        let _ = device.to_device(&silent, 0, N);
        let _ = device.to_system(&silent, 0, N);
        let _ = device.snapshot(&silent, 0, N);
        let _ = device.inspect(&silent, 0, N);
        let _ = device.check_exclusive(&silent, 0, N);
        let took = begun.elapsed();
        check!(
            took < Duration::from_secs(2),
            "time of commands that need no contents: found {took:?}"
        );
        std::thread::sleep(Duration::from_millis(600));
        let others = others_work(ctx);
        killed_while_they_wait(waiting)?;
        others
    })?;
    works(ctx)
}

/// The opener of a file goes on while another process waits, by way of the file, for what the opener
/// has mapped.
fn opener_does_not_wait(ctx: &Ctx) -> Outcome {
    const WAIT: [(&str, Work); 4] = [
        ("READ", |d, _, silent| d.read(silent, 0, 1).map(drop)),
        ("WRITE", |d, _, silent| {
            d.write(silent, 1, &[1; PAGE]).map(drop)
        }),
        ("EXCLUSIVE", |d, _, silent| {
            d.exclusive(silent, 2, 1).map(drop)
        }),
        ("ZDM_FAULT", |d, _, silent| {
            d.fault(silent.at(3), 1, 0).map(drop)
        }),
    ];
    let plain = Buffer::filled(N, 1731)?;
    with_silent_file(|file| {
        let silent = private(file)?;
        for (name, work) in WAIT {
            let opener = Opener::start(0, |_, socket| {
                say_word(socket)?;
                wait_word(socket)?;
                // This wants the mmap lock for writing.
                let more = Buffer::filled(N, 1732)?;
                more.protect(0, N, libc::PROT_READ)?;
                say_word(socket)
            })?;
            let device = &opener.device;
            let waiting = Child::spawn(|| {
                let _ = work(device, &plain, &silent);
                Ok(())
            })?;
            std::thread::sleep(Duration::from_millis(300));
            check!(waiting.is_running()?, "{name}: expected it to wait");
            opener.tell()?;
            let went_on = opener.hears(Duration::from_secs(2))?;
            // The file is of use meanwhile.
            if went_on {
                let read = device.read(&plain, 0, N).or_fail("READ")?;
                check_bytes(&read.data, 1731, 0, "READ")?;
            }
            killed_while_they_wait(vec![(name, waiting)])?;
            check!(
                went_on,
                "an opener whose memory another process waits for in {name}: expected it to map \
                 memory within 2 s"
            );
            opener.child.join()?;
        }
        Ok(())
    })?;
    works(ctx)
}

/// The other end of a command, or its argument, is in the silent file. Afterwards the module can be
/// unloaded.
fn silent_end(ctx: &Ctx) -> Outcome {
    fn command(d: &Device, request: u64, plain: &Buffer, silent: &Buffer) -> std::io::Result<()> {
        d.command(request, plain.at(0), N as u64, Data::At(silent, 0))
            .map(drop)
    }
    const ENDS: [(&str, Work); 8] = [
        ("READ", |d, p, s| command(d, HMM_READ, p, s)),
        ("READ_UNLOCKED", |d, p, s| {
            command(d, HMM_READ_UNLOCKED, p, s)
        }),
        ("WRITE", |d, p, s| command(d, HMM_WRITE, p, s)),
        ("MIGRATE_TO_DEV", |d, p, s| {
            command(d, HMM_MIGRATE_TO_DEV, p, s)
        }),
        ("EXCLUSIVE", |d, p, s| command(d, HMM_EXCLUSIVE, p, s)),
        ("SNAPSHOT", |d, p, s| command(d, HMM_SNAPSHOT, p, s)),
        ("ZDM_INSPECT", |d, p, s| {
            d.inspect_with(&mut Inspect {
                addr: p.at(0),
                npages: N as u64,
                pages: s.at(0),
                ..Inspect::default()
            })
        }),
        ("the argument of READ", |d, _, s| d.ioctl_in(HMM_READ, s, 0)),
    ];
    const ARGUMENTS: [(&str, Work); 6] = [
        ("the argument of MIGRATE_TO_DEV", |d, _, s| {
            d.ioctl_in(HMM_MIGRATE_TO_DEV, s, 0)
        }),
        ("the argument of FLAGS", |d, _, s| {
            d.ioctl_in(HMM_FLAGS, s, 0)
        }),
        ("the argument of ZDM_PIN", |d, _, s| {
            d.ioctl_in(ZDM_PIN, s, 0)
        }),
        ("the argument of ZDM_AUDIT", |d, _, s| {
            d.ioctl_in(ZDM_AUDIT, s, 0)
        }),
        ("the argument of ZDM_INSPECT", |d, _, s| {
            d.ioctl_in(ZDM_INSPECT, s, 0)
        }),
        ("ZDM_STATS", |d, _, s| d.ioctl_in(ZDM_STATS, s, 0)),
    ];
    let plain = Buffer::filled(N, 1733)?;
    with_silent_file(|file| {
        let silent = private(file)?;
        let waiting = start(&[&ENDS[..], &ARGUMENTS[..]].concat(), &plain, &silent)?;
        std::thread::sleep(Duration::from_millis(600));
        let others = others_work(ctx);
        killed_while_they_wait(waiting)?;
        others?;
        plain.check(0, N, 1733)?;
        // The server is silent still.
        ctx.module.unload()
    })
}
