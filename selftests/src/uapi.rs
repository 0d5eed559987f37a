// SPDX-License-Identifier: GPL-2.0

//! The ABI of the device nodes, as the kernel's `lib/test_hmm_uapi.h` and this repository's
//! `uapi/zdmirror.h` define it.
//!
//! The unit test below reads `uapi/zdmirror.h` and compares every number, field and size, so that
//! the two cannot differ. `test_hmm_uapi.h` belongs to the kernel tree, which may be missing when
//! this crate is built; the part used here is one structure and a few numbers, which are stable
//! ABI.

use std::mem::size_of;

/// `struct hmm_dmirror_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct HmmCmd {
    pub addr: u64,
    pub ptr: u64,
    pub npages: u64,
    pub cpages: u64,
    pub faults: u64,
}

/// `struct zdm_violation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Violation {
    pub invariant: u32,
    pub check: u32,
    pub pfn: u64,
    pub expected: u64,
    pub found: u64,
    pub order: u32,
    pub kind: u32,
    pub last_time: u64,
    pub last_event: u32,
    pub last_pid: u32,
    pub last_order: u32,
    pub reserved: u32,
}

/// `struct zdm_audit`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Audit {
    pub pages: u64,
    pub free: u64,
    pub used: u64,
    pub found: u64,
    pub total: u64,
    pub records: u64,
    pub nr_records: u32,
    pub flags: u32,
    pub record_size: u32,
    pub reserved: u32,
}

/// `struct zdm_inject`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Inject {
    pub kind: u32,
    pub reserved: u32,
    pub addr: u64,
    pub pfn: u64,
}

/// `struct zdm_stats`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub allocated: u64,
    pub freed: u64,
    pub to_device: u64,
    pub to_system: u64,
    pub cpu_faults: u64,
    pub device_faults: u64,
    pub evicted: u64,
    pub failed_alloc: u64,
    pub failed_migrate: u64,
    pub violations: u64,
    pub large_to_device: u64,
    pub large_to_system: u64,
    pub large_fallback: u64,
    pub max_order: u64,
    pub exclusive: u64,
    pub free_refs: u64,
    pub around: u64,
    pub around_hits: u64,
    pub around_waste: u64,
    pub to_device_by_order: [u64; ZDM_STATS_ORDERS],
    pub to_system_by_order: [u64; ZDM_STATS_ORDERS],
}

impl Stats {
    /// The number of pages in the folios of all orders.
    pub fn pages(by_order: &[u64; ZDM_STATS_ORDERS]) -> u64 {
        by_order
            .iter()
            .enumerate()
            .map(|(order, n)| n << order)
            .sum()
    }
}

/// `struct zdm_page`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageInfo {
    pub pfn: u64,
    pub refs: i32,
    pub mapcount: i32,
    pub pins: i32,
    pub order: u32,
    pub kind: u32,
    pub owner: u32,
    pub flags: u32,
    pub index: u32,
}

/// `struct zdm_inspect`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Inspect {
    pub addr: u64,
    pub npages: u64,
    pub pages: u64,
    pub flags: u32,
    pub reserved: u32,
}

/// `struct zdm_pin`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Pin {
    pub addr: u64,
    pub npages: u64,
    pub flags: u32,
    pub id: u32,
}

/// `struct zdm_unpin`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Unpin {
    pub id: u32,
    pub flags: u32,
}

/// `struct zdm_fault`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Fault {
    pub addr: u64,
    pub npages: u64,
    pub flags: u32,
    pub reserved: u32,
    pub mapped: u64,
}

/// `struct zdm_fault_around`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultAround {
    pub pages: u32,
    pub flags: u32,
}

const _: () = assert!(size_of::<HmmCmd>() == 40);
const _: () = assert!(size_of::<Violation>() == 64);
const _: () = assert!(size_of::<Audit>() == 64);
const _: () = assert!(size_of::<Inject>() == 24);
const _: () = assert!(size_of::<Stats>() == 152 + 2 * 128);
const _: () = assert!(size_of::<Fault>() == 32);
const _: () = assert!(size_of::<PageInfo>() == 40);
const _: () = assert!(size_of::<Inspect>() == 32);
const _: () = assert!(size_of::<Pin>() == 24);
const _: () = assert!(size_of::<Unpin>() == 8);
const _: () = assert!(size_of::<FaultAround>() == 8);

/// The direction bits of an ioctl number, as in asm-generic/ioctl.h.
pub const IOC_WRITE: u32 = 1;
pub const IOC_READ: u32 = 2;
pub const IOC_READ_WRITE: u32 = 3;

/// Composes an ioctl number of magic `'H'`, like the C macro `_IOC`.
pub const fn ioc(direction: u32, number: u32, size: usize) -> u64 {
    // CAST: The structures here are far smaller than 14 bits allow.
    ((direction << 30) | ((size as u32) << 16) | ((b'H' as u32) << 8) | number) as u64
}

pub const HMM_READ: u64 = ioc(IOC_READ_WRITE, 0x00, size_of::<HmmCmd>());
pub const HMM_WRITE: u64 = ioc(IOC_READ_WRITE, 0x01, size_of::<HmmCmd>());
pub const HMM_MIGRATE_TO_DEV: u64 = ioc(IOC_READ_WRITE, 0x02, size_of::<HmmCmd>());
pub const HMM_MIGRATE_TO_SYS: u64 = ioc(IOC_READ_WRITE, 0x03, size_of::<HmmCmd>());

pub const HMM_SNAPSHOT: u64 = ioc(IOC_READ_WRITE, 0x04, size_of::<HmmCmd>());
pub const HMM_EXCLUSIVE: u64 = ioc(IOC_READ_WRITE, 0x05, size_of::<HmmCmd>());
pub const HMM_CHECK_EXCLUSIVE: u64 = ioc(IOC_READ_WRITE, 0x06, size_of::<HmmCmd>());
pub const HMM_RELEASE: u64 = ioc(IOC_READ_WRITE, 0x07, size_of::<HmmCmd>());
pub const HMM_FLAGS: u64 = ioc(IOC_READ_WRITE, 0x08, size_of::<HmmCmd>());
pub const HMM_READ_UNLOCKED: u64 = ioc(IOC_READ_WRITE, 0x09, size_of::<HmmCmd>());

/// The next allocation fails. The flag takes the place of a number of pages in `HMM_FLAGS`.
pub const HMM_FLAG_FAIL_ALLOC: u64 = 1;

/// The result of `HMM_SNAPSHOT` for a page: one of the kinds below, with READ or WRITE, and with
/// PMD if the page is mapped as a part of a huge page.
pub const PROT_ERROR: u8 = 0xff;
pub const PROT_NONE: u8 = 0x00;
pub const PROT_READ: u8 = 0x01;
pub const PROT_WRITE: u8 = 0x02;
pub const PROT_PMD: u8 = 0x04;
pub const PROT_ZERO: u8 = 0x10;
pub const PROT_PRIVATE_LOCAL: u8 = 0x20;
pub const PROT_COHERENT_LOCAL: u8 = 0x40;
pub const PROT_COHERENT_REMOTE: u8 = 0x50;
pub const PROT_GENERIC_LOCAL: u8 = 0x60;
pub const PROT_GENERIC_REMOTE: u8 = 0x70;

pub const ZDM_FAULT_NUMBER: u32 = 0x40;
pub const ZDM_FAULT: u64 = ioc(IOC_READ_WRITE, ZDM_FAULT_NUMBER, size_of::<Fault>());
pub const ZDM_FAULT_WRITE: u32 = 1;
pub const ZDM_INSPECT: u64 = ioc(IOC_READ_WRITE, 0x41, size_of::<Inspect>());
pub const ZDM_AUDIT_NUMBER: u32 = 0x42;
pub const ZDM_AUDIT: u64 = ioc(IOC_READ_WRITE, ZDM_AUDIT_NUMBER, size_of::<Audit>());
pub const ZDM_PIN: u64 = ioc(IOC_READ_WRITE, 0x43, size_of::<Pin>());
pub const ZDM_UNPIN: u64 = ioc(IOC_WRITE, 0x44, size_of::<Unpin>());
pub const ZDM_INJECT: u64 = ioc(IOC_READ_WRITE, 0x45, size_of::<Inject>());
pub const ZDM_STATS: u64 = ioc(IOC_READ, 0x46, size_of::<Stats>());
pub const ZDM_FAULT_AROUND: u64 = ioc(IOC_READ_WRITE, 0x47, size_of::<FaultAround>());
pub const ZDM_FAULT_AROUND_MAX: u32 = 512;
pub const ZDM_STATS_ORDERS: usize = 16;

pub const ZDM_AUDIT_MAX_RECORDS: usize = 64;
pub const ZDM_AUDIT_CLEAR: u32 = 1;
pub const ZDM_AUDIT_PASS: u32 = 2;
pub const ZDM_AUDIT_QUIET: u32 = 0x4;
pub const ZDM_VIOLATION_SIZE_VER0: u32 = 40;

pub const ZDM_EVENT_BORN: u32 = 1;
pub const ZDM_EVENT_SETTLED: u32 = 3;
pub const ZDM_EVENT_SPLIT: u32 = 4;
pub const ZDM_EVENT_FREED: u32 = 5;

pub const ZDM_INSPECT_PFN: u32 = 1;
pub const ZDM_INSPECT_MAX_PAGES: usize = 65536;

pub const ZDM_OWNER_NONE: u32 = 0;
pub const ZDM_OWNER_LOCAL: u32 = 1;
pub const ZDM_OWNER_REMOTE: u32 = 2;

pub const ZDM_PAGE_THERE: u32 = 0x0001;
pub const ZDM_PAGE_WRITE: u32 = 0x0002;
pub const ZDM_PAGE_PMD: u32 = 0x0004;
pub const ZDM_PAGE_PUD: u32 = 0x0008;
pub const ZDM_PAGE_LRU: u32 = 0x0020;
pub const ZDM_PAGE_ANON: u32 = 0x0040;
pub const ZDM_PAGE_CHARGED: u32 = 0x0080;
pub const ZDM_PAGE_MAPPING: u32 = 0x0100;
pub const ZDM_PAGE_ANON_EXCLUSIVE: u32 = 0x0200;
pub const ZDM_PAGE_ZERO: u32 = 0x0400;
pub const ZDM_PAGE_ERROR: u32 = 0x0800;
pub const ZDM_PAGE_MISPLACED: u32 = 0x1000;

/// `enum memory_type` of include/linux/memremap.h; 0 stands for system memory.
pub const TYPE_SYSTEM: u32 = 0;
pub const TYPE_PRIVATE: u32 = 1;
pub const TYPE_COHERENT: u32 = 2;
pub const TYPE_FS_DAX: u32 = 3;
pub const TYPE_GENERIC: u32 = 4;

pub const ZDM_PIN_WRITE: u32 = 0x1;
pub const ZDM_PIN_GET: u32 = 0x2;
pub const ZDM_PIN_LONGTERM: u32 = 0x4;
pub const ZDM_PIN_FAST: u32 = 0x8;
pub const ZDM_PIN_MAX: usize = 64;
pub const ZDM_PIN_MAX_PAGES: usize = 65536;
pub const ZDM_UNPIN_DIRTY: u32 = 0x1;

/// The number of references that one FOLL_PIN pin of a small folio takes, GUP_PIN_COUNTING_BIAS.
pub const PIN_BIAS: i32 = 1024;

pub const ZDM_CHECK_REFCOUNT: u32 = 1;
pub const ZDM_CHECK_MAPPING: u32 = 4;
pub const ZDM_CHECK_STATE: u32 = 6;
pub const ZDM_CHECK_ANON_EXCLUSIVE: u32 = 7;
pub const ZDM_CHECK_STUCK: u32 = 10;
pub const ZDM_CHECK_PAGEMAP: u32 = 12;

pub const ZDM_INJECT_EXTRA_GET: u32 = 1;
pub const ZDM_INJECT_UNDO_GET: u32 = 2;
pub const ZDM_INJECT_FREE_PAGE_REF: u32 = 3;
pub const ZDM_INJECT_UNDO_FREE_PAGE_REF: u32 = 4;
pub const ZDM_INJECT_ALLOC_TWICE: u32 = 5;
pub const ZDM_INJECT_DOUBLE_FREE: u32 = 6;
pub const ZDM_INJECT_STALE_MAPPING: u32 = 7;
pub const ZDM_INJECT_STALE_ANON_EXCLUSIVE: u32 = 8;
pub const ZDM_INJECT_UNDO_STALE: u32 = 9;
pub const ZDM_INJECT_PAGEMAP_GET: u32 = 10;
pub const ZDM_INJECT_PAGEMAP_PUT: u32 = 11;
pub const ZDM_INJECT_BORN_REF: u32 = 12;
pub const ZDM_INJECT_SETTLED_REF: u32 = 13;
pub const ZDM_INJECT_SOURCE_REF: u32 = 14;
pub const ZDM_INJECT_CORRUPT: u32 = 15;
pub const ZDM_INJECT_EXTRA_MAPPING: u32 = 16;
pub const ZDM_INJECT_UNDO_MAPPING: u32 = 17;
pub const ZDM_INJECT_SLOW: u32 = 18;
pub const ZDM_INJECT_HOLD: u32 = 19;
pub const ZDM_INJECT_IS_HELD: u32 = 20;
pub const ZDM_INJECT_LET_GO: u32 = 21;
pub const ZDM_INJECT_GO_ON: u32 = 22;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    fn header() -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../uapi/zdmirror.h");
        std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// The text of the header without its comments.
    fn code() -> String {
        let text = header();
        let mut out = String::new();
        let mut rest = text.as_str();
        while let Some(start) = rest.find("/*") {
            out.push_str(&rest[..start]);
            let end = rest[start..].find("*/").expect("unterminated comment");
            rest = &rest[start + end + 2..];
        }
        out.push_str(rest);
        out
    }

    /// The `(name, offset)` of each field of `struct name`, and the size of the struct.
    fn fields(name: &str) -> (Vec<(String, usize)>, usize) {
        let code = code();
        let open = format!("struct {name} {{");
        let start = code.find(&open).unwrap_or_else(|| panic!("no {open}")) + open.len();
        let body = &code[start..start + code[start..].find('}').expect("no }")];
        let mut offset = 0;
        let mut out = Vec::new();
        for line in body.split(';').map(str::trim).filter(|l| !l.is_empty()) {
            let (kind, field) = line.split_once(char::is_whitespace).expect("type name;");
            let size = match kind {
                "__u32" | "__s32" => 4,
                "__u64" => 8,
                other => panic!("type {other} of {field} is not known to this test"),
            };
            assert_eq!(offset % size, 0, "{name}.{field} would need padding");
            out.push((field.trim().to_string(), offset));
            let elements = match field.split_once('[') {
                None => 1,
                Some((_, n)) => value(n.trim_end_matches(']')).parse().expect("a number"),
            };
            offset += size * elements;
        }
        (out, offset)
    }

    /// The value of `#define NAME ...` or of `NAME = ...` in an enum.
    fn value(name: &str) -> String {
        let code = code();
        for line in code.lines() {
            let mut words = line.split_whitespace();
            let first = words.next();
            if first == Some("#define") && words.next() == Some(name) {
                return words.collect::<Vec<_>>().join(" ");
            }
            if first == Some(name) && line.contains('=') {
                let (_, v) = line.split_once('=').expect("=");
                return v.trim().trim_end_matches(',').trim().to_string();
            }
        }
        panic!("{name} is not in the header");
    }

    macro_rules! same_fields {
        ($c:literal, $rust:ty, $(($field:literal, $member:ident)),+ $(,)?) => {{
            let (found, size) = fields($c);
            let expected = vec![$(($field.to_string(), offset_of!($rust, $member))),+];
            assert_eq!(found, expected, "struct {}", $c);
            assert_eq!(size, size_of::<$rust>(), "size of struct {}", $c);
        }};
    }

    #[test]
    fn structures_are_those_of_the_header() {
        same_fields!(
            "zdm_violation",
            Violation,
            ("invariant", invariant),
            ("check", check),
            ("pfn", pfn),
            ("expected", expected),
            ("found", found),
            ("order", order),
            ("type", kind),
            ("last_time", last_time),
            ("last_event", last_event),
            ("last_pid", last_pid),
            ("last_order", last_order),
            ("reserved", reserved),
        );
        same_fields!(
            "zdm_audit",
            Audit,
            ("pages", pages),
            ("free", free),
            ("used", used),
            ("found", found),
            ("total", total),
            ("records", records),
            ("nr_records", nr_records),
            ("flags", flags),
            ("record_size", record_size),
            ("reserved", reserved),
        );
        same_fields!(
            "zdm_inject",
            Inject,
            ("kind", kind),
            ("reserved", reserved),
            ("addr", addr),
            ("pfn", pfn),
        );
        same_fields!(
            "zdm_stats",
            Stats,
            ("allocated", allocated),
            ("freed", freed),
            ("to_device", to_device),
            ("to_system", to_system),
            ("cpu_faults", cpu_faults),
            ("device_faults", device_faults),
            ("evicted", evicted),
            ("failed_alloc", failed_alloc),
            ("failed_migrate", failed_migrate),
            ("violations", violations),
            ("large_to_device", large_to_device),
            ("large_to_system", large_to_system),
            ("large_fallback", large_fallback),
            ("max_order", max_order),
            ("exclusive", exclusive),
            ("free_refs", free_refs),
            ("around", around),
            ("around_hits", around_hits),
            ("around_waste", around_waste),
            ("to_device_by_order[ZDM_STATS_ORDERS]", to_device_by_order),
            ("to_system_by_order[ZDM_STATS_ORDERS]", to_system_by_order),
        );
        same_fields!(
            "zdm_page",
            PageInfo,
            ("pfn", pfn),
            ("refs", refs),
            ("mapcount", mapcount),
            ("pins", pins),
            ("order", order),
            ("type", kind),
            ("owner", owner),
            ("flags", flags),
            ("index", index),
        );
        same_fields!(
            "zdm_inspect",
            Inspect,
            ("addr", addr),
            ("npages", npages),
            ("pages", pages),
            ("flags", flags),
            ("reserved", reserved),
        );
        same_fields!(
            "zdm_pin",
            Pin,
            ("addr", addr),
            ("npages", npages),
            ("flags", flags),
            ("id", id),
        );
        same_fields!("zdm_unpin", Unpin, ("id", id), ("flags", flags));
        same_fields!(
            "zdm_fault_around",
            FaultAround,
            ("pages", pages),
            ("flags", flags),
        );
        same_fields!(
            "zdm_fault",
            Fault,
            ("addr", addr),
            ("npages", npages),
            ("flags", flags),
            ("reserved", reserved),
            ("mapped", mapped),
        );
    }

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(value("ZDM_AUDIT"), "_IOWR('H', 0x42, struct zdm_audit)");
        assert_eq!(ZDM_AUDIT_NUMBER, 0x42);
        assert_eq!(value("ZDM_INJECT"), "_IOWR('H', 0x45, struct zdm_inject)");
        assert_eq!(ZDM_INJECT, 0xc018_4845);
        assert_eq!(value("ZDM_STATS"), "_IOR('H', 0x46, struct zdm_stats)");
        assert_eq!(ZDM_STATS, 0x8198_4846);
        assert_eq!(
            value("ZDM_FAULT_AROUND"),
            "_IOWR('H', 0x47, struct zdm_fault_around)"
        );
        assert_eq!(ZDM_FAULT_AROUND, 0xc008_4847);
        assert_eq!(value("ZDM_INSPECT"), "_IOWR('H', 0x41, struct zdm_inspect)");
        assert_eq!(ZDM_INSPECT, 0xc020_4841);
        assert_eq!(value("ZDM_PIN"), "_IOWR('H', 0x43, struct zdm_pin)");
        assert_eq!(ZDM_PIN, 0xc018_4843);
        assert_eq!(value("ZDM_UNPIN"), "_IOW('H', 0x44, struct zdm_unpin)");
        assert_eq!(ZDM_UNPIN, 0x4008_4844);
        for (name, max) in [
            ("ZDM_INSPECT_MAX_PAGES", ZDM_INSPECT_MAX_PAGES),
            ("ZDM_PIN_MAX", ZDM_PIN_MAX),
            ("ZDM_PIN_MAX_PAGES", ZDM_PIN_MAX_PAGES),
        ] {
            assert_eq!(value(name), max.to_string(), "{name}");
        }
        assert_eq!(value("ZDM_FAULT"), "_IOWR('H', 0x40, struct zdm_fault)");
        assert_eq!(ZDM_FAULT, 0xc020_4840);
        assert_eq!(value("ZDM_FAULT_WRITE"), "0x1");
        assert_eq!(ZDM_FAULT_WRITE, 1 << 0);
        let max = ZDM_AUDIT_MAX_RECORDS.to_string();
        assert_eq!(value("ZDM_AUDIT_MAX_RECORDS"), max);
        assert_eq!(value("ZDM_AUDIT_CLEAR"), "0x1");
        assert_eq!(ZDM_AUDIT_CLEAR, 1 << 0);
        for (name, number) in [
            ("ZDM_CHECK_REFCOUNT", ZDM_CHECK_REFCOUNT),
            ("ZDM_INJECT_EXTRA_GET", ZDM_INJECT_EXTRA_GET),
            ("ZDM_INJECT_UNDO_GET", ZDM_INJECT_UNDO_GET),
            ("ZDM_INJECT_FREE_PAGE_REF", ZDM_INJECT_FREE_PAGE_REF),
            (
                "ZDM_INJECT_UNDO_FREE_PAGE_REF",
                ZDM_INJECT_UNDO_FREE_PAGE_REF,
            ),
            ("ZDM_INJECT_ALLOC_TWICE", ZDM_INJECT_ALLOC_TWICE),
            ("ZDM_OWNER_NONE", ZDM_OWNER_NONE),
            ("ZDM_OWNER_LOCAL", ZDM_OWNER_LOCAL),
            ("ZDM_OWNER_REMOTE", ZDM_OWNER_REMOTE),
            ("ZDM_FAULT_AROUND_MAX", ZDM_FAULT_AROUND_MAX),
            ("ZDM_STATS_ORDERS", ZDM_STATS_ORDERS as u32),
        ] {
            assert_eq!(value(name), number.to_string(), "{name}");
        }
    }

    #[test]
    fn flags_are_those_of_the_header() {
        for (name, flag) in [
            ("ZDM_INSPECT_PFN", ZDM_INSPECT_PFN),
            ("ZDM_PAGE_THERE", ZDM_PAGE_THERE),
            ("ZDM_PAGE_WRITE", ZDM_PAGE_WRITE),
            ("ZDM_PAGE_PMD", ZDM_PAGE_PMD),
            ("ZDM_PAGE_PUD", ZDM_PAGE_PUD),
            ("ZDM_PAGE_LRU", ZDM_PAGE_LRU),
            ("ZDM_PAGE_ANON", ZDM_PAGE_ANON),
            ("ZDM_PAGE_CHARGED", ZDM_PAGE_CHARGED),
            ("ZDM_PAGE_MAPPING", ZDM_PAGE_MAPPING),
            ("ZDM_PAGE_ANON_EXCLUSIVE", ZDM_PAGE_ANON_EXCLUSIVE),
            ("ZDM_PAGE_ZERO", ZDM_PAGE_ZERO),
            ("ZDM_PAGE_ERROR", ZDM_PAGE_ERROR),
            ("ZDM_PAGE_MISPLACED", ZDM_PAGE_MISPLACED),
            ("ZDM_PIN_WRITE", ZDM_PIN_WRITE),
            ("ZDM_PIN_GET", ZDM_PIN_GET),
            ("ZDM_PIN_LONGTERM", ZDM_PIN_LONGTERM),
            ("ZDM_PIN_FAST", ZDM_PIN_FAST),
            ("ZDM_UNPIN_DIRTY", ZDM_UNPIN_DIRTY),
            ("ZDM_PROT_DEV_GENERIC_LOCAL", PROT_GENERIC_LOCAL.into()),
            ("ZDM_PROT_DEV_GENERIC_REMOTE", PROT_GENERIC_REMOTE.into()),
        ] {
            let text = value(name);
            let digits = text.strip_prefix("0x").expect("a hexadecimal number");
            assert_eq!(u32::from_str_radix(digits, 16), Ok(flag), "{name}");
        }
    }

    #[test]
    fn upstream_numbers() {
        // _IOWR('H', 0x00, struct hmm_dmirror_cmd) and the following ones, 40 bytes each.
        assert_eq!(HMM_READ, 0xc028_4800);
        assert_eq!(HMM_MIGRATE_TO_SYS, 0xc028_4803);
        assert_eq!(HMM_READ_UNLOCKED, 0xc028_4809);
    }
}
