// SPDX-License-Identifier: GPL-2.0

//! Reports violations: to the log, and to a bounded list for `ZDM_AUDIT`.

#![forbid(unsafe_code)]

use super::Violation;
use crate::{
    spinlock::{
        new_spinlock_irq,
        SpinLockIrq, //
    },
    stacktrace::Trace, //
    uapi::ZDM_AUDIT_MAX_RECORDS,
};
use kernel::{
    prelude::*,
    str::CStr,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The number of records that are kept.
const RECORDS: usize = ZDM_AUDIT_MAX_RECORDS as usize;

/// The number of log lines per device until the records are cleared. The count of violations
/// continues. The limit keeps a broken kernel from flooding the log.
const LOG_LINES: u64 = 32;

/// The effect of a broken invariant: the `audit` module parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// Nothing is checked.
    Off,
    /// Violations are logged and kept.
    Report,
    /// The kernel panics at the first violation, with its state unchanged.
    Panic,
}

impl Policy {
    /// Parses the parameter; `None` for an unknown word.
    pub(crate) fn parse(word: &CStr) -> Option<Self> {
        match word.to_bytes() {
            b"off" => Some(Self::Off),
            b"report" => Some(Self::Report),
            b"panic" => Some(Self::Panic),
            _ => None,
        }
    }
}

/// A violation with the stack of the task that met it. A violation that a scan finds has no stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) violation: Violation,
    pub(crate) stack: Trace,
}

/// The newest records, in preallocated memory.
struct Records {
    list: KVec<Record>,
    /// The index of the oldest record once the list is full.
    next: usize,
}

impl Records {
    /// May sleep.
    fn new() -> Result<Self> {
        Ok(Self {
            list: KVec::with_capacity(RECORDS, GFP_KERNEL)?,
            next: 0,
        })
    }

    fn add(&mut self, record: Record) {
        if self.list.len() < RECORDS {
            // `new()` has made room.
            let _ = self.list.push_within_capacity(record);
            return;
        }
        if let Some(place) = self.list.get_mut(self.next) {
            *place = record;
        }
        self.next = (self.next + 1) % RECORDS;
    }

    /// The `n`th record, counted from the oldest one.
    fn get(&self, n: usize) -> Option<Record> {
        let first = if self.list.len() < RECORDS {
            0
        } else {
            self.next
        };
        self.list.get((first + n) % RECORDS).copied()
    }

    fn clear(&mut self) {
        self.list.clear();
        self.next = 0;
    }
}

/// Collects the violations of one device. Its methods do not sleep.
#[pin_data]
pub(crate) struct Auditor {
    policy: Policy,
    device: &'static CStr,
    total: Atomic<u64>,
    healed: Atomic<u64>,
    #[pin]
    records: SpinLockIrq<Records>,
}

impl Auditor {
    /// Makes the auditor of the device that the log calls `device`. May sleep.
    pub(crate) fn new(policy: Policy, device: &'static CStr) -> Result<impl PinInit<Self>> {
        let records = Records::new()?;
        Ok(pin_init!(Self {
            policy,
            device,
            total: Atomic::new(0),
            healed: Atomic::new(0),
            records <- new_spinlock_irq!(records, "Auditor::records"),
        }))
    }

    /// Whether checks are switched on.
    pub(crate) fn is_on(&self) -> bool {
        self.policy != Policy::Off
    }

    /// The number of violations since the module was loaded or the records were cleared.
    pub(crate) fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// The number of suspects that a later look did not find in the same state. They are no
    /// violations. A number that grows on an idle machine shows a fault that heals.
    pub(crate) fn healed(&self) -> u64 {
        self.healed.load(Relaxed)
    }

    /// Counts suspects that have healed.
    pub(crate) fn heal(&self, suspects: u64) {
        self.healed.add(suspects, Relaxed);
    }

    /// Takes the result of a check. Returns whether it was a violation.
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
            let record = Record {
                violation: v,
                // The stack begins with the caller.
                stack: Trace::capture(1),
            };
            self.count(&record);
            self.records.lock().add(record);
            self.may_panic(v);
        }
    }

    /// Begins to judge many pages in sequence.
    pub(crate) fn scan(&self) -> Scan<'_> {
        Scan {
            auditor: self,
            batch: [None; SCAN_BATCH],
            len: 0,
        }
    }

    /// Counts a violation, and logs it unless there were too many.
    fn count(&self, record: &Record) {
        let before = self.total.fetch_add(1, Relaxed);
        if before < LOG_LINES {
            pr_err!(
                "violation: {} device={}\n",
                record.violation,
                self.device.to_str().unwrap_or("?"),
            );
            pr_err!("  last transition: {}\n", record.violation.last);
            for frame in record.stack.frames() {
                pr_err!("  {}\n", frame);
            }
        }
        if before == LOG_LINES {
            pr_err!("violation: more of them are counted, but not logged\n");
        }
    }

    fn may_panic(&self, v: Violation) {
        if self.policy == Policy::Panic {
            // PANIC: The parameter audit=panic asks for it.
            panic!("{}", fmt!("broken invariant: {}", v));
        }
    }

    /// Copies up to `room` of the newest records, the oldest of them first. May sleep.
    pub(crate) fn records(&self, room: usize) -> Result<KVec<Record>> {
        // Allocate before taking the lock, under which sleeping is forbidden.
        let mut out = KVec::with_capacity(room.min(RECORDS), GFP_KERNEL)?;
        let records = self.records.lock();
        let len = records.list.len();
        for record in (len.saturating_sub(room)..len).filter_map(|n| records.get(n)) {
            if out.push_within_capacity(record).is_err() {
                break;
            }
        }
        Ok(out)
    }

    /// Clears the records and the total.
    pub(crate) fn clear(&self) {
        let mut records = self.records.lock();
        records.clear();
        self.total.store(0, Relaxed);
    }
}

/// The number of violations that a scan records together.
const SCAN_BATCH: usize = 16;

/// Judges many pages in sequence, for a kernel that may break a rule on every one of them.
/// Violations are recorded in batches, so that the lock does not dominate the cost of such a scan.
/// Dropping the scan records the rest. Its methods do not sleep.
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
            self.auditor.count(&Self::record(v));
            self.batch[self.len] = Some(v);
            self.len += 1;
            if self.len == SCAN_BATCH || self.auditor.policy == Policy::Panic {
                self.flush();
                self.auditor.may_panic(v);
            }
        }
        true
    }

    fn record(violation: Violation) -> Record {
        Record {
            violation,
            stack: Trace::NONE,
        }
    }

    fn flush(&mut self) {
        if self.len == 0 {
            return;
        }
        let mut records = self.auditor.records.lock();
        for v in self.batch[..self.len].iter().flatten() {
            records.add(Self::record(*v));
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
        Invariant,
        Transition, //
    };
    use crate::uapi::MEMORY_DEVICE_PRIVATE;

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
        KBox::pin_init(Auditor::new(policy, c"kunit")?, GFP_KERNEL)
    }

    fn violation(pfn: usize) -> Violation {
        Violation {
            invariant: Invariant::Idle,
            check: Check::Refcount,
            pfn,
            memory_type: MEMORY_DEVICE_PRIVATE,
            order: 0,
            expected: 0,
            found: 1,
            last: Transition::NONE,
        }
    }

    fn pfns(records: &[Record]) -> impl Iterator<Item = usize> + '_ {
        records.iter().map(|record| record.violation.pfn)
    }

    #[test]
    fn nothing_is_recorded_when_off() -> Result {
        let auditor = auditor(Policy::Off)?;
        auditor.judge(Some(violation(1)));
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
        // Fill the list without the log, because a KUnit run must end with a clean log.
        for pfn in 0..RECORDS + 3 {
            let record = Scan::record(violation(pfn));
            auditor.records.lock().add(record);
        }
        let all = auditor.records(usize::MAX)?;
        assert!(pfns(&all).eq(3..RECORDS + 3));
        let two = auditor.records(2)?;
        assert!(pfns(&two).eq(RECORDS + 1..RECORDS + 3));
        auditor.clear();
        assert_eq!(auditor.records(RECORDS)?.len(), 0);
        Ok(())
    }

    #[test]
    fn scan_records_all_that_it_judges() -> Result {
        let auditor = auditor(Policy::Report)?;
        // Pretend that the log has had its lines, because a KUnit run must end with a clean log.
        auditor.total.store(LOG_LINES + 1, Relaxed);
        let mut scan = auditor.scan();
        assert!(!scan.judge(None));
        for pfn in 0..SCAN_BATCH + 2 {
            assert!(scan.judge(Some(violation(pfn))));
        }
        assert_eq!(auditor.records(RECORDS)?.len(), SCAN_BATCH);
        drop(scan);
        let all = auditor.records(RECORDS)?;
        assert!(pfns(&all).eq(0..SCAN_BATCH + 2));
        assert_eq!(auditor.total(), LOG_LINES + 1 + SCAN_BATCH as u64 + 2);
        Ok(())
    }

    #[test]
    fn scan_records_nothing_when_off() -> Result {
        let auditor = auditor(Policy::Off)?;
        assert!(auditor.scan().judge(Some(violation(1))));
        assert_eq!(auditor.total(), 0);
        assert_eq!(auditor.records(RECORDS)?.len(), 0);
        Ok(())
    }
}
