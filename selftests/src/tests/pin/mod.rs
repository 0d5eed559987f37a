// SPDX-License-Identifier: GPL-2.0

//! A held page does not migrate under its holder. The holders here belong to the kernel: a pipe
//! (vmsplice) and gup_test's long-term pins.

pub mod around;
pub mod holders;
pub mod ioctl;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::target::{COHERENT, GENERIC, PRIVATE, Target, huge_filled};
use super::{Ctx, Test, test};
use crate::check;
use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::check_eq;
use crate::device::{Buffer, HUGE_PAGES, PAGE, check_bytes};
use crate::gup::LongTermPin;
use crate::proc;
use crate::sys;

pub const TESTS: &[Test] = &[
    test("pin.pipe", pipe),
    test("pin.pipe_migrated", pipe_migrated),
    test("pin.pipe_huge", pipe_huge),
    test("pin.long_term", long_term::<PRIVATE>),
    test("pin.long_term_huge", long_term_huge::<PRIVATE>),
    test("pin_coherent.pipe", pipe_mapped::<COHERENT>),
    test("pin_coherent.long_term", long_term::<COHERENT>),
    test("pin_coherent.long_term_huge", long_term_huge::<COHERENT>),
    test("pin_generic.pipe", pipe_mapped::<GENERIC>),
    test("pin_generic.long_term", long_term::<GENERIC>),
    test("pin_generic.long_term_huge", long_term_huge::<GENERIC>),
];

/// The held pages, and the number of pages of a buffer. A pipe has room for 16.
const FIRST: usize = 5;
const HELD: usize = 4;
const ALL: usize = 12;

/// Lends pages to a pipe.
#[track_caller]
fn lend(buf: &Buffer, first: usize, n: usize, pipe: &File) -> Outcome {
    let lent = buf.vmsplice_to(pipe, first, n).or_fail("vmsplice")?;
    match lent == n * PAGE {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "bytes lent to the pipe: expected {}, found {lent}",
            n * PAGE
        ))),
    }
}

/// Takes pages back from a pipe. They must be those of `buf`, with the pattern of `seed`.
#[track_caller]
fn take_back(pipe: &mut File, first: usize, n: usize, seed: u64) -> Outcome {
    let mut data = vec![0; n * PAGE];
    pipe.read_exact(&mut data).or_fail("read from the pipe")?;
    check_bytes(&data, seed, first, "data in the pipe")
}

/// Tries to move a whole buffer while some pages are held: the held pages stay and remain the same
/// pages, the others migrate.
fn move_around(target: &Target, buf: &Buffer, seed: u64) -> Outcome {
    let frames = proc::frames(buf, FIRST, HELD)?;
    check_eq!(
        frames.len(),
        HELD,
        "pages that are mapped while they are held"
    );
    for _ in 0..3 {
        let result = target.to_device(buf, 0, buf.pages());
        expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of pages in use")?;
        target.expect(buf, FIRST, HELD, 0)?;
        target.expect(buf, 0, buf.pages(), buf.pages() - HELD)?;
        check_eq!(
            &proc::frames(buf, FIRST, HELD)?,
            &frames,
            "pages that are held"
        );
        buf.check(0, buf.pages(), seed)?;
    }
    Ok(())
}

/// Brings back a whole buffer from the device while some pages are held: the held pages stay where
/// they are, the others come back.
fn come_back_around(target: &Target, buf: &Buffer, seed: u64) -> Outcome {
    let frames = proc::frames(buf, FIRST, HELD)?;
    for _ in 0..3 {
        // All other pages come back.
        target
            .to_system(buf, 0, buf.pages())
            .or_fail("MIGRATE_TO_SYS of pages of which some are in use")?;
        target.expect(buf, 0, buf.pages(), HELD)?;
        target.expect(buf, FIRST, HELD, HELD)?;
        check_eq!(
            &proc::frames(buf, FIRST, HELD)?,
            &frames,
            "pages that are held"
        );
        buf.check(0, buf.pages(), seed)?;
    }
    Ok(())
}

/// A pipe holds pages of system memory.
fn pipe(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(ALL, 460)?;
    let (mut read, write) = sys::pipe().or_fail("pipe")?;
    lend(&buf, FIRST, HELD, &write)?;
    move_around(&target, &buf, 460)?;
    // The pipe has the page itself, not a copy: a later write reaches it.
    buf.fill(FIRST, HELD, 461);
    take_back(&mut read, FIRST, HELD, 461)?;
    buf.fill(FIRST, HELD, 460);
    target.bring_back(&buf, 0, ALL)?;
    target.move_all(&buf, 460)?;
    buf.check(0, ALL, 460)?;
    target.expect_empty()
}

/// PRIVATE pages come back before a pipe gets them.
fn pipe_migrated(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, PRIVATE)?;
    let buf = Buffer::filled(ALL, 462)?;
    target.move_all(&buf, 462)?;
    let (mut read, write) = sys::pipe().or_fail("pipe")?;
    lend(&buf, FIRST, HELD, &write)?;
    target.expect(&buf, FIRST, HELD, 0)?;
    move_around(&target, &buf, 462)?;
    // After the process has unmapped the page, the pipe still has it.
    buf.unmap(FIRST, HELD)?;
    take_back(&mut read, FIRST, HELD, 462)?;
    buf.check(0, FIRST, 462)?;
    target.bring_back(&buf, 0, FIRST)?;
    target.bring_back(&buf, FIRST + HELD, ALL - FIRST - HELD)?;
    target.expect_empty()
}

/// A pipe that holds one page of a huge page keeps all of it in place, whole or in pieces.
fn pipe_huge(ctx: &Ctx) -> Outcome {
    const N: usize = HUGE_PAGES;
    let target = Target::open(ctx, PRIVATE)?;
    for migrated in [false, true] {
        let buf = huge_filled(1, 463)?;
        if migrated {
            target.move_huge(&buf, 463)?;
        }
        let (mut read, write) = sys::pipe().or_fail("pipe")?;
        lend(&buf, 100, 1, &write)?;
        let frames = proc::frames(&buf, 100, 1)?;
        check_eq!(frames.len(), 1, "mapped pages");
        let result = target.to_device(&buf, 0, N);
        expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of a page in use")?;
        check_eq!(&proc::frames(&buf, 100, 1)?, &frames, "page that is held");
        let result = target.to_device(&buf, 96, 8);
        expect_errno(result, &[libc::ENOENT], "MIGRATE_TO_DEV of a part")?;
        check_eq!(&proc::frames(&buf, 100, 1)?, &frames, "page that is held");
        buf.check(0, N, 463)?;
        buf.fill(100, 1, 464);
        take_back(&mut read, 100, 1, 464)?;
        buf.fill(100, 1, 463);
        target.bring_back(&buf, 0, N)?;
        target.move_all(&buf, 463)?;
        buf.check(0, N, 463)?;
        target.expect_empty()?;
    }
    Ok(())
}

/// COHERENT and GENERIC pages stay on the device while a pipe holds them, and cannot come back.
fn pipe_mapped<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    let buf = Buffer::filled(ALL, 465)?;
    target.move_all(&buf, 465)?;
    let (mut read, write) = sys::pipe().or_fail("pipe")?;
    lend(&buf, FIRST, HELD, &write)?;
    target.expect(&buf, 0, ALL, ALL)?;
    come_back_around(&target, &buf, 465)?;
    buf.fill(FIRST, HELD, 466);
    take_back(&mut read, FIRST, HELD, 466)?;
    buf.fill(FIRST, HELD, 465);
    target.bring_back(&buf, 0, ALL)?;
    buf.check(0, ALL, 465)?;
    target.expect_empty()
}

/// The file of gup_test, which this kernel must have.
fn long_term_pin() -> Outcome<LongTermPin> {
    let path = Path::new("/sys/kernel/debug/gup_test");
    if !path.exists() {
        return Err(Fail::Skip("no CONFIG_GUP_TEST".into()));
    }
    LongTermPin::open(path).or_fail("gup_test")
}

/// Checks that the pin and the process have the same pages: the old data on both sides, and a new
/// write of the process.
fn same_memory(pin: &LongTermPin, buf: &Buffer, first: usize, n: usize, seed: u64) -> Outcome {
    let data = pin.read().or_fail("PIN_LONGTERM_TEST_READ")?;
    check_eq!(data.len(), n * PAGE, "bytes by the pin");
    check_bytes(&data, seed, first, "data by the pin")?;
    buf.fill(first, n, seed + 1);
    let data = pin.read().or_fail("PIN_LONGTERM_TEST_READ")?;
    check_bytes(&data, seed + 1, first, "data by the pin after a write")?;
    buf.fill(first, n, seed);
    Ok(())
}

/// PRIVATE and COHERENT memory does not allow long-term pins: the page first moves to system memory
/// and stays there until the release. GENERIC memory allows them, so the page stays.
fn long_term<const NODE: usize>(ctx: &Ctx) -> Outcome {
    let target = Target::open(ctx, NODE)?;
    for (fast, write) in [(false, true), (true, true), (false, false), (true, false)] {
        let buf = Buffer::filled(ALL, 467)?;
        target.move_all(&buf, 467)?;
        let mut pin = long_term_pin()?;
        pin.start(&buf, FIRST, HELD, fast, write)
            .or_fail("PIN_LONGTERM_TEST_START")?;
        let kept = if target.keeps_pinned() { HELD } else { 0 };
        target.expect(&buf, FIRST, HELD, kept)?;
        same_memory(&pin, &buf, FIRST, HELD, 467)?;
        if target.keeps_pinned() {
            come_back_around(&target, &buf, 467)?;
        } else {
            target.bring_back(&buf, 0, ALL)?;
            move_around(&target, &buf, 467)?;
        }
        same_memory(&pin, &buf, FIRST, HELD, 467)?;
        pin.stop().or_fail("PIN_LONGTERM_TEST_STOP")?;
        target.bring_back(&buf, 0, ALL)?;
        target.move_all(&buf, 467)?;
        buf.check(0, ALL, 467)?;
        target.bring_back(&buf, 0, ALL)?;
        target.expect_empty()?;
    }
    Ok(())
}

/// A long-term pin of a few pages of a huge page.
fn long_term_huge<const NODE: usize>(ctx: &Ctx) -> Outcome {
    const N: usize = HUGE_PAGES;
    let target = Target::open(ctx, NODE)?;
    for fast in [false, true] {
        let buf = huge_filled(1, 470)?;
        target.move_huge(&buf, 470)?;
        let mut pin = long_term_pin()?;
        pin.start(&buf, 200, HELD, fast, true)
            .or_fail("PIN_LONGTERM_TEST_START")?;
        let kept = if target.keeps_pinned() { HELD } else { 0 };
        target.expect(&buf, 200, HELD, kept)?;
        let frames = proc::frames(&buf, 200, HELD)?;
        check_eq!(frames.len(), HELD, "mapped pages");
        same_memory(&pin, &buf, 200, HELD, 470)?;
        // Other pages may migrate, the pinned ones do not.
        if target.keeps_pinned() {
            target.to_system(&buf, 0, N).or_fail("MIGRATE_TO_SYS")?;
        } else if let Err(e) = target.to_device(&buf, 0, N) {
            check_eq!(e.raw_os_error(), Some(libc::ENOENT), "MIGRATE_TO_DEV");
        }
        check_eq!(
            &proc::frames(&buf, 200, HELD)?,
            &frames,
            "pages that are pinned"
        );
        same_memory(&pin, &buf, 200, HELD, 470)?;
        buf.check(0, N, 470)?;
        pin.stop().or_fail("PIN_LONGTERM_TEST_STOP")?;
        target.bring_back(&buf, 0, N)?;
        target.move_all(&buf, 470)?;
        let read = target.read(&buf, 0, N).or_fail("READ")?;
        check_bytes(&read.data, 470, 0, "READ")?;
        target.bring_back(&buf, 0, N)?;
        buf.check(0, N, 470)?;
        target.expect_empty()?;
    }
    let pin = long_term_pin()?;
    let unused = pin.read();
    check!(
        unused.is_err(),
        "reading by no pin: expected an error, found data"
    );
    Ok(())
}
