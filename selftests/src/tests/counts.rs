// SPDX-License-Identifier: GPL-2.0

//! Reference, mapping and pin counts of pages, by ZDM_INSPECT.

use std::fs::File;
use std::io::{Read, Write};

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device};
use crate::harness::Child;
use crate::sys::{self, Exit};
use crate::uapi::*;

/// References, page table entries and pins of a page's folio.
pub type Counts = [i32; 3];

/// The counts of a page without a user.
pub const IDLE: Counts = [0, 0, 0];
/// The counts of a page that one entry maps.
pub const MAPPED: Counts = [1, 1, 0];

/// The counts of a small page after `n` pins without ZDM_PIN_GET.
pub fn pinned([refs, mapcount, pins]: Counts, n: i32) -> Counts {
    [refs + n * PIN_BIAS, mapcount, pins + n]
}

/// The counts of a page of a large folio after such pins, which the folio counts separately.
pub fn pinned_large([refs, mapcount, pins]: Counts, n: i32) -> Counts {
    [refs + n, mapcount, pins + n]
}

/// The counts after `n` more references.
pub fn held([refs, mapcount, pins]: Counts, n: i32) -> Counts {
    [refs + n, mapcount, pins]
}

#[track_caller]
fn compare(page: &PageInfo, expected: Counts, what: &str) -> Outcome {
    let found = [page.refs, page.mapcount, page.pins];
    match found == expected && page.flags & ZDM_PAGE_THERE != 0 {
        true => Ok(()),
        false => Err(Fail::failed(format!(
            "[references, mappings, pins] of {what}: expected {expected:?}, found {page:x?}"
        ))),
    }
}

/// Checks the counts of each of some pages, by address.
#[track_caller]
pub fn expect(
    device: &Device,
    buf: &Buffer,
    first: usize,
    n: usize,
    expected: Counts,
    when: &str,
) -> Outcome {
    let pages = device.inspect(buf, first, n).or_fail("ZDM_INSPECT")?;
    for (i, page) in pages.iter().enumerate() {
        compare(page, expected, &format!("page {} {when}", first + i))?;
    }
    Ok(())
}

/// Checks the counts of page frames of ZONE_DEVICE memory.
#[track_caller]
pub fn expect_frames(device: &Device, frames: &[u64], expected: Counts, when: &str) -> Outcome {
    for pfn in frames {
        let page = device.inspect_frames(*pfn, 1)?[0];
        compare(&page, expected, &format!("page frame {pfn:#x} {when}"))?;
    }
    Ok(())
}

/// Checks that page frames are as those of free pages without a trace of a user. Only the order of
/// their last folio may remain, because core mm resets it when it gives the page out again.
#[track_caller]
pub fn expect_free(device: &Device, frames: &[u64], when: &str) -> Outcome {
    expect_frames(device, frames, IDLE, when)?;
    for pfn in frames {
        let page = device.inspect_frames(*pfn, 1)?[0];
        if page.flags != ZDM_PAGE_THERE {
            return Err(Fail::failed(format!(
                "free page {when}: expected no flags, found {page:x?}"
            )));
        }
    }
    Ok(())
}

/// The page frames that some addresses map, by ZDM_INSPECT.
#[track_caller]
pub fn frames(device: &Device, buf: &Buffer, first: usize, n: usize) -> Outcome<Vec<u64>> {
    let pages = device.inspect(buf, first, n).or_fail("ZDM_INSPECT")?;
    match pages.iter().find(|p| p.flags & ZDM_PAGE_THERE == 0) {
        None => Ok(pages.iter().map(|p| p.pfn).collect()),
        Some(none) => Err(Fail::failed(format!(
            "pages {first}..{}: expected pages, found {none:x?}",
            first + n
        ))),
    }
}

/// A process that waits until the test releases it.
pub struct Waiting {
    child: Child,
    go: File,
}

impl Waiting {
    /// Starts a process with a copy of the caller's mappings. It runs `first`, reports that, and
    /// runs `then` after its release.
    #[track_caller]
    pub fn start(first: impl FnOnce() -> Outcome, then: impl FnOnce() -> Outcome) -> Outcome<Self> {
        let (mut wait, go) = sys::pipe().or_fail("pipe")?;
        let (mut ready, there) = sys::pipe().or_fail("pipe")?;
        let child = Child::spawn(|| {
            first()?;
            (&there).write_all(b"r").or_fail("pipe")?;
            wait.read_exact(&mut [0]).or_fail("pipe")?;
            then()
        })?;
        drop(there);
        // A child that has failed reports the failure itself, and again in wait.
        let _ = ready.read(&mut [0]);
        Ok(Self { child, go })
    }

    /// Starts a process that only keeps a copy of the caller's mappings.
    #[track_caller]
    pub fn idle() -> Outcome<Self> {
        Self::start(|| Ok(()), || Ok(()))
    }

    /// Releases the process.
    #[track_caller]
    pub fn release(self) -> Outcome<Child> {
        (&self.go).write_all(b"g").or_fail("pipe")?;
        Ok(self.child)
    }

    /// Releases the process and waits for its success.
    #[track_caller]
    pub fn join(self) -> Outcome {
        self.release()?.join()
    }

    /// Releases the process, waits for its end and returns how it ended.
    #[track_caller]
    pub fn end(self) -> Outcome<Exit> {
        self.release()?.exit()
    }

    /// Kills the process.
    #[track_caller]
    pub fn kill(self) -> Outcome {
        self.child.kill().map(drop)
    }
}
