// SPDX-License-Identifier: GPL-2.0

//! Misc devices with data of their own.
//!
//! `kernel::miscdevice` has no place for data of the device: `open()` gets the registration only.
//! Here the registration is embedded in a [`Node`] next to the data.
//!
//! C header: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h)

use core::marker::PhantomData;
use kernel::{
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::virt::VmaNew,
    prelude::*, //
};

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
pub(crate) trait NodeOps: Send + Sync + Sized + 'static {
    /// Data of the device.
    type Data: Send + Sync + 'static;

    /// A file is opened by the current task. May sleep.
    fn open(data: &Self::Data) -> Result<Pin<KBox<Self>>>;

    /// The last reference on the file is gone; the state is dropped afterwards. May sleep.
    fn release(&self);

    /// An ioctl of the current task, possibly one of several at a time. May sleep.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize>;

    /// The file is mapped at `vma`, with the mmap lock held for writing. May sleep. After an error
    /// core mm unmaps what was mapped already. By default a file cannot be mapped.
    fn mmap(&self, _vma: &VmaNew) -> Result {
        Err(ENODEV)
    }
}

/// A registered misc device.
///
/// # Examples
///
/// ```
/// use kernel::miscdevice::{Node, NodeOps};
/// # struct Context;
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
/// let node = KBox::try_pin_init(Node::<Context>::register(c"zdm_example", 7), GFP_KERNEL)?;
/// // `/dev/zdm_example` goes away with the node.
/// drop(node);
/// # Ok::<(), Error>(())
/// ```
#[pin_data]
pub(crate) struct Node<T: NodeOps> {
    // Deregistered before the data goes.
    #[pin]
    registration: MiscDeviceRegistration<Shim<T>>,
    data: T::Data,
}

impl<T: NodeOps> Node<T> {
    /// Registers `/dev/NAME`. May sleep.
    pub(crate) fn register(name: &'static CStr, data: T::Data) -> impl PinInit<Self, Error> {
        // A file may be opened as soon as the device is registered, so that comes last.
        try_pin_init!(Self {
            data,
            registration <- MiscDeviceRegistration::register(MiscDeviceOptions { name }),
        })
    }
}

/// Carries the operations. The type is private to this file, so that only [`Node::register`] can
/// register it.
struct Shim<T>(PhantomData<T>);

#[vtable]
impl<T: NodeOps> MiscDevice for Shim<T> {
    type Ptr = Pin<KBox<T>>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        // SAFETY: No other file can name `Shim`, and this one registers it within a `Node` only. The
        // node stays until `registration` is dropped, which waits for this call.
        let node =
            unsafe { &*kernel::container_of!(core::ptr::from_ref(misc), Node<T>, registration) };
        T::open(&node.data)
    }

    fn release(device: Self::Ptr, _file: &File) {
        device.release();
    }

    fn ioctl(device: Pin<&T>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        device.get_ref().ioctl(cmd, arg)
    }

    fn mmap(device: Pin<&T>, _file: &File, vma: &VmaNew) -> Result {
        device.get_ref().mmap(vma)
    }
}
