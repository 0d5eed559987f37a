// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers: an open device and its ioctls.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use crate::check::{Fail, OrFail, Outcome};
use crate::proc;
use crate::sys::{self, cvt};
use crate::uapi::*;

pub use crate::memory::{Buffer, HUGE_PAGES, PAGE, check_bytes, pattern_bytes};

/// An address which no process can have mapped: the first page is reserved by
/// vm.mmap_min_addr, which does not bind root, but nothing here maps it.
const NOWHERE: u64 = 8;

/// Where an ioctl finds or leaves data.
pub enum Data<'a> {
    /// A pointer to nothing.
    Nowhere,
    /// The kernel writes here; at least as long as the range of the command.
    Into(&'a mut [u8]),
    /// The kernel reads here; at least as long as the range of the command.
    From(&'a [u8]),
    /// The kernel reads or writes pages of a buffer, from this one on.
    At(&'a Buffer, usize),
}

/// What a command that copies data returned.
#[derive(Debug)]
pub struct Moved {
    pub data: Vec<u8>,
    pub cpages: u64,
    pub faults: u64,
}

/// One of the device nodes, open.
pub struct Device {
    file: File,
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

    pub fn try_open(n: usize) -> io::Result<Self> {
        let path = Self::path(n);
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file })
    }

    /// Maps pages of the driver, MAP_SHARED or MAP_PRIVATE.
    pub fn map(&self, pages: usize, flags: i32) -> io::Result<Buffer> {
        Buffer::of_file(&self.file, pages, flags)
    }

    /// Closes the file while others may be in the middle of commands; from now on all commands fail.
    pub fn close_under_all(&self) -> io::Result<()> {
        sys::close_under(&self.file)
    }

    /// Any ioctl with any bytes as its argument, which are written back.
    ///
    /// `arg` is at least as long as the size within `request`. A pointer in
    /// the bytes points to nothing, or to a `Buffer`.
    pub fn ioctl_bytes(&self, request: u64, arg: &mut [u8]) -> io::Result<()> {
        let size = (request >> 16) as usize & 0x3fff;
        if arg.len() < size {
            return Err(io::Error::other("argument shorter than its ioctl says"));
        }
        self.ioctl(request, arg.as_mut_ptr() as usize)
    }

    /// Any ioctl with an argument pointer that points to nothing.
    pub fn ioctl_nowhere(&self, request: u64) -> io::Result<()> {
        self.ioctl(request, NOWHERE as usize)
    }

    /// Repeats a call that a signal interrupted, as upstream's tests do.
    fn ioctl(&self, request: u64, arg: usize) -> io::Result<()> {
        loop {
            // SAFETY: the callers above and below pass the address of memory that
            // is long enough for `request` and theirs to write, or an address
            // where nothing is mapped.
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

    /// One of upstream's commands, on any range. Memory below `addr` is either a
    /// `Buffer`, whose accesses are all volatile, or not mapped.
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
            // Garbage, so that a driver which leaves them alone is seen.
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

    /// Moves pages to the device; returns their data as the device sees it.
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

    /// The same, but who provides the pages may take his time.
    pub fn read_unlocked(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Moved> {
        self.fetch(HMM_READ_UNLOCKED, buf, first, n)
    }

    /// The device writes whole pages of `data`.
    pub fn write(&self, buf: &Buffer, first: usize, data: &[u8]) -> io::Result<HmmCmd> {
        let n = (data.len() / PAGE) as u64;
        self.command(HMM_WRITE, buf.at(first), n, Data::From(data))
    }

    /// The device faults a range in without copying data; returns the pages that it
    /// maps now.
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

    /// Lets a CPU fault on this file's pages bring up to `pages` back; returns what was set before.
    pub fn fault_around(&self, pages: u32) -> io::Result<u32> {
        self.fault_around_with(pages, 0)
    }

    /// The same with flags, of which there are none.
    pub fn fault_around_with(&self, pages: u32, flags: u32) -> io::Result<u32> {
        let mut around = FaultAround { pages, flags };
        self.ioctl_struct(ZDM_FAULT_AROUND, &mut around)?;
        Ok(around.pages)
    }

    /// Gives the device exclusive access to pages; returns their data.
    pub fn exclusive(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Moved> {
        self.fetch(HMM_EXCLUSIVE, buf, first, n)
    }

    /// An error, EPERM, if the device has exclusive access to one of the pages.
    pub fn check_exclusive(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<()> {
        let (addr, n) = (buf.at(first), n as u64);
        self.command(HMM_CHECK_EXCLUSIVE, addr, n, Data::Nowhere)
            .map(drop)
    }

    /// Looks at the entries of pages without faulting; one of `PROT_*` for each.
    pub fn snapshot(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Vec<u8>> {
        // Garbage, so that an entry which is left out is seen.
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

    /// A command that wants a good range only because all of them do: nothing is
    /// done there.
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

    /// Sees to it that no page of a buffer waits for a list in the batch of a CPU while it is on
    /// another one: such a page cannot be moved.
    ///
    /// A migration drains the batches of its own CPU only, unless it meets a page that is on no
    /// list, as new ones are. MADV_FREE puts pages in a batch, and so does get_user_pages() the
    /// second time, which activates them; and the thread may have gone to another CPU since.
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

    /// Moves all of a buffer which holds the pattern of `seed` to the device, and
    /// checks that every page went and that the device has the right data.
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

    /// Scans the device; returns the counts and the records. Every reference counts, unless the
    /// caller may not ask for that.
    #[track_caller]
    pub fn audit(&self) -> Outcome<(Audit, Vec<Violation>)> {
        match self.try_audit(ZDM_AUDIT_QUIET) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => self.try_audit(0),
            result => result,
        }
        .or_fail("ZDM_AUDIT")
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

    /// Scans with a request that may be wrong. `records` is 0 or points to
    /// nothing.
    pub fn audit_with(&self, audit: &mut Audit) -> io::Result<()> {
        self.ioctl_struct(ZDM_AUDIT, audit)
    }

    /// Looks at pages of the mirrored process by address.
    pub fn inspect(&self, buf: &Buffer, first: usize, n: usize) -> io::Result<Vec<PageInfo>> {
        self.inspect_at(buf.at(first), n, 0)
    }

    /// Looks at one page of the mirrored process.
    #[track_caller]
    pub fn inspect_one(&self, buf: &Buffer, page: usize) -> Outcome<PageInfo> {
        let pages = self.inspect(buf, page, 1).or_fail("ZDM_INSPECT")?;
        Ok(pages[0])
    }

    /// Looks at page frames of ZONE_DEVICE memory, as many as are wanted.
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

    /// Looks at pages, with what may be no address and flags that there may not be.
    pub fn inspect_at(&self, addr: u64, n: usize, flags: u32) -> io::Result<Vec<PageInfo>> {
        // Garbage, so that a page which is left out is seen.
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
        Ok(pages)
    }

    /// Asks with a request that may be wrong. `pages` is 0 or points to nothing, or
    /// to a `Buffer` with room.
    pub fn inspect_with(&self, inspect: &mut Inspect) -> io::Result<()> {
        self.ioctl_struct(ZDM_INSPECT, inspect)
    }

    /// Holds pages of the calling process; returns what `unpin` wants.
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

    /// Lets go of what `pin` holds.
    pub fn unpin(&self, id: u32, flags: u32) -> io::Result<()> {
        self.ioctl_struct(ZDM_UNPIN, &mut Unpin { id, flags })
    }

    /// Breaks an invariant; returns the page frame number that was touched.
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
