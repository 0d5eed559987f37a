// SPDX-License-Identifier: GPL-2.0

//! Operations on rights and marks.

use super::super::counts::Waiting;
use super::super::differ::WP_ASYNC;
use super::{Operation, Place, RW, Scene};
use crate::check::{OrFail, Outcome};
use crate::pagemap::{SCAN_WRITTEN, protect_written};
use crate::pagestate::{State, UFFD_WP, clear_soft_dirty, states};
use crate::uapi::*;
use crate::uffd::{RWP, Uffd};
use crate::{check, check_eq, numa, proc};

pub(super) const OPERATIONS: &[Operation] = &[
    ("mprotect", mprotect),
    ("mprotect of a part", mprotect_part),
    ("PROT_NONE", prot_none),
    ("mprotect of exclusive pages", mprotect_exclusive),
    ("marks of exclusive pages", marks_exclusive),
    ("migration of exclusive pages", migrate_exclusive),
    ("userfaultfd", uffd_wp),
    ("userfaultfd of a part", uffd_wp_part),
    ("userfaultfd and mprotect", uffd_mprotect),
    ("userfaultfd and fork", uffd_fork),
    ("userfaultfd and zeroes", uffd_zeroes),
    ("userfaultfd of exclusive pages", uffd_exclusive),
    ("protection against reads", hidden),
    ("protection against reads and fork", hidden_fork),
    ("PAGEMAP_SCAN that protects", scan_protects),
    ("clear_refs", clear),
];

impl Scene<'_> {
    #[track_caller]
    fn states(&self) -> Outcome<Vec<State>> {
        states(self.target, &self.buf, self.first, self.n)
    }

    /// No entry of `count` pages from number `at` on allows a write.
    #[track_caller]
    fn no_right(&self, at: usize, count: usize, when: &str) -> Outcome {
        let writable = |s: &State| s.flags & ZDM_PAGE_WRITE != 0;
        let found = self.states()?[at..at + count].iter().position(writable);
        check_eq!(found, None, "first page whose entry allows a write {when}");
        Ok(())
    }

    /// Protected pages by userfaultfd are exactly those that `is` says.
    #[track_caller]
    fn protected(&self, is: impl Fn(usize) -> bool, when: &str) -> Outcome {
        let states = self.states()?;
        let wrong = (0..self.n).find(|&i| {
            let writable = states[i].flags & ZDM_PAGE_WRITE != 0;
            states[i].uffd_wp != is(i) || (is(i) && writable)
        });
        check_eq!(wrong, None, "first page with the wrong protection {when}");
        Ok(())
    }

    /// SNAPSHOT finds no right to any page.
    #[track_caller]
    fn unseen(&self, what: &str) -> Outcome {
        let seen = self.target.snapshot(&self.buf, self.first, self.n);
        let grants = |kind: &u8| *kind != PROT_ERROR && *kind & (PROT_READ | PROT_WRITE) != 0;
        let found = seen.or_fail("SNAPSHOT")?.iter().position(grants);
        check_eq!(
            found,
            None,
            "first page {what} that SNAPSHOT gives rights to"
        );
        Ok(())
    }

    #[track_caller]
    fn watched(&self) -> Outcome<Uffd> {
        let uffd = Uffd::new().or_fail("userfaultfd")?;
        uffd.register_writes(&self.buf, self.first, self.n)
            .or_fail("UFFDIO_REGISTER")?;
        self.map()?;
        Ok(uffd)
    }
}

fn mprotect(s: &Scene) -> Outcome {
    s.buf.protect(s.first, s.n, libc::PROT_READ)?;
    s.look()?;
    s.no_right(0, s.n, "after mprotect")?;
    s.denied(0)?;
    s.denied(s.n - 1)?;
    s.holds(0, s.n, s.seed)?;
    s.buf.protect(s.first, s.n, RW)?;
    s.write(0, s.n, s.seed + 1)?;
    s.holds(0, s.n, s.seed + 1)
}

fn mprotect_part(s: &Scene) -> Outcome {
    s.buf.protect(s.first + 3, 4, libc::PROT_READ)?;
    s.look()?;
    s.no_right(3, 4, "after mprotect of a part")?;
    s.denied(3)?;
    s.denied(6)?;
    s.write(0, 3, s.seed)?;
    s.write(7, s.n - 7, s.seed)?;
    s.holds(0, s.n, s.seed)
}

fn prot_none(s: &Scene) -> Outcome {
    s.buf.protect(s.first + 1, 2, libc::PROT_NONE)?;
    s.look()?;
    s.denied(1)?;
    let read = s.target.read(&s.buf, s.first + 1, 1);
    check!(
        read.is_err(),
        "READ without the right: expected an error, found success"
    );
    s.buf.protect(s.first + 1, 2, RW)?;
    s.holds(0, s.n, s.seed)
}

/// What ends exclusive access gives no right that the area has no more.
fn mprotect_exclusive(s: &Scene) -> Outcome {
    let Some(n) = s.exclusive()? else {
        return Ok(());
    };
    s.buf.protect(s.first, s.n, libc::PROT_READ)?;
    s.look()?;
    s.denied(0)?;
    s.buf.check(s.first, s.n, s.seed)?;
    s.no_right(0, n, "that was exclusive, after mprotect")?;
    s.look()
}

/// A page that was taken and given back without a write by anybody has the marks that it had.
fn marks_exclusive(s: &Scene) -> Outcome {
    if s.is_away() {
        return Ok(());
    }
    // NUMA balancing takes rights away when it likes. A kernel without NUMA has no such call.
    let _ = numa::no_balancing();
    // The first time takes the write fault that sets the marks.
    for _ in 0..2 {
        s.exclusive()?;
        s.buf.check(s.first, s.n, s.seed)?;
    }
    let before = s.states()?;
    s.exclusive()?;
    s.buf.check(s.first, s.n, s.seed)?;
    for (i, (now, before)) in s.states()?.iter().zip(&before).enumerate() {
        check_eq!(now, before, "state of page {i} after exclusive access");
    }
    Ok(())
}

/// A device takes pages away that another has for itself.
fn migrate_exclusive(s: &Scene) -> Outcome {
    let Some(n) = s.exclusive()? else {
        return Ok(());
    };
    if s.place == Place::System {
        proc::drain_batches()?;
        // Not all may go: some are exclusive.
        let _ = s.other.to_device(&s.buf, s.first, s.n);
    }
    s.look()?;
    s.holds(0, n, s.seed)?;
    s.write(0, s.n, s.seed + 1)?;
    s.holds(0, s.n, s.seed + 1)
}

fn uffd_wp(s: &Scene) -> Outcome {
    let uffd = s.watched()?;
    uffd.protect(&s.buf, s.first, s.n, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    s.look()?;
    s.protected(|_| true, "after UFFDIO_WRITEPROTECT")?;
    s.denied(0)?;
    s.denied(s.n - 1)?;
    s.holds(0, s.n, s.seed)?;
    s.protected(|_| true, "after reads")?;
    uffd.protect(&s.buf, s.first, s.n, false)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    s.protected(|_| false, "in the end")?;
    s.write(0, s.n, s.seed + 1)?;
    s.holds(0, s.n, s.seed + 1)
}

fn uffd_wp_part(s: &Scene) -> Outcome {
    let uffd = s.watched()?;
    uffd.protect(&s.buf, s.first + 2, 5, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    s.look()?;
    let is = |i| (2..7).contains(&i);
    s.protected(is, "of a part")?;
    s.denied(2)?;
    s.denied(6)?;
    s.holds(0, s.n, s.seed)?;
    s.protected(is, "of a part, after reads")
}

/// The mark outlives a change of rights in both directions.
fn uffd_mprotect(s: &Scene) -> Outcome {
    let uffd = s.watched()?;
    uffd.protect(&s.buf, s.first, s.n, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    s.buf.protect(s.first, s.n, libc::PROT_READ)?;
    s.protected(|_| true, "without the right to write")?;
    s.buf.protect(s.first, s.n, RW)?;
    s.protected(|_| true, "with the right to write")?;
    s.denied(s.n / 2)?;
    s.holds(0, s.n, s.seed)
}

/// The parent's pages stay protected; the child is not watched.
fn uffd_fork(s: &Scene) -> Outcome {
    let uffd = s.watched()?;
    uffd.protect(&s.buf, s.first, s.n, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    let child = Waiting::start(
        || Ok(()),
        || {
            s.buf.fill(s.first, s.n, s.seed + 2);
            s.buf.check(s.first, s.n, s.seed + 2)
        },
    )?;
    s.look()?;
    s.protected(|_| true, "of the parent")?;
    s.denied(0)?;
    child.join()?;
    s.protected(|_| true, "of the parent, after the child")?;
    s.holds(0, s.n, s.seed)
}

/// A page of zeroes that is protected is so on the device, which must ask before it writes.
fn uffd_zeroes(s: &Scene) -> Outcome {
    s.buf.advise(s.first, s.n, libc::MADV_DONTNEED)?;
    s.buf.check_zero(s.first, s.n)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register_writes(&s.buf, s.first, s.n)
        .or_fail("UFFDIO_REGISTER")?;
    uffd.protect(&s.buf, s.first, s.n, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    let to = if s.place == Place::Remote {
        s.other
    } else {
        s.target
    };
    if s.place != Place::System {
        to.to_device(&s.buf, s.first, s.n)
            .or_fail("MIGRATE_TO_DEV")?;
        to.expect(&s.buf, s.first, s.n, s.n)?;
    }
    s.look()?;
    s.protected(|_| true, "that fill protected zeroes")?;
    s.denied(0)?;
    s.denied(s.n - 1)?;
    s.buf.check_zero(s.first, s.n)?;
    s.protected(|_| true, "that fill protected zeroes, after reads")?;
    uffd.protect(&s.buf, s.first, s.n, false)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    s.write(0, s.n, s.seed + 1)?;
    s.holds(0, s.n, s.seed + 1)
}

/// Pages that are protected while a device has them for itself are so afterwards.
fn uffd_exclusive(s: &Scene) -> Outcome {
    let uffd = s.watched()?;
    let Some(n) = s.exclusive()? else {
        return Ok(());
    };
    uffd.protect(&s.buf, s.first, s.n, true)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    s.look()?;
    s.buf.check(s.first, s.n, s.seed)?;
    s.protected(|_| true, "that were exclusive")?;
    s.denied(0)?;
    s.denied(n - 1)?;
    uffd.protect(&s.buf, s.first, s.n, false)
        .or_fail("UFFDIO_WRITEPROTECT")?;
    s.protected(|_| false, "that were exclusive, in the end")?;
    s.write(0, s.n, s.seed + 1)?;
    s.holds(0, s.n, s.seed + 1)
}

/// What the process hides from itself is hidden from the device: it may neither read nor write, and
/// its table has nothing of it.
fn hidden(s: &Scene) -> Outcome {
    let Ok(uffd) = Uffd::with_features(RWP) else {
        // This kernel has no such protection.
        return Ok(());
    };
    uffd.register_accesses(&s.buf, s.first, s.n)
        .or_fail("UFFDIO_REGISTER")?;
    s.map()?;
    uffd.hide(&s.buf, s.first, s.n, true)
        .or_fail("UFFDIO_RWPROTECT")?;
    s.look()?;
    // Before anything else: a fault may bring a PRIVATE page back, which is then another case.
    s.unseen("that was hidden")?;
    let unread = |page: usize| -> Outcome {
        let read = s.target.read(&s.buf, s.first + page, 1);
        check!(
            read.is_err(),
            "READ of page {page}, which is hidden: expected an error, found success"
        );
        Ok(())
    };
    for page in [1, s.n / 2] {
        unread(page)?;
        s.denied(page)?;
    }
    for page in [0, 1, s.n - 1] {
        s.denied(page)?;
        unread(page)?;
    }
    s.look()?;
    uffd.hide(&s.buf, s.first, s.n, false)
        .or_fail("UFFDIO_RWPROTECT")?;
    s.write(0, s.n, s.seed + 1)?;
    s.holds(0, s.n, s.seed + 1)
}

/// What is hidden stays so after fork(), and not for the child, which has no userfaultfd: nothing is left there of
/// the protection.
fn hidden_fork(s: &Scene) -> Outcome {
    let Ok(uffd) = Uffd::with_features(RWP) else {
        return Ok(());
    };
    uffd.register_accesses(&s.buf, s.first, s.n)
        .or_fail("UFFDIO_REGISTER")?;
    // A huge page that goes to the device after it was hidden keeps the right to write there.
    let to = if s.place == Place::Remote {
        s.other
    } else {
        s.target
    };
    to.bring_back(&s.buf, s.first, s.n)?;
    s.map()?;
    uffd.hide(&s.buf, s.first, s.n, true)
        .or_fail("UFFDIO_RWPROTECT")?;
    if s.place != Place::System {
        // It may stay where it is.
        let _ = to.to_device(&s.buf, s.first, s.n);
        s.look()?;
    }
    let child = Waiting::start(
        || {
            let entries = proc::entries(&s.buf, s.first, s.n)?;
            let found = entries.iter().position(|e| e & UFFD_WP != 0);
            check_eq!(found, None, "first page of the child that is protected");
            Ok(())
        },
        || {
            s.buf.check(s.first, s.n, s.seed)?;
            s.buf.fill(s.first, s.n, s.seed + 2);
            s.buf.check(s.first, s.n, s.seed + 2)
        },
    )?;
    s.look()?;
    s.unseen("that was hidden before fork()")?;
    child.join()?;
    s.unseen("that was hidden, after the child,")?;
    s.denied(0)?;
    s.denied(s.n - 1)?;
    uffd.hide(&s.buf, s.first, s.n, false)
        .or_fail("UFFDIO_RWPROTECT")?;
    s.write(0, s.n, s.seed + 1)?;
    s.holds(0, s.n, s.seed + 1)
}

/// PAGEMAP_SCAN protects what was written, and tells later what has been written since, by the CPU
/// or by the device.
fn scan_protects(s: &Scene) -> Outcome {
    let uffd = Uffd::with_features(WP_ASYNC).or_fail("userfaultfd")?;
    uffd.register_writes(&s.buf, s.first, s.n)
        .or_fail("UFFDIO_REGISTER")?;
    s.map()?;
    let file = std::fs::File::open("/proc/self/pagemap").or_fail("/proc/self/pagemap")?;
    let (start, end) = (s.buf.at(s.first), s.buf.at(s.first + s.n));
    let written = || -> Outcome<Vec<usize>> {
        let states = s.states()?;
        let is = |i: &usize| states[*i].scan & SCAN_WRITTEN != 0;
        Ok((0..s.n).filter(is).collect())
    };
    let protect = || {
        protect_written(&file, start, end).or_fail("PAGEMAP_SCAN")?;
        s.look()?;
        s.protected(|_| true, "after PAGEMAP_SCAN")?;
        check_eq!(written()?, Vec::new(), "pages written since PAGEMAP_SCAN");
        Ok(())
    };
    if !s.complete {
        // PAGEMAP_SCAN leaves a PRIVATE page writable.
        return Ok(());
    }
    protect()?;
    s.holds(0, s.n, s.seed)?;
    check_eq!(written()?, Vec::new(), "pages written since, after reads");
    // A huge page is written as a whole, or in pieces where the write splits it.
    let all = |found: &[usize], at: usize| found.contains(&at) && (s.huge || found.len() == 1);
    s.buf.fill(s.first + 2, 1, s.seed);
    let found = written()?;
    check!(
        all(&found, 2),
        "pages written since by the CPU: expected 2, found {found:?}"
    );
    protect_written(&file, start, end).or_fail("PAGEMAP_SCAN")?;
    s.look()?;
    s.write(5, 1, s.seed)?;
    let found = written()?;
    check!(
        all(&found, 5),
        "pages written since by the device: expected 5, found {found:?}"
    );
    s.holds(0, s.n, s.seed)
}

/// Marks that are cleared are set again by the next write, of the CPU or by way of it.
fn clear(s: &Scene) -> Outcome {
    clear_soft_dirty()?;
    s.look()?;
    let marked =
        |s: &Scene| -> Outcome<usize> { Ok(s.states()?.iter().filter(|p| p.soft_dirty).count()) };
    check_eq!(marked(s)?, 0, "marked pages after they were cleared");
    s.holds(0, s.n, s.seed)?;
    // remove_migration_pmd() marks what is dirty.
    check!(
        s.huge || marked(s)? == 0,
        "marked pages after reads: expected none"
    );
    // Once more, with the pages in their first place: each write has to be marked.
    s.arrange()?;
    clear_soft_dirty()?;
    if s.complete {
        s.no_right(0, s.n, "after clear_refs")?;
    }
    s.write(0, 1, s.seed)?;
    s.buf.fill(s.first, s.n, s.seed + 1);
    if s.complete {
        check_eq!(marked(s)?, s.n, "marked pages after writes");
    }
    s.holds(0, s.n, s.seed + 1)
}
