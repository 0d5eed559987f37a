// SPDX-License-Identifier: GPL-2.0

//! zdmirror: the Rust counterpart of `lib/test_hmm.c`.
//!
//! Registers ZONE_DEVICE memory, lets processes migrate pages to it and back, and asserts that a
//! page of it is free if and only if its reference count is zero.
//!
//! # Lock order
//!
//! 1. `Opener::broken`
//! 2. `Device::growth`, and under it core mm's memory hotplug lock
//! 3. `mmap_lock` of the mirrored process
//! 4. folio locks
//! 5. `HmmMirror`'s table and the lock of a snapshot, never held together, taken by interval
//!    notifiers too: nothing that waits for reclaim or faults below them
//! 6. `Core::pool` and `Auditor::records`, spinlocks that are never held together; `folio_free`
//!    takes them under whatever its caller holds

mod audit;
mod bindings;
mod driver;
#[path = "kernel/miscdevice.rs"]
mod miscdevice;
#[path = "kernel/mm/mod.rs"]
mod mm;

use crate::{
    driver::{
        Config,
        Device,
        Opener, //
    },
    miscdevice::Node, //
};
use kernel::prelude::*;

module! {
    type: Zdmirror,
    name: "zdmirror",
    authors: ["zdmirror maintainers"],
    description: "ZONE_DEVICE mirror: HMM test device that audits page reference counts",
    license: "GPL",
    alias: ["test_hmm"],
    params: {
        devmem_chunk_mb: usize {
            default: 256,
            description: "Size of a chunk of device memory in MiB, a multiple of 2",
        },
        inject: bool {
            default: false,
            description: "Allow ZDM_INJECT to break invariants on purpose",
        },
    },
}

/// Names of the PRIVATE devices, as upstream's.
const PRIVATE_NODES: [&CStr; 2] = [c"hmm_dmirror0", c"hmm_dmirror1"];

struct Zdmirror {
    _nodes: KVec<Pin<KBox<Node<Opener>>>>,
}

impl kernel::Module for Zdmirror {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let config = Config::parse(
            mm::module::param_audit(),
            *module_parameters::devmem_chunk_mb.value_ref(),
            *module_parameters::inject.value_ref(),
        )?;
        let mut nodes = KVec::with_capacity(PRIVATE_NODES.len(), GFP_KERNEL)?;
        for name in PRIVATE_NODES {
            let device = Device::new(name, config)?;
            let node = KBox::try_pin_init(Node::register(name, device), GFP_KERNEL)?;
            nodes.push(node, GFP_KERNEL)?;
        }
        pr_info!("loaded; only for testing\n");
        Ok(Self { _nodes: nodes })
    }
}
