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
/// To have `percpu_ref` count in one place would be exact at any time, and the end of the pagemap: its
/// `percpu_ref` is not one that can be switched back (no `PERCPU_REF_ALLOW_REINIT`).
///
/// # Safety
///
/// `pgmap` must be registered.
pub(super) unsafe fn refs(pgmap: *mut bindings::dev_pagemap) -> i64 {
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

/// The top bit is `percpu_ref`'s own while it counts by processor, and means nothing here: what is below it
/// is the count, or its lower bits where there were more puts than gets.
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
}
