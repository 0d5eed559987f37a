// SPDX-License-Identifier: GPL-2.0
//! zdvm: builds kernels, boots them in QEMU with the zdmirror module, and judges the result.
//!
//! `verdict` (with `ktap`, `splat`, `taint`) does no input or output at all and is where to look
//! first; `run` ties the rest together.

pub mod accel;
pub mod bisect;
pub mod compare;
pub mod compiler;
pub mod doctor;
pub mod examples;
pub mod expected;
pub mod gdb;
pub mod html;
pub mod job;
pub mod kconfig;
pub mod kdir;
pub mod kernel;
pub mod ktap;
pub mod kvm;
pub mod make;
pub mod matrix;
pub mod mutants;
pub mod patchcheck;
pub mod payload;
pub mod planned;
pub mod progress;
pub mod repo;
pub mod report;
pub mod results;
pub mod run;
pub mod script;
pub mod series;
pub mod splat;
pub mod taint;
pub mod verdict;
pub mod vm;
