// SPDX-License-Identifier: GPL-2.0

//! The examples in the documentation of `rust/kernel`, which `scripts/doctests.rs` makes KUnit cases of.

/// What examples call `kernel`: the crate with the abstractions of this module in it.
mod facade {
    #[allow(unused_imports)]
    pub(crate) use ::kernel::*;

    #[allow(unused_imports)]
    pub(crate) use crate::{
        debugfs,
        stacktrace,
        stamp,
        uapi, //
    };

    pub(crate) mod mm {
        #[allow(unused_imports)]
        pub(crate) use {
            crate::mm::*,
            ::kernel::mm::*, //
        };
    }

    pub(crate) mod miscdevice {
        #[allow(unused_imports)]
        pub(crate) use {
            crate::miscdevice::*,
            ::kernel::miscdevice::*, //
        };
    }

    #[cfg(zdm_no_module_type)]
    pub(crate) mod module {
        /// The only module that there is to an example.
        pub(crate) fn this_module<M>() -> &'static ::kernel::ThisModule {
            &crate::THIS_MODULE
        }
    }
}

include!(env!("ZDM_DOCTESTS"));
