// SPDX-License-Identifier: GPL-2.0

//! Registered buffers of io_uring pin device-dax for a long time. io_uring must drop every pin,
//! because the end of a device-dax waits for it.

use std::time::Duration;

use super::mapped::{FOLIOS, Mapped};
use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::dax::{PMD, PTE};
use crate::tests::counts::{IDLE, MAPPED, Waiting, pinned_large};
use crate::tests::{Ctx, Test, test};
use crate::uring::Uring;

pub const TESTS: &[Test] = &[
    test("dax.io_uring", io_uring::<PTE>),
    test("dax.io_uring_pmd", io_uring::<PMD>),
    test("dax.io_uring_unbind", io_uring_unbind),
];

/// Registered buffers of io_uring.
fn io_uring<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let m = Mapped::new(ALIGN)?;
    // io_uring pins each page, and keeps one pin for the pages of a large folio.
    let held = match m.setup.dax.step() {
        1 => m.pinned(),
        _ => pinned_large(m.before, 1),
    };
    for _ in 0..3 {
        let ring = Uring::new().or_fail("io_uring_setup")?;
        ring.register(&m.buf, 0, m.pages)
            .or_fail("IORING_REGISTER_BUFFERS")?;
        m.expect(held, "registered with io_uring")?;
        ring.unregister().or_fail("IORING_UNREGISTER_BUFFERS")?;
        m.expect(m.before, "registered no more")?;
    }
    m.buf.check(0, m.pages, 7)
}

/// The unbind of the device-dax waits for a registered buffer.
fn io_uring_unbind(_: &Ctx) -> Outcome {
    let Mapped {
        buf,
        setup,
        before,
        pages,
    } = Mapped::new(PTE)?;
    if before != MAPPED {
        return Err(Fail::Skip(
            "this kernel's device-dax waits for nobody".into(),
        ));
    }
    let unbinding = Waiting::start(|| Ok(()), || setup.dax.unbind().or_fail("unbind"))?;
    let ring = Uring::new().or_fail("io_uring_setup")?;
    ring.register(&buf, 0, pages)
        .or_fail("IORING_REGISTER_BUFFERS")?;
    let unbinding = unbinding.release()?;
    std::thread::sleep(Duration::from_millis(500));
    check!(
        unbinding.is_running()?,
        "unbind of a device-dax in a registered buffer: expected it to wait, found its end"
    );
    ring.unregister().or_fail("IORING_UNREGISTER_BUFFERS")?;
    unbinding.join()?;
    drop(buf);
    setup.dax.bind().or_fail("bind")?;
    setup.expect(0, FOLIOS, IDLE, "after unbind and bind")
}
