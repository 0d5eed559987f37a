// SPDX-License-Identifier: GPL-2.0

//! Swap space on the RAM disk that the kernel's configuration gives the guest.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::check::{Fail, OrFail, Outcome};
use crate::memory::PAGE;
use crate::sys::cvt;

const DISK: &str = "/dev/ram0";
/// The size of the swap space in pages, with the header: 128 MiB.
const PAGES: u32 = 32768;

/// Swap space in use. Dropping it switches swap off.
pub struct Swap(());

/// The first page of a swap area, `union swap_header` of linux/swap.h.
fn header() -> [u8; PAGE] {
    let mut page = [0; PAGE];
    // After room for a boot loader: version, last page, and number of bad pages. Identifier and
    // name stay empty.
    page[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
    page[1028..1032].copy_from_slice(&(PAGES - 1).to_ne_bytes());
    page[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    page
}

impl Swap {
    /// Switches swap on. Skips the test if there is no RAM disk.
    #[track_caller]
    pub fn on() -> Outcome<Self> {
        if !Path::new(DISK).exists() {
            return Err(Fail::Skip(format!("no {DISK} to swap to")));
        }
        // A killed test may have left swap on.
        let _ = off();
        let disk = File::options().write(true).open(DISK).or_fail(DISK)?;
        disk.write_all_at(&header(), 0).or_fail("header of swap")?;
        disk.sync_all().or_fail("sync of the header of swap")?;
        on().or_fail("swapon")?;
        Ok(Self(()))
    }

    /// Switches swap off, which brings all swapped pages back.
    #[track_caller]
    pub fn off(self) -> Outcome {
        off().or_fail("swapoff")
        // The drop finds swap already off.
    }

    /// Switches swap off and on again.
    pub fn off_and_on(&self) -> io::Result<()> {
        off()?;
        on()
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // Swap may already be off.
        let _ = off();
    }
}

fn on() -> io::Result<()> {
    let path = CString::new(DISK)?;
    // SAFETY: `path` is a C string that outlives the call.
    cvt(unsafe { libc::swapon(path.as_ptr(), 0) }.into()).map(drop)
}

fn off() -> io::Result<()> {
    let path = CString::new(DISK)?;
    // SAFETY: `path` is a C string that outlives the call.
    cvt(unsafe { libc::swapoff(path.as_ptr()) }.into()).map(drop)
}
