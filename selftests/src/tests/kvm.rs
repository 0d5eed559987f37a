// SPDX-License-Identifier: GPL-2.0

//! A guest of KVM uses memory on the device. KVM has a page table of its own and holds no reference to a
//! page, so it must hear of each change by its MMU notifier: a page that moves without it shows as an
//! old value, or as a write that is lost.

use super::chain::{SIZES, filled, spread};
use super::dax::mapped::{FOLIOS, Mapped};
use super::leak::settled;
use super::target::Target;
use super::{Ctx, Test, test};
use crate::check::{OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::dax::{PMD, PTE};
use crate::device::Buffer;
use crate::kvm::Guest;

pub const TESTS: &[Test] = of_each_kind!("kvm":
    "follows" => follows,
    "close" => close,
);

pub const DAX: &[Test] = &[
    test("kvm.dax", dax::<PTE>),
    test("kvm.dax_pmd", dax::<PMD>),
    test("kvm.unbind", unbind::<PTE>),
    test("kvm.unbind_pmd", unbind::<PMD>),
];

const SEED: u64 = 3100;

/// The first byte of a page, as the process reads it.
fn byte(buf: &Buffer, page: usize) -> u8 {
    buf.get(page, 0).to_le_bytes()[0]
}

/// Runs `body` with a guest whose memory is a buffer of small pages, and then one huge page.
fn with_guest(
    ctx: &Ctx,
    node: usize,
    body: impl Fn(&Target, &Buffer, &mut Guest) -> Outcome,
) -> Outcome {
    // Skip here if necessary, before anything is set up.
    Guest::new()?;
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, SEED)?;
            let mut guest = Guest::new()?;
            guest.map(&buf)?;
            body(target, &buf, &mut guest)
        })?;
    }
    Ok(())
}

/// A guest, the device and the process write to the same pages in turn, while the pages move to the device and
/// back. Each reads what the one before has written.
fn follows(ctx: &Ctx, node: usize) -> Outcome {
    with_guest(ctx, node, |target, buf, guest| {
        let n = buf.pages();
        for round in 0..3 {
            let value = |step: u8| 16 * round + step;
            for page in spread(n) {
                guest.write(page, value(1)).or_fail("write by the guest")?;
            }
            target.to_device(buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
            target.expect(buf, 0, n, n)?;
            for page in spread(n) {
                let mut data = target.read(buf, page, 1).or_fail("READ")?.data;
                check_eq!(data[0], value(1), "page {page} on the device");
                // The rest of the page stays as it is.
                data[0] = value(2);
                target.write(buf, page, &data).or_fail("WRITE")?;
            }
            for page in spread(n) {
                let found = guest.read(page).or_fail("read by the guest")?;
                check_eq!(found, value(2), "page {page} for the guest");
                guest.write(page, value(3)).or_fail("write by the guest")?;
                let found = target.read(buf, page, 1).or_fail("READ")?.data[0];
                check_eq!(found, value(3), "page {page} for the device");
            }
            // The guest maps what the CPU may map where it is, and faults in the rest.
            if target.cpu_maps() {
                target.expect(buf, 0, n, n)?;
            }
            target.bring_back(buf, 0, n)?;
            for page in spread(n) {
                let found = guest.read(page).or_fail("read by the guest")?;
                check_eq!(found, value(3), "page {page} back, for the guest");
                check_eq!(byte(buf, page), value(3), "page {page} back");
            }
        }
        buf.check(1, n / 2 - 1, SEED)
    })
}

/// The file of the device is closed while a guest maps pages on it.
fn close(ctx: &Ctx, node: usize) -> Outcome {
    with_guest(ctx, node, |target, buf, guest| {
        let n = buf.pages();
        let other = Target::open(ctx, node)?;
        other.to_device(buf, 0, n).or_fail("MIGRATE_TO_DEV")?;
        for page in spread(n) {
            let found = guest.read(page).or_fail("read by the guest")?;
            check_eq!(found, byte(buf, page), "page {page} on the device");
        }
        drop(other);
        target.expect(buf, 0, n, 0)?;
        for page in spread(n) {
            buf.set(page, 0, !buf.get(page, 0));
            let found = guest.read(page).or_fail("read by the guest")?;
            check_eq!(found, byte(buf, page), "page {page} after the close");
        }
        Ok(())
    })
}

/// The guest uses memory of a device-dax. KVM has no reference to it.
fn dax<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let mut guest = Guest::new()?;
    let m = Mapped::new(ALIGN)?;
    for round in 0..3 {
        guest.map(&m.buf)?;
        for page in [0, m.pages - 1] {
            let found = guest.read(page).or_fail("read by the guest")?;
            check_eq!(found, byte(&m.buf, page), "page {page}");
            guest.write(page, round).or_fail("write by the guest")?;
            check_eq!(byte(&m.buf, page), round, "page {page} as written");
        }
        m.expect(m.before, "mapped by a guest")?;
        guest.unmap(&m.buf)?;
        m.expect(m.before, "no longer mapped by a guest")?;
    }
    guest.map(&m.buf)?;
    guest.read(0).or_fail("read by the guest")?;
    drop(guest);
    m.expect(m.before, "after the guest")
}

/// The driver of the device-dax is unbound: it does not wait for the guest, which has no page
/// afterwards.
fn unbind<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let mut guest = Guest::new()?;
    let Mapped {
        buf,
        setup,
        before,
        pages,
    } = Mapped::new(ALIGN)?;
    let idle = [before[0] - 1, 0, 0];
    guest.map(&buf)?;
    for page in [0, pages - 1] {
        guest.write(page, 1).or_fail("write by the guest")?;
    }
    setup.dax.unbind().or_fail("unbind")?;
    for page in [0, pages - 1] {
        expect_errno(
            guest.read(page),
            &[libc::EFAULT],
            "read by the guest after the unbind",
        )?;
    }
    drop(buf);
    setup.dax.bind().or_fail("bind")?;
    setup.expect(0, FOLIOS, idle, "after unbind and bind")
}
