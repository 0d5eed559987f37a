// SPDX-License-Identifier: GPL-2.0
// error: E0423

//! A migration is watched only if the watch has begun before: the token comes from a watch.

#![forbid(unsafe_code)]

use crate::mm::user::watches::WatchToken;

fn token() -> WatchToken {
    WatchToken(0)
}
