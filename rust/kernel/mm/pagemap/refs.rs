// SPDX-License-Identifier: GPL-2.0

//! References of a pagemap.
//!
//! C header: [`include/linux/percpu-refcount.h`](srctree/include/linux/percpu-refcount.h)

use crate::bindings;
use kernel::{
    cpu::nr_cpu_ids,
    sync::rcu, //
};

/// References on `pgmap`; exact while no task takes or drops one.
///
/// A `percpu_ref` in atomic mode would have an exact count at any time. But that of a pagemap cannot be switched
/// back afterwards (no `PERCPU_REF_ALLOW_REINIT`), so that the pagemap would have to be unregistered.
///
/// # Safety
///
/// `pgmap` must be registered.
pub(in crate::mm) unsafe fn refs(pgmap: *mut bindings::dev_pagemap) -> i64 {
    // The counts by processor are freed after a grace period.
    let _rcu = rcu::read_lock();
    // SAFETY: `pgmap` is registered by the contract of this function, so that its count is set up.
    let mut sum = unsafe { bindings::zdm_pgmap_count(pgmap) };
    // SAFETY: `pgmap` is registered by the contract of this function.
    let counts = unsafe { bindings::zdm_pgmap_counts(pgmap) };
    if counts != 0 {
        let mut cpu = -1;
        loop {
            // SAFETY: The function takes -1 and the number of any processor.
            let next = unsafe { bindings::zdm_next_possible_cpu(cpu) };
            if next >= nr_cpu_ids() {
                break;
            }
            // SAFETY: `counts` was obtained in this RCU section, and the processor is a possible one.
            sum = sum.wrapping_add(unsafe { bindings::zdm_pgmap_cpu_count(counts, next) });
            // CAST: Numbers of processors are small.
            cpu = next as i32;
        }
    }
    value(sum)
}

/// References that a pagemap of `pages` pages has after it was registered and before a page is in use: 1, and one for
/// each page where the kernel does not count those in use. `refs` are those that are found, of which some may belong
/// to tasks that look at the pagemap just now.
pub(super) fn first(refs: i64, pages: usize) -> i64 {
    // CAST: Less than the pages of a machine.
    let pages = pages as i64;
    if refs > pages {
        1 + pages
    } else {
        1
    }
}

/// The top bit is a flag of `percpu_ref` while it counts by processor. The bits below it are the count, as a signed
/// number, because a sum that misses some gets is negative.
fn value(sum: usize) -> i64 {
    // CAST: `usize` has 64 bits.
    ((sum << 1) as i64) >> 1
}

#[kernel::prelude::kunit_tests(zdmirror_pagemap_refs)]
mod tests {
    use super::*;

    #[test]
    fn top_bit_is_no_count() {
        for (sum, refs) in [
            (0, 0),
            (1 << 63, 0),
            (1 << 63 | 5, 5),
            (usize::MAX, -1),
            (usize::MAX >> 1, -1),
            ((1 << 63) - 2, -2),
        ] {
            assert_eq!(value(sum), refs);
        }
    }

    #[test]
    fn references_of_others_are_not_the_first_ones() {
        for (refs, expected) in [(1, 1), (2, 1), (512, 1), (513, 513), (515, 513)] {
            assert_eq!(first(refs, 512), expected);
        }
    }
}
