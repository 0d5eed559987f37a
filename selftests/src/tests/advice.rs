// SPDX-License-Identifier: GPL-2.0

//! madvise and mlock of ranges of which a part is on the device, with small and huge pages.
//!
//! These tests bring back pages that were locked when they migrated before they free them. A page
//! that is freed on the device keeps PG_unevictable; if an active page migrates to it later and
//! leaves again, folio_migrate_flags() hits a VM_BUG_ON_FOLIO().

use std::fs;

use linux_raw_sys::general::{MADV_GUARD_INSTALL, MADV_GUARD_REMOVE};

use super::chain::{SIZES, filled};
use super::counts::{expect_free, frames};
use super::leak::settled;
use super::strict::needs_all_fixes;
use super::target::{Target, expect_huge, huge_filled};
use super::{Ctx, Test, freed_since};
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::sys;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("advice":
    "leaves_alone" => leaves_alone,
    "dontneed" => dontneed,
    "free" => free,
    "populate" => populate,
    "collapse" => collapse,
    "guard" => guard,
    "nothing_to_do" => nothing_to_do,
    "lock" => lock,
    "lock_on_fault" => lock_on_fault,
    "lock_huge_part" => lock_huge_part,
    "lock_counts" => lock_counts,
);

const N: usize = HUGE_PAGES;

/// A buffer with the pattern of `seed`, whose middle half is on the device.
#[track_caller]
fn mixed(target: &Target, huge: bool, seed: u64) -> Outcome<Buffer> {
    let buf = filled(huge, seed)?;
    let n = buf.pages();
    let moved = target
        .to_device(&buf, n / 4, n / 2)
        .or_fail("MIGRATE_TO_DEV of a half")?;
    check_bytes(
        &moved.data,
        seed,
        n / 4,
        "data that MIGRATE_TO_DEV returned",
    )?;
    target.expect(&buf, 0, n, n / 2)?;
    Ok(buf)
}

/// Checks that every mapped page has as many references as mappings, once no CPU has it in a batch.
#[track_caller]
fn expect_sound(target: &Target, buf: &Buffer, when: &str) -> Outcome {
    let mut worst = None;
    sys::wait_until(std::time::Duration::from_secs(2), || {
        let pages = proc::drain_batches()
            .and_then(|()| target.inspect(buf, 0, buf.pages()).or_fail("ZDM_INSPECT"));
        // A failed inspection shows in the final check.
        if let Ok(pages) = pages {
            worst = pages.into_iter().find(|p| p.refs != p.mapcount);
        }
        worst.is_none()
    });
    check!(
        worst.is_none(),
        "a page {when}: expected as many references as mappings, found {worst:x?}"
    );
    Ok(())
}

/// Advice for system memory does not affect pages on the device: data, place and counts stay the
/// same.
fn leaves_alone(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            for (advice, name) in [
                (libc::MADV_COLD, "MADV_COLD"),
                (libc::MADV_PAGEOUT, "MADV_PAGEOUT"),
                (libc::MADV_WILLNEED, "MADV_WILLNEED"),
                (libc::MADV_RANDOM, "MADV_RANDOM"),
                (libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE"),
                (libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"),
            ] {
                let buf = mixed(target, huge, 1300)?;
                let n = buf.pages();
                let away = frames(target, &buf, n / 4, n / 2)?;
                // Apply the advice to the whole range, and to ranges across the border.
                for (first, len) in [(0, n), (n / 4 - 5, 10), (n / 2, n / 2)] {
                    buf.advise(first, len, advice)?;
                    target.expect(&buf, 0, n, n / 2)?;
                    check_eq!(
                        &frames(target, &buf, n / 4, n / 2)?,
                        &away,
                        "frames after {name}"
                    );
                }
                expect_sound(target, &buf, &format!("after {name}"))?;
                let read = target.read(&buf, n / 4, n / 2).or_fail("READ")?;
                check_bytes(&read.data, 1300, n / 4, name)?;
                buf.check(0, n, 1300)?;
                target.bring_back(&buf, 0, n)?;
                buf.check(0, n, 1300)?;
                target.expect_empty()?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// MADV_DONTNEED frees pages at once; they read as zeroes afterwards, and other pages do not
/// change.
fn dontneed(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = mixed(target, huge, 1310)?;
            let n = buf.pages();
            let away = frames(target, &buf, n / 4, n / 2)?;
            // A quarter that lies across the border.
            let (first, len) = (n / 8, n / 4);
            let gone = first + len - n / 4;
            let before = target.stats()?;
            buf.advise(first, len, libc::MADV_DONTNEED)?;
            freed_since(target, &before, gone)?;
            expect_free(target, &away[..gone], "that were thrown away")?;
            buf.check_zero(first, len)?;
            buf.check(0, first, 1310)?;
            buf.check(first + len, n - first - len, 1310)?;
            // Repeat it with pages in both places that are shared with a child.
            target.bring_back(&buf, 0, n)?;
            buf.fill(0, n, 1311);
            target.move_all(&buf, 1311)?;
            Child::spawn(|| {
                buf.advise(first, len, libc::MADV_DONTNEED)?;
                buf.check_zero(first, len)?;
                buf.check(0, first, 1311)
            })?
            .join()?;
            buf.check(0, n, 1311)
        })?;
    }
    Ok(())
}

/// MADV_FREE does not make the kernel drop pages of the device, because reclaim does not see them.
fn free(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = mixed(target, huge, 1320)?;
            let n = buf.pages();
            // Apply it to all pages, and to a part of those on the device.
            buf.advise(0, n, libc::MADV_FREE)?;
            buf.advise(n / 2, 3, libc::MADV_FREE)?;
            target.expect(&buf, 0, n, n / 2)?;
            let read = target.read(&buf, n / 4, n / 2).or_fail("READ")?;
            check_bytes(&read.data, 1320, n / 4, "READ after MADV_FREE")?;
            buf.check(n / 4, n / 2, 1320)?;
            // A page that is written after MADV_FREE must not be dropped, wherever it is.
            buf.fill(0, n, 1321);
            target.drain_held(&buf)?;
            target.to_device(&buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            buf.check(0, n, 1321)?;

            // Pages with MADV_FREE migrate to the device; those that did have their data.
            target.bring_back(&buf, 0, n)?;
            buf.advise(0, n, libc::MADV_FREE)?;
            // Reclaim may drop some of the pages. All others keep their data, whether they migrate
            // or not.
            let _ = target.to_device(&buf, 0, n);
            let mut gone = 0;
            for page in 0..n {
                let there = target.on_device(&buf, page, 1)? + proc::present(&buf, page, 1)? > 0;
                let data = target.read(&buf, page, 1).or_fail("READ")?.data;
                let expected = if there {
                    pattern_bytes(1321, page, 1)
                } else {
                    gone += 1;
                    vec![0; PAGE]
                };
                check!(
                    data == expected,
                    "page {page} after MADV_FREE, there {there}: expected its data where it is \
                     there, else zeroes"
                );
            }
            note(&format!("{gone} of {n} pages were dropped after MADV_FREE"));
            Ok(())
        })?;
    }
    Ok(())
}

/// MADV_POPULATE acts like an access: PRIVATE pages come back, other pages stay.
fn populate(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for advice in [libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE] {
            settled(ctx, node, |target| {
                let buf = mixed(target, huge, 1330)?;
                let n = buf.pages();
                let child = super::counts::Waiting::start(|| Ok(()), || buf.check(0, n, 1330))?;
                buf.advise(0, n, advice)?;
                if !target.cpu_maps() {
                    target.expect(&buf, 0, n, 0)?;
                }
                check_eq!(proc::present(&buf, 0, n)?, n, "present pages");
                buf.check(0, n, 1330)?;
                buf.fill(0, n, 1331);
                child.join()?;
                buf.check(0, n, 1331)
            })?;
        }
    }
    Ok(())
}

/// MADV_COLLAPSE makes a huge page of small ones, some or all of which are on the device. The
/// kernel may refuse, but must not lose data.
fn collapse(ctx: &Ctx, node: usize) -> Outcome {
    for away in [1, N / 2, N] {
        settled(ctx, node, |target| {
            let buf = Buffer::anon_huge_aligned(N)?;
            buf.fill(0, N, 1340);
            target
                .to_device(&buf, N - away, away)
                .or_fail("MIGRATE_TO_DEV")?;
            target.expect(&buf, 0, N, away)?;
            buf.advise(0, N, libc::MADV_HUGEPAGE)?;
            let result = buf.try_advise(0, N, libc::MADV_COLLAPSE);
            match &result {
                Ok(()) => {
                    expect_huge(&buf, 0, N, N)?;
                    target.expect(&buf, 0, N, 0)?;
                    target.expect_empty()?;
                }
                Err(e) => {
                    note(&format!("MADV_COLLAPSE with {away} on the device: {e}"));
                    check!(
                        matches!(
                            e.raw_os_error(),
                            Some(libc::EINVAL | libc::EAGAIN | libc::EBUSY)
                        ),
                        "MADV_COLLAPSE: expected success, EINVAL, EAGAIN or EBUSY, found {e}"
                    );
                }
            }
            expect_sound(target, &buf, "after MADV_COLLAPSE")?;
            let read = target.read(&buf, 0, N).or_fail("READ")?;
            check_bytes(&read.data, 1340, 0, "READ after MADV_COLLAPSE")?;
            buf.check(0, N, 1340)?;
            target.bring_back(&buf, 0, N)?;
            super::target::make_huge(&buf)?;
            target.move_huge(&buf, 1340)?;
            buf.check(0, N, 1340)
        })?;
    }
    Ok(())
}

/// Calls that ask for what is so already, of all of a huge page and of parts of it. They succeed, and the page
/// stays what it is and where it is, for the CPU and for the device.
fn nothing_to_do(ctx: &Ctx, node: usize) -> Outcome {
    const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
    type Call = fn(&Buffer, usize, usize) -> Outcome;
    const ANY: [(&str, Call); 7] = [
        ("MADV_GUARD_REMOVE", |buf, first, n| {
            buf.advise(first, n, MADV_GUARD_REMOVE as i32)
        }),
        ("MADV_NORMAL", |buf, first, n| {
            buf.advise(first, n, libc::MADV_NORMAL)
        }),
        ("MADV_DOFORK", |buf, first, n| {
            buf.advise(first, n, libc::MADV_DOFORK)
        }),
        ("MADV_UNMERGEABLE", |buf, first, n| {
            buf.advise(first, n, libc::MADV_UNMERGEABLE)
        }),
        ("MADV_HUGEPAGE", |buf, first, n| {
            buf.advise(first, n, libc::MADV_HUGEPAGE)
        }),
        ("mprotect", |buf, first, n| buf.protect(first, n, RW)),
        ("munlock", |buf, first, n| buf.lock(first, n, false)),
    ];
    const WHOLE: [(&str, Call); 1] = [("MADV_COLLAPSE", |buf, first, n| {
        buf.advise(first, n, libc::MADV_COLLAPSE)
    })];
    needs_all_fixes(ctx)?;
    settled(ctx, node, |target| {
        if !target.moves_large() {
            return Err(Fail::Skip("this kernel moves small pages only".into()));
        }
        let buf = huge_filled(2, 1355)?;
        let n = buf.pages();
        target.move_huge(&buf, 1355)?;
        let before = target.inspect(&buf, 0, n).or_fail("ZDM_INSPECT")?;
        let parts = [(0, n), (0, N), (N / 2, N), (3, 1), (N - 1, 2)];
        let any = ANY.iter().flat_map(|call| parts.map(|part| (call, part)));
        let whole = WHOLE.iter().map(|call| (call, (0, n)));
        for ((name, run), (first, count)) in any.chain(whole) {
            let told = |e| Fail::failed(format!("{name} of {count} pages from {first} on: {e}"));
            run(&buf, first, count).map_err(told)?;
            expect_huge(&buf, 0, n, n).map_err(told)?;
            let now = target.inspect(&buf, 0, n).or_fail("ZDM_INSPECT")?;
            let wrong = now
                .iter()
                .zip(&before)
                .position(|(now, before)| now != before);
            check!(
                wrong.is_none(),
                "{name} of {count} pages from {first} on: page {wrong:?} has changed: expected {:x?}, found {:x?}",
                wrong.map(|i| before[i]),
                wrong.map(|i| now[i])
            );
        }
        let read = target.read(&buf, 0, n).or_fail("READ")?;
        check_bytes(&read.data, 1355, 0, "READ in the end")?;
        buf.check(0, n, 1355)
    })
}

/// Guard pages replace pages on the device, which are freed.
fn guard(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = mixed(target, huge, 1350)?;
            let n = buf.pages();
            let before = target.stats()?;
            buf.advise(n / 4 - 2, 6, MADV_GUARD_INSTALL as i32)?;
            freed_since(target, &before, 4)?;
            Child::expect_segv(
                || {
                    buf.get(n / 4, 0);
                },
                "end of who reads a guard page",
            )?;
            let result = target.read(&buf, n / 4, 1);
            expect_errno(result, &[libc::EFAULT], "READ of a guard page")?;
            // Pages with a guard do not migrate, the others do.
            let _ = target.to_device(&buf, 0, n);
            target.expect(&buf, n / 4 - 2, 6, 0)?;
            buf.advise(n / 4 - 2, 6, MADV_GUARD_REMOVE as i32)?;
            buf.check_zero(n / 4 - 2, 6)?;
            buf.check(0, n / 4 - 2, 1350)?;
            buf.check(n / 4 + 4, n - n / 4 - 4, 1350)
        })?;
    }
    Ok(())
}

/// Pages are locked before they migrate, while they are on the device, and unlocked in each place.
/// In every order each page migrates, comes back, and is freed.
fn lock(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1360)?;
            let n = buf.pages();
            for (before, away, back) in [
                (Some(true), None, Some(false)),
                (Some(true), Some(false), None),
                (None, Some(true), Some(false)),
                (Some(true), Some(true), None),
            ] {
                let lock = |how: Option<bool>| match how {
                    Some(how) => buf.lock(0, n, how),
                    None => Ok(()),
                };
                lock(before)?;
                if huge {
                    super::target::make_huge(&buf)?;
                }
                target.move_all(&buf, 1360)?;
                lock(away)?;
                // mlock faults pages in, which brings PRIVATE pages back.
                if away == Some(true) && !target.cpu_maps() {
                    target.expect(&buf, 0, n, 0)?;
                } else {
                    target.expect(&buf, 0, n, n)?;
                    expect_sound(target, &buf, "locked and on the device")?;
                }
                target.bring_back(&buf, 0, n)?;
                lock(back)?;
                buf.check(0, n, 1360)?;
            }
            buf.lock(0, n, false)?;
            target.move_all(&buf, 1360)?;
            buf.check(0, n, 1360)
        })?;
    }
    Ok(())
}

/// Pages with MLOCK_ONFAULT do not come back because of the lock.
fn lock_on_fault(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1370)?;
            let n = buf.pages();
            target.move_all(&buf, 1370)?;
            let before = target.stats()?;
            buf.lock_on_fault(0, n)?;
            target.expect(&buf, 0, n, n)?;
            let after = target.stats()?;
            check_eq!(after.cpu_faults, before.cpu_faults, "CPU faults by mlock2");
            buf.check(0, n, 1370)?;
            target.bring_back(&buf, 0, n)?;
            target.move_all(&buf, 1370)?;
            let result = buf.try_advise(0, n, libc::MADV_COLD);
            expect_errno(result, &[libc::EINVAL], "MADV_COLD of locked memory")?;
            target.bring_back(&buf, 0, n)?;
            buf.lock(0, n, false)?;
            buf.check(0, n, 1370)?;

            // No page exists yet: the first one is made on the device.
            let empty = Buffer::anon(n)?;
            empty.lock_on_fault(0, n)?;
            target.to_device(&empty, 0, n).or_fail("MIGRATE_TO_DEV")?;
            target.expect(&empty, 0, n, n)?;
            expect_sound(target, &empty, "locked on the device from the start")?;
            empty.check_zero(0, n)?;
            target.bring_back(&empty, 0, n)
        })?;
    }
    Ok(())
}

/// A part of a huge page is locked, or unlocked, in each place.
fn lock_huge_part(ctx: &Ctx, node: usize) -> Outcome {
    for page in [0, N / 2, N - 1] {
        settled(ctx, node, |target| {
            let buf = huge_filled(1, 1380)?;
            target.move_huge(&buf, 1380)?;
            buf.lock_on_fault(page, 1)?;
            target.expect(&buf, 0, N, N)?;
            expect_sound(target, &buf, "with one locked")?;
            target.bring_back(&buf, page, 1)?;
            buf.check(0, N, 1380)?;
            buf.lock(page, 1, false)?;
            target.bring_back(&buf, 0, N)?;
            buf.lock(0, N, true)?;
            target.to_device(&buf, 0, N).or_fail("MIGRATE_TO_DEV")?;
            buf.lock(page, 1, false)?;
            buf.check(0, N, 1380)?;
            target.bring_back(&buf, 0, N)?;
            buf.unmap(page, 1)?;
            buf.check(0, page, 1380)?;
            buf.check(page + 1, N - page - 1, 1380)
        })?;
    }
    Ok(())
}

const REFRESH: &str = "/proc/sys/vm/stat_refresh";

/// The count of locked pages returns to its initial value when all pages are unlocked or freed.
fn lock_counts(ctx: &Ctx, node: usize) -> Outcome {
    let trip = || -> Outcome {
        for huge in SIZES {
            settled(ctx, node, |target| {
                for unlock in [false, true] {
                    let buf = filled(huge, 1390)?;
                    let n = buf.pages();
                    buf.lock(0, n, true)?;
                    target.move_all(&buf, 1390)?;
                    if unlock {
                        buf.lock(0, n, false)?;
                    }
                    target.bring_back(&buf, 0, n)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    };
    trip()?;
    // The per-CPU parts of the count are added up every second, or on demand.
    let count = || -> Outcome<u64> {
        proc::drain_batches()?;
        fs::write(REFRESH, "1").or_fail(REFRESH)?;
        proc::vmstat("nr_mlock")
    };
    let before = count()?;
    for _ in 0..3 {
        trip()?;
    }
    check_eq!(count()?, before, "nr_mlock of /proc/vmstat");
    Ok(())
}
