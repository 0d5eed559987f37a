// SPDX-License-Identifier: GPL-2.0
// error: E0423

//! The stages of a migration are types without constructors.

#![forbid(unsafe_code)]

use crate::mm::migrate::migration::Copied;

fn stage() -> Copied {
    Copied(())
}
