// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers: an open device and its ioctls.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr;

use crate::check::{Fail, OrFail, Outcome};
use crate::check_eq;
use crate::proc;
use crate::sys::{self, cvt};
use crate::uapi::*;

pub use crate::memory::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};

/// An address that no process has mapped: vm.mmap_min_addr reserves the first page. Root could map
/// it, but no test does.
const NOWHERE: u64 = 8;

/// The memory from which an ioctl reads data, or to which it writes.
pub enum Data<'a> {
    /// A pointer to nothing.
    Nowhere,
    /// The kernel writes to this slice, which is at least as long as the range of the command.
    Into(&'a mut [u8]),
    /// The kernel reads this slice, which is at least as long as the range of the command.
    From(&'a [u8]),
    /// The kernel reads or writes pages of a buffer, from this page on.
    At(&'a Buffer, usize),
}

/// The result of a command that copies data.
#[derive(Debug)]
pub struct Moved {
    pub data: Vec<u8>,
    pub cpages: u64,
    pub faults: u64,
}

/// An open device node.
pub struct Device {
    file: File,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Device {
    /// Path of node `n`.
    pub fn path(n: usize) -> String {
        format!("/dev/hmm_dmirror{n}")
    }

    #[track_caller]
    pub fn open(n: usize) -> Outcome<Self> {
        Self::try_open(n).or_fail(&format!("open {}", Self::path(n)))
    }

    /// Opens a node that is not at the usual place.
    #[track_caller]
    pub fn open_at(path: &Path) -> Outcome<Self> {
        Self::try_open_at(path).or_fail(&format!("open {}", path.display()))
    }

    pub fn try_open(n: usize) -> io::Result<Self> {
        Self::try_open_at(Path::new(&Self::path(n)))
    }

    fn try_open_at(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file })
    }

    /// A device whose file another process has opened.
    pub fn of_file(file: File) -> Self {
        Self { file }
    }

    /// The open file.
    pub fn into_file(self) -> File {
        self.file
    }

    /// Maps pages of the driver, with MAP_SHARED or MAP_PRIVATE.
    pub fn map(&self, pages: usize, flags: i32) -> io::Result<Buffer> {
        Buffer::of_file(&self.file, pages, flags)
    }

    /// As [`Device::map`], from any offset, with any flags but MAP_FIXED.
    pub fn map_at(&self, pages: usize, flags: i32, offset: i64) -> io::Result<Buffer> {
        Buffer::of_file_at(&self.file, pages, flags, offset)
    }

    /// Closes the file while other threads may be executing commands on it. Later commands fail.
    pub fn close_under_all(&self) -> io::Result<()> {
        sys::close_under(&self.file)
    }

    /// Executes any ioctl with any bytes as its argument. The kernel may write to the bytes.
    ///
    /// `arg` is at least as long as the size within `request`. A pointer in the bytes points to
    /// nothing, or to a `Buffer`.
    pub fn ioctl_bytes(&self, request: u64, arg: &mut [u8]) -> io::Result<()> {
        let size = (request >> 16) as usize & 0x3fff;
        if arg.len() < size {
            return Err(io::Error::other("argument shorter than its ioctl says"));
        }
        self.ioctl(request, arg.as_mut_ptr() as usize)
    }

    /// Executes any ioctl whose argument is a page of a buffer.
    pub fn ioctl_in(&self, request: u64, buf: &Buffer, page: usize) -> io::Result<()> {
        if page >= buf.pages() {
            return Err(io::Error::other("argument out of the buffer"));
        }
        self.ioctl(request, buf.at(page) as usize)
    }

    /// Executes any ioctl whose argument begins at a byte of a buffer, in which it may end where nothing is
    /// mapped.
    pub fn ioctl_within(&self, request: u64, buf: &Buffer, byte: usize) -> io::Result<()> {
        let size = (request >> 16) as usize & 0x3fff;
        if byte + size > buf.pages() * PAGE {
            return Err(io::Error::other("argument out of the buffer"));
        }
        self.ioctl(request, buf.at(0) as usize + byte)
    }

    /// Executes any ioctl whose argument is at an address that is not of user space.
    pub fn ioctl_at(&self, request: u64, address: u64) -> io::Result<()> {
        match address < 0x7fff_ffff_f000 {
            true => Err(io::Error::other("an address of user space")),
            false => self.ioctl(request, address as usize),
        }
    }

    /// Executes any ioctl with an argument pointer that points to nothing.
    pub fn ioctl_nowhere(&self, request: u64) -> io::Result<()> {
        self.ioctl(request, NOWHERE as usize)
    }

    /// Repeats a call that a signal interrupted, as upstream's tests do.
    fn ioctl(&self, request: u64, arg: usize) -> io::Result<()> {
        loop {
            // SAFETY: The callers pass the address of memory that is long enough for `request` and
            // that the kernel may write, or an address where nothing is mapped.
            let ret = unsafe { libc::ioctl(self.file.as_raw_fd(), request, arg) };
            match cvt(ret.into()) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn ioctl_struct<T: Copy>(&self, request: u64, arg: &mut T) -> io::Result<()> {
        self.ioctl(request, ptr::from_mut(arg) as usize)
    }

    /// Executes one of upstream's commands on any range. The memory at `addr` is either a `Buffer`,
    /// whose accesses are all volatile, or not mapped.
    pub fn command(
        &self,
        request: u64,
        addr: u64,
        npages: u64,
        data: Data<'_>,
    ) -> io::Result<HmmCmd> {
        let (ptr, len) = match data {
            Data::Nowhere => (NOWHERE, usize::MAX),
            Data::Into(b) => (b.as_mut_ptr() as u64, b.len()),
            Data::From(b) => (b.as_ptr() as u64, b.len()),
            Data::At(b, first) => (b.at(first), (b.pages() - first) * PAGE),
        };
        if npages > (len / PAGE) as u64 && ptr != NOWHERE {
            return Err(io::Error::other("data shorter than the range"));
        }
        let mut cmd = HmmCmd {
            addr,
            ptr,
            npages,
            // Garbage, to notice a driver that does not write the fields.
            cpages: 0x5a5a_5a5a,
            faults: 0x5a5a_5a5a,
        };
        self.ioctl_struct(request, &mut cmd)?;
        Ok(cmd)
    }

    fn fetch(&self, request: u64, buf: &Buffer, first: usize, n: usize) -> io::Result<Moved> {
        let mut data = vec![0xa5; n * PAGE];
        let cmd = self.command(request, buf.at(first), n as u64, Data::Into(&mut data))?;
        Ok(Moved {
            data,
            cpages: cmd.cpages,
            faults: cmd.faults,
        })
    }

    /// Moves pages to the device. Returns their data as the device reads it.
    pub fn to_device(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Moved> {
        self.fetch(HMM_MIGRATE_TO_DEV, buf, first, n)
    }

    /// Moves pages to system memory.
    pub fn to_system(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<HmmCmd> {
        self.command(HMM_MIGRATE_TO_SYS, buf.at(first), n as u64, Data::Nowhere)
    }

    /// The device reads pages.
    pub fn read(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Moved> {
        self.fetch(HMM_READ, buf, first, n)
    }

    /// As `read`, but waits for a process that provides missing pages.
    pub fn read_unlocked(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Moved> {
        self.fetch(HMM_READ_UNLOCKED, buf, first, n)
    }

    /// The device writes whole pages of `data`.
    pub fn write(&self, buf: &Buffer, first: usize, data: &[u8]) -> io::Result<HmmCmd> {
        let n = (data.len() / PAGE) as u64;
        self.command(HMM_WRITE, buf.at(first), n, Data::From(data))
    }

    /// Lets the device fault a range in without copying data. Returns the number of pages that it
    /// then maps.
    pub fn fault(&self, addr: u64, npages: u64, flags: u32) -> io::Result<u64> {
        let mut fault = Fault {
            addr,
            npages,
            flags,
            ..Fault::default()
        };
        self.ioctl_struct(ZDM_FAULT, &mut fault)?;
        Ok(fault.mapped)
    }

    /// Lets a CPU fault on this file's pages bring back up to `pages` pages. Returns the previous
    /// setting.
    pub fn fault_around(&self, pages: u32) -> io::Result<u32> {
        self.fault_around_with(pages, 0)
    }

    /// As `fault_around`, with flags, of which none is defined.
    pub fn fault_around_with(&self, pages: u32, flags: u32) -> io::Result<u32> {
        let mut around = FaultAround { pages, flags };
        self.ioctl_struct(ZDM_FAULT_AROUND, &mut around)?;
        Ok(around.pages)
    }

    /// Gives the device exclusive access to pages. Returns their data.
    pub fn exclusive(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Moved> {
        self.fetch(HMM_EXCLUSIVE, buf, first, n)
    }

    /// Returns EPERM if the device has exclusive access to one of the pages.
    pub fn check_exclusive(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        let (addr, n) = (buf.at(first), n as u64);
        self.command(HMM_CHECK_EXCLUSIVE, addr, n, Data::Nowhere)
            .map(drop)
    }

    /// Reads the entries of pages without faulting. Returns one of `PROT_*` for each page.
    pub fn snapshot(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Vec<u8>> {
        // Garbage, to notice an entry that is not written.
        let mut kinds = vec![0xa5; n];
        let mut cmd = HmmCmd {
            addr: buf.at(first),
            ptr: kinds.as_mut_ptr() as u64,
            npages: n as u64,
            ..HmmCmd::default()
        };
        self.ioctl_struct(HMM_SNAPSHOT, &mut cmd)?;
        match cmd.cpages == n as u64 {
            true => Ok(kinds),
            false => Err(io::Error::other(format!(
                "SNAPSHOT says it took {} of {n} pages",
                cmd.cpages
            ))),
        }
    }

    /// Executes a command that does not use its range, but requires a valid one as all commands do.
    fn bare_command(&self, request: u64, npages: u64) -> io::Result<()> {
        let addr = PAGE as u64;
        self.command(request, addr, npages, Data::Nowhere).map(drop)
    }

    /// The device gives up its memory.
    pub fn release(&self) -> io::Result<()> {
        self.bare_command(HMM_RELEASE, 1)
    }

    /// Lets the next allocation for a migration through this file fail.
    #[track_caller]
    pub fn fail_alloc(&self) -> Outcome {
        self.bare_command(HMM_FLAGS, HMM_FLAG_FAIL_ALLOC)
            .or_fail("FLAGS")
    }

    /// Makes sure that no page of a buffer waits in the batch of another CPU, because such a page
    /// cannot be moved.
    ///
    /// A migration drains only the batches of its own CPU, unless it meets a page that is on no
    /// list, such as a new one. MADV_FREE puts pages into a batch, and so does the second
    /// get_user_pages(), which activates them; the thread may have moved to another CPU since.
    #[track_caller]
    pub fn drain_held(&self, buf: &Buffer) -> Outcome {
        let held = |p: &PageInfo| p.flags & ZDM_PAGE_LRU != 0 && p.refs > p.mapcount;
        for first in (0..buf.pages()).step_by(ZDM_INSPECT_MAX_PAGES) {
            let n = (buf.pages() - first).min(ZDM_INSPECT_MAX_PAGES);
            let pages = self.inspect(buf, first, n).or_fail("ZDM_INSPECT")?;
            if pages.iter().any(held) {
                return proc::drain_batches();
            }
        }
        Ok(())
    }

    /// Moves a whole buffer that holds the pattern of `seed` to the device. Checks that every page
    /// moved and that the device has the right data.
    #[track_caller]
    pub fn move_all(&self, buf: &Buffer, seed: u64) -> Outcome {
        let n = buf.pages();
        self.drain_held(buf)?;
        let before = self.stats()?;
        let moved = self
            .to_device(buf, 0, n)
            .or_fail("MIGRATE_TO_DEV of the whole buffer")?;
        check_bytes(&moved.data, seed, 0, "data that MIGRATE_TO_DEV returned")?;
        let here = std::panic::Location::caller();
        let differ = |what: &str, found: u64| Fail::Failed {
            at: here,
            what: format!("{what}: expected {n}, found {found}"),
        };
        if moved.cpages != n as u64 {
            return Err(differ(
                "pages that MIGRATE_TO_DEV says it copied",
                moved.cpages,
            ));
        }
        let went = self.stats()?.to_device.wrapping_sub(before.to_device);
        if went != n as u64 {
            return Err(differ("growth of stats.to_device", went));
        }
        let away = proc::on_device(buf, 0, n)?.len();
        if away != n {
            return Err(differ("device pages in /proc/self/pagemap", away as u64));
        }
        Ok(())
    }

    #[track_caller]
    pub fn stats(&self) -> Outcome<Stats> {
        let mut stats = Stats::default();
        self.ioctl_struct(ZDM_STATS, &mut stats)
            .or_fail("ZDM_STATS")?;
        Ok(stats)
    }

    /// Scans the device. Returns the counts and the records. Every reference counts, unless the
    /// caller lacks the capability to ask for that.
    #[track_caller]
    pub fn audit(&self) -> Outcome<(Audit, Vec<Violation>)> {
        match self.try_audit(ZDM_AUDIT_QUIET) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => self.try_audit(0),
            result => result,
        }
        .or_fail("ZDM_AUDIT")
    }

    /// Scans the device and checks that it has counted no more violations than `before`. Returns the
    /// counts.
    #[track_caller]
    pub fn expect_violations(&self, before: u64) -> Outcome<Audit> {
        let (audit, records) = self.audit()?;
        check_eq!(audit.total, before, "violations, {records:x?}");
        Ok(audit)
    }

    pub fn try_audit(&self, flags: u32) -> io::Result<(Audit, Vec<Violation>)> {
        let mut records = vec![Violation::default(); ZDM_AUDIT_MAX_RECORDS];
        let mut audit = Audit {
            records: records.as_mut_ptr() as u64,
            nr_records: ZDM_AUDIT_MAX_RECORDS as u32,
            flags,
            record_size: size_of::<Violation>() as u32,
            ..Audit::default()
        };
        self.ioctl_struct(ZDM_AUDIT, &mut audit)?;
        records.truncate(audit.nr_records as usize);
        Ok((audit, records))
    }

    /// Scans with a request that may be invalid. `records` is 0 or points to nothing.
    pub fn audit_with(&self, audit: &mut Audit) -> io::Result<()> {
        self.ioctl_struct(ZDM_AUDIT, audit)
    }

    /// Inspects pages of the mirrored process by address.
    pub fn inspect(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Vec<PageInfo>> {
        self.inspect_at(buf.at(first), n, 0)
    }

    /// Inspects one page of the mirrored process.
    #[track_caller]
    pub fn inspect_one(&self, buf: &Buffer, page: usize) -> Outcome<PageInfo> {
        let pages = self.inspect(buf, page, 1).or_fail("ZDM_INSPECT")?;
        Ok(pages[0])
    }

    /// Inspects any number of page frames of ZONE_DEVICE memory.
    #[track_caller]
    pub fn inspect_frames(&self, first: u64, n: usize) -> Outcome<Vec<PageInfo>> {
        let mut pages = Vec::with_capacity(n);
        while pages.len() < n {
            let part = (n - pages.len()).min(ZDM_INSPECT_MAX_PAGES);
            let from = first + pages.len() as u64;
            let found = self
                .inspect_at(from, part, ZDM_INSPECT_PFN)
                .or_fail("ZDM_INSPECT of page frames")?;
            pages.extend(found);
        }
        Ok(pages)
    }

    /// Inspects pages; the address and the flags may be invalid.
    pub fn inspect_at(&self, addr: u64, n: usize, flags: u32) -> io::Result<Vec<PageInfo>> {
        // Garbage, to notice a page that is not written.
        let garbage = PageInfo {
            pfn: u64::MAX,
            refs: i32::MIN,
            mapcount: i32::MIN,
            pins: i32::MIN,
            order: u32::MAX,
            kind: u32::MAX,
            owner: u32::MAX,
            flags: u32::MAX,
            index: u32::MAX,
        };
        let mut pages = vec![garbage; n];
        let mut inspect = Inspect {
            addr,
            npages: n as u64,
            pages: pages.as_mut_ptr() as u64,
            flags,
            reserved: 0,
        };
        self.ioctl_struct(ZDM_INSPECT, &mut inspect)?;
        // Each page that any test looks at must say itself where it is.
        match pages.iter().position(|p| p.flags & ZDM_PAGE_MISPLACED != 0) {
            Some(at) => Err(io::Error::other(format!(
                "the folio of page {at} names another place than that where it is mapped: {:x?}",
                pages[at]
            ))),
            None => Ok(pages),
        }
    }

    /// Inspects with a request that may be invalid. `pages` is 0, or points to nothing or to a
    /// `Buffer` with room.
    pub fn inspect_with(&self, inspect: &mut Inspect) -> io::Result<()> {
        self.ioctl_struct(ZDM_INSPECT, inspect)
    }

    /// Pins pages of the calling process. Returns the id for `unpin`.
    pub fn pin(&self, buf: &Buffer, first: usize, n: usize, flags: u32) -> io::Result<u32> {
        self.pin_at(buf.at(first), n as u64, flags)
    }

    pub fn pin_at(&self, addr: u64, npages: u64, flags: u32) -> io::Result<u32> {
        let mut pin = Pin {
            addr,
            npages,
            flags,
            id: u32::MAX,
        };
        self.ioctl_struct(ZDM_PIN, &mut pin)?;
        Ok(pin.id)
    }

    /// Releases the pages of a pin.
    pub fn unpin(&self, id: u32, flags: u32) -> io::Result<()> {
        self.ioctl_struct(ZDM_UNPIN, &mut Unpin { id, flags })
    }

    /// Breaks an invariant. Returns the page frame number of the changed page.
    pub fn inject(&self, kind: u32, addr: u64) -> io::Result<u64> {
        let mut inject = Inject {
            kind,
            addr,
            ..Inject::default()
        };
        self.ioctl_struct(ZDM_INJECT, &mut inject)?;
        Ok(inject.pfn)
    }
}
