// SPDX-License-Identifier: GPL-2.0

//! Registrations that are forgotten, or that the exit of their module overtakes.

use super::{
    device::NoPages,
    support::{
        module_refs,
        this_module, //
    },
};
use crate::mm::{
    hmm::inspect::inspect_pfns,
    module::{
        callback::Callback,
        pin::ModulePin,
        scope::{
            Callbacks,
            ModuleExit,
            ModuleScope,
            Scoped,
            TestExit, //
        },
    },
    pagemap::registration::Registration,
    region::{
        frames::RegionError,
        owner::PgmapOwner, //
    },
};
use kernel::{
    prelude::*,
    sizes::SZ_2M,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

#[kunit_tests(zdmirror_module_scope)]
mod tests {
    use super::*;

    /// Counts how often it was ended.
    struct Ended(Atomic<u32>);

    impl Callbacks for Ended {
        fn end(&self) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[pin_data]
    struct Own {
        ended: Ended,
    }

    impl Callbacks for Own {
        fn end(&self) {
            self.ended.end();
        }
    }

    fn registered() -> Result<KBox<Ended>> {
        Ok(KBox::new(Ended(Atomic::new(0)), GFP_KERNEL)?)
    }

    #[test]
    fn forgotten_registration_keeps_the_module() -> Result {
        let scope = ModuleScope::new(this_module())?;
        let before = module_refs();
        let one_more = before.map(|refs| refs + 1);
        // The entry of a registration that is forgotten is not even dropped; this one is.
        drop(scope.enter()?);
        assert_eq!(module_refs(), one_more);
        // SAFETY: The entry that was dropped leaves its reference of the module behind.
        drop(unsafe { ModulePin::from_leaked(this_module()) });
        assert_eq!(module_refs(), before);
        let entry = scope.enter()?;
        // SAFETY: Nothing was registered.
        let loaded = unsafe { entry.leave() }.ok_or(EINVAL)?;
        assert_eq!(module_refs(), one_more);
        drop(loaded);
        assert_eq!(module_refs(), before);
        Ok(())
    }

    #[test]
    fn exit_ends_what_was_forgotten() -> Result {
        let before = module_refs();
        let one_more = before.map(|refs| refs + 1);
        let (one, other, late) = (registered()?, registered()?, registered()?);
        // SAFETY: The module is running this case, at the end of which the result is dropped.
        let exit = unsafe { TestExit::new(this_module()) }?;
        let scope = exit.scope().clone();
        let (first, second, third) = (scope.enter()?, scope.enter()?, scope.enter()?);
        // SAFETY: It lives until the end of the case.
        unsafe { first.set(&raw const *one) };
        // SAFETY: It lives until the end of the case.
        unsafe { second.set(&raw const *other) };
        // SAFETY: It lives until the end of the case.
        unsafe { third.set(&raw const *late) };
        assert_eq!(module_refs(), before);
        // SAFETY: The kernel calls nothing for the values of this case.
        assert!(unsafe { first.leave() }.is_some());
        core::mem::forget(second);
        drop(exit);
        let ended = |c: &Ended| c.0.load(Relaxed);
        assert_eq!((ended(&one), ended(&other), ended(&late)), (0, 1, 1));
        // A registration that is dropped afterwards is left alone.
        // SAFETY: The kernel calls nothing for the values of this case.
        assert!(unsafe { third.leave() }.is_none());
        assert_eq!(ended(&late), 1);
        // What is registered from here on takes references.
        let entry = scope.enter()?;
        assert_eq!(module_refs(), one_more);
        // SAFETY: Nothing was registered.
        drop(unsafe { entry.leave() });
        assert_eq!(module_refs(), before);
        Ok(())
    }

    #[test]
    fn dropped_in_a_callback_ends_with_the_module() -> Result {
        // SAFETY: The module is running this case, and the result is dropped in it.
        let exit = unsafe { TestExit::new(this_module()) }?;
        let make = || {
            Scoped::new(
                exit.scope(),
                try_pin_init!(Own { ended: Ended(Atomic::new(0)) }? Error),
            )
        };
        let (one, other) = (make()?, make()?);
        let at = &raw const *one;
        let callback = Callback::enter()?;
        drop(one);
        drop((callback, other));
        // SAFETY: What is dropped in a callback stays.
        let ended = unsafe { &(*at).ended.0 };
        assert_eq!(ended.load(Relaxed), 0);
        drop(exit);
        assert_eq!(ended.load(Relaxed), 1);
        Ok(())
    }

    #[test]
    fn exit_is_in_the_module_only() {
        let exit = KBox::try_pin_init(ModuleExit::new(this_module()), GFP_KERNEL);
        let is_module = !this_module().as_ptr().is_null();
        assert_eq!(exit.err(), is_module.then_some(EINVAL));
    }

    #[test]
    fn registration_that_the_exit_overtakes_ends() -> Result {
        static DROPPED: Atomic<u32> = Atomic::new(0);

        /// Unregisters itself when it is dropped.
        #[pin_data(PinnedDrop)]
        struct Late {
            is_started: bool,
        }

        impl Callbacks for Late {
            fn end(&self) {}
        }

        #[pinned_drop]
        impl PinnedDrop for Late {
            fn drop(self: Pin<&mut Self>) {
                DROPPED.fetch_add(u32::from(self.is_started), Relaxed);
            }
        }

        // SAFETY: The module is running this case, which drops what it registers.
        let exit = unsafe { TestExit::new(this_module()) }?;
        let scope = exit.scope().clone();
        // As if a reader of a file that the exit waits for made a registration.
        let init = try_pin_init!(Late {
            is_started: {
                drop(exit);
                true
            },
        }? Error);
        assert_eq!(Scoped::new(&scope, init).err(), Some(ENODEV));
        assert_eq!(DROPPED.xchg(0, Relaxed), 1);
        Ok(())
    }

    #[test]
    fn memory_that_the_exit_overtakes_is_unregistered() -> Result {
        // SAFETY: The module is running this case, which drops what it registers.
        let exit = unsafe { TestExit::new(this_module()) }?;
        let owner = PgmapOwner::in_scope(exit.scope().clone())?;
        let mut first = None;
        let registered = Registration::private(SZ_2M, owner.clone(), |frames| {
            first = Some(frames.first_pfn());
            drop(exit);
            Ok(NoPages)
        });
        assert_eq!(registered.err(), Some(RegionError::NoSpace));
        let mut found = [Some(0)];
        inspect_pfns(first.ok_or(EINVAL)?, &mut found, &owner, |facts| {
            facts.map(|_| 1)
        })?;
        assert_eq!(found, [None]);
        Ok(())
    }
}
