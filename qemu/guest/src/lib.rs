// SPDX-License-Identifier: GPL-2.0
//! The definitions that guest and host share: the wire protocol and the run plan.

pub mod plan;
pub mod wire;
