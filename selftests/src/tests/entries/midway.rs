// SPDX-License-Identifier: GPL-2.0

//! Operations that meet migration entries for certain: while the device gives its memory back it
//! takes its time, with all pages unmapped, and the operation comes then. It waits for nobody, and
//! what it does must hold when the pages are mapped again: each combination of marks, for pages of
//! each size.

use std::time::{Duration, Instant};

use super::super::Ctx;
use super::super::counts::Waiting;
use super::super::leak::settled;
use super::super::strict::needs_all_fixes;
use super::super::target::{Place, Target};
use super::marks::{self, After, MARKS, Marks, states, word};
use super::{RW, Scene};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::Buffer;
use crate::pagestate::clear_soft_dirty;
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq, proc, sys};

/// How long the pages stay unmapped at first, and at most, in milliseconds. Twice as long if the
/// operation came too late, as on a busy machine.
const SLOW: u64 = 60;
const SLOWEST: u64 = 960;

/// The operations on marks that change an entry without a fault.
const COMMON: [&str; 7] = [
    "mprotect",
    "PROT_NONE",
    "mprotect of a part",
    "munmap of a part",
    "mremap",
    "mremap of a part",
    "beside what mremap moves",
];

/// The pages of a scene that the operation "MADV_DONTNEED" gives up.
const GONE: std::ops::Range<usize> = 3..6;

/// Whether all of these pages have migration entries, by /proc/self/pagemap: neither swapped out, nor
/// on a device, nor markers.
fn is_midway(buf: &Buffer, first: usize, n: usize) -> Outcome<bool> {
    let entries = proc::entries(buf, first, n)?;
    let migrates = |entry: &u64| entry >> 62 == 1 && (2..28).contains(&(entry & 31));
    Ok(entries.iter().all(migrates))
}

impl Scene<'_> {
    /// Runs `operation` while the device's memory is being released, with the pages unmapped, and waits
    /// for the end of the release. Returns what it returned, and whether it was in time.
    fn midway<T>(&self, slow: u64, operation: impl FnOnce() -> Outcome<T>) -> Outcome<(T, bool)> {
        let pace = |ms| self.target.inject(ZDM_INJECT_SLOW, ms);
        pace(slow).or_fail("ZDM_INJECT_SLOW")?;
        let result = std::thread::scope(|scope| {
            let release = scope.spawn(|| self.target.release().or_fail("RELEASE"));
            let met = || is_midway(&self.buf, self.first, self.n).is_ok_and(|met| met);
            let met = sys::wait_until(Duration::from_secs(10), || release.is_finished() || met())
                && met();
            let start = Instant::now();
            let result = operation();
            let in_time = met && start.elapsed() < Duration::from_millis(slow / 2);
            crate::threads::join(release)?;
            Ok((result?, in_time))
        });
        pace(0).or_fail("ZDM_INJECT_SLOW")?;
        result
    }

    /// One operation, on pages with these marks. Returns whether it was in time.
    fn meets(&self, marks: Marks, name: &str, slow: u64) -> Outcome<bool> {
        let (first, n) = (self.first, self.n);
        let uffd = self.mark(marks)?;
        let same = |(): ()| (None, first, n, After::Same);
        let mut child = None;
        let mut expected = marks;
        // Some of the others have a namesake.
        let mut known = marks::OPERATIONS.iter();
        let common = known.find(|(known, _)| *known == name && COMMON.contains(known));
        let (done, in_time) = match (name, common) {
            (_, Some((_, run))) => self.midway(slow, || run(self))?,
            ("read-only", _) => {
                let (done, in_time) =
                    self.midway(slow, || self.buf.protect(first, n, libc::PROT_READ))?;
                let now = states(self, &self.buf, first, n)?;
                let wrong = now.iter().position(|s| s.flags & ZDM_PAGE_WRITE != 0);
                check!(
                    wrong.is_none(),
                    "page {wrong:?}: expected no right to write"
                );
                self.buf.protect(first, n, RW)?;
                (same(done), in_time)
            }
            ("fork", _) => {
                let begin = || {
                    Waiting::start(
                        || Ok(()),
                        || {
                            self.holds_words(0, "of the child, as it was")?;
                            self.set_words(1000);
                            self.holds_words(1000, "of the child, which has written")
                        },
                    )
                };
                let (waiting, in_time) = self.midway(slow, begin)?;
                child = Some(waiting);
                ((None, first, n, After::Shared), in_time)
            }
            ("clear_refs", _) => {
                expected.dirty = false;
                let (done, in_time) = self.midway(slow, clear_soft_dirty)?;
                (same(done), in_time)
            }
            ("userfaultfd", _) => {
                // What is watched is let go, and the other way round.
                let new = uffd
                    .is_none()
                    .then(Uffd::new)
                    .transpose()
                    .or_fail("userfaultfd")?;
                let used = uffd.as_ref().or(new.as_ref());
                let used = used.ok_or_else(|| Fail::failed("no userfaultfd"))?;
                expected.watched = !marks.watched;
                let (done, in_time) = self.midway(slow, || {
                    if new.is_some() {
                        used.register_writes(&self.buf, first, n)
                            .or_fail("UFFDIO_REGISTER")?;
                    }
                    used.protect(&self.buf, first, n, expected.watched)
                        .or_fail("UFFDIO_WRITEPROTECT")
                })?;
                let now = states(self, &self.buf, first, n)?;
                self.compare(&now, expected, After::Same, "afterwards")?;
                used.protect(&self.buf, first, n, false)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
                expected.watched = false;
                (same(done), in_time)
            }
            _ => {
                let ((), in_time) = self.midway(slow, || {
                    self.buf
                        .advise(first + GONE.start, GONE.len(), libc::MADV_DONTNEED)
                })?;
                self.buf.check_zero(first + GONE.start, GONE.len())?;
                ((None, first + GONE.end, n - GONE.end, After::Same), in_time)
            }
        };
        let (place, from, count, after) = done;
        let buf = place.as_ref().unwrap_or(&self.buf);
        // mremap() keeps the protection only if the process asks for its events.
        expected.watched &= place.is_none();
        let now = states(self, buf, from, count)?;
        self.compare(&now, expected, after, "afterwards")?;
        if let Some(child) = child {
            let wrong = now
                .iter()
                .position(|s| s.flags & (ZDM_PAGE_WRITE | ZDM_PAGE_ANON_EXCLUSIVE) != 0);
            check!(
                wrong.is_none(),
                "page {wrong:?} that a child shares: expected no right to write, and a shared page, \
                 found {:x?}",
                wrong.map(|i| now[i])
            );
            // The child has the descriptor, too, and nobody handles what it watches.
            if let Some(uffd) = &uffd {
                uffd.protect(&self.buf, first, n, false)
                    .or_fail("UFFDIO_WRITEPROTECT")?;
            }
            self.set_words(500);
            let child = child.release()?;
            self.holds_words(500, "of the parent, which has written")?;
            child.join()?;
            self.holds_words(500, "of the parent in the end")?;
            return Ok(in_time);
        }
        drop(uffd);
        for page in from..from + count {
            check_eq!(
                buf.get(page, 1),
                word(page),
                "word of page {page} in the end"
            );
        }
        self.touch(buf, from, count);
        self.nothing_found()?;
        Ok(in_time)
    }

    fn set_words(&self, more: u64) {
        for page in self.first..self.first + self.n {
            self.buf.set(page, 1, word(page) + more);
        }
    }

    fn holds_words(&self, more: u64, whose: &str) -> Outcome {
        for page in self.first..self.first + self.n {
            check_eq!(
                self.buf.get(page, 1),
                word(page) + more,
                "word of page {page} {whose}"
            );
        }
        Ok(())
    }
}

/// Each operation, with each combination of marks.
pub(super) fn each(ctx: &Ctx, node: usize, huge: bool) -> Outcome {
    needs_all_fixes(ctx)?;
    let own = [
        "read-only",
        "fork",
        "clear_refs",
        "userfaultfd",
        "MADV_DONTNEED",
    ];
    settled(ctx, node, |target| {
        let other = Target::open(ctx, node + 1)?;
        let mut slow = SLOW;
        for marks in MARKS {
            for name in COMMON.into_iter().chain(own) {
                let one = |slow| -> Outcome<bool> {
                    let mut s = Scene::new(target, &other, Place::System, huge, 5400)?;
                    s.place = Place::Local;
                    s.meets(marks, name, slow)
                };
                let told = |e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{name}, huge {huge}, {marks:?}: {e}")),
                };
                while !one(slow).map_err(told)? {
                    check!(
                        slow < SLOWEST,
                        "{name}, huge {huge}: expected it to meet migration entries that stay for \
                         {slow} ms, found none"
                    );
                    slow *= 2;
                }
            }
        }
        check_eq!(target.audit()?.0.total, 0, "violations");
        Ok(())
    })
}
