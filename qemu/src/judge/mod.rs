// SPDX-License-Identifier: GPL-2.0
//! The verdict on what a guest said, without input or output.

pub mod ktap;
pub mod splat;
mod stream;
pub mod taint;
pub mod verdict;
