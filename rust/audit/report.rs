// SPDX-License-Identifier: GPL-2.0

//! Where violations go: the log, and a bounded list for `ZDM_AUDIT`.

#![forbid(unsafe_code)]

use super::Violation;
use crate::{
    mm::uapi::ZDM_AUDIT_MAX_RECORDS,
    spinlock::{
        new_spinlock_irq,
        SpinLockIrq, //
    }, //
};
use kernel::{
    prelude::*,
    str::CStr,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// Records that are kept.
const RECORDS: usize = ZDM_AUDIT_MAX_RECORDS as usize;

/// Lines that go to the log for one device until the records are cleared. The count goes on: a
/// broken kernel must not be able to drown the log.
const LOG_LINES: u64 = 32;

/// What a broken invariant does: the `audit` module parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// Nothing is checked.
    Off,
    /// Violations are logged and kept.
    Report,
    /// The first violation is a panic, with everything as it was.
    Panic,
}

impl Policy {
    /// Reads the parameter; `None` for a word that is none.
    pub(crate) fn parse(word: &CStr) -> Option<Self> {
        match word.to_bytes() {
            b"off" => Some(Self::Off),
            b"report" => Some(Self::Report),
            b"panic" => Some(Self::Panic),
            _ => None,
        }
    }
}

struct Records {
    list: [Option<Violation>; RECORDS],
    /// Index of the next record to be written.
    next: usize,
}

impl Records {
    fn add(&mut self, v: Violation) {
        let next = self.next % RECORDS;
        self.list[next] = Some(v);
        self.next = (next + 1) % RECORDS;
    }
}

/// Collects the violations of one device. Its methods do not sleep.
#[pin_data]
pub(crate) struct Auditor {
    policy: Policy,
    device: &'static CStr,
    total: Atomic<u64>,
    #[pin]
    records: SpinLockIrq<Records>,
}

impl Auditor {
    /// An auditor for the device that the log calls `device`.
    pub(crate) fn new(policy: Policy, device: &'static CStr) -> impl PinInit<Self> {
        pin_init!(Self {
            policy,
            device,
            total: Atomic::new(0),
            records <- new_spinlock_irq!(
                Records { list: [None; RECORDS], next: 0 },
                "Auditor::records"
            ),
        })
    }

    /// Whether checks are to be made.
    pub(crate) fn is_on(&self) -> bool {
        self.policy != Policy::Off
    }

    /// Violations since the module was loaded or the records were cleared.
    pub(crate) fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Takes the outcome of a check, and says whether it was a violation.
    pub(crate) fn judge(&self, outcome: Option<Violation>) -> bool {
        match outcome {
            Some(violation) => {
                self.report(violation);
                true
            }
            None => false,
        }
    }

    /// Records a violation and logs it.
    pub(crate) fn report(&self, v: Violation) {
        if self.is_on() {
            self.count(v);
            self.records.lock().add(v);
            self.may_panic(v);
        }
    }

    /// Begins to judge many pages in a row.
    pub(crate) fn scan(&self) -> Scan<'_> {
        Scan {
            auditor: self,
            batch: [None; SCAN_BATCH],
            len: 0,
        }
    }

    /// Counts a violation, and logs it unless there were too many.
    fn count(&self, v: Violation) {
        let before = self.total.fetch_add(1, Relaxed);
        if before < LOG_LINES {
            pr_err!(
                "violation: {} device={}\n",
                v,
                self.device.to_str().unwrap_or("?"),
            );
        }
        if before == LOG_LINES {
            pr_err!("violation: more of them are counted, but not logged\n");
        }
    }

    fn may_panic(&self, v: Violation) {
        if self.policy == Policy::Panic {
            // PANIC: Asked for with audit=panic.
            panic!("{}", fmt!("broken invariant: {}", v));
        }
    }

    /// Copies up to `room` records, the newest ones, oldest of them first.
    pub(crate) fn records(&self, room: usize) -> Result<KVec<Violation>> {
        let room = room.min(RECORDS);
        // Allocated before the lock, which must not sleep.
        let mut out = KVec::with_capacity(RECORDS, GFP_KERNEL)?;
        {
            let records = self.records.lock();
            for i in 0..RECORDS {
                if let Some(v) = records.list[(records.next + i) % RECORDS] {
                    out.push(v, GFP_NOWAIT)?;
                }
            }
        }
        let surplus = out.len().saturating_sub(room);
        for _ in 0..surplus {
            out.remove(0).map_err(|_| EINVAL)?;
        }
        Ok(out)
    }

    /// Forgets records and total.
    pub(crate) fn clear(&self) {
        let mut records = self.records.lock();
        records.list = [None; RECORDS];
        records.next = 0;
        self.total.store(0, Relaxed);
    }
}

/// Violations that a scan puts on record together.
const SCAN_BATCH: usize = 16;

/// Judges many pages in a row, for a kernel that may break a rule on every one of them: violations
/// go on record in batches, so that the lock is not what such a scan costs. Dropping it puts what
/// is left on record. None of its methods sleeps.
pub(crate) struct Scan<'a> {
    auditor: &'a Auditor,
    batch: [Option<Violation>; SCAN_BATCH],
    len: usize,
}

impl Scan<'_> {
    /// As [`Auditor::judge`].
    pub(crate) fn judge(&mut self, outcome: Option<Violation>) -> bool {
        let Some(v) = outcome else {
            return false;
        };
        if self.auditor.is_on() {
            self.auditor.count(v);
            self.batch[self.len] = Some(v);
            self.len += 1;
            if self.len == SCAN_BATCH || self.auditor.policy == Policy::Panic {
                self.flush();
                self.auditor.may_panic(v);
            }
        }
        true
    }

    fn flush(&mut self) {
        if self.len == 0 {
            return;
        }
        let mut records = self.auditor.records.lock();
        for v in self.batch[..self.len].iter().flatten() {
            records.add(*v);
        }
        self.len = 0;
    }
}

impl Drop for Scan<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

#[kunit_tests(zdmirror_audit_report)]
mod tests {
    use super::*;
    use crate::audit::{
        Check,
        Invariant, //
    };
    use crate::mm::uapi::MEMORY_DEVICE_PRIVATE;

    #[test]
    fn policy_words() {
        let cases = [
            (c"off", Some(Policy::Off)),
            (c"report", Some(Policy::Report)),
            (c"panic", Some(Policy::Panic)),
            (c"", None),
            (c"Report", None),
            (c"report ", None),
            (c"bogus", None),
        ];
        for (word, expected) in cases {
            assert_eq!(Policy::parse(word), expected);
        }
    }

    fn auditor(policy: Policy) -> Result<Pin<KBox<Auditor>>> {
        KBox::pin_init(Auditor::new(policy, c"kunit"), GFP_KERNEL)
    }

    fn record(pfn: usize) -> Records {
        let mut records = Records {
            list: [None; RECORDS],
            next: 1,
        };
        records.list[0] = Some(Violation {
            invariant: Invariant::Idle,
            check: Check::Refcount,
            pfn,
            memory_type: MEMORY_DEVICE_PRIVATE,
            order: 0,
            expected: 0,
            found: 1,
        });
        records
    }

    #[test]
    fn nothing_is_recorded_when_off() -> Result {
        let auditor = auditor(Policy::Off)?;
        auditor.judge(record(1).list[0]);
        assert_eq!(auditor.total(), 0);
        assert_eq!(auditor.records(RECORDS)?.len(), 0);
        Ok(())
    }

    #[test]
    fn no_violation_is_not_recorded() -> Result {
        let auditor = auditor(Policy::Report)?;
        assert!(!auditor.judge(None));
        assert_eq!(auditor.total(), 0);
        Ok(())
    }

    #[test]
    fn newest_records_are_kept() -> Result {
        let auditor = auditor(Policy::Report)?;
        // Filled without the log: a KUnit run is to end with a clean one.
        for pfn in 0..RECORDS + 3 {
            if let Some(v) = record(pfn).list[0] {
                auditor.records.lock().add(v);
            }
        }
        let all = auditor.records(usize::MAX)?;
        assert_eq!(all.len(), RECORDS);
        assert_eq!(all.first().map(|v| v.pfn), Some(3));
        assert_eq!(all.last().map(|v| v.pfn), Some(RECORDS + 2));
        let two = auditor.records(2)?;
        assert_eq!(two.len(), 2);
        assert_eq!(two.first().map(|v| v.pfn), Some(RECORDS + 1));
        auditor.clear();
        assert_eq!(auditor.records(RECORDS)?.len(), 0);
        Ok(())
    }

    #[test]
    fn scan_records_all_that_it_judges() -> Result {
        let auditor = auditor(Policy::Report)?;
        // As if the log had had its lines: a KUnit run is to end with a clean one.
        auditor.total.store(LOG_LINES + 1, Relaxed);
        let mut scan = auditor.scan();
        assert!(!scan.judge(None));
        for pfn in 0..SCAN_BATCH + 2 {
            assert!(scan.judge(record(pfn).list[0]));
        }
        assert_eq!(auditor.records(RECORDS)?.len(), SCAN_BATCH);
        drop(scan);
        let all = auditor.records(RECORDS)?;
        assert!(all.iter().map(|v| v.pfn).eq(0..SCAN_BATCH + 2));
        assert_eq!(auditor.total(), LOG_LINES + 1 + SCAN_BATCH as u64 + 2);
        Ok(())
    }

    #[test]
    fn scan_records_nothing_when_off() -> Result {
        let auditor = auditor(Policy::Off)?;
        assert!(auditor.scan().judge(record(1).list[0]));
        assert_eq!(auditor.total(), 0);
        assert_eq!(auditor.records(RECORDS)?.len(), 0);
        Ok(())
    }
}
