// SPDX-License-Identifier: GPL-2.0

//! An open file of a device: a mirror of the address space that opened it.

#![forbid(unsafe_code)]

use super::{
    device::Device,
    inject::Broken,
    pool::OpenerId, //
};
use crate::{
    miscdevice::NodeOps,
    mm::{
        hmm::HmmMirror,
        task::check_signals,
        PAGE_SIZE, //
    }, //
};
use kernel::{
    alloc::flags::__GFP_ZERO,
    mm::{
        virt::VmaNew,
        MmWithUser, //
    },
    new_mutex,
    page::Page,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};

/// The state of an open file, which forked processes may share.
#[pin_data]
pub(crate) struct Opener {
    #[pin]
    mirror: HmmMirror,
    device: Arc<Device>,
    id: OpenerId,
    #[pin]
    broken: Mutex<Broken>,
}

impl Opener {
    /// Mirrors `mm` on `device`. May sleep.
    pub(super) fn new(device: &Arc<Device>, mm: &MmWithUser) -> Result<Pin<KBox<Self>>> {
        let id = device.add_opener()?;
        let opener = KBox::try_pin_init(
            try_pin_init!(Self {
                mirror <- HmmMirror::new(mm, device.owner.clone()),
                device: device.clone(),
                id,
                broken <- new_mutex!(Broken::default(), "Opener::broken"),
            }),
            GFP_KERNEL,
        );
        if opener.is_err() {
            device.core.pool.lock().remove_opener(id);
        }
        opener
    }

    pub(super) fn mirror(&self) -> &HmmMirror {
        &self.mirror
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The opener's number in the device's pool.
    pub(super) fn id(&self) -> OpenerId {
        self.id
    }

    pub(super) fn broken(&self) -> &Mutex<Broken> {
        &self.broken
    }
}

impl NodeOps for Opener {
    type Data = Arc<Device>;

    fn open(device: &Arc<Device>) -> Result<Pin<KBox<Self>>> {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        Self::new(device, mm)
    }

    fn release(&self) {
        // Data stays with the processes that own it; only this opener's pages are moved.
        self.device.evict(self.id);
        self.device.core.pool.lock().remove_opener(self.id);
        // After the eviction, so that a page kept by injection is reported as what it is.
        self.mend();
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

#[kunit_tests(zdmirror_file)]
mod tests {
    use super::*;
    use crate::{
        audit::Policy,
        driver::Config,
        mm::{
            kunit::mmap_anon,
            migrate::bytes, //
        }, //
    };
    use core::num::NonZeroUsize;
    use kernel::{
        sizes::SZ_2M,
        uaccess::{
            UserPtr,
            UserSlice, //
        }, //
    };

    const PAGES: usize = 16;

    struct Setting {
        device: Arc<Device>,
        opener: Pin<KBox<Opener>>,
        address: usize,
    }

    /// A device of its own, an opener, and some memory of the KUnit thread's address space.
    fn setting() -> Result<Setting> {
        let address = mmap_anon(bytes(PAGES))?;
        let config = Config {
            policy: Policy::Report,
            chunk_pages: NonZeroUsize::new(SZ_2M / PAGE_SIZE).ok_or(EINVAL)?,
            inject: false,
        };
        let device = Device::new(c"kunit", config)?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let opener = Opener::new(&device, mm)?;
        Ok(Setting {
            device,
            opener,
            address,
        })
    }

    fn fill(address: usize) -> Result {
        let mut writer = UserSlice::new(UserPtr::from_addr(address), bytes(PAGES)).writer();
        for page in 0..PAGES {
            writer.write_slice(&[page as u8 + 1; PAGE_SIZE])?;
        }
        Ok(())
    }

    fn holds_pattern(address: usize) -> Result<bool> {
        let mut reader = UserSlice::new(UserPtr::from_addr(address), bytes(PAGES)).reader();
        let mut page = [0u8; PAGE_SIZE];
        for n in 0..PAGES {
            reader.read_slice(&mut page)?;
            if page.iter().any(|&byte| byte != n as u8 + 1) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    #[test]
    fn round_trip_keeps_data_and_counts() -> Result {
        let s = setting()?;
        let range = s.address..s.address + bytes(PAGES);
        fill(s.address)?;
        s.opener.to_device(range.clone())?;
        let counts = s.device.audit()?;
        assert_eq!((counts.used, counts.found), (PAGES as u64, 0));
        assert_eq!(s.opener.to_system(range)?, PAGES);
        let counts = s.device.audit()?;
        assert_eq!((counts.used, counts.found), (0, 0));
        assert!(holds_pattern(s.address)?);
        assert_eq!(s.device.core.auditor.total(), 0);
        Ok(())
    }

    #[test]
    fn cpu_access_brings_pages_back() -> Result {
        let s = setting()?;
        fill(s.address)?;
        s.opener.to_device(s.address..s.address + bytes(PAGES))?;
        assert!(holds_pattern(s.address)?);
        let counts = s.device.audit()?;
        assert_eq!((counts.used, counts.found), (0, 0));
        Ok(())
    }

    #[test]
    fn release_evicts_own_pages_only() -> Result {
        let s = setting()?;
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let other = Opener::new(&s.device, mm)?;
        fill(s.address)?;
        let half = s.address + bytes(PAGES / 2);
        s.opener.to_device(s.address..half)?;
        other.to_device(half..half + bytes(PAGES / 2))?;
        s.opener.release();
        let counts = s.device.audit()?;
        assert_eq!((counts.used, counts.found), (PAGES as u64 / 2, 0));
        other.release();
        let counts = s.device.audit()?;
        assert_eq!((counts.used, counts.found), (0, 0));
        assert!(holds_pattern(s.address)?);
        Ok(())
    }

    #[test]
    fn unmapped_range_is_refused() -> Result {
        let s = setting()?;
        let beyond = s.address..s.address + bytes(PAGES) + (1 << 40);
        assert_eq!(
            s.opener.to_device(beyond.start + (1 << 39)..beyond.end),
            Err(EINVAL)
        );
        assert_eq!(s.device.audit()?.used, 0);
        Ok(())
    }
}
