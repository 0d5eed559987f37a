// SPDX-License-Identifier: GPL-2.0

//! A device-dax with mapped folios, for tests that pin them.

use super::Setup;
use crate::check::Outcome;
use crate::memory::Buffer;
use crate::tests::counts::{Counts, MAPPED, pinned, pinned_large};

/// The number of mapped folios.
pub const FOLIOS: usize = 2;

/// A device-dax with some mapped folios, and the counts of each folio.
pub struct Mapped {
    pub buf: Buffer,
    pub setup: Setup,
    pub before: Counts,
    pub pages: usize,
}

impl Mapped {
    pub fn new(align: usize) -> Outcome<Self> {
        let setup = Setup::new(align)?;
        let pages = FOLIOS * setup.dax.step();
        let buf = setup.dax.map(pages)?;
        buf.fill(0, pages, 7);
        // Under the old rule there is one more reference.
        let idle = setup.idle_refs()?;
        let before = [idle, MAPPED[1], MAPPED[2]];
        setup.expect(0, FOLIOS, before, "mapped")?;
        Ok(Self {
            buf,
            setup,
            before,
            pages,
        })
    }

    /// The counts with a pin of each page.
    pub fn pinned(&self) -> Counts {
        match self.setup.dax.step() {
            1 => pinned(self.before, 1),
            step => pinned_large(self.before, step as i32),
        }
    }

    pub fn expect(&self, counts: Counts, when: &str) -> Outcome {
        self.setup.expect(0, FOLIOS, counts, when)
    }
}
