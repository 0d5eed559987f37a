// SPDX-License-Identifier: GPL-2.0

//! Memory to migrate, and patterns that tell its pages apart.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use linux_raw_sys::general::__NR_mseal;

use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::sys::cvt;

pub const PAGE: usize = 4096;
/// The number of 8-byte words in a page.
pub const WORDS: usize = PAGE / 8;
/// The size and alignment of a transparent huge page on x86-64, in pages.
pub const HUGE_PAGES: usize = 512;
/// Word `word` of page `page` in the pattern of `seed`. No two pages are alike, so that a page at
/// the wrong address is noticed.
fn pattern(seed: u64, page: usize, word: usize) -> u64 {
    // CAST: usize has 64 bits here.
    let n = (page * WORDS + word) as u64 ^ (seed << 48);
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ seed
}

/// The words of a page of the pattern of `seed`.
pub fn pattern_words(seed: u64, page: usize) -> [u64; WORDS] {
    std::array::from_fn(|word| pattern(seed, page, word))
}

/// Fills bytes with the pattern of `seed`, as if they began at page `first`.
pub fn pattern_bytes(seed: u64, first: usize, npages: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(npages * PAGE);
    for page in first..first + npages {
        for word in 0..WORDS {
            out.extend_from_slice(&pattern(seed, page, word).to_ne_bytes());
        }
    }
    out
}

/// Checks that bytes are whole pages of the pattern of `seed`, from page `first` on.
#[track_caller]
pub fn check_bytes(bytes: &[u8], seed: u64, first: usize, what: &str) -> Outcome {
    let expected = pattern_bytes(seed, first, bytes.len() / PAGE);
    match bytes.iter().zip(&expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(Fail::failed(format!(
            "{what}: byte {} of page {}: expected {:#04x}, found {:#04x}",
            at % PAGE,
            first + at / PAGE,
            expected[at],
            bytes[at]
        ))),
    }
}

/// A mapping of the test's own. Dropping it unmaps the pages.
///
/// # Invariants
///
/// `mmap` has mapped the range for this value alone, and no reference to its memory is ever made:
/// every access is volatile, through raw pointers. A device, another thread or another process may
/// therefore change the memory. A test that accesses a page without the right to do so, or a page
/// that it has unmapped, dies of SIGSEGV, which the harness reports.
///
/// Pages that a test unmaps or moves away no longer belong to this value: another mapping may take
/// their place before the drop.
pub struct Buffer {
    base: usize,
    pages: usize,
    /// For each page whether it has been unmapped or moved away.
    gone: Vec<AtomicBool>,
}

impl Buffer {
    /// Maps private anonymous memory of small pages, not populated.
    ///
    /// Without the advice the kernel may join the mapping with a neighbour and put both into one
    /// huge page, and the result of a migration would depend on chance.
    #[track_caller]
    pub fn anon(pages: usize) -> Outcome<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let buf = Self::map(0, pages, flags, -1).or_fail("mmap")?;
        // A kernel without huge pages refuses the advice and needs none.
        let _ = buf.advise(0, pages, libc::MADV_NOHUGEPAGE);
        Ok(buf)
    }

    /// Maps private anonymous memory with the pattern of `seed`.
    #[track_caller]
    pub fn filled(pages: usize, seed: u64) -> Outcome<Self> {
        let buf = Self::anon(pages)?;
        buf.fill(0, pages, seed);
        Ok(buf)
    }

    /// Maps private anonymous memory that begins at a huge page's boundary.
    #[track_caller]
    pub fn anon_huge_aligned(pages: usize) -> Outcome<Self> {
        let mut buf = Self::anon(pages + HUGE_PAGES)?;
        let skip = (buf.base / PAGE).next_multiple_of(HUGE_PAGES) - buf.base / PAGE;
        let rest = HUGE_PAGES - skip;
        if skip > 0 {
            buf.unmap(0, skip)?;
        }
        if rest > 0 {
            buf.unmap(skip + pages, rest)?;
        }
        buf.base += skip * PAGE;
        buf.pages = pages;
        buf.gone.drain(..skip);
        buf.gone.truncate(pages);
        Ok(buf)
    }

    /// Maps private anonymous memory at an address where nothing is mapped.
    pub fn anon_at(addr: u64, pages: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        Self::map(addr as usize, pages, flags, -1)
    }

    /// Maps a file, shared.
    #[track_caller]
    pub fn shared(file: &File, pages: usize) -> Outcome<Self> {
        Self::of_file(file, pages, libc::MAP_SHARED).or_fail("mmap of a file")
    }

    /// Maps a file from its beginning, with MAP_SHARED or MAP_PRIVATE.
    pub fn of_file(file: &impl AsRawFd, pages: usize, flags: i32) -> io::Result<Self> {
        Self::map(0, pages, flags, file.as_raw_fd())
    }

    /// As [`Buffer::of_file`], from any offset, with any flags but MAP_FIXED.
    pub fn of_file_at(file: &File, pages: usize, flags: i32, offset: i64) -> io::Result<Self> {
        let flags = flags & !libc::MAP_FIXED;
        Self::map_at_offset(0, pages, flags, file.as_raw_fd(), offset)
    }

    /// Makes the mapping `pages` longer; it may move. The new pages belong to the buffer.
    pub fn grow(&mut self, pages: usize) -> io::Result<()> {
        let (old, new) = (self.pages * PAGE, (self.pages + pages) * PAGE);
        let (base, flags) = (self.base as *mut libc::c_void, libc::MREMAP_MAYMOVE);
        // SAFETY: The kernel chooses free addresses. Nothing else has one in the range, as `self` is borrowed
        // mutably.
        let ret = unsafe { libc::mremap(base, old, new, flags) };
        if ret == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // INVARIANT: The range has just been mapped, and no other value has its address.
        self.base = ret as usize;
        self.gone.extend((0..pages).map(|_| AtomicBool::new(false)));
        self.pages += pages;
        Ok(())
    }

    /// Maps the same pages of a shared mapping once more, at another place: mremap() of no bytes.
    pub fn duplicate(&self) -> io::Result<Self> {
        let (base, len) = (self.base as *mut libc::c_void, self.pages * PAGE);
        // SAFETY: The kernel chooses free addresses for the copy, and leaves the mapping as it is.
        let ret = unsafe { libc::mremap(base, 0, len, libc::MREMAP_MAYMOVE) };
        if ret == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // INVARIANT: The range has just been mapped, and no other value has its address.
        let gone = std::iter::repeat_with(|| AtomicBool::new(false));
        Ok(Self {
            base: ret as usize,
            pages: self.pages,
            gone: gone.take(self.pages).collect(),
        })
    }

    /// Maps private memory of reserved huge pages, of which there must be enough.
    pub fn hugetlb(pages: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        Self::map(0, pages, flags, -1)
    }

    /// Maps memory whose pages the kernel may drop instead of writing them to swap.
    pub fn droppable(pages: usize) -> io::Result<Self> {
        /// MAP_DROPPABLE of linux/mman.h, since Linux 6.11. It takes the place of MAP_PRIVATE.
        const DROPPABLE: i32 = 0x08;
        Self::map(0, pages, DROPPABLE | libc::MAP_ANONYMOUS, -1)
    }

    /// Maps private memory that grows downwards, as a stack does.
    pub fn stack(pages: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
        Self::map(0, pages, flags, -1)
    }

    /// Calls mseal(2): from now on the pages cannot be unmapped and keep their rights, even when
    /// the buffer is dropped.
    pub fn seal(&self) -> io::Result<()> {
        // SAFETY: The call takes only numbers, and only removes rights to change the mapping.
        cvt(unsafe { libc::syscall(__NR_mseal.into(), self.at(0), self.pages * PAGE, 0) })?;
        self.mark_gone(0, self.pages, true);
        Ok(())
    }

    fn map(addr: usize, pages: usize, flags: i32, fd: i32) -> io::Result<Self> {
        Self::map_at_offset(addr, pages, flags, fd, 0)
    }

    fn map_at_offset(
        addr: usize,
        pages: usize,
        flags: i32,
        fd: i32,
        offset: i64,
    ) -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let (hint, len) = (addr as *mut libc::c_void, pages * PAGE);
        // SAFETY: Without MAP_FIXED the kernel chooses free addresses. MAP_FIXED_NOREPLACE, the
        // only other flag used here, never replaces a mapping.
        let ret = unsafe { libc::mmap(hint, len, prot, flags, fd, offset) };
        if ret == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // INVARIANT: The range has just been mapped, and no other value has its address.
        let gone = std::iter::repeat_with(|| AtomicBool::new(false));
        Ok(Self {
            base: ret as usize,
            pages,
            gone: gone.take(pages).collect(),
        })
    }

    fn mark_gone(&self, first: usize, n: usize, gone: bool) {
        for page in &self.gone[first..first + n] {
            page.store(gone, Ordering::Relaxed);
        }
    }

    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The address of page `page`.
    pub fn at(&self, page: usize) -> u64 {
        (self.base + page * PAGE) as u64
    }

    fn word(&self, page: usize, word: usize) -> *mut u64 {
        assert!(page < self.pages && word < WORDS, "out of the buffer");
        (self.base + page * PAGE + word * 8) as *mut u64
    }

    /// Reads one word.
    pub fn get(&self, page: usize, word: usize) -> u64 {
        // SAFETY: `word()` returns an address in bounds and aligned. The access is volatile, as the
        // invariant requires.
        unsafe { ptr::read_volatile(self.word(page, word)) }
    }

    /// Writes one word.
    pub fn set(&self, page: usize, word: usize, value: u64) {
        // SAFETY: `word()` returns an address in bounds and aligned. The access is volatile, as the
        // invariant requires.
        unsafe { ptr::write_volatile(self.word(page, word), value) }
    }

    /// Reads a page.
    pub fn words(&self, page: usize) -> [u64; WORDS] {
        std::array::from_fn(|word| self.get(page, word))
    }

    /// Fills pages with the pattern of `seed`.
    pub fn fill(&self, first: usize, n: usize, seed: u64) {
        for page in first..first + n {
            for word in 0..WORDS {
                self.set(page, word, pattern(seed, page, word));
            }
        }
    }

    /// Checks by CPU accesses that pages hold the pattern of `seed`.
    #[track_caller]
    pub fn check(&self, first: usize, n: usize, seed: u64) -> Outcome {
        self.check_from(first, n, seed, first)
    }

    /// As `check`, for pages that have moved: page `first` was filled as page `filled_as`.
    #[track_caller]
    pub fn check_from(&self, first: usize, n: usize, seed: u64, filled_as: usize) -> Outcome {
        for i in 0..n {
            for word in 0..WORDS {
                let expected = pattern(seed, filled_as + i, word);
                let found = self.get(first + i, word);
                check!(
                    found == expected,
                    "word {word} of page {}: expected {expected:#x}, found {found:#x}",
                    first + i
                );
            }
        }
        Ok(())
    }

    /// Checks that pages hold only zeroes.
    #[track_caller]
    pub fn check_zero(&self, first: usize, n: usize) -> Outcome {
        for page in first..first + n {
            for word in 0..WORDS {
                let found = self.get(page, word);
                check!(
                    found == 0,
                    "word {word} of page {page}: expected 0, found {found:#x}"
                );
            }
        }
        Ok(())
    }

    /// Calls mprotect(2) on pages.
    #[track_caller]
    pub fn protect(&self, first: usize, n: usize, prot: i32) -> Outcome {
        let addr = self.at(first) as *mut libc::c_void;
        // SAFETY: Only this buffer's own pages change, by the invariant.
        cvt(unsafe { libc::mprotect(addr, n * PAGE, prot) }.into())
            .map(drop)
            .or_fail("mprotect")
    }

    /// Calls madvise(2) on pages.
    #[track_caller]
    pub fn advise(&self, first: usize, n: usize, advice: i32) -> Outcome {
        self.try_advise(first, n, advice).or_fail("madvise")
    }

    /// Calls madvise(2) on pages; the call may fail.
    pub fn try_advise(&self, first: usize, n: usize, advice: i32) -> io::Result<()> {
        let addr = self.at(first) as *mut libc::c_void;
        // SAFETY: Only this buffer's own pages change, by the invariant.
        cvt(unsafe { libc::madvise(addr, n * PAGE, advice) }.into()).map(drop)
    }

    /// Calls mlock(2) or munlock(2) on pages.
    #[track_caller]
    pub fn lock(&self, first: usize, n: usize, lock: bool) -> Outcome {
        self.try_lock(first, n, lock).or_fail("mlock or munlock")
    }

    /// As `lock`; the call may fail.
    pub fn try_lock(&self, first: usize, n: usize, lock: bool) -> io::Result<()> {
        let (addr, len) = (self.at(first) as *const libc::c_void, n * PAGE);
        let ret = match lock {
            // SAFETY: Only this buffer's own pages change, by the invariant.
            true => unsafe { libc::mlock(addr, len) },
            // SAFETY: Only this buffer's own pages change, by the invariant.
            false => unsafe { libc::munlock(addr, len) },
        };
        cvt(ret.into()).map(drop)
    }

    /// Calls mlock2(2) on pages with MLOCK_ONFAULT.
    #[track_caller]
    pub fn lock_on_fault(&self, first: usize, n: usize) -> Outcome {
        let (addr, len) = (self.at(first) as *const libc::c_void, n * PAGE);
        // SAFETY: Only this buffer's own pages change, by the invariant.
        cvt(unsafe { libc::mlock2(addr, len, libc::MLOCK_ONFAULT) }.into())
            .map(drop)
            .or_fail("mlock2")
    }

    /// Unmaps pages. They must not be accessed any more.
    #[track_caller]
    pub fn unmap(&self, first: usize, n: usize) -> Outcome {
        let addr = self.at(first) as *mut libc::c_void;
        // SAFETY: Only this buffer's own pages are unmapped, by the invariant.
        cvt(unsafe { libc::munmap(addr, n * PAGE) }.into()).or_fail("munmap")?;
        self.mark_gone(first, n, true);
        Ok(())
    }

    /// Maps fresh anonymous memory in the place of pages that `unmap` removed. Fails if another
    /// mapping has taken the place.
    #[track_caller]
    pub fn map_again(&self, first: usize, n: usize) -> Outcome {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let addr = self.base + first * PAGE;
        let part = Self::map(addr, n, flags, -1).or_fail("mmap of the same place")?;
        let _ = part.advise(0, n, libc::MADV_NOHUGEPAGE);
        // The pages belong to `self`; `part` must not unmap them.
        part.mark_gone(0, n, true);
        self.mark_gone(first, n, false);
        Ok(())
    }

    /// Moves the whole buffer to another place with mremap(2).
    #[track_caller]
    pub fn move_to_another_place(self) -> Outcome<Self> {
        // A reservation of the same size makes sure that the place does change.
        let place = Self::anon(self.pages)?;
        let (old, new) = (
            self.base as *mut libc::c_void,
            place.base as *mut libc::c_void,
        );
        let len = self.pages * PAGE;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: This function owns both ranges.
        let ret = unsafe { libc::mremap(old, len, len, flags, new) };
        if ret == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).or_fail("mremap");
        }
        self.mark_gone(0, self.pages, true);
        Ok(place)
    }

    /// Moves pages with mremap(2) to page `at` of `place`, over the pages there. They must not be
    /// accessed at their old place any more.
    #[track_caller]
    pub fn move_pages(&self, first: usize, n: usize, place: &Buffer, at: usize) -> Outcome {
        self.remap(first, n, place, at, 0)?;
        self.mark_gone(first, n, true);
        Ok(())
    }

    /// As `move_pages`, but the old place stays mapped without pages (MREMAP_DONTUNMAP).
    #[track_caller]
    pub fn move_contents(&self, first: usize, n: usize, place: &Buffer, at: usize) -> Outcome {
        self.remap(first, n, place, at, libc::MREMAP_DONTUNMAP)
    }

    #[track_caller]
    fn remap(&self, first: usize, n: usize, place: &Buffer, at: usize, more: i32) -> Outcome {
        if at + n > place.pages || first + n > self.pages {
            return Err(Fail::failed("mremap: out of the buffer"));
        }
        let old = self.at(first) as *mut libc::c_void;
        let new = place.at(at) as *mut libc::c_void;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | more;
        // SAFETY: Both ranges belong to buffers, by the check above and the invariant, and a buffer
        // may have holes.
        let ret = unsafe { libc::mremap(old, n * PAGE, n * PAGE, flags, new) };
        if ret == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).or_fail("mremap");
        }
        place.mark_gone(at, n, false);
        Ok(())
    }

    /// Puts pages of the mapped file, from page `from` on, in the place of other ones, with
    /// remap_file_pages(2).
    pub fn remap_file(&self, first: usize, n: usize, from: usize) -> io::Result<()> {
        let (addr, len) = (self.at(first), n * PAGE);
        // SAFETY: Only this buffer's own pages change, by the invariant.
        cvt(unsafe { libc::syscall(libc::SYS_remap_file_pages, addr, len, 0, from, 0) }).map(drop)
    }

    /// Writes pages directly from this memory with write(2).
    pub fn write_to(&self, file: &File, first: usize, n: usize) -> io::Result<usize> {
        let addr = self.at(first) as *const libc::c_void;
        // SAFETY: The kernel checks the addresses.
        let ret = unsafe { libc::write(file.as_raw_fd(), addr, n * PAGE) };
        cvt(ret as libc::c_long).map(|n| n as usize)
    }

    /// Pages as system calls take them, also those on the memory of another process.
    pub fn iovec(&self, first: usize, n: usize) -> libc::iovec {
        libc::iovec {
            iov_base: self.at(first) as *mut libc::c_void,
            iov_len: n * PAGE,
        }
    }

    /// Calls vmsplice(2): the pipe holds the pages themselves until they are read.
    pub fn vmsplice_to(&self, pipe: &File, first: usize, n: usize) -> io::Result<usize> {
        let vec = self.iovec(first, n);
        // SAFETY: The iovec is valid, and the kernel checks the addresses in it.
        let ret = unsafe { libc::vmsplice(pipe.as_raw_fd(), &vec, 1, libc::SPLICE_F_NONBLOCK) };
        cvt(ret as libc::c_long).map(|n| n as usize)
    }

    /// Reads pages directly into this memory with read(2).
    pub fn read_from(&self, file: &File, first: usize, n: usize) -> io::Result<usize> {
        let addr = self.at(first) as *mut libc::c_void;
        // SAFETY: The kernel checks the addresses, and writes to this buffer, which has only
        // volatile accesses.
        let ret = unsafe { libc::read(file.as_raw_fd(), addr, n * PAGE) };
        cvt(ret as libc::c_long).map(|n| n as usize)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut first = 0;
        for run in self
            .gone
            .chunk_by(|a, b| a.load(Ordering::Relaxed) == b.load(Ordering::Relaxed))
        {
            if !run[0].load(Ordering::Relaxed) {
                let addr = self.at(first) as *mut libc::c_void;
                // SAFETY: Only this value uses these pages, by the invariant and because they are
                // not marked as gone.
                unsafe { libc::munmap(addr, run.len() * PAGE) };
            }
            first += run.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_differ_by_page_and_seed() {
        assert_ne!(pattern(1, 0, 0), pattern(2, 0, 0));
        assert_ne!(pattern(1, 0, 0), pattern(1, 1, 0));
        assert_ne!(pattern(0, 0, 1), 0);
        let bytes = pattern_bytes(7, 3, 2);
        assert!(check_bytes(&bytes, 7, 3, "bytes").is_ok());
        assert!(check_bytes(&bytes, 7, 4, "bytes").is_err());
    }

    #[test]
    fn buffer_keeps_its_pattern() {
        let buf = Buffer::filled(3, 5).unwrap();
        buf.check(0, 3, 5).unwrap();
        buf.set(2, 7, 1);
        let text = buf.check(0, 3, 5).unwrap_err().to_string();
        assert!(text.contains("word 7 of page 2"), "{text}");
        let buf = buf.move_to_another_place().unwrap();
        buf.check(0, 2, 5).unwrap();
        buf.unmap(1, 1).unwrap();
        buf.map_again(1, 1).unwrap();
        buf.check_zero(1, 1).unwrap();
        let huge = Buffer::anon_huge_aligned(4).unwrap();
        assert_eq!(huge.at(0) % (HUGE_PAGES * PAGE) as u64, 0);
        huge.check_zero(0, 4).unwrap();
        buf.move_pages(0, 2, &huge, 1).unwrap();
        huge.check_zero(0, 1).unwrap();
        huge.check_from(1, 2, 5, 0)
            .expect_err("page 1 is no copy of the old one");
        huge.check_from(1, 1, 5, 0).unwrap();
        let gone: Vec<bool> = buf.gone.iter().map(|g| g.load(Ordering::Relaxed)).collect();
        assert_eq!(gone, [true, true, false]);
    }
}
