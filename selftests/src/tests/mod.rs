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
            $(super::with($with, super::test(concat!($group, ".", $name), |ctx| {
                $run(ctx, super::target::PRIVATE)
            })),)+
            $(super::with($with, super::test(concat!($group, "_coherent.", $name), |ctx| {
                $run(ctx, super::target::COHERENT)
            })),)+
            $(super::with($with, super::test(concat!($group, "_generic.", $name), |ctx| {
                $run(ctx, super::target::GENERIC)
            })),)+
        ]
    };
}

mod access;
mod account;
mod advice;
mod allocator;
mod bad;
mod bench;
mod blind;
mod cgroup;
mod cgroup_life;
mod chain;
mod close;
mod contention;
mod counts;
mod dax;
mod dax_unbind;
mod daxcross;
mod debugfs;
mod exclusive;
mod exclusive_paths;
mod fail;
mod fault;
mod fault_around;
mod fault_ioctl;
mod fork;
mod fsdax;
mod fsdax_failure;
mod fsdax_io;
mod fsdax_mix;
mod fsdax_races;
mod fsdax_share;
mod fsdax_waits;
mod generic;
mod generic_pins;
mod generic_rule;
mod holders;
mod holes;
mod hostile;
mod inject;
mod inject_each;
mod inject_records;
mod inspect;
mod kill;
mod ksm;
mod leak;
mod lost;
mod migrate;
mod mirror;
mod mixedmap;
mod model;
mod neighbours;
mod owners;
mod pagemaps;
mod params;
mod pin;
mod pin_ioctl;
mod place;
mod poison;
mod race;
mod release;
mod rights;
mod scenarios;
mod snapshot;
mod split_order;
mod strict;
mod swap;
mod target;
mod thp;
mod thp_parts;
mod tlb;
mod uffd;
mod uffd_device;
mod unload;
mod unmap;
mod versus;
mod vfio;

use self::target::{GENERIC, PRIVATE};
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
    pub run: fn(&Ctx) -> Outcome,
    pub needs: Needs,
    pub then: Then,
}

const fn test(name: &'static str, run: fn(&Ctx) -> Outcome) -> Test {
    Test {
        name,
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
        PLAIN,
        GENERIC_PLAIN,
        inspect::TESTS,
        thp::TESTS,
        thp_parts::TESTS,
        split_order::TESTS,
        snapshot::TESTS,
        exclusive::TESTS,
        fault_around::TESTS,
        fault_ioctl::TESTS,
        release::TESTS,
        mixedmap::TESTS,
        fail::TESTS,
        uffd::TESTS,
        uffd_device::TESTS,
        pin::TESTS,
        pin_ioctl::TESTS,
        generic::TESTS,
        generic_pins::TESTS,
        scenarios::TESTS,
        lost::TESTS,
        owners::TESTS,
        dax::TESTS,
        dax_unbind::TESTS,
        vfio::TESTS,
        fsdax::TESTS,
        fsdax_share::TESTS,
        fsdax_waits::TESTS,
        fsdax_failure::TESTS,
        fsdax_io::TESTS,
        fsdax_races::TESTS,
        daxcross::TESTS,
        blind::DAX,
        poison::DAX,
        fsdax_mix::TESTS,
        cgroup::TESTS,
        leak::TESTS,
        chain::TESTS,
        rights::TESTS,
        advice::TESTS,
        swap::TESTS,
        model::TESTS,
        ksm::TESTS,
        poison::TESTS,
        cgroup_life::TESTS,
        contention::TESTS,
        contention::EACH,
        exclusive_paths::TESTS,
        holders::TESTS,
        holes::TESTS,
        neighbours::TESTS,
        place::TESTS,
        mirror::TESTS,
        tlb::TESTS,
        blind::TESTS,
        kill::TESTS,
        hostile::limits::TESTS,
        hostile::holders::TESTS,
        hostile::mappings::TESTS,
        hostile::files::TESTS,
        debugfs::TESTS,
        pagemaps::TESTS,
        allocator::TESTS,
        fault_around::PARAMETER,
        INJECTING,
        fault_around::INJECTING,
        inject_each::TESTS,
        inject_each::MORE,
        inject_records::TESTS,
        hostile::release::INJECTING,
        inject_each::SMALL,
        inject_records::SMALL,
        debugfs::INJECTING,
        pagemaps::INJECTING,
        strict::TESTS,
        params::TESTS,
        pagemaps::ABSENT,
        debugfs::RELOADING,
        generic_rule::RELOADING,
        generic::RELOADING,
        generic_pins::RELOADING,
        RELOADING,
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
    let end = RELOADING.iter().filter(|t| t.name == "unload.clean");
    tests.iter().chain(end).collect()
}

/// Tests with the module's parameters of the machine.
const PLAIN: &[Test] = &[
    test("migrate.round_trip", migrate::round_trip::<PRIVATE>),
    test("migrate.one_page", migrate::one_page::<PRIVATE>),
    test(
        "migrate.read_only_mapping",
        migrate::read_only_mapping::<PRIVATE>,
    ),
    test(
        "migrate.untouched_pages",
        migrate::untouched_pages::<PRIVATE>,
    ),
    test("migrate.partial_range", migrate::partial_range::<PRIVATE>),
    test("migrate.twice", migrate::twice::<PRIVATE>),
    test("migrate.large", migrate::large::<PRIVATE>),
    test("migrate.large_nohuge", migrate::large_nohuge::<PRIVATE>),
    test("migrate.two_devices", migrate::two_devices::<PRIVATE>),
    test("migrate.file_backed", migrate::file_backed::<PRIVATE>),
    test("fault.cpu_read", fault::cpu_read::<PRIVATE>),
    test("fault.cpu_write", fault::cpu_write::<PRIVATE>),
    test("fault.every_other_page", fault::every_other_page::<PRIVATE>),
    test("fault.from_threads", fault::from_threads::<PRIVATE>),
    test("fault.syscall_access", fault::syscall_access::<PRIVATE>),
    test("device.read", access::read::<PRIVATE>),
    test("device.write", access::write::<PRIVATE>),
    test("device.read_migrated", access::read_migrated::<PRIVATE>),
    test("device.write_migrated", access::write_migrated::<PRIVATE>),
    test("device.read_unmapped", access::read_unmapped::<PRIVATE>),
    test("device.write_read_only", access::write_read_only::<PRIVATE>),
    test("unmap.while_migrated", unmap::while_migrated::<PRIVATE>),
    test("unmap.partial_while_migrated", unmap::partial::<PRIVATE>),
    test("unmap.mremap_while_migrated", unmap::mremap::<PRIVATE>),
    test("unmap.madvise_dontneed", unmap::madvise_dontneed::<PRIVATE>),
    test(
        "protect.mprotect_while_migrated",
        unmap::mprotect::<PRIVATE>,
    ),
    test("close.while_migrated", close::while_migrated::<PRIVATE>),
    test(
        "close.other_opener_keeps",
        close::other_opener_keeps::<PRIVATE>,
    ),
    test("close.after_fork", close::after_fork::<PRIVATE>),
    test("close.fd_outlives_mm", close::fd_outlives_mm::<PRIVATE>),
    test("exit.while_migrated", close::exit_while_migrated::<PRIVATE>),
    test("exit.killed", close::exit_killed::<PRIVATE>),
    test(
        "fork.cow_while_migrated",
        fork::cow_while_migrated::<PRIVATE>,
    ),
    test("fork.child_reads", fork::child_reads::<PRIVATE>),
    test("race.munmap_migrate", race::munmap_migrate::<PRIVATE>),
    test("race.fault_migrate", race::fault_migrate::<PRIVATE>),
    test("bad.unknown_ioctl", bad::unknown_ioctl),
    test("bad.unaligned", bad::unaligned),
    test("bad.zero_pages", bad::zero_pages),
    test("bad.wrap", bad::wrap),
    test("bad.beyond_task_size", bad::beyond_task_size),
    test("bad.huge_npages", bad::huge_npages),
    test("bad.pointer", bad::pointer),
    test("bad.no_vma", bad::no_vma),
    test("bad.prot_none", bad::prot_none),
    test("bad.audit_size", bad::audit_size),
    test("account.rss", account::rss::<PRIVATE>),
    test("account.memcg", account::memcg::<PRIVATE>),
    test("inject.not_allowed", inject::not_allowed),
];

/// Those of the same tests that apply to GENERIC memory.
const GENERIC_PLAIN: &[Test] = &[
    test("migrate_generic.round_trip", migrate::round_trip::<GENERIC>),
    test("migrate_generic.one_page", migrate::one_page::<GENERIC>),
    test(
        "migrate_generic.read_only_mapping",
        migrate::read_only_mapping::<GENERIC>,
    ),
    test(
        "migrate_generic.untouched_pages",
        migrate::untouched_pages::<GENERIC>,
    ),
    test(
        "migrate_generic.partial_range",
        migrate::partial_range::<GENERIC>,
    ),
    test("migrate_generic.twice", migrate::twice::<GENERIC>),
    test("migrate_generic.large", migrate::large::<GENERIC>),
    test(
        "migrate_generic.large_nohuge",
        migrate::large_nohuge::<GENERIC>,
    ),
    test(
        "migrate_generic.two_devices",
        migrate::two_devices::<GENERIC>,
    ),
    test(
        "migrate_generic.file_backed",
        migrate::file_backed::<GENERIC>,
    ),
    test("fault_generic.cpu_read", fault::cpu_read::<GENERIC>),
    test("fault_generic.cpu_write", fault::cpu_write::<GENERIC>),
    test(
        "fault_generic.every_other_page",
        fault::every_other_page::<GENERIC>,
    ),
    test("fault_generic.from_threads", fault::from_threads::<GENERIC>),
    test(
        "fault_generic.syscall_access",
        fault::syscall_access::<GENERIC>,
    ),
    test("device_generic.read", access::read::<GENERIC>),
    test("device_generic.write", access::write::<GENERIC>),
    test(
        "device_generic.read_migrated",
        access::read_migrated::<GENERIC>,
    ),
    test(
        "device_generic.write_migrated",
        access::write_migrated::<GENERIC>,
    ),
    test(
        "device_generic.read_unmapped",
        access::read_unmapped::<GENERIC>,
    ),
    test(
        "device_generic.write_read_only",
        access::write_read_only::<GENERIC>,
    ),
    test(
        "unmap_generic.while_migrated",
        unmap::while_migrated::<GENERIC>,
    ),
    test(
        "unmap_generic.partial_while_migrated",
        unmap::partial::<GENERIC>,
    ),
    test(
        "unmap_generic.mremap_while_migrated",
        unmap::mremap::<GENERIC>,
    ),
    test(
        "unmap_generic.madvise_dontneed",
        unmap::madvise_dontneed::<GENERIC>,
    ),
    test(
        "protect_generic.mprotect_while_migrated",
        unmap::mprotect::<GENERIC>,
    ),
    test(
        "close_generic.while_migrated",
        close::while_migrated::<GENERIC>,
    ),
    test(
        "close_generic.other_opener_keeps",
        close::other_opener_keeps::<GENERIC>,
    ),
    test("close_generic.after_fork", close::after_fork::<GENERIC>),
    test(
        "close_generic.fd_outlives_mm",
        close::fd_outlives_mm::<GENERIC>,
    ),
    test(
        "exit_generic.while_migrated",
        close::exit_while_migrated::<GENERIC>,
    ),
    test("exit_generic.killed", close::exit_killed::<GENERIC>),
    test(
        "fork_generic.cow_while_migrated",
        fork::cow_while_migrated::<GENERIC>,
    ),
    test("fork_generic.child_reads", fork::child_reads::<GENERIC>),
    test(
        "race_generic.munmap_migrate",
        race::munmap_migrate::<GENERIC>,
    ),
    test("race_generic.fault_migrate", race::fault_migrate::<GENERIC>),
    test("account_generic.rss", account::rss::<GENERIC>),
    test("account_generic.memcg", account::memcg::<GENERIC>),
];

/// Tests that need injection.
const INJECTING: &[Test] = &[
    with("inject=1", test("inject.not_root", inject::not_root)),
    with("inject=1", test("inject.bad", inject::bad)),
    with("inject=1", test("inject.extra_get", inject::extra_get)),
    with(
        "inject=1",
        test("inject.held_page_fault", inject::held_page_fault),
    ),
    with(
        "inject=1",
        test("inject.free_page_ref", inject::free_page_ref),
    ),
    with(
        "inject=1",
        test("inject.hand_out_twice", inject::hand_out_twice),
    ),
];

/// Tests that load and unload the module themselves.
const RELOADING: &[Test] = &[
    absent(test("bad.module_param", bad::module_param)),
    test("unload.busy", unload::busy),
    unloads(Needs::Loaded(""), test("unload.idle", unload::idle)),
    unloads(
        Needs::Loaded(""),
        test("unload.after_migration", unload::after_migration),
    ),
    absent(test("unload.reload_10", unload::reload_10)),
    unloads(Needs::Any, test("unload.clean", unload::clean)),
];

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
    fn names_are_unique_and_grouped() {
        let tests = all();
        for (i, a) in tests.iter().enumerate() {
            assert!(
                a.name
                    .split_once('.')
                    .is_some_and(|(g, t)| !g.is_empty() && !t.is_empty())
            );
            assert!(tests[..i].iter().all(|b| b.name != a.name), "{}", a.name);
        }
        assert_eq!(tests.last().map(|t| t.name), Some("unload.clean"));
    }
}
