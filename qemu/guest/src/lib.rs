// SPDX-License-Identifier: GPL-2.0
//! What the guest and the host both have to know: the wire protocol and the run plan.

pub mod plan;
pub mod wire;
