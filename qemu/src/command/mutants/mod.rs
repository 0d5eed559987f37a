// SPDX-License-Identifier: GPL-2.0
//! `zdvm mutants`: how good are the tests? A kernel with bugs seeded on purpose is booted with one of
//! them switched on, and the tests have to notice.
//!
//! Three detectors are measured: our selftests with our module, and upstream's hmm-tests with the C
//! driver and with our module. Each first runs without a bug, which must be clean and says which
//! test would reach which bug; a bug that no test reaches needs no boot. A boot ends when the bug
//! is found. What was found out is kept, and found out again only if bug, kernel, module or tests
//! are others.

pub mod catalogue;
pub mod finding;
pub mod plan;
pub mod run;
pub mod table;
pub mod watch;
