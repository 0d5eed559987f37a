// SPDX-License-Identifier: GPL-2.0

//! The operations of a device node.

#![forbid(unsafe_code)]

use super::{
    client::Client,
    device::Device, //
};
use crate::{
    miscdevice::NodeOps,
    mm::{
        task::check_signals,
        PAGE_SIZE, //
    }, //
};
use kernel::{
    alloc::flags::__GFP_ZERO,
    mm::virt::VmaNew,
    page::Page,
    prelude::*,
    sync::Arc, //
};

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

    /// Maps zeroed pages of the driver's, as a device maps its own, which no LRU list knows.
    fn mmap(&self, vma: &VmaNew) -> Result {
        let area = vma.set_mixedmap();
        for address in (vma.start()..vma.end()).step_by(PAGE_SIZE) {
            check_signals()?;
            let page = Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?;
            area.vm_insert_page(address, &page)?;
        }
        Ok(())
    }
}
