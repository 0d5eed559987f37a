// SPDX-License-Identifier: GPL-2.0

//! userfaultfd(2) on pages of the device: write protection that a migration must keep, and pages
//! that are put beside them, onto them, or moved away. Small and huge pages.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};
use crate::harness::{Child, note};
use crate::sys;
use crate::tests::chain::{Image, SIZES, filled};
use crate::tests::leak::settled;
use crate::tests::strict::has_all_fixes;
use crate::tests::target::{Target, huge_filled};
use crate::tests::{Ctx, PAGES, Test};
use crate::uffd::Uffd;
use crate::{check, check_eq};

pub const TESTS: &[Test] = of_each_kind!("uffd":
    "protect_then_device" => protect_then_device,
    "protect_on_device" => protect_on_device,
    "protect_huge_part" => protect_huge_part,
    "protect_device_write" => protect_device_write,
    "copy_onto" => copy_onto,
    "copy_beside" => copy_beside,
    "move_from" => move_from,
    "move_onto" => move_onto,
    "move_onto_huge" => move_onto_huge,
);

/// Writes a word to each page of a buffer while a thread ends the protection of each page for which
/// it gets an event. Returns those pages.
fn write_all(uffd: &Uffd, buf: &Buffer, image: &Image) -> Outcome<BTreeSet<usize>> {
    let over = AtomicBool::new(false);
    let (written, asked) = std::thread::scope(|scope| {
        let answer = scope.spawn(|| -> Outcome<BTreeSet<usize>> {
            let mut asked = BTreeSet::new();
            while !over.load(Ordering::SeqCst) {
                let fault = uffd
                    .next_fault(Duration::from_millis(20))
                    .or_fail("userfaultfd")?;
                let Some(fault) = fault else { continue };
                check!(
                    fault.protected,
                    "a fault: expected a write, found {fault:x?}"
                );
                let page = (fault.address - buf.at(0)) as usize / PAGE;
                asked.insert(page);
                uffd.protect(buf, page, 1, false)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
            }
            Ok(asked)
        });
        let written = (0..buf.pages()).try_for_each(|page| {
            // Before the write the page has the data from before the protection.
            let old = buf.get(page, 9);
            buf.set(page, 9, !old);
            check_eq!(
                buf.get(page, 9),
                !old,
                "word of page {page} that was written"
            );
            buf.set(page, 9, old);
            Ok(())
        });
        over.store(true, Ordering::SeqCst);
        let panicked = |_| Err(Fail::failed("the answering thread panicked"));
        (written, answer.join().unwrap_or_else(panicked))
    });
    written?;
    image.check(buf)?;
    asked
}

/// A buffer whose middle half will be write-protected.
fn watched(target: &Target, huge: bool, seed: u64) -> Outcome<(Buffer, Uffd, Image)> {
    let buf = filled(huge, seed)?;
    let n = buf.pages();
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register_writes(&buf, 0, n)
        .or_fail("UFFDIO_REGISTER")?;
    if huge {
        crate::tests::target::make_huge(&buf)?;
    }
    target.expect(&buf, 0, n, 0)?;
    Ok((buf, uffd, Image::new(n, seed)))
}

/// Checks that writes cause events for exactly the pages of a range.
fn expect_asked(uffd: &Uffd, buf: &Buffer, image: &Image, first: usize, n: usize) -> Outcome {
    let asked = write_all(uffd, buf, image)?;
    let expected: BTreeSet<usize> = (first..first + n).collect();
    let missed: Vec<_> = expected.difference(&asked).collect();
    let more: Vec<_> = asked.difference(&expected).collect();
    check!(
        missed.is_empty() && more.is_empty(),
        "writes that were asked for: expected those to pages {first}..{}, found {} without a \
         question, as for {:?}, and {} more, as for {:?}",
        first + n,
        missed.len(),
        missed.first(),
        more.len(),
        more.first()
    );
    Ok(())
}

/// Protected pages stay protected on the way to the device and back.
fn protect_then_device(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for back in [false, true] {
            settled(ctx, node, |target| {
                let (buf, uffd, image) = watched(target, huge, 1500)?;
                let n = buf.pages();
                uffd.protect(&buf, n / 4, n / 2, true)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
                image.send(target, &buf)?;
                image.check_device(target, &buf)?;
                if back {
                    target.bring_back(&buf, 0, n)?;
                }
                expect_asked(&uffd, &buf, &image, n / 4, n / 2)?;
                // The protection has ended for good.
                image.send(target, &buf)?;
                expect_asked(&uffd, &buf, &image, 0, 0)
            })?;
        }
    }
    Ok(())
}

/// The pages are on the device when they are protected.
fn protect_on_device(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for back in [false, true] {
            settled(ctx, node, |target| {
                let (buf, uffd, image) = watched(target, huge, 1510)?;
                let n = buf.pages();
                image.send(target, &buf)?;
                // Protect the whole buffer, so that a huge entry can stay whole; or a part of it.
                let (first, len) = if back { (0, n) } else { (n / 4, n / 2) };
                uffd.protect(&buf, first, len, true)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
                target.expect(&buf, 0, n, n)?;
                image.check_device(target, &buf)?;
                if back {
                    target.bring_back(&buf, 0, n)?;
                }
                expect_asked(&uffd, &buf, &image, first, len)?;
                // Protect the pages and end the protection without a fault.
                image.send(target, &buf)?;
                uffd.protect(&buf, 0, n, true)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
                uffd.protect(&buf, 0, n, false)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
                expect_asked(&uffd, &buf, &image, 0, 0)
            })?;
        }
    }
    Ok(())
}

/// A protected huge page is split by an operation on one of its pages: all stay protected.
fn protect_huge_part(ctx: &Ctx, node: usize) -> Outcome {
    const N: usize = HUGE_PAGES;
    for page in [0, N / 2, N - 1] {
        settled(ctx, node, |target| {
            let (buf, uffd, image) = watched(target, true, 1520)?;
            uffd.protect(&buf, 0, N, true)
                .or_fail("UFFDIO_WRITEPROTECT")?;
            image.send(target, &buf)?;
            match page {
                // Split only the entry, or the folio as well.
                0 => {
                    buf.protect(page, 1, libc::PROT_READ)?;
                    buf.protect(page, 1, libc::PROT_READ | libc::PROT_WRITE)?;
                }
                _ => drop(target.to_system(&buf, page, 1).or_fail("MIGRATE_TO_SYS")?),
            }
            expect_asked(&uffd, &buf, &image, 0, N)
        })?;
    }
    Ok(())
}

/// The device must not write to protected pages: it cannot wait, so it gets an error.
fn protect_device_write(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        for away in [false, true] {
            settled(ctx, node, |target| {
                let (buf, uffd, image) = watched(target, huge, 1530)?;
                let n = buf.pages();
                uffd.protect(&buf, 0, n, true)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
                if away {
                    image.send(target, &buf)?;
                }
                let data = pattern_bytes(1531, 3, 4);
                let result = target.write(&buf, 3, &data);
                let errnos = [libc::EFAULT, libc::EBUSY, libc::EPERM];
                expect_errno(result, &errnos, "WRITE to protected pages")?;
                image.check_device(target, &buf)?;
                expect_asked(&uffd, &buf, &image, 0, n)?;
                target.write(&buf, 3, &data).or_fail("WRITE")?;
                buf.check(3, 4, 1531)
            })?;
        }
    }
    Ok(())
}

/// A page on the device is not missing: UFFDIO_COPY does not replace it.
fn copy_onto(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1540)?;
            let n = buf.pages();
            let from = Buffer::filled(8, 1541)?;
            let uffd = Uffd::new().or_fail("userfaultfd")?;
            uffd.register(&buf, 0, n).or_fail("UFFDIO_REGISTER")?;
            if huge {
                crate::tests::target::make_huge(&buf)?;
            }
            target.move_all(&buf, 1540)?;
            for page in [0, n / 2, n - 1] {
                let result = uffd.copy(buf.at(page), &from, 0);
                expect_errno(result, &[libc::EEXIST], "UFFDIO_COPY")?;
                let result = uffd.zero(&buf, page);
                expect_errno(result, &[libc::EEXIST], "UFFDIO_ZEROPAGE")?;
            }
            target.expect(&buf, 0, n, n)?;
            let read = target.read(&buf, 0, n).or_fail("READ")?;
            check_bytes(&read.data, 1540, 0, "READ")?;
            buf.check(0, n, 1540)
        })?;
    }
    Ok(())
}

/// Holes between pages on the device are filled.
fn copy_beside(ctx: &Ctx, node: usize) -> Outcome {
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1550)?;
            let n = buf.pages();
            let from = Buffer::filled(8, 1550)?;
            let uffd = Uffd::new().or_fail("userfaultfd")?;
            uffd.register(&buf, 0, n).or_fail("UFFDIO_REGISTER")?;
            if huge {
                crate::tests::target::make_huge(&buf)?;
            }
            target.move_all(&buf, 1550)?;
            // Of two holes one gets its old data, the other zeroes.
            buf.advise(4, 1, libc::MADV_DONTNEED)?;
            buf.advise(n - 1, 1, libc::MADV_DONTNEED)?;
            uffd.copy(buf.at(4), &from, 4).or_fail("UFFDIO_COPY")?;
            uffd.zero(&buf, n - 1).or_fail("UFFDIO_ZEROPAGE")?;
            target.expect(&buf, 0, n, n - 2)?;
            buf.check(0, n - 1, 1550)?;
            buf.check_zero(n - 1, 1)?;
            // The migration would have to make a page of zeroes, for which the process wants an
            // event.
            let result = target.to_device(&buf, 0, n);
            expect_errno(
                result,
                &[libc::ENOENT],
                "MIGRATE_TO_DEV of a page of zeroes",
            )?;
            target.expect(&buf, 0, n, n - 1)?;
            buf.check(0, n - 1, 1550)?;
            buf.check_zero(n - 1, 1)
        })?;
    }
    Ok(())
}

/// Pages of the device move to holes elsewhere, or the kernel refuses; no page is lost or in two
/// places.
fn move_from(ctx: &Ctx, node: usize) -> Outcome {
    let has_all_fixes = has_all_fixes(ctx)?;
    for huge in SIZES {
        settled(ctx, node, |target| {
            let from = filled(huge, 1560)?;
            let n = from.pages();
            let to = Buffer::anon_huge_aligned(n)?;
            let uffd = Uffd::new().or_fail("userfaultfd")?;
            uffd.register(&to, 0, n).or_fail("UFFDIO_REGISTER")?;
            target.move_all(&from, 1560)?;
            let moved = uffd.move_pages(&from, 0, n, &to, 0);
            let moved = match moved {
                Ok(moved) => moved,
                Err(e) => {
                    // A kernel without the fixes takes a device private PMD for a hole.
                    let is_hole = huge && !has_all_fixes && e.raw_os_error() == Some(libc::ENOENT);
                    let errnos = [libc::EFAULT, libc::EBUSY, libc::EINVAL];
                    check!(
                        is_hole || e.raw_os_error().is_some_and(|n| errnos.contains(&n)),
                        "UFFDIO_MOVE: expected success or a refusal, found {e}"
                    );
                    0
                }
            };
            note(&format!("huge {huge}: {moved} of {n} pages moved"));
            to.check(0, moved, 1560)?;
            from.check(moved, n - moved, 1560)?;
            from.check_zero(0, moved)?;
            let left = n - moved;
            if left > 0 {
                target.bring_back(&from, moved, left)?;
                let again = uffd
                    .move_pages(&from, moved, left, &to, moved)
                    .or_fail("UFFDIO_MOVE of system pages")?;
                to.check(moved, again, 1560)?;
                from.check(moved + again, left - again, 1560)?;
                check!(again > 0, "system pages moved: expected some, found none");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Pages are not moved onto pages of the device. The test uses a process, because the kernel may
/// retry until the process is killed.
fn onto(ctx: &Ctx, node: usize, make: impl Fn(u64) -> Outcome<Buffer>) -> Outcome {
    let (news, mut say) = sys::pipe().or_fail("pipe")?;
    let child = Child::spawn(|| {
        let target = Target::open(ctx, node)?;
        let (from, to) = (make(1570)?, make(1571)?);
        let n = to.pages();
        let uffd = Uffd::new().or_fail("userfaultfd")?;
        uffd.register(&to, 0, n).or_fail("UFFDIO_REGISTER")?;
        if n == HUGE_PAGES {
            crate::tests::target::make_huge(&to)?;
        }
        target.move_all(&to, 1571)?;
        for (first, len) in [(0, n), (n / 2, 3)] {
            let result = uffd.move_pages(&from, first, len, &to, first);
            expect_errno(result, &[libc::EEXIST], "UFFDIO_MOVE")?;
        }
        say.write_all(b"m").or_fail("write")?;
        target.expect(&to, 0, n, n)?;
        from.check(0, n, 1570)?;
        to.check(0, n, 1571)
    })?;
    drop(say);
    if sys::readable(&news, Duration::from_secs(10)).or_fail("poll")? {
        return child.join();
    }
    child.kill()?;
    Err(Fail::failed(
        "UFFDIO_MOVE onto the device: expected EEXIST, found no end after 10 s",
    ))
}

fn move_onto(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |_| {
        onto(ctx, node, |seed| Buffer::filled(PAGES, seed))
    })
}

/// The target is a huge page with a single entry.
fn move_onto_huge(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |_| onto(ctx, node, |seed| huge_filled(1, seed)))
}
