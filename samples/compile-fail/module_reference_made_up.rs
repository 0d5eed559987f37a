// SPDX-License-Identifier: GPL-2.0
// error: E0423

//! References on the module are taken, not made up.

#![forbid(unsafe_code)]

use crate::mm::module::pin::ModulePin;
use kernel::ThisModule;

fn pin(module: &'static ThisModule) -> ModulePin {
    ModulePin(module)
}
