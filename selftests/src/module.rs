// SPDX-License-Identifier: GPL-2.0

//! Loading and unloading of zdmirror.ko. Loading runs its KUnit suites too and
//! registers the memory, so the harness does it only when it has to.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::check;
use crate::check::{OrFail, Outcome};
use crate::device::Device;
use crate::proc;
use crate::sys;

/// Name of the module as the kernel knows it.
pub const NAME: &str = "zdmirror";
/// Device nodes that are there whatever the parameters.
pub const DEVICES: usize = 2;
/// devtmpfs and module reference counts settle a little later than the calls.
const SETTLE: Duration = Duration::from_secs(2);

/// The module file, which tests may load and unload themselves.
pub struct Module {
    path: PathBuf,
}

impl Module {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Loads the module, without waiting for anything.
    pub fn try_load(&self, parameters: &str) -> io::Result<()> {
        sys::finit_module(&File::open(&self.path)?, parameters)
    }

    /// Loads the module and waits until its nodes can be opened.
    #[track_caller]
    pub fn load(&self, parameters: &str) -> Outcome {
        let what = format!("loading {} '{parameters}'", self.path.display());
        self.try_load(parameters).or_fail(&what)?;
        for n in 0..DEVICES {
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

    /// Unloads the module unless somebody uses it.
    pub fn try_unload(&self) -> io::Result<()> {
        sys::delete_module(NAME)
    }

    /// Unloads the module, which nobody uses: references of files that were just
    /// closed and of processes that just ended may be dropped a little later.
    #[track_caller]
    pub fn unload(&self) -> Outcome {
        let mut last = Ok(());
        sys::wait_until(SETTLE, || {
            last = self.try_unload();
            !matches!(&last, Err(e) if busy(e))
        });
        last.or_fail("unloading")?;
        self.check_gone()
    }

    /// Checks that nothing of the module is left.
    #[track_caller]
    pub fn check_gone(&self) -> Outcome {
        check!(
            !proc::module_loaded(NAME)?,
            "{NAME} in /proc/modules: expected none, found it"
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

/// Whether unloading was refused because of a user.
pub fn busy(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}
