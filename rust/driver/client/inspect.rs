// SPDX-License-Identifier: GPL-2.0

//! Describes pages for `ZDM_INSPECT`.

#![forbid(unsafe_code)]

use super::open_file::Client;
use crate::{
    mm::{
        hmm::{
            inspect::{
                inspect_pfns,
                Ownership,
                PageFacts, //
            },
            snapshot::{
                MapSize,
                Seen, //
            },
        },
        region::owner::PgmapOwner,
        user::range::PageRange, //
    },
    uapi::{
        self,
        ZdmPage, //
    },
};
use core::ops::Range;
use kernel::{
    prelude::*,
    uaccess::UserSliceWriter, //
};

/// Pages that are described at a time.
const BATCH: usize = 128;

impl Client {
    /// Describes the pages of `range` of the mirrored process. May sleep.
    ///
    /// # Errors
    ///
    /// As [`HmmMirror::snapshot`](crate::mm::hmm::mirror::HmmMirror::snapshot), and `EFAULT` where it
    /// cannot be written to.
    pub(in crate::driver) fn inspect(&self, range: PageRange, to: UserSliceWriter) -> Result {
        let show_pfns = uapi::is_admin();
        in_batches(range.pages(), to, |first, batch| {
            let range = range.skip(first).ok_or(EINVAL)?.first(batch.len());
            self.mirror().inspect_places(range, batch, page_seen)?;
            if !show_pfns {
                batch.iter_mut().for_each(|page| page.pfn = 0);
            }
            Ok(())
        })
    }
}

/// Describes the page frames of `frames`; `owner` is the caller's. May sleep.
///
/// # Errors
///
/// `EINTR` for a task that was killed, `EFAULT` where it cannot be written to, `ENOMEM`.
pub(in crate::driver) fn describe_frames(
    frames: Range<usize>,
    owner: &PgmapOwner,
    to: UserSliceWriter,
) -> Result {
    in_batches(frames.len(), to, |first, batch| {
        inspect_pfns(frames.start + first, batch, owner, frame)
    })
}

/// Calls `look` for pages `0..pages` in batches, with the number of the batch's first page and a
/// buffer, and copies the buffer to user space.
fn in_batches(
    pages: usize,
    mut to: UserSliceWriter,
    look: impl Fn(usize, &mut [ZdmPage]) -> Result,
) -> Result {
    let mut room = KVec::new();
    for _ in 0..pages.min(BATCH) {
        room.push(ZdmPage::default(), GFP_KERNEL)?;
    }
    for first in (0..pages).step_by(BATCH) {
        let batch = &mut room[..BATCH.min(pages - first)];
        look(first, batch)?;
        for page in batch.iter() {
            to.write(page)?;
        }
    }
    Ok(())
}

/// Describes the page at an address, which names another place if it is `misplaced`.
fn page_seen(seen: Seen, facts: Option<PageFacts>, misplaced: bool) -> ZdmPage {
    let (Seen::Page { write, size, .. }, Some(facts)) = (seen, facts) else {
        return ZdmPage {
            flags: if seen == Seen::Error {
                uapi::ZDM_PAGE_ERROR
            } else {
                0
            },
            ..Default::default()
        };
    };
    let mut page = describe(facts);
    if write {
        page.flags |= uapi::ZDM_PAGE_WRITE;
    }
    if misplaced {
        page.flags |= uapi::ZDM_PAGE_MISPLACED;
    }
    page.flags |= match size {
        MapSize::Base => 0,
        MapSize::Pmd => uapi::ZDM_PAGE_PMD,
        MapSize::Pud => uapi::ZDM_PAGE_PUD,
    };
    page
}

/// Describes a page frame.
fn frame(facts: Option<PageFacts>) -> ZdmPage {
    facts.map(describe).unwrap_or_default()
}

fn describe(facts: PageFacts) -> ZdmPage {
    let bits = facts.bits;
    let flags = [
        (true, uapi::ZDM_PAGE_THERE),
        (bits.is_locked(), uapi::ZDM_PAGE_LOCKED),
        (bits.is_lru(), uapi::ZDM_PAGE_LRU),
        (bits.is_anon(), uapi::ZDM_PAGE_ANON),
        (bits.is_charged(), uapi::ZDM_PAGE_CHARGED),
        (bits.has_mapping(), uapi::ZDM_PAGE_MAPPING),
        (facts.anon_exclusive, uapi::ZDM_PAGE_ANON_EXCLUSIVE),
        (facts.zero, uapi::ZDM_PAGE_ZERO),
    ];
    ZdmPage {
        pfn: facts.pfn as u64,
        refs: facts.refs,
        mapcount: facts.mapcount,
        pins: facts.pins,
        order: facts.order,
        type_: facts.memory_type,
        owner: match facts.ownership {
            Ownership::Nobody => uapi::ZDM_OWNER_NONE,
            Ownership::Local => uapi::ZDM_OWNER_LOCAL,
            Ownership::Remote => uapi::ZDM_OWNER_REMOTE,
        },
        flags: flags
            .iter()
            .filter(|(is_set, _)| *is_set)
            .fold(0, |flags, (_, flag)| flags | flag),
        // CAST: A folio has fewer pages.
        index: facts.index as u32,
    }
}

#[kunit_tests(zdmirror_driver_inspect)]
mod tests {
    use super::*;
    use crate::{
        driver::Device,
        mm::{
            hmm::mapped::Memory,
            kunit::support::{
                mmap_anon,
                this_module, //
            },
            region::owner::PgmapOwner,
            PAGE_SIZE, //
        },
    };
    use kernel::{
        sizes::SZ_2M,
        uaccess::{
            UserPtr,
            UserSlice, //
        },
    };

    #[test]
    fn flags_of_the_uapi() {
        let facts = PageFacts {
            pfn: 0x12345,
            refs: 3,
            mapcount: 2,
            pins: 1,
            order: 9,
            index: 511,
            memory_type: uapi::MEMORY_DEVICE_GENERIC,
            ownership: Ownership::Remote,
            bits: Default::default(),
            anon_exclusive: false,
            zero: false,
        };
        let seen = |write, size| Seen::Page {
            memory: Memory::Generic { local: false },
            write,
            size,
        };
        for (seen, facts, flags) in [
            (Seen::Absent, None, 0),
            (Seen::Error, None, 0x800),
            (seen(false, MapSize::Base), Some(facts), 0x1),
            (seen(true, MapSize::Base), Some(facts), 0x3),
            (seen(false, MapSize::Pmd), Some(facts), 0x5),
            (seen(true, MapSize::Pud), Some(facts), 0xb),
            (
                seen(true, MapSize::Base),
                Some(PageFacts {
                    anon_exclusive: true,
                    ..facts
                }),
                0x203,
            ),
            (
                seen(false, MapSize::Pmd),
                Some(PageFacts {
                    zero: true,
                    ..facts
                }),
                0x405,
            ),
        ] {
            assert_eq!(page_seen(seen, facts, false).flags, flags);
            // A page that is not there any more has no place.
            let place = if facts.is_some() { 0x1000 } else { 0 };
            assert_eq!(page_seen(seen, facts, true).flags, flags | place);
        }
        let page = frame(Some(facts));
        assert_eq!(page.flags, 0x1);
        assert_eq!((page.pfn, page.order, page.index), (0x12345, 9, 511));
        assert_eq!((page.refs, page.mapcount, page.pins), (3, 2, 1));
        assert_eq!((page.type_, page.owner), (4, 2));
        assert_eq!(frame(None).flags, 0);
    }

    /// The count, type and owner of page frame `pfn`, as `owner` sees it.
    fn at(pfn: usize, owner: &PgmapOwner) -> (u32, i32, u32, u32) {
        let mut out = [ZdmPage::default()];
        // A task that is killed sees no page.
        let _ = inspect_pfns(pfn, &mut out, owner, frame);
        let page = &out[0];
        (page.flags, page.refs, page.type_, page.owner)
    }

    #[test]
    fn free_pages_by_number() -> Result {
        let device = Device::for_test()?;
        let first = device.chunk(0).ok_or(EINVAL)?.first_pfn();
        let there = uapi::ZDM_PAGE_THERE;
        let private = uapi::MEMORY_DEVICE_PRIVATE;
        for pfn in [first, first + SZ_2M / PAGE_SIZE - 1] {
            assert_eq!(
                at(pfn, &device.owner),
                (there, 0, private, uapi::ZDM_OWNER_LOCAL)
            );
            let stranger = PgmapOwner::new(this_module())?;
            assert_eq!(
                at(pfn, &stranger),
                (there, 0, private, uapi::ZDM_OWNER_REMOTE)
            );
        }
        device.release_memory()?;
        assert_eq!(at(first, &device.owner), (0, 0, 0, 0));
        Ok(())
    }

    #[test]
    fn page_of_the_device_by_address() -> Result {
        let device = Device::for_test()?;
        let start = mmap_anon(PAGE_SIZE)?;
        UserSlice::new(UserPtr::from_addr(start), 1)
            .writer()
            .write_slice(&[1])?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let client = Client::new(&device, mm)?;
        let range = PageRange::new(start, 1)?;
        client.to_device(range)?;
        let mut out = [ZdmPage::default()];
        client.mirror().inspect_places(range, &mut out, page_seen)?;
        let page = &out[0];
        assert_eq!((page.refs, page.mapcount, page.pins), (1, 1, 0));
        assert_eq!((page.order, page.index), (0, 0));
        assert_eq!(page.type_, uapi::MEMORY_DEVICE_PRIVATE);
        assert_eq!(page.owner, uapi::ZDM_OWNER_LOCAL);
        let flags = uapi::ZDM_PAGE_THERE | uapi::ZDM_PAGE_WRITE | uapi::ZDM_PAGE_ANON;
        assert_eq!(page.flags & flags, flags);
        device.release_memory()?;
        Ok(())
    }
}
