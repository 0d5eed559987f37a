// SPDX-License-Identifier: GPL-2.0

//! Registered buffers of io_uring pin device-dax for a long time. io_uring must drop every pin,
//! because the end of a device-dax waits for it.

use super::mapped::Mapped;
use crate::check::{OrFail, Outcome};
use crate::dax::{PMD, PTE};
use crate::tests::counts::pinned_large;
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
    Mapped::new(PTE)?.unbind_waits(
        |buf, pages| {
            let ring = Uring::new().or_fail("io_uring_setup")?;
            ring.register(buf, 0, pages)
                .or_fail("IORING_REGISTER_BUFFERS")?;
            Ok(ring)
        },
        |ring, _, _| ring.unregister().or_fail("IORING_UNREGISTER_BUFFERS"),
    )
}
