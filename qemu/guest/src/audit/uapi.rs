// SPDX-License-Identifier: GPL-2.0
//! The two ioctls of uapi/zdmirror.h that the audit needs; the only unsafe code of the guest.
#![allow(unsafe_code)]

use std::fs::File;

use rustix::io::Result;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

/// `struct zdm_audit`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Audit {
    /// Pages scanned.
    pub pages: u64,
    /// Pages that the allocator holds.
    pub free: u64,
    /// Pages that the allocator has given out.
    pub used: u64,
    /// Violations that this scan found.
    pub found: u64,
    /// Violations since the total was last cleared.
    pub total: u64,
    /// User pointer to records. The audit wants none, because every violation is also a line of the
    /// log.
    pub records: u64,
    /// Number of records that there is room for.
    pub nr_records: u32,
    /// `ZDM_AUDIT_*`.
    pub flags: u32,
    /// Size of a record; 0 for that of the first version.
    pub record_size: u32,
    /// Zero.
    pub reserved: u32,
}

/// The part of `struct zdm_stats` up to `free_refs`; a newer module writes no more than that.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Base pages that the allocator gave out.
    pub allocated: u64,
    /// Base pages that were freed.
    pub freed: u64,
    /// Counters that the audit does not use.
    pub others: [u64; 13],
    /// References that the kernel keeps on a free page of the device.
    pub free_refs: u64,
}

const ZDM_AUDIT: Opcode = opcode::read_write::<Audit>(b'H', 0x42);
const ZDM_STATS: Opcode = opcode::read::<Stats>(b'H', 0x46);
const ZDM_AUDIT_CLEAR: u32 = 1;

/// Audits a device; `clear` also clears its total of violations.
pub fn audit(device: &File, clear: bool) -> Result<Audit> {
    let flags = if clear { ZDM_AUDIT_CLEAR } else { 0 };
    let mut audit = Audit { flags, ..Default::default() };
    // SAFETY: `Audit` is laid out as the `struct zdm_audit` that ZDM_AUDIT reads and writes.
    let update = unsafe { Updater::<ZDM_AUDIT, Audit>::new(&mut audit) };
    // SAFETY: ZDM_AUDIT writes nothing but the structure: it has no room for records.
    unsafe { ioctl(device, update) }?;
    Ok(audit)
}

/// Reads the counters of a device.
pub fn stats(device: &File) -> Result<Stats> {
    // SAFETY: `Stats` is laid out as `struct zdm_stats` is, and its size is part of the number.
    let get = unsafe { Getter::<ZDM_STATS, Stats>::new() };
    // SAFETY: ZDM_STATS writes as many bytes as its number says, which is the size of `Stats`.
    unsafe { ioctl(device, get) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    /// The names of a structure's members in the header, in order.
    fn members(header: &str, name: &str) -> Vec<String> {
        let body = header.split(&format!("\nstruct {name} {{\n")).nth(1).unwrap();
        let lines = body.split("};").next().unwrap().lines();
        let word = |l: &str| l.trim_end_matches(';').split_whitespace().last().map(str::to_owned);
        lines.filter_map(word).collect()
    }

    #[test]
    fn as_the_header_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../uapi/zdmirror.h");
        let header = std::fs::read_to_string(path).unwrap();
        let audit = [
            "pages",
            "free",
            "used",
            "found",
            "total",
            "records",
            "nr_records",
            "flags",
            "record_size",
            "reserved",
        ];
        assert_eq!(members(&header, "zdm_audit"), audit);
        let stats = members(&header, "zdm_stats");
        assert_eq!(stats[..2], ["allocated", "freed"]);
        assert_eq!(stats.iter().position(|m| m == "free_refs"), Some(2 + 13));
        assert_eq!(size_of::<Stats>(), (2 + 13 + 1) * size_of::<u64>());
        let lines = header.replace(['\t', ' '], "");
        for line in [
            "#defineZDM_AUDIT_IOWR('H',0x42,structzdm_audit)",
            "#defineZDM_STATS_IOR('H',0x46,structzdm_stats)",
            "#defineZDM_AUDIT_CLEAR0x1",
        ] {
            assert!(lines.contains(line), "{line}");
        }
        assert_eq!((ZDM_AUDIT, ZDM_STATS), (0xc040_4842, 0x8080_4846));
    }
}
