// SPDX-License-Identifier: GPL-2.0
// error: E0277

//! The exit of a module is initialised in place, in the module's own memory, and stays there.

#![forbid(unsafe_code)]

use crate::mm::module::scope::ModuleExit;
use kernel::prelude::*;

fn moved(module: &'static ThisModule) -> Result {
    pin_init::stack_try_pin_init!(let exit = ModuleExit::new(module));
    let exit = exit?;
    let unpinned: &mut ModuleExit = Pin::into_inner(exit);
    let _ = unpinned;
    Ok(())
}
