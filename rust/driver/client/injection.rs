// SPDX-License-Identifier: GPL-2.0

//! The faults that a client has injected and not undone yet.

#![forbid(unsafe_code)]

use crate::{
    driver::device::{
        dmirror_device::Device,
        page_backed::Migration, //
    },
    mm::{
        migrate::migration::Copied,
        oracle::extra_mapping::ExtraMapping,
        page::device_folio::FolioRef,
        pagemap::audit::Corruption, //
    },
};
use core::mem::take;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        Mutex, //
    }, //
};

/// An end of a migration.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The folio in system memory.
    Source,
    /// The folio on the device.
    Destination,
}

/// The faults of a client that are not undone yet.
#[derive(Default)]
pub(super) struct Broken {
    /// A folio with an extra reference.
    pub(super) held: Option<FolioRef>,
    /// A free page with a reference.
    pub(super) counted: Option<u32>,
    /// A free page with a stale field, and the fault that clears the field.
    pub(super) stale: Option<(u32, Corruption)>,
    /// A page of any pagemap with a mapping too many.
    pub(super) mapped: Option<ExtraMapping>,
    /// Whether this client has made evictions slow.
    pub(super) slow: bool,
    /// The end of the next migration to the device that must be held.
    armed: Option<End>,
}

/// The injected faults of a client.
#[pin_data]
pub(super) struct Injection {
    #[pin]
    broken: Mutex<Broken>,
}

/// A folio that a migration holds because the fault injection asked for it.
pub(super) struct Held {
    end: Option<End>,
    folio: Option<FolioRef>,
}

impl Held {
    /// Takes a reference on the first folio that `migration` has moved.
    pub(super) fn take_from(&mut self, migration: &Migration<'_, Copied>) {
        if let (Some(end), None) = (self.end, &self.folio) {
            self.folio = migration.hold_moved(end == End::Source);
        }
    }
}

impl Injection {
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            broken <- new_mutex!(Broken::default(), "Injection::broken"),
        })
    }

    /// The injected faults. May sleep; the mmap lock must not be held.
    pub(in crate::driver) fn broken(&self) -> Guard<'_, Broken, MutexBackend> {
        self.broken.lock()
    }

    /// The end that the next migration must hold. May sleep.
    pub(super) fn armed(&self) -> Held {
        Held {
            end: self.broken.lock().armed,
            folio: None,
        }
    }

    /// Keeps the folio that a migration holds until the fault is undone. May sleep; the mmap lock
    /// must not be held.
    pub(super) fn keep(&self, held: Held) {
        if held.folio.is_some() {
            let mut broken = self.broken.lock();
            broken.armed = None;
            broken.held = held.folio;
        }
    }

    /// Undoes the faults on `device`. A leaked reference of a pagemap stays leaked. May sleep.
    pub(super) fn mend(&self, device: &Device) {
        let mut broken = self.broken.lock();
        let counted = broken
            .counted
            .take()
            .map(|page| (page, Corruption::Referenced(device.free_refs() != 0)));
        for (page, undo) in [counted, broken.stale.take()].into_iter().flatten() {
            if device.corrupt(page, undo).is_err() {
                pr_err!("page {} with an injected fault was taken meanwhile\n", page);
            }
        }
        if take(&mut broken.slow) {
            device.slow_down(0);
        }
        broken.held = None;
        broken.mapped = None;
    }
}

impl Broken {
    /// Makes the next migration to the device hold `end`.
    pub(super) fn arm(&mut self, end: End) {
        self.armed = Some(end);
    }
}

impl Device {
    /// Sets or clears a stale field of page `page`, which must be free.
    pub(in crate::driver) fn corrupt(&self, page: u32, fault: Corruption) -> Result<usize> {
        self.with_free(page, |chunk, folio| chunk.corrupt(folio, fault))
    }

    /// A free page.
    fn free_page(&self) -> Result<u32> {
        self.memory().allocator.peek_free().ok_or(ENOSPC)
    }

    /// Sets a stale field of a free page.
    pub(super) fn corrupt_free(&self, fault: Corruption) -> Result<(u32, usize)> {
        let page = self.free_page()?;
        Ok((page, self.corrupt(page, fault)?))
    }

    /// Leaks a reference of the first pagemap, or drops the leaked one.
    pub(super) fn leak_pagemap_ref(&self, leak: bool) -> Result<usize> {
        let chunk = self.chunks().next().ok_or(ENOENT)?;
        if !chunk.leak_ref(leak) {
            return Err(if leak { EBUSY } else { ENOENT });
        }
        Ok(chunk.first_pfn())
    }

    /// Frees a page that is already free.
    pub(super) fn free_again(&self) -> Result<usize> {
        self.with_free(self.free_page()?, |chunk, folio| chunk.free_again(folio))
    }
}
