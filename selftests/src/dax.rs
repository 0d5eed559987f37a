// SPDX-License-Identifier: GPL-2.0

//! Makes a device-dax from the pmem that a machine may have (`memmap=SIZE!START`).
//!
//! The namespace is taken from the block driver nd_pmem. A dax device of its region gets the
//! namespace, with the page map in ordinary memory, and is bound to dax_pmem; its child is bound to
//! device_dax and has the node /dev/daxX.Y. All of it is undone at the end, the info block
//! included, so that /dev/pmem0 exists again as after boot.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::check::{Fail, OrFail, Outcome};
use crate::check_eq;
use crate::device::{Buffer, HUGE_PAGES, PAGE};
use crate::sys;

const ND: &str = "/sys/bus/nd";
const DAX: &str = "/sys/bus/dax";
/// The name that libnvdimm gives to the first namespace of the first region.
const NAMESPACE: &str = "namespace0.0";
/// The block device of the namespace after boot.
pub const PMEM: &str = "/dev/pmem0";
/// The offset of nd_pfn's info block, in bytes.
const INFO: u64 = 4096;
/// Devices appear and disappear a little later than the calls return.
const SETTLE: Duration = Duration::from_secs(5);

/// Alignments in bytes: the range that one fault maps.
pub const PTE: usize = PAGE;
pub const PMD: usize = HUGE_PAGES * PAGE;
pub const PUD: usize = 512 * PMD;

/// Makes a plain block device of the pmem. Skips the test if there is no pmem.
#[track_caller]
fn restore_pmem() -> Outcome {
    if !nd(NAMESPACE).exists() {
        return Err(Fail::Skip("no pmem on this machine".into()));
    }
    restore().or_fail("making pmem of what was there")
}

/// Makes a block device with struct pages, which a file system with DAX needs.
#[track_caller]
pub fn restore_pmem_with_pages() -> Outcome {
    /// This file has 1 if the block device supports DAX.
    const HAS_DAX: &str = "/sys/block/pmem0/queue/dax";
    restore_pmem()?;
    // A device that `restore` binds by force has no DAX. Without the info block no force is needed.
    if get(HAS_DAX).or_fail(HAS_DAX)? != "1" {
        unbind_pmem().or_fail("unbind of the pmem")?;
        bind_pmem().or_fail("bind of the pmem")?;
        let found = get(HAS_DAX).or_fail(HAS_DAX)?;
        check_eq!(found, "1", "{HAS_DAX}");
    }
    Ok(())
}

/// The physical address of the first byte of the pmem, and its size.
pub fn pmem_range() -> io::Result<(u64, u64)> {
    let number = |attribute: &str| {
        let text = get(nd(NAMESPACE).join(attribute))?;
        let parsed = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        parsed.map_err(|e| io::Error::other(format!("{attribute} of the pmem: '{text}': {e}")))
    };
    Ok((number("resource")?, number("size")?))
}

/// Takes the pmem from its block driver.
pub fn unbind_pmem() -> io::Result<()> {
    drive(ND, "nd_pmem", "unbind", NAMESPACE)
}

/// Binds the pmem to its block driver again.
pub fn bind_pmem() -> io::Result<()> {
    drive(ND, "nd_pmem", "bind", NAMESPACE)
}

/// A device-dax. Dropping it restores the pmem.
pub struct Dax {
    /// The dax device on the bus nd that has the namespace.
    claim: String,
    /// Its child on the bus dax.
    name: String,
    /// The physical address of the first page.
    start: u64,
    bytes: u64,
    align: usize,
}

/// Writes an attribute in one call.
fn put(path: impl AsRef<Path>, text: &str) -> io::Result<()> {
    let path = path.as_ref();
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    File::options()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(named)
}

/// Reads an attribute without its end of line.
fn get(path: impl AsRef<Path>) -> io::Result<String> {
    let path = path.as_ref();
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let text = fs::read_to_string(path).map_err(named)?;
    Ok(text.trim().to_string())
}

/// The device `name` on the bus nd.
fn nd(name: &str) -> PathBuf {
    [ND, "devices", name].iter().collect()
}

/// Binds a device to a driver, or unbinds it.
fn drive(bus: &str, driver: &str, action: &str, name: &str) -> io::Result<()> {
    put(format!("{bus}/drivers/{driver}/{action}"), name)
}

fn has_driver(device: &Path) -> bool {
    device.join("driver").exists()
}

/// The dax devices on the bus nd.
fn claims() -> io::Result<Vec<String>> {
    let entries = fs::read_dir(format!("{ND}/devices"))?;
    let names = entries.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()));
    Ok(names.filter(|n| n.starts_with("dax")).collect())
}

/// Makes a plain block device of the pmem again, whatever its present state.
fn restore() -> io::Result<()> {
    let mut claimed = false;
    for claim in claims()? {
        let device = nd(&claim);
        if has_driver(&device) {
            drive(ND, "dax_pmem", "unbind", &claim)?;
        }
        // A device that has just lost its namespace may already be gone.
        if get(device.join("namespace")).is_ok_and(|n| !n.is_empty()) {
            put(device.join("namespace"), "\n")?;
            claimed = true;
        }
    }
    let namespace = nd(NAMESPACE);
    if !claimed && has_driver(&namespace) {
        return Ok(());
    }
    if has_driver(&namespace) {
        drive(ND, "nd_pmem", "unbind", NAMESPACE)?;
    }
    // As long as the info block exists, nd_pmem would make a dax device again.
    put(namespace.join("force_raw"), "1")?;
    drive(ND, "nd_pmem", "bind", NAMESPACE)?;
    let wiped = wipe();
    put(namespace.join("force_raw"), "0")?;
    wiped
}

/// Clears the info block on the block device.
fn wipe() -> io::Result<()> {
    let mut pmem = Err(io::ErrorKind::NotFound.into());
    sys::wait_until(SETTLE, || {
        pmem = File::options().write(true).open(PMEM);
        pmem.is_ok()
    });
    let pmem = pmem?;
    pmem.write_all_at(&[0; PAGE], INFO)?;
    pmem.sync_all()
}

impl Dax {
    /// Makes a device-dax of the pmem. Skips the test if there is no pmem or the pmem does not
    /// support this alignment.
    #[track_caller]
    pub fn set_up(align: usize) -> Outcome<Self> {
        restore_pmem()?;
        let size = pmem_range().or_fail("size of the pmem")?.1 as usize;
        // The info block takes the first part.
        if size < 2 * align {
            return Err(Fail::Skip(format!(
                "{} MiB of pmem on this machine are too few",
                size >> 20
            )));
        }
        Self::claim(align).or_fail(&format!("a device-dax with an alignment of {align}"))
    }

    fn claim(align: usize) -> io::Result<Self> {
        let region = fs::canonicalize(nd(NAMESPACE))?
            .parent()
            .map(Path::to_path_buf)
            .ok_or(io::ErrorKind::NotFound)?;
        let claim = get(region.join("dax_seed"))?;
        drive(ND, "nd_pmem", "unbind", NAMESPACE)?;
        let device = nd(&claim);
        let done = || -> io::Result<()> {
            put(device.join("uuid"), &get("/proc/sys/kernel/random/uuid")?)?;
            put(device.join("align"), &align.to_string())?;
            put(device.join("mode"), "ram")?;
            put(device.join("namespace"), NAMESPACE)?;
            drive(ND, "dax_pmem", "bind", &claim)
        };
        let found = done().and_then(|()| Self::find(&device, &claim, align));
        if found.is_err() {
            // Report the first error only.
            let _ = restore();
        }
        found
    }

    /// Finds the child of a claim.
    fn find(device: &Path, claim: &str, align: usize) -> io::Result<Self> {
        let mut name = None;
        sys::wait_until(SETTLE, || {
            let entries = fs::read_dir(device).into_iter().flatten().flatten();
            let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
            // The child has the name of a node; its parent's group dax_region has not.
            let mut children =
                names.filter(|n| n.starts_with("dax") && device.join(n).join("dev").exists());
            name = children.next();
            name.as_ref()
                .is_some_and(|n| Path::new("/dev").join(n).exists())
        });
        let name = name.ok_or_else(|| io::Error::other(format!("no device below {claim}")))?;
        let child = device.join(&name);
        let number = |attribute: &str| -> io::Result<u64> {
            let text = get(child.join(attribute))?;
            let parsed = match text.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => text.parse(),
            };
            parsed.map_err(|e| io::Error::other(format!("{attribute} of {name}: '{text}': {e}")))
        };
        let (start, bytes) = (number("resource")?, number("size")?);
        if number("align")? != align as u64 || start % align as u64 != 0 {
            return Err(io::Error::other(format!(
                "{name} at {start:#x}: expected an alignment of {align:#x}, found another"
            )));
        }
        Ok(Self {
            claim: claim.to_string(),
            name,
            start,
            bytes,
            align,
        })
    }

    #[track_caller]
    pub fn open(&self) -> Outcome<File> {
        let path = Path::new("/dev").join(&self.name);
        let mut file = Err(io::ErrorKind::NotFound.into());
        // The node appears a little later than the driver.
        sys::wait_until(SETTLE, || {
            file = File::options().read(true).write(true).open(&path);
            file.is_ok()
        });
        file.or_fail(&path.display().to_string())
    }

    /// Makes a shared mapping of the first `pages` pages. The file need not stay open.
    #[track_caller]
    pub fn map(&self, pages: usize) -> Outcome<Buffer> {
        Buffer::shared(&self.open()?, pages)
    }

    /// The page frame number of the first page.
    pub fn frame(&self) -> u64 {
        self.start / PAGE as u64
    }

    /// The number of pages of the device.
    pub fn pages(&self) -> usize {
        (self.bytes / PAGE as u64) as usize
    }

    /// The number of pages that one fault maps.
    pub fn step(&self) -> usize {
        self.align / PAGE
    }

    /// Unbinds the device from device_dax. A kernel that can do so waits until no page is held.
    pub fn unbind(&self) -> io::Result<()> {
        drive(DAX, "device_dax", "unbind", &self.name)
    }

    /// Binds the device to device_dax again.
    pub fn bind(&self) -> io::Result<()> {
        drive(DAX, "device_dax", "bind", &self.name)
    }

    pub fn is_bound(&self) -> bool {
        has_driver(&nd(&self.claim).join(&self.name))
    }
}

impl Drop for Dax {
    fn drop(&mut self) {
        // A failed restore is tried again by the next test, which reports it.
        let _ = restore();
    }
}
