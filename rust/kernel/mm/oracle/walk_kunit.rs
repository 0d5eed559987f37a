// SPDX-License-Identifier: GPL-2.0

//! A comparison of page tables whose closure changes the tables.

use crate::mm::{
    hmm::access::{
        Access,
        Grant, //
    },
    kunit::{
        device::EmulatedDevice,
        support::{
            anon_range,
            munmap,
            touch, //
        },
    },
    PAGE_SHIFT,
    PAGE_SIZE, //
};
use core::ptr::NonNull;
use kernel::{
    page::Page,
    prelude::*, //
};

#[kunit_tests(zdmirror_walk_closures)]
mod tests {
    use super::*;

    #[test]
    fn closure_of_a_comparison_may_use_the_mirror() -> Result {
        let device = EmulatedDevice::new()?;
        let range = anon_range(20)?;
        let mirror = device.mirror()?;
        mirror.fault(range, Access::Read)?;
        let page = Page::alloc_page(GFP_KERNEL)?;
        let raw = NonNull::new(page.as_ptr()).ok_or(EINVAL)?;
        for address in range.addresses() {
            // SAFETY: Nothing is read or written through the table before the memory is unmapped.
            unsafe {
                mirror
                    .notifier
                    .lock()
                    .store(address >> PAGE_SHIFT, raw, Grant::Read)
            }?;
        }
        let mut found = 0;
        let compared = mirror.compare(|untruth| {
            found += 1;
            if untruth.index == (range.end() >> PAGE_SHIFT) - 1 {
                let _ = munmap(range.start(), range.end() - range.start());
                let _ = mirror.refresh(range);
            }
        })?;
        assert_eq!((compared, found), (20, 20));
        assert_eq!(mirror.compare(|_| found += 1)?, 0);
        Ok(())
    }

    #[test]
    fn page_out_of_reach_is_not_read() -> Result {
        let device = EmulatedDevice::new()?;
        let range = anon_range(1)?;
        let mirror = device.mirror()?;
        device.migrate(range)?;
        let index = range.start() >> PAGE_SHIFT;
        assert!(mirror.is_empty(index));
        let held = mirror.get_device_folio(range)?;
        held.set_poisoned(true);
        let (is_empty, flipped) = (mirror.is_empty(index), held.flip_bit());
        held.set_poisoned(false);
        assert_eq!((is_empty, flipped), (false, Err(EFAULT)));
        // The page is as it was.
        assert!(mirror.is_empty(index));
        Ok(())
    }

    #[test]
    fn closure_that_looks_at_places_may_unmap_them() -> Result {
        let device = EmulatedDevice::new()?;
        let range = anon_range(3)?;
        let mirror = device.mirror()?;
        touch(range)?;
        let mut there = [(false, true); 3];
        mirror.inspect_places(range, &mut there, |_, facts, misplaced| {
            // The mmap lock is not held.
            let _ = munmap(range.start(), PAGE_SIZE);
            (facts.is_some(), misplaced)
        })?;
        assert_eq!(there, [(true, false); 3]);
        Ok(())
    }
}
