// SPDX-License-Identifier: GPL-2.0
//! Judges what a guest sent, without input or output.

pub mod ktap;
pub mod splat;
mod stream;
pub mod taint;
pub mod verdict;
