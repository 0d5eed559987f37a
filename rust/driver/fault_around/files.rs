// SPDX-License-Identifier: GPL-2.0

//! Fault-around: a CPU fault on device memory may bring back pages around its own.
//!
//! Each open file sets the largest number of pages, and only pages that the same file has moved to
//! the device come back. The default is off: a fault then brings back one folio, as with the kernel
//! tree's own driver.

#![forbid(unsafe_code)]

use super::{
    heads::{
        Heads,
        Turn, //
    },
    streams::{
        Most,
        Place,
        Plan,
        Streams, //
    },
};
use crate::{
    driver::devmem::ClientId,
    mm::{
        pagemap::fault::AccessOrder,
        sync::once::{
            read_once,
            write_once, //
        },
    },
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    xarray::{
        AllocKind,
        XArray, //
    }, //
};

/// A file with fault-around on.
struct File {
    most: Most,
    streams: Streams,
}

/// The files of a device.
#[pin_data]
pub(in crate::driver) struct FaultAround {
    /// The files with fault-around on, by the numbers of the clients. Nothing sleeps or waits for
    /// another lock under the array's lock.
    #[pin]
    files: XArray<KBox<File>>,
    /// Whether there ever was such a file. A fault checks this first.
    used: Atomic<u32>,
    /// The places where the next faults may continue a stream.
    heads: Heads,
}

impl FaultAround {
    /// May sleep.
    pub(in crate::driver) fn new() -> Result<impl PinInit<Self>> {
        let heads = Heads::new()?;
        Ok(pin_init!(Self {
            files <- XArray::new(AllocKind::Alloc),
            used: Atomic::new(0),
            heads,
        }))
    }

    /// Sets what the faults on the pages of `client` may bring, and returns what that was before.
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(in crate::driver) fn allow(&self, client: ClientId, most: Most) -> Result<Most> {
        let index = client.number() as usize;
        if most == Most::ONE {
            return Ok(self.forget(client));
        }
        if let Some(file) = self.files.lock().get_mut(index) {
            return Ok(core::mem::replace(&mut file.most, most));
        }
        let file = KBox::new(
            File {
                most,
                streams: Streams::new(),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let old = self.files.lock().store(index, file, GFP_KERNEL_ACCOUNT)?;
        self.used.store(1, Relaxed);
        Ok(old.map_or(Most::ONE, |file| file.most))
    }

    /// Switches fault-around off for `client`. Returns the previous setting.
    pub(in crate::driver) fn forget(&self, client: ClientId) -> Most {
        if !self.is_used() {
            return Most::ONE;
        }
        self.heads.forget(client.number());
        // The file is freed without the lock.
        let old = self.files.lock().remove(client.number() as usize);
        old.map_or(Most::ONE, |file| file.most)
    }

    /// Whether any file ever had fault-around on.
    pub(in crate::driver) fn is_used(&self) -> bool {
        read_once(&self.used) != 0
    }

    /// Whether a fault at `address` of the address space `mm` on a page of `client` is one that may bring back
    /// other pages, as far as its place and the advice for its area say.
    pub(in crate::driver) fn turn(
        &self,
        client: u32,
        mm: usize,
        address: usize,
        order: AccessOrder,
    ) -> Option<Turn> {
        match order {
            AccessOrder::Random => None,
            AccessOrder::Sequential => self.heads.visit(client, mm, address, true),
            AccessOrder::Unknown => self.heads.visit(client, mm, address, false),
        }
    }

    /// Plans the window of the fault of `turn`, at `place`, on a page of `client`; `None` if fault-around is
    /// off. `used` counts the pages of a range that the CPU has accessed; it must not sleep.
    pub(in crate::driver) fn plan(
        &self,
        client: u32,
        turn: Turn,
        place: &Place,
        used: impl FnOnce(core::ops::Range<usize>) -> usize,
    ) -> Option<Plan> {
        let mut files = self.files.lock();
        let file = files.get_mut(client as usize)?;
        let most = file.most.pages();
        let plan = file.streams.plan(place, most, turn.near, used);
        self.heads.moved(turn, client, place.mm, &plan.window);
        Some(plan)
    }

    /// Records that the window of `plan` has brought back `pages` pages besides that of the fault.
    pub(in crate::driver) fn brought(&self, client: u32, plan: &Plan, pages: usize) {
        if let Some(file) = self.files.lock().get_mut(client as usize) {
            file.streams.brought(plan, pages);
        }
    }
}

/// The client that last moved each page of a chunk to the device.
pub(in crate::driver) struct Movers(KVVec<Atomic<u32>>);

impl Movers {
    /// No client has this number.
    const NOBODY: u32 = u32::MAX;

    /// Makes the table of a chunk of `pages` pages. May sleep.
    pub(in crate::driver) fn new(pages: usize) -> Result<Self> {
        let mut movers = KVVec::with_capacity(pages, GFP_KERNEL)?;
        for _ in 0..pages {
            movers.push(Atomic::new(Self::NOBODY), GFP_KERNEL)?;
        }
        Ok(Self(movers))
    }

    /// Records that the folio of `order` at page `index` was allocated for `client`, for each of
    /// its pages, because a part of it may become a folio of its own.
    pub(in crate::driver) fn note(&self, index: usize, order: u32, client: ClientId) {
        if let Some(movers) = self.0.get(index..index + (1 << order)) {
            for mover in movers {
                write_once(mover, client.number());
            }
        }
    }

    /// The client for which page `index`, which is in use, was allocated; `None` beyond the chunk.
    pub(in crate::driver) fn of(&self, index: usize) -> Option<u32> {
        self.0.get(index).map(read_once)
    }
}

#[kunit_tests(zdmirror_fault_around)]
mod tests {
    use super::*;
    use crate::driver::{
        devmem::Allocator,
        fault_around::streams::MAX_WINDOW, //
    };
    use core::num::NonZeroUsize;

    fn clients() -> Result<[ClientId; 2]> {
        let mut allocator = Allocator::new(NonZeroUsize::new(MAX_WINDOW).ok_or(EINVAL)?)?;
        Ok([allocator.add_client()?, allocator.add_client()?])
    }

    #[test]
    fn each_file_has_its_own() -> Result {
        let around = KBox::pin_init(FaultAround::new()?, GFP_KERNEL)?;
        let [a, b] = clients()?;
        let place = Place {
            mm: 1,
            address: 0x10_0000,
            limits: 0..0x20_0000,
            order: AccessOrder::Sequential,
        };
        let pages = |client: ClientId| {
            let client = client.number();
            let turn = around.turn(client, place.mm, place.address, place.order)?;
            let plan = around.plan(client, turn, &place, |_| 0);
            plan.map(|plan| plan.pages())
        };
        assert!(!around.is_used());
        assert_eq!(around.forget(a), Most::ONE);
        assert_eq!(around.allow(a, Most::new(32)?)?, Most::ONE);
        assert!(around.is_used());
        assert_eq!((pages(a), pages(b)), (Some(32), None));
        assert_eq!(around.allow(a, Most::new(8)?)?, Most::new(32)?);
        assert_eq!(around.allow(b, Most::new(64)?)?, Most::ONE);
        assert_eq!((pages(a), pages(b)), (Some(8), Some(64)));
        assert_eq!(around.allow(b, Most::ONE)?, Most::new(64)?);
        assert_eq!((pages(a), pages(b)), (Some(8), None));
        assert_eq!(around.forget(a), Most::new(8)?);
        assert_eq!(pages(a), None);
        Ok(())
    }

    #[test]
    fn movers_are_known_by_page() -> Result {
        let movers = Movers::new(1024)?;
        let [a, b] = clients()?;
        movers.note(512, 9, a);
        movers.note(3, 0, b);
        // Pages beyond the chunk are ignored.
        movers.note(1024, 0, b);
        for (index, mover) in [
            (2, Some(Movers::NOBODY)),
            (3, Some(b.number())),
            (4, Some(Movers::NOBODY)),
            (512, Some(a.number())),
            (1023, Some(a.number())),
            (1024, None),
        ] {
            assert_eq!(movers.of(index), mover);
        }
        Ok(())
    }
}
