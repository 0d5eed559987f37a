// SPDX-License-Identifier: GPL-2.0
//! What is to run, and which results each kernel must give.

pub mod campaign;
pub mod expected;
pub mod matrix;
pub mod planned;
