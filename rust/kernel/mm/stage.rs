// SPDX-License-Identifier: GPL-2.0

//! The stages of a migration, as types.

/// Where a [`Migration`](super::migrate::Migration) is.
pub(crate) trait Stage {
    /// Whether core mm has been told to move the pages.
    const MOVED: bool;
}

/// Source folios are locked and unmapped; destinations may be set.
pub(crate) struct Setup(());
/// Core mm has moved what it could; the page tables still hold migration entries.
pub(crate) struct Copied(());
/// It is over; the entries are good for a look back.
pub(crate) struct Finalized(());

impl Stage for Setup {
    const MOVED: bool = false;
}

impl Stage for Copied {
    const MOVED: bool = true;
}

impl Stage for Finalized {
    const MOVED: bool = true;
}
