// SPDX-License-Identifier: GPL-2.0

//! Breaking an invariant on purpose, so that the oracle itself can be tested.

#![forbid(unsafe_code)]

use super::{
    chunk::Chunk,
    device::Device,
    file::Opener, //
};
use crate::mm::{
    device_folio::FolioRef,
    migrate::{
        Copied,
        Migration, //
    },
    pagemap::Corruption,
    registration::PagemapRef,
    uapi::ZdmInject,
    PAGE_SIZE, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// What an opener has broken and not mended yet.
#[derive(Default)]
pub(super) struct Broken {
    held: Option<FolioRef>,
    counted: Option<u32>,
    stale: Option<(u32, Corruption)>,
}

/// Which end of a migration is to be held, if any, by whoever migrates next.
pub(super) struct Armed(Atomic<u32>);

impl Armed {
    const NONE: u32 = 0;
    const DESTINATION: u32 = 1;
    const SOURCE: u32 = 2;

    pub(super) fn new() -> Self {
        Self(Atomic::new(Self::NONE))
    }
}

/// What a migration holds on to, as was asked for.
pub(super) struct Held {
    wanted: u32,
    folio: Option<FolioRef>,
}

impl Held {
    /// Takes the first folio that `migration` has moved.
    pub(super) fn take_from(&mut self, migration: &Migration<'_, Copied>) {
        if self.wanted != Armed::NONE && self.folio.is_none() {
            self.folio = migration.hold_moved(self.wanted == Armed::SOURCE);
        }
    }
}

/// `enum zdm_inject_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ExtraGet,
    UndoGet,
    FreePageRef,
    UndoFreePageRef,
    HandOutTwice,
    DoubleFree,
    StaleMapping,
    StaleAnonExclusive,
    UndoStale,
    PagemapGet,
    PagemapPut,
    BornRef,
    SettledRef,
    SourceRef,
    Corrupt,
}

impl Kind {
    fn from_uapi(kind: u32) -> Result<Self> {
        Ok(match kind {
            1 => Self::ExtraGet,
            2 => Self::UndoGet,
            3 => Self::FreePageRef,
            4 => Self::UndoFreePageRef,
            5 => Self::HandOutTwice,
            6 => Self::DoubleFree,
            7 => Self::StaleMapping,
            8 => Self::StaleAnonExclusive,
            9 => Self::UndoStale,
            10 => Self::PagemapGet,
            11 => Self::PagemapPut,
            12 => Self::BornRef,
            13 => Self::SettledRef,
            14 => Self::SourceRef,
            15 => Self::Corrupt,
            _ => return Err(EINVAL),
        })
    }
}

/// In the place of a mapping: no object has this address.
const STALE_MAPPING: usize = 0x5a5a_5000;

impl Device {
    /// A free page.
    fn free_page(&self) -> Result<u32> {
        self.memory().pool.peek_free().ok_or(ENOSPC)
    }

    /// Does something to page `page` that can only be done to a free one, and says which page frame
    /// that is.
    fn with_free(
        &self,
        page: u32,
        f: impl FnOnce(&PagemapRef<Chunk>, usize) -> bool,
    ) -> Result<usize> {
        let located = self.locate(page);
        let (chunk, index) = located.ok_or(ENOENT)?;
        if f(&chunk, index) {
            Ok(chunk.first_pfn() + index)
        } else {
            Err(EBUSY)
        }
    }

    /// Spoils page `page`, which must be free.
    fn corrupt(&self, page: u32, fault: Corruption) -> Result<usize> {
        self.with_free(page, |chunk, index| chunk.corrupt_free_page(index, fault))
    }

    /// Spoils a free page.
    fn corrupt_free(&self, fault: Corruption) -> Result<(u32, usize)> {
        let page = self.free_page()?;
        Ok((page, self.corrupt(page, fault)?))
    }

    /// Takes or drops a reference of the first pagemap that nobody owns.
    fn leak_pagemap_ref(&self, leak: bool) -> Result<usize> {
        let chunk = self.chunks().next().ok_or(ENOENT)?;
        if !chunk.leak_ref(leak) {
            return Err(if leak { EBUSY } else { ENOENT });
        }
        Ok(chunk.first_pfn())
    }

    fn free_again(&self) -> Result<usize> {
        self.with_free(self.free_page()?, |chunk, index| chunk.free_again(index))
    }
}

impl Opener {
    /// Does what `inject` asks for and writes down which page was touched, 0 where that is not known
    /// yet. May sleep.
    pub(super) fn inject(&self, inject: &mut ZdmInject) -> Result {
        let kind = Kind::from_uapi(inject.kind)?;
        let address = usize::try_from(inject.addr).map_err(|_| EINVAL)?;
        if inject.reserved != 0 || address % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
        let device = self.device();
        let mut broken = self.broken().lock();
        let pfn = match kind {
            Kind::ExtraGet => {
                if broken.held.is_some() {
                    return Err(EBUSY);
                }
                let folio = self.mirror().get_device_folio(address)?;
                broken.held.insert(folio).pfn()
            }
            Kind::UndoGet => broken.held.take().ok_or(ENOENT)?.pfn(),
            Kind::FreePageRef => {
                if broken.counted.is_some() {
                    return Err(EBUSY);
                }
                let (page, pfn) = device.corrupt_free(Corruption::Refs(1))?;
                broken.counted = Some(page);
                pfn
            }
            Kind::UndoFreePageRef => {
                let page = broken.counted.take().ok_or(ENOENT)?;
                device.corrupt(page, Corruption::Refs(device.free_refs()))?
            }
            Kind::HandOutTwice => {
                let pfn = self.mirror().get_device_folio(address)?.pfn();
                let page = device.page_of_pfn(pfn).ok_or(ENOENT)?;
                device.memory().pool.hand_out_twice(page);
                pfn
            }
            Kind::DoubleFree => device.free_again()?,
            Kind::StaleMapping | Kind::StaleAnonExclusive => {
                if broken.stale.is_some() {
                    return Err(EBUSY);
                }
                let (fault, undo) = if kind == Kind::StaleMapping {
                    (
                        Corruption::Mapping(STALE_MAPPING),
                        Corruption::Mapping(0), //
                    )
                } else {
                    (
                        Corruption::AnonExclusive(true),
                        Corruption::AnonExclusive(false),
                    )
                };
                let (page, pfn) = device.corrupt_free(fault)?;
                broken.stale = Some((page, undo));
                pfn
            }
            Kind::UndoStale => {
                let (page, undo) = broken.stale.take().ok_or(ENOENT)?;
                device.corrupt(page, undo)?
            }
            Kind::PagemapGet => device.leak_pagemap_ref(true)?,
            Kind::PagemapPut => device.leak_pagemap_ref(false)?,
            Kind::BornRef => {
                device.spoil_next_memory();
                0
            }
            Kind::SettledRef | Kind::SourceRef => {
                if broken.held.is_some() {
                    return Err(EBUSY);
                }
                let end = if kind == Kind::SourceRef {
                    Armed::SOURCE
                } else {
                    Armed::DESTINATION
                };
                self.armed_end().0.store(end, Relaxed);
                0
            }
            Kind::Corrupt => {
                let folio = self.mirror().get_device_folio(address)?;
                folio.flip_bit();
                folio.pfn()
            }
        };
        inject.pfn = pfn as u64;
        Ok(())
    }

    /// What a migration that begins now is to hold on to.
    pub(super) fn armed(&self) -> Held {
        Held {
            wanted: self.armed_end().0.load(Relaxed),
            folio: None,
        }
    }

    /// Keeps what a migration holds until it is mended. May sleep; not with the mmap lock held.
    pub(super) fn keep(&self, held: Held) {
        if held.folio.is_some() {
            self.armed_end().0.store(Armed::NONE, Relaxed);
            self.broken().lock().held = held.folio;
        }
    }

    /// Mends what was broken, when the file is closed. What a pagemap has leaked stays leaked.
    pub(super) fn mend(&self) {
        let device = self.device();
        let mut broken = self.broken().lock();
        let counted = broken
            .counted
            .take()
            .map(|page| (page, Corruption::Refs(device.free_refs())));
        for (page, undo) in [counted, broken.stale.take()].into_iter().flatten() {
            if device.corrupt(page, undo).is_err() {
                pr_err!("page {} with an injected fault was taken meanwhile\n", page);
            }
        }
        broken.held = None;
    }
}

#[kunit_tests(zdmirror_inject)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_the_uapi() {
        assert_eq!(Kind::from_uapi(1), Ok(Kind::ExtraGet));
        assert_eq!(Kind::from_uapi(5), Ok(Kind::HandOutTwice));
        assert_eq!(Kind::from_uapi(15), Ok(Kind::Corrupt));
        assert_eq!(Kind::from_uapi(0), Err(EINVAL));
        assert_eq!(Kind::from_uapi(16), Err(EINVAL));
    }
}
