// SPDX-License-Identifier: GPL-2.0

//! Operations on pages that another thread migrates back and forth at the same moment: they meet
//! migration entries as often as not. What an operation promises must hold whichever it meets, and
//! still when the migration has ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::super::chain::SIZES;
use super::super::counts::Waiting;
use super::super::leak::settled;
use super::super::strict::needs_all_fixes;
use super::super::target::{Target, huge_filled};
use super::super::{Ctx, PAGES};
use super::RW;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::Buffer;
use crate::pagestate::{State, clear_soft_dirty, views};
use crate::threads::SetOnDrop;
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq};

/// How long each operation is repeated, and how often at least.
const TIME: Duration = Duration::from_millis(400);
const ROUNDS: usize = 12;
/// How often the result is looked at while the other thread goes on.
const LOOKS: usize = 4;
/// The word of each page that the operations use.
const WORD: usize = 3;

type Operation = fn(&Target, &Buffer, u64) -> Outcome;

const OPERATIONS: &[(&str, Operation)] = &[
    ("mprotect", mprotect),
    ("userfaultfd", uffd),
    ("clear_refs", clear),
    ("fork", fork),
    ("mremap", mremap),
    ("MADV_DONTNEED", dontneed),
];

/// Looks at all pages several times.
fn looks(target: &Target, buf: &Buffer, what: &str, right: impl Fn(&State) -> bool) -> Outcome {
    for _ in 0..LOOKS {
        let states = views(target, buf, 0, buf.pages())?;
        let wrong = states.iter().position(|state| !right(state));
        check!(
            wrong.is_none(),
            "page {wrong:?} {what}: found {:x?}",
            wrong.map(|i| states[i])
        );
        std::thread::yield_now();
    }
    Ok(())
}

fn set_all(buf: &Buffer, value: u64) {
    for page in 0..buf.pages() {
        buf.set(page, WORD, value + page as u64);
    }
}

/// Checks the words of all pages.
fn holds(buf: &Buffer, value: u64, whose: &str) -> Outcome {
    for page in 0..buf.pages() {
        check_eq!(
            buf.get(page, WORD),
            value + page as u64,
            "word of page {page} {whose}"
        );
    }
    Ok(())
}

fn mprotect(target: &Target, buf: &Buffer, round: u64) -> Outcome {
    let n = buf.pages();
    set_all(buf, round);
    buf.protect(0, n, libc::PROT_READ)?;
    looks(
        target,
        buf,
        "after mprotect, expected no right to write",
        |s| s.flags & ZDM_PAGE_WRITE == 0,
    )?;
    holds(buf, round, "after mprotect")?;
    buf.protect(0, n, RW)
}

fn uffd(target: &Target, buf: &Buffer, round: u64) -> Outcome {
    let n = buf.pages();
    set_all(buf, round);
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register_writes(buf, 0, n).or_fail("UFFDIO_REGISTER")?;
    uffd.protect(buf, 0, n, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    looks(
        target,
        buf,
        "protected, expected the mark and no right",
        |s| s.uffd_wp && s.flags & ZDM_PAGE_WRITE == 0,
    )?;
    holds(buf, round, "protected")?;
    uffd.protect(buf, 0, n, false)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    looks(target, buf, "let go, expected no mark", |s| !s.uffd_wp)?;
    set_all(buf, round + 1);
    holds(buf, round + 1, "let go")
}

/// A page that is written is marked from then on, wherever it goes.
fn clear(target: &Target, buf: &Buffer, round: u64) -> Outcome {
    clear_soft_dirty()?;
    set_all(buf, round);
    looks(target, buf, "written, expected its mark", |s| s.soft_dirty)?;
    holds(buf, round, "with marks")
}

/// Neither process sees what the other one writes.
fn fork(_: &Target, buf: &Buffer, round: u64) -> Outcome {
    set_all(buf, round);
    let child = Waiting::start(
        || Ok(()),
        || {
            holds(buf, round, "of the child, as it was")?;
            set_all(buf, round + 1000);
            holds(buf, round + 1000, "of the child, which has written")
        },
    )?;
    set_all(buf, round + 500);
    let child = child.release()?;
    for _ in 0..LOOKS {
        holds(buf, round + 500, "of the parent, which has written")?;
    }
    child.join()?;
    holds(buf, round + 500, "of the parent in the end")
}

fn mremap(_: &Target, buf: &Buffer, round: u64) -> Outcome {
    let n = buf.pages();
    set_all(buf, round);
    let place = Buffer::anon_huge_aligned(n)?;
    buf.move_contents(0, n, &place, 0)?;
    holds(&place, round, "at the new place")?;
    for page in 0..n {
        check_eq!(
            buf.get(page, WORD),
            0,
            "word of page {page} at the old place"
        );
    }
    place.move_contents(0, n, buf, 0)?;
    holds(buf, round, "back at the old place")
}

fn dontneed(_: &Target, buf: &Buffer, round: u64) -> Outcome {
    set_all(buf, round);
    buf.advise(0, buf.pages(), libc::MADV_DONTNEED)?;
    for _ in 0..LOOKS {
        for page in 0..buf.pages() {
            check_eq!(
                buf.get(page, WORD),
                0,
                "word of page {page} that was given up"
            );
        }
    }
    Ok(())
}

/// Each operation, with pages of both sizes in the beginning.
pub(super) fn all(ctx: &Ctx, node: usize) -> Outcome {
    needs_all_fixes(ctx)?;
    settled(ctx, node, |target| {
        let mut went = 0;
        for huge in SIZES {
            for (name, run) in OPERATIONS {
                let buf = match huge {
                    false => Buffer::filled(PAGES, 1)?,
                    true => huge_filled(1, 1)?,
                };
                let over = AtomicBool::new(false);
                let before = target.stats()?.to_device;
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let mut turn = 0;
                        while !over.load(Ordering::SeqCst) {
                            // Pages in use at this moment stay.
                            let _ = target.to_device(&buf, 0, buf.pages());
                            std::thread::yield_now();
                            // A request excludes most operations, as both lock the address space.
                            // RELEASE finds the pages by rmap, and locks nothing of the kind.
                            let _ = match turn % 4 {
                                0 => target.to_system(&buf, 0, buf.pages()).map(drop),
                                _ => target.release(),
                            };
                            turn += 1;
                        }
                    });
                    let _over = SetOnDrop(&over);
                    let (start, mut rounds) = (Instant::now(), 0);
                    while start.elapsed() < TIME || (rounds < ROUNDS && start.elapsed() < 8 * TIME)
                    {
                        run(target, &buf, 10_000 * (1 + rounds as u64))?;
                        rounds += 1;
                    }
                    Ok(())
                })
                .map_err(|e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{name}, huge {huge}: {e}")),
                })?;
                went += target.stats()?.to_device.wrapping_sub(before);
            }
        }
        check!(
            went > 0,
            "pages that went meanwhile: expected some, found none"
        );
        let (audit, records) = target.audit()?;
        check_eq!(audit.total, 0, "violations, of which {records:x?}");
        Ok(())
    })
}
