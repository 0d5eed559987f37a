// SPDX-License-Identifier: GPL-2.0

//! Words that several tasks write, and waits that end.

pub(crate) mod cache_line;
pub(super) mod killable;
pub(crate) mod once;
pub(crate) mod preempted;
pub(crate) mod task;
