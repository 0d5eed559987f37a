// SPDX-License-Identifier: GPL-2.0

//! The marks of soft-dirty and of userfaultfd, and PageAnonExclusive, through every operation: each
//! combination of marks, for pages of each size in each place. An operation changes no mark, except
//! that mremap(2) marks what it moves, that a child is not watched, and that what a child shares is
//! not exclusive.

use super::super::Ctx;
use super::super::counts::Waiting;
use super::super::leak::settled;
use super::super::strict::needs_all_fixes;
use super::super::target::{Place, Target};
use super::maps::room;
use super::{RW, Scene, Strict};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::Buffer;
use crate::pagemap::{SCAN_HUGE, SCAN_SOFT_DIRTY};
use crate::pagestate::{State, clear_soft_dirty, views};
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq, proc};

/// What the pages have before an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marks {
    pub dirty: bool,
    pub watched: bool,
}

pub(super) const MARKS: [Marks; 4] = [
    Marks {
        dirty: false,
        watched: false,
    },
    Marks {
        dirty: true,
        watched: false,
    },
    Marks {
        dirty: false,
        watched: true,
    },
    Marks {
        dirty: true,
        watched: true,
    },
];

/// What the pages may be afterwards.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// As before.
    Same,
    /// Marked as written.
    Moved,
    /// Shared with another process.
    Shared,
}

/// An operation on a scene. It returns where the pages are afterwards: a buffer if they have moved,
/// the first page, and how many there are.
pub(super) type Run = fn(&Scene) -> Outcome<(Option<Buffer>, usize, usize, After)>;

pub(super) const OPERATIONS: &[(&str, Run)] = &[
    ("nothing", |s| Ok((None, s.first, s.n, After::Same))),
    ("mprotect", |s| {
        s.buf.protect(s.first, s.n, libc::PROT_READ)?;
        s.buf.protect(s.first, s.n, RW)?;
        Ok((None, s.first, s.n, After::Same))
    }),
    ("PROT_NONE", |s| {
        s.buf.protect(s.first, s.n, libc::PROT_NONE)?;
        s.buf.protect(s.first, s.n, RW)?;
        Ok((None, s.first, s.n, After::Same))
    }),
    ("mprotect of a part", |s| {
        s.buf.protect(s.first + 3, 2, libc::PROT_READ)?;
        s.buf.protect(s.first + 3, 2, RW)?;
        Ok((None, s.first, s.n, After::Same))
    }),
    ("munmap of a part", |s| {
        s.buf.unmap(s.first, 3)?;
        Ok((None, s.first + 3, s.n - 3, After::Same))
    }),
    ("mremap", |s| {
        let place = room(s)?;
        s.buf.move_pages(s.first, s.n, &place, s.first)?;
        Ok((Some(place), s.first, s.n, After::Moved))
    }),
    ("mremap of a part", |s| {
        let place = room(s)?;
        s.buf.move_pages(s.first + 2, 5, &place, s.first + 2)?;
        Ok((Some(place), s.first + 2, 5, After::Moved))
    }),
    ("beside what mremap moves", |s| {
        let place = room(s)?;
        s.buf.move_pages(s.first, 2, &place, s.first)?;
        Ok((None, s.first + 2, s.n - 2, After::Same))
    }),
    ("fork", |s| {
        let child = Waiting::idle()?;
        child.join()?;
        Ok((None, s.first, s.n, After::Shared))
    }),
    ("to the device", |s| {
        // Pages of the other device come by way of the system.
        proc::drain_batches()?;
        for device in [s.other, s.target] {
            let _ = device.to_system(&s.buf, s.first, s.n);
        }
        s.target
            .to_device(&s.buf, s.first, s.n)
            .or_fail("MIGRATE_TO_DEV")?;
        Ok((None, s.first, s.n, After::Same))
    }),
    ("a part to the system", |s| {
        for device in [s.other, s.target] {
            let _ = device.to_system(&s.buf, s.first + 4, 3);
        }
        Ok((None, s.first, s.n, After::Same))
    }),
    ("RELEASE", |s| {
        for device in [s.other, s.target] {
            device.release().or_fail("RELEASE")?;
        }
        Ok((None, s.first, s.n, After::Same))
    }),
    ("a migration in pieces", |s| {
        // There is memory for all but a huge page: it is split while nobody maps it.
        let device = if s.place == Place::Remote {
            s.other
        } else {
            s.target
        };
        proc::drain_batches()?;
        device.fail_alloc()?;
        let _ = match s.place {
            Place::System => device.to_device(&s.buf, s.first, s.n).map(drop),
            _ => device.to_system(&s.buf, s.first, s.n).map(drop),
        };
        let other = Buffer::filled(1, s.seed)?;
        let _ = device.to_device(&other, 0, 1);
        Ok((None, s.first, s.n, After::Same))
    }),
    ("a migration that fails", |s| {
        let device = if s.place == Place::Remote {
            s.target
        } else {
            s.other
        };
        device.fail_alloc()?;
        // Huge pages may go in pieces.
        let _ = device.to_device(&s.buf, s.first, s.n);
        // Where nothing was allocated, this is what fails.
        let other = Buffer::filled(1, s.seed)?;
        let _ = device.to_device(&other, 0, 1);
        Ok((None, s.first, s.n, After::Same))
    }),
];

/// The states of pages. A device does not see the pages of another one's private memory.
#[track_caller]
pub(super) fn states(s: &Scene, buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<State>> {
    let seen = views(s.target, buf, first, n)?;
    let other = views(s.other, buf, first, n)?;
    let pick = |(a, b): (State, State)| if a.flags == 0 { b } else { a };
    Ok(seen.into_iter().zip(other).map(pick).collect())
}

/// What the first pages of a test hold, of which one word is enough to write to them.
pub(super) fn word(page: usize) -> u64 {
    5400 + page as u64
}

impl Scene<'_> {
    pub(super) fn touch(&self, buf: &Buffer, first: usize, n: usize) {
        for page in first..first + n {
            buf.set(page, 1, word(page));
        }
    }

    /// Gives the pages these marks in system memory, and moves them to their place.
    #[track_caller]
    pub(super) fn mark(&self, marks: Marks) -> Outcome<Option<Uffd>> {
        self.touch(&self.buf, self.first, self.n);
        if self.huge && proc::huge(&self.buf, self.first, self.n)? != self.n {
            self.buf.advise(self.first, self.n, libc::MADV_COLLAPSE)?;
        }
        clear_soft_dirty()?;
        if marks.dirty {
            self.touch(&self.buf, self.first, self.n);
        }
        let uffd = marks
            .watched
            .then(Uffd::new)
            .transpose()
            .or_fail("userfaultfd")?;
        if let Some(uffd) = &uffd {
            uffd.register_writes(&self.buf, self.first, self.n)
                .or_fail("UFFDIO_REGISTER")?;
            uffd.protect(&self.buf, self.first, self.n, true)
                .or_fail("UFFDIO_WRITEPROTECT")?;
        }
        let to = match self.place {
            Place::System => return Ok(uffd),
            Place::Local => self.target,
            Place::Remote => self.other,
        };
        proc::drain_batches()?;
        to.to_device(&self.buf, self.first, self.n)
            .or_fail("MIGRATE_TO_DEV")?;
        to.expect(&self.buf, self.first, self.n, self.n)?;
        Ok(uffd)
    }

    #[track_caller]
    pub(super) fn compare(
        &self,
        found: &[State],
        marks: Marks,
        after: After,
        when: &str,
    ) -> Outcome {
        for (i, state) in found.iter().enumerate() {
            // remove_migration_pmd() marks what is dirty; so a huge page may get the mark, but never
            // loses it.
            let dirty = marks.dirty || after == After::Moved;
            let marked = state.scan & SCAN_SOFT_DIRTY != 0;
            let exclusive = state.flags & ZDM_PAGE_ANON_EXCLUSIVE != 0;
            // A huge entry has one flag, for its first page.
            let alone = after != After::Shared && (state.scan & SCAN_HUGE == 0 || i == 0);
            check!(
                state.uffd_wp == marks.watched
                    && (marked == dirty || self.huge && marked)
                    && (exclusive || !alone)
                    && (state.flags & ZDM_PAGE_WRITE == 0 || !marks.watched),
                "page {i} {when}: expected the mark of writes {dirty}, that of userfaultfd {}, \
                 exclusive {alone}, found {state:x?}",
                marks.watched
            );
        }
        Ok(())
    }

    fn through(&self, marks: Marks, name: &str, run: Run) -> Outcome {
        let uffd = self.mark(marks)?;
        let before = states(self, &self.buf, self.first, self.n)?;
        self.compare(&before, marks, After::Same, "before")?;
        // A child sees the pages as it gets them.
        let child = (name == "fork").then(|| {
            Waiting::start(
                || Ok(()),
                || {
                    // The device's file is the parent's: its table is of no use here.
                    let own = views_of_child(self)?;
                    for (i, entry) in own.into_iter().enumerate() {
                        let [marked, watched] = entry;
                        check!(
                            !watched && (marked == marks.dirty || self.huge && marked),
                            "page {i} of the child: expected the mark of writes {} and no other, \
                             found {marked} and {watched}",
                            marks.dirty
                        );
                    }
                    Ok(())
                },
            )
        });
        if let Some(child) = child.transpose()? {
            let shared = states(self, &self.buf, self.first, self.n)?;
            self.compare(&shared, marks, After::Shared, "shared with a child")?;
            child.join()?;
        }
        let (place, first, n, after) = run(self)?;
        let buf = place.as_ref().unwrap_or(&self.buf);
        // mremap() keeps the protection only if the process asks for its events.
        let expected = Marks {
            watched: marks.watched && place.is_none(),
            ..marks
        };
        let now = states(self, buf, first, n)?;
        self.compare(&now, expected, after, "afterwards")?;
        // And back in the system.
        for device in [self.target, self.other] {
            let _ = device.to_system(buf, first, n);
        }
        let back = states(self, buf, first, n)?;
        self.compare(&back, expected, after, "in the system afterwards")?;
        self.look()?;
        if let (Some(uffd), None) = (&uffd, &place) {
            uffd.protect(buf, first, n, false)
                .or_fail("UFFDIO_WRITEPROTECT")?;
            let free = states(self, buf, first, n)?;
            let none = Marks {
                watched: false,
                ..marks
            };
            self.compare(&free, none, after, "without the protection")?;
        }
        drop(uffd);
        for page in first..first + n {
            check_eq!(
                buf.get(page, 1),
                word(page),
                "word of page {page} in the end"
            );
        }
        self.touch(buf, first, n);
        self.nothing_found()
    }
}

/// For each page of the calling process the marks of soft-dirty and of userfaultfd.
#[track_caller]
fn views_of_child(s: &Scene) -> Outcome<Vec<[bool; 2]>> {
    let entries = proc::entries(&s.buf, s.first, s.n)?;
    let marks = |e: u64| [e & (1 << 55) != 0, e & (1 << 57) != 0];
    Ok(entries.into_iter().map(marks).collect())
}

/// Each combination in a scene of its own.
fn each(ctx: &Ctx, node: usize, huge: bool, marks: &[Marks]) -> Outcome {
    needs_all_fixes(ctx)?;
    settled(ctx, node, |target| {
        let other = Target::open(ctx, node + 1)?;
        let _strict = Strict::on()?;
        // Huge pages take time, and those of the system are none of a device's.
        let places = &Place::ALL[usize::from(huge)..];
        for place in places {
            for marks in marks {
                for (name, run) in OPERATIONS {
                    let one = || -> Outcome {
                        let mut s = Scene::new(target, &other, Place::System, huge, 5400)?;
                        s.place = *place;
                        s.through(*marks, name, *run)
                    };
                    one().map_err(|e| match e {
                        Fail::Skip(_) => e,
                        e => {
                            Fail::failed(format!("{name}, {place:?}, huge {huge}, {marks:?}: {e}"))
                        }
                    })?;
                }
            }
        }
        check_eq!(target.audit()?.0.total, 0, "violations");
        Ok(())
    })
}

pub(super) fn small(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, false, &MARKS)
}

pub(super) fn huge_dirty(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, true, &MARKS[..2])
}

pub(super) fn huge_watched(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, true, &MARKS[2..])
}
