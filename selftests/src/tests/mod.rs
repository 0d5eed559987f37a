// SPDX-License-Identifier: GPL-2.0

//! The table of tests.
//!
//! A test runs in a process of its own and ends with `?` or Ok. Afterwards the harness audits every
//! device, so that a test need not check for leaks.

/// Tests for each kind of memory: `GROUP.NAME` for PRIVATE memory, `GROUP_coherent.NAME` and
/// `GROUP_generic.NAME` for the others, optionally with parameters of the module.
macro_rules! of_each_kind {
    ($group:literal: $($name:literal => $run:ident),+ $(,)?) => {
        of_each_kind!($group, "": $($name => $run),+)
    };
    ($group:literal, $with:literal: $($name:literal => $run:ident),+ $(,)?) => {
        &[
            $(crate::tests::with($with, crate::tests::test(concat!($group, ".", $name), |ctx| {
                $run(ctx, crate::tests::target::PRIVATE)
            })),)+
            $(crate::tests::with($with, crate::tests::test(concat!($group, "_coherent.", $name), |ctx| {
                $run(ctx, crate::tests::target::COHERENT)
            })),)+
            $(crate::tests::with($with, crate::tests::test(concat!($group, "_generic.", $name), |ctx| {
                $run(ctx, crate::tests::target::GENERIC)
            })),)+
        ]
    };
}

mod account;
mod advice;
mod allocator;
mod bad;
mod batches;
mod bench;
mod beside;
mod blind;
mod cgroup;
mod chain;
mod close;
mod counts;
mod dax;
mod daxcross;
mod debugfs;
mod device;
mod differ;
mod entries;
mod evict;
mod exclusive;
mod exit;
mod fail;
mod fault;
mod fault_around;
mod fault_ioctl;
mod fight;
mod fork;
mod fsdax;
mod generic;
mod generic_rule;
mod hmm;
mod holes;
mod hostile;
mod inject;
mod inspect;
mod kill;
mod ksm;
mod kvm;
mod leak;
mod lost;
mod migrate;
mod mirror;
mod mixedmap;
mod model;
mod nodes;
mod owners;
mod pagemaps;
mod params;
mod pin;
mod place;
mod poison;
mod programs;
mod protect;
mod race;
mod release;
mod rights;
mod snapshot;
mod split_order;
mod strict;
mod swap;
mod target;
mod thp;
mod tlb;
mod uffd;
mod unload;
mod unmap;
mod versus;
mod vfio;

use crate::check::{Fail, Outcome};
use crate::device::{Buffer, Device};
use crate::module::Module;
use crate::uapi::Stats;

/// The data that the harness passes to a test.
pub struct Ctx {
    pub module: Module,
}

/// The state of the module in which a test starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// The module is loaded with these parameters.
    Loaded(&'static str),
    /// The module is loaded with any parameters.
    Any,
    /// The module is not loaded, neither before nor after the test.
    Absent,
}

/// The condition after a test that needs the module.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// An audit of every device finds no page in use and no violation.
    Clean,
    /// The test has unloaded the module, and nothing of it is left.
    Gone,
}

pub struct Test {
    pub name: &'static str,
    /// The source file that has the test's entry.
    #[cfg(test)]
    pub file: &'static str,
    pub run: fn(&Ctx) -> Outcome,
    pub needs: Needs,
    pub then: Then,
}

#[track_caller]
const fn test(name: &'static str, run: fn(&Ctx) -> Outcome) -> Test {
    Test {
        name,
        #[cfg(test)]
        file: std::panic::Location::caller().file(),
        run,
        needs: Needs::Loaded(""),
        then: Then::Clean,
    }
}

const fn with(parameters: &'static str, test: Test) -> Test {
    Test {
        needs: Needs::Loaded(parameters),
        ..test
    }
}

const fn absent(test: Test) -> Test {
    Test {
        needs: Needs::Absent,
        ..test
    }
}

const fn unloads(needs: Needs, test: Test) -> Test {
    Test {
        needs,
        then: Then::Gone,
        ..test
    }
}

/// All tests in the order in which they run: tests with the same module parameters follow each
/// other, because a reload is slow, and `unload.clean` comes last.
pub fn all() -> Vec<&'static Test> {
    let groups = [
        generic_rule::TESTS,
        migrate::TESTS,
        fault::TESTS,
        device::TESTS,
        unmap::TESTS,
        protect::TESTS,
        close::TESTS,
        exit::TESTS,
        fork::TESTS,
        race::TESTS,
        bad::TESTS,
        account::TESTS,
        inject::TESTS,
        inspect::TESTS,
        thp::TESTS,
        thp::shared::TESTS,
        thp::parts::TESTS,
        split_order::TESTS,
        snapshot::TESTS,
        exclusive::TESTS,
        fault_around::TESTS,
        fault_ioctl::TESTS,
        release::TESTS,
        mixedmap::TESTS,
        fail::TESTS,
        uffd::TESTS,
        uffd::device::TESTS,
        uffd::held::TESTS,
        pin::TESTS,
        pin::ioctl::TESTS,
        generic::TESTS,
        generic::pins::TESTS,
        hmm::TESTS,
        lost::TESTS,
        owners::TESTS,
        nodes::TESTS,
        dax::TESTS,
        dax::pins::TESTS,
        dax::unbind::TESTS,
        dax::upkeep::TESTS,
        vfio::TESTS,
        kvm::DAX,
        kvm::TESTS,
        dax::uring::TESTS,
        fsdax::TESTS,
        fsdax::share::TESTS,
        fsdax::blocks::TESTS,
        fsdax::bytes::TESTS,
        fsdax::written::TESTS,
        fsdax::upkeep::TESTS,
        fsdax::clones::TESTS,
        fsdax::waits::TESTS,
        fsdax::failure::TESTS,
        fsdax::io::TESTS,
        fsdax::races::TESTS,
        daxcross::TESTS,
        daxcross::SHARING,
        blind::DAX,
        dax::poison::TESTS,
        fsdax::told::TESTS,
        fsdax::mix::TESTS,
        cgroup::TESTS,
        leak::TESTS,
        chain::TESTS,
        rights::TESTS,
        advice::TESTS,
        swap::TESTS,
        model::TESTS,
        ksm::TESTS,
        ksm::IN_TREE,
        poison::TESTS,
        cgroup::life::TESTS,
        fight::TESTS,
        evict::TESTS,
        exclusive::paths::TESTS,
        pin::holders::TESTS,
        pin::around::TESTS,
        pin::around::LONG,
        holes::TESTS,
        programs::TESTS,
        batches::TESTS,
        beside::TESTS,
        place::TESTS,
        mirror::TESTS,
        mirror::IN_PLACE,
        entries::TESTS,
        differ::TESTS,
        tlb::TESTS,
        blind::TESTS,
        kill::TESTS,
        hostile::limits::TESTS,
        hostile::holders::TESTS,
        hostile::mappings::TESTS,
        hostile::files::TESTS,
        hostile::lives::TESTS,
        hostile::others::TESTS,
        hostile::upkeep::TESTS,
        hostile::areas::TESTS,
        hostile::tasks::TESTS,
        hostile::pressure::TESTS,
        hostile::arguments::TESTS,
        hostile::storm::TESTS,
        hostile::machine::TESTS,
        hostile::ways::TESTS,
        hostile::servers::TESTS,
        debugfs::TESTS,
        pagemaps::TESTS,
        allocator::TESTS,
        hostile::holders::SMALL,
        fault_around::PARAMETER,
        inject::INJECTING,
        fault_around::INJECTING,
        inject::each::TESTS,
        inject::each::MORE,
        inject::records::TESTS,
        hostile::release::INJECTING,
        hostile::holders::INJECTING,
        inject::each::SMALL,
        inject::records::SMALL,
        debugfs::INJECTING,
        pagemaps::INJECTING,
        entries::INJECTING,
        mirror::INJECTING,
        strict::TESTS,
        params::TESTS,
        pagemaps::ABSENT,
        debugfs::RELOADING,
        generic_rule::RELOADING,
        generic::RELOADING,
        generic::pins::RELOADING,
        bad::RELOADING,
        unload::TESTS,
    ];
    groups.into_iter().flatten().collect()
}

/// The benchmarks of the oracle, which are a table of their own, with the last test of every run.
pub fn benchmarks() -> Vec<&'static Test> {
    with_end(bench::TESTS)
}

/// The benchmarks against the C driver.
pub fn versus() -> Vec<&'static Test> {
    with_end(versus::TESTS)
}

fn with_end(tests: &'static [Test]) -> Vec<&'static Test> {
    let end = unload::TESTS.iter().filter(|t| t.name == "unload.clean");
    tests.iter().chain(end).collect()
}

/// The number of pages in most tests: more than a batch of the driver's range fault (32), and not a
/// multiple of one.
pub const PAGES: usize = 72;

/// Waits until the device has freed `n` pages since `before`.
#[track_caller]
pub fn freed_since(device: &Device, before: &Stats, n: usize) -> Outcome {
    let mut found = 0;
    crate::sys::wait_until(std::time::Duration::from_secs(2), || {
        // A failed call shows as too few pages.
        found = device
            .stats()
            .map_or(0, |s| s.freed.wrapping_sub(before.freed));
        found >= n as u64
    });
    match found == n as u64 {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "growth of stats.freed: expected {n}, found {found}"
        ))),
    }
}

/// Checks by pagemap how many of the pages are on a device.
#[track_caller]
pub fn expect_on_device(buf: &Buffer, first: usize, n: usize, expected: usize) -> Outcome {
    let found = crate::proc::on_device(buf, first, n)?.len();
    match found == expected {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "device pages in /proc/self/pagemap of pages {first}..{}: expected {expected}, \
             found {found}",
            first + n
        ))),
    }
}

/// Checks by pagemap that all of the pages are in system memory.
#[track_caller]
pub fn expect_present(buf: &Buffer, first: usize, n: usize) -> Outcome {
    let found = crate::proc::present(buf, first, n)?;
    match found == n {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "present pages in /proc/self/pagemap of pages {first}..{}: expected {n}, \
             found {found}",
            first + n
        ))),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn names_are_unique() {
        let tests = all();
        for (i, a) in tests.iter().enumerate() {
            assert!(tests[..i].iter().all(|b| b.name != a.name), "{}", a.name);
        }
        assert_eq!(tests.last().map(|t| t.name), Some("unload.clean"));
    }

    /// `migrate.rs` and the files of a folder `migrate/` have the tests `migrate.*`,
    /// `migrate_coherent.*` and `migrate_generic.*`.
    #[test]
    fn the_prefix_of_a_name_is_its_file_or_folder() {
        for test in all().into_iter().chain(benchmarks()).chain(versus()) {
            let (prefix, name) = test.name.split_once('.').unwrap();
            assert!(!name.is_empty(), "{}", test.name);
            let file = test.file.rsplit_once("src/tests/").unwrap().1;
            let home = file.split('/').next().unwrap().trim_end_matches(".rs");
            let kinds = ["", "_coherent", "_generic"];
            let fits = kinds
                .iter()
                .any(|kind| prefix.strip_suffix(kind) == Some(home));
            assert!(fits, "{} is in {file}", test.name);
        }
    }
}
