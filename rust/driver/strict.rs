// SPDX-License-Identifier: GPL-2.0

//! What the module parameter `strict` adds to an operation of a file: the device's page table is
//! compared with the CPU's before and after it, and mapping counts with page tables after it.

#![forbid(unsafe_code)]

use super::{
    client::Client,
    device::Device, //
};
use crate::{
    audit::{
        check_in_place,
        check_mapped,
        check_mirror,
        Violation, //
    },
    mm::{
        task::check_signals,
        walk::Picture, //
    }, //
};
use kernel::time::{
    delay::fsleep,
    Delta, //
};

/// Looks, a millisecond apart, before what another task may explain is taken for what stays.
const TRIES: usize = 50;

/// Folios whose mappings are counted after an operation. An audit counts those of all.
const FOLIOS: usize = 128;

impl Client {
    /// I12: the device's page table, as it is now. May sleep.
    pub(super) fn check_mirror(&self) {
        for _ in 0..TRIES {
            let mut passing = 0;
            let outcome = self.mirror().compare(|untruth| {
                if untruth.passes {
                    passing += 1;
                } else {
                    self.tell(check_mirror(&untruth));
                }
            });
            if outcome.is_err() || passing == 0 {
                return;
            }
            fsleep(Delta::from_millis(1));
        }
        // A killed task gets no verdict.
        let _ = self
            .mirror()
            .compare(|untruth| self.tell(check_mirror(&untruth)));
    }

    /// I13: the pages of `before` are as they were. May sleep.
    pub(super) fn check_in_place(&self, before: &Picture) {
        self.mirror().compare_picture(before, |index, then, now| {
            if let Some(violation) = check_in_place(index, then, now) {
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
    pub(super) fn check_mappings(&self) {
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
                    chunk.page(index).and_then(check_mapped)
                };
                let mut found = look();
                for _ in 0..TRIES {
                    if found.is_none() || check_signals().is_err() {
                        break;
                    }
                    fsleep(Delta::from_millis(1));
                    let again = look();
                    found = found.filter(|_| again == found);
                }
                chunk.ops().judge(index, found);
            }
        }
    }
}
