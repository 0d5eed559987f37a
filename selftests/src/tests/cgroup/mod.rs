// SPDX-License-Identifier: GPL-2.0

//! Memory cgroups with a limit, with small and huge pages. `account.rs` also checks that a charge
//! returns to its initial value.

pub mod life;

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::account::{current, join_cgroup, new_cgroup};
use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::{check, check_eq};

pub const TESTS: &[Test] = &[
    test("cgroup.limit", limit::<PRIVATE>),
    test("cgroup.huge", huge::<PRIVATE>),
    test("cgroup.oom", oom::<PRIVATE>),
    test("cgroup.oom_in_migration", oom_in_migration::<PRIVATE>),
    test("cgroup_coherent.limit", limit::<COHERENT>),
    test("cgroup_coherent.huge", huge::<COHERENT>),
    test("cgroup_coherent.oom", oom::<COHERENT>),
    test("cgroup_generic.limit", limit::<GENERIC>),
    test("cgroup_generic.huge", huge::<GENERIC>),
    test("cgroup_generic.oom", oom::<GENERIC>),
];

/// The pages of the buffer: 16 MiB.
const N: usize = 4096;
/// The pages that a process may need in addition: 8 MiB.
const REST: usize = 2048;

/// How many processes the OOM killer has killed in the cgroup.
fn oom_kills(dir: &Path) -> Outcome<u64> {
    let text = fs::read_to_string(dir.join("memory.events")).or_fail("memory.events")?;
    let kills = text
        .lines()
        .find_map(|l| l.strip_prefix("oom_kill ")?.parse().ok());
    kills.ok_or_else(|| Fail::failed("no oom_kill in memory.events"))
}

/// Runs a process in a new cgroup with a limit in pages; the process must end as `expected`.
/// Afterwards nothing must be charged.
fn within(limit: usize, expected: Exit, body: impl FnOnce(&Path) -> Outcome) -> Outcome {
    let dir = new_cgroup()?;
    fs::write(dir.join("memory.max"), (limit * PAGE).to_string()).or_fail("memory.max")?;
    let child = Child::spawn(|| {
        join_cgroup(&dir)?;
        body(&dir)
    })?;
    let exit = child.exit()?;
    let kills = oom_kills(&dir)?;
    // Each CPU may keep charges for 64 pages.
    let mut left = 0;
    let fell = sys::wait_until(Duration::from_secs(5), || {
        left = current(&dir).unwrap_or(u64::MAX);
        left < HUGE_PAGES as u64
    });
    fs::remove_dir(&dir).or_fail("rmdir of an empty cgroup")?;
    check_eq!(exit, expected, "end of the process");
    let expected_kills = u64::from(expected == Exit::Signal(libc::SIGKILL));
    check_eq!(kills, expected_kills, "processes that the cgroup killed");
    check!(
        fell,
        "memory.current of an empty cgroup: expected a stock of some pages, found {left}"
    );
    Ok(())
}

/// A number of pages that makes no huge page.
const PIECE: usize = 64;

/// Moves a buffer in pieces, so that the returned data needs little memory.
fn to_device(target: &Target, buf: &Buffer) -> Outcome {
    for first in (0..buf.pages()).step_by(HUGE_PAGES) {
        target
            .to_device(buf, first, HUGE_PAGES)
            .or_fail("MIGRATE_TO_DEV")?;
    }
    target.expect(buf, 0, buf.pages(), buf.pages())
}

/// A migration needs no second charge: with room for one and a half copies the pages can migrate
/// any number of times.
fn limit<const NODE: usize>(ctx: &Ctx) -> Outcome {
    within(N + REST, Exit::Code(0), |dir| {
        let target = Target::open(ctx, NODE)?;
        let buf = Buffer::filled(N, 480)?;
        for _ in 0..3 {
            to_device(&target, &buf)?;
            let charge = current(dir)?;
            check!(
                charge >= N as u64,
                "pages charged while on the device: expected {N} at least, found {charge}"
            );
            target.bring_back(&buf, 0, N)?;
        }
        buf.check(0, N, 480)
    })?;
    Target::open(ctx, NODE)?.expect_empty()
}

/// Huge pages are freed on the device as a whole, in parts and by exit.
fn huge<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const HUGE: usize = 4;
    within((HUGE + 2) * HUGE_PAGES + REST, Exit::Code(0), |_| {
        let target = Target::open(ctx, NODE)?;
        // Charges that are not returned soon exceed the limit.
        for round in 0..6 {
            let buf = huge_filled(HUGE, 481)?;
            let before = target.stats()?;
            to_device(&target, &buf)?;
            target.expect_large(&before, HUGE, 0, 0)?;
            buf.check(HUGE_PAGES, 8, 481)?;
            if round % 2 == 0 {
                buf.unmap(100, HUGE_PAGES)?;
                target.bring_back(&buf, 2 * HUGE_PAGES, HUGE_PAGES)?;
                buf.check(2 * HUGE_PAGES, HUGE_PAGES, 481)?;
            }
        }
        let buf = huge_filled(HUGE, 482)?;
        to_device(&target, &buf)?;
        sys::exit_now(0)
    })?;
    Target::open(ctx, NODE)?.expect_empty()
}

/// Memory on the device counts: with as much memory again the process exceeds its limit, is killed,
/// and leaves nothing behind.
fn oom<const NODE: usize>(ctx: &Ctx) -> Outcome {
    // Skip here if necessary: the process below cannot skip the test.
    Target::open(ctx, NODE)?;
    within(N + REST, Exit::Signal(libc::SIGKILL), |_| {
        let target = Target::open(ctx, NODE)?;
        let buf = Buffer::filled(N, 483)?;
        to_device(&target, &buf)?;
        let _more = Buffer::filled(N, 484)?;
        Err(Fail::failed("twice the limit: expected an end, found none"))
    })?;
    Target::open(ctx, NODE)?.expect_empty()
}

/// Here the migration itself exceeds the limit, because it fills empty places. The pieces are
/// small, because a huge page that exceeds the limit is refused and no process is killed for it.
fn oom_in_migration<const NODE: usize>(ctx: &Ctx) -> Outcome {
    Target::open(ctx, NODE)?;
    within(REST, Exit::Signal(libc::SIGKILL), |_| {
        let target = Target::open(ctx, NODE)?;
        let buf = Buffer::anon(N)?;
        for first in (0..N).step_by(PIECE) {
            target
                .to_device(&buf, first, PIECE)
                .or_fail("MIGRATE_TO_DEV")?;
        }
        Err(Fail::failed("twice the limit: expected an end, found none"))
    })?;
    Target::open(ctx, NODE)?.expect_empty()
}
