// SPDX-License-Identifier: GPL-2.0

//! Misc devices with data of their own.
//!
//! `kernel::miscdevice` has no place for data of the device: `open()` gets the registration only.
//! Here the registration is embedded in a [`Node`] next to the data.
//!
//! C header: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h)

use crate::mm::{
    module::{
        callback::{
            check_may_wait,
            Callback, //
        },
        pin::ModulePin,
        scope::{
            Callbacks,
            ModuleScope,
            Scoped, //
        },
    },
    sync::task::NoFaults, //
};
use core::marker::PhantomData;
use kernel::{
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::virt::VmaNew,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};
use pin_init::Wrapper;

/// The state of an open file of a [`Node`], on which the operations are called.
///
/// # Examples
///
/// ```
/// use kernel::miscdevice::NodeOps;
///
/// /// An open file.
/// struct Context;
///
/// #[vtable]
/// impl NodeOps for Context {
///     /// What all files of the device share.
///     type Data = u32;
///
///     fn open(_limit: &u32) -> Result<Pin<KBox<Self>>> {
///         Ok(KBox::pin(Self, GFP_KERNEL)?)
///     }
///
///     fn release(&self) {}
///
///     fn ioctl(&self, _cmd: u32, _arg: usize) -> Result<isize> {
///         Err(ENOTTY)
///     }
/// }
/// # assert_eq!(Context::open(&1)?.ioctl(0, 0), Err(ENOTTY));
/// # Ok::<(), Error>(())
/// ```
#[vtable]
pub(crate) trait NodeOps: Send + Sync + Sized + 'static {
    /// Data of the device.
    type Data: Send + Sync + 'static;

    /// A file is opened by the current task. May sleep. Core code holds the lock of all misc devices, so that
    /// no [`Node`] can be registered meanwhile, and a node that is dropped stays.
    ///
    /// # Errors
    ///
    /// What `open(2)` returns.
    fn open(data: &Self::Data) -> Result<Pin<KBox<Self>>>;

    /// The last reference on the file is gone; the state is dropped afterwards. May sleep.
    fn release(&self);

    /// An ioctl of the current task, possibly one of several at a time. `arg` is its argument, as a number. May
    /// sleep.
    ///
    /// # Errors
    ///
    /// What `ioctl(2)` returns.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize>;

    /// The file is mapped at `vma`, with the mmap lock held for writing. May sleep. Page faults are disabled: an
    /// access to user memory that needs one fails with `EFAULT`, and what takes the mmap lock with `EDEADLK`. After
    /// an error core mm unmaps what was mapped already. By default a file cannot be mapped.
    ///
    /// # Errors
    ///
    /// What `mmap(2)` returns.
    fn mmap(&self, _vma: &VmaNew) -> Result {
        Err(ENODEV)
    }
}

/// A registered misc device.
///
/// One that is forgotten keeps the module loaded, or ends with it, as its scope says. So does a node that is
/// dropped in [`NodeOps::open`], as [`Scoped`] says.
///
/// # Examples
///
/// ```
/// use kernel::{
///     //,
///     miscdevice::{Node, NodeOps},
///     mm::module::scope::ModuleScope,
///     module::this_module,
/// };
/// # struct Context;
/// # #[vtable]
/// # impl NodeOps for Context {
/// #     type Data = u32;
/// #     fn open(_: &u32) -> Result<Pin<KBox<Self>>> {
/// #         Ok(KBox::pin(Self, GFP_KERNEL)?)
/// #     }
/// #     fn release(&self) {}
/// #     fn ioctl(&self, _cmd: u32, _arg: usize) -> Result<isize> {
/// #         Err(ENOTTY)
/// #     }
/// # }
///
/// let scope = ModuleScope::new(this_module::<LocalModule>())?;
/// let node = Node::<Context>::register(&scope, c"zdm_example", 7)?;
/// // `/dev/zdm_example` goes away with the node.
/// drop(node);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Node<T: NodeOps> {
    _inner: Scoped<Inner<T>>,
}

impl<T: NodeOps> Node<T> {
    /// Registers `/dev/NAME` in `scope`. May sleep.
    ///
    /// Wraps `misc_register()`. Files are opened from the end of the module's init function on: if that
    /// fails the module goes, and open files do not keep it.
    ///
    /// # Errors
    ///
    /// `EINVAL` when [`NodeOps::OwnerModule`], which open files keep loaded, is not the module of `scope`.
    /// `EDEADLK` in [`NodeOps::open`], where core code holds the lock of all misc devices, and wherever else
    /// [`check_may_wait`] says so. `ENODEV` when the module is on its way out, `ENOMEM`, and those of
    /// `misc_register()`, as `EEXIST`.
    pub(crate) fn register(
        scope: &Arc<ModuleScope>,
        name: &'static CStr,
        data: T::Data,
    ) -> Result<Self> {
        if !is_owner::<T>(scope.module()) {
            return Err(EINVAL);
        }
        check_may_wait()?;
        Ok(Self {
            _inner: Scoped::new(scope, Inner::register(scope.module(), name, data))?,
        })
    }
}

/// Whether open files of `T` keep `module` loaded. Safe code can give `OwnerModule` another value than that
/// of `#[vtable]`.
#[cfg(not(zdm_no_module_type))]
fn is_owner<T: NodeOps>(module: &'static ThisModule) -> bool {
    kernel::module::this_module::<T::OwnerModule>().as_ptr() == module.as_ptr()
}

/// Before Linux 7.3 open files keep this module loaded.
#[cfg(zdm_no_module_type)]
fn is_owner<T: NodeOps>(_module: &'static ThisModule) -> bool {
    true
}

/// The registration, and the data that `open()` needs.
///
/// # Invariants
///
/// `registration` is initialised, until [`Callbacks::end`] or `drop()` drops it.
#[pin_data(PinnedDrop)]
struct Inner<T: NodeOps> {
    #[pin]
    registration: Opaque<MiscDeviceRegistration<Shim<T>>>,
    module: &'static ThisModule,
    data: T::Data,
}

// SAFETY: A misc device belongs to no thread, and `T::Data` is `Send`.
unsafe impl<T: NodeOps> Send for Inner<T> {}
// SAFETY: The misc device locks by itself, and `T::Data` is `Sync`.
unsafe impl<T: NodeOps> Sync for Inner<T> {}

impl<T: NodeOps> Inner<T> {
    fn register(
        module: &'static ThisModule,
        name: &'static CStr,
        data: T::Data,
    ) -> impl PinInit<Self, Error> {
        // A file may be opened as soon as the device is registered, so that comes last.
        try_pin_init!(Self {
            module,
            data,
            registration <- Opaque::pin_init(MiscDeviceRegistration::register(MiscDeviceOptions {
                name
            })),
        })
    }
}

impl<T: NodeOps> Callbacks for Inner<T> {
    fn end(&self) {
        // SAFETY: The registration is initialised by the type invariants of `Inner`. What has ended is not
        // dropped.
        unsafe { core::ptr::drop_in_place(self.registration.get()) };
    }
}

#[pinned_drop]
impl<T: NodeOps> PinnedDrop for Inner<T> {
    fn drop(self: Pin<&mut Self>) {
        // The data goes when the device is deregistered.
        self.end();
    }
}

/// Calls [`NodeOps::open`] for a new file.
#[cfg(not(zdm_no_module_type))]
fn open_file<T: NodeOps>(data: &T::Data) -> Result<Pin<KBox<T>>> {
    let _callback = Callback::enter()?;
    T::open(data)
}

/// The same before Linux 7.3, where the operations of a misc device name no module: the file takes a reference of
/// its own.
#[cfg(zdm_no_module_type)]
fn open_file<T: NodeOps>(data: &T::Data) -> Result<Pin<KBox<T>>> {
    // SAFETY: The function takes no argument.
    if !unsafe { crate::bindings::zdm_own_file() } {
        return Err(ENODEV);
    }
    let opened = Callback::enter().and_then(|_callback| T::open(data));
    if opened.is_err() {
        // SAFETY: The reference was taken above. It is not the last one, as the misc device is registered
        // until `open()` returns.
        unsafe { crate::bindings::zdm_disown_file() };
    }
    opened
}

/// Carries the operations. The type is private to this file, so that only [`Node::register`] can
/// register it.
struct Shim<T>(PhantomData<T>);

#[vtable]
impl<T: NodeOps> MiscDevice for Shim<T> {
    /// Open files keep the module of the driver loaded.
    #[cfg(not(zdm_no_module_type))]
    type OwnerModule = T::OwnerModule;

    type Ptr = Pin<KBox<T>>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        let registration = Opaque::cast_from(misc);
        // SAFETY: No other file can name `Shim`, and this one registers it within an `Inner` only, which
        // stays until the registration is dropped. That waits for this call.
        let inner = unsafe { &*kernel::container_of!(registration, Inner<T>, registration) };
        // The reference that core code has taken for the file keeps the module once its init function has
        // succeeded, and not before.
        let _live = ModulePin::try_take(inner.module).ok_or(ENODEV)?;
        open_file::<T>(&inner.data)
    }

    fn release(device: Self::Ptr, _file: &File) {
        device.release();
        #[cfg(zdm_no_module_type)]
        {
            // SAFETY: This is the last reference of a file for which `open_file()` has taken a reference of the
            // module. Core code does nothing with the operations after this call but to drop their module.
            unsafe { crate::bindings::zdm_give_file(_file.as_ptr().cast()) };
        }
    }

    fn ioctl(device: Pin<&T>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        device.get_ref().ioctl(cmd, arg)
    }

    fn mmap(device: Pin<&T>, _file: &File, vma: &VmaNew) -> Result {
        // Core mm holds the mmap lock.
        let _no_faults = NoFaults::new();
        device.get_ref().mmap(vma)
    }
}

#[cfg(not(zdm_no_module_type))]
#[kunit_tests(zdmirror_miscdevice)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::this_module,
        module::scope::TestExit,
        would_deadlock, //
    };
    use kernel::ModuleMetadata;

    /// A module that is not the one of this case.
    struct Other;

    impl ModuleMetadata for Other {
        const NAME: &'static CStr = c"other";
        const THIS_MODULE: ThisModule = {
            // SAFETY: Nothing but the address is looked at.
            unsafe { ThisModule::from_ptr(core::ptr::dangling_mut()) }
        };
    }

    struct Context;

    #[vtable]
    impl NodeOps for Context {
        type OwnerModule = Other;
        type Data = u32;

        fn open(_: &u32) -> Result<Pin<KBox<Self>>> {
            Err(ENODEV)
        }

        fn release(&self) {}

        fn ioctl(&self, _cmd: u32, _arg: usize) -> Result<isize> {
            Err(ENOTTY)
        }
    }

    #[test]
    fn files_of_another_module_are_refused() -> Result {
        let scope = ModuleScope::new(this_module())?;
        let node = Node::<Context>::register(&scope, c"zdm_kunit", 7);
        assert_eq!(node.err(), Some(EINVAL));
        Ok(())
    }

    struct Own;

    #[vtable]
    impl NodeOps for Own {
        type Data = ();

        fn open((): &()) -> Result<Pin<KBox<Self>>> {
            Err(ENODEV)
        }

        fn release(&self) {}

        fn ioctl(&self, _cmd: u32, _arg: usize) -> Result<isize> {
            Err(ENOTTY)
        }
    }

    #[test]
    fn open_does_not_wait_for_its_own_lock() -> Result {
        const NAME: &CStr = c"zdm_kunit_open";
        // SAFETY: The module is running this case, at the end of which the result is dropped.
        let exit = unsafe { TestExit::new(this_module()) }?;
        let scope = exit.scope();
        let register = || Node::<Own>::register(scope, NAME, ());
        let node = register()?;
        let opening = Callback::enter()?;
        assert_eq!(register().err(), Some(would_deadlock()));
        drop(node);
        drop(opening);
        // The node stays, and ends with the module.
        assert_eq!(register().err(), Some(EEXIST));
        drop(exit);
        drop(Node::<Own>::register(
            &ModuleScope::new(this_module())?,
            NAME,
            (),
        )?);
        Ok(())
    }
}
