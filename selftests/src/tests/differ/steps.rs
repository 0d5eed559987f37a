// SPDX-License-Identifier: GPL-2.0

//! The operations. Each is done to both copies, or to the moved one by a device and to the other by
//! the CPU in the way that has the same effect.

use std::io;
use std::io::{Read, Seek};

use super::super::counts::Waiting;
use super::super::fight::in_turn;
use super::compare::exists;
use super::{Copy, Pair, RW, Target};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE, pattern_bytes};
use crate::pagemap::SCAN_ZERO;
use crate::uapi::*;
use crate::{check, check_eq, files, numa, pagestate, proc, sys};

/// UFFD_FEATURE_WP_ASYNC: a write ends the protection without a message.
pub(in crate::tests) const WP_ASYNC: u64 = 1 << 15;
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;
const READ: i32 = libc::PROT_READ;
/// The pages that one step writes or pins at most.
const FEW: usize = 12;

type Step = for<'a> fn(&mut Pair<'a>) -> Outcome;

/// The steps with their relative weights.
pub(super) const STEPS: &[(&str, usize, Step)] = &[
    ("to device", 24, |p| p.send()),
    ("to system", 6, |p| p.fetch()),
    ("RELEASE", 2, |p| p.release()),
    ("write", 6, |p| p.write()),
    ("write a word", 6, |p| p.write_word()),
    ("read", 4, |p| p.read()),
    ("device write", 6, |p| p.device_write()),
    ("device read", 6, |p| p.device_read()),
    ("device fault", 4, |p| p.device_fault()),
    ("exclusive", 5, |p| p.exclusive()),
    ("mprotect", 6, |p| p.protect()),
    ("MADV_DONTNEED", 4, |p| p.dontneed()),
    ("advice", 8, |p| p.advise()),
    ("guard pages", 2, |p| p.guard()),
    ("munmap", 3, |p| p.unmap()),
    ("mremap", 4, |p| p.mremap(false)),
    ("mremap, old place mapped", 3, |p| p.mremap(true)),
    ("watch", 3, |p| p.watch()),
    ("UFFDIO_WRITEPROTECT", 6, |p| p.uffd_protect()),
    ("UFFDIO_MOVE", 5, |p| p.uffd_move()),
    ("UFFDIO_ZEROPAGE", 2, |p| p.uffd_zero()),
    ("UFFDIO_COPY", 2, |p| p.uffd_copy()),
    ("mlock", 3, |p| p.lock()),
    ("fork", 5, |p| p.fork()),
    ("join", 4, |p| p.join()),
    ("pin", 4, |p| p.pin()),
    ("process_vm_readv", 2, |p| p.read_process()),
    ("write(2)", 2, |p| p.write_file()),
    ("read(2)", 2, |p| p.read_file()),
    ("vmsplice", 2, |p| p.splice()),
    ("compaction", 1, |p| p.compact()),
    ("mbind", 2, |p| p.bind()),
    ("clear_refs", 4, |p| p.clear_marks()),
];

impl Pair<'_> {
    /// Calls a function for both copies, which must have the same result.
    #[track_caller]
    fn both(
        &self,
        (first, n): (usize, usize),
        what: &str,
        run: impl Fn(&Buffer, usize, usize) -> io::Result<()>,
    ) -> Outcome<bool> {
        let go = |copy: &Copy| match run(&copy.buf, copy.first + first, n) {
            Ok(()) => None,
            Err(e) => Some(e.raw_os_error()),
        };
        let (away, home) = (go(&self.away), go(&self.home));
        check_eq!(
            away,
            home,
            "errno of {what} of pages {first}..{}",
            first + n
        );
        Ok(home.is_none())
    }

    fn copies(&self) -> [&Copy; 2] {
        [&self.away, &self.home]
    }

    fn some_target(&mut self) -> bool {
        self.random.below(3) == 0
    }

    fn device(&self, other: bool) -> &Target {
        if other { &self.other } else { self.target }
    }

    fn seed(&mut self) -> u64 {
        2 + self.random.below(0x7fff) as u64
    }

    /// A few pages that have rights, if there are any in a random range.
    fn few(&mut self, rights: i32) -> Option<(usize, usize)> {
        let range = self.range();
        let (first, n) = self.runs(range, rights).into_iter().next()?;
        Some((first, n.min(FEW)))
    }

    /// Moves pages that exist to a device. A hole or a page of zeroes would become a page.
    fn send(&mut self) -> Outcome {
        let range = self.range();
        let other = self.some_target();
        let states = self.states(&self.away)?;
        let real = |page: usize| exists(&states[page]) && states[page].scan & SCAN_ZERO == 0;
        proc::drain_batches()?;
        for (first, n) in self.runs(range, READ) {
            let pages: Vec<usize> = (first..first + n).filter(|p| real(*p)).collect();
            for run in pages.chunk_by(|a, b| a + 1 == *b) {
                let (at, n) = (self.away.first + run[0], run.len());
                // Pages that a child shares may stay, and so may those that somebody looks at.
                let _ = self.device(other).to_device(&self.away.buf, at, n);
            }
        }
        Ok(())
    }

    fn bring_back(&self, first: usize, n: usize) -> Outcome {
        for device in [self.target, &self.other] {
            // Another device's pages, or an area without rights.
            let _ = device.to_system(&self.away.buf, self.away.first + first, n);
        }
        Ok(())
    }

    fn fetch(&mut self) -> Outcome {
        let (first, n) = self.range();
        self.bring_back(first, n)
    }

    fn release(&mut self) -> Outcome {
        let other = self.some_target();
        self.device(other).release().or_fail("RELEASE")
    }

    fn write(&mut self) -> Outcome {
        let seed = self.seed();
        if let Some((first, n)) = self.few(RW) {
            for copy in self.copies() {
                copy.buf.fill(copy.first + first, n, seed);
            }
        }
        Ok(())
    }

    fn write_word(&mut self) -> Outcome {
        let (range, seed) = (self.range(), self.seed());
        for (first, n) in self.runs(range, RW) {
            for copy in self.copies() {
                for page in first..first + n {
                    copy.buf.set(copy.first + page, seed as usize % 512, seed);
                }
            }
        }
        Ok(())
    }

    fn read(&mut self) -> Outcome {
        let range = self.range();
        for (first, n) in self.runs(range, READ) {
            self.compare_data(first, n.min(FEW))?;
        }
        Ok(())
    }

    fn device_write(&mut self) -> Outcome {
        let (seed, other) = (self.seed(), self.some_target());
        if let Some((first, n)) = self.few(RW) {
            let (away, home) = (&self.away, &self.home);
            let data = pattern_bytes(seed, home.first + first, n);
            in_turn(|| {
                self.device(other)
                    .write(&away.buf, away.first + first, &data)
            })
            .or_fail("WRITE")?;
            home.buf.fill(home.first + first, n, seed);
        }
        Ok(())
    }

    /// The bytes of pages of the copy at home.
    fn bytes(&self, first: usize, n: usize) -> Vec<u8> {
        let pages = first..first + n;
        let words = pages.flat_map(|page| self.home.buf.words(self.home.first + page));
        words.flat_map(u64::to_ne_bytes).collect()
    }

    fn device_read(&mut self) -> Outcome {
        let other = self.some_target();
        if let Some((first, n)) = self.few(READ) {
            let at = self.away.first + first;
            let read = in_turn(|| self.device(other).read(&self.away.buf, at, n));
            let read = read.or_fail("READ")?;
            check!(
                read.data == self.bytes(first, n),
                "data of pages {first}.. that a device reads: expected that of the copy at home"
            );
        }
        Ok(())
    }

    /// A device maps pages, for reading or writing, and copies nothing.
    fn device_fault(&mut self) -> Outcome {
        let other = self.some_target();
        let write = self.random.below(2) == 0;
        let (rights, flags) = if write {
            (RW, ZDM_FAULT_WRITE)
        } else {
            (READ, 0)
        };
        if let Some((first, n)) = self.few(rights) {
            let at = self.away.buf.at(self.away.first + first);
            in_turn(|| self.device(other).fault(at, n as u64, flags)).or_fail("ZDM_FAULT")?;
            self.touch(&self.home, first, n, write);
        }
        Ok(())
    }

    /// Reads pages, or writes what is there.
    fn touch(&self, copy: &Copy, first: usize, n: usize, write: bool) {
        for page in copy.first + first..copy.first + first + n {
            let word = copy.buf.get(page, 0);
            if write {
                copy.buf.set(page, 0, word);
            }
        }
    }

    /// A device takes pages for itself, and the CPU takes them back.
    fn exclusive(&mut self) -> Outcome {
        let other = self.some_target();
        if let Some((first, n)) = self.few(RW) {
            let at = self.away.first + first;
            // Pages that a child shares are copied; the copy may be taken away again meanwhile.
            let taken = in_turn(|| self.device(other).exclusive(&self.away.buf, at, n));
            let taken = taken.or_fail("EXCLUSIVE")?;
            check!(
                taken.data == self.bytes(first, n),
                "data of exclusive pages {first}..: expected that of the copy at home"
            );
            self.touch(&self.home, first, n, true);
            self.touch(&self.away, first, n, true);
        }
        Ok(())
    }

    fn protect(&mut self) -> Outcome {
        let (first, n) = self.range();
        let rights = [RW, RW, RW, READ, READ, libc::PROT_NONE][self.random.below(6)];
        for copy in self.copies() {
            copy.buf.protect(copy.first + first, n, rights)?;
        }
        self.rights[first..first + n].fill(rights);
        Ok(())
    }

    fn dontneed(&mut self) -> Outcome {
        let range = self.range();
        let advise = |buf: &Buffer, at, n| buf.try_advise(at, n, libc::MADV_DONTNEED);
        self.both(range, "MADV_DONTNEED", advise).map(drop)
    }

    fn advise(&mut self) -> Outcome {
        let range = self.range();
        let advice = [
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_WILLNEED,
            libc::MADV_POPULATE_READ,
            libc::MADV_POPULATE_WRITE,
            libc::MADV_MERGEABLE,
            libc::MADV_UNMERGEABLE,
            libc::MADV_SEQUENTIAL,
            libc::MADV_DONTFORK,
            libc::MADV_DOFORK,
        ][self.random.below(10)];
        if advice == libc::MADV_DONTFORK && self.child.is_some() {
            return Ok(());
        }
        let advise = |buf: &Buffer, at, n| buf.try_advise(at, n, advice);
        self.both(range, &format!("advice {advice}"), advise)?;
        if advice == libc::MADV_DONTFORK {
            // The child that is made next would not have the pages.
            self.both((0, self.n), "MADV_DOFORK", |buf, at, n| {
                buf.try_advise(at, n, libc::MADV_DOFORK)
            })?;
        }
        Ok(())
    }

    /// Guard pages take the place of pages, and go again.
    fn guard(&mut self) -> Outcome {
        let range = self.range();
        let advice = |advice| move |buf: &Buffer, at, n| buf.try_advise(at, n, advice);
        self.both(range, "MADV_GUARD_INSTALL", advice(MADV_GUARD_INSTALL))?;
        self.target.stats()?;
        // An error may come after a part of the range, for which there are guard pages then.
        let remove = advice(MADV_GUARD_REMOVE);
        self.both(range, "MADV_GUARD_REMOVE", remove).map(drop)
    }

    /// Unmaps pages and maps new ones at once, before another mapping can take the place.
    fn unmap(&mut self) -> Outcome {
        let (first, n) = self.range();
        for copy in self.copies() {
            copy.buf.unmap(copy.first + first, n)?;
            copy.buf.map_again(copy.first + first, n)?;
        }
        self.rights[first..first + n].fill(RW);
        Ok(())
    }

    /// Two ranges of the same length that have no page in common.
    fn two_places(&mut self) -> Option<(usize, usize, usize)> {
        let n = 1 + self.random.below(FEW);
        let from = self.random.below(self.n - n);
        let to = self.random.below(self.n - n);
        (from + n <= to || to + n <= from).then_some((from, to, n))
    }

    fn mremap(&mut self, keep: bool) -> Outcome {
        let Some((from, to, n)) = self.two_places() else {
            return Ok(());
        };
        // One area at a time: with the same rights, and not joined from several.
        for i in 0..n {
            for copy in self.copies() {
                let (from, to) = (copy.first + from + i, copy.first + to + i);
                if keep {
                    copy.buf.move_contents(from, 1, &copy.buf, to)?;
                } else {
                    copy.buf.move_pages(from, 1, &copy.buf, to)?;
                    copy.buf.map_again(from, 1)?;
                }
            }
            self.rights[to + i] = self.rights[from + i];
            if !keep {
                self.rights[from + i] = RW;
            }
        }
        Ok(())
    }

    /// Watches all pages again: those that were mapped or moved since are not watched.
    fn watch(&mut self) -> Outcome {
        self.both((0, self.n), "UFFDIO_REGISTER", |buf, at, n| {
            self.uffd.register_writes(buf, at, n)
        })
        .map(drop)
    }

    fn uffd_protect(&mut self) -> Outcome {
        let range = self.range();
        let how = self.random.below(3) > 0;
        self.both(range, "UFFDIO_WRITEPROTECT", |buf, at, n| {
            self.uffd.protect(buf, at, n, how)
        })
        .map(drop)
    }

    /// Pages of devices are refused, in any of several ways: they come back first.
    fn uffd_move(&mut self) -> Outcome {
        let Some((from, to, n)) = self.two_places() else {
            return Ok(());
        };
        self.bring_back(from, n)?;
        if self.random.below(4) > 0 {
            self.both((to, n), "MADV_DONTNEED", |buf, at, n| {
                buf.try_advise(at, n, libc::MADV_DONTNEED)
            })?;
        }
        proc::drain_batches()?;
        // Pages that no device has given back stay for a child that shares them.
        if self.child.is_some() {
            return Ok(());
        }
        let go = |copy: &Copy| {
            let (buf, first) = (&copy.buf, copy.first);
            let moved = self.uffd.move_pages(buf, first + from, n, buf, first + to);
            moved.map_err(|e| e.raw_os_error())
        };
        let (away, home) = (go(&self.away), go(&self.home));
        check_eq!(away, home, "UFFDIO_MOVE of {n} pages from {from} to {to}");
        Ok(())
    }

    fn uffd_zero(&mut self) -> Outcome {
        let page = self.random.below(self.n);
        self.both((page, 1), "UFFDIO_ZEROPAGE", |buf, at, _| {
            self.uffd.zero(buf, at)
        })
        .map(drop)
    }

    fn uffd_copy(&mut self) -> Outcome {
        let (page, seed) = (self.random.below(self.n), self.seed());
        let from = Buffer::filled(1, seed)?;
        self.both((page, 1), "UFFDIO_COPY", |buf, at, _| {
            self.uffd.copy(buf.at(at), &from, 0)
        })
        .map(drop)
    }

    fn lock(&mut self) -> Outcome {
        let range = self.range();
        let lock = self.random.below(2) == 0;
        self.both(range, "mlock or munlock", |buf, at, n| {
            buf.try_lock(at, n, lock)
        })
        .map(drop)
    }

    /// A child has a copy of both. It compares them, and writes to a part of both, while this
    /// process goes on.
    fn fork(&mut self) -> Outcome {
        if self.child.is_some() {
            return Ok(());
        }
        let range = self.range();
        let seed = self.seed();
        let own = self.random.below(2) == 0;
        let check = |p: &Self| -> Outcome {
            for (first, n) in p.runs((0, p.n), READ) {
                p.compare_data(first, n)?;
            }
            Ok(())
        };
        self.child = Some(Waiting::start(
            || Ok(()),
            || {
                if own {
                    // The pages that it shares with its parent, and its own.
                    let target = Target::open(self.ctx, self.target.node())?;
                    let _ = target.to_device(&self.away.buf, self.away.first + range.0, range.1);
                }
                check(self)?;
                for (first, n) in self.runs(range, RW) {
                    for copy in self.copies() {
                        copy.buf.fill(copy.first + first, n, seed);
                    }
                }
                check(self)
            },
        )?);
        Ok(())
    }

    fn join(&mut self) -> Outcome {
        match self.child.take() {
            Some(child) => child.join(),
            None => Ok(()),
        }
    }

    fn pin(&mut self) -> Outcome {
        let flags = [
            0,
            ZDM_PIN_WRITE,
            ZDM_PIN_WRITE | ZDM_PIN_FAST,
            ZDM_PIN_WRITE | ZDM_PIN_LONGTERM,
            ZDM_PIN_GET,
        ][self.random.below(5)];
        if let Some(range) = self.few(RW) {
            self.both(range, &format!("ZDM_PIN {flags:#x}"), |buf, at, n| {
                let id = self.target.pin(buf, at, n, flags)?;
                self.target.unpin(id, 0)
            })?;
        }
        Ok(())
    }

    fn read_process(&mut self) -> Outcome {
        if let Some((first, n)) = self.few(READ) {
            let read = |copy: &Copy| -> Outcome<Buffer> {
                let to = Buffer::filled(n, 1)?;
                let from = copy.first + first;
                let got = files::read_process(sys::pid(), &copy.buf, from, &to, n);
                check_eq!(got.or_fail("process_vm_readv")?, n * PAGE, "bytes read");
                Ok(to)
            };
            let (away, home) = (read(&self.away)?, read(&self.home)?);
            for page in 0..n {
                check!(
                    away.words(page) == home.words(page),
                    "page {}, by process_vm_readv: expected the data of the copy at home",
                    first + page
                );
            }
        }
        Ok(())
    }

    /// Copies some pages of each copy by `read`, which must see the same data in both.
    fn read_both(
        &mut self,
        what: &str,
        read: impl Fn(&Copy, usize, usize) -> Outcome<Vec<u8>>,
    ) -> Outcome {
        if let Some((first, n)) = self.few(READ) {
            let same = read(&self.away, first, n)? == read(&self.home, first, n)?;
            check!(
                same,
                "{what} of pages {first}..: expected the data of the copy at home"
            );
        }
        Ok(())
    }

    fn write_file(&mut self) -> Outcome {
        self.read_both("write(2)", |copy, first, n| {
            let mut file = sys::memfd("zdm-differ").or_fail("memfd_create")?;
            let done = copy.buf.write_to(&file, copy.first + first, n);
            check_eq!(done.or_fail("write")?, n * PAGE, "bytes written");
            file.rewind().or_fail("lseek")?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).or_fail("read")?;
            Ok(bytes)
        })
    }

    fn read_file(&mut self) -> Outcome {
        let seed = self.seed();
        if let Some((first, n)) = self.few(RW) {
            for copy in self.copies() {
                let mut file = sys::memfd("zdm-differ").or_fail("memfd_create")?;
                io::Write::write_all(&mut file, &pattern_bytes(seed, first, n)).or_fail("write")?;
                file.rewind().or_fail("lseek")?;
                let done = copy.buf.read_from(&file, copy.first + first, n);
                check_eq!(done.or_fail("read")?, n * PAGE, "bytes read");
            }
        }
        Ok(())
    }

    fn splice(&mut self) -> Outcome {
        self.read_both("vmsplice", |copy, first, n| {
            let (mut read, write) = sys::pipe().or_fail("pipe")?;
            let done = copy.buf.vmsplice_to(&write, copy.first + first, n);
            check_eq!(done.or_fail("vmsplice")?, n * PAGE, "bytes of vmsplice");
            let mut bytes = vec![0; n * PAGE];
            read.read_exact(&mut bytes).or_fail("read")?;
            Ok(bytes)
        })
    }

    fn compact(&mut self) -> Outcome {
        let path = "/proc/sys/vm/compact_memory";
        match std::fs::write(path, "1") {
            // A kernel without compaction has no such file.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Fail::failed(format!("{path}: {e}")))
            }
            _ => Ok(()),
        }
    }

    fn bind(&mut self) -> Outcome {
        let (first, n) = self.range();
        let hard = self.random.below(2) == 0;
        for copy in self.copies() {
            // Pages of devices, and shared ones, are refused.
            let _ = numa::bind(&copy.buf, copy.first + first, n, 0, hard);
            let _ = numa::move_pages(&copy.buf, copy.first + first, n, Some(0));
        }
        Ok(())
    }

    fn clear_marks(&mut self) -> Outcome {
        pagestate::clear_soft_dirty()
    }
}

const _: () = assert!(FEW < super::SMALL && super::SMALL < HUGE_PAGES);
