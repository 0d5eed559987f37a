// SPDX-License-Identifier: GPL-2.0

//! The operations of a device node.

#![forbid(unsafe_code)]

use crate::{
    driver::{
        client::open_file::Client,
        device::dmirror_device::Device, //
    },
    miscdevice::NodeOps,
    mm::{
        sync::task::check_signals,
        PAGE_SIZE, //
    },
};
use kernel::{
    alloc::flags::__GFP_ZERO,
    mm::virt::VmaNew,
    page::Page,
    prelude::*,
    sizes::SZ_64M,
    sync::Arc, //
};

/// The largest mapping of a device, in bytes. Its pages are allocated with the mmap lock held.
const MAX_MAPPING: usize = SZ_64M;

#[vtable]
impl NodeOps for Client {
    type Data = Arc<Device>;

    fn open(device: &Arc<Device>) -> Result<Pin<KBox<Self>>> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        Self::new(device, mm)
    }

    fn release(&self) {
        self.close();
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        self.dispatch(cmd, arg).map(|()| 0)
    }

    /// Maps zeroed pages of the driver, as a device maps its own pages, which are on no LRU list.
    /// They are charged to the memory cgroup of the task.
    fn mmap(&self, vma: &VmaNew) -> Result {
        if vma.end() - vma.start() > MAX_MAPPING {
            return Err(ENOMEM);
        }
        let area = vma.set_mixedmap();
        for address in (vma.start()..vma.end()).step_by(PAGE_SIZE) {
            check_signals()?;
            let page = Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?;
            area.vm_insert_page(address, &page)?;
        }
        Ok(())
    }
}
