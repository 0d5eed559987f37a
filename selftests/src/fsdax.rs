// SPDX-License-Identifier: GPL-2.0

//! File systems with `dax=always` on the pmem that a machine may have, and one without DAX on a RAM
//! disk.
//!
//! A test mounts in a namespace of its own, so that nothing stays mounted after it; the pmem is a
//! plain block device before and after.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::FallocateFlags;
use nix::mount::MntFlags;

use crate::check::{Fail, OrFail, Outcome};
use crate::dax;
use crate::device::PAGE;
use crate::{files, sys};

/// File systems on pmem.
pub const EXT4: usize = 0;
pub const XFS: usize = 1;
/// xfs with shared blocks.
pub const REFLINK: usize = 2;

/// A RAM disk of the kernel.
const RAM_DISK: &str = "/dev/ram0";
/// A previous user of the device may need a moment: a mount ends after its last user.
const SETTLE: Duration = Duration::from_secs(20);

/// The program that makes a file system, its type, and its options. Extents of files are aligned to
/// 2 MiB if there is room, so that a PMD can map them.
fn recipe(kind: usize) -> (&'static str, &'static str, &'static [&'static str]) {
    const EXT4_ARGS: &[&str] = &[
        "-q",
        "-F",
        "-b",
        "4096",
        "-E",
        "stride=512,stripe_width=512",
    ];
    // With reverse mappings the file system finds the files of a bad page.
    macro_rules! xfs {
        ($reflink:literal) => {
            &[
                "-q",
                "-f",
                "-K",
                "-b",
                "size=4096",
                "-m",
                $reflink,
                "-m",
                "rmapbt=1",
                "-d",
                "su=2m,sw=1",
                "-d",
                "extszinherit=512",
            ]
        };
    }
    match kind {
        EXT4 => ("mkfs.ext4", "ext4", EXT4_ARGS),
        XFS => ("mkfs.xfs", "xfs", xfs!("reflink=0")),
        _ => ("mkfs.xfs", "xfs", xfs!("reflink=1")),
    }
}

/// The option for the number of allocation groups of an xfs. mkfs supports a single group only on
/// request.
fn groups(kind: usize, groups: &'static str) -> Vec<&'static str> {
    match kind {
        EXT4 => Vec::new(),
        _ => vec!["--unsupported", "-d", groups],
    }
}

/// Waits until no mount or process uses a block device.
fn free(device: &str) -> io::Result<()> {
    let mut result = Ok(());
    sys::wait_until(SETTLE, || {
        let mut options = File::options();
        let options = options.read(true).custom_flags(libc::O_EXCL);
        result = options.open(device).map(drop);
        result.is_ok()
    });
    result
}

/// A mounted file system. Dropping it unmounts it.
pub struct Mounted {
    dir: PathBuf,
    mounted: bool,
}

impl Mounted {
    /// Makes a file system of this kind on pmem and mounts it with DAX. Skips the test if there is
    /// no pmem.
    #[track_caller]
    pub fn dax(kind: usize) -> Outcome<Self> {
        dax::restore_pmem_with_pages()?;
        Self::make(kind, dax::PMEM, "dax=always", groups(kind, "agcount=2"))
    }

    /// As `dax`, but an xfs gets a single allocation group.
    #[track_caller]
    pub fn dax_one_group(kind: usize) -> Outcome<Self> {
        dax::restore_pmem_with_pages()?;
        Self::make(kind, dax::PMEM, "dax=always", groups(kind, "agcount=1"))
    }

    /// Makes an ext4 without DAX.
    #[track_caller]
    pub fn plain() -> Outcome<Self> {
        Self::make(EXT4, RAM_DISK, "", Vec::new())
    }

    #[track_caller]
    fn make(kind: usize, device: &str, options: &str, more: Vec<&str>) -> Outcome<Self> {
        let (program, fs_type, args) = recipe(kind);
        free(device).or_fail(device)?;
        let output = Command::new(format!("/bin/{program}"))
            .args(args)
            .args(more)
            .arg(device)
            .output()
            .or_fail(program)?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(Fail::failed(format!("{program} {device}: {text}")));
        }
        let name = device.rsplit('/').next().unwrap_or(device);
        let dir = Path::new("/tmp").join(format!("zdm-{name}"));
        fs::create_dir_all(&dir).or_fail("mkdir")?;
        files::own_mounts().or_fail("unshare")?;
        files::mount(device, &dir, fs_type, options)
            .or_fail(&format!("mount of {fs_type} on {device}"))?;
        Ok(Self { dir, mounted: true })
    }

    /// Mounts the file system that the pmem already has.
    #[track_caller]
    pub fn again(kind: usize) -> Outcome<Self> {
        let dir = Path::new("/tmp").join("zdm-pmem0");
        free(dax::PMEM).or_fail(dax::PMEM)?;
        files::mount(dax::PMEM, &dir, recipe(kind).1, "dax=always").or_fail("mount")?;
        Ok(Self { dir, mounted: true })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Opens an existing file.
    #[track_caller]
    pub fn open(&self, name: &str) -> Outcome<File> {
        let mut options = File::options();
        options.read(true).write(true);
        options.open(self.path(name)).or_fail(name)
    }

    /// Makes an empty file.
    #[track_caller]
    pub fn empty(&self, name: &str) -> Outcome<File> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        options.open(self.path(name)).or_fail(name)
    }

    /// Makes a file with the size of `pages` pages, and blocks for all of them.
    #[track_caller]
    pub fn file(&self, name: &str, pages: usize) -> Outcome<File> {
        let file = self.empty(name)?;
        files::allocate(&file, FallocateFlags::empty(), 0, pages).or_fail("fallocate")?;
        Ok(file)
    }

    #[track_caller]
    pub fn remove(&self, name: &str) -> Outcome {
        fs::remove_file(self.path(name)).or_fail(name)
    }

    /// Unmounts and returns the result.
    pub fn unmount(&mut self) -> io::Result<()> {
        files::unmount(&self.dir, MntFlags::empty())?;
        self.mounted = false;
        Ok(())
    }

    /// Marks the file system as unmounted by other means.
    pub fn forget(&mut self) {
        self.mounted = false;
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            // A process may still use the mount or hold a page. Detach the mount: the test has
            // already failed, and the end of its process releases everything.
            let _ = files::unmount(&self.dir, MntFlags::MNT_DETACH);
        }
    }
}

/// The page frame number of the first page of the pmem, and the number of pages.
#[track_caller]
pub fn pmem_frames() -> Outcome<(u64, usize)> {
    let (start, bytes) = dax::pmem_range().or_fail("range of the pmem")?;
    Ok((start / PAGE as u64, (bytes / PAGE as u64) as usize))
}
