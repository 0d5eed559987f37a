// SPDX-License-Identifier: GPL-2.0

//! The ioctls. All arguments are checked before anything is done.

#![forbid(unsafe_code)]

use crate::{
    audit::Moment,
    driver::{
        client::{
            inspect::describe_frames,
            open_file::Client,
            rw::{
                Faulting,
                Outcome, //
            },
        },
        fault_around::streams::Most, //
    },
    mm::{
        hmm::{
            access::Access,
            inspect::MAX_PFNS, //
        },
        region::owner::PgmapOwner,
        user::{
            pin::{
                Hold,
                PinRequest, //
            },
            range::PageRange, //
        },
        PAGE_SIZE, //
    },
    params::param_strict,
    uapi::{
        self,
        as_bytes_mut,
        is_admin,
        HmmCmd,
        UapiStruct,
        ZdmAudit,
        ZdmFault,
        ZdmFaultAround,
        ZdmInject,
        ZdmInspect,
        ZdmPage,
        ZdmPin,
        ZdmUnpin, //
    },
};
use core::{
    mem::size_of,
    ops::Range, //
};
use kernel::{
    ioctl::{
        _IOC_NR,
        _IOC_SIZE,
        _IOC_TYPE, //
    },
    prelude::*,
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceWriter, //
    }, //
};

/// Zeroes for the fields that user space has and this module does not know.
const NOTHING: [u8; 64] = [0; 64];

/// The range that a command is about.
///
/// # Errors
///
/// As [`PageRange::new`].
fn user_range(addr: u64, npages: u64) -> Result<PageRange> {
    let start = usize::try_from(addr).map_err(|_| EINVAL)?;
    PageRange::new(start, usize::try_from(npages).map_err(|_| EINVAL)?)
}

/// The page frames that a command is about.
///
/// # Errors
///
/// `EINVAL` when there are none, or not so many.
fn frame_range(first: u64, npages: u64) -> Result<Range<usize>> {
    let end = first.checked_add(npages).ok_or(EINVAL)?;
    if npages == 0 || end > MAX_PFNS as u64 {
        return Err(EINVAL);
    }
    // CAST: `usize` has 64 bits.
    Ok(first as usize..end as usize)
}

/// Converts the flags of `ZDM_PIN`; `EINVAL` for flags that are unknown or exclude each other.
fn pin_request(flags: u32) -> Result<PinRequest> {
    let has = |flag| flags & flag != 0;
    let known =
        uapi::ZDM_PIN_WRITE | uapi::ZDM_PIN_GET | uapi::ZDM_PIN_LONGTERM | uapi::ZDM_PIN_FAST;
    if has(!known) {
        return Err(EINVAL);
    }
    Ok(PinRequest {
        hold: match (has(uapi::ZDM_PIN_GET), has(uapi::ZDM_PIN_LONGTERM)) {
            (false, false) => Hold::Pin,
            (false, true) => Hold::LongTerm,
            (true, false) => Hold::Get,
            (true, true) => return Err(EINVAL),
        },
        write: has(uapi::ZDM_PIN_WRITE),
        fast: has(uapi::ZDM_PIN_FAST),
    })
}

/// Converts a user address of the uapi.
fn user_ptr(ptr: u64) -> Result<UserPtr> {
    Ok(UserPtr::from_addr(
        usize::try_from(ptr).map_err(|_| EINVAL)?,
    ))
}

/// Reads a structure whose size is its version, as `copy_struct_from_user()` does: missing fields
/// are zero, and additional bytes must be zero.
fn read_versioned<T: UapiStruct>(cmd: u32, arg: usize) -> Result<T> {
    let size = _IOC_SIZE(cmd);
    let known = size.min(size_of::<T>());
    let mut value = T::default();
    let mut reader = UserSlice::new(UserPtr::from_addr(arg), size).reader();
    reader.read_slice(&mut as_bytes_mut(&mut value)[..known])?;
    let mut rest = [0u8; 64];
    while !reader.is_empty() {
        let n = reader.len().min(rest.len());
        reader.read_slice(&mut rest[..n])?;
        if rest[..n].iter().any(|&byte| byte != 0) {
            return Err(E2BIG);
        }
    }
    Ok(value)
}

/// Writes the fields of a structure that user space knows.
fn write_versioned<T: UapiStruct>(cmd: u32, arg: usize, value: &mut T) -> Result {
    let known = _IOC_SIZE(cmd).min(size_of::<T>());
    UserSlice::new(UserPtr::from_addr(arg), known)
        .writer()
        .write_slice(&as_bytes_mut(value)[..known])
}

/// Whether `cmd` is `known`, for any size of its structure.
fn is_versioned(cmd: u32, known: u32) -> bool {
    _IOC_TYPE(cmd) == _IOC_TYPE(known) && _IOC_NR(cmd) == _IOC_NR(known) && _IOC_SIZE(cmd) != 0
}

/// Reads the argument of `ZDM_INSPECT`.
fn read_inspect(cmd: u32, arg: usize) -> Result<ZdmInspect> {
    let args: ZdmInspect = read_versioned(cmd, arg)?;
    let too_many = args.npages > u64::from(uapi::ZDM_INSPECT_MAX_PAGES);
    if args.reserved != 0 || args.flags & !uapi::ZDM_INSPECT_PFN != 0 || too_many {
        return Err(EINVAL);
    }
    Ok(args)
}

/// Where the descriptions of `pages` pages are written to.
fn page_writer(args: &ZdmInspect, pages: usize) -> Result<UserSliceWriter> {
    let out = user_ptr(args.pages)?;
    Ok(UserSlice::new(out, pages * size_of::<ZdmPage>()).writer())
}

/// `ZDM_INSPECT` of page frames.
fn inspect_frames(args: &ZdmInspect, owner: &PgmapOwner) -> Result {
    if !is_admin() {
        return Err(EPERM);
    }
    let frames = frame_range(args.addr, args.npages)?;
    let out = page_writer(args, frames.len())?;
    describe_frames(frames, owner, out)
}

/// All ioctls of the node that belongs to no device: `ZDM_INSPECT` of page frames. May sleep.
///
/// # Errors
///
/// `ENOTTY` for another command, `EINVAL` for addresses, which this node has none of, and those of
/// [`describe_frames`].
pub(super) fn without_device(cmd: u32, arg: usize, owner: &PgmapOwner) -> Result {
    if !is_versioned(cmd, uapi::ZDM_INSPECT) {
        return Err(ENOTTY);
    }
    let args = read_inspect(cmd, arg)?;
    if args.flags & uapi::ZDM_INSPECT_PFN == 0 {
        return Err(EINVAL);
    }
    inspect_frames(&args, owner)
}

impl Client {
    /// All ioctls.
    pub(super) fn dispatch(&self, cmd: u32, arg: usize) -> Result {
        // A test that holds an invalidation looks at it meanwhile: the check would wait for its end.
        if !param_strict() || is_versioned(cmd, uapi::ZDM_INJECT) {
            return self.command(cmd, arg);
        }
        // Check before the command, because it may replace a wrong entry.
        self.check_mirror();
        let result = self.command(cmd, arg);
        self.check_mirror();
        if matches!(
            cmd,
            uapi::HMM_DMIRROR_MIGRATE_TO_DEV
                | uapi::HMM_DMIRROR_MIGRATE_TO_SYS
                | uapi::HMM_DMIRROR_RELEASE
        ) {
            self.device().check_mappings();
        }
        result
    }

    fn command(&self, cmd: u32, arg: usize) -> Result {
        match cmd {
            uapi::HMM_DMIRROR_READ
            | uapi::HMM_DMIRROR_WRITE
            | uapi::HMM_DMIRROR_MIGRATE_TO_DEV
            | uapi::HMM_DMIRROR_MIGRATE_TO_SYS
            | uapi::HMM_DMIRROR_SNAPSHOT
            | uapi::HMM_DMIRROR_EXCLUSIVE
            | uapi::HMM_DMIRROR_CHECK_EXCLUSIVE
            | uapi::HMM_DMIRROR_RELEASE
            | uapi::HMM_DMIRROR_READ_UNLOCKED => self.upstream(cmd, arg),
            uapi::HMM_DMIRROR_FLAGS => self.flags(arg),
            _ if is_versioned(cmd, uapi::ZDM_FAULT) => self.zdm_fault(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_FAULT_AROUND) => self.zdm_fault_around(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_INSPECT) => self.zdm_inspect(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_AUDIT) => self.audit(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_PIN) => self.zdm_pin(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_UNPIN) => self.zdm_unpin(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_INJECT) => self.zdm_inject(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_STATS) => self.stats(cmd, arg),
            _ => Err(ENOTTY),
        }
    }

    /// The commands of `test_hmm_uapi.h` that take a range.
    fn upstream(&self, cmd: u32, arg: usize) -> Result {
        let user = UserSlice::new(UserPtr::from_addr(arg), size_of::<HmmCmd>());
        let (mut reader, mut writer) = user.reader_writer();
        let mut args: HmmCmd = reader.read()?;
        let range = user_range(args.addr, args.npages)?;
        let ptr = user_ptr(args.ptr)?;
        let moves = matches!(
            cmd,
            uapi::HMM_DMIRROR_MIGRATE_TO_DEV | uapi::HMM_DMIRROR_MIGRATE_TO_SYS
        );
        let wanted = moves && param_strict();
        let before = wanted.then(|| self.mirror().picture(range)).flatten();
        let outcome = self.range_command(cmd, range, ptr);
        if let Some(before) = &before {
            self.check_in_place(before);
        }
        let outcome = outcome?;
        args.cpages = outcome.pages as u64;
        args.faults = outcome.faults as u64;
        writer.write(&args)
    }

    /// Executes such a command.
    fn range_command(&self, cmd: u32, range: PageRange, ptr: UserPtr) -> Result<Outcome> {
        Ok(match cmd {
            uapi::HMM_DMIRROR_READ => self.read(range, ptr, Faulting::Locked)?,
            uapi::HMM_DMIRROR_READ_UNLOCKED => self.read(range, ptr, Faulting::Unlocked)?,
            uapi::HMM_DMIRROR_WRITE => self.write(range, ptr)?,
            uapi::HMM_DMIRROR_MIGRATE_TO_DEV => self.migrate_to_dev(range, ptr)?,
            uapi::HMM_DMIRROR_MIGRATE_TO_SYS => Outcome::pages(self.to_system(range)?),
            uapi::HMM_DMIRROR_SNAPSHOT => Outcome::pages(self.snapshot(range, ptr)?),
            uapi::HMM_DMIRROR_EXCLUSIVE => self.exclusive(range, ptr)?,
            uapi::HMM_DMIRROR_CHECK_EXCLUSIVE => self.check_exclusive(range)?,
            uapi::HMM_DMIRROR_RELEASE => {
                self.device().release_memory()?;
                Outcome::default()
            }
            _ => return Err(ENOTTY),
        })
    }

    /// Migrates `range` to the device, and reads it back from there. Fails unless the whole range
    /// is on the device.
    fn migrate_to_dev(&self, range: PageRange, ptr: UserPtr) -> Result<Outcome> {
        // The device maps all pages on it. Some may have been there before.
        let mapped = self.to_device(range)?;
        if mapped < range.pages() && self.mirror().refresh(range)? < range.pages() {
            return Err(ENOENT);
        }
        self.read(range, ptr, Faulting::Never)
    }

    /// `HMM_DMIRROR_FLAGS`, whose flags take the place of the number of pages. As in the C driver a
    /// number that is no range is refused, which includes 0: a flag cannot be taken back.
    fn flags(&self, arg: usize) -> Result {
        let user = UserSlice::new(UserPtr::from_addr(arg), size_of::<HmmCmd>());
        let (mut reader, mut writer) = user.reader_writer();
        let mut args: HmmCmd = reader.read()?;
        user_range(args.addr, args.npages)?;
        if args.npages != u64::from(uapi::HMM_DMIRROR_FLAG_FAIL_ALLOC) {
            return Err(EINVAL);
        }
        self.fail_next_alloc()?;
        args.cpages = 0;
        args.faults = 0;
        writer.write(&args)
    }

    fn zdm_fault(&self, cmd: u32, arg: usize) -> Result {
        let mut args: ZdmFault = read_versioned(cmd, arg)?;
        if args.reserved != 0 || args.flags & !uapi::ZDM_FAULT_WRITE != 0 {
            return Err(EINVAL);
        }
        let access = if args.flags & uapi::ZDM_FAULT_WRITE != 0 {
            Access::Write
        } else {
            Access::Read
        };
        self.fault(user_range(args.addr, args.npages)?, access)?;
        args.mapped = args.npages;
        write_versioned(cmd, arg, &mut args)
    }

    fn zdm_fault_around(&self, cmd: u32, arg: usize) -> Result {
        let mut args: ZdmFaultAround = read_versioned(cmd, arg)?;
        if args.flags != 0 {
            return Err(EINVAL);
        }
        // CAST: `usize` has 64 bits.
        let old = self.set_fault_around(Most::new(args.pages as usize)?)?;
        // CAST: The number is at most that of the entries of a page table.
        args.pages = old.pages() as u32;
        write_versioned(cmd, arg, &mut args)
    }

    fn zdm_inspect(&self, cmd: u32, arg: usize) -> Result {
        let args = read_inspect(cmd, arg)?;
        if args.flags & uapi::ZDM_INSPECT_PFN != 0 {
            return inspect_frames(&args, self.mirror().owner());
        }
        let range = user_range(args.addr, args.npages)?;
        self.inspect(range, page_writer(&args, range.pages())?)
    }

    fn zdm_pin(&self, cmd: u32, arg: usize) -> Result {
        let mut args: ZdmPin = read_versioned(cmd, arg)?;
        let request = pin_request(args.flags)?;
        args.id = self.pin(user_range(args.addr, args.npages)?, request)?;
        let written = write_versioned(cmd, arg, &mut args);
        if written.is_err() {
            // User space did not get the number.
            self.unpin(args.id, false)?;
        }
        written
    }

    fn zdm_unpin(&self, cmd: u32, arg: usize) -> Result {
        let args: ZdmUnpin = read_versioned(cmd, arg)?;
        if args.flags & !uapi::ZDM_UNPIN_DIRTY != 0 {
            return Err(EINVAL);
        }
        self.unpin(args.id, args.flags != 0)
    }

    fn zdm_inject(&self, cmd: u32, arg: usize) -> Result {
        let mut inject: ZdmInject = read_versioned(cmd, arg)?;
        if !self.device().config.inject || !is_admin() {
            return Err(EPERM);
        }
        self.inject(&mut inject)?;
        write_versioned(cmd, arg, &mut inject)
    }

    fn stats(&self, cmd: u32, arg: usize) -> Result {
        write_versioned(cmd, arg, &mut self.device().stats())
    }

    fn audit(&self, cmd: u32, arg: usize) -> Result {
        let mut args: ZdmAudit = read_versioned(cmd, arg)?;
        let has = |flag| args.flags & flag != 0;
        let (clear, pass, quiet) = (
            has(uapi::ZDM_AUDIT_CLEAR),
            has(uapi::ZDM_AUDIT_PASS),
            has(uapi::ZDM_AUDIT_QUIET),
        );
        let known = uapi::ZDM_AUDIT_CLEAR | uapi::ZDM_AUDIT_PASS | uapi::ZDM_AUDIT_QUIET;
        if has(!known) || pass && (clear || quiet) || args.reserved != 0 {
            return Err(EINVAL);
        }
        let admin = is_admin();
        if args.flags != 0 && !admin {
            return Err(EPERM);
        }
        let moment = if quiet {
            Moment::Quiet
        } else {
            self.device().moment()
        };
        let records = user_ptr(args.records)?;
        let size = match args.record_size {
            0 => uapi::ZDM_VIOLATION_SIZE_VER0,
            size if size < uapi::ZDM_VIOLATION_SIZE_VER0 => return Err(EINVAL),
            size => size,
        };
        // CAST: `usize` has 64 bits.
        let size = size as usize;
        if size > PAGE_SIZE {
            return Err(E2BIG);
        }
        let room = usize::try_from(args.nr_records)
            .unwrap_or(usize::MAX)
            .min(uapi::ZDM_AUDIT_MAX_RECORDS as usize);
        let counts = if pass {
            self.device().read_all()?
        } else {
            self.device().audit(moment)?
        };
        let auditor = &self.device().core.auditor;
        args.pages = counts.pages;
        args.free = counts.free;
        args.used = counts.used;
        args.found = counts.found;
        args.total = auditor.total();
        let list = auditor.records(room)?;
        let mut at = records;
        for record in &list {
            let violation = if admin {
                record.violation
            } else {
                record.violation.redacted()
            };
            let mut violation = violation.to_uapi();
            let known = size.min(size_of::<uapi::ZdmViolation>());
            let mut writer = UserSlice::new(at, size).writer();
            writer.write_slice(&as_bytes_mut(&mut violation)[..known])?;
            // The additional bytes of a larger structure are unknown here.
            let mut rest = size - known;
            while rest > 0 {
                let n = rest.min(NOTHING.len());
                writer.write_slice(&NOTHING[..n])?;
                rest -= n;
            }
            at = at.wrapping_byte_add(size);
        }
        args.nr_records = u32::try_from(list.len()).unwrap_or(u32::MAX);
        write_versioned(cmd, arg, &mut args)?;
        if clear {
            auditor.clear();
        }
        Ok(())
    }
}

#[kunit_tests(zdmirror_ioctl)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_pins() {
        let request = |hold, write, fast| Ok(PinRequest { hold, write, fast });
        for (flags, expected) in [
            (0x0, request(Hold::Pin, false, false)),
            (0x1, request(Hold::Pin, true, false)),
            (0x2, request(Hold::Get, false, false)),
            (0x4, request(Hold::LongTerm, false, false)),
            (0x8, request(Hold::Pin, false, true)),
            (0xd, request(Hold::LongTerm, true, true)),
            (0x6, Err(EINVAL)),
            (0x10, Err(EINVAL)),
            (1 << 31, Err(EINVAL)),
        ] {
            assert_eq!(pin_request(flags), expected);
        }
    }

    #[test]
    fn frames() {
        let top = MAX_PFNS as u64;
        for (first, npages) in [
            (0, 0),
            (top, 1),
            (top - 1, 2),
            (u64::MAX, 1),
            (u64::MAX, 2),
            (1 << 52, 1),
        ] {
            assert_eq!(frame_range(first, npages), Err(EINVAL));
        }
        assert_eq!(frame_range(0, 1), Ok(0..1));
        assert_eq!(frame_range(top - 1, 1), Ok(MAX_PFNS - 1..MAX_PFNS));
    }

    #[test]
    fn commands_of_any_size_are_known() {
        // _IOWR('H', 0x42, 8 bytes), and with 0 bytes.
        let small = (uapi::ZDM_AUDIT & !(0x3fff << 16)) | (8 << 16);
        assert!(is_versioned(small, uapi::ZDM_AUDIT));
        assert!(!is_versioned(
            uapi::ZDM_AUDIT & !(0x3fff << 16),
            uapi::ZDM_AUDIT
        ));
        assert!(!is_versioned(uapi::ZDM_STATS, uapi::ZDM_AUDIT));
        assert!(!is_versioned(uapi::HMM_DMIRROR_READ, uapi::ZDM_AUDIT));
    }
}
