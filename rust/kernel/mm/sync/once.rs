// SPDX-License-Identifier: GPL-2.0

//! Plain reads, writes and additions of words that other tasks may read and write at the same time.
//!
//! A relaxed operation on an [`Atomic`], or a store with release ordering, is a call of a function in C, which
//! costs more than the other work for a page. The functions here are the same as `READ_ONCE()`,
//! `WRITE_ONCE()`, `smp_store_release()` and `atomic64_add()`, and are inlined.

use core::sync::atomic::{
    fence,
    AtomicU64,
    Ordering, //
};
use kernel::sync::atomic::{
    Atomic,
    AtomicType, //
};

/// As a relaxed load.
///
/// # Examples
///
/// ```
/// use kernel::{mm::sync::once::{read_once, write_once}, sync::atomic::Atomic};
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

/// As a store with release ordering: a task that reads the value with acquire ordering sees all that this
/// task did before.
///
/// # Examples
///
/// ```
/// use kernel::{mm::sync::once::store_release, sync::atomic::{Acquire, Atomic}};
///
/// let ready = Atomic::new(0u32);
/// store_release(&ready, 1);
/// assert_eq!(ready.load(Acquire), 1);
/// ```
#[inline]
pub(crate) fn store_release<T: AtomicType>(word: &Atomic<T>, value: T) {
    fence(Ordering::Release);
    write_once(word, value);
}

/// As a relaxed addition, which wraps. Nothing is ordered by it.
///
/// # Examples
///
/// ```
/// use kernel::{mm::sync::once::{add_once, read_once}, sync::atomic::Atomic};
///
/// let events = Atomic::new(u64::MAX);
/// add_once(&events, 3);
/// assert_eq!(read_once(&events), 2);
/// ```
#[inline]
pub(crate) fn add_once(word: &Atomic<u64>, n: u64) {
    // SAFETY: The word is valid and aligned for as long as it is borrowed, and all accesses of an `Atomic` are
    // atomic.
    let word = unsafe { AtomicU64::from_ptr(word.as_ptr()) };
    word.fetch_add(n, Ordering::Relaxed);
}
