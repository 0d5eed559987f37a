// SPDX-License-Identifier: GPL-2.0

//! Operations that tell the kernel what to do with pages, which it does not do to those of a
//! device.

use super::super::ksm::Ksm;
use super::{Operation, Place, Scene};
use crate::check::{OrFail, Outcome};
use crate::device::PAGE;
use crate::pagestate::{State, views};
use crate::uapi::PageInfo;
use crate::{check_eq, numa, proc, sys};

pub(super) const OPERATIONS: &[Operation] = &[
    ("mlock", mlock),
    ("mlock of a part", mlock_part),
    ("mlock and munmap", mlock_munmap),
    ("MADV_COLD and MADV_PAGEOUT", cold),
    ("MADV_FREE", free),
    ("MADV_DONTNEED", dontneed),
    ("guard pages", guard),
    ("MADV_COLLAPSE", collapse),
    ("MADV_MERGEABLE", mergeable),
    ("mbind and move_pages", moved),
    ("reads by other ways", read_by_others),
    ("statistics", statistics),
];

impl Scene<'_> {
    /// All that can be seen of pages of a device: what ZDM_INSPECT and PAGEMAP_SCAN tell of each,
    /// and the sums of smaps, which count accessed and dirty entries, too.
    fn seen(&self) -> Outcome<(Vec<PageInfo>, Vec<State>, Vec<u64>)> {
        const SUMS: [&str; 8] = [
            "Rss",
            "Referenced",
            "Private_Dirty",
            "Private_Clean",
            "Anonymous",
            "LazyFree",
            "AnonHugePages",
            "Locked",
        ];
        let (buf, first, n) = (&self.buf, self.first, self.n);
        let pages = self.target.inspect(buf, first, n).or_fail("ZDM_INSPECT")?;
        let sums = SUMS.iter().map(|name| proc::smaps(buf, first, n, name));
        let sums = sums.collect::<Outcome<_>>()?;
        Ok((pages, views(self.target, buf, first, n)?, sums))
    }

    /// An operation that must leave pages of a device where they are, and as they are.
    #[track_caller]
    fn stays(&self, when: &str, operation: impl FnOnce() -> Outcome) -> Outcome {
        let before = self.seen()?;
        operation()?;
        self.look()?;
        if self.place == Place::Local {
            let after = self.seen()?;
            for (i, page) in after.0.iter().enumerate() {
                check_eq!(page, &before.0[i], "page {i} {when}");
                check_eq!(after.1[i], before.1[i], "marks of page {i} {when}");
            }
            check_eq!(after.2, before.2, "sums of smaps {when}");
            self.counted(when)?;
        }
        self.holds(0, self.n, self.seed)
    }
}

/// Locking takes a fault for each page that is not present: PRIVATE ones come back.
fn mlock(s: &Scene) -> Outcome {
    if s.is_away() {
        s.buf.lock(s.first, s.n, true)?;
        s.look()?;
        s.buf.lock(s.first, s.n, false)?;
        return s.holds(0, s.n, s.seed);
    }
    s.stays("locked and unlocked", || {
        s.buf.lock(s.first, s.n, true)?;
        s.counted("locked")?;
        s.buf.lock(s.first, s.n, false)
    })
}

fn mlock_part(s: &Scene) -> Outcome {
    if s.is_away() {
        s.buf.lock(s.first + 2, 3, true)?;
        s.look()?;
        s.buf.lock(s.first + 2, 3, false)?;
        return s.holds(0, s.n, s.seed);
    }
    // The kernel splits a huge entry with its area, so that not all stays as it is.
    let frames =
        |s: &Scene| -> Outcome<Vec<u64>> { Ok(s.seen()?.0.iter().map(|page| page.pfn).collect()) };
    let before = frames(s)?;
    s.buf.lock(s.first + 2, 3, true)?;
    s.look()?;
    s.counted("locked in part")?;
    s.buf.lock(s.first + 2, 3, false)?;
    s.counted("unlocked in part")?;
    if s.place == Place::Local {
        check_eq!(frames(s)?, before, "frames, locked and unlocked in part");
    }
    s.holds(0, s.n, s.seed)
}

fn mlock_munmap(s: &Scene) -> Outcome {
    s.buf.lock(s.first, s.n, true)?;
    s.buf.unmap(s.first, s.n)?;
    s.look()?;
    s.buf.map_again(s.first, s.n)?;
    s.buf.check_zero(s.first, s.n)
}

fn cold(s: &Scene) -> Outcome {
    s.stays("cold", || {
        for (at, n) in [(3, 4), (0, s.n)] {
            s.buf.advise(s.first + at, n, libc::MADV_COLD)?;
            s.look()?;
            s.buf.advise(s.first + at, n, libc::MADV_PAGEOUT)?;
        }
        Ok(())
    })
}

fn free(s: &Scene) -> Outcome {
    s.stays("that may be freed", || {
        for (at, n) in [(3, 4), (0, s.n)] {
            s.buf.advise(s.first + at, n, libc::MADV_FREE)?;
            s.look()?;
        }
        if s.place == Place::Local {
            return Ok(());
        }
        // They are needed after all.
        s.buf.fill(s.first, s.n, s.seed);
        Ok(())
    })
}

fn dontneed(s: &Scene) -> Outcome {
    s.buf.advise(s.first + 3, 4, libc::MADV_DONTNEED)?;
    s.look()?;
    s.holds(0, 3, s.seed)?;
    s.holds(7, s.n - 7, s.seed)?;
    s.buf.check_zero(s.first + 3, 4)?;
    s.buf.advise(s.first, s.n, libc::MADV_DONTNEED)?;
    s.look()?;
    s.buf.check_zero(s.first, s.n)
}

fn guard(s: &Scene) -> Outcome {
    const INSTALL: i32 = 102;
    const REMOVE: i32 = 103;
    if s.buf.try_advise(s.first + 3, 4, INSTALL).is_err() {
        return Ok(());
    }
    s.look()?;
    s.denied(3)?;
    s.denied(6)?;
    s.holds(0, 3, s.seed)?;
    // Nothing is migrated to where the process wants to be stopped.
    let _ = s.target.to_device(&s.buf, s.first, s.n);
    s.look()?;
    s.denied(4)?;
    s.buf.advise(s.first + 3, 4, REMOVE)?;
    s.buf.check_zero(s.first + 3, 4)?;
    s.holds(7, s.n - 7, s.seed)
}

fn collapse(s: &Scene) -> Outcome {
    if s.huge {
        // One page with other rights splits the entry.
        s.buf.protect(s.first + 3, 1, libc::PROT_READ)?;
        s.buf.protect(s.first + 3, 1, super::RW)?;
        s.map()?;
        let _ = s.buf.try_advise(s.first, s.n, libc::MADV_COLLAPSE);
        s.look()?;
    }
    s.holds(0, s.n, s.seed)
}

/// KSM passes over pages of devices, and the device sees when it merges others.
fn mergeable(s: &Scene) -> Outcome {
    if s.huge {
        return Ok(());
    }
    let ksm = Ksm::start()?;
    let twin = crate::device::Buffer::anon(s.n)?;
    for i in 0..s.n {
        let words = s.buf.words(s.first + i);
        for (word, value) in words.iter().enumerate() {
            twin.set(i, word, *value);
        }
    }
    s.arrange()?;
    s.buf.advise(s.first, s.n, libc::MADV_MERGEABLE)?;
    twin.advise(0, s.n, libc::MADV_MERGEABLE)?;
    ksm.scan()?;
    s.look()?;
    if s.place == Place::Local {
        s.counted("beside KSM")?;
        s.target.expect(&s.buf, s.first, s.n, s.n)?;
    }
    ksm.pause()?;
    s.write(0, s.n, s.seed + 1)?;
    s.look()?;
    twin.check_from(0, s.n, s.seed, s.first)?;
    s.holds(0, s.n, s.seed + 1)
}

/// Calls that move pages between nodes find none of a device to move.
fn moved(s: &Scene) -> Outcome {
    s.stays("after calls of NUMA", || {
        let _ = numa::bind(&s.buf, s.first, s.n, 0, false);
        let _ = numa::bind(&s.buf, s.first, s.n, 0, true);
        for to in [None, Some(0)] {
            let status = numa::move_pages(&s.buf, s.first, s.n, to);
            if let (Ok(status), Place::Local) = (status, s.place) {
                let found = status.iter().position(|node| *node >= 0);
                check_eq!(found, None, "first page of the device with a node, {to:?}");
            }
        }
        Ok(())
    })
}

/// The kernel reads and writes the memory of a process as the process would.
fn read_by_others(s: &Scene) -> Outcome {
    let file = sys::memfd("zdm-entries").or_fail("memfd_create")?;
    let n = s.n.min(16);
    file.set_len((n * PAGE) as u64).or_fail("ftruncate")?;
    let written = s.buf.write_to(&file, s.first, n).or_fail("write")?;
    check_eq!(written, n * PAGE, "bytes written");
    s.look()?;
    let copy = crate::device::Buffer::shared(&file, n)?;
    copy.check_from(0, n, s.seed, s.first)?;
    s.arrange()?;
    copy.fill(0, n, s.seed + 1);
    std::io::Seek::rewind(&mut &file).or_fail("lseek")?;
    let read = s.buf.read_from(&file, s.first, n).or_fail("read")?;
    check_eq!(read, n * PAGE, "bytes read");
    s.look()?;
    s.buf.check_from(s.first, n, s.seed + 1, 0)
}

/// Numbers of the process are the same wherever its pages are.
fn statistics(s: &Scene) -> Outcome {
    for (name, expected) in [("Rss", s.n), ("Anonymous", s.n), ("Swap", 0), ("Locked", 0)] {
        let found = proc::smaps(&s.buf, s.first, s.n, name)?;
        check_eq!(found, expected as u64, "{name} in smaps");
    }
    let pss = proc::smaps(&s.buf, s.first, s.n, "Pss")?;
    check_eq!(pss, s.n as u64, "Pss in smaps");
    for path in ["/proc/self/numa_maps", "/proc/self/clear_refs"] {
        if path.ends_with("maps") {
            // Not every kernel has it.
            let _ = std::fs::read_to_string(path);
        } else {
            std::fs::write(path, "1").or_fail(path)?;
        }
        s.look()?;
    }
    s.holds(0, s.n, s.seed)
}
