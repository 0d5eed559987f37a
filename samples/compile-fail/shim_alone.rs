// SPDX-License-Identifier: GPL-2.0
// error: E0603

//! The operations of a node are registered together with its data.

#![forbid(unsafe_code)]

use crate::miscdevice::Shim;

type Alone = kernel::miscdevice::MiscDeviceRegistration<Shim<()>>;
