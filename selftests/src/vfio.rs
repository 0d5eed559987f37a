// SPDX-License-Identifier: GPL-2.0

//! A PCI device that vfio-pci gives to user space. The tests use only its IOMMU: memory that is
//! mapped there is pinned for a long time.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use linux_raw_sys::ioctl::{
    VFIO_GROUP_SET_CONTAINER, VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA, VFIO_SET_IOMMU,
};

use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

/// QEMU's pci-testdev.
const VENDOR: &str = "0x1b36";
const DEVICE: &str = "0x0005";
const DRIVER: &str = "/sys/bus/pci/drivers/vfio-pci";

/// linux-raw-sys lacks this and the following constant of linux/vfio.h.
const TYPE1V2: u64 = 3;
const READ_WRITE: u64 = 3;

/// A device that is bound to vfio-pci, and a type 1 container for it. Dropping this value unbinds
/// the device.
pub struct Vfio {
    /// The sysfs directory of the device.
    path: PathBuf,
    /// The group is dropped before the container; closing both ends all mappings.
    group: Option<File>,
    container: Option<File>,
}

impl Vfio {
    /// The sysfs directory of the device, if there is one with an IOMMU.
    pub fn find() -> Option<PathBuf> {
        let id = |dir: &Path, name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let ours = |dir: &PathBuf| {
            id(dir, "vendor").trim() == VENDOR
                && id(dir, "device").trim() == DEVICE
                && dir.join("iommu_group").exists()
                && Path::new(DRIVER).exists()
        };
        let devices = fs::read_dir("/sys/bus/pci/devices").ok()?;
        devices.flatten().map(|e| e.path()).find(ours)
    }

    fn name(path: &Path) -> String {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// Binds the device and sets up its container.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        fs::write(path.join("driver_override"), "vfio-pci")?;
        fs::write(Path::new(DRIVER).join("bind"), Self::name(&path))?;
        let mut vfio = Self {
            path,
            group: None,
            container: None,
        };
        let group = Self::name(&fs::read_link(vfio.path.join("iommu_group"))?);
        let open = |path: &Path| File::options().read(true).write(true).open(path);
        let container = vfio.container.insert(open(Path::new("/dev/vfio/vfio"))?);
        let group = vfio
            .group
            .insert(open(&Path::new("/dev/vfio").join(group))?);
        let fd = container.as_raw_fd();
        let set = VFIO_GROUP_SET_CONTAINER.into();
        // SAFETY: The command reads an int.
        cvt(unsafe { libc::ioctl(group.as_raw_fd(), set, &raw const fd) }.into())?;
        // SAFETY: The command takes a number.
        cvt(unsafe { libc::ioctl(fd, VFIO_SET_IOMMU.into(), TYPE1V2) }.into())?;
        Ok(vfio)
    }

    fn call(&self, command: u32, arg: *mut u64) -> io::Result<()> {
        let fd = self.container.as_ref().map_or(-1, File::as_raw_fd);
        // SAFETY: The callers pass the memory that the command reads and writes.
        cvt(unsafe { libc::ioctl(fd, command.into(), arg) }.into()).map(drop)
    }

    /// Maps pages for the device, at the same addresses as in the process.
    pub fn map(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        let (at, size) = (buf.at(first), (n * PAGE) as u64);
        // The size of the structure and the flags have 32 bits each.
        let mut arg = [32 | (READ_WRITE << 32), at, at, size];
        self.call(VFIO_IOMMU_MAP_DMA, arg.as_mut_ptr())
    }

    pub fn unmap(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        let mut arg = [24, buf.at(first), (n * PAGE) as u64];
        self.call(VFIO_IOMMU_UNMAP_DMA, arg.as_mut_ptr())
    }

    /// Closes the container, which ends all mappings.
    pub fn close(&mut self) {
        self.group = None;
        self.container = None;
    }
}

impl Drop for Vfio {
    fn drop(&mut self) {
        self.close();
        let name = Self::name(&self.path);
        // If this fails, the next test reports it.
        let _ = fs::write(Path::new(DRIVER).join("unbind"), name);
        let _ = fs::write(self.path.join("driver_override"), "\n");
    }
}
