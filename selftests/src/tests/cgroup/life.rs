// SPDX-License-Identifier: GPL-2.0

//! Memory cgroups that are left, removed and full while pages charged to them are on the device,
//! with small and huge pages. `cgroup.rs` tests limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::tests::account::{current, join_cgroup};
use crate::tests::chain::{Image, SIZES, filled};
use crate::tests::counts::Waiting;
use crate::tests::leak::settled_in;
use crate::tests::target::Target;
use crate::tests::{Ctx, Test};
use crate::{check, check_eq};

pub const TESTS: &[Test] = of_each_kind!("cgroup":
    "removed" => removed,
    "removed_and_freed" => removed_and_freed,
    "moved_away" => moved_away,
    "full" => full,
    "full_cow" => full_cow,
    "of_the_child" => of_the_child,
);

/// A cgroup below another one. Dropping it removes the cgroup.
struct Below(PathBuf);

impl Below {
    /// The parent must have no processes, because a cgroup cannot have both processes and children
    /// with controllers.
    fn new(parent: &Path, name: &str) -> Outcome<Self> {
        fs::write(parent.join("cgroup.subtree_control"), "+memory").or_fail("subtree_control")?;
        let dir = parent.join(name);
        fs::create_dir(&dir).or_fail("mkdir of a cgroup")?;
        Ok(Self(dir))
    }

    /// Moves the calling process to the cgroup.
    fn enter(&self) -> Outcome {
        join_cgroup(&self.0)
    }

    fn charge(&self) -> Outcome<u64> {
        current(&self.0)
    }

    fn remove(&self) -> Outcome {
        let mut result = fs::remove_dir(&self.0);
        // A process that has just ended may still be listed.
        sys::wait_until(Duration::from_secs(5), || {
            if result.is_err() {
                result = fs::remove_dir(&self.0);
            }
            result.is_ok()
        });
        result.or_fail("rmdir of a cgroup")
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        // The cgroup may already be gone.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Leaves the scenario's cgroup, so that it can have children.
fn leave(dir: &Path) -> Outcome {
    let root = dir.parent().unwrap_or(dir);
    fs::write(root.join("cgroup.procs"), "0").or_fail("cgroup.procs of the root")
}

/// Charges that CPUs may keep for a cgroup, in pages.
const STOCK: u64 = 256;

/// The cgroup is removed while its pages are on the device. From then on the charge belongs to its
/// parent, until the pages have come back and are freed.
fn removed(ctx: &Ctx, node: usize) -> Outcome {
    gone(ctx, node, true)
}

/// The same scenario, but the pages are freed on the device.
fn removed_and_freed(ctx: &Ctx, node: usize) -> Outcome {
    gone(ctx, node, false)
}

fn gone(ctx: &Ctx, node: usize, back: bool) -> Outcome {
    const N: usize = 2 * HUGE_PAGES;
    for huge in SIZES {
        settled_in(ctx, node, |target, dir| {
            leave(dir)?;
            let (near, far) = (Below::new(dir, "near")?, Below::new(dir, "far")?);
            near.enter()?;
            let buf = Buffer::anon_huge_aligned(N)?;
            if huge {
                buf.advise(0, N, libc::MADV_HUGEPAGE)?;
            }
            buf.fill(0, N, 1800);
            for first in [0, HUGE_PAGES] {
                target
                    .to_device(&buf, first, HUGE_PAGES)
                    .or_fail("MIGRATE_TO_DEV")?;
            }
            target.expect(&buf, 0, N, N)?;
            far.enter()?;
            let before = current(dir)?;
            near.remove()?;
            let after = current(dir)?;
            check!(
                before >= N as u64 && after + STOCK >= before,
                "pages that the parent is charged for: expected {before} as before, found {after}"
            );
            if back {
                target.bring_back(&buf, 0, N)?;
                let now = current(dir)?;
                check!(
                    now + STOCK >= N as u64,
                    "charge of the parent with the pages back: expected {N} at least, found {now}"
                );
                buf.check(0, N, 1800)?;
                // They migrate once more, charged to the parent.
                target
                    .to_device(&buf, 0, HUGE_PAGES)
                    .or_fail("MIGRATE_TO_DEV")?;
                buf.check(0, N, 1800)?;
            } else {
                buf.check(0, 3, 1800)?;
            }
            drop(buf);
            let mut left = u64::MAX;
            let fell = sys::wait_until(Duration::from_secs(5), || {
                left = current(dir).unwrap_or(u64::MAX);
                left < N as u64 / 2 + STOCK
            });
            leave(dir)?;
            far.remove()?;
            check!(
                fell,
                "charge of the parent in the end: expected some of the process's, found {left}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// A process moves to another cgroup: its old pages stay charged to the first, its new pages to the
/// second, wherever the pages are.
fn moved_away(ctx: &Ctx, node: usize) -> Outcome {
    const N: usize = 4 * HUGE_PAGES;
    for huge in SIZES {
        settled_in(ctx, node, |target, dir| {
            leave(dir)?;
            let (a, b) = (Below::new(dir, "a")?, Below::new(dir, "b")?);
            a.enter()?;
            let buf = Buffer::anon_huge_aligned(2 * N)?;
            if huge {
                buf.advise(0, 2 * N, libc::MADV_HUGEPAGE)?;
            }
            buf.fill(0, N, 1810);
            let send = |first: usize, n: usize| -> Outcome {
                for at in (first..first + n).step_by(HUGE_PAGES) {
                    target
                        .to_device(&buf, at, HUGE_PAGES)
                        .or_fail("MIGRATE_TO_DEV")?;
                }
                Ok(())
            };
            send(0, N)?;
            b.enter()?;
            let near = |who: &Below, name: &str, expected: usize| -> Outcome {
                let found = who.charge()?;
                // Page tables, the migration's own needs, and the charges that CPUs keep.
                let slack = STOCK + HUGE_PAGES as u64 * 3 / 2;
                check!(
                    found.abs_diff(expected as u64) <= slack,
                    "charge of {name}: expected {expected} +- {slack} pages, found {found}"
                );
                Ok(())
            };
            near(&a, "the first", N)?;
            // The device fills empty places.
            send(N, N)?;
            near(&a, "the first", N)?;
            near(&b, "the second", N)?;
            target.bring_back(&buf, 0, 2 * N)?;
            near(&a, "the first, with the pages back", N)?;
            near(&b, "the second, with the pages back", N)?;
            buf.check(0, N, 1810)?;
            buf.check_zero(N, 8)?;
            buf.unmap(0, N)?;
            near(&a, "the first without pages", 0)?;
            drop(buf);
            leave(dir)?;
            a.remove()?;
            b.remove()
        })?;
    }
    Ok(())
}

/// A cgroup is full to the last page when its pages come back, by a fault or by request: a
/// migration needs no charge of its own.
fn full(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled_in(ctx, node, |target, dir| {
            let buf = filled(huge, 1820)?;
            let n = buf.pages();
            target.move_all(&buf, 1820)?;
            // Allocate in advance what the steps below need.
            target.bring_back(&buf, 0, n)?;
            buf.check(0, n, 1820)?;
            if huge {
                crate::tests::target::make_huge(&buf)?;
            }
            target.move_all(&buf, 1820)?;
            // Leave room for page tables and a batch of charges on each CPU, but not for the pages.
            let slack = 64.min(n as u64 / 2);
            let limit = (current(dir)? + slack) * PAGE as u64;
            fs::write(dir.join("memory.max"), limit.to_string()).or_fail("memory.max")?;
            target.bring_back(&buf, 0, n)?;
            buf.check(0, n, 1820)?;
            fs::write(dir.join("memory.max"), "max").or_fail("memory.max")
        })?;
    }
    Ok(())
}

/// A process that writes to shared pages needs copies. If there is no room for them the process is
/// killed, and the other one keeps all of the data.
fn full_cow(ctx: &Ctx, node: usize) -> Outcome {
    const N: usize = 4 * HUGE_PAGES;
    settled_in(ctx, node, |target, dir| {
        // The parent leaves the cgroup, so that only the child can be killed.
        leave(dir)?;
        let tight = Below::new(dir, "tight")?;
        let buf = Buffer::anon_huge_aligned(N)?;
        buf.fill(0, N, 1830);
        for first in (0..N).step_by(HUGE_PAGES) {
            target
                .to_device(&buf, first, HUGE_PAGES)
                .or_fail("MIGRATE_TO_DEV")?;
        }
        let limit = N / 2 * PAGE;
        fs::write(tight.0.join("memory.max"), limit.to_string()).or_fail("memory.max")?;
        let writer = Child::spawn(|| {
            tight.enter()?;
            buf.fill(0, N, 1831);
            Err(Fail::failed(
                "pages beyond the limit: expected an end, found none",
            ))
        })?;
        check_eq!(
            writer.exit()?,
            Exit::Signal(libc::SIGKILL),
            "end of who writes more than there is room for"
        );
        buf.check(0, N, 1830)?;
        target.bring_back(&buf, 0, N)?;
        buf.check(0, N, 1830)?;
        drop(buf);
        tight.remove()
    })
}

/// The pages that a child gets by a write on the device are charged to the child's cgroup, which is
/// removed with it.
fn of_the_child(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled_in(ctx, node, |target, dir| {
            leave(dir)?;
            let below = Below::new(dir, "child")?;
            let buf = filled(huge, 1840)?;
            let n = buf.pages();
            let image = Image::new(n, 1840);
            image.send(target, &buf)?;
            let child = Waiting::start(
                || {
                    below.enter()?;
                    buf.fill(0, n, 1841);
                    let own = Target::open(ctx, node)?;
                    own.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
                    own.expect(&buf, 0, n, n)
                },
                || buf.check(0, n, 1841),
            )?;
            let charge = below.charge()?;
            check!(
                charge >= n as u64,
                "charge of the child's cgroup: expected {n} pages at least, found {charge}"
            );
            image.check(&buf)?;
            child.join()?;
            image.check(&buf)?;
            below.remove()
        })?;
    }
    Ok(())
}
