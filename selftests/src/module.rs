// SPDX-License-Identifier: GPL-2.0

//! Loads and unloads zdmirror.ko. Loading also runs the KUnit suites and registers memory, so the
//! harness loads only when necessary.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::check;
use crate::check::{OrFail, Outcome};
use crate::device::{Device, PAGE};
use crate::proc;
use crate::sys;

/// The module's name in the kernel.
pub const NAME: &str = "zdmirror";
/// The name of the kernel tree's own driver.
const C_NAME: &str = "test_hmm";
/// The environment variable with parameters for all tests: the addresses of the machine's memory
/// for COHERENT and GENERIC devices.
pub const BASE: &str = "ZDM_MODULE_PARAMS";
/// The nodes of the PRIVATE devices, which exist with any parameters.
const PRIVATE: Range<usize> = 0..2;
/// The other kinds of devices: two parameters with an address each, and the nodes that exist if
/// both are given.
const OTHERS: [([&str; 2], Range<usize>); 2] = [
    (["spm_addr_dev0", "spm_addr_dev1"], 2..4),
    (["generic_addr_dev0", "generic_addr_dev1"], 4..6),
];
/// The bytes of memory that such a device has at its address, unless devmem_chunk_mb says
/// otherwise.
const CHUNK: u64 = 256 << 20;
/// devtmpfs and the module's reference count change a little later than the calls return.
const SETTLE: Duration = Duration::from_secs(2);

/// The module file, which tests may load and unload.
pub struct Module {
    name: &'static str,
    path: PathBuf,
    base: String,
}

/// The number that a list of parameters gives for `name`.
pub fn parameter(list: &str, name: &str) -> Option<u64> {
    let value = |w: &str| w.strip_prefix(name)?.strip_prefix('=').map(str::to_string);
    // The kernel uses the last of several values.
    let text = list.split_whitespace().filter_map(value).next_back()?;
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The name of a parameter.
fn key(parameter: &str) -> &str {
    parameter
        .split_once('=')
        .map_or(parameter, |(name, _)| name)
}

impl Module {
    pub fn new(path: PathBuf, base: String) -> Self {
        Self {
            name: NAME,
            path,
            base,
        }
    }

    /// The kernel tree's own driver, if zdvm has put it beside the module, with those common
    /// parameters that it knows.
    pub fn c_driver(&self) -> Option<Self> {
        let path = self.path.with_file_name(format!("{C_NAME}.ko"));
        let known = self
            .base
            .split_whitespace()
            .filter(|p| p.starts_with("spm_"));
        let base = known.collect::<Vec<_>>().join(" ");
        path.exists().then_some(Self {
            name: C_NAME,
            path,
            base,
        })
    }

    /// The same module, always loaded without common parameters: with PRIVATE devices only.
    pub fn private_only(self) -> Self {
        let base = String::new();
        Self { base, ..self }
    }

    /// The parameters of every load except `try_load`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The nodes that must exist while the module is loaded.
    pub fn nodes(&self) -> Vec<usize> {
        let given = |names: &[&str; 2]| names.iter().all(|n| parameter(&self.base, n).is_some());
        let others = OTHERS.iter().filter(|(names, _)| given(names));
        PRIVATE
            .chain(others.flat_map(|(_, nodes)| nodes.clone()))
            .collect()
    }

    /// The page frames of both devices of the kind that node `n` has, in no particular order. Empty
    /// for the PRIVATE kind, whose memory may be anywhere.
    pub fn frames(&self, n: usize) -> Vec<Range<u64>> {
        let page = PAGE as u64;
        let start = |name: &&str| parameter(&self.base, name);
        let kind = OTHERS.iter().filter(|(_, nodes)| nodes.contains(&n));
        let starts = kind.flat_map(|(names, _)| names.iter().filter_map(start));
        starts.map(|a| a / page..(a + CHUNK) / page).collect()
    }

    /// Loads the module with these parameters only, and does not wait.
    pub fn try_load(&self, parameters: &str) -> io::Result<()> {
        sys::finit_module(&File::open(&self.path)?, parameters)
    }

    /// Loads the module with these and the common parameters, and waits until its nodes can be
    /// opened.
    #[track_caller]
    pub fn load(&self, parameters: &str) -> Outcome {
        // A parameter of a Rust module can be given only once.
        let given = |name: &str| parameters.split_whitespace().any(|p| key(p) == name);
        let base = self.base.split_whitespace().filter(|p| !given(key(p)));
        let all: Vec<&str> = base.chain([parameters]).collect();
        let parameters = all.join(" ");
        let what = format!("loading {} '{parameters}'", self.path.display());
        self.try_load(parameters.trim()).or_fail(&what)?;
        for n in self.nodes() {
            let mut last = Ok(());
            let opened = sys::wait_until(SETTLE, || {
                last = Device::try_open(n).map(drop);
                last.is_ok()
            });
            check!(
                opened,
                "open {} after loading: expected success, found {last:?}",
                Device::path(n)
            );
        }
        Ok(())
    }

    /// Unloads the module unless it is in use.
    pub fn try_unload(&self) -> io::Result<()> {
        sys::delete_module(self.name)
    }

    /// Unloads the module, which has no user. References of files that were just closed and of
    /// processes that just ended may be dropped a little later.
    #[track_caller]
    pub fn unload(&self) -> Outcome {
        self.unload_beside()?;
        self.check_gone()
    }

    /// As [`Module::unload`], while a module with the same devices stays, so that nothing can be said of
    /// nodes and memory.
    #[track_caller]
    pub fn unload_beside(&self) -> Outcome {
        let mut last = Ok(());
        sys::wait_until(SETTLE, || {
            last = self.try_unload();
            !matches!(&last, Err(e) if busy(e))
        });
        last.or_fail("unloading")
    }

    /// Checks that nothing of the module is left.
    #[track_caller]
    pub fn check_gone(&self) -> Outcome {
        check!(
            !proc::module_loaded(self.name)?,
            "{} in /proc/modules: expected none, found it",
            self.name
        );
        for n in 0..6 {
            let path = Device::path(n);
            check!(
                sys::wait_until(SETTLE, || !Path::new(&path).exists()),
                "{path} without the module: expected none, found it"
            );
        }
        let dir = Path::new("/sys/kernel/debug").join(NAME);
        check!(!dir.exists(), "{}: expected none, found it", dir.display());
        let iomem = std::fs::read_to_string("/proc/iomem").or_fail("/proc/iomem")?;
        let region = iomem.lines().find(|l| l.contains("hmm_dmirror"));
        check!(
            region.is_none(),
            "memory region in /proc/iomem: expected none, found {region:?}"
        );
        Ok(())
    }
}

/// Whether unloading failed because the module is in use.
pub fn busy(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_follow_the_parameters() {
        let nodes = |base: &str| Module::new(PathBuf::new(), base.into()).nodes();
        assert_eq!(nodes(""), [0, 1]);
        assert_eq!(nodes("spm_addr_dev0=0x100000000"), [0, 1]);
        let both = "spm_addr_dev0=0x100000000 spm_addr_dev1=4563402752";
        assert_eq!(nodes(both), [0, 1, 2, 3]);
        let module = Module::new(PathBuf::new(), both.into());
        assert_eq!(
            module.frames(3),
            [0x10_0000..0x11_0000, 0x11_0000..0x12_0000]
        );
        assert!(module.frames(0).is_empty() && module.frames(4).is_empty());
        let all = format!("{both} generic_addr_dev0=0x120000000 generic_addr_dev1=0x130000000");
        assert_eq!(nodes(&all), [0, 1, 2, 3, 4, 5]);
        let frames = Module::new(PathBuf::new(), all).frames(4);
        assert_eq!(frames, [0x12_0000..0x13_0000, 0x13_0000..0x14_0000]);
        assert_eq!(parameter("a=1 ab=2 a=3", "a"), Some(3));
        assert_eq!(parameter("a=x", "a"), None);
    }
}
