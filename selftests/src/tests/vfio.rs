// SPDX-License-Identifier: GPL-2.0

//! VFIO pins device-dax for devices and for a long time: its mappings are pins. It must drop every
//! pin, because the end of a device-dax waits for it.

use std::path::PathBuf;

use super::counts::pinned;
use super::dax::mapped::{FOLIOS, Mapped};
use super::{Ctx, Test, test};
use crate::check::{Fail, OrFail, Outcome};
use crate::dax::{PMD, PTE};
use crate::vfio::Vfio;

pub const TESTS: &[Test] = &[
    test("vfio.unmap", unmap::<PTE>),
    test("vfio.unmap_pmd", unmap::<PMD>),
    test("vfio.close", close::<PTE>),
    test("vfio.close_pmd", close::<PMD>),
    test("vfio.unmapped_first", unmapped_first),
    test("vfio.unbind", unbind),
];

/// The device that is given to user space.
fn device() -> Outcome<PathBuf> {
    let none = "no device that vfio-pci could have an IOMMU for";
    Vfio::find().ok_or_else(|| Fail::Skip(none.into()))
}

/// Opens the device. It must be opened after the memory that is mapped for it, and dropped before:
/// the end of a device-dax waits for the mapping.
#[track_caller]
fn open(device: PathBuf) -> Outcome<Vfio> {
    Vfio::open(device).or_fail("vfio-pci and its container")
}

/// Folios are mapped for a device and unmapped, three times, because a count that is wrong by one
/// may be missed once.
fn unmap<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let device = device()?;
    let m = Mapped::new(ALIGN)?;
    let vfio = open(device)?;
    for _ in 0..3 {
        vfio.map(&m.buf, 0, m.pages).or_fail("VFIO_IOMMU_MAP_DMA")?;
        m.expect(m.pinned(), "mapped for a device")?;
        vfio.unmap(&m.buf, 0, m.pages)
            .or_fail("VFIO_IOMMU_UNMAP_DMA")?;
        m.expect(m.before, "mapped for a device no more")?;
    }
    m.buf.check(0, m.pages, 7)
}

/// The container is closed while folios are mapped.
fn close<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let device = device()?;
    let m = Mapped::new(ALIGN)?;
    let mut vfio = open(device)?;
    vfio.map(&m.buf, 0, m.pages).or_fail("VFIO_IOMMU_MAP_DMA")?;
    m.expect(m.pinned(), "mapped for a device")?;
    vfio.close();
    m.expect(m.before, "after the container was closed")
}

/// The process unmaps first: pages that the device has mapped stay in use until the device's
/// mapping ends, too.
fn unmapped_first(_: &Ctx) -> Outcome {
    let device = device()?;
    let Mapped {
        buf,
        setup,
        before,
        pages,
    } = Mapped::new(PTE)?;
    let mut vfio = open(device)?;
    vfio.map(&buf, 0, pages).or_fail("VFIO_IOMMU_MAP_DMA")?;
    drop(buf);
    let none = [before[0] - 1, 0, 0];
    setup.expect(0, FOLIOS, pinned(none, 1), "mapped for a device only")?;
    vfio.close();
    setup.expect(0, FOLIOS, none, "after the container was closed")
}

/// The driver of the device-dax is unbound: it waits for the mapping of the device, and for nothing
/// else.
fn unbind(_: &Ctx) -> Outcome {
    let device = device()?;
    Mapped::new(PTE)?.unbind_waits(
        |buf, pages| {
            let vfio = open(device)?;
            vfio.map(buf, 0, pages).or_fail("VFIO_IOMMU_MAP_DMA")?;
            Ok(vfio)
        },
        |vfio, buf, pages| vfio.unmap(buf, 0, pages).or_fail("VFIO_IOMMU_UNMAP_DMA"),
    )
}
