// SPDX-License-Identifier: GPL-2.0

//! zdmirror: the Rust counterpart of `lib/test_hmm.c`.
//!
//! Registers ZONE_DEVICE memory, lets processes migrate pages to it and back, and asserts that a
//! page of it is free if and only if its reference count is zero.
//!
//! # Lock order
//!
//! 1. `Injection::broken` and `Client::pins`, never held together; nothing but the allocator is called
//!    under the latter
//! 2. `Device::leaks`, `Device::releasing`, under the latter
//!    `Device::growth`, and under that `ModuleScope::list` and core mm's memory hotplug lock
//! 3. `mmap_lock` of the mirrored process
//! 4. folio locks, and under them `FailAlloc::list`; nothing but the allocator is called under the
//!    latter
//! 5. `HmmMirror`'s table, taken by interval notifiers too: nothing that waits for reclaim or faults below it
//! 6. `Device::memory`, a spinlock
//! 7. `FaultAround::files`, a spinlock, and `TextFile::reads` of debugfs: no other lock is taken
//!    below them
//! 8. `Auditor::records`, a spinlock that `folio_free` takes under whatever its caller holds, in
//!    interrupts too; of all locks of ours the only one that it takes

mod audit;
mod bindings;
#[path = "kernel/debugfs.rs"]
mod debugfs;
mod driver;
#[cfg(CONFIG_KUNIT = "y")]
mod examples;
#[path = "kernel/miscdevice.rs"]
mod miscdevice;
#[path = "kernel/mm/mod.rs"]
mod mm;
#[path = "kernel/params.rs"]
mod params;
#[cfg(CONFIG_KUNIT = "y")]
#[path = "../samples/dmem.rs"]
mod sample;
#[cfg(CONFIG_KUNIT = "y")]
#[path = "../samples/dmem_kunit.rs"]
mod sample_kunit;
#[path = "kernel/spinlock.rs"]
mod spinlock;
#[path = "kernel/stacktrace.rs"]
mod stacktrace;
#[path = "kernel/stamp.rs"]
mod stamp;
#[path = "kernel/uapi.rs"]
mod uapi;

use crate::{
    debugfs::Dir,
    driver::{
        Client,
        Config,
        DebugFiles,
        Device,
        Location,
        Observer,
        PagemapsFile, //
    },
    miscdevice::Node,
    mm::module::scope::{
        ModuleExit,
        ModuleScope, //
    },
};
use core::borrow::Borrow;
use kernel::{
    prelude::*,
    sync::Arc, //
};

module! {
    type: Zdmirror,
    name: "zdmirror",
    authors: ["zdmirror maintainers"],
    description: "ZONE_DEVICE mirror: HMM test device that audits page reference counts",
    license: "GPL",
    alias: ["test_hmm"],
    params: {
        devices: usize {
            default: 1,
            description: "0: no device of our own, only the survey of all pagemaps and ZDM_INSPECT",
        },
        devmem_chunk_mb: usize {
            default: 256,
            description: "Size of a chunk of device memory in MiB, a multiple of 2",
        },
        spm_addr_dev0: u64 {
            default: 0,
            description: "Physical address of hmm_dmirror2's COHERENT memory, devmem_chunk_mb of it",
        },
        spm_addr_dev1: u64 {
            default: 0,
            description: "The same of hmm_dmirror3; both addresses must be given, or none",
        },
        generic_addr_dev0: u64 {
            default: 0,
            description: "Physical address of hmm_dmirror4's GENERIC memory, devmem_chunk_mb of it",
        },
        generic_addr_dev1: u64 {
            default: 0,
            description: "The same of hmm_dmirror5; both addresses must be given, or none",
        },
        fault_around: usize {
            default: 0,
            description: "Most pages that a CPU fault brings back, up to 512; 0 and 1: its own only",
        },
    },
}

/// The PRIVATE devices: the name, and the parameter with the place of the memory.
const PRIVATE: [(&CStr, &str); 2] = [
    (c"hmm_dmirror0", "devmem_chunk_mb"),
    (c"hmm_dmirror1", "devmem_chunk_mb"),
];

/// The COHERENT devices, which exist if there is memory for them.
const COHERENT: [(&CStr, &str); 2] = [
    (c"hmm_dmirror2", "spm_addr_dev0"),
    (c"hmm_dmirror3", "spm_addr_dev1"),
];

/// The GENERIC devices, which exist if there is memory for them.
const GENERIC: [(&CStr, &str); 2] = [
    (c"hmm_dmirror4", "generic_addr_dev0"),
    (c"hmm_dmirror5", "generic_addr_dev1"),
];

/// The value of a parameter, which is a reference before Linux 7.3.
fn given<T: Copy>(value: impl Borrow<T>) -> T {
    *value.borrow()
}

#[pin_data]
struct Zdmirror {
    _registered: Registered,
    // Dropped last, to end what was forgotten.
    #[pin]
    exit: ModuleExit,
}

/// What the module registers.
struct Registered {
    // The files are removed before the nodes; each drops its device.
    _files: KVec<DebugFiles>,
    _pagemaps: PagemapsFile,
    _nodes: KVec<Node<Client>>,
    _observer: Node<Observer>,
}

impl kernel::InPlaceModule for Zdmirror {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            exit <- ModuleExit::new(module),
            _registered: Registered::new(exit.scope())?,
        })
    }
}

impl Registered {
    fn new(scope: &Arc<ModuleScope>) -> Result<Self> {
        let config = Config::parse(
            params::param_audit(),
            given(module_parameters::devmem_chunk_mb.value()),
            params::param_inject(),
            params::param_ledger(),
            given(module_parameters::fault_around.value()),
        )?;
        let wanted = given(module_parameters::devices.value());
        if wanted > 1 {
            pr_err!("parameter devices: must be 0 or 1, not {}\n", wanted);
            return Err(EINVAL);
        }
        let coherent = Location::coherent([
            given(module_parameters::spm_addr_dev0.value()),
            given(module_parameters::spm_addr_dev1.value()),
        ])?;
        let generic = Location::generic([
            given(module_parameters::generic_addr_dev0.value()),
            given(module_parameters::generic_addr_dev1.value()),
        ])?;
        let private = PRIVATE.iter().map(|device| (device, Location::Anywhere));
        let coherent = coherent
            .iter()
            .flat_map(|locations| COHERENT.iter().zip(locations.iter().copied()));
        let generic = generic
            .iter()
            .flat_map(|locations| GENERIC.iter().zip(locations.iter().copied()));
        let devices = Iterator::chain(Iterator::chain(private, coherent), generic);
        let devices = devices.filter(|_| wanted == 1);
        let most = PRIVATE.len() + COHERENT.len() + GENERIC.len();
        let mut nodes = KVec::with_capacity(most, GFP_KERNEL)?;
        let root = Dir::root(scope.clone(), c"zdmirror")?;
        let mut files = KVec::with_capacity(nodes.capacity(), GFP_KERNEL)?;
        for (&(name, parameter), location) in devices {
            let device = Device::new(name, config, location, scope).map_err(|err| {
                pr_err!("parameter {}: {} {}\n", parameter, location, err.reason());
                Error::from(err)
            })?;
            let node = Node::register(scope, name, device.clone())?;
            nodes.push(node, GFP_KERNEL)?;
            files.push(DebugFiles::new(&root, name, &device)?, GFP_KERNEL)?;
        }
        pr_info!("loaded; only for testing\n");
        Ok(Self {
            _files: files,
            _pagemaps: PagemapsFile::new(&root, scope)?,
            _nodes: nodes,
            _observer: Observer::register(scope)?,
        })
    }
}
