// SPDX-License-Identifier: GPL-2.0

//! A device-dax with mapped folios, for tests that pin them.

use std::time::Duration;

use super::Setup;
use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::memory::Buffer;
use crate::tests::counts::{Counts, IDLE, MAPPED, Waiting, pinned, pinned_large};

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

    /// Checks that the unbind of the device-dax waits while `pin` holds the folios, and ends after
    /// `unpin`. Skips the test on a kernel with the old rule.
    ///
    /// The child that unbinds is made first, so that it has no copy of the file that holds the pages.
    pub fn unbind_waits<T>(
        self,
        pin: impl FnOnce(&Buffer, usize) -> Outcome<T>,
        unpin: impl FnOnce(&T, &Buffer, usize) -> Outcome,
    ) -> Outcome {
        let Self {
            buf,
            setup,
            before,
            pages,
        } = self;
        if before != MAPPED {
            return Err(Fail::Skip(
                "this kernel's device-dax does not wait for the holders of pages".into(),
            ));
        }
        let unbinding = Waiting::start(|| Ok(()), || setup.dax.unbind().or_fail("unbind"))?;
        let holder = pin(&buf, pages)?;
        let unbinding = unbinding.release()?;
        std::thread::sleep(Duration::from_millis(500));
        check!(
            unbinding.is_running()?,
            "unbind of a device-dax with held pages: expected it to wait, found its end"
        );
        unpin(&holder, &buf, pages)?;
        unbinding.join()?;
        drop(buf);
        setup.dax.bind().or_fail("bind")?;
        setup.expect(0, FOLIOS, IDLE, "after unbind and bind")
    }
}
