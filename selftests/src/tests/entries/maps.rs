// SPDX-License-Identifier: GPL-2.0

//! Operations on where pages are mapped, and for whom.

use super::super::counts::Waiting;
use super::{Operation, Place, Scene};
use crate::check::{OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, pattern_bytes};
use crate::uffd::Uffd;
use crate::{check, check_eq, proc};

pub(super) const OPERATIONS: &[Operation] = &[
    ("fork", fork),
    ("fork of exclusive pages", fork_exclusive),
    ("munmap of a part", munmap_part),
    ("munmap of exclusive pages", munmap_exclusive),
    ("mremap", mremap),
    ("mremap of a part", mremap_part),
    ("mremap that keeps the old place", mremap_dontunmap),
    ("mremap over pages", mremap_over),
    ("UFFDIO_MOVE", uffd_move),
    ("UFFDIO_MOVE onto pages", uffd_move_onto),
    ("a look at a part", windows),
];

/// A look at a part of the pages shows what a look at all of them shows of that part: pagemap,
/// ZDM_INSPECT, SNAPSHOT and the device's reads, which begin in the middle of a huge page then. The
/// frames of pagemap are those of the entries.
fn windows(s: &Scene) -> Outcome {
    let (first, n) = (s.first, s.n);
    for (at, count) in [(0, 1), (1, 1), (3, 5), (n / 2, n / 2), (n - 1, 1)] {
        let pagemap = proc::entries(&s.buf, first, n)?;
        let pages = s.target.inspect(&s.buf, first, n).or_fail("ZDM_INSPECT")?;
        let seen = s.target.snapshot(&s.buf, first, n).or_fail("SNAPSHOT")?;
        let (part, here) = (at..at + count, first + at);
        let pfns: Vec<u64> = pages.iter().map(|p| p.pfn).collect();
        let mut frames = proc::on_device(&s.buf, here, count)?;
        frames.extend(proc::frames(&s.buf, here, count)?);
        check_eq!(
            frames,
            pfns[part.clone()],
            "frames by pagemap of {count} pages from {at} on"
        );
        check_eq!(
            proc::entries(&s.buf, here, count)?,
            pagemap[part.clone()],
            "pagemap of {count} pages from {at} on"
        );
        let look = s
            .target
            .inspect(&s.buf, here, count)
            .or_fail("ZDM_INSPECT")?;
        let found: Vec<u64> = look.iter().map(|p| p.pfn).collect();
        check_eq!(
            found,
            pfns[part.clone()],
            "frames of {count} pages from {at} on"
        );
        let look = s.target.snapshot(&s.buf, here, count).or_fail("SNAPSHOT")?;
        check_eq!(look, seen[part], "SNAPSHOT of {count} pages from {at} on");
        // The device forgets what it has mapped, and asks for this part alone.
        s.buf.protect(first, n, libc::PROT_READ)?;
        s.buf.protect(first, n, super::RW)?;
        let read = s.target.read(&s.buf, here, count).or_fail("READ")?;
        crate::device::check_bytes(&read.data, s.seed, here, "READ of a part")?;
    }
    s.holds(0, n, s.seed)
}

/// Neither the device nor the CPU changes what the child has, and the other way round.
fn fork(s: &Scene) -> Outcome {
    let half = s.n / 2;
    let child = Waiting::start(
        || Ok(()),
        || {
            s.buf.check(s.first, s.n, s.seed)?;
            s.buf.fill(s.first + half, s.n - half, s.seed + 2);
            s.buf.check(s.first, half, s.seed)
        },
    )?;
    s.look()?;
    let rss = proc::smaps(&s.buf, s.first, s.n, "Rss")?;
    check_eq!(rss, s.n as u64, "Rss of the parent");
    s.counted("shared with a child")?;
    s.write(0, half, s.seed + 1)?;
    s.look()?;
    child.join()?;
    s.holds(0, half, s.seed + 1)?;
    s.holds(half, s.n - half, s.seed)
}

/// Exclusive access of a device ends for both processes, and the pages are shared as others.
fn fork_exclusive(s: &Scene) -> Outcome {
    let Some(n) = s.exclusive()? else {
        return Ok(());
    };
    let child = Waiting::start(|| Ok(()), || s.buf.check(s.first, s.n, s.seed))?;
    s.look()?;
    s.write(0, n, s.seed + 1)?;
    s.look()?;
    child.join()?;
    s.holds(0, n, s.seed + 1)
}

fn munmap_part(s: &Scene) -> Outcome {
    for at in [0, 5] {
        s.buf.unmap(s.first + at, 3)?;
        s.look()?;
        s.denied(at)?;
        s.denied(at + 2)?;
        s.buf.map_again(s.first + at, 3)?;
        s.look()?;
        s.buf.check_zero(s.first + at, 3)?;
        s.buf.fill(s.first + at, 3, s.seed);
    }
    s.holds(0, s.n, s.seed)
}

fn munmap_exclusive(s: &Scene) -> Outcome {
    let Some(n) = s.exclusive()? else {
        return Ok(());
    };
    s.buf.unmap(s.first, n)?;
    s.look()?;
    s.buf.map_again(s.first, n)?;
    s.look()?;
    s.buf.check_zero(s.first, n)?;
    s.holds(n, s.n - n, s.seed)
}

/// Room for the pages of a scene, aligned as they are.
pub(super) fn room(s: &Scene) -> Outcome<Buffer> {
    Buffer::anon_huge_aligned(if s.huge {
        3 * HUGE_PAGES
    } else {
        3 * super::SMALL
    })
}

fn mremap(s: &Scene) -> Outcome {
    let place = room(s)?;
    s.buf.move_pages(s.first, s.n, &place, s.first)?;
    s.look()?;
    s.denied(0)?;
    s.buf.map_again(s.first, s.n)?;
    s.look()?;
    s.buf.check_zero(s.first, s.n)?;
    let read = s.target.read(&place, s.first, s.n).or_fail("READ")?;
    crate::device::check_bytes(&read.data, s.seed, s.first, "READ at the new place")?;
    // By rmap, which must find the pages where they are now.
    s.target.release().or_fail("RELEASE")?;
    place.check(s.first, s.n, s.seed)
}

/// A huge page is split in its place, and some of its pages are elsewhere then.
fn mremap_part(s: &Scene) -> Outcome {
    let place = room(s)?;
    s.buf.move_pages(s.first + 3, 4, &place, s.first + 3)?;
    s.look()?;
    s.denied(3)?;
    s.buf.map_again(s.first + 3, 4)?;
    s.holds(0, 3, s.seed)?;
    s.holds(7, s.n - 7, s.seed)?;
    s.look()?;
    s.target.release().or_fail("RELEASE")?;
    place.check(s.first + 3, 4, s.seed)
}

fn mremap_dontunmap(s: &Scene) -> Outcome {
    let place = room(s)?;
    s.buf.move_contents(s.first, s.n, &place, s.first)?;
    s.look()?;
    s.write(0, s.n, s.seed + 3)?;
    s.look()?;
    place.check(s.first, s.n, s.seed)?;
    s.holds(0, s.n, s.seed + 3)
}

fn mremap_over(s: &Scene) -> Outcome {
    let other = room(s)?;
    other.fill(s.first, s.n, s.seed + 4);
    other.move_pages(s.first, s.n, &s.buf, s.first)?;
    s.look()?;
    s.holds(0, s.n, s.seed + 4)
}

/// Pages move, or are refused: either way the device sees what the CPU does.
fn uffd_move(s: &Scene) -> Outcome {
    let to = room(s)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register(&to, 0, to.pages())
        .or_fail("UFFDIO_REGISTER")?;
    let moved = uffd
        .move_pages(&s.buf, s.first, s.n, &to, s.first)
        .unwrap_or(0);
    check!(
        moved > 0 || s.place != Place::System,
        "pages of the system that moved: expected some"
    );
    s.look()?;
    to.check(s.first, moved, s.seed)?;
    s.holds(moved, s.n - moved, s.seed)?;
    if moved > 0 && s.place == Place::System {
        // By address, and back by rmap: a page with an old index is found by neither.
        proc::drain_batches()?;
        s.target
            .to_device(&to, s.first, moved)
            .or_fail("MIGRATE_TO_DEV")?;
        s.target.expect(&to, s.first, moved, moved)?;
        s.target.release().or_fail("RELEASE")?;
        s.target.expect(&to, s.first, moved, 0)?;
        to.check(s.first, moved, s.seed)?;
    }
    s.buf.fill(s.first, s.n, s.seed);
    Ok(())
}

/// Where a page is already, none comes.
fn uffd_move_onto(s: &Scene) -> Outcome {
    if s.huge {
        // A stock kernel does not end: `uffd.move_onto_huge`.
        return Ok(());
    }
    let from = room(s)?;
    from.fill(s.first, s.n, s.seed + 5);
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register(&s.buf, s.first, s.n)
        .or_fail("UFFDIO_REGISTER")?;
    let result = uffd.move_pages(&from, s.first, s.n, &s.buf, s.first);
    check!(
        result.is_err(),
        "UFFDIO_MOVE onto pages: expected an error, found {result:?}"
    );
    s.look()?;
    from.check(s.first, s.n, s.seed + 5)?;
    s.holds(0, s.n, s.seed)
}

impl Scene<'_> {
    /// Gives the device exclusive access to some pages, and returns how many; `None` where the CPU
    /// has none that could be taken.
    #[track_caller]
    pub(super) fn exclusive(&self) -> Outcome<Option<usize>> {
        if self.is_away() {
            return Ok(None);
        }
        let n = self.n.min(8);
        let taken = self.target.exclusive(&self.buf, self.first, n);
        let taken = taken.or_fail("EXCLUSIVE")?;
        check_eq!(
            taken.data == pattern_bytes(self.seed, self.first, n),
            true,
            "data of exclusive pages"
        );
        self.look()?;
        Ok(Some(n))
    }
}
