// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/zdmirror/NAME`: `ZDM_STATS` and `ZDM_AUDIT` as text.

#![forbid(unsafe_code)]

use crate::{
    debugfs::{
        Dir,
        Source,
        Text,
        TextFile, //
    },
    driver::device::dmirror_device::Device,
    mm::migrate::moved::ORDERS,
    uapi::{
        is_admin,
        ZdmStats,
        ZDM_AUDIT_MAX_RECORDS, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The files of a device, for as long as it lives.
pub(crate) struct DebugFiles {
    _stats: TextFile<Stats>,
    _audit: TextFile<Audit>,
}

impl DebugFiles {
    /// Makes the files of `device`, in the directory `name` of `root`. May sleep.
    pub(crate) fn new(root: &Arc<Dir>, name: &CStr, device: &Arc<Device>) -> Result<Self> {
        let dir = Dir::new(root.clone(), name)?;
        Ok(Self {
            _stats: TextFile::new(dir.clone(), c"stats", Stats(device.clone()))?,
            _audit: TextFile::new(dir, c"audit", Audit(device.clone()))?,
        })
    }
}

/// The fields of a structure with their names, except those after `..`, which are no numbers. A
/// forgotten field is a compile error.
macro_rules! named {
    ($value:expr, $t:ident { $($field:ident),* .. $($other:ident),* $(,)? }) => {{
        let $t { $($field,)* $($other: _),* } = $value;
        [$((stringify!($field), $field)),*]
    }};
}

/// A line `name value` for each counter.
struct Stats(Arc<Device>);

impl Source for Stats {
    fn write(&self, text: &mut Text) -> Result {
        let stats = self.0.stats();
        let by_order = [
            ("to_device", stats.to_device_by_order),
            ("to_system", stats.to_system_by_order),
        ];
        let stats = named!(
            stats,
            ZdmStats {
                allocated,
                freed,
                to_device,
                to_system,
                cpu_faults,
                device_faults,
                evicted,
                failed_alloc,
                failed_migrate,
                violations,
                large_to_device,
                large_to_system,
                large_fallback,
                max_order,
                exclusive,
                free_refs,
                around,
                around_hits,
                around_waste
                ..
                to_device_by_order,
                to_system_by_order,
            }
        );
        for (name, value) in stats {
            text.line(fmt!("{} {}", name, value))?;
        }
        for (name, folios) in by_order {
            for (order, folios) in folios[..ORDERS].iter().enumerate() {
                text.line(fmt!("{}_order_{} {}", name, order, folios))?;
            }
        }
        Ok(())
    }
}

/// The result of a scan, which runs when the file is read, and a line for each record.
struct Audit(Arc<Device>);

impl Source for Audit {
    fn write(&self, text: &mut Text) -> Result {
        let counts = self.0.audit(self.0.moment())?;
        let auditor = &self.0.core.auditor;
        let counts = [
            ("pages", counts.pages),
            ("free", counts.free),
            ("used", counts.used),
            ("found", counts.found),
            ("total", auditor.total()),
            ("healed", auditor.healed()),
        ];
        for (name, value) in counts {
            text.line(fmt!("{} {}", name, value))?;
        }
        for record in &auditor.records(ZDM_AUDIT_MAX_RECORDS as usize)? {
            let violation = if is_admin() {
                record.violation
            } else {
                record.violation.redacted()
            };
            text.line(fmt!("{}", violation))?;
            text.line(fmt!("  last transition: {}", violation.last))?;
            for frame in record.stack.frames() {
                text.line(fmt!("  {}", frame))?;
            }
        }
        Ok(())
    }
}

#[kunit_tests(zdmirror_debugfs)]
mod tests {
    use super::*;
    use crate::{
        mm::{
            kunit::support::this_module,
            module::scope::ModuleScope, //
        },
        uapi::ZDM_STATS_ORDERS, //
    };

    #[test]
    fn stats_are_names_and_numbers() -> Result {
        let mut text = Text::default();
        Stats(Device::for_test()?).write(&mut text)?;
        let text = core::str::from_utf8(text.as_bytes()).map_err(|_| EINVAL)?;
        assert!(text.starts_with("allocated 0\nfreed 0\n"));
        assert!(text.contains("\naround_waste 0\nto_device_order_0 0\n"));
        let beyond = 2 * (ZDM_STATS_ORDERS as usize - ORDERS);
        assert_eq!(text.lines().count(), size_of::<ZdmStats>() / 8 - beyond);
        Ok(())
    }

    #[test]
    fn audit_of_a_fresh_device() -> Result {
        let mut text = Text::default();
        Audit(Device::for_test()?).write(&mut text)?;
        let expected = b"pages 512\nfree 512\nused 0\nfound 0\ntotal 0\nhealed 0\n";
        assert_eq!(text.as_bytes(), expected);
        Ok(())
    }

    #[test]
    fn files_come_and_go() -> Result {
        let scope = ModuleScope::new(this_module())?;
        let root = Dir::root(scope, c"zdmirror_kunit")?;
        // Debugfs refuses a name that exists. The module ignores that, but the log has an error:
        // the first files must be gone.
        for _ in 0..2 {
            drop(DebugFiles::new(&root, c"kunit", &Device::for_test()?)?);
        }
        Ok(())
    }
}
