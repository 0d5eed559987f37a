// SPDX-License-Identifier: GPL-2.0
// error: E0382

//! Core mm moves the pages of a migration once.

#![forbid(unsafe_code)]

use crate::mm::migrate::{Migration, Setup};

fn twice(migration: Migration<'_, Setup>) {
    drop(migration.copied());
    drop(migration.copied());
}
