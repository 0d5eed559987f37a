// SPDX-License-Identifier: GPL-2.0

//! Breaks invariants on purpose, so that the oracle itself can be tested.

#![forbid(unsafe_code)]

use super::{
    injection::End,
    open_file::Client, //
};
use crate::{
    mm::{
        oracle::extra_mapping::ExtraMapping,
        pagemap::audit::Corruption,
        user::range::PageRange,
        PAGE_SIZE, //
    },
    uapi::ZdmInject, //
};
use kernel::prelude::*;

/// Milliseconds by which an eviction can be slowed down, at most.
const SLOWEST: u16 = 1000;

/// `enum zdm_inject_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ExtraGet,
    UndoGet,
    FreePageRef,
    UndoFreePageRef,
    AllocTwice,
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
    ExtraMapping,
    UndoMapping,
    Slow,
    Hold,
    IsHeld,
    LetGo,
    GoOn,
}

impl Kind {
    fn from_uapi(kind: u32) -> Result<Self> {
        Ok(match kind {
            1 => Self::ExtraGet,
            2 => Self::UndoGet,
            3 => Self::FreePageRef,
            4 => Self::UndoFreePageRef,
            5 => Self::AllocTwice,
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
            16 => Self::ExtraMapping,
            17 => Self::UndoMapping,
            18 => Self::Slow,
            19 => Self::Hold,
            20 => Self::IsHeld,
            21 => Self::LetGo,
            22 => Self::GoOn,
            _ => return Err(EINVAL),
        })
    }
}

impl Client {
    /// Executes `inject`, and stores the number of the changed page in it, or 0 if that is not
    /// known yet. May sleep.
    pub(in crate::driver) fn inject(&self, inject: &mut ZdmInject) -> Result {
        let kind = Kind::from_uapi(inject.kind)?;
        let address = usize::try_from(inject.addr).map_err(|_| EINVAL)?;
        let is_place = kind != Kind::Slow;
        if inject.reserved != 0 || is_place && address % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
        let device = self.device();
        let mut broken = self.injection().broken();
        let pfn = match kind {
            Kind::ExtraGet => {
                if broken.held.is_some() {
                    return Err(EBUSY);
                }
                let folio = self
                    .mirror()
                    .get_device_folio(PageRange::new(address, 1)?)?;
                broken.held.insert(folio).pfn()
            }
            Kind::UndoGet => broken.held.take().ok_or(ENOENT)?.pfn(),
            Kind::FreePageRef => {
                if broken.counted.is_some() {
                    return Err(EBUSY);
                }
                let (page, pfn) = device.corrupt_free(Corruption::Referenced(true))?;
                broken.counted = Some(page);
                pfn
            }
            Kind::UndoFreePageRef => {
                let page = broken.counted.take().ok_or(ENOENT)?;
                device.corrupt(page, Corruption::Referenced(device.free_refs() != 0))?
            }
            Kind::AllocTwice => {
                let pfn = self
                    .mirror()
                    .get_device_folio(PageRange::new(address, 1)?)?
                    .pfn();
                let page = device.page_of_pfn(pfn).ok_or(ENOENT)?;
                device.memory().allocator.take_twice(page);
                pfn
            }
            Kind::DoubleFree => device.free_again()?,
            Kind::StaleMapping | Kind::StaleAnonExclusive => {
                if broken.stale.is_some() {
                    return Err(EBUSY);
                }
                let (fault, undo) = if kind == Kind::StaleMapping {
                    (
                        Corruption::Mapping(true),
                        Corruption::Mapping(false), //
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
                    End::Source
                } else {
                    End::Destination
                };
                broken.arm(end);
                0
            }
            Kind::Corrupt => {
                let folio = self
                    .mirror()
                    .get_device_folio(PageRange::new(address, 1)?)?;
                folio.flip_bit()?;
                folio.pfn()
            }
            Kind::ExtraMapping => {
                if broken.mapped.is_some() {
                    return Err(EBUSY);
                }
                let mapped = ExtraMapping::new(address / PAGE_SIZE)?;
                broken.mapped.insert(mapped).pfn()
            }
            Kind::UndoMapping => broken.mapped.take().ok_or(ENOENT)?.pfn(),
            Kind::Slow => {
                let ms = u16::try_from(address).map_err(|_| EINVAL)?;
                if ms > SLOWEST {
                    return Err(EINVAL);
                }
                device.slow_down(ms);
                broken.slow = true;
                0
            }
            Kind::Hold => {
                self.mirror().hold_next(address)?;
                0
            }
            Kind::IsHeld => usize::from(self.mirror().is_held()),
            Kind::LetGo => usize::from(self.mirror().let_go()),
            Kind::GoOn => {
                self.mirror().go_on(address)?;
                0
            }
        };
        inject.pfn = pfn as u64;
        Ok(())
    }
}

#[kunit_tests(zdmirror_inject)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_the_uapi() {
        assert_eq!(Kind::from_uapi(1), Ok(Kind::ExtraGet));
        assert_eq!(Kind::from_uapi(5), Ok(Kind::AllocTwice));
        assert_eq!(Kind::from_uapi(15), Ok(Kind::Corrupt));
        assert_eq!(Kind::from_uapi(17), Ok(Kind::UndoMapping));
        assert_eq!(Kind::from_uapi(18), Ok(Kind::Slow));
        assert_eq!(Kind::from_uapi(0), Err(EINVAL));
        assert_eq!(Kind::from_uapi(19), Ok(Kind::Hold));
        assert_eq!(Kind::from_uapi(21), Ok(Kind::LetGo));
        assert_eq!(Kind::from_uapi(22), Ok(Kind::GoOn));
        assert_eq!(Kind::from_uapi(23), Err(EINVAL));
    }
}
