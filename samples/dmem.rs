// SPDX-License-Identifier: GPL-2.0

//! A driver for a device with memory of its own, to start from: processes migrate their pages to
//! the device by an ioctl, the first CPU access brings them back, and so does the last close.
//!
//! It takes nothing of zdmirror but the abstractions of `rust/kernel`. A real driver has an allocator
//! that does not search, large folios, and something to do besides.

#![forbid(unsafe_code)]

use crate::miscdevice::NodeOps;
use crate::mm::prelude::*;
use kernel::{
    prelude::*,
    sync::Arc,
    uaccess, //
};

/// The only command: migrates the pages that two numbers at `arg` name, address and count.
pub(crate) const MIGRATE: u32 = kernel::ioctl::_IOW::<[u64; 2]>(b'z' as u32, 0x40);

/// The free pages, and what core mm calls this driver for.
pub(crate) struct Pages(FreeStack);

impl PagemapOps for Pages {
    fn folio_free(&self, folio: FreedFolio<'_>) {
        if let Some(free) = folio.into_free() {
            let _ = self.0.push(free);
        }
    }

    fn folio_split(&self, _index: usize, _order: u32) {}
}

impl PrivateOps for Pages {
    fn migrate_to_ram(&self, fault: &VmFault<'_>) -> Result<(), FaultError> {
        let mut buffer = PfnBuffer::new(1 << fault.order())?;
        let mut migration = fault.migrate(&mut buffer)?;
        copy_back(&mut migration, &|order| {
            SystemFolio::alloc_vma(&fault.vma(), fault.address(), order)
        })?;
        drop(migration.copied().finalize());
        Ok(())
    }
}

/// Gives each source on the device a place in system memory.
fn copy_back(m: &mut Migration<'_, Setup>, alloc: &dyn Fn(u32) -> Result<SystemFolio>) -> Result {
    for i in 0..m.len() {
        if let Some(order) = m.source(i) {
            let folio = alloc(order)?;
            m.copy_to_system(i, 0, folio).map_err(|_| EFAULT)?;
        }
    }
    Ok(())
}

/// The device.
pub(crate) struct Chip {
    pub(crate) memory: Registration<Pages>,
    owner: Arc<PgmapOwner>,
}

impl Chip {
    /// A device with `bytes` of memory, a multiple of 2 MiB. May sleep.
    pub(crate) fn new(bytes: usize) -> Result<Arc<Self>> {
        let owner = PgmapOwner::new()?;
        let pages = |frames| Ok(Pages(FreeStack::new(frames)?));
        let (memory, free) = Registration::private(bytes, owner.clone(), pages)?;
        for folio in free {
            memory.ops().0.push(folio).map_err(|_| EINVAL)?;
        }
        Ok(Arc::new(Self { memory, owner }, GFP_KERNEL)?)
    }

    /// Any page that is free.
    fn alloc(&self) -> Option<LockedDeviceFolio> {
        let free = &self.memory.ops().0;
        let backing = Backing::new(MemoryType::Private, 0).ok()?;
        let mut folio = None;
        free.take(1, |first| folio = Some(first));
        let folio = folio?;
        let pfn = folio.first_pfn();
        let page = folio.split_to(pfn, 0, |rest| drop(free.push(rest))).ok()?;
        self.memory.hand_out(page, backing).ok()
    }

    /// Brings all pages back, wherever they are mapped. Pages that somebody holds stay. May sleep.
    fn evict(&self) -> Result {
        let mut buffer = PfnBuffer::new(MAX_PAGES)?;
        let mut pfns = KVVec::new();
        for index in (0..self.memory.pages()).filter(|&i| self.memory.order_in_use(i).is_some()) {
            pfns.push(self.memory.first_pfn() + index, GFP_KERNEL)?;
        }
        for part in pfns.chunks(buffer.capacity()) {
            let list = self.memory.device_pfns(part).ok_or(EINVAL)?;
            let mut migration = Migration::of_device_pages(&mut buffer, &list);
            copy_back(&mut migration, &SystemFolio::alloc)?;
            drop(migration.copied().finalize());
        }
        Ok(())
    }
}

/// Pages that are not given back keep their memory registered.
impl Drop for Chip {
    fn drop(&mut self) {
        let memory = &self.memory;
        memory
            .ops()
            .0
            .take(usize::MAX, |folio| drop(memory.retire(folio)));
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
            let mmap = mm.mmap_read_lock();
            let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
            let request = Request {
                area,
                range,
                select: Select::System,
                large: false,
                owner: &self.0.owner,
            };
            let mut migration = Migration::of_range(&mut buffer, &request)?;
            for i in 0..migration.len() {
                if migration.source(i).is_some() {
                    let folio = self.0.alloc().ok_or(ENOSPC)?;
                    migration.copy_to_device(i, 0, folio).map_err(|_| EFAULT)?;
                }
            }
            drop(migration.copied().finalize());
        }
        Ok(())
    }
}

impl NodeOps for Context {
    type Data = Arc<Chip>;

    fn open(chip: &Arc<Chip>) -> Result<Pin<KBox<Self>>> {
        Ok(KBox::pin(Self(chip.clone()), GFP_KERNEL)?)
    }

    fn release(&self) {
        // Without memory to evict with, the module stays loaded.
        let _ = self.0.evict();
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        if cmd != MIGRATE {
            return Err(ENOTTY);
        }
        let user = uaccess::UserSlice::new(uaccess::UserPtr::from_addr(arg), 16);
        let [start, pages]: [u64; 2] = user.reader().read()?;
        self.migrate(PageRange::new(start as usize, pages as usize)?)?;
        Ok(0)
    }
}
