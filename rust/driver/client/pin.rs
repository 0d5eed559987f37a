// SPDX-License-Identifier: GPL-2.0

//! `ZDM_PIN` and `ZDM_UNPIN`.

#![forbid(unsafe_code)]

use super::{
    open_file::Client,
    pins::{
        Pinned,
        Room, //
    }, //
};
use crate::mm::user::{
    pin::PinRequest,
    range::PageRange, //
};
use kernel::prelude::*;

impl Client {
    /// Holds pages of the current task's address space, whichever one the file mirrors, and
    /// returns the number to let them go by. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOSPC` for more than a file may hold, `ENOMEM` for more than `RLIMIT_MEMLOCK`, else as
    /// [`PinnedPages::new`](crate::mm::user::pin::PinnedPages::new).
    pub(in crate::driver) fn pin(&self, range: PageRange, request: PinRequest) -> Result<u32> {
        let pages = range.pages();
        if self.pins().lock().needs_room() {
            // Under the lock, the other tasks of the file would wait for memory, too.
            let room = Room::new()?;
            let left = self.pins().lock().take_room(room);
            drop(left);
        }
        self.pins().lock().promise(pages)?;
        // Faults are handled here, so no lock is held.
        match Pinned::new(range, request) {
            Ok(held) => {
                let added = self.pins().lock().add(pages, held);
                // If there is no place, the pages are released here, without the lock.
                added.map_err(|_| ENOSPC)
            }
            Err(err) => {
                self.pins().lock().give_up(pages);
                Err(err)
            }
        }
    }

    /// Lets go of pages; `dirty` says that they were written to. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT` when the file holds nothing of that number.
    pub(in crate::driver) fn unpin(&self, id: u32, dirty: bool) -> Result {
        let held = self.pins().lock().remove(id);
        let mut held = held.ok_or(ENOENT)?;
        if dirty {
            held.mark_dirty();
        }
        Ok(())
    }
}
