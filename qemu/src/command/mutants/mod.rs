// SPDX-License-Identifier: GPL-2.0
//! `zdvm mutants`: measures how good the tests are. The kernel has bugs that are seeded on purpose.
//! Each boot switches one of them on, and the tests have to notice it.
//!
//! Three detectors are measured: our selftests with our module, and upstream's hmm-tests with the C
//! driver and with our module. Each detector first runs without a bug. That run must be clean, and
//! it records which test reaches which bug; a bug that no test reaches needs no boot. A boot ends
//! as soon as the bug is found. Results are stored, and a bug is booted again only if the bug, the
//! kernel, the module or the tests have changed.

pub mod catalogue;
pub mod finding;
pub mod plan;
pub mod run;
pub mod table;
pub mod verdicts;
pub mod watch;
