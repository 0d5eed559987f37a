// SPDX-License-Identifier: GPL-2.0

//! Breaking an invariant on purpose, so that the oracle itself can be tested.

#![forbid(unsafe_code)]

use super::file::Opener;
use crate::mm::{
    device_folio::DeviceFolioRef,
    uapi::ZdmInject,
    PAGE_SIZE, //
};
use kernel::prelude::*;

/// What an opener has broken and not mended yet.
#[derive(Default)]
pub(super) struct Broken {
    held: Option<DeviceFolioRef>,
    counted: Option<u32>,
}

/// `enum zdm_inject_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ExtraGet,
    UndoGet,
    FreePageRef,
    UndoFreePageRef,
    HandOutTwice,
}

impl Kind {
    fn from_uapi(kind: u32) -> Result<Self> {
        Ok(match kind {
            1 => Self::ExtraGet,
            2 => Self::UndoGet,
            3 => Self::FreePageRef,
            4 => Self::UndoFreePageRef,
            5 => Self::HandOutTwice,
            _ => return Err(EINVAL),
        })
    }
}

impl Opener {
    /// Does what `inject` asks for and writes down which page was touched. May sleep.
    pub(super) fn inject(&self, inject: &mut ZdmInject) -> Result {
        let kind = Kind::from_uapi(inject.kind)?;
        let address = usize::try_from(inject.addr).map_err(|_| EINVAL)?;
        if inject.reserved != 0 || address % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
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
                let page = self.device().memory().pool.peek_free().ok_or(ENOSPC)?;
                let pfn = self.set_free_page_refs(page, 1)?;
                broken.counted = Some(page);
                pfn
            }
            Kind::UndoFreePageRef => {
                let page = broken.counted.take().ok_or(ENOENT)?;
                self.set_free_page_refs(page, self.device().free_refs())?
            }
            Kind::HandOutTwice => {
                let pfn = self.mirror().get_device_folio(address)?.pfn();
                let page = self.device().page_of_pfn(pfn).ok_or(ENOENT)?;
                self.device().memory().pool.hand_out_twice(page);
                pfn
            }
        };
        inject.pfn = pfn as u64;
        Ok(())
    }

    fn set_free_page_refs(&self, page: u32, refs: i32) -> Result<usize> {
        let located = self.device().locate(page);
        let (chunk, index) = located.ok_or(ENOENT)?;
        if chunk.corrupt_free_page(index, refs) {
            Ok(chunk.first_pfn() + index)
        } else {
            Err(EBUSY)
        }
    }

    /// Mends what was broken, when the file is closed.
    pub(super) fn mend(&self) {
        let mut broken = self.broken().lock();
        if let Some(page) = broken.counted.take() {
            if self
                .set_free_page_refs(page, self.device().free_refs())
                .is_err()
            {
                pr_err!(
                    "page {} with an injected reference was taken meanwhile\n",
                    page
                );
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
        assert_eq!(Kind::from_uapi(0), Err(EINVAL));
        assert_eq!(Kind::from_uapi(6), Err(EINVAL));
    }
}
