// SPDX-License-Identifier: GPL-2.0

//! The additional checks of the module parameter `strict` around an operation of a file: the
//! device's page table is compared with the CPU's before and after it, and mapping counts with page
//! tables after it.

#![forbid(unsafe_code)]

use super::open_file::Client;
use crate::{
    audit::{
        check_in_place,
        check_mapped,
        check_mirror,
        check_used_whole,
        Violation, //
    },
    driver::device::dmirror_device::Device,
    mm::{
        oracle::walk::{
            Passing,
            Picture,
            Untruth, //
        },
        sync::task::check_signals, //
    },
};
use kernel::time::{
    delay::fsleep,
    Delta, //
};

/// Looks, a millisecond apart, before what another task may explain is taken for what stays.
const TRIES: usize = 50;

/// The number of folios whose mappings are counted after an operation. An audit counts those of all
/// folios.
const FOLIOS: usize = 128;

/// Suspects of one look; more are left to the next operation.
const SUSPECTS: usize = 8;

/// Untruths that another task may explain.
#[derive(Default)]
struct Suspects {
    found: [Option<Untruth>; SUSPECTS],
}

impl Suspects {
    fn add(&mut self, untruth: Untruth) {
        if let Some(slot) = self.found.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(untruth);
        }
    }

    fn iter(&self) -> impl Iterator<Item = Untruth> + '_ {
        self.found.iter().flatten().copied()
    }

    /// The one for page number `index`.
    fn at(&self, index: usize) -> Option<Untruth> {
        self.iter().find(|untruth| untruth.index == index)
    }

    fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }
}

impl Client {
    /// I12: the device's page table, as it is now. What another task may explain is looked at again, until
    /// it has gone or become a violation. May sleep.
    pub(in crate::driver) fn check_mirror(&self) {
        let mut suspects = Suspects::default();
        let outcome = self.mirror().compare(|untruth| match untruth.passing {
            Passing::Nothing => self.tell(check_mirror(&untruth)),
            _ => suspects.add(untruth),
        });
        if outcome.is_err() {
            return;
        }
        for _ in 0..TRIES {
            if suspects.is_empty() {
                return;
            }
            fsleep(Delta::from_millis(1));
            let mut left = Suspects::default();
            let outcome = self.mirror().compare(|untruth| {
                let Some(suspect) = suspects.at(untruth.index) else {
                    return;
                };
                if untruth.passing == Passing::Nothing {
                    self.tell(check_mirror(&untruth));
                } else if suspect == untruth {
                    left.add(untruth);
                }
            });
            // A killed task gets no verdict.
            if outcome.is_err() {
                return;
            }
            let healed = suspects.iter().count().saturating_sub(left.iter().count());
            self.device().core.auditor.heal(healed as u64);
            suspects = left;
        }
        // A migration may wait for memory for as long as it likes.
        for untruth in suspects.iter() {
            if untruth.passing == Passing::Exclusive {
                self.tell(check_mirror(&untruth));
            }
        }
    }

    /// I13: the pages of `before` are as they were. May sleep.
    pub(in crate::driver) fn check_in_place(&self, before: &Picture) {
        self.mirror().compare_picture(before, |change| {
            if let Some(violation) = check_in_place(&change) {
                self.tell(violation);
            }
        });
    }

    fn tell(&self, violation: Violation) {
        self.device().core.auditor.judge(Some(violation));
    }
}

impl Device {
    /// I11, of some of the folios in use. May sleep, where something is wrong.
    pub(in crate::driver) fn check_mappings(&self) {
        let mut left = FOLIOS;
        for chunk in self.chunks() {
            if chunk.used() == 0 {
                continue;
            }
            for index in 0..chunk.pages() {
                if chunk.order_in_use(index).is_none() {
                    continue;
                }
                let Some(rest) = left.checked_sub(1) else {
                    return;
                };
                left = rest;
                let look = || {
                    chunk.order_in_use(index)?;
                    let page = chunk.page(index)?;
                    check_mapped(page).or_else(|| check_used_whole(page))
                };
                let mut found = look();
                for _ in 0..TRIES {
                    if found.is_none() || check_signals().is_err() {
                        break;
                    }
                    fsleep(Delta::from_millis(1));
                    let again = look();
                    found = found.filter(|_| again == found);
                    if found.is_none() {
                        chunk.ops().heal(1);
                    }
                }
                chunk.ops().judge(index, found);
            }
        }
    }
}
