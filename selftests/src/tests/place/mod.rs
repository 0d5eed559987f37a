// SPDX-License-Identifier: GPL-2.0

//! A migration changes only the place of a page (I13). The rights and marks of its entry, its
//! owner, its charge, and every counter are the same on the device, and after every way back. The
//! tests cover each kind of memory, small and huge pages, and various earlier uses of the pages.

mod kinds;
mod orders;

use self::kinds::{file_private, holes, merged_pages, swap_cache, zero_pages};
use self::orders::orders;
use super::chain::SIZES;
use super::counts::Waiting;
use super::leak::settled_in;
use super::target::Target;
use super::{Ctx, Test};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, check_bytes};
use crate::pagemap::{SCAN_HUGE, SCAN_PRESENT, SCAN_SOFT_DIRTY, SCAN_SWAPPED};
use crate::pagestate::{Counters, State, Watch, clear_soft_dirty, folio_flags, states};
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("place":
    "written" => written,
    "clean" => clean,
    "some_written" => some_written,
    "read_only" => read_only,
    "uffd_wp" => uffd_wp,
    "shared" => shared,
    "locked" => locked,
    "file_private" => file_private,
    "holes" => holes,
    "zero_pages" => zero_pages,
    "swap_cache" => swap_cache,
    "merged" => merged_pages,
    "failed" => failed,
    "pinned" => pinned,
    "unmapped_counters" => unmapped_counters,
    "orders" => orders,
);

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// The number of small pages, which is several times the slack of the counters.
const SMALL: usize = 192;

/// The ways in which pages come back to system memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Back {
    Request,
    Fault,
    Release,
}

const WAYS: [Back; 3] = [Back::Request, Back::Fault, Back::Release];

/// A mapping of private anonymous memory that the kernel does not join with a neighbour.
struct Scene<'a> {
    target: &'a Target,
    watch: Watch,
    buf: Buffer,
    first: usize,
    n: usize,
    huge: bool,
    /// Huge pages become smaller ones.
    pieces: bool,
}

impl<'a> Scene<'a> {
    #[track_caller]
    fn new(target: &'a Target, dir: &std::path::Path, huge: bool, seed: u64) -> Outcome<Self> {
        let n = if huge { HUGE_PAGES } else { SMALL };
        let s = Self {
            target,
            watch: Watch::new(dir)?,
            buf: Buffer::anon_huge_aligned(3 * HUGE_PAGES)?,
            first: HUGE_PAGES,
            n,
            huge,
            pieces: false,
        };
        let all = s.buf.pages();
        s.buf.protect(0, s.first, libc::PROT_NONE)?;
        s.buf
            .protect(s.first + n, all - s.first - n, libc::PROT_NONE)?;
        if huge {
            s.buf.advise(s.first, n, libc::MADV_HUGEPAGE)?;
        }
        s.fill(seed);
        if huge && proc::huge(&s.buf, s.first, n)? != n {
            s.buf.advise(s.first, n, libc::MADV_COLLAPSE)?;
        }
        Ok(s)
    }

    fn fill(&self, seed: u64) {
        self.buf.fill(self.first, self.n, seed);
    }

    #[track_caller]
    fn check(&self, seed: u64) -> Outcome {
        self.buf.check(self.first, self.n, seed)
    }

    #[track_caller]
    fn states(&self) -> Outcome<Vec<State>> {
        states(self.target, &self.buf, self.first, self.n)
    }

    #[track_caller]
    fn counters(&self) -> Outcome<Counters> {
        self.watch.counters(&self.buf, self.first, self.n)
    }

    /// Looks at the pages once, because the first look allocates memory that the program keeps.
    fn warm_up(&self) -> Outcome {
        self.states()?;
        self.counters()?;
        Ok(())
    }

    /// Whether a huge page comes back in smaller pieces.
    fn falls_back(&self) -> bool {
        self.huge && (self.pieces || !self.target.moves_large())
    }

    /// The counters that may differ: those of huge pages, if the pages do not stay huge.
    fn except(&self) -> &'static [&'static str] {
        const HUGE: &[&str] = &[
            "nr_anon_transparent_hugepages",
            "anon_thp",
            "nr_anon",
            "nr_anon_partially_mapped",
            "VmPTE",
        ];
        if self.falls_back() { HUGE } else { &[] }
    }

    #[track_caller]
    fn send(&self, seed: u64) -> Outcome {
        let (target, first, n) = (self.target, self.first, self.n);
        proc::drain_batches()?;
        let moved = target
            .to_device(&self.buf, first, n)
            .or_fail("MIGRATE_TO_DEV")?;
        check_bytes(
            &moved.data,
            seed,
            first,
            "data that MIGRATE_TO_DEV returned",
        )?;
        target.expect(&self.buf, first, n, n)
    }

    #[track_caller]
    fn bring_back(&self, how: Back) -> Outcome {
        let (target, first, n) = (self.target, self.first, self.n);
        match how {
            Back::Fault if !target.cpu_maps() => {
                for page in first..first + n {
                    self.buf.get(page, 3);
                }
            }
            Back::Request | Back::Fault => {
                target
                    .to_system(&self.buf, first, n)
                    .or_fail("MIGRATE_TO_SYS")?;
            }
            Back::Release => target.release().or_fail("RELEASE")?,
        }
        target.expect(&self.buf, first, n, 0)
    }

    /// Checks that only the place has changed.
    #[track_caller]
    fn expect(&self, before: &[State], on_device: bool, when: &str) -> Outcome {
        let entries_only = on_device && !self.target.cpu_maps();
        let mask = if self.falls_back() { !SCAN_HUGE } else { !0 };
        for (i, (now, then)) in self.states()?.iter().zip(before).enumerate() {
            let mut expected = *then;
            let mut found = *now;
            if entries_only {
                expected.scan = expected.scan & !SCAN_PRESENT | SCAN_SWAPPED;
            }
            if (expected.scan ^ found.scan) & SCAN_HUGE & !mask != 0 {
                // A huge entry has one flag, for its first page.
                expected.flags &= !ZDM_PAGE_ANON_EXCLUSIVE;
                found.flags &= !ZDM_PAGE_ANON_EXCLUSIVE;
            }
            expected.scan &= mask;
            found.scan &= mask;
            // remove_migration_pmd() sets the mark together with the dirty bit, so the mark may
            // appear, but never gets lost.
            if self.huge && found.soft_dirty && !expected.soft_dirty {
                expected.soft_dirty = true;
                expected.scan |= SCAN_SOFT_DIRTY;
            }
            check!(
                found == expected,
                "page {i} {when}: expected {expected:x?}, found {found:x?}"
            );
        }
        Ok(())
    }

    /// Checks that pages of the system have the flags that they had: on a list, and on the right one.
    #[track_caller]
    fn expect_folios(&self, before: &[u64], when: &str) -> Outcome {
        let found = folio_flags(&self.buf, self.first, self.n)?;
        check_eq!(found.len(), before.len(), "pages in system memory {when}");
        let other = found.iter().zip(before).position(|(a, b)| a != b);
        check!(
            other.is_none(),
            "flags in /proc/kpageflags of page {other:?} {when}: expected {:#x?}, found {:#x?}",
            other.map(|i| before[i]),
            other.map(|i| found[i])
        );
        Ok(())
    }

    /// Moves the pages back and forth, each time back in another way, and compares.
    #[track_caller]
    fn trips(&self, seed: u64) -> Outcome {
        let before = self.states()?;
        let folios = folio_flags(&self.buf, self.first, self.n)?;
        let counters = self.counters()?;
        let range = (self.first, self.n);
        for how in WAYS {
            self.send(seed)?;
            self.expect(&before, true, &format!("on the device, before {how:?}"))?;
            let when = format!("on the device, before {how:?}");
            self.watch
                .expect(&self.buf, range, &counters, self.except(), &when)?;
            self.bring_back(how)?;
            let when = format!("back by {how:?}");
            self.expect(&before, false, &when)?;
            self.watch
                .expect(&self.buf, range, &counters, self.except(), &when)?;
            self.expect_folios(&folios, &when)?;
            if self.huge && !self.falls_back() && how == Back::Fault {
                // Faults may bring pages back in pieces.
                check_eq!(proc::huge(&self.buf, self.first, self.n)?, self.n, "{when}");
            }
        }
        self.check(seed)
    }
}

/// Runs `body` with pages of both sizes.
fn each(ctx: &Ctx, node: usize, seed: u64, body: impl Fn(&Scene) -> Outcome) -> Outcome {
    for huge in SIZES {
        settled_in(ctx, node, |target, dir| {
            let s = Scene::new(target, dir, huge, seed)?;
            s.warm_up()?;
            body(&s)
        })?;
    }
    Ok(())
}

fn written(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3000, |s| s.trips(3000))
}

/// Pages that were not written since the marks were cleared.
fn clean(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3010, |s| {
        clear_soft_dirty()?;
        let marked = s.states()?.iter().filter(|p| p.soft_dirty).count();
        check_eq!(marked, 0, "soft-dirty pages after they were cleared");
        s.trips(3010)
    })
}

/// Every third page was written since: exactly those are marked. The marks are also cleared, and
/// set by a write, while the page is on the device.
fn some_written(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3020, |s| {
        if s.huge {
            // A huge entry has only one mark.
            clear_soft_dirty()?;
            s.buf.fill(s.first + 5, 1, 3020);
            let marked = s.states()?.iter().filter(|p| p.soft_dirty).count();
            check_eq!(marked, s.n, "marked pages of a huge page that was written");
            return s.trips(3020);
        }
        clear_soft_dirty()?;
        let marked = |s: &Scene| -> Outcome<Vec<usize>> {
            let states = s.states()?;
            Ok((0..s.n).filter(|i| states[*i].soft_dirty).collect())
        };
        let third: Vec<usize> = (0..s.n).step_by(3).collect();
        for i in &third {
            s.buf.fill(s.first + i, 1, 3020);
        }
        check_eq!(marked(s)?, third, "marked pages");
        s.trips(3020)?;
        check_eq!(marked(s)?, third, "marked pages in the end");
        s.send(3020)?;
        clear_soft_dirty()?;
        check_eq!(
            marked(s)?,
            Vec::new(),
            "marked pages, cleared on the device"
        );
        s.trips_from_device(3020)?;
        check_eq!(
            marked(s)?,
            Vec::new(),
            "marked pages, cleared on the device, back"
        );
        s.send(3020)?;
        // The CPU writes to the page where it is.
        s.buf.fill(s.first + 5, 1, 3020);
        check_eq!(marked(s)?, vec![5], "marked pages after a write");
        Ok(())
    })
}

impl Scene<'_> {
    #[track_caller]
    fn trips_from_device(&self, seed: u64) -> Outcome {
        self.bring_back(Back::Request)?;
        self.check(seed)
    }
}

/// Pages without the right to write, which is given back later.
fn read_only(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3030, |s| {
        s.buf.protect(s.first, s.n, libc::PROT_READ)?;
        s.trips(3030)?;
        s.send(3030)?;
        s.buf.protect(s.first, s.n, RW)?;
        s.bring_back(Back::Request)?;
        s.fill(3031);
        s.trips(3031)
    })
}

/// Pages that userfaultfd protects against writes stay protected until the process ends the
/// protection.
fn uffd_wp(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3040, |s| {
        let uffd = Uffd::new().or_fail("userfaultfd")?;
        uffd.register_writes(&s.buf, s.first, s.n)
            .or_fail("UFFDIO_REGISTER")?;
        s.trips(3040)?;
        uffd.protect(&s.buf, s.first, s.n, true)
            .or_fail("UFFDIO_WRITEPROTECT")?;
        let states = s.states()?;
        check!(
            states
                .iter()
                .all(|p| p.uffd_wp && p.flags & ZDM_PAGE_WRITE == 0),
            "write-protected pages: expected the mark and no right to write"
        );
        s.trips(3040)?;
        // Protect them, and end the protection, while they are on the device.
        s.send(3040)?;
        uffd.protect(&s.buf, s.first, s.n, false)
            .or_fail("UFFDIO_WRITEPROTECT")?;
        s.bring_back(Back::Request)?;
        let states = s.states()?;
        check!(
            states.iter().all(|p| !p.uffd_wp),
            "pages that were let go on the device: expected no mark"
        );
        s.fill(3041);
        s.check(3041)
    })
}

/// Pages shared with a child are not exclusive and not writable, and the child's counters are its
/// own.
fn shared(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3050, |s| {
        let child = Waiting::start(|| Ok(()), || s.check(3050))?;
        let states = s.states()?;
        let bad = ZDM_PAGE_ANON_EXCLUSIVE | ZDM_PAGE_WRITE;
        check!(
            states.iter().all(|p| p.flags & bad == 0),
            "pages shared with a child: expected neither exclusive nor writable"
        );
        s.trips(3050)?;
        // The child ends while the pages are on the device.
        s.send(3050)?;
        child.join()?;
        s.bring_back(Back::Request)?;
        s.fill(3051);
        s.check(3051)
    })
}

/// Locked memory stays locked wherever it is.
fn locked(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3060, |s| {
        // The kernel counts locked pages by their list, and device pages are on no list.
        let before = s.counters()?;
        s.buf.lock(s.first, s.n, true)?;
        let states = s.states()?;
        let folios = folio_flags(&s.buf, s.first, s.n)?;
        for how in WAYS {
            s.send(3060)?;
            s.expect(&states, true, "locked, on the device")?;
            s.bring_back(how)?;
            let when = format!("locked, back by {how:?}");
            s.expect(&states, false, &when)?;
            s.expect_folios(&folios, &when)?;
        }
        s.buf.lock(s.first, s.n, false)?;
        proc::drain_batches()?;
        s.watch
            .expect(&s.buf, (s.first, s.n), &before, s.except(), "after munlock")?;
        s.check(3060)
    })
}

/// A migration that fails leaves everything as it was.
fn failed(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3110, |s| {
        let before = s.states()?;
        let folios = folio_flags(&s.buf, s.first, s.n)?;
        let counters = s.counters()?;
        let count = if s.huge { s.n } else { 1 };
        proc::drain_batches()?;
        s.target.fail_alloc()?;
        let _ = s.target.to_device(&s.buf, s.first, count);
        let away = s.target.on_device(&s.buf, s.first, s.n)?;
        if away == 0 {
            s.expect(&before, false, "after a migration that failed")?;
            let range = (s.first, s.n);
            let when = "after a migration that failed";
            s.watch.expect(&s.buf, range, &counters, s.except(), when)?;
            s.expect_folios(&folios, when)?;
        } else {
            check!(
                s.huge,
                "pages that went without memory: expected 0, found {away}"
            );
        }
        s.check(3110)
    })
}

/// Pages that are pinned stay, and are what they were, also after the end of the pin.
fn pinned(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3115, |s| {
        let folios = folio_flags(&s.buf, s.first, s.n)?;
        let id = s
            .target
            .pin(&s.buf, s.first, s.n, ZDM_PIN_WRITE)
            .or_fail("ZDM_PIN")?;
        // The program keeps memory for the data, the first times.
        for _ in 0..3 {
            let _ = s.target.to_device(&s.buf, s.first, s.n);
        }
        let before = s.states()?;
        let counters = s.counters()?;
        for when in ["pinned", "pinned, once more"] {
            // None can go, which the result may or may not say.
            let _ = s.target.to_device(&s.buf, s.first, s.n);
            s.target.expect(&s.buf, s.first, s.n, 0)?;
            s.expect(&before, false, when)?;
            let range = (s.first, s.n);
            s.watch.expect(&s.buf, range, &counters, s.except(), when)?;
            s.expect_folios(&folios, when)?;
        }
        s.target.unpin(id, 0).or_fail("ZDM_UNPIN")?;
        s.expect_folios(&folios, "after the pin")?;
        s.send(3115)?;
        s.bring_back(Back::Request)?;
        s.expect_folios(&folios, "back, after the pin")?;
        s.check(3115)
    })
}

/// Pages that were unmapped on the device are not counted any more.
fn unmapped_counters(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, 3120, |s| {
        s.buf.advise(s.first, s.n, libc::MADV_DONTNEED)?;
        let empty = s.counters()?;
        for round in 0..3 {
            s.fill(3120);
            if s.huge && proc::huge(&s.buf, s.first, s.n)? != s.n {
                s.buf.advise(s.first, s.n, libc::MADV_COLLAPSE)?;
            }
            s.send(3120)?;
            match round {
                0 => s.buf.advise(s.first, s.n, libc::MADV_DONTNEED)?,
                1 => {
                    // Unmap in two steps; the first one splits a huge page.
                    s.buf.advise(s.first, s.n / 2, libc::MADV_DONTNEED)?;
                    s.buf
                        .advise(s.first + s.n / 2, s.n / 2, libc::MADV_DONTNEED)?;
                }
                _ => {
                    s.buf.advise(s.first + 1, 1, libc::MADV_DONTNEED)?;
                    s.bring_back(Back::Request)?;
                    s.buf.advise(s.first, s.n, libc::MADV_DONTNEED)?;
                }
            }
            let when = format!("with nothing there any more, round {round}");
            let range = (s.first, s.n);
            s.watch.expect(&s.buf, range, &empty, &["VmPTE"], &when)?;
        }
        Ok(())
    })
}
