// SPDX-License-Identifier: GPL-2.0

//! The charges of a process and its memory cgroup.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::target::{GENERIC, PRIVATE, Target};
use super::{Ctx, Test, test};
use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, Data, PAGE};
use crate::harness::Child;
use crate::proc;
use crate::sys;
use crate::uapi::{HMM_MIGRATE_TO_DEV, HMM_MIGRATE_TO_SYS};

pub const TESTS: &[Test] = &[
    test("account.rss", rss::<PRIVATE>),
    test("account.memcg", memcg::<PRIVATE>),
    test("account_generic.rss", rss::<GENERIC>),
    test("account_generic.memcg", memcg::<GENERIC>),
];

const N: usize = 256;
/// The smallest leak, one page per trip, is well above the slack.
const TRIPS: usize = 10;

/// RssAnon and smaps are the same before and after the migration, and the pages count for the
/// process while they are on the device.
fn rss<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let device = Target::open(ctx, NODE)?;
    // Pages without access at both ends keep the kernel from joining the mapping with a neighbour;
    // smaps would then show both as one.
    let buf = Buffer::anon(N + 2)?;
    buf.fill(1, N, 95);
    buf.protect(0, 1, libc::PROT_NONE)?;
    buf.protect(N + 1, 1, libc::PROT_NONE)?;
    let mut data = vec![0; N * PAGE];

    let mut trip = |by_fault: bool| -> Outcome {
        let into = Data::Into(&mut data);
        let (addr, n) = (buf.at(1), N as u64);
        device
            .command(HMM_MIGRATE_TO_DEV, addr, n, into)
            .or_fail("MIGRATE_TO_DEV")?;
        device.expect(&buf, 1, N, N)?;
        check_eq!(
            proc::smaps_anonymous(&buf)?,
            n,
            "anonymous pages in smaps while on the device"
        );
        if !by_fault || device.cpu_maps() {
            device
                .command(HMM_MIGRATE_TO_SYS, addr, n, Data::Nowhere)
                .or_fail("MIGRATE_TO_SYS")?;
        }
        buf.check(1, N, 95)?;
        super::expect_present(&buf, 1, N)
    };
    // The first trip also makes the allocations that the process keeps.
    trip(false)?;
    let start = proc::rss_anon()?;
    for i in 0..TRIPS {
        trip(i % 2 == 1)?;
        check_eq!(
            proc::smaps_anonymous(&buf)?,
            N as u64,
            "anonymous pages in smaps"
        );
    }
    let end = proc::rss_anon()?;
    // The heap may have changed by a few pages.
    let slack = TRIPS as u64 - 2;
    check!(
        start.abs_diff(end) <= slack,
        "RssAnon after {TRIPS} round trips: expected {start} +- {slack} pages, found {end}"
    );

    // Pages that are unmapped on the device are no longer charged.
    let into = Data::Into(&mut data);
    device
        .command(HMM_MIGRATE_TO_DEV, buf.at(1), N as u64, into)
        .or_fail("MIGRATE_TO_DEV")?;
    buf.unmap(1, N)?;
    let gone = end.saturating_sub(proc::rss_anon()?);
    check!(
        gone.abs_diff(N as u64) <= slack,
        "fall of RssAnon by munmap: expected {N} +- {slack} pages, found {gone}"
    );
    Ok(())
}

const CGROUPS: &str = "/sys/fs/cgroup";

/// Makes a memory cgroup, and mounts the hierarchy if it is not mounted.
pub(super) fn new_cgroup() -> Outcome<PathBuf> {
    let root = Path::new(CGROUPS);
    let skip = |what: &str, e: std::io::Error| Fail::Skip(format!("{what}: {e}"));
    if !root.join("cgroup.controllers").exists() {
        sys::mount_cgroup2(CGROUPS).map_err(|e| skip("mount of cgroup2", e))?;
    }
    fs::write(root.join("cgroup.subtree_control"), "+memory")
        .map_err(|e| skip("memory controller", e))?;
    let dir = root.join("zdm-selftests");
    // A killed run may have left the cgroup behind.
    let _ = fs::remove_dir(&dir);
    fs::create_dir(&dir).or_fail("mkdir of a cgroup")?;
    Ok(dir)
}

/// Moves the calling process to a cgroup.
pub(super) fn join_cgroup(dir: &Path) -> Outcome {
    fs::write(dir.join("cgroup.procs"), "0").or_fail("cgroup.procs")
}

/// Makes a cgroup with `limits`, the files and what they are to say, for `body`, whose processes join it
/// and have ended when it returns.
pub(super) fn in_cgroup(limits: &[(&str, &str)], body: impl FnOnce(&Path) -> Outcome) -> Outcome {
    let dir = new_cgroup()?;
    for (file, limit) in limits {
        fs::write(dir.join(file), limit).or_fail(file)?;
    }
    let result = body(&dir);
    let removed = sys::wait_until(Duration::from_secs(5), || fs::remove_dir(&dir).is_ok());
    result?;
    check!(removed, "rmdir of an empty cgroup: expected success");
    Ok(())
}

/// The anonymous memory charged to a cgroup, in pages. The value is exact, because reading flushes
/// the per-CPU parts; memory.current includes charges that CPUs hold in advance.
pub(super) fn charged(dir: &Path) -> Outcome<u64> {
    let text = fs::read_to_string(dir.join("memory.stat")).or_fail("memory.stat")?;
    let bytes = text
        .lines()
        .find_map(|l| l.strip_prefix("anon ")?.parse::<u64>().ok());
    match bytes {
        Some(n) => Ok(n / PAGE as u64),
        None => Err(Fail::failed("no anon in memory.stat")),
    }
}

/// memory.current, in pages.
pub(super) fn current(dir: &Path) -> Outcome<u64> {
    let text = fs::read_to_string(dir.join("memory.current")).or_fail("memory.current")?;
    match text.trim().parse::<u64>() {
        Ok(n) => Ok(n / PAGE as u64),
        Err(e) => Err(Fail::failed(format!("memory.current '{text}': {e}"))),
    }
}

/// A cgroup is charged for pages on the device until they are freed there: by munmap, which never
/// brings them back, and by exit.
fn memcg<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let dir = new_cgroup()?;
    let work = Child::spawn(|| {
        join_cgroup(&dir)?;
        let device = Target::open(ctx, NODE)?;
        let trip = || -> Outcome {
            let buf = Buffer::filled(N, 96)?;
            device.move_all(&buf, 96)?;
            buf.check(0, N / 2, 96)?;
            buf.unmap(0, N)
        };
        // The first trip is charged for a heap that stays. The statistics are flushed every two
        // seconds.
        trip()?;
        std::thread::sleep(Duration::from_secs(3));
        let idle = charged(&dir)?;
        let slack = N as u64 / 2;
        for _ in 0..TRIPS {
            trip()?;
        }
        let mut end = 0;
        let fell = sys::wait_until(Duration::from_secs(10), || {
            end = charged(&dir).unwrap_or(u64::MAX);
            end <= idle + slack
        });
        check!(
            fell,
            "anon in memory.stat after {TRIPS} trips: expected {idle} + {slack} pages at \
             most, found {end}"
        );
        // The second half of the test ends with pages on the device.
        let buf = Buffer::filled(N, 97)?;
        device.move_all(&buf, 97)?;
        sys::exit_now(0)
    })?;
    let worked = work.join();
    // A few CPUs may each keep charges for 64 pages in advance; a leak of whole trips is more than
    // that.
    let (mut left, limit) = (0, N as u64);
    let fell = sys::wait_until(Duration::from_secs(5), || {
        left = current(&dir).unwrap_or(u64::MAX);
        left < limit
    });
    fs::remove_dir(&dir).or_fail("rmdir of an empty cgroup")?;
    worked?;
    check!(
        fell,
        "memory.current of an empty cgroup: expected less than {limit} pages, found {left}"
    );
    Ok(())
}
