// SPDX-License-Identifier: GPL-2.0

//! memory_failure() and soft offlining of pages of a device-dax, which are unmapped from all
//! processes.

use std::io::{Read, Write};
use std::time::Duration;

use super::Setup;
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::dax::{PMD, PTE};
use crate::device::Buffer;
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::tests::counts::Waiting;
use crate::tests::{Ctx, Test, test};

pub const TESTS: &[Test] = &[
    test("dax.poison", poison::<PTE>),
    test("dax.poison_pmd", poison::<PMD>),
    test("dax.soft_offline", soft_offline),
];

/// A broken page of a device-dax is unmapped everywhere, with all pages of the same fault, and
/// processes that map it and asked for the signal get SIGBUS. The page then has the counts of an
/// idle page, its neighbours are mapped as before, and the device can be used and bound again.
fn poison<const ALIGN: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(ALIGN)?;
    let idle = s.idle_refs()?;
    let step = s.dax.step();
    // A process that ignores the signal survives; these children must not ignore it.
    sys::on_signal(libc::SIGBUS, false).or_fail("signal")?;
    let buf = s.dax.map(3 * step)?;
    buf.fill(0, 3 * step, 1720);
    s.expect(0, 3, [idle + 1, 1, 0], "mapped")?;
    let (mut ready, say) = sys::pipe().or_fail("pipe")?;
    let bystander = Child::spawn(|| {
        sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
        // Other processes get the signal only when they access the page.
        sys::want_memory_failures().or_fail("prctl")?;
        let own = s.dax.map(3 * step)?;
        own.check(0, 3 * step, 1720)?;
        (&say).write_all(b"r").or_fail("pipe")?;
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    })?;
    drop(say);
    let n = ready.read(&mut [0]).or_fail("pipe")?;
    check_eq!(n, 1, "word of the bystander that it has mapped all");
    let broken = step + step / 2;
    let sufferer = Child::spawn(|| {
        sys::on_signal(libc::SIGBUS, true).or_fail("signal")?;
        let own = s.dax.map(3 * step)?;
        own.check(0, 3 * step, 1720)?;
        own.advise(broken, 1, libc::MADV_HWPOISON)?;
        Err(Fail::failed("MADV_HWPOISON: expected SIGBUS, found none"))
    })?;
    let end = Exit::Signal(libc::SIGBUS);
    check_eq!(
        sufferer.exit()?,
        end,
        "end of who says that a page is broken"
    );
    check_eq!(bystander.exit()?, end, "end of who has it mapped");
    s.expect(1, 1, [idle, 0, 0], "broken")?;
    for neighbour in [0, 2] {
        s.expect(neighbour, 1, [idle + 1, 1, 0], "beside a broken one")?;
    }
    // The page is not really broken, and the kernel allows later accesses.
    buf.check(0, 3 * step, 1720)?;
    s.expect(1, 1, [idle + 1, 1, 0], "mapped again")?;
    drop(buf);
    s.expect(0, 3, [idle, 0, 0], "in the end")?;
    s.dax.unbind().or_fail("unbind")?;
    s.dax.bind().or_fail("bind")?;
    s.expect(0, 3, [idle, 0, 0], "bound anew")?;
    s.dax.map(3 * step)?.check(0, 3 * step, 1720)
}

fn soft_offline(_: &Ctx) -> Outcome {
    let s = Setup::new(PTE)?;
    let idle = s.idle_refs()?;
    let buf: Buffer = s.dax.map(4)?;
    buf.fill(0, 4, 1730);
    let child = Waiting::start(|| Ok(()), || buf.check(0, 4, 1730))?;
    let result = buf.try_advise(1, 1, libc::MADV_SOFT_OFFLINE);
    expect_errno(result, &[libc::EIO], "MADV_SOFT_OFFLINE")?;
    child.join()?;
    s.expect(0, 4, [idle + 1, 1, 0], "after MADV_SOFT_OFFLINE")?;
    buf.check(0, 4, 1730)
}
