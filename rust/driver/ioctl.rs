// SPDX-License-Identifier: GPL-2.0

//! What user space may ask for, checked before anything is done.

#![forbid(unsafe_code)]

use super::{
    access::Faulting,
    file::Opener, //
};
use crate::{
    audit::Violation,
    mm::{
        uapi,
        uapi::{
            as_bytes_mut,
            is_admin,
            HmmCmd,
            UapiStruct,
            ZdmAudit,
            ZdmInject, //
        },
        PAGE_SHIFT,
        PAGE_SIZE, //
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
        UserSlice, //
    }, //
};

/// The range that a command is about, in bytes.
///
/// # Errors
///
/// `EINVAL` unless it starts on a page, is not empty, and ends within user addresses.
fn user_range(cmd: &HmmCmd) -> Result<Range<usize>> {
    let start = usize::try_from(cmd.addr).map_err(|_| EINVAL)?;
    let pages = usize::try_from(cmd.npages).map_err(|_| EINVAL)?;
    if start % PAGE_SIZE != 0 || pages == 0 || pages > usize::MAX >> PAGE_SHIFT {
        return Err(EINVAL);
    }
    let end = start.checked_add(pages << PAGE_SHIFT).ok_or(EINVAL)?;
    if end > uapi::task_size() {
        return Err(EINVAL);
    }
    Ok(start..end)
}

/// A user address as the uapi carries it.
fn user_ptr(ptr: u64) -> Result<UserPtr> {
    Ok(UserPtr::from_addr(
        usize::try_from(ptr).map_err(|_| EINVAL)?,
    ))
}

/// Reads a structure that is versioned by its size, as `copy_struct_from_user()` does: what a
/// shorter one lacks is zero, and what a longer one has more must be.
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

/// Writes as much of a structure as user space knows.
fn write_versioned<T: UapiStruct>(cmd: u32, arg: usize, value: &mut T) -> Result {
    let known = _IOC_SIZE(cmd).min(size_of::<T>());
    UserSlice::new(UserPtr::from_addr(arg), known)
        .writer()
        .write_slice(&as_bytes_mut(value)[..known])
}

/// Whether `cmd` is `known`, of whatever size its structure is.
fn is_versioned(cmd: u32, known: u32) -> bool {
    _IOC_TYPE(cmd) == _IOC_TYPE(known) && _IOC_NR(cmd) == _IOC_NR(known) && _IOC_SIZE(cmd) != 0
}

impl Opener {
    /// All ioctls.
    pub(super) fn dispatch(&self, cmd: u32, arg: usize) -> Result {
        match cmd {
            uapi::HMM_DMIRROR_READ
            | uapi::HMM_DMIRROR_WRITE
            | uapi::HMM_DMIRROR_MIGRATE_TO_DEV
            | uapi::HMM_DMIRROR_MIGRATE_TO_SYS => self.upstream(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_AUDIT) => self.audit(cmd, arg),
            _ if is_versioned(cmd, uapi::ZDM_INJECT) => {
                let mut inject: ZdmInject = read_versioned(cmd, arg)?;
                if !self.device().config.inject || !is_admin() {
                    return Err(EPERM);
                }
                self.inject(&mut inject)?;
                write_versioned(cmd, arg, &mut inject)
            }
            _ if is_versioned(cmd, uapi::ZDM_STATS) => {
                let core = &self.device().core;
                let mut stats = core.stats.to_uapi(core.auditor.total(), 0);
                write_versioned(cmd, arg, &mut stats)
            }
            _ => Err(ENOTTY),
        }
    }

    /// The commands of `test_hmm_uapi.h`, which share a structure.
    fn upstream(&self, cmd: u32, arg: usize) -> Result {
        let user = UserSlice::new(UserPtr::from_addr(arg), size_of::<HmmCmd>());
        let (mut reader, mut writer) = user.reader_writer();
        let mut args: HmmCmd = reader.read()?;
        let range = user_range(&args)?;
        let ptr = user_ptr(args.ptr)?;
        let pages = range.end.wrapping_sub(range.start) >> PAGE_SHIFT;
        args.cpages = 0;
        args.faults = 0;
        match cmd {
            uapi::HMM_DMIRROR_READ => {
                let outcome = self.read(range, ptr, Faulting::Locked)?;
                args.cpages = outcome.pages as u64;
                args.faults = outcome.faults as u64;
            }
            uapi::HMM_DMIRROR_WRITE => {
                let outcome = self.write(range, ptr)?;
                args.cpages = outcome.pages as u64;
                args.faults = outcome.faults as u64;
            }
            uapi::HMM_DMIRROR_MIGRATE_TO_DEV => {
                self.to_device(range.clone())?;
                // What is on the device now is mapped there, and read back for verification.
                if self.mirror().refresh(range.clone())? < pages {
                    return Err(ENOENT);
                }
                args.cpages = self.read(range, ptr, Faulting::Never)?.pages as u64;
            }
            _ => args.cpages = self.to_system(range)? as u64,
        }
        writer.write(&args)
    }

    fn audit(&self, cmd: u32, arg: usize) -> Result {
        let mut args: ZdmAudit = read_versioned(cmd, arg)?;
        if args.flags & !uapi::ZDM_AUDIT_CLEAR != 0 {
            return Err(EINVAL);
        }
        let clear = args.flags & uapi::ZDM_AUDIT_CLEAR != 0;
        if clear && !is_admin() {
            return Err(EPERM);
        }
        let records = user_ptr(args.records)?;
        let room = usize::try_from(args.nr_records)
            .unwrap_or(usize::MAX)
            .min(uapi::ZDM_AUDIT_MAX_RECORDS as usize);
        let counts = self.device().audit()?;
        let auditor = &self.device().core.auditor;
        args.pages = counts.pages;
        args.free = counts.free;
        args.used = counts.used;
        args.found = counts.found;
        args.total = auditor.total();
        let list = auditor.records(room)?;
        let bytes = list.len() * size_of::<uapi::ZdmViolation>();
        let mut writer = UserSlice::new(records, bytes).writer();
        for violation in list.iter().copied().map(Violation::to_uapi) {
            writer.write(&violation)?;
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

    fn range(addr: u64, npages: u64) -> Result<Range<usize>> {
        user_range(&HmmCmd {
            addr,
            npages,
            ..Default::default()
        })
    }

    #[test]
    fn ranges() {
        let top = uapi::task_size() as u64;
        let page = PAGE_SIZE as u64;
        let bad = [
            (page + 1, 1),
            (page - 1, 1),
            (page, 0),
            (page, u64::MAX),
            (page, u64::MAX >> PAGE_SHIFT),
            (page, (u64::MAX >> PAGE_SHIFT) + 1),
            (u64::MAX & !(page - 1), 1),
            (top, 1),
            (top - page, 2),
            (1 << 63, 1),
        ];
        for (addr, npages) in bad {
            assert_eq!(range(addr, npages), Err(EINVAL));
        }
        assert_eq!(range(page, 1), Ok(PAGE_SIZE..2 * PAGE_SIZE));
        assert_eq!(range(0, 2), Ok(0..2 * PAGE_SIZE));
        assert!(range(top - page, 1).is_ok());
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
