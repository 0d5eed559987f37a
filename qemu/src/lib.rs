// SPDX-License-Identifier: GPL-2.0
//! zdvm: builds kernels, boots them in QEMU with the zdmirror module, and judges the result.
//!
//! - [`plan`]: which tests run, and which results each kernel must give.
//! - [`kernel`]: the tree of a kernel, the user's or one of the matrix: patched, configured and
//!   built.
//! - [`vm`]: the guest: its files, its accelerator, and QEMU.
//! - [`judge`]: the verdict on what a guest sent. It does no input or output.
//! - [`report`]: the verdict as text, JSON, JUnit and a page.
//! - [`command`]: the commands of the program, which connect the other modules.

pub mod command;
pub mod job;
pub mod judge;
pub mod kernel;
pub mod plan;
pub mod progress;
pub mod repo;
pub mod report;
pub mod vm;
