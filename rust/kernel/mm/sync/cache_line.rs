// SPDX-License-Identifier: GPL-2.0

//! Words that many processors write get a cache line of their own, so that they do not slow down
//! reads of neighbouring words.

use core::ops::Deref;

/// A value on cache lines of its own. A line has 64 bytes on x86-64 and on most other machines.
///
/// # Examples
///
/// ```
/// use kernel::{mm::sync::cache_line::CacheLine, sync::atomic::{Atomic, Relaxed}};
///
/// let free = CacheLine(Atomic::new(3u32));
/// free.store(2, Relaxed);
/// assert_eq!(free.load(Relaxed), 2);
/// assert_eq!(core::mem::size_of_val(&free) % 64, 0);
/// ```
#[repr(align(64))]
pub(crate) struct CacheLine<T>(pub(crate) T);

impl<T> Deref for CacheLine<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}
