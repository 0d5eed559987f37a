// SPDX-License-Identifier: GPL-2.0
//! zdvm: builds kernels, boots them in QEMU with the zdmirror module, and judges the result.

pub mod ktap;
pub mod matrix;
pub mod splat;
pub mod taint;
pub mod verdict;
