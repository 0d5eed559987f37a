// SPDX-License-Identifier: GPL-2.0

//! What user space can see of two copies.

use super::{Copy, Pair};
use crate::check::{OrFail, Outcome};
use crate::files;
use crate::pagemap::{SCAN_HUGE, SCAN_PRESENT, SCAN_SWAPPED};
use crate::pagestate::{State, views};
use crate::uapi::*;
use crate::{check, check_eq, proc};

/// Fields of smaps that do not depend on the place of pages.
const SMAPS: &[&str] = &["Anonymous", "Locked", "Pss", "Rss", "Swap", "SwapPss"];

pub(super) fn exists(state: &State) -> bool {
    state.scan & (SCAN_PRESENT | SCAN_SWAPPED) != 0
}

impl Pair<'_> {
    pub(super) fn states(&self, copy: &Copy) -> Outcome<Vec<State>> {
        views(self.target, &copy.buf, copy.first, self.n)
    }

    /// Compares everything but the data, which would bring pages back.
    #[track_caller]
    pub(super) fn compare(&mut self) -> Outcome {
        let (away, home) = (self.states(&self.away)?, self.states(&self.home)?);
        for page in 0..self.n {
            self.compare_page(page, &away[page], &home[page])?;
        }
        self.compare_sums()?;
        if !self.swap {
            let resident = |copy: &Copy| files::mincore(&copy.buf, copy.first, self.n);
            let (away, home) = (resident(&self.away), resident(&self.home));
            check_eq!(
                away.or_fail("mincore")?,
                home.or_fail("mincore")?,
                "pages that mincore() reports"
            );
        }
        // The data of one page at a time.
        let page = self.random.below(self.n);
        if self.random.below(2) == 0 && self.rights[page] & libc::PROT_READ != 0 {
            self.compare_data(page, 1)?;
        }
        for device in [self.target, &self.other] {
            let (audit, records) = device.audit()?;
            check_eq!(audit.total, 0, "violations, of which {records:x?}");
        }
        Ok(())
    }

    #[track_caller]
    fn compare_page(&self, page: usize, away: &State, home: &State) -> Outcome {
        let same = exists(away) == exists(home)
            && away.uffd_wp == home.uffd_wp
            && away.soft_dirty == home.soft_dirty;
        check!(
            same,
            "page {page}: existence, soft-dirty and userfaultfd marks: expected the same, found \
             {away:x?} and, always at home, {home:x?}"
        );
        let writable = |s: &State| s.flags & ZDM_PAGE_WRITE != 0;
        let may = self.rights[page] & libc::PROT_WRITE != 0;
        for (whose, state) in [("moved", away), ("unmoved", home)] {
            check!(
                !writable(state) || (may && !state.uffd_wp),
                "page {page}: the {whose} copy: expected no right to write, found {state:x?}"
            );
        }
        let there = |s: &State| s.flags & ZDM_PAGE_THERE != 0;
        if self.swap || !there(away) || !there(home) {
            return Ok(());
        }
        // A change of rights lets more of what is present be written without a fault.
        check!(
            !writable(away) || writable(home),
            "page {page}: right to write: expected none, as the copy at home, found {away:x?} and \
             {home:x?}"
        );
        // A huge entry has one flag, for its first page.
        let alike = (away.scan ^ home.scan) & SCAN_HUGE == 0;
        let exclusive = if alike { 0 } else { ZDM_PAGE_ANON_EXCLUSIVE };
        let rest = |s: &State| s.flags & !(ZDM_PAGE_WRITE | exclusive);
        check!(
            rest(away) == rest(home),
            "page {page}: flags: expected the same, found {away:x?} and, always at home, {home:x?}"
        );
        Ok(())
    }

    #[track_caller]
    fn compare_sums(&self) -> Outcome {
        let read = |copy: &Copy| -> Outcome<Vec<u64>> {
            let get = |name: &&str| proc::smaps(&copy.buf, copy.first, self.n, name);
            SMAPS.iter().map(get).collect()
        };
        let (mut away, mut home) = (read(&self.away)?, read(&self.home)?);
        if self.swap {
            for list in [&mut away, &mut home] {
                // Pages of devices are not swapped out.
                *list = vec![list[2] + list[5], list[3] + list[4]];
            }
        }
        check_eq!(
            away,
            home,
            "{SMAPS:?} in smaps, of the moved copy and the other"
        );
        Ok(())
    }

    /// Compares the data of pages that can be read.
    #[track_caller]
    pub(super) fn compare_data(&self, first: usize, n: usize) -> Outcome {
        for page in first..first + n {
            let of = |copy: &Copy| copy.buf.words(copy.first + page);
            let (away, home) = (of(&self.away), of(&self.home));
            if let Some(word) = away.iter().zip(&home).position(|(a, b)| a != b) {
                check!(
                    away == home,
                    "word {word} of page {page}: expected {:#x}, found {:#x}",
                    home[word],
                    away[word]
                );
            }
        }
        Ok(())
    }

    /// Compares the data of all pages.
    #[track_caller]
    pub(super) fn compare_all(&self) -> Outcome {
        for copy in [&self.away, &self.home] {
            copy.buf.protect(copy.first, self.n, super::RW)?;
        }
        self.compare_data(0, self.n)
    }
}
