// SPDX-License-Identifier: GPL-2.0
// error: E0505

//! A watch lasts as long as the migration that has its token.

#![forbid(unsafe_code)]

use crate::mm::{
    hmm::fill::Watch,
    migrate::{
        device_memory::DeviceMemory,
        migration::{Migration, PfnBuffer, Request},
    },
};

fn early<M: DeviceMemory>(
    watch: Watch<'_>,
    request: Request<'_>,
    buffer: &mut PfnBuffer,
    memory: &M,
) {
    let request = Request {
        watch: Some(watch.token()),
        ..request
    };
    let migration = Migration::of_range(buffer, &request, memory);
    drop(watch);
    drop(migration);
}
