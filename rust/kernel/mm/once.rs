// SPDX-License-Identifier: GPL-2.0

//! Plain reads and writes of words that other tasks may read and write at the same time.
//!
//! A relaxed load or store of an [`Atomic`] is a call of a function in C, which costs more than what else
//! is done for a page. These are the same as `READ_ONCE()` and `WRITE_ONCE()`, in line.

use kernel::sync::atomic::{
    Atomic,
    AtomicType, //
};

/// As a relaxed load.
///
/// # Examples
///
/// ```
/// use kernel::{
///     mm::once::{read_once, write_once},
///     sync::atomic::Atomic,
/// };
///
/// let hint = Atomic::new(3u32);
/// write_once(&hint, 4);
/// assert_eq!(read_once(&hint), 4);
/// ```
#[inline]
pub(crate) fn read_once<T: AtomicType>(word: &Atomic<T>) -> T {
    // SAFETY: The word is valid, and may be written at the same time, as by `READ_ONCE()`.
    unsafe { word.as_ptr().read_volatile() }
}

/// As a relaxed store, see [`read_once`].
#[inline]
pub(crate) fn write_once<T: AtomicType>(word: &Atomic<T>, value: T) {
    // SAFETY: The word is valid, and may be read and written at the same time, as by `WRITE_ONCE()`.
    unsafe { word.as_ptr().write_volatile(value) };
}
