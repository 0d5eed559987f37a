// SPDX-License-Identifier: GPL-2.0

//! Memory protection keys: rights of a thread on pages with a key.

#![allow(unsafe_code)]

use std::arch::asm;
use std::io;

use crate::memory::{Buffer, PAGE};
use crate::sys::cvt;

/// A key. Dropping it gives it back.
pub struct Key(u32);

impl Key {
    /// Gets a key on whose pages the calling thread has all rights.
    pub fn new() -> io::Result<Self> {
        // SAFETY: The call takes only numbers.
        let key = cvt(unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) })?;
        // CAST: There are 16 keys.
        Ok(Self(key as u32))
    }

    /// Gives pages of a buffer this key, and rights for all threads.
    pub fn protect(&self, buf: &Buffer, first: usize, n: usize, prot: i32) -> io::Result<()> {
        let (addr, len) = (buf.at(first), n * PAGE);
        // SAFETY: Only the rights on pages of a buffer change.
        cvt(unsafe { libc::syscall(libc::SYS_pkey_mprotect, addr, len, prot, self.0) }).map(drop)
    }

    /// Takes the rights to read and write from the calling thread, or gives them back.
    pub fn forbid(&self, forbidden: bool) {
        let bits = 3u32 << (2 * self.0);
        let mut rights: u32;
        // SAFETY: The kernel has given out a key, so that the processor has the instruction. It reads a
        // register of the thread.
        unsafe { asm!("rdpkru", in("ecx") 0, out("eax") rights, out("edx") _, options(nomem)) };
        match forbidden {
            true => rights |= bits,
            false => rights &= !bits,
        }
        // SAFETY: As above. Accesses without the right end in SIGSEGV.
        unsafe { asm!("wrpkru", in("ecx") 0, in("eax") rights, in("edx") 0) };
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: The call takes only a number.
        unsafe { libc::syscall(libc::SYS_pkey_free, self.0) };
    }
}
