// SPDX-License-Identifier: GPL-2.0

//! A driver to start from, for a device with its own memory. Processes migrate their pages to the
//! device by an ioctl. The first CPU access brings them back, and so does the last close. It uses
//! only `rust/kernel`. A real driver has a copy engine, and allocates large folios, too.

#![forbid(unsafe_code)]

use crate::miscdevice::NodeOps;
use crate::mm::prelude::*;
use kernel::{prelude::*, sync::Arc, uaccess};

/// The only command: migrates the range that the two numbers at `arg` name, address and count.
pub(crate) const MIGRATE: u32 = kernel::ioctl::_IOW::<[u64; 2]>(b'z' as u32, 0x40);

/// The free pages, and the callbacks of core mm.
pub(crate) struct Pages(FreeStack);

impl PagemapOps for Pages {
    fn folio_free(&self, folio: FreedFolio<'_>) {
        if let Some(free) = folio.into_free() {
            let _ = self.0.push(free);
        }
    }
}

impl PrivateOps for Pages {
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError> {
        let mut buffer = PfnBuffer::new(1 << fault.order())?;
        let mut migration = fault.migrate(&mut buffer, &Vram)?;
        migration
            .fill_system(|order| SystemFolio::alloc_vma(fault.vma(), fault.address(), order))?;
        drop(migration.copied()?.finalize());
        Ok(())
    }
}

/// The CPU copies to and from the backing of a page. A real engine has a `dma_device()` and a
/// `fence()`, and gets the two ends from `CpuPages::dma_address()` and `DevicePages::pfn()`.
struct Vram;

impl DeviceMemory for Vram {
    fn copy_in(&self, to: &mut DevicePages<'_>, from: &CpuPages<'_>) -> Result<(), CopyError> {
        to.copy_from_cpu(from)
    }

    fn copy_out(&self, to: &mut CpuPages<'_>, from: &DevicePages<'_>) -> Result<(), CopyError> {
        from.copy_to_cpu(to)
    }

    fn clear(&self, to: &mut DevicePages<'_>) -> Result<(), CopyError> {
        to.clear()
    }
}

/// The device.
pub(crate) struct Chip {
    pub(crate) memory: Registration<Pages>,
    owner: Arc<PgmapOwner>,
}

impl Chip {
    /// Makes a device with `bytes` of memory, a multiple of 2 MiB. May sleep.
    pub(crate) fn new(bytes: usize, scope: &Arc<ModuleScope>) -> Result<Arc<Self>> {
        let owner = PgmapOwner::in_scope(scope.clone())?;
        let pages = |frames| Ok(Pages(FreeStack::new(frames)?));
        let (memory, free) = Registration::private(bytes, owner.clone(), pages)?;
        for folio in free {
            memory.ops().0.push(folio).map_err(|_| EINVAL)?;
        }
        Ok(Arc::new(Self { memory, owner }, GFP_KERNEL)?)
    }

    /// Allocates a free page.
    fn alloc(&self) -> Option<LockedDeviceFolio> {
        let free = &self.memory.ops().0;
        let backing = Backing::alloc(0).ok()?;
        let folio = free.pop()?;
        let pfn = folio.first_pfn();
        let page = folio.split_to(pfn, 0, |rest| drop(free.push(rest))).ok()?;
        self.memory.folio_init(page, backing).ok()
    }

    /// Brings all pages back, wherever they are mapped. Held pages stay. May sleep.
    fn evict(&self) -> Result {
        let mut buffer = PfnBuffer::new(MAX_PAGES)?;
        for part in self.memory.used_pfns()?.chunks(MAX_PAGES) {
            let list = self.memory.device_pfns(part).ok_or(EINVAL)?;
            let mut migration = Migration::of_device_pages(&mut buffer, &list, &Vram)?;
            migration.fill_system(SystemFolio::alloc)?;
            drop(migration.copied()?.finalize());
        }
        Ok(())
    }
}

/// Pages that are not given back would keep their memory registered.
impl Drop for Chip {
    fn drop(&mut self) {
        while let Some(folio) = self.memory.ops().0.pop() {
            let _ = self.memory.retire(folio);
        }
    }
}

/// An open file.
pub(crate) struct Context(Arc<Chip>);

impl Context {
    /// Migrates `range` of the current task to the device, as far as there is room. May sleep.
    fn migrate(&self, range: PageRange) -> Result {
        let task = current!();
        let mm = task.mm().ok_or(EINVAL)?;
        let mut buffer = PfnBuffer::new(range.pages())?;
        for range in range.batches(buffer.capacity()) {
            check_signals()?;
            let lock = MmapLock::read(mm)?;
            let area = Area::locked(&lock, range.start()).ok_or(EFAULT)?;
            let request = Request::system(area, range, &self.0.owner);
            let mut migration = Migration::of_range(&mut buffer, &request, &Vram)?;
            migration.fill_device(|_| self.0.alloc().ok_or(ENOSPC))?;
            drop(migration.copied()?.finalize());
        }
        Ok(())
    }
}

#[vtable]
impl NodeOps for Context {
    type Data = Arc<Chip>;

    fn open(chip: &Arc<Chip>) -> Result<Pin<KBox<Self>>> {
        Ok(KBox::pin(Self(chip.clone()), GFP_KERNEL)?)
    }

    fn release(&self) {
        // If there is no memory for the eviction, the module stays loaded.
        let _ = self.0.evict();
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        if cmd != MIGRATE {
            return Err(ENOTTY);
        }
        let user = uaccess::UserSlice::new(uaccess::UserPtr::from_addr(arg), 16);
        let [start, pages]: [u64; 2] = user.reader().read()?;
        let range = PageRange::new(start as usize, pages as usize)?;
        self.migrate(range).map(|()| 0)
    }
}
